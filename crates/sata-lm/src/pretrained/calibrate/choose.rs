//! A setting for every head, under a budget of memory.

use std::sync::Arc;

use rayon::prelude::*;

use super::gather::Recorded;
use crate::pretrained::attention::{Calibration, HeadPast, HeadSetting, Heads, Setting};
use crate::pretrained::error::PretrainedError;
use crate::pretrained::linear::times;

/// One setting of one head, as it was measured.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Choice {
    /// Which of the candidates.
    pub candidate: usize,
    /// Bytes of one state in f32.
    pub bytes: usize,
    /// Mean square of what it changes in an element of the residual stream, relative to that stream's.
    pub error: f64,
}

/// What every candidate makes of a layer, `[kv_heads][candidates]`.
pub type Errors = Vec<Vec<Choice>>;

/// Answers every so many blocks are looked at.
const EVERY: usize = 4;

/// Measures candidates on one layer: queries of every fourth block of the second half of the text
/// against softmax. `out` is `[width, heads · d]`.
///
/// # Errors
/// A candidate that cannot be run.
pub fn measure(
    layer: &Recorded,
    out: &[f32],
    d: usize,
    candidates: &[HeadSetting],
    calibration: &[Arc<Calibration>],
) -> Result<Errors, PretrainedError> {
    let kv_heads = layer.keys.len();
    let group = layer.queries.len() / kv_heads;
    let (inner, tokens) = (layer.queries.len() * d, layer.keys[0].len() / d);
    let width = out.len() / inner;
    let from = tokens / 2;
    let chosen = |t: usize| t >= from && (t / BLOCK).is_multiple_of(EVERY);
    (0..kv_heads)
        .into_par_iter()
        .map(|kv_head| {
            let heads = kv_head * group..(kv_head + 1) * group;
            let queries = &layer.queries[heads.clone()];
            // The columns of the output matrix that these heads use.
            let part: Vec<f32> = out
                .chunks_exact(inner)
                .flat_map(|row| row[heads.start * d..heads.end * d].to_vec())
                .collect();
            let (keys, values) = (&layer.keys[kv_head], &layer.values[kv_head]);
            let answer = |setting: &HeadSetting| {
                let setting = Setting {
                    heads: Heads::All(setting.clone()),
                    calibration: vec![vec![calibration[kv_head].clone()]],
                };
                let mut past = HeadPast::new(&setting, [0, 0], d)?;
                let blocks = |block: usize| {
                    (block * BLOCK >= from / BLOCK * BLOCK) && block.is_multiple_of(EVERY)
                };
                let out = past.attend_some(queries, keys, values, blocks)?;
                Ok::<_, PretrainedError>((out, past.bytes()))
            };
            let (exact, _) = answer(&HeadSetting::Softmax)?;
            let mut choices = vec![];
            for (candidate, setting) in candidates.iter().enumerate() {
                let (got, bytes) = answer(setting)?;
                let mut differences = vec![];
                for t in (0..tokens).filter(|&t| chosen(t)) {
                    for (got, exact) in got.iter().zip(&exact) {
                        let range = t * d..(t + 1) * d;
                        let pairs = got[range.clone()].iter().zip(&exact[range]);
                        differences.extend(pairs.map(|(got, exact)| got - exact));
                    }
                }
                let rows = differences.len() / (group * d);
                let mut changes = vec![0.0; rows * width];
                times(&differences, &part, group * d, &mut changes);
                let square: f64 = changes.iter().map(|x| f64::from(x * x)).sum();
                let error = square / changes.len().max(1) as f64 / layer.residual.max(1e-30);
                choices.push(Choice { candidate, bytes, error });
            }
            Ok(choices)
        })
        .collect()
}

/// Tokens in a block of the queries that are looked at.
const BLOCK: usize = sata::DEFAULT_BLOCK;

/// Picks a candidate for every head so that all errors together are least while all bytes together are
/// within `budget`; `None` if not even the smallest fit. `[layers][kv_heads]`.
pub fn choose(errors: &[Errors], budget: usize) -> Option<Vec<Vec<Choice>>> {
    let pick = |price: f64| -> Vec<Vec<Choice>> {
        let cost = |choice: &Choice| choice.error + price * choice.bytes as f64;
        let best = |choices: &Vec<Choice>| {
            choices.iter().min_by(|a, b| cost(a).total_cmp(&cost(b))).cloned()
        };
        errors.iter().map(|layer| layer.iter().filter_map(best).collect()).collect()
    };
    let bytes = |all: &[Vec<Choice>]| -> usize { all.iter().flatten().map(|c| c.bytes).sum() };
    // The price of a byte is found by halving its logarithm.
    let (mut low, mut high) = (-60.0f64, 20.0f64);
    let cheapest = pick(high.exp());
    if bytes(&cheapest) > budget {
        return None;
    }
    let mut found = cheapest;
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        let picked = pick(middle.exp());
        if bytes(&picked) <= budget {
            found = picked;
            high = middle;
        } else {
            low = middle;
        }
    }
    // What is left of the budget goes where a byte brings most.
    loop {
        let left = budget - bytes(&found);
        let mut best: Option<(f64, [usize; 2], &Choice)> = None;
        for (l, layer) in errors.iter().enumerate() {
            for (h, choices) in layer.iter().enumerate() {
                let now = &found[l][h];
                for choice in choices.iter().filter(|c| c.bytes > now.bytes && c.error < now.error)
                {
                    let more = choice.bytes - now.bytes;
                    let gain = (now.error - choice.error) / more as f64;
                    if more <= left && best.is_none_or(|(most, ..)| gain > most) {
                        best = Some((gain, [l, h], choice));
                    }
                }
            }
        }
        match best {
            Some((_, [l, h], choice)) => found[l][h] = choice.clone(),
            None => return Some(found),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_where_it_helps_and_the_budget_holds() {
        let head = |errors: [f64; 3]| -> Vec<Choice> {
            let sizes = [10, 20, 40];
            let pairs = errors.into_iter().zip(sizes).enumerate();
            pairs.map(|(candidate, (error, bytes))| Choice { candidate, bytes, error }).collect()
        };
        let errors =
            vec![vec![head([1.0, 0.9, 0.8]), head([5.0, 1.0, 0.5])], vec![head([2.0, 2.0, 0.0])]];
        assert!(choose(&errors, 29).is_none());
        let picked = |budget: usize| -> Vec<usize> {
            choose(&errors, budget).unwrap().iter().flatten().map(|c| c.candidate).collect()
        };
        assert_eq!(picked(30), [0, 0, 0]);
        assert_eq!(picked(45), [0, 1, 0]);
        assert_eq!(picked(75), [0, 1, 2]);
        assert_eq!(picked(1000), [2, 2, 2]);
    }
}
