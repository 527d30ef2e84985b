//! The kernels, written once over [`Vector`]; entry points per instruction set are in [`super`].
//!
//! Words: a *panel* is up to [`PANEL`] tokens by up to [`TILE`](crate::basis::TILE) rows (features,
//! or keys of the direct form), laid out `[row][PANEL]`, made in L1 and used at once. `padded` is
//! d_value rounded up to whole vectors. Tokens come transposed, `x[channel][token]` with leading
//! dimension `ld` and one more row, the token's weight, by which all its features are multiplied
//! (1, or 0 for a masked key). Token counts are padded to multiples of [`TOKENS`] with weight 0.

mod cache;
mod decode;
mod direct;
mod features;
mod gemm;
mod pairs;
mod reverse;
mod sums;

/// The kernels over any [`Vector`](super::vector::Vector).
pub(super) mod vector_kernels {
    pub(in crate::arch) use super::cache::cache_one;
    pub(in crate::arch) use super::decode::{read_one, weigh_one};
    pub(in crate::arch) use super::direct::{exponential, moments, polynomial};
    pub(in crate::arch) use super::pairs::pairs;
    pub(in crate::arch) use super::reverse::read_back;
    pub(in crate::arch) use super::sums::{absorb, fold, pack, read};
}

pub(crate) use pairs::{By, FromSums, Pairs, PairsWork, QUERIES, Stretch, Weighed};
pub(crate) use reverse::{ReadBack, ReadBackWork};

use crate::Real;
use crate::basis::{Basis, Tile};

/// Tokens in a panel.
pub(crate) const PANEL: usize = 64;
/// Token counts are padded to multiples of this: the widest vector.
pub(crate) const TOKENS: usize = 16;

/// Elements of working memory for one query, besides one per order: a tile and a vector beyond.
pub(crate) const DECODE_SCRATCH: usize = crate::basis::TILE + TOKENS;

/// Working memory of one thread's kernels.
#[derive(Debug)]
pub(crate) struct Scratch<T> {
    /// `[TILE][PANEL]`, features or weights.
    pub panel: super::Buffer<T>,
    /// `[order][PANEL]`, prefixes of the monomials being made.
    pub stack: super::Buffer<T>,
}

impl<T: Real> Scratch<T> {
    /// Working memory for the features of `basis`.
    pub(crate) fn new(basis: &Basis) -> Self {
        Self::for_orders(basis.orders().last().copied().unwrap_or(0))
    }

    /// Working memory for the direct form, which makes no features.
    pub(crate) fn direct() -> Self {
        Self::for_orders(0)
    }

    fn for_orders(highest: usize) -> Self {
        Scratch {
            panel: super::Buffer::zeroed(crate::basis::TILE * PANEL),
            // Never empty: kernels point into it.
            stack: super::Buffer::zeroed(highest.max(1) * PANEL),
        }
    }
}

/// Transposed tokens: `x[channel * ld + token]`.
#[derive(Clone, Copy)]
pub(crate) struct Tokens<'a, T> {
    /// From the first token on; `(d_key + 1)` rows.
    pub x: &'a [T],
    /// Distance between rows; see [`stride`].
    pub ld: usize,
    /// Tokens, a multiple of [`TOKENS`].
    pub count: usize,
}

impl<'a, T> Tokens<'a, T> {
    /// Up to a panel of them, from `at` on.
    #[inline(always)]
    fn panel(&self, at: usize) -> Tokens<'a, T> {
        Tokens { x: &self.x[at..], ld: self.ld, count: PANEL.min(self.count - at) }
    }
}

/// A distance between rows of `tokens` tokens: room for them, and never a power of two, at which
/// rows would compete for the same few lines of a cache.
pub(crate) fn stride(tokens: usize) -> usize {
    (tokens.div_ceil(TOKENS) | 1) * TOKENS
}

/// Sums of tiles prepared for reading: multiplied by multiplicity and coefficient, padded.
#[derive(Clone, Copy)]
pub(crate) struct Packed<'a, T> {
    /// What [`Kernels::pack`](super::Kernels) left, `packed_len` elements per tile.
    pub sums: &'a [T],
    /// One number per feature, TILE of them per tile.
    pub z: &'a [T],
}

