//! Activations of a trained model, with a near window that is exact.

use rayon::prelude::*;
use sata::{Form, Plan};
use serde::Serialize;

use super::{Series, pairs};
use crate::failure::{Failure, Outcome};
use crate::inspect::candidates::{Candidate, Window};
use crate::inspect::engine::{Outputs, engine};
use crate::inspect::exact::{Exact, Setting, exact};
use crate::inspect::head::Head;
use crate::inspect::input::Layer;
use crate::inspect::measure::{Figures, QueryErrors};
use crate::inspect::sample::Sample;
use crate::progress::Progress;
use crate::reproduce::activations::{LAYERS, excerpt};
use crate::reproduce::formulas::features;
use crate::tensors::Dtype;

/// Blocks before a query's own that are near.
pub const NEAR: usize = 1;
/// How windows are cut. The excerpt has a few hundred tokens: with blocks of 64 about
/// half of what a query sees would be near.
pub const WINDOW: Window = Window { block: 16, sinks: 4 };
/// Numbers of terms.
pub const TERMS: [usize; 4] = [2, 3, 4, 6];
/// Terms beyond which a state at the excerpt's d = 64 is too large to be kept (D is 11 million at
/// six): computed here by the direct form, to be seen and not to be recommended.
pub const USUAL_TERMS: usize = 4;

/// One causal layer.
#[derive(Clone, Debug, Serialize)]
pub struct Trained {
    /// Model and layer.
    pub name: &'static str,
    /// Query heads.
    pub heads: usize,
    /// Tokens.
    pub tokens: usize,
    /// d_K = d_V.
    pub d: usize,
    /// Tokens of a block.
    pub block: usize,
    /// Blocks before a query's own that are near.
    pub near: usize,
    /// First tokens that stay near.
    pub sinks: usize,
    /// The first token whose query counts.
    pub from: usize,
    /// The near window alone: the far past is dropped.
    pub alone: Figures,
    /// With the far past weighed by a series.
    pub tails: Vec<Tail>,
}

/// What a series makes of the far past.
#[derive(Clone, Debug, Serialize)]
pub struct Tail {
    /// Which coefficients.
    pub series: Series,
    /// P.
    pub terms: usize,
    /// D.
    pub features: u128,
    /// Over the queries of all heads.
    pub errors: Figures,
}

/// Units of work, for the progress bar.
pub fn units() -> u64 {
    LAYERS.iter().filter(|layer| layer.2).count() as u64
}

/// Measures all causal layers of the excerpt.
///
/// # Errors
/// None, for the excerpt as it comes.
pub fn run(progress: &Progress) -> Outcome<Vec<Trained>> {
    let file = excerpt()?;
    let mut all = vec![];
    for (prefix, name, causal) in LAYERS {
        if causal {
            progress.doing(format!("other coefficients: {name}"));
            all.push(look(name, &Layer::read(&file, prefix, causal, Dtype::F64)?)?);
            progress.done(1);
        }
    }
    Ok(all)
}

fn look(name: &'static str, layer: &Layer) -> Outcome<Trained> {
    let [_, heads, tokens, d] = layer.shapes[0];
    let sample = Sample::new(tokens, Some(tokens / 4), tokens, true)?;
    let data = layer.tensors.each_ref().map(|tensor| tensor.data.to_f64());
    let qkv = data.each_ref().map(Vec::as_slice);
    let heads_of: Vec<_> = (0..heads).map(|head| Head::of(qkv, layer.shapes, [0, head])).collect();
    let scale = 1.0 / (d as f64).sqrt();
    let setting = Setting { scale, causal: true, alone: &[NEAR], window: WINDOW };
    let truths: Vec<Exact> = heads_of.iter().map(|head| exact(head, &sample, &setting)).collect();

    let figures = |outputs: &[Outputs]| {
        let mut errors = QueryErrors::default();
        for (outputs, truth) in outputs.iter().zip(&truths) {
            errors.add(&QueryErrors::new(outputs, &truth.softmax, d));
        }
        errors.figures()
    };
    let alone = |truth: &Exact| Outputs {
        rows: truth.alone[0].clone(),
        counted: sample.positions.len() as u64,
        non_positive: 0,
        non_finite: 0,
    };
    let tail = |(series, terms): (Series, usize)| -> Outcome<Tail> {
        let candidate = Candidate { far: Some(series.far(terms)), near: Some(NEAR) };
        let Some(spec) = candidate.spec([d; 2], None, WINDOW)? else {
            return Err(Failure::new("a series without a description"));
        };
        let plan = Plan::new(&spec)?.with_form(Form::Direct);
        let outputs: Result<Vec<Outputs>, _> =
            heads_of.par_iter().map(|head| engine(&plan, head, true, &sample)).collect();
        let (features, errors) = (features(d, terms), figures(&outputs?));
        Ok(Tail { series, terms, features, errors })
    };
    Ok(Trained {
        name,
        heads,
        tokens,
        d,
        block: WINDOW.block,
        near: NEAR,
        sinks: WINDOW.sinks,
        from: sample.from,
        alone: figures(&truths.iter().map(alone).collect::<Vec<_>>()),
        tails: pairs(&TERMS).map(tail).collect::<Outcome<_>>()?,
    })
}

