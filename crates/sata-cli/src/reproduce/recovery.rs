//! The experiments of figures A3 and A4: how well conventional attention is recovered, over
//! 102,400 tokens drawn from N(0, 1), rounded to f16 and computed in f32.

use std::ops::Range;
use std::time::Instant;

use sata::{Call, Diagnostics, Form, Plan, Spec, View, ViewMut};
use serde::Serialize;

use super::progress::Progress;
use super::random::Sample;
use super::reference;
use super::scope::{HEADS, Scope, TOKENS};
use super::truth::{LAST, Truth, stretches};
use crate::errors::{Errors, QUANTILES, SMALLEST, log10, quantile};
use crate::failure::Outcome;
use crate::machine;

/// Width of a bar of the histograms, in decades.
pub const BAR: f64 = 0.1;
/// Range of the histograms, in decades.
pub const HISTOGRAM: [f64; 2] = [-8.0, 2.0];

/// One head size and number of terms.
#[derive(Clone, Debug, Serialize)]
pub struct Recovery {
    /// d_K = d_V.
    pub d: usize,
    /// P.
    pub terms: usize,
    /// D.
    pub features: u128,
    /// Tokens of the context.
    pub tokens: usize,
    /// Queries that were compared.
    pub queries: usize,
    /// How it was computed.
    pub form: Form,
    /// Seconds for all tokens.
    pub seconds: f64,
    /// Denominators over all tokens.
    pub diagnostics: Diagnostics,
    /// Elementwise errors over the whole context.
    pub errors: Errors,
    /// ‖Ŷ−Y‖/‖Y‖ of single queries at 5, 25, 50, 75, 95 and 99.9 %.
    pub query_relative: [f64; 6],
    /// log10 of the median |Y−Ŷ| over the last 1,024 tokens.
    pub log10_median_last: f64,
    /// The reference's log10 median |Y−Ŷ|, where it was measured.
    pub reference: Option<f64>,
    /// The reference's log10 median over the last 1,024 tokens.
    pub reference_last: Option<f64>,
    /// Share of elements by log10 |Y−Ŷ|, in bars from −8 on.
    pub histogram: Vec<f64>,
    /// Share of queries by log10 ‖Ŷ−Y‖/‖Y‖, in bars from −8 on.
    pub histogram_relative: Vec<f64>,
    /// Errors by context length.
    pub positions: Vec<Stretch>,
}

/// Errors in one stretch of the context: at 5, 50 and 95 %.
#[derive(Clone, Debug, Serialize)]
pub struct Stretch {
    /// Its first token.
    pub from: usize,
    /// Past its last token.
    pub to: usize,
    /// log10 |Y−Ŷ|.
    pub log10_absolute: [f64; 3],
    /// log10 ‖Ŷ−Y‖/‖Y‖ of single queries.
    pub log10_relative: [f64; 3],
}

/// Units of work of all experiments, for the progress bar.
pub fn units(scope: &Scope) -> u64 {
    scope.recovery.iter().map(|&(d, terms)| unit(d, terms)).sum()
}

fn unit(d: usize, terms: usize) -> u64 {
    let orders: Vec<usize> = (0..terms).collect();
    let state = sata::cost::useful_flops(d, d, &orders) * TOKENS as u128;
    let direct = sata::cost::direct_flops(d, d, terms) * (TOKENS * TOKENS / 2) as u128;
    1 + (state.min(direct) / 10_000_000_000) as u64
}

/// Runs the experiments of a scope.
///
/// # Errors
/// What the library refuses, which on an ordinary machine is nothing.
pub fn run(scope: &Scope, progress: &Progress) -> Outcome<Vec<Recovery>> {
    let mut all = vec![];
    for d in HEADS {
        let terms: Vec<usize> =
            scope.recovery.iter().filter(|size| size.0 == d).map(|size| size.1).collect();
        if terms.is_empty() {
            continue;
        }
        progress.doing(format!("figures A3 and A4: f64 softmax, d = {d}"));
        let inputs = Sample::new(scope.seed, d, TOKENS);
        let uniform = scope.elements.map(|elements| elements / d);
        let truth = Truth::new(scope.seed, d, &inputs.to_f64(), uniform)?;
        for terms in terms {
            progress.doing(format!("figures A3 and A4: d = {d}, P = {terms}"));
            all.push(one(d, terms, &inputs, &truth)?);
            progress.done(unit(d, terms));
        }
    }
    Ok(all)
}