/// `num[t] += Σ_f Φ_f(x_t)·sums_f`, `den[t] += Σ_f Φ_f(x_t)·z_f`.
pub(crate) struct Read<'a, T> {
    pub basis: &'a Basis,
    pub tiles: &'a [Tile],
    pub tokens: Tokens<'a, T>,
    pub packed: Packed<'a, T>,
    pub padded: usize,
    /// `[tokens][padded]`.
    pub num: &'a mut [T],
    /// `[tokens]`.
    pub den: &'a mut [T],
    pub scratch: &'a mut Scratch<T>,
}

/// Values of tokens.
#[derive(Clone, Copy)]
pub(crate) struct Values<'a, T> {
    /// `[tokens][padded]`, zero beyond d_value and beyond the last token.
    pub rows: &'a [T],
    /// What [`Kernels::prepare`](super::Kernels) made of them, `prepared_len` elements per panel
    /// (empty where it needs nothing).
    pub prepared: &'a [T],
}

/// `sums[f] += Σ_t Φ_f(x_t)·v_t`, and the same with 1 or `by[t]` for v_t, lane by lane, in `z`.
pub(crate) struct Absorb<'a, T> {
    pub basis: &'a Basis,
    pub tile: &'a Tile,
    pub tokens: Tokens<'a, T>,
    pub values: Values<'a, T>,
    /// `[tokens]`, or empty for ones; the tile unit takes ones alone.
    pub by: &'a [T],
    pub padded: usize,
    /// `[TILE][padded]`, this chunk's sums.
    pub sums: &'a mut [T],
    /// `[TILE][TOKENS]`, this chunk's lanes of Σ Φ_f.
    pub z: &'a mut [T],
    pub scratch: &'a mut Scratch<T>,
}

/// Far sums of one tile, a stretch of a state.
pub(crate) struct Far<'a, T> {
    /// `[len][d_value]`, readable one vector beyond.
    pub sums: &'a mut [T],
    /// `[len]`.
    pub z: &'a mut [T],
    /// What rounding took from `sums`; empty where sums are not compensated.
    pub sums_low: &'a mut [T],
    /// What rounding took from `z`; empty likewise.
    pub z_low: &'a mut [T],
}

impl<T> Far<'_, T> {
    /// `len` features from feature `at` of the stretch on.
    pub(crate) fn part(&mut self, at: usize, len: usize, d_value: usize) -> Far<'_, T> {
        let rows = at * d_value..(at + len) * d_value;
        let low = !self.z_low.is_empty();
        Far {
            sums: &mut self.sums[rows.clone()],
            z: &mut self.z[at..at + len],
            sums_low: if low { &mut self.sums_low[rows] } else { &mut [] },
            z_low: if low { &mut self.z_low[at..at + len] } else { &mut [] },
        }
    }
}

/// Which keys each query sees: `from[t] ≤ s < to[t]`, both ascending with t. Empty: from the first,
/// up to the last.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sight<'a> {
    pub from: &'a [u32],
    pub to: &'a [u32],
}

/// Logarithms of decays, each as a sum of a large and a small number: a weight carries
/// exp(queries[t] − keys[s]).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fading<'a, T> {
    pub queries: [&'a [T]; 2],
    pub keys: [&'a [T]; 2],
}

/// Coefficients of a polynomial by order.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Coefficients<'a, T> {
    /// `[P]`, the same for every query.
    Same(&'a [T]),
    /// `[P][ld]`, a column per query.
    Each { rows: &'a [T], ld: usize },
}

impl<T> Coefficients<'_, T> {
    /// None, for what is weighed by exp.
    pub(crate) const NONE: Self = Coefficients::Same(&[]);
}

/// Weights of queries over keys, by the polynomial or by exp: `num[t] += Σ_s w_ts v_s`,
/// `den[t] += Σ_s w_ts`.
pub(crate) struct Direct<'a, T> {
    pub d_key: usize,
    pub queries: Tokens<'a, T>,
    /// Keys, transposed like the queries, with their weights.
    pub keys: Tokens<'a, T>,
    /// `[keys][padded]`.
    pub values: &'a [T],
    pub padded: usize,
    pub sight: Sight<'a>,
    pub fading: Option<Fading<'a, T>>,
    /// Unused by exp.
    pub coefficients: Coefficients<'a, T>,
    /// `[tokens][padded]`.
    pub num: &'a mut [T],
    /// `[tokens]`.
    pub den: &'a mut [T],
    /// `[tokens]`, largest logit so far, to which num and den are relative; used by exp alone.
    pub max: &'a mut [T],
    pub scratch: &'a mut Scratch<T>,
}