impl Trained {
    /// The tail of a series with so many terms.
    pub fn tail(&self, series: Series, terms: usize) -> Option<&Tail> {
        self.tails.iter().find(|tail| (tail.series, tail.terms) == (series, terms))
    }
}

#[cfg(test)]
mod tests {
    use sata_oracle::{Near, Problem, Shape};

    use super::*;

    #[test]
    fn the_oracle_finds_the_same() {
        let (prefix, name, causal) = LAYERS[1];
        let layer = Layer::read(&excerpt().unwrap(), prefix, causal, Dtype::F64).unwrap();
        let found = look(name, &layer).unwrap();
        let (heads, tokens, d) = (found.heads, found.tokens, found.d);
        let [q, k, v] = layer.tensors.each_ref().map(|tensor| tensor.data.to_f64());
        let (query_heads, kv_heads, queries, keys) = (heads, 1, tokens, tokens);
        let shape = Shape { query_heads, kv_heads, queries, keys, d_key: d, d_value: d };
        let mut problem = Problem::new(shape, &q, &k, &v);
        let want = sata_oracle::softmax_attention(&problem).y;
        (problem.near, problem.block, problem.sinks) = (Near::Blocks(1), 16, 4);

        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let check = |problem: &Problem<'_>, figures: &Figures| {
            let got = sata_oracle::attention(problem).y;
            let mut errors = vec![];
            for (i, (got, want)) in got.chunks(d).zip(want.chunks(d)).enumerate() {
                if i % tokens >= 80 {
                    let off = norm(&mut got.iter().zip(want).map(|(got, want)| got - want));
                    errors.push(off / norm(&mut want.iter().copied()));
                }
            }
            errors.sort_by(f64::total_cmp);
            let n = errors.len();
            assert_eq!(n, 720);
            let median = (errors[n / 2 - 1] + errors[n / 2]) / 2.0;
            assert!((figures.relative.median / median - 1.0).abs() < 1e-8, "{figures:?} {median}");
            // 99 % of 719 steps: 711.81.
            let p99 = 0.19 * errors[711] + 0.81 * errors[712];
            assert!((figures.relative.p99 / p99 - 1.0).abs() < 1e-6, "{figures:?} {p99}");
        };
        // No far past.
        problem.series = sata_oracle::Series::Fixed(vec![0.0]);
        check(&problem, &found.alone);
        for tail in found.tails.iter().filter(|tail| tail.terms <= USUAL_TERMS) {
            problem.terms = tail.terms;
            problem.series = match tail.series {
                Series::Taylor => sata_oracle::Series::Taylor,
                Series::Gauss => sata_oracle::Series::Gauss,
                Series::Hermite => sata_oracle::Series::Hermite { tau: 0.9 },
            };
            check(&problem, &tail.errors);
        }
    }

    #[test]
    fn coefficients_that_suit_a_query_beat_the_window_and_taylor() {
        for layer in run(&Progress::new(0)).unwrap() {
            let median = |series, terms| layer.tail(series, terms).unwrap().errors.relative.median;
            let gauss = median(Series::Gauss, 4);
            assert!(gauss < layer.alone.relative.median, "{}: {gauss}", layer.name);
            assert!(gauss < median(Series::Taylor, 4), "{}: {gauss}", layer.name);
        }
    }
}
