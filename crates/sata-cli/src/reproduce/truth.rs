//! f64 softmax of some queries of a long context.

use std::ops::Range;

use rayon::prelude::*;
use sata::{View, ViewMut};

use super::random::stratified;
use super::scope::TOKENS;
use crate::failure::Outcome;

/// Queries of a sample that are computed together: they read the keys once.
const RUN: usize = 8;
/// The same when all queries are.
const LONG_RUN: usize = 256;
/// Queries compared in each stretch of the context on a logarithmic scale.
const PER_STRETCH: usize = 64;
/// The last tokens, looked at on their own.
pub const LAST: usize = 1024;

/// Exact outputs of some queries.
pub struct Truth {
    /// Their positions, ascending.
    pub positions: Vec<usize>,
    /// Their outputs, a row each.
    pub rows: Vec<f64>,
    /// Those that stand for the whole context, as indices of `positions`.
    pub uniform: Vec<usize>,
    /// Size of a row.
    pub d: usize,
}

/// Stretches of context, half an octave each, from 16 tokens on.
pub fn stretches() -> Vec<Range<usize>> {
    let mut edges = vec![];
    let mut edge = 16;
    while edge < TOKENS {
        edges.extend([edge, edge + edge / 2]);
        edge *= 2;
    }
    edges.retain(|&edge| edge < TOKENS);
    edges.push(TOKENS);
    edges.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

impl Truth {
    /// Computes all queries, or `uniform` spread evenly over the context and some more where few
    /// of those fall.
    ///
    /// # Errors
    /// None for inputs of the right sizes.
    pub fn new(seed: u64, d: usize, qkv: &[Vec<f64>; 3], uniform: Option<usize>) -> Outcome<Self> {
        let spread = match uniform {
            None => (0..TOKENS).collect(),
            Some(count) => in_runs(seed, 0..TOKENS, count),
        };
        let mut positions = spread.clone();
        if uniform.is_some() {
            for (i, stretch) in stretches().into_iter().enumerate() {
                positions.extend(in_runs(seed + 1 + i as u64, stretch, PER_STRETCH));
            }
            positions.extend(in_runs(seed, TOKENS - LAST..TOKENS, LAST / 2));
            positions.sort_unstable();
            positions.dedup();
        }
        let run = if uniform.is_some() { RUN } else { LONG_RUN };
        let rows = exact(d, qkv, &positions, run)?;
        let mut at = 0;
        let mut index = |position: usize| {
            while positions[at] < position {
                at += 1;
            }
            at
        };
        let uniform = spread.into_iter().map(&mut index).collect();
        Ok(Truth { positions, rows, uniform, d })
    }

    /// Indices of the positions in a range.
    pub fn within(&self, range: Range<usize>) -> Range<usize> {
        let find = |position| self.positions.partition_point(|&p| p < position);
        find(range.start)..find(range.end)
    }

    /// The output at an index of `positions`.
    pub fn row(&self, index: usize) -> &[f64] {
        &self.rows[index * self.d..(index + 1) * self.d]
    }
}

/// About `count` positions of a range, in short runs that are spread evenly.
fn in_runs(seed: u64, range: Range<usize>, count: usize) -> Vec<usize> {
    if range.len() <= count {
        return range.collect();
    }
    let runs = range.start / RUN..range.end.div_ceil(RUN);
    stratified(seed, runs, count.div_ceil(RUN))
        .into_iter()
        .flat_map(|run| run * RUN..(run + 1) * RUN)
        .filter(|position| range.contains(position))
        .collect()
}

fn exact(d: usize, qkv: &[Vec<f64>; 3], positions: &[usize], run: usize) -> Outcome<Vec<f64>> {
    let shape = [1, 1, TOKENS, d];
    let [q, k, v] = qkv;
    let (q, k, v) = (View::new(q, shape)?, View::new(k, shape)?, View::new(v, shape)?);
    let scale = 1.0 / (d as f64).sqrt();
    let mut rows = vec![0.0; positions.len() * d];
    let mut work = vec![];
    let mut rest = rows.as_mut_slice();
    for run in positions.chunk_by(|a, b| a + 1 == *b && b % run != 0) {
        let (out, after) = rest.split_at_mut(run.len() * d);
        rest = after;
        work.push((run, out));
    }
    work.into_par_iter().try_for_each(|(run, out)| {
        let (first, end) = (run[0], run[0] + run.len());
        let (q, k, v) = (q.slice(0, first..end)?, k.slice(0, 0..end)?, v.slice(0, 0..end)?);
        let y = ViewMut::new(out, [1, 1, run.len(), d])?;
        sata::conventional::attention(q, k, v, scale, true, first, y)
    })?;
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_cover_the_context_without_gaps() {
        let stretches = stretches();
        assert_eq!(stretches[0].start, 16);
        assert_eq!(stretches[stretches.len() - 1].end, TOKENS);
        assert!(stretches.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert!(stretches.iter().all(|stretch| !stretch.is_empty()));
    }

    #[test]
    fn runs_stay_in_their_range() {
        let positions = in_runs(3, 100..1001, 64);
        assert!(positions.len() > 48 && positions.is_sorted());
        assert!(positions.iter().all(|p| (100..1001).contains(p)));
        assert_eq!(in_runs(3, 16..24, 64).len(), 8);
    }
}
