//! How a call is cut into tiles and chunks, and which heads are worked on at once.

use std::ops::Range;

use sata::{Form, Near};

use super::params::{Chunk, Item, Sequence};
use super::units::{KEY_TILE, Shape, Summing};
use crate::generic::Wish;
use crate::problem::Problem;
use crate::window;

/// Work arrays have about this many bytes at most, unless one head needs more.
const WORK_BYTES: usize = 4 << 30;

// Measured on an H100, by which chunks are chosen: seconds to weigh one key for one query, and more
// of them per element and column; bytes a second of sums; FLOP/s of sums and reading, padding
// counted, where columns are few and many.
const PAIR: f64 = 0.066e-12;
const PAIR_ELEMENT: f64 = 0.003e-12;
const BYTES: f64 = 2.8e12;
const FLOPS: [f64; 2] = [450e12, 620e12];

/// One call's cuts.
#[derive(Debug)]
pub(super) struct Schedule {
    pub sequences: Vec<Sequence>,
    /// Tokens of a chunk, a multiple of a tile's.
    pub chunk_tokens: usize,
    /// Records and chunk places of one key/value head.
    pub tiles: usize,
    pub chunks: usize,
    pub tile_items: Vec<Item>,
    pub chunk_items: Vec<Chunk>,
    /// Blocks of queries, those with the most keys first.
    pub row_items: Vec<Item>,
    /// How sums are made.
    pub summing: Summing,
    /// Heads that are worked on at once.
    pub batches: Vec<Range<usize>>,
}

/// Tokens of a chunk for windows of up to `longest` tokens: as many as make sums and direct weighing
/// cost the least together; more than there are where sums do not pay.
fn chunk(shape: &Shape, group: usize, longest: usize, wish: Wish, prefix: bool) -> usize {
    let elements = shape.sizes.elements() as f64;
    // Written, read, written as bf16, read again; or only written as bf16, mostly while others multiply.
    let touch = elements * if prefix { 2.0 } else { 12.0 } / BYTES;
    let width = (shape.sizes.d_key.next_multiple_of(16) + shape.sizes.columns()) as f64;
    let pair = (PAIR + PAIR_ELEMENT * width) * group as f64;
    let flops = FLOPS[usize::from(shape.sizes.columns() > 40)];
    let best = (2.0 * touch / pair).sqrt();
    let sums = 2.0 * elements * (1.0 + group as f64) / flops + touch / best + pair * best / 2.0;
    let all = pair * longest as f64 / 2.0;
    let chunk = match (wish.chunk, wish.form) {
        (_, Some(Form::Direct)) => usize::MAX / 2,
        (Some(chunk), _) => chunk,
        (None, Some(Form::State)) => best as usize,
        (None, None) if all <= sums => usize::MAX / 2,
        (None, None) => best as usize,
    };
    let chunk = chunk.min(longest).next_multiple_of(KEY_TILE).max(KEY_TILE);
    if chunk >= longest { longest.next_multiple_of(KEY_TILE).max(KEY_TILE) } else { chunk }
}

