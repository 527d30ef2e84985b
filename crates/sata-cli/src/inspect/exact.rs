//! What approximations are held to, in f64: softmax, softmax over the near window alone, and what
//! the logits are like.

use std::ops::Range;

use rayon::prelude::*;
use serde::Serialize;

use super::candidates::Window;
use super::head::Head;
use super::sample::Sample;

/// What is computed beside softmax.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    /// c⁻¹.
    pub scale: f64,
    /// Whether a query sees only the keys up to its own.
    pub causal: bool,
    /// Near windows to be taken alone, in blocks before a query's own.
    pub alone: &'a [usize],
    /// How they are cut.
    pub window: Window,
}

/// Outputs of the sampled queries of one head.
#[derive(Clone, Debug, Default)]
pub struct Exact {
    /// Softmax, `[queries][d_value]`.
    pub softmax: Vec<f64>,
    /// The same over each near window alone.
    pub alone: Vec<Vec<f64>>,
    /// The logits of these queries.
    pub logits: LogitSums,
}

/// Sums over the logits x = scale · q·k of some queries and the keys that they see.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogitSums {
    pairs: f64,
    sum: f64,
    squares: f64,
    largest: f64,
    queries: f64,
    deviations: f64,
}

/// What the logits of one head are like.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Logits {
    /// Mean over all pairs of a query and a key that it sees.
    pub mean: f64,
    /// Standard deviation over the same.
    pub deviation: f64,
    /// Standard deviation of one query's logits, averaged over queries: what is left to a series
    /// that is chosen per query.
    pub query_deviation: f64,
    /// Largest absolute value.
    pub largest: f64,
}

impl LogitSums {
    fn of(logits: &[f64]) -> Self {
        let pairs = logits.len() as f64;
        let sum: f64 = logits.iter().sum();
        let mean = sum / pairs;
        let spread: f64 = logits.iter().map(|x| (x - mean) * (x - mean)).sum();
        LogitSums {
            pairs,
            sum,
            squares: spread + sum * mean,
            largest: logits.iter().fold(0.0, |largest, x| x.abs().max(largest)),
            queries: 1.0,
            deviations: (spread / pairs).sqrt(),
        }
    }

    /// Adds the logits of other queries.
    pub fn add(&mut self, other: &Self) {
        self.pairs += other.pairs;
        self.sum += other.sum;
        self.squares += other.squares;
        self.largest = self.largest.max(other.largest);
        self.queries += other.queries;
        self.deviations += other.deviations;
    }

    /// What they come to.
    pub fn logits(&self) -> Logits {
        let mean = self.sum / self.pairs;
        Logits {
            mean,
            deviation: (self.squares / self.pairs - mean * mean).max(0.0).sqrt(),
            query_deviation: self.deviations / self.queries,
            largest: self.largest,
        }
    }
}

/// Computes all of it for the sampled queries of a head.
pub fn exact(head: &Head<'_, f64>, sample: &Sample, setting: &Setting<'_>) -> Exact {
    let queries: Vec<_> = sample.positions.par_iter().map(|&t| query(head, t, setting)).collect();
    let mut all = Exact { alone: vec![vec![]; setting.alone.len()], ..Exact::default() };
    for (softmax, alone, logits) in queries {
        all.softmax.extend(softmax);
        all.alone.iter_mut().zip(alone).for_each(|(all, one)| all.extend(one));
        all.logits.add(&logits);
    }
    all
}

fn query(
    head: &Head<'_, f64>,
    t: usize,
    setting: &Setting<'_>,
) -> (Vec<f64>, Vec<Vec<f64>>, LogitSums) {
    let [_, keys, d_key, _] = head.sizes;
    let seen = if setting.causal { t + 1 } else { keys };
    let q = &head.q[t * d_key..][..d_key];
    let dot = |k: &[f64]| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
    let logits: Vec<f64> =
        head.k.chunks_exact(d_key).take(seen).map(|k| setting.scale * dot(k)).collect();
    let window = setting.window;
    let alone = setting.alone.iter().map(|&near| {
        let begin = window.begin(near, t);
        average(head, &logits, [0..window.sinks.min(begin), begin..seen])
    });
    (average(head, &logits, [0..0, 0..seen]), alone.collect(), LogitSums::of(&logits))
}

/// The average of the values of some keys, weighed by the exponentials of their logits.
fn average(head: &Head<'_, f64>, logits: &[f64], keys: [Range<usize>; 2]) -> Vec<f64> {
    let d_value = head.sizes[3];
    let keys = || keys.clone().into_iter().flatten();
    let top = keys().map(|s| logits[s]).fold(f64::NEG_INFINITY, f64::max);
    let mut y = vec![0.0; d_value];
    let mut denominator = 0.0;
    for s in keys() {
        let weight = (logits[s] - top).exp();
        denominator += weight;
        let v = &head.v[s * d_value..][..d_value];
        y.iter_mut().zip(v).for_each(|(y, v)| *y += weight * v);
    }
    y.iter_mut().for_each(|y| *y /= denominator);
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_logits_and_averages() {
        // Logits of token t are 0, ln 2, 0, ln 2 … times its own query.
        let ln = 2f64.ln();
        let (q, k, v) = ([1.0; 4], [0.0, ln, 0.0, ln], [1.0, 2.0, 3.0, 6.0]);
        let head = Head { q: &q, k: &k, v: &v, sizes: [4, 4, 1, 1] };
        let window = Window { block: 2, sinks: 1 };
        let setting = Setting { scale: 1.0, causal: true, alone: &[0, 1], window };
        let sample = Sample { from: 2, positions: vec![2, 3] };
        let all = exact(&head, &sample, &setting);
        let close = |got: &[f64], want: [f64; 2]| {
            assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-12), "{got:?}");
        };
        close(&all.softmax, [8.0 / 4.0, 20.0 / 6.0]);
        // The own block and the sink: tokens 0, 2 and 0, 2, 3.
        close(&all.alone[0], [2.0, 16.0 / 4.0]);
        close(&all.alone[1], [8.0 / 4.0, 20.0 / 6.0]);
        let logits = all.logits.logits();
        assert!((logits.mean - 3.0 * ln / 7.0).abs() < 1e-12);
        assert!((logits.deviation - ln * (12.0f64 / 49.0).sqrt()).abs() < 1e-12);
        let by_query = (2.0f64 / 9.0).sqrt() + 0.5;
        assert!((logits.query_deviation - ln * by_query / 2.0).abs() < 1e-12);
        assert_eq!(logits.largest, ln);
    }
}
