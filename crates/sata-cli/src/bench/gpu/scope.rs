//! How much is measured: everything, or enough to see that it works.

use serde::Serialize;

/// Sizes and numbers of measurements.
#[derive(Clone, Debug, Serialize)]
pub struct Scope {
    /// Whether it is the smoke run.
    pub quick: bool,
    /// What all counts of heads are multiplied by.
    pub heads_scale: f64,
    /// Head sizes.
    pub dims: Vec<usize>,
    /// Tokens of prefill.
    pub tokens: usize,
    /// Tokens of prefill in f32, on kernels that serve every GPU.
    pub generic_tokens: usize,
    /// Shorter contexts.
    pub short: Vec<usize>,
    /// Shorter contexts of forward and backward passes.
    pub short_both: Vec<usize>,
    /// Measurements of which the median is taken.
    pub runs: usize,
    /// Seconds that one row may take; it has fewer heads where it would take more.
    pub budget: f64,
    /// Bytes of the copy whose rate is the measure of decoding.
    pub copy_bytes: usize,
    /// The longest context of figure 6.
    pub longest: u64,
    /// The context that is really absorbed token by token.
    pub prefilled: u64,
    /// Random numbers of each input.
    pub elements: usize,
}

impl Scope {
    /// Minutes.
    pub fn full(heads_scale: f64) -> Self {
        Scope {
            quick: false,
            heads_scale,
            dims: super::attention::DIMS.to_vec(),
            tokens: 1 << 16,
            generic_tokens: 1 << 13,
            short: vec![256, 512, 1024, 2048, 4096, 8192, 16384],
            short_both: vec![1024, 4096, 16384],
            runs: 7,
            budget: 4.0,
            copy_bytes: 1 << 31,
            longest: 1 << 27,
            prefilled: 1 << 20,
            elements: (heads_scale.max(1.0) * (1u64 << 26) as f64) as usize,
        }
    }

    /// Seconds.
    pub fn quick(heads_scale: f64) -> Self {
        Scope {
            quick: true,
            tokens: 1 << 14,
            generic_tokens: 1 << 12,
            short: vec![1024, 4096],
            short_both: vec![4096],
            runs: 3,
            budget: 0.5,
            copy_bytes: 1 << 29,
            longest: 1 << 22,
            prefilled: 1 << 17,
            elements: (heads_scale.max(1.0) * (1u64 << 24) as f64) as usize,
            ..Self::full(heads_scale)
        }
    }

    /// A count of heads, scaled.
    pub fn heads(&self, usual: usize) -> usize {
        ((usual as f64 * self.heads_scale).round() as usize).max(1)
    }
}