impl Schedule {
    pub(super) fn new(
        problem: &Problem<'_>,
        shape: &Shape,
        windows: &[window::Sequence],
        wish: Wish,
        gathered: bool,
    ) -> Self {
        let longest = windows.iter().map(|w| w.tokens as usize).max().unwrap_or(0);
        let keep = problem.past.is_some();
        let multiprocessors = problem.device.properties().multiprocessors as usize;
        let prefix = shape.prefix_sums(problem.kv_heads, multiprocessors, true).filter(|_| !keep);
        let summing = prefix.unwrap_or_else(|| shape.chunk_sums());
        let chunk_tokens = chunk(shape, problem.group, longest, wish, summing.prefix);
        let mut all = Schedule {
            sequences: vec![],
            chunk_tokens,
            tiles: 0,
            chunks: 0,
            tile_items: vec![],
            chunk_items: vec![],
            row_items: vec![],
            summing,
            batches: vec![],
        };
        for (i, w) in windows.iter().enumerate() {
            all.push(problem, shape, i as i32, w, keep, gathered);
        }
        // Long blocks of work first, so that the last to end are short.
        all.row_items.sort_by_key(|item| std::cmp::Reverse(item.place));
        let one = all.tiles * (shape.tile_bytes() + shape.sum_tile_bytes())
            + all.chunks * shape.sizes.elements() * if summing.prefix { 2 } else { 6 }
            + windows.len() * shape.sizes.elements() * 4;
        let most = wish.work_bytes.unwrap_or(WORK_BYTES);
        let at_once = (most / one.max(1)).clamp(1, problem.kv_heads);
        let heads = problem.kv_heads;
        // Batches of one size, or nearly.
        let at_once = heads.div_ceil(heads.div_ceil(at_once).max(1)).max(1);
        all.batches = (0..heads).step_by(at_once).map(|h| h..(h + at_once).min(heads)).collect();
        let fewest = all.batches.iter().map(ExactSizeIterator::len).min();
        if let (Some(fewest), true) = (fewest, summing.prefix) {
            all.summing = shape.prefix_sums(fewest, multiprocessors, true).unwrap_or(summing);
        }
        all
    }

    fn push(
        &mut self,
        problem: &Problem<'_>,
        shape: &Shape,
        index: i32,
        w: &window::Sequence,
        keep: bool,
        gathered: bool,
    ) {
        let tokens = w.tokens as usize;
        let summed = if keep {
            w.settled as usize
        } else if problem.causal {
            // What the last queries read.
            let last = tokens.saturating_sub(1) / shape.queries() * shape.queries();
            let block = problem.spec.block();
            let far = match problem.spec.near() {
                Near::None => last,
                Near::Blocks(n) => (last / block).saturating_sub(n) * block,
            };
            far / self.chunk_tokens * self.chunk_tokens
        } else {
            tokens
        };
        let chunks = summed.div_ceil(self.chunk_tokens);
        let tiles = tokens.div_ceil(KEY_TILE);
        let sink_tiles = (w.sinks as usize).div_ceil(KEY_TILE);
        self.sequences.push(Sequence {
            q_batch: w.q_batch,
            q_first: w.q_first,
            k_batch: if gathered { 0 } else { w.k_batch },
            k_first: if gathered { w.work } else { w.k_first },
            work: w.work,
            sink: w.sink,
            folded: w.folded,
            tokens: tokens as i32,
            lead: w.open as i32,
            queries: w.queries as i32,
            tile: self.tiles as i32,
            chunk: self.chunks as i32,
            chunks: chunks as i32,
            summed: summed as i32,
            sinks: w.sinks as i32,
            sink_tile: (self.tiles + tiles) as i32,
            sink_tiles: sink_tiles as i32,
        });
        let item = |place: usize| Item { sequence: index, place: place as i32 };
        self.tile_items.extend((0..tiles).map(item));
        self.tile_items
            .extend((0..sink_tiles).map(|t| Item { sequence: index, place: -1 - t as i32 }));
        let (per, first_tile) = (self.chunk_tokens / KEY_TILE, self.tiles);
        let (last_tile, first_place) = (summed.div_ceil(KEY_TILE), self.chunks);
        self.chunk_items.extend((0..chunks).map(|c| Chunk {
            tile: (first_tile + c * per) as i32,
            tiles: (last_tile - c * per).min(per) as i32,
            place: (first_place + c) as i32,
            number: c as i32,
        }));
        let (first, end) = if problem.causal {
            (w.open as usize / shape.queries() * shape.queries(), tokens)
        } else {
            (0, w.queries as usize)
        };
        if w.queries > 0 {
            self.row_items.extend((first..end).step_by(shape.queries()).map(item));
        }
        self.tiles += tiles + sink_tiles;
        self.chunks += chunks + 1;
    }
}
