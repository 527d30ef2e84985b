//! One checked call as kernels see it: addresses, sizes, and the tokens of each sequence. What a
//! back end ([`generic`](crate::generic), or one for a certain GPU) is given to compute.

use sata::{Decay, Near, Series, Spec};

use crate::state::Arrays;
use crate::{Device, RawView};

/// A call, all of whose arguments have been checked.
#[derive(Debug)]
pub(crate) struct Problem<'a> {
    /// Where everything is and is done.
    pub device: &'a Device,
    /// What is computed.
    pub spec: &'a Spec,
    /// The name in kernels of what q, k, v and y hold.
    pub element: &'static str,
    /// Queries and outputs, `[batch, kv_heads · group, queries, …]`.
    pub q: RawView,
    pub y: RawView,
    /// Keys and values, `[batch, kv_heads, keys, …]`.
    pub k: RawView,
    pub v: RawView,
    pub kv_heads: usize,
    /// Query heads per key/value head.
    pub group: usize,
    /// Whether a query sees only the tokens up to its own.
    pub causal: bool,
    /// How the past fades.
    pub fading: Fading,
    /// One byte per key, `[batch][keys]`, and how far apart batch rows are.
    pub mask: Option<(u64, usize)>,
    /// The call's sequences.
    pub sequences: Vec<Stretch>,
    /// The state, which is left with the call's tokens in it.
    pub past: Option<Past>,
}

/// Where decays are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fading {
    None,
    /// `[kv_heads]` f64.
    Slopes(u64),
    /// Logarithms, f32: a view with dim 1.
    Gates(RawView),
}

/// One sequence's share of a call.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Stretch {
    /// Which batch row of q and y, which of its tokens come first, how many.
    pub q_batch: usize,
    pub q_first: usize,
    pub queries: usize,
    /// The same for k, v, gates and mask.
    pub k_batch: usize,
    pub k_first: usize,
    pub keys: usize,
    /// Tokens that wait in the state's open blocks.
    pub open: usize,
    /// Tokens of the sequence before those.
    pub folded: u64,
}

impl Stretch {
    /// Tokens that the call looks at: open ones and its own.
    pub(crate) fn tokens(&self) -> usize {
        self.open + self.keys
    }
}

/// A state's arrays, and what is not in them.
#[derive(Clone, Debug)]
pub(crate) struct Past {
    /// The orders that its sums hold.
    pub orders: Vec<usize>,
    /// Whether its sums are bf16.
    pub is_bf16: bool,
    /// Tokens that its open blocks have room for.
    pub capacity: usize,
    /// Sinks that it has room for.
    pub sinks: usize,
    pub arrays: Arrays,
}

/// Whether each query of a spec has coefficients of its own.
pub(crate) fn is_per_query(spec: &Spec) -> bool {
    matches!(spec.series(), Series::Gauss | Series::Hermite { .. })
}

impl Problem<'_> {
    /// Blocks that are near, or -1 where nothing is but sinks.
    pub(crate) fn near(&self) -> i64 {
        match self.spec.near() {
            Near::None => -1,
            Near::Blocks(n) => n as i64,
        }
    }

    /// Whether weights fade.
    pub(crate) fn fades(&self) -> bool {
        self.spec.decay() != Decay::None
    }

    /// Whether each query has coefficients of its own.
    pub(crate) fn is_per_query(&self) -> bool {
        is_per_query(self.spec)
    }

    /// Elements of a key and of a value.
    pub(crate) fn dims(&self) -> [usize; 2] {
        [self.spec.d_key(), self.spec.d_value()]
    }

    /// Tokens that are folded when `count` have been seen since the beginning of a block.
    pub(crate) fn folded(&self, count: usize) -> usize {
        let block = self.spec.block();
        match self.spec.near() {
            Near::None => count / block * block,
            Near::Blocks(n) => (count / block).saturating_sub(n) * block,
        }
    }

    /// The orders that sums hold: the state's, or the spec's.
    pub(crate) fn orders(&self) -> Vec<usize> {
        self.past.as_ref().map_or_else(|| self.spec.orders(), |past| past.orders.clone())
    }

    /// Sinks of a sequence after the call.
    pub(crate) fn sinks(&self, stretch: &Stretch) -> usize {
        let seen = stretch.folded.saturating_add(stretch.tokens() as u64);
        (self.spec.sinks() as u64).min(seen) as usize
    }

    /// Queries over all sequences and heads.
    pub(crate) fn queries(&self) -> u64 {
        let queries: u64 = self.sequences.iter().map(|s| s.queries as u64).sum();
        queries * (self.kv_heads * self.group) as u64
    }
}
