//! How much `sata reproduce` does: sizes and lengths, quick and full.

use serde::Serialize;

/// Tokens of the paper's recovery experiments.
pub const TOKENS: usize = 102_400;

/// Sizes of heads throughout.
pub const HEADS: [usize; 4] = [8, 16, 32, 64];

/// Numbers of Taylor terms throughout.
pub const TERMS: [usize; 4] = [3, 4, 5, 6];

/// What is run.
#[derive(Clone, Debug, Serialize)]
pub struct Scope {
    /// quick or full.
    pub mode: &'static str,
    /// Seed of all random numbers.
    pub seed: u64,
    /// Head sizes and numbers of terms of figures A3 and A4.
    pub recovery: Vec<(usize, usize)>,
    /// Output elements that figures A3 and A4 compare, spread over all positions; all if not said.
    pub elements: Option<usize>,
    /// Context lengths of the precision floor.
    pub floor_tokens: Vec<usize>,
    /// Head size of the precision floor.
    pub floor_head: usize,
    /// Queries that read random keys with other coefficients.
    pub coefficient_queries: usize,
    /// Longest context of figure 6, if memory lets it be.
    pub decode_tokens: u64,
    /// Part of the free memory that figure 6 may fill with a KV cache.
    pub decode_memory: f64,
    /// Bytes that figure 6 may fill in any case.
    pub decode_bytes: u128,
}

impl Scope {
    /// Minutes on two processors.
    pub fn quick(seed: u64) -> Self {
        // What takes long and shows nothing new is left to the full run.
        let slow = [(32, 6), (64, 5), (64, 6)];
        Scope {
            mode: "quick",
            seed,
            recovery: all().into_iter().filter(|size| !slow.contains(size)).collect(),
            // Enough that another choice of queries moves the medians by less than 0.01.
            elements: Some(1 << 17),
            floor_tokens: vec![1 << 10, 1 << 12, 1 << 14, 1 << 16],
            floor_head: 16,
            coefficient_queries: 512,
            decode_tokens: 1 << 24,
            decode_memory: 0.25,
            decode_bytes: 1 << 30,
        }
    }

    /// All sizes, all queries, contexts as long as memory holds.
    pub fn full(seed: u64) -> Self {
        Scope {
            mode: "full",
            seed,
            recovery: all(),
            elements: None,
            floor_tokens: vec![1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20],
            floor_head: 16,
            coefficient_queries: 4096,
            decode_tokens: 1 << 27,
            decode_memory: 0.6,
            decode_bytes: u128::MAX,
        }
    }
}

fn all() -> Vec<(usize, usize)> {
    HEADS.iter().flat_map(|&d| TERMS.map(|terms| (d, terms))).collect()
}
