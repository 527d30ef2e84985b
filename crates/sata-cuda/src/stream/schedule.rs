//! How sequences are cut into segments, each walked over by itself.

use sata::Near;

use super::params::{Chain, Segment, Sequence};
use super::units::Shape;
use crate::problem::Problem;
use crate::window;

/// Tokens of a segment at most: sums are plain f32 within one.
const MOST_TOKENS: usize = 1 << 16;
/// Segments of one sequence at most, unless they would be longer than that.
const MOST_SEGMENTS: usize = 64;
/// What summing a token costs of all that is done for one.
const SUMMING: f64 = 0.3;
/// Chunks of a part of a segment at least, and parts at most.
const LEAST_PART: usize = 8;
const MOST_PARTS: usize = 16;
/// What scanning one more part costs of summing all.
const SCANNING: f64 = 0.02;
/// What beginning a segment costs, in chunks.
const BEGINNING: f64 = 4.0;

/// One call's cuts.
#[derive(Debug)]
pub(super) struct Schedule {
    pub sequences: Vec<Sequence>,
    /// Those with most chunks first.
    pub segments: Vec<Segment>,
    /// Parts of those of which sums are needed.
    pub summed: Vec<Segment>,
    pub chains: Vec<Chain>,
    /// Tokens summed at the end of each slot.
    pub ends: Vec<i32>,
}

/// Chunks of a segment of a sequence of `chunks` when `units` sequences and heads are worked on by
/// `residents` at once, and summing a token costs the share `summing` of all that is done for one.
pub(crate) fn cut(
    chunks: usize,
    chunk: usize,
    units: usize,
    residents: usize,
    summing: f64,
) -> usize {
    let least = (chunks * chunk).div_ceil(MOST_TOKENS);
    let cost = |segments: usize| {
        let length = chunks.div_ceil(segments) as f64 + BEGINNING;
        let sums = (units * (segments - 1)).div_ceil(residents) as f64 * length * summing;
        (units * segments).div_ceil(residents) as f64 * length + sums
    };
    let most = MOST_SEGMENTS.max(least).min(chunks.max(1));
    let best = (least.max(1)..=most).min_by(|&a, &b| cost(a).total_cmp(&cost(b))).unwrap_or(1);
    chunks.div_ceil(best).max(1)
}

/// Parts that segments of `length` of `chunks` are summed in, so that the device is busy with that.
fn parts(chunks: usize, length: usize, units: usize, residents: usize) -> usize {
    let summed = units * (chunks.div_ceil(length.max(1)) - 1).max(1);
    let cost = |parts: usize| {
        (summed * parts).div_ceil(residents) as f64 / parts as f64 + SCANNING * parts as f64
    };
    let most = (length / LEAST_PART).clamp(1, MOST_PARTS);
    (1..=most).min_by(|&a, &b| cost(a).total_cmp(&cost(b))).unwrap_or(1)
}

impl Schedule {
    /// Cuts so that as many units as the device has room for, where sums are made and where they are
    /// read, are busy.
    pub(super) fn new(
        problem: &Problem<'_>,
        shape: &Shape,
        windows: &[window::Sequence],
        asked: Option<usize>,
        [summing, residents]: [usize; 2],
    ) -> Self {
        let chunk = shape.chunk();
        let units = problem.sequences.len() * problem.kv_heads;
        let mut all = Schedule {
            sequences: vec![],
            segments: vec![],
            summed: vec![],
            chains: vec![],
            ends: vec![],
        };
        for (i, (s, window)) in problem.sequences.iter().zip(windows).enumerate() {
            all.sequences.push(Sequence {
                q_batch: s.q_batch as i64,
                q_first: s.q_first as i64,
                k_batch: s.k_batch as i64,
                k_first: s.k_first as i64,
                work: window.work,
                row: window.row,
                tokens: s.queries as i32,
                unused: 0,
            });
            let chunks = s.queries.div_ceil(chunk);
            let (length, parts) = match asked {
                Some(tokens) => ((tokens / chunk).max(1), 2),
                None => {
                    let length = cut(chunks, chunk, units, residents, SUMMING);
                    (length, parts(chunks, length, units, summing))
                }
            };
            let first = all.ends.len();
            let mut begin = 0;
            while begin < chunks {
                let end = (begin + length).min(chunks);
                let segment = |first: usize, end: usize, sum: i32, before: i32| Segment {
                    sequence: i as i32,
                    first: first as i32,
                    end: end as i32,
                    sum,
                    before,
                };
                let before = if begin > 0 { all.ends.len() as i32 - 1 } else { -1 };
                all.segments.push(segment(begin, end, -1, before));
                let part = (end - begin).div_ceil(parts);
                for first in (begin..end).step_by(part).filter(|_| end < chunks) {
                    let end = (first + part).min(end);
                    all.summed.push(segment(first, end, all.ends.len() as i32, -1));
                    all.ends.push(frontier(problem, chunk, end) as i32);
                }
                begin = end;
            }
            let count = all.ends.len() - first;
            if count > 0 {
                let (sequence, first, count) = (i as i32, first as i32, count as i32);
                all.chains.push(Chain { sequence, first, count, unused: 0 });
            }
        }
        all.segments.sort_by_key(|s| std::cmp::Reverse(s.end - s.first));
        all
    }
}

/// Tokens in the sums that a chunk reads.
fn frontier(problem: &Problem<'_>, chunk: usize, index: usize) -> usize {
    match problem.spec.near() {
        Near::None => index * chunk,
        Near::Blocks(n) => {
            let block = problem.spec.block();
            (index * chunk / block).saturating_sub(n) * block
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_fill_the_device() {
        // 128 heads on 1,056 places: eight segments each.
        assert_eq!(cut(2048, 32, 128, 1056, SUMMING), 256);
        // Heads enough: one.
        assert_eq!(cut(64, 32, 8448, 1056, SUMMING), 64);
        // Long ones are cut however many heads there are.
        assert!(cut(1 << 20, 32, 1 << 20, 1056, SUMMING) * 32 <= MOST_TOKENS);
    }
}
