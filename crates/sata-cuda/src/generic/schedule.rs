//! How a call's tokens are cut: where sums are taken, which queries read which, and which heads are
//! worked on at once so that work arrays stay small.

use std::ops::Range;

use sata::{Form, Near};

use super::params::{Chunk, Piece};
use crate::problem::{Problem, Stretch};
use crate::window::Sequence;

/// Query rows of a chunk at most, which kernels count in 31 bits.
const MOST_ROWS: usize = 1 << 30;
/// Touching an element of sums (written, added up, written, read) takes about as long as so many
/// FLOPs.
const TOUCH: f64 = 384.0;
/// The shortest chunk that is chosen, and the step of those chosen.
const CHUNK_STEP: usize = 64;

/// What one may ask for instead of what would be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Wish {
    /// Whether matrix units may be used.
    pub matrix: bool,
    pub form: Option<Form>,
    /// Tokens of a chunk.
    pub chunk: Option<usize>,
    /// Bytes of work arrays.
    pub work_bytes: Option<usize>,
}

impl Default for Wish {
    fn default() -> Self {
        Wish { matrix: true, form: None, chunk: None, work_bytes: None }
    }
}

/// Work arrays have about this many bytes at most, unless one head needs more.
const WORK_BYTES: usize = 1 << 30;

/// Sizes that a schedule depends on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub features: usize,
    /// Numerators of a query before they are mixed.
    pub planes: usize,
}

/// Sequences and heads that are worked on at once.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Batch {
    pub sequences: Range<usize>,
    pub heads: Range<usize>,
    pub chunks: Range<usize>,
    pub pieces: Range<usize>,
    /// Queries of a head of these sequences.
    pub rows: Range<usize>,
}

impl Batch {
    pub(super) fn head_count(&self) -> usize {
        self.heads.len()
    }
}

/// How one call is cut.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Schedule {
    pub chunks: Vec<Chunk>,
    pub pieces: Vec<Piece>,
    pub batches: Vec<Batch>,
}

/// FLOPs of a query that weighs a token.
fn pair_flops(problem: &Problem<'_>) -> f64 {
    let spec = problem.spec;
    let each = if problem.is_per_query() { 2.0 } else { 1.0 };
    2.0 * (each * spec.d_key() as f64 + spec.d_value() as f64) + 2.0 * spec.terms() as f64 + 20.0
}

/// Tokens of a chunk: none for the direct form.
fn chunk(problem: &Problem<'_>, sizes: Sizes, wish: Wish) -> Option<usize> {
    if wish.form == Some(Form::Direct) {
        return None;
    }
    let spec = problem.spec;
    let (pair, group) = (pair_flops(problem), problem.group as f64);
    let elements = sizes.features as f64 * (spec.d_value() as f64 + 1.0);
    let (mut direct, mut pairs_in_chunks, mut tokens, mut read) = (0.0, 0.0, 0.0, 0.0);
    // Half a chunk per query is weighed directly.
    let best = (TOUCH * elements / (pair * group)).sqrt();
    let best = ((best / CHUNK_STEP as f64).round() as usize).clamp(1, 1 << 12) * CHUNK_STEP;
    let most = wish.work_bytes.unwrap_or(WORK_BYTES);
    let one = 4 * sizes.features * (spec.d_value() + 1);
    let longest = problem.sequences.iter().map(Stretch::tokens).max().unwrap_or(0);
    // Sums of one head's chunks fit in memory.
    let least = longest.div_ceil((most / one.max(1)).max(1)).next_multiple_of(CHUNK_STEP);
    let chunk = wish.chunk.unwrap_or(best.max(least)).max(1);
    for stretch in &problem.sequences {
        let (queries, keys) = (stretch.queries as f64, stretch.tokens() as f64);
        tokens += keys;
        read += queries * group;
        if problem.causal {
            direct += queries * group * (keys - queries / 2.0);
            pairs_in_chunks += queries * group * keys.min(chunk as f64) / 2.0;
        } else {
            direct += queries * group * keys;
        }
    }
    let pieces = (tokens / chunk as f64).ceil();
    let by_sums =
        2.0 * elements * (tokens + read) + TOUCH * elements * pieces + pairs_in_chunks * pair;
    let state = wish.form == Some(Form::State) || by_sums < direct * pair;
    state.then_some(chunk)
}

/// Where one sequence's sums are taken (ascending, none at 0), and its chunks.
struct Cut {
    bounds: Vec<usize>,
    chunks: Vec<Chunk>,
    committed: usize,
}

