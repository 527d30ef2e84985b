//! What the numbers come to, in sentences.

use super::activations::{GOOD, PAPER_TERMS};
use super::coefficients;
use super::decode::DecodePoint;
use super::reference;
use super::results::Results;
use super::scope::HEADS;
use crate::plot::counts;
use crate::table::{grouped, seconds, three};

/// How near medians should be to the reference's.
const NEAR: f64 = 0.03;

/// All sentences.
pub fn findings(results: &Results) -> Vec<String> {
    [recovery(results), relative(results), floor(results), activations(results)]
        .into_iter()
        .flatten()
        .chain(coefficients::findings(&results.coefficients))
        .chain(HEADS.into_iter().filter_map(|d| decode(results, d)))
        .collect()
}

fn recovery(results: &Results) -> Option<String> {
    let differences: Vec<f64> = results
        .recovery
        .iter()
        .filter_map(|one| Some((one.errors.log10_median() - one.reference?).abs()))
        .collect();
    let worst = differences.iter().copied().reduce(f64::max)?;
    let near = differences.iter().filter(|&&difference| difference <= NEAR).count();
    Some(format!(
        "Recovery (figures A3, A4): the median of log10|Y−Ŷ| is within {NEAR} of {} in {near} of \
         {} cases; the largest difference is {worst:.3}.",
        reference::SOURCE,
        differences.len(),
    ))
}

fn relative(results: &Results) -> Option<String> {
    let four: Vec<_> = results.recovery.iter().filter(|one| one.terms == PAPER_TERMS).collect();
    let one = four.iter().min_by_key(|one| one.d.abs_diff(32))?;
    Some(format!(
        "\"Float16 resolution\" at P = {PAPER_TERMS} is an absolute error, on outputs that are \
         themselves near zero: at d = {} the median |Y−Ŷ| is {}, the median |Y| is {}, and the \
         output of the median query is off by {} %.",
        one.d,
        three(10f64.powf(one.errors.log10_median())),
        three(one.errors.median_output),
        three(100.0 * one.query_relative[2]),
    ))
}

fn floor(results: &Results) -> Option<String> {
    let longest = results.floor.iter().map(|floor| floor.tokens).max()?;
    let at = |dtype| {
        results.floor.iter().find(|floor| {
            floor.tokens == longest && floor.terms == PAPER_TERMS && floor.dtype == dtype
        })
    };
    let (double, single, half, brain) = (at("f64")?, at("f32")?, at("f16")?, at("bf16")?);
    Some(format!(
        "Precision floor at P = {PAPER_TERMS} and {} tokens: arithmetic alone errs by {} (f64), {} \
         (f32), {} (f16) and {} (bf16), relative RMS; truncation of the series by {}.",
        counts(longest as f64),
        three(double.arithmetic),
        three(single.arithmetic),
        three(half.arithmetic),
        three(brain.arithmetic),
        three(single.truncation),
    ))
}

fn activations(results: &Results) -> Option<String> {
    let layers = &results.activations;
    let errors = layers.iter().map(|layer| layer.at(PAPER_TERMS).errors.relative_median);
    let shares = layers.iter().map(|layer| layer.at(PAPER_TERMS).non_positive);
    let least = errors.clone().reduce(f64::min)?;
    let most = errors.reduce(f64::max)?;
    let share = shares.reduce(f64::max)?;
    let verdict = if most > 0.1 || share > 0.0 {
        "four Taylor terms alone do not suffice"
    } else {
        "four Taylor terms come close"
    };
    let needed: Vec<String> = layers
        .iter()
        .map(|layer| match (layer.terms_needed, layer.features_needed) {
            (Some(terms), Some(features)) => {
                format!("{terms} in {} (D = {})", layer.name, grouped(features))
            }
            _ => format!("more than {} in {}", layer.taylor.len(), layer.name),
        })
        .collect();
    let logits: Vec<String> = layers
        .iter()
        .map(|layer| {
            format!("{} and {}", three(layer.logits_deviation), three(layer.logits_largest))
        })
        .collect();
    Some(format!(
        "On activations of trained models {verdict}: the output is off by {} to {} % (median over \
         median), and up to {} % of a layer's queries have a denominator that is not positive. \
         Their logits have deviations and largest absolute values of {}, where the paper's random \
         inputs have deviation 1. Terms for a median error within {} %: {}. The engine itself is \
         right: f64 within {} of the oracle of the same operation (relative RMS).",
        three(100.0 * least),
        three(100.0 * most),
        three(100.0 * share),
        logits.join("; "),
        100.0 * GOOD,
        needed.join("; "),
        three(layers.iter().map(|layer| layer.engine_f64).fold(0.0, f64::max)),
    ))
}

fn decode(results: &Results, d: usize) -> Option<String> {
    let points: Vec<&DecodePoint> = results.decode.iter().filter(|point| point.d == d).collect();
    let last = points.last()?;
    let crossing = points
        .iter()
        .rev()
        .take_while(|point| point.cache_seconds > point.state_seconds)
        .last()
        .map_or("is not faster than a KV cache at any length measured".into(), |point| {
            format!("is faster than a KV cache from {} tokens on", counts(point.tokens as f64))
        });
    Some(format!(
        "Decode (figure 6), d = {d}: a step takes {} at any length and {crossing}; at {} tokens \
         the cache takes {} ({}×) and {}× the memory.",
        seconds(last.state_seconds),
        counts(last.tokens as f64),
        seconds(last.cache_seconds),
        three(last.cache_seconds / last.state_seconds),
        three(last.cache_bytes as f64 / last.state_bytes as f64),
    ))
}