fn one(d: usize, terms: usize, inputs: &Sample, truth: &Truth) -> Outcome<Recovery> {
    let plan = Plan::new(&Spec::new(d, d).terms(terms).build()?)?;
    let shape = [1, 1, TOKENS, d];
    let [q, k, v] = &inputs.qkv;
    let (q, k, v) = (View::new(q, shape)?, View::new(k, shape)?, View::new(v, shape)?);
    let mut y = vec![0.0f32; TOKENS * d];
    let recipe = plan.recipe::<f32>([1, 1], [TOKENS; 2], true, false, machine::threads());
    let start = Instant::now();
    let diagnostics = plan.run(Call::causal(q, k, v), ViewMut::new(&mut y, shape)?)?;
    let seconds = start.elapsed().as_secs_f64();

    let compared = Compared::new(truth, &y);
    let reference = reference::medians(d, terms);
    let uniform = &truth.uniform;
    let relative: Vec<f64> = uniform.iter().map(|&i| compared.relative[i]).collect();
    let elements: Vec<f64> = uniform.iter().flat_map(|&i| compared.row(i)).copied().collect();
    let wanted: Vec<f64> = uniform.iter().flat_map(|&i| truth.row(i)).copied().collect();
    let got = uniform.iter().flat_map(|&i| got(&y, truth, i)).map(|&x| f64::from(x));
    let Some(errors) = Errors::new(got, &wanted) else {
        return Err(crate::failure::Failure::new(format!(
            "d = {d}, P = {terms}: no finite output"
        )));
    };
    Ok(Recovery {
        d,
        terms,
        features: recipe.features,
        tokens: TOKENS,
        queries: uniform.len(),
        form: recipe.form,
        seconds,
        diagnostics,
        errors,
        query_relative: QUANTILES.map(|q| quantile(&sorted(relative.clone()), q)),
        log10_median_last: compared.stretch(truth.within(TOKENS - LAST..TOKENS)).0[1],
        reference: reference.map(|medians| medians.0),
        reference_last: reference.map(|medians| medians.1),
        histogram: histogram(&elements),
        histogram_relative: histogram(&relative),
        positions: stretches()
            .into_iter()
            .map(|range| {
                let (log10_absolute, log10_relative) =
                    compared.stretch(truth.within(range.clone()));
                Stretch { from: range.start, to: range.end, log10_absolute, log10_relative }
            })
            .collect(),
    })
}

fn got<'a>(y: &'a [f32], truth: &Truth, index: usize) -> &'a [f32] {
    let at = truth.positions[index] * truth.d;
    &y[at..at + truth.d]
}

/// Errors at the positions of a truth.
struct Compared {
    d: usize,
    /// |Y−Ŷ|, a row per position.
    absolute: Vec<f64>,
    /// ‖Ŷ−Y‖/‖Y‖, one per position.
    relative: Vec<f64>,
}

impl Compared {
    fn new(truth: &Truth, y: &[f32]) -> Self {
        let mut absolute = Vec::with_capacity(truth.rows.len());
        let mut relative = Vec::with_capacity(truth.positions.len());
        for index in 0..truth.positions.len() {
            let want = truth.row(index);
            let (mut difference, mut size) = (0.0, 0.0);
            for (&got, &want) in got(y, truth, index).iter().zip(want) {
                let x = f64::from(got) - want;
                absolute.push(x.abs());
                difference += x * x;
                size += want * want;
            }
            relative.push((difference / size).sqrt());
        }
        Compared { d: truth.d, absolute, relative }
    }

    fn row(&self, index: usize) -> &[f64] {
        &self.absolute[index * self.d..(index + 1) * self.d]
    }

    /// log10 of absolute and relative errors at 5, 50 and 95 % of some positions.
    fn stretch(&self, indices: Range<usize>) -> ([f64; 3], [f64; 3]) {
        let absolute = self.absolute[indices.start * self.d..indices.end * self.d].to_vec();
        let relative = self.relative[indices].to_vec();
        let levels = |errors: Vec<f64>| {
            let errors = sorted(errors);
            [0.05, 0.5, 0.95].map(|q| log10(quantile(&errors, q)))
        };
        (levels(absolute), levels(relative))
    }
}

/// Finite numbers, ascending.
fn sorted(mut numbers: Vec<f64>) -> Vec<f64> {
    numbers.retain(|x| x.is_finite());
    numbers.sort_by(f64::total_cmp);
    numbers
}

/// Shares of numbers by their log10; the first and last bar hold what lies beyond.
fn histogram(numbers: &[f64]) -> Vec<f64> {
    let bars = ((HISTOGRAM[1] - HISTOGRAM[0]) / BAR).round() as usize;
    let mut counts = vec![0usize; bars];
    let mut total = 0usize;
    for &x in numbers.iter().filter(|x| x.is_finite()) {
        let bar = (x.max(SMALLEST).log10() - HISTOGRAM[0]) / BAR;
        counts[(bar.max(0.0) as usize).min(bars - 1)] += 1;
        total += 1;
    }
    counts.into_iter().map(|n| n as f64 / total.max(1) as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram_counts_everything_finite() {
        let shares = histogram(&[0.0, 1e-9, 0.0015, 0.0015, 1e5, f64::NAN]);
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert!((shares[0] - 0.4).abs() < 1e-12 && (shares[shares.len() - 1] - 0.2).abs() < 1e-12);
        let bar = ((0.0015f64.log10() - HISTOGRAM[0]) / BAR) as usize;
        assert!((shares[bar] - 0.4).abs() < 1e-12);
    }
}
