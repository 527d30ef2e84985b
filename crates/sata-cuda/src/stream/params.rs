//! Parameters of the streaming kernels, as `stream.cuh` has them.

use crate::{Plain, RawView};

/// `Sequence`: one of a call.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Sequence {
    pub q_batch: i64,
    pub q_first: i64,
    pub k_batch: i64,
    pub k_first: i64,
    pub work: i64,
    pub row: i64,
    pub tokens: i32,
    pub unused: i32,
}

// SAFETY: numbers of 8 bytes, then two of 4.
unsafe impl Plain for Sequence {}

/// `Segment`: chunks of a sequence, and the slots of its sums and of those before it, or -1.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(super) struct Segment {
    pub sequence: i32,
    pub first: i32,
    pub end: i32,
    pub sum: i32,
    pub before: i32,
}

// SAFETY: numbers of one size.
unsafe impl Plain for Segment {}

/// `Chain`: the slots of one sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(super) struct Chain {
    pub sequence: i32,
    pub first: i32,
    pub count: i32,
    pub unused: i32,
}

// SAFETY: numbers of one size.
unsafe impl Plain for Chain {}

/// `Stream`: of the kernels that walk over segments.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Stream {
    pub q: RawView,
    pub k: RawView,
    pub v: RawView,
    pub y: RawView,
    pub g: u64,
    pub sequences: u64,
    pub segments: u64,
    pub sums: u64,
    pub coefficients: u64,
    pub partial: u64,
    pub tally: u64,
    pub works: i64,
    pub rows: i64,
    pub most_queries: i64,
    pub segment_count: i32,
    pub kv_heads: i32,
    pub group: i32,
    pub block: i32,
    pub near: i32,
    pub first_head: i32,
    pub heads: i32,
    pub exp2_scale: f32,
    pub a: [f32; 8],
}

/// `Chains`: of the scan over segments.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Chains {
    pub sums: u64,
    pub g: u64,
    pub sequences: u64,
    pub chains: u64,
    pub ends: u64,
    pub works: i64,
    pub first_head: i32,
    pub heads: i32,
}
