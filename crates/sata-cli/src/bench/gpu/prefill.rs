//! Whole calls: forward, forward and backward, long contexts and short ones.

use rayon::prelude::*;
use sata_cuda::{Element, Plan};
use serde::Serialize;

use super::Bench;
use super::attention::{Attention, Target};
use super::noise::Noise;
use super::pass::{Shape, measure, warm};
use super::timer::Timing;
use crate::failure::Outcome;
use crate::table::three;

/// One attention at one size.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// In a few words.
    pub what: String,
    /// What was computed.
    pub attention: Attention,
    /// D.
    pub features: usize,
    /// Of q, k, v and outputs.
    pub dtype: &'static str,
    /// Sequences.
    pub batch: usize,
    /// Heads of each.
    pub heads: usize,
    /// Whether they are fewer than usual, since all would have taken too long.
    pub fewer_heads: bool,
    /// Tokens of each sequence.
    pub tokens: usize,
    /// Of one call, or of its forward and backward.
    pub timing: Timing,
    /// Nanoseconds per token and head.
    pub ns: f64,
    /// 4 D (d_V + 1) FLOPs per token and head, over the time of the forward pass.
    pub useful_tflops: Option<f64>,
    /// Denominators that were not positive, of all.
    pub non_positive: u64,
    /// Denominators that were not finite.
    pub non_finite: u64,
    /// Nanoseconds per token and head that it should take.
    pub target: Option<Target>,
}

impl Row {
    /// Whether the target is met, where there is one.
    pub fn met(&self) -> Option<bool> {
        self.target.map(|target| self.ns <= target.at_most)
    }
}

/// Plans, their kernels compiled side by side.
fn plans<E: Element>(
    bench: &Bench,
    noise: &Noise<E>,
    attentions: &[Attention],
    both: bool,
) -> Outcome<Vec<Plan>> {
    let what = if both { "forward and backward" } else { "forward" };
    bench.progress(&format!("compiling {what} of {} settings", attentions.len()));
    attentions.par_iter().map(|&attention| warm(bench, noise, attention, both)).collect()
}

fn row<E: Element>(
    bench: &Bench,
    noise: &Noise<E>,
    plan: &Plan,
    attention: Attention,
    shape: Shape,
    both: bool,
) -> Outcome<Row> {
    let Shape { batch, heads, tokens } = shape;
    let measured = measure(bench, noise, plan, attention, shape, both)?;
    let of = (batch * measured.heads * tokens) as f64;
    let seconds = measured.timing.seconds;
    let row = Row {
        what: attention.name(),
        attention,
        features: plan.features()?,
        dtype: E::KERNEL_NAME,
        batch,
        heads: measured.heads,
        fewer_heads: measured.heads < heads,
        tokens,
        timing: measured.timing,
        ns: 1e9 * seconds / of,
        useful_tflops: if both { None } else { Some(attention.flops()? * of / seconds / 1e12) },
        non_positive: measured.diagnostics.non_positive,
        non_finite: measured.diagnostics.non_finite,
        target: None,
    };
    bench.progress(&format!(
        "d={} {} {}, {batch} × {} heads, {tokens} tokens: {} ns per token and head",
        attention.d,
        row.what,
        row.dtype,
        row.heads,
        three(row.ns)
    ));
    Ok(row)
}

/// Long contexts, forward.
///
/// # Errors
/// What the library refuses, or the device has no room for.
pub fn forward(bench: &Bench) -> Outcome<Vec<Row>> {
    let scope = &bench.scope;
    let mut attentions = vec![];
    for &d in &scope.dims {
        let all = Attention::all(d);
        attentions.extend(if scope.quick { vec![all[0]] } else { all });
        attentions.push(Attention { causal: false, ..Attention::paper(d) });
    }
    let mut rows = vec![];
    let made = plans(bench, &bench.noise, &attentions, false)?;
    for (attention, plan) in attentions.iter().zip(&made) {
        let heads = scope.heads(attention.heads());
        let shape = Shape { batch: 1, heads, tokens: scope.tokens };
        let mut row = row(bench, &bench.noise, plan, *attention, shape, false)?;
        row.target = if scope.quick { None } else { attention.target(false)? };
        rows.push(row);
    }
    // In f32, on the kernels that serve every GPU.
    let attentions: Vec<Attention> = scope.dims.iter().map(|&d| Attention::paper(d)).collect();
    let noise = Noise::<f32>::new(&bench.device, scope.elements / 8)?;
    let made = plans(bench, &noise, &attentions, false)?;
    for (attention, plan) in attentions.iter().zip(&made) {
        let heads = scope.heads(attention.heads());
        let shape = Shape { batch: 1, heads, tokens: scope.generic_tokens };
        rows.push(row(bench, &noise, plan, *attention, shape, false)?);
    }
    Ok(rows)
}

/// Long contexts, forward and backward.
///
/// # Errors
/// As for [`forward`].
pub fn both(bench: &Bench) -> Outcome<Vec<Row>> {
    let scope = &bench.scope;
    let mut attentions = vec![];
    for &d in &scope.dims {
        let all = Attention::all(d);
        attentions.extend(if scope.quick { vec![all[0]] } else { all });
    }
    let mut rows = vec![];
    let made = plans(bench, &bench.noise, &attentions, true)?;
    for (attention, plan) in attentions.iter().zip(&made) {
        let heads = scope.heads(attention.heads());
        let shape = Shape { batch: 1, heads, tokens: scope.tokens };
        let mut row = row(bench, &bench.noise, plan, *attention, shape, true)?;
        row.target = if scope.quick { None } else { attention.target(true)? };
        rows.push(row);
    }
    Ok(rows)
}

/// Short contexts of the paper's setting, as many sequences as give the same work at each length.
///
/// # Errors
/// As for [`forward`].
pub fn short(bench: &Bench, both: bool) -> Outcome<Vec<Row>> {
    let scope = &bench.scope;
    let attentions: Vec<Attention> = scope.dims.iter().map(|&d| Attention::paper(d)).collect();
    let made = plans(bench, &bench.noise, &attentions, both)?;
    let mut rows = vec![];
    for (attention, plan) in attentions.iter().zip(&made) {
        for &tokens in if both { &scope.short_both } else { &scope.short } {
            let heads = scope.heads(attention.heads());
            let batch = (scope.tokens / tokens).max(1);
            let shape = Shape { batch, heads, tokens };
            rows.push(row(bench, &bench.noise, plan, *attention, shape, both)?);
        }
    }
    Ok(rows)
}
