//! Parameters of the generic kernels, as the sources have them.

use crate::window::StateSums;
use crate::{Plain, RawView};

/// `Chunk` of `generic.cuh`: queries of one sequence that read the same far sums.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(super) struct Chunk {
    pub sequence: i32,
    /// 0: the state's; j > 0: those with pieces 0 … j−1; −1: none.
    pub prefix: i32,
    pub first: i64,
    pub count: i64,
    /// The first token that they weigh one by one.
    pub window: i64,
}

// SAFETY: two numbers of 4 bytes, then such of 8.
unsafe impl Plain for Chunk {}

/// `Piece` of `generic.cuh`: tokens of one sequence that are summed together.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(super) struct Piece {
    pub sequence: i32,
    pub index: i32,
    pub first: i64,
    pub count: i64,
}

// SAFETY: as above.
unsafe impl Plain for Piece {}

/// `Group` of `generic_read.cu`: neighbouring features of one order.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(super) struct Group {
    pub first: i32,
    pub count: i32,
    pub order: i32,
    pub coefficient: f32,
}

// SAFETY: numbers of one size.
unsafe impl Plain for Group {}

/// `Tally` of `generic_local.cu`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(crate) struct Tally {
    pub non_positive: u64,
    pub non_finite: u64,
    pub first: u64,
}

// SAFETY: numbers of one size.
unsafe impl Plain for Tally {}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Sums {
    pub k: RawView,
    pub v: RawView,
    pub sequences: u64,
    pub pieces: u64,
    pub live: u64,
    pub last: u64,
    pub g: u64,
    pub factors: u64,
    pub sums: u64,
    pub z: u64,
    pub works: i64,
    pub features: i64,
    pub first_piece: i64,
    pub first_head: i32,
    pub heads: i32,
    pub width: i32,
    pub tiles: i32,
    pub gathered: i32,
    pub padding: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Scan {
    pub sequences: u64,
    pub last: u64,
    pub g: u64,
    pub marks: u64,
    pub state: StateSums,
    pub pieces: u64,
    pub sums: u64,
    pub z: u64,
    pub works: i64,
    pub features: i64,
    pub d_value: i64,
    pub first_piece: i64,
    pub first_sequence: i32,
    pub sequence_count: i32,
    pub first_head: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub padding: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Read {
    pub q: RawView,
    pub sequences: u64,
    pub chunks: u64,
    pub factors: u64,
    pub multiplicities: u64,
    pub groups: u64,
    pub planes: u64,
    pub state: StateSums,
    pub sums: u64,
    pub z: u64,
    pub num: u64,
    pub den: u64,
    pub features: i64,
    pub first_piece: i64,
    pub first_row: i64,
    pub rows: i64,
    pub scale: f32,
    pub width: i32,
    pub plane_count: i32,
    pub parts: i32,
    pub tiles: i32,
    pub first_head: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub group: i32,
    pub first_chunk: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Local {
    pub q: RawView,
    pub k: RawView,
    pub v: RawView,
    pub y: RawView,
    pub sequences: u64,
    pub chunks: u64,
    pub live: u64,
    pub last: u64,
    pub g: u64,
    pub num: u64,
    pub den: u64,
    pub marks: u64,
    pub reach: u64,
    pub reach_before: u64,
    pub sink_keys: u64,
    pub sink_values: u64,
    pub sink_live: u64,
    pub sink_last: u64,
    pub sink_g: u64,
    pub coefficients: u64,
    pub plane_of: u64,
    pub tally: u64,
    pub works: i64,
    pub first_row: i64,
    pub rows: i64,
    pub block: i64,
    pub near: i64,
    pub sinks: i64,
    pub sink_works: i64,
    pub most_queries: i64,
    pub tau: f64,
    pub relative: f64,
    pub absolute: f64,
    pub scale: f32,
    pub rule: i32,
    pub terms: i32,
    pub plane_count: i32,
    pub parts: i32,
    pub tiles: i32,
    pub causal: i32,
    pub gathered: i32,
    pub first_head: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub group: i32,
    pub first_chunk: i32,
    pub padding: i32,
}
