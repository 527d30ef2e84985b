//! What every candidate makes of one layer.

use rayon::prelude::*;
use sata::{Form, Plan, Spec};
use serde::Serialize;

use super::candidates::{Candidate, Window};
use super::engine::{Outputs, engine};
use super::exact::{Exact, LogitSums, Logits, Setting, exact};
use super::head::Head;
use super::input::Layer;
use super::sample::Sample;
use crate::errors::quantile;
use crate::failure::Outcome;
use crate::machine;
use crate::progress::Progress;
use crate::table::bytes;
use crate::tensors::Number;

/// What all layers are asked.
#[derive(Clone, Copy, Debug)]
pub struct Task<'a> {
    /// What is tried.
    pub candidates: &'a [Candidate],
    /// How near windows are cut.
    pub window: Window,
    /// c⁻¹, when it is not 1/√d_K.
    pub scale: Option<f64>,
    /// Whether a query sees only the keys up to its own.
    pub causal: bool,
}

/// One layer, measured.
#[derive(Debug)]
pub struct Measured {
    /// By query head.
    pub logits: Vec<Logits>,
    /// By candidate, what it was, or why it was not tried.
    pub tried: Vec<Result<Tried, String>>,
}

/// One candidate over one layer.
#[derive(Debug)]
pub struct Tried {
    /// Bytes of the state of one key/value head.
    pub state_bytes: u128,
    /// Tokens from which a KV cache of the same number type is larger.
    pub break_even_tokens: u128,
    /// By query head.
    pub heads: Vec<QueryErrors>,
}

/// Distances |ŷ − y| of a candidate's outputs from softmax, one for each query.
#[derive(Clone, Debug, Default)]
pub struct QueryErrors {
    /// Over |y|.
    relative: Vec<f64>,
    /// Over √d_V: root mean square over channels.
    absolute: Vec<f64>,
    counted: u64,
    non_positive: u64,
    non_finite: u64,
}

/// Where the errors of queries lie. An output that is not finite counts as infinitely far off
/// (null in JSON).
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// Half of the queries are within this.
    pub median: f64,
    /// 99 of 100 are.
    pub p99: f64,
}

/// The errors of some queries in a few numbers.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Figures {
    /// |ŷ − y| / |y|.
    pub relative: Spread,
    /// |ŷ − y| / √d_V.
    pub absolute: Spread,
    /// Share of queries whose denominator is zero or negative.
    pub non_positive: f64,
    /// Share of queries whose denominator is not finite.
    pub non_finite: f64,
}

impl QueryErrors {
    /// The errors of outputs of size `d_value` against `want`.
    pub fn new(outputs: &Outputs, want: &[f64], d_value: usize) -> Self {
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let mut errors = QueryErrors {
            counted: outputs.counted,
            non_positive: outputs.non_positive,
            non_finite: outputs.non_finite,
            ..QueryErrors::default()
        };
        for (got, want) in outputs.rows.chunks_exact(d_value).zip(want.chunks_exact(d_value)) {
            let off = norm(&mut got.iter().zip(want).map(|(got, want)| got - want));
            let off = if off.is_finite() { off } else { f64::INFINITY };
            let size = norm(&mut want.iter().copied());
            errors.relative.push(if off == 0.0 { 0.0 } else { off / size });
            errors.absolute.push(off / (d_value as f64).sqrt());
        }
        errors
    }

    /// Adds the errors of other queries.
    pub fn add(&mut self, other: &Self) {
        self.relative.extend(&other.relative);
        self.absolute.extend(&other.absolute);
        self.counted += other.counted;
        self.non_positive += other.non_positive;
        self.non_finite += other.non_finite;
    }

    /// What they come to.
    pub fn figures(&self) -> Figures {
        let spread = |errors: &[f64]| {
            let mut errors = errors.to_vec();
            errors.sort_by(f64::total_cmp);
            Spread { median: quantile(&errors, 0.5), p99: quantile(&errors, 0.99) }
        };
        let share = |n: u64| n as f64 / self.counted.max(1) as f64;
        Figures {
            relative: spread(&self.relative),
            absolute: spread(&self.absolute),
            non_positive: share(self.non_positive),
            non_finite: share(self.non_finite),
        }
    }
}