impl Cut {
    fn new(problem: &Problem<'_>, sequence: usize, chunk: Option<usize>) -> Self {
        let stretch = &problem.sequences[sequence];
        let (tokens, open) = (stretch.tokens(), stretch.open);
        let keep = problem.past.is_some();
        let folded = problem.folded(tokens);
        // Chunks of queries, as ranges of tokens of the window, and where their raw tokens begin.
        let mut ranges: Vec<(Range<usize>, usize)> = vec![];
        match (problem.causal, chunk, problem.spec.near()) {
            (true, None, _) => ranges.push((open..tokens, 0)),
            (true, Some(chunk), Near::None) => {
                let mut start = open;
                while start < tokens {
                    let end = (start / chunk + 1).saturating_mul(chunk).min(tokens);
                    ranges.push((start..end, start / chunk * chunk));
                    start = end;
                }
            }
            (true, Some(chunk), Near::Blocks(_)) => {
                // Whole blocks, so that a chunk's first query has no far token that is still raw.
                let block = problem.spec.block();
                let width = chunk.div_ceil(block).max(1).saturating_mul(block);
                let mut start = open;
                while start < tokens {
                    let end = (start / block * block).saturating_add(width).min(tokens);
                    ranges.push((start..end, problem.folded(start)));
                    start = end;
                }
            }
            (false, chunk, _) => {
                let summed = if keep { folded } else { tokens };
                let window = if chunk.is_some() { summed } else { 0 };
                ranges.push((open..open + stretch.queries, window));
            }
        }
        let mut bounds: Vec<usize> = ranges.iter().map(|(_, window)| *window).collect();
        if keep {
            bounds.push(folded);
        }
        if let (false, Some(chunk)) = (problem.causal, chunk) {
            // Whatever the chunk, sums are read once: pieces are only for many blocks to work.
            let end = bounds.iter().copied().max().unwrap_or(0);
            bounds.extend((chunk..end).step_by(chunk));
        }
        bounds.retain(|&bound| bound > 0);
        bounds.sort_unstable();
        bounds.dedup();
        let place = |bound: usize| bounds.binary_search(&bound).map_or(0, |at| at + 1);
        let most = (MOST_ROWS / problem.group.max(1)).max(1);
        let mut chunks = vec![];
        for (range, window) in ranges {
            let prefix = match (window, keep) {
                (0, true) => 0,
                (0, false) => -1,
                _ => place(window) as i32,
            };
            for first in range.clone().step_by(most) {
                let count = most.min(range.end - first) as i64;
                let (sequence, first) = (sequence as i32, (first - open) as i64);
                chunks.push(Chunk { sequence, prefix, first, count, window: window as i64 });
            }
        }
        let committed = if keep { place(folded) } else { 0 };
        Cut { committed, chunks, bounds }
    }
}

impl Schedule {
    /// Cuts a problem, and tells each sequence its pieces.
    pub(super) fn new(
        problem: &Problem<'_>,
        sequences: &mut [Sequence],
        sizes: Sizes,
        wish: Wish,
    ) -> Self {
        let chunk = chunk(problem, sizes, wish);
        let mut all = Schedule { chunks: vec![], pieces: vec![], batches: vec![] };
        let mut firsts = vec![];
        for (i, sequence) in sequences.iter_mut().enumerate() {
            let cut = Cut::new(problem, i, chunk);
            firsts.push((all.chunks.len(), all.pieces.len()));
            sequence.piece = all.pieces.len() as i64;
            sequence.pieces = cut.bounds.len() as i64;
            sequence.committed = cut.committed as i64;
            let mut first = 0;
            for (index, &bound) in cut.bounds.iter().enumerate() {
                all.pieces.push(Piece {
                    sequence: i as i32,
                    index: index as i32,
                    first: first as i64,
                    count: (bound - first) as i64,
                });
                first = bound;
            }
            all.chunks.extend(cut.chunks);
        }
        firsts.push((all.chunks.len(), all.pieces.len()));
        all.batches = all.batch(problem, sequences, &firsts, sizes, wish);
        all
    }

    /// Sequences and heads whose work arrays fit together.
    fn batch(
        &self,
        problem: &Problem<'_>,
        sequences: &[Sequence],
        firsts: &[(usize, usize)],
        sizes: Sizes,
        wish: Wish,
    ) -> Vec<Batch> {
        let most = wish.work_bytes.unwrap_or(WORK_BYTES);
        let row = 4 * (problem.spec.d_value() + 1);
        let (heads, mut batches) = (problem.kv_heads, vec![]);
        let batch = |which: Range<usize>, heads: Range<usize>| Batch {
            chunks: firsts[which.start].0..firsts[which.end].0,
            pieces: firsts[which.start].1..firsts[which.end].1,
            rows: sequences.get(which.start).map_or(0, |s| s.row as usize)
                ..sequences[..which.end].last().map_or(0, |s| (s.row + s.queries) as usize),
            sequences: which,
            heads,
        };
        let (mut first, mut bytes) = (0, 0usize);
        for (i, s) in sequences.iter().enumerate() {
            let sums = (s.pieces as usize).saturating_mul(sizes.features).saturating_mul(row);
            let read = (s.queries as usize * problem.group).saturating_mul(sizes.planes * row);
            let one = sums.saturating_add(read);
            let own = one.saturating_mul(heads);
            if bytes.saturating_add(own) > most && i > first {
                batches.push(batch(first..i, 0..heads));
                (first, bytes) = (i, 0);
            }
            if own > most {
                // Alone, some heads at a time.
                let at_once = (most / one.max(1)).clamp(1, heads);
                for head in (0..heads).step_by(at_once) {
                    batches.push(batch(i..i + 1, head..(head + at_once).min(heads)));
                }
                first = i + 1;
            } else {
                bytes += own;
            }
        }
        if first < sequences.len() {
            batches.push(batch(first..sequences.len(), 0..heads));
        }
        batches
    }
}
