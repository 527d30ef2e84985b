//! Parameters of the Hopper kernels, as the sources have them.

use crate::window::StateSums;
use crate::{Plain, RawView};

/// `Sequence` of `hopper.cuh`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Sequence {
    pub q_batch: i64,
    pub q_first: i64,
    pub k_batch: i64,
    pub k_first: i64,
    pub work: i64,
    pub sink: i64,
    pub folded: i64,
    pub tokens: i32,
    pub lead: i32,
    pub queries: i32,
    pub tile: i32,
    pub chunk: i32,
    pub chunks: i32,
    pub summed: i32,
    pub sinks: i32,
    pub sink_tile: i32,
    pub sink_tiles: i32,
}

// SAFETY: numbers of 8 bytes, then an even number of such of 4.
unsafe impl Plain for Sequence {}

/// A sequence, and one of its tiles, chunks or rows.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(8))]
pub(super) struct Item {
    pub sequence: i32,
    pub place: i32,
}

// SAFETY: numbers of one size.
unsafe impl Plain for Item {}

/// A chunk: its first tile record, how many tiles, its place, its number in its sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(16))]
pub(super) struct Chunk {
    pub tile: i32,
    pub tiles: i32,
    pub place: i32,
    pub number: i32,
}

// SAFETY: four numbers of one size.
unsafe impl Plain for Chunk {}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Prepare {
    pub k: RawView,
    pub v: RawView,
    pub g: u64,
    pub live: u64,
    pub sink_keys: u64,
    pub sink_values: u64,
    pub sink_live: u64,
    pub sink_g: u64,
    pub references: u64,
    pub tiles: u64,
    pub sum_tiles: u64,
    pub sequences: u64,
    pub items: u64,
    pub works: i64,
    pub sink_works: i64,
    pub tile_count: i32,
    pub chunk_count: i32,
    pub chunk_tokens: i32,
    pub first_head: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct References {
    pub g: u64,
    pub last: u64,
    pub marks: u64,
    pub references: u64,
    pub sequences: u64,
    pub works: i64,
    pub sequence_count: i32,
    pub chunk_count: i32,
    pub chunk_tokens: i32,
    pub first_head: i32,
    pub kv_heads: i32,
    pub unused: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Sums {
    pub tiles: u64,
    pub sums: u64,
    pub far: u64,
    pub coefficients: u64,
    pub references: u64,
    pub left: u64,
    pub ready: u64,
    pub items: u64,
    pub item_count: i32,
    pub heads: i32,
    pub tile_count: i32,
    pub chunk_count: i32,
    pub team: i32,
    pub unused: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Scan {
    pub sums: u64,
    pub far: u64,
    pub total: u64,
    pub coefficients: u64,
    pub places: u64,
    pub references: u64,
    pub marks: u64,
    pub state: StateSums,
    pub sequences: u64,
    pub features: i64,
    pub chunk_count: i32,
    pub sequence_count: i32,
    pub first_head: i32,
    pub kv_heads: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Commit {
    pub total: u64,
    pub map: u64,
    pub references: u64,
    pub marks: u64,
    pub state: StateSums,
    pub sequences: u64,
    pub features: i64,
    pub chunk_count: i32,
    pub sequence_count: i32,
    pub first_head: i32,
    pub kv_heads: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Read {
    pub q: RawView,
    pub y: RawView,
    pub far: u64,
    pub tiles: u64,
    pub sequences: u64,
    pub items: u64,
    pub references: u64,
    pub last: u64,
    pub tally: u64,
    pub most_queries: i64,
    pub tile_count: i32,
    pub chunk_count: i32,
    pub chunk_tokens: i32,
    pub group: i32,
    pub first_head: i32,
    pub heads: i32,
    pub block: i32,
    pub near_blocks: i32,
    pub full: i32,
    pub initial: i32,
    pub exp2_scale: f32,
    pub item_count: i32,
    pub head_count: i32,
    pub unused: i32,
    pub a: [f32; 8],
}