/// Measures a layer with the engine on inputs of type `E`; one unit of progress for softmax and
/// one for each candidate.
///
/// # Errors
/// What the engine refuses, except for what it cannot do or has no memory for: that candidate is
/// then left out with its reason.
pub fn measure<E: Number>(
    layer: &Layer,
    sample: &Sample,
    task: &Task<'_>,
    progress: &Progress,
) -> Outcome<Measured> {
    let [q_shape, k_shape, v_shape] = layer.shapes;
    let sizes = [q_shape[3], v_shape[3]];
    let heads = q_shape[1];
    let units: Vec<[usize; 2]> =
        (0..q_shape[0]).flat_map(|batch| (0..heads).map(move |head| [batch, head])).collect();

    let inputs = layer.tensors.each_ref().map(|tensor| tensor.data.to_f64());
    let alone: Vec<usize> = task
        .candidates
        .iter()
        .filter_map(|candidate| if candidate.far.is_none() { candidate.near } else { None })
        .collect();
    let scale = task.scale.unwrap_or_else(|| 1.0 / (sizes[0] as f64).sqrt());
    let setting = Setting { scale, causal: task.causal, alone: &alone, window: task.window };
    let truths: Vec<Exact> = units
        .par_iter()
        .map(|&unit| {
            let head = Head::of(inputs.each_ref().map(Vec::as_slice), layer.shapes, unit);
            exact(&head, sample, &setting)
        })
        .collect();
    drop(inputs);
    progress.done(1);

    let mut logits = vec![LogitSums::default(); heads];
    for ([_, head], truth) in units.iter().zip(&truths) {
        logits[*head].add(&truth.logits);
    }
    let inputs = layer.tensors.each_ref().map(|tensor| E::take(&tensor.data));
    let mut tried = vec![];
    let mut windows = 0;
    for candidate in task.candidates {
        let spec = candidate.spec(sizes, task.scale, task.window)?;
        let state_bytes = candidate.state_bytes::<E>(spec.as_ref(), sizes, task.window);
        let outputs = match &spec {
            None => {
                windows += 1;
                let drop_far = |truth: &Exact| dropped(&truth.alone[windows - 1], sizes[1]);
                Ok(truths.iter().map(drop_far).collect())
            }
            Some(spec) => run(spec, state_bytes, |plan| {
                let inputs = inputs.each_ref().map(Vec::as_slice);
                let one = |&unit| {
                    let head = Head::of(inputs, layer.shapes, unit);
                    engine(plan, &head, task.causal, sample)
                };
                let lengths = [q_shape[2], k_shape[2]];
                let threads = machine::threads();
                match plan.recipe::<E>([1, 1], lengths, task.causal, false, threads).form {
                    Form::Direct => units.par_iter().map(one).collect(),
                    // A state of every head at once might not fit; one is shared by all threads.
                    Form::State => units.iter().map(one).collect(),
                }
            })?,
        };
        tried.push(outputs.map(|outputs| {
            let mut errors = vec![QueryErrors::default(); heads];
            for (([_, head], truth), outputs) in units.iter().zip(&truths).zip(&outputs) {
                errors[*head].add(&QueryErrors::new(outputs, &truth.softmax, sizes[1]));
            }
            let token = (sizes[0] + sizes[1]) as u128 * size_of::<E::Compute>() as u128;
            Tried { state_bytes, break_even_tokens: state_bytes.div_ceil(token), heads: errors }
        }));
        progress.done(1);
    }
    Ok(Measured { logits: logits.iter().map(LogitSums::logits).collect(), tried })
}

/// What `work` does with a plan, or why there is none.
fn run(
    spec: &Spec,
    state_bytes: u128,
    work: impl Fn(&Plan) -> Result<Vec<Outputs>, sata::Error>,
) -> Outcome<Result<Vec<Outputs>, String>> {
    let memory = machine::available_memory().unwrap_or(isize::MAX as u128);
    if state_bytes > memory {
        return Ok(Err(format!(
            "the state of one head needs {}, and {} of memory are free",
            bytes(state_bytes),
            bytes(memory)
        )));
    }
    match Plan::new(spec).and_then(|plan| work(&plan)) {
        Ok(outputs) => Ok(Ok(outputs)),
        Err(error @ (sata::Error::Unsupported { .. } | sata::Error::TooLarge { .. })) => {
            Ok(Err(error.to_string()))
        }
        Err(error) => Err(error.into()),
    }
}

/// Outputs that were made without the engine; exponentials have positive sums.
fn dropped(rows: &[f64], d_value: usize) -> Outputs {
    let counted = (rows.len() / d_value) as u64;
    Outputs { rows: rows.to_vec(), counted, non_positive: 0, non_finite: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_measured_by_query() {
        let outputs = |rows: &[f64]| Outputs {
            rows: rows.into(),
            counted: 4,
            non_positive: 1,
            non_finite: 0,
        };
        let want = [3.0, 4.0, 0.0, 0.0, 1.0, 0.0];
        let mut errors = QueryErrors::new(&outputs(&[3.0, 3.0, 0.0, 0.0, f64::NAN, 0.0]), &want, 2);
        assert_eq!(errors.relative, [0.2, 0.0, f64::INFINITY]);
        assert_eq!(errors.absolute, [1.0 / 2f64.sqrt(), 0.0, f64::INFINITY]);
        let figures = errors.figures();
        assert_eq!((figures.relative.median, figures.relative.p99), (0.2, f64::INFINITY));
        assert_eq!((figures.non_positive, figures.non_finite), (0.25, 0.0));
        errors.add(&QueryErrors::new(&outputs(&want), &want, 2));
        assert_eq!(errors.figures().relative.median, 0.0);
        assert_eq!(errors.figures().non_positive, 0.25);
    }
}
