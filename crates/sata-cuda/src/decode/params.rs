//! The kernel's argument.

use crate::RawView;
use crate::state::Arrays;

/// `Decode` of `decode_types.cuh`, where fields are explained.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Params {
    pub q: RawView,
    pub k: RawView,
    pub v: RawView,
    pub y: RawView,
    pub log_gates: u64,
    pub gates_batch: i64,
    pub gates_head: i64,
    pub slopes: u64,
    pub slots: u64,
    pub state: Arrays,
    pub features: u64,
    pub more_indices: u64,
    pub coefficients: u64,
    pub partial: u64,
    pub parts_done: u64,
    pub heads_done: u64,
    pub tally: u64,
    pub relative_noise: f64,
    pub absolute_noise: f64,
    pub entries: u32,
    pub kv_heads: u32,
    pub sequences: u32,
    pub split: u32,
    pub scale: f32,
    pub tau: f32,
}

impl Default for Params {
    fn default() -> Self {
        Params {
            q: RawView::NONE,
            k: RawView::NONE,
            v: RawView::NONE,
            y: RawView::NONE,
            log_gates: 0,
            gates_batch: 0,
            gates_head: 0,
            slopes: 0,
            slots: 0,
            state: Arrays::default(),
            features: 0,
            more_indices: 0,
            coefficients: 0,
            partial: 0,
            parts_done: 0,
            heads_done: 0,
            tally: 0,
            relative_noise: 0.0,
            absolute_noise: 0.0,
            entries: 0,
            kv_heads: 0,
            sequences: 0,
            split: 1,
            scale: 0.0,
            tau: 0.0,
        }
    }
}
