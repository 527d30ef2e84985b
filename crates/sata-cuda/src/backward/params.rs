//! What the kernels of the backward pass are given: `Backward` of `backward.cuh`.

use crate::RawView;

/// Raw tokens of a state, or gradients by them.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct RawTokens {
    /// `[rows][most][d_key]`.
    pub keys: u64,
    /// `[rows][most][d_value]`.
    pub values: u64,
    /// `[rows][most]` f64.
    pub fading: u64,
    /// `[rows][most]`.
    pub weights: u64,
    pub most: i64,
}

impl RawTokens {
    /// None. Their number is 1: kernels divide by it.
    pub const NONE: RawTokens = RawTokens { keys: 0, values: 0, fading: 0, weights: 0, most: 1 };
}

/// See the kernels' header for what each is.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Params {
    pub q: RawView,
    pub k: RawView,
    pub v: RawView,
    pub dy: RawView,
    pub dq: RawView,
    pub dk: RawView,
    pub dv: RawView,
    pub log_gates: RawView,
    pub d_log_gates: RawView,
    pub sequences: u64,
    pub folds: u64,
    pub reads: u64,
    pub mask: u64,
    pub slopes: u64,
    pub d_slopes: u64,

    pub coefficients: u64,
    pub features: u64,
    pub prefixes: u64,
    pub factors: u64,
    pub runs: u64,
    pub tile_runs: u64,

    pub past: u64,
    pub past_sums: u64,
    pub past_z: u64,
    pub past_sums_low: u64,
    pub past_z_low: u64,
    pub past_is_bf16: i64,
    pub open: RawTokens,
    pub sinks: RawTokens,
    pub final_sums: u64,
    pub final_z: u64,
    pub final_open: RawTokens,
    pub final_sinks: RawTokens,
    pub final_past: u64,
    pub initial_sums: u64,
    pub initial_z: u64,
    pub initial_open: RawTokens,
    pub initial_sinks: RawTokens,
    pub initial_past: u64,

    pub g: u64,
    pub own: u64,
    pub dw: u64,
    pub folding: u64,
    pub live: u64,
    pub shift: u64,
    pub inverse: u64,
    pub delta: u64,
    pub reading: u64,

    pub slots: u64,
    pub carry: u64,
    pub far: u64,
    pub slot_unit: i64,
    pub slot_chunk: i64,
    pub far_tokens: i64,
    pub far_split: i64,
    pub sink_rows: u64,
    pub sink_dw: u64,
    pub sink_splits: i64,
    pub most_sinks: i64,

    pub features_count: i64,
    pub mask_batch: i64,
    pub block: i64,
    pub sink_count: i64,
    pub near: i64,
    pub scale: f32,
    pub kv_heads: i32,
    pub group: i32,
    pub sequences_count: i32,
    pub first_unit: i32,
    pub units: i32,
    pub first_chunk: i32,
    pub chunks: i32,
    pub far_heads: i32,
    pub splits: i32,
    pub mode: i32,
    pub flags: i32,
}