/// Moments of queries' logits over keys: `sums[i][t] += Σ_s w_s exp(g_t − g_s) x_ts^p` for
/// p = `orders[i]`.
pub(crate) struct Moments<'a, T> {
    pub d_key: usize,
    pub queries: Tokens<'a, T>,
    pub keys: Tokens<'a, T>,
    pub sight: Sight<'a>,
    pub fading: Option<Fading<'a, T>>,
    /// Ascending.
    pub orders: &'a [usize],
    /// `[orders][ld]`.
    pub sums: &'a mut [T],
    pub ld: usize,
    pub scratch: &'a mut Scratch<T>,
}

/// One query reads all far sums.
pub(crate) struct ReadOne<'a, T> {
    pub basis: &'a Basis,
    /// `[d_key]`, readable one vector beyond.
    pub query: &'a [T],
    /// `[D][d_value]`, readable one vector beyond.
    pub sums: &'a [T],
    /// `[D]`, readable one vector beyond.
    pub z: &'a [T],
    pub d_value: usize,
    /// Where, in bytes from what is read, lies what will be read soon: keeps memory busy while
    /// features are made.
    pub ahead: isize,
    /// a_p by order; orders of coefficient 0 are not read.
    pub coefficients: &'a [T],
    /// Which plane of `num` and element of `den` an order is added to; empty: all to the first.
    pub planes: &'a [usize],
    /// `[planes][padded]`.
    pub num: &'a mut [T],
    /// `[planes]`.
    pub den: &'a mut [T],
    /// [`DECODE_SCRATCH`] elements and one per order.
    pub scratch: &'a mut [T],
}

/// By what one query weighs raw keys.
pub(crate) enum How<'a, T> {
    /// Σ a_p x^p, times the keys' weights.
    Polynomial(&'a [T]),
    /// exp(x − max), with what was summed before rescaled to the new maximum; keys of weight 0 are
    /// left out.
    Exponential(&'a mut T),
    /// By nothing: `den[i]` takes the sum of x^p, p = `orders[i]`, over the keys' weights.
    Moments(&'a [usize]),
}

/// One query reads raw keys and values.
pub(crate) struct WeighOne<'a, T> {
    pub query: &'a [T],
    /// `[d_key + 1][ld]`, transposed, with weights.
    pub keys: &'a [T],
    pub ld: usize,
    /// Keys, at most `ld`; those beyond it up to a whole vector have weight 0.
    pub count: usize,
    /// Logarithms of decays, `[ld]`, or empty.
    pub fading: &'a [T],
    /// `[ld][d_value]`, readable one vector beyond.
    pub values: &'a [T],
    pub d_value: usize,
    pub how: How<'a, T>,
    /// `[padded]`.
    pub num: &'a mut [T],
    /// `[1]`, or one per order of the moments.
    pub den: &'a mut [T],
    /// [`DECODE_SCRATCH`] elements and one per order.
    pub scratch: &'a mut [T],
}

/// One query weighs a stretch of a KV cache by exp, with a running maximum.
pub(crate) struct CacheOne<'a, T> {
    /// `[d_key]`, scaled.
    pub query: &'a [T],
    /// `[count][d_key]`.
    pub keys: &'a [T],
    /// `[count][d_value]`.
    pub values: &'a [T],
    /// `[d_value]` and up to a whole vector.
    pub num: &'a mut [T],
    pub d_value: usize,
    pub den: &'a mut T,
    pub max: &'a mut T,
}
