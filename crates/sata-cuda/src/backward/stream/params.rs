//! Parameters of the kernels, as the sources have them.

use crate::{Plain, RawView};

pub(super) const OF_KEYS: i32 = 1;
pub(super) const OF_QUERIES: i32 = 2;

/// `Item` of `stream_backward.cuh`: neighbouring chunks of one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(super) struct Item {
    pub q_batch: i64,
    pub q_first: i64,
    pub k_batch: i64,
    pub k_first: i64,
    pub work: i64,
    pub tokens: i32,
    pub chunks: i32,
    pub first: i32,
    pub end: i32,
    pub slot: i32,
    /// Of parts: whose sums are read, [`OF_KEYS`] and [`OF_QUERIES`].
    pub last_slot: i32,
}

// SAFETY: numbers of 8 bytes, then an even number of such of 4.
unsafe impl Plain for Item {}

/// Items of one sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(8))]
pub(super) struct Range {
    pub first: i32,
    pub count: i32,
}

// SAFETY: numbers of one size.
unsafe impl Plain for Range {}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Walk {
    pub q: RawView,
    pub k: RawView,
    pub v: RawView,
    pub dy: RawView,
    pub dq: RawView,
    pub dk: RawView,
    pub dv: RawView,
    pub items: u64,
    pub g: u64,
    pub dw: u64,
    pub inverse: u64,
    pub tail: u64,
    pub shift: u64,
    pub sums: u64,
    pub works: i64,
    pub group: i32,
    pub slots: i32,
    pub block: i32,
    pub near: i32,
    pub scale: f32,
    pub a: [f32; 4],
    pub unused: i32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Scan {
    pub walk: Walk,
    pub ranges: u64,
    pub reverse: i64,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Logs {
    pub dw: u64,
    pub d_log_gates: RawView,
    /// `[kv_heads][sequences]`.
    pub slopes: u64,
    pub d_slopes: u64,
    pub sequences: u64,
    pub works: i64,
    pub sequence_count: i32,
    pub unused: i32,
}
