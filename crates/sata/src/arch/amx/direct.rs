//! The direct form on tiles: logits `[query][key]`, their weights as left factors, times values.
//!
//! Keys and values are bf16 numbers as they come, and so are exact; queries, which have been
//! scaled, are taken as a bf16 number and what rounding took from it. Only weights are made bf16,
//! by cutting off, as features are.

use std::arch::x86_64::*;

use super::absorb::{REGISTER, SHAPES, STEP, prepare, prepared_len};
use super::tiles::Tiles;
use super::vectors::{INFLATE, LANES, pair, rounded, transpose};
use crate::arch::kernels::{Coefficients, Direct, PANEL, TOKENS};
use crate::basis::TILE;

/// Queries that share one look at the keys.
const QUERIES: usize = 4 * PANEL;
/// Channels that there is room for on the stack.
const CHANNELS: usize = 128;
/// Columns of values likewise.
const COLUMNS: usize = 128;
/// Coefficients likewise.
const TERMS: usize = 16;
/// Pairs of weights in a row.
const ROW: usize = TILE / 2;
/// Registers for results; one more holds weights and one values.
const MOST: usize = 6;

/// Working memory of a call.
#[repr(align(64))]
struct Room {
    /// `[query][pairs]`.
    queries: [i32; QUERIES * CHANNELS / 2],
    /// `[pair][TILE]`.
    keys: [i32; CHANNELS * TILE],
    /// As [`prepare`] makes them.
    values: [f32; TILE / 2 * COLUMNS],
    /// `[16][TILE]`, twice.
    logits: [f32; 2 * LANES * TILE],
    /// `[16][ROW]` pairs, twice.
    weights: [i32; 2 * LANES * ROW],
    /// `[QUERIES][TOKENS]`, of which the first lane counts.
    totals: [f32; QUERIES * TOKENS],
}

/// Whether [`polynomial`] has room for these sizes.
pub(super) fn fits(a: &Direct<'_, f32>) -> bool {
    let terms = match a.coefficients {
        Coefficients::Same(a) => a.len(),
        Coefficients::Each { .. } => 0,
    };
    (1..=CHANNELS).contains(&a.d_key)
        && (1..=TERMS).contains(&terms)
        && a.sight.from.is_empty()
        && a.fading.is_none()
        && a.padded <= COLUMNS
        && a.padded.is_multiple_of(LANES)
}

/// See [`Direct`]; any number of queries and keys.
///
/// # Safety
/// The machine has AVX-512 and what `t` needs.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) unsafe fn polynomial(t: &mut impl Tiles, a: &mut Direct<'_, f32>) {
    let (nq, nk, padded) = (a.queries.count, a.keys.count, a.padded);
    assert!(fits(a));
    assert!(nq.is_multiple_of(TOKENS) && nk.is_multiple_of(TOKENS));
    assert!(a.queries.x.len() >= (a.d_key - 1) * a.queries.ld + nq);
    assert!(a.keys.x.len() >= a.d_key * a.keys.ld + nk);
    assert!(a.values.len() >= nk * padded);
    assert!(a.num.len() >= nq * padded && a.den.len() >= nq);
    let pairs = a.d_key.div_ceil(2);
    // Both parts of the queries, one after the other.
    let depth = (2 * pairs).next_multiple_of(LANES);
    let most = (QUERIES * CHANNELS / 2 / depth).min(QUERIES) / LANES * LANES;
    let mut room = std::mem::MaybeUninit::<Room>::uninit();
    let room = room.as_mut_ptr();
    // SAFETY: the lengths were checked just now; what is read of the room has been written.
    unsafe {
        let queries = (&raw mut (*room).queries).cast::<i32>();
        let keys = (&raw mut (*room).keys).cast::<i32>();
        let values = (&raw mut (*room).values).cast::<f32>();
        let totals = (&raw mut (*room).totals).cast::<f32>();
        let num = a.num.as_mut_ptr();
        t.configure(&SHAPES);
        for start in (0..nq).step_by(most) {
            let width = most.min(nq - start);
            totals.write_bytes(0, width * TOKENS);
            for at in (0..width).step_by(LANES) {
                split_queries(a, start + at, pairs, depth, queries.add(at * depth));
            }
            for first in (0..nk).step_by(TILE) {
                // How far queries see, none where all see all.
                let to = a.sight.to.get(start..start + width).unwrap_or_default();
                let unseen = to.partition_point(|&to| to as usize <= first);
                // Groups of sixteen queries, at least one of which sees a key.
                let groups = unseen / LANES..width / LANES;
                if groups.is_empty() || unseen == width {
                    break;
                }
                let count = TILE.min(nk - first);
                pair_keys(a, first, count, pairs, depth, keys);
                let rows = &a.values[first * padded..(first + count) * padded];
                let out = std::slice::from_raw_parts_mut(values, prepared_len(padded));
                prepare(rows, count, padded, out);
                let weigh = Weigh::new(a, first, count);
                let group = |g: usize| Group {
                    queries: queries.add(g * LANES * depth),
                    keys,
                    depth,
                    logits: (&raw mut (*room).logits).cast::<f32>().add(g % 2 * LANES * TILE),
                    weights: (&raw mut (*room).weights).cast::<i32>().add(g % 2 * LANES * ROW),
                    values,
                    columns: padded / LANES,
                    steps: count.div_ceil(STEP),
                    num: num.add((start + g * LANES) * padded),
                    totals: totals.add(g * LANES * TOKENS),
                };
                // The tile unit works on the groups before and after the one being weighed.
                group(groups.start).multiply_keys(t);
                for g in groups.clone() {
                    if g + 1 < groups.end {
                        group(g + 1).multiply_keys(t);
                    }
                    let to = to.get(g * LANES..(g + 1) * LANES).unwrap_or_default();
                    weigh.weigh(&group(g), to, first);
                    if g > groups.start {
                        group(g - 1).multiply_values(t);
                    }
                }
                group(groups.end - 1).multiply_values(t);
            }
            for (i, den) in a.den[start..start + width].iter_mut().enumerate() {
                *den += *totals.add(i * TOKENS);
            }
        }
        t.release();
    }
}

/// Sixteen queries as rows of pairs: all channels rounded, then what rounding took from them.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
unsafe fn split_queries(a: &Direct<'_, f32>, at: usize, pairs: usize, depth: usize, out: *mut i32) {
    // SAFETY: forwarded: channels are below d_key.
    unsafe {
        let channel = |c: usize| {
            if c < a.d_key {
                _mm512_loadu_ps(a.queries.x.as_ptr().add(c * a.queries.ld + at))
            } else {
                _mm512_setzero_ps()
            }
        };
        for first in (0..depth).step_by(LANES) {
            let mut block = [_mm512_setzero_si512(); 16];
            for (i, block) in block.iter_mut().enumerate() {
                let p = first + i;
                if p < pairs {
                    *block = pair::<true>(channel(2 * p), channel(2 * p + 1));
                } else if p < 2 * pairs {
                    let left = |c: usize| _mm512_sub_ps(channel(c), rounded(channel(c)));
                    *block = pair::<true>(left(2 * (p - pairs)), left(2 * (p - pairs) + 1));
                }
            }
            for (i, row) in transpose(block).into_iter().enumerate() {
                _mm512_storeu_si512(out.add(i * depth + first).cast(), row);
            }
        }
    }
}

/// `count` keys as columns of pairs, once for each part of the queries; zeros up to TILE.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
unsafe fn pair_keys(
    a: &Direct<'_, f32>,
    first: usize,
    count: usize,
    pairs: usize,
    depth: usize,
    out: *mut i32,
) {
    // SAFETY: forwarded: channels are below d_key.
    unsafe {
        out.add(2 * pairs * TILE).write_bytes(0, (depth - 2 * pairs) * TILE);
        for p in 0..pairs {
            for n in (0..TILE).step_by(LANES) {
                let channel = |c: usize| {
                    if c < a.d_key && n < count {
                        _mm512_loadu_ps(a.keys.x.as_ptr().add(c * a.keys.ld + first + n))
                    } else {
                        _mm512_setzero_ps()
                    }
                };
                let both = pair::<true>(channel(2 * p), channel(2 * p + 1));
                _mm512_storeu_si512(out.add(p * TILE + n).cast(), both);
                _mm512_storeu_si512(out.add((pairs + p) * TILE + n).cast(), both);
            }
        }
    }
}

/// Makes logits of a tile of keys weights.
struct Weigh {
    /// Of the polynomial, times [`INFLATE`].
    coefficients: [f32; TERMS],
    terms: usize,
    /// Of the keys: 1 or 0.
    weights: [__m512; TILE / LANES],
    /// Whether all keys weigh 1.
    is_full: bool,
}

impl Weigh {
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
    unsafe fn new(a: &Direct<'_, f32>, first: usize, count: usize) -> Self {
        let mut weights = [_mm512_setzero_ps(); TILE / LANES];
        let mut is_full = count == TILE;
        for (n, weight) in weights[..count / LANES].iter_mut().enumerate() {
            let at = a.d_key * a.keys.ld + first + n * LANES;
            // SAFETY: forwarded: the row of weights has `count` of them from `first` on.
            *weight = unsafe { _mm512_loadu_ps(a.keys.x.as_ptr().add(at)) };
            is_full &= _mm512_cmpneq_ps_mask(*weight, _mm512_set1_ps(1.0)) == 0;
        }
        let mut coefficients = [0.0; TERMS];
        let (Coefficients::Same(from) | Coefficients::Each { rows: from, .. }) = a.coefficients;
        for (to, &from) in coefficients.iter_mut().zip(from) {
            *to = from * INFLATE;
        }
        Weigh { coefficients, terms: from.len(), weights, is_full }
    }

    /// Query i of the group sees the tile's keys, which begin with `first`, before `to[i]`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
    unsafe fn weigh(&self, group: &Group, to: &[u32], first: usize) {
        let (below, top) = self.coefficients[..self.terms].split_at(self.terms - 1);
        for i in 0..LANES {
            // SAFETY: forwarded: both have sixteen rows.
            unsafe {
                let row = group.logits.add(i * TILE);
                let mut x = [_mm512_setzero_ps(); TILE / LANES];
                for (n, x) in x.iter_mut().enumerate() {
                    *x = _mm512_loadu_ps(row.add(n * LANES));
                }
                let mut w = [_mm512_set1_ps(top[0]); TILE / LANES];
                for &c in below.iter().rev() {
                    for (w, &x) in w.iter_mut().zip(&x) {
                        *w = _mm512_fmadd_ps(*w, x, _mm512_set1_ps(c));
                    }
                }
                if !self.is_full {
                    for (w, &weight) in w.iter_mut().zip(&self.weights) {
                        *w = _mm512_mul_ps(*w, weight);
                    }
                }
                if let Some(&to) = to.get(i)
                    && (to as usize) < first + TILE
                {
                    hide(&mut w, (to as usize).saturating_sub(first) as u32);
                }
                let to = group.weights.add(i * ROW);
                for step in 0..TILE / STEP {
                    let both = pair::<false>(w[2 * step], w[2 * step + 1]);
                    _mm512_storeu_si512(to.add(step * LANES).cast(), both);
                }
            }
        }
    }
}

/// Takes the weights of all but the first `seen` keys away.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
fn hide(w: &mut [__m512; TILE / LANES], seen: u32) {
    let mask = 1_u64.checked_shl(seen).unwrap_or(0).wrapping_sub(1);
    for (n, w) in w.iter_mut().enumerate() {
        *w = _mm512_maskz_mov_ps((mask >> (n * LANES)) as u16, *w);
    }
}

/// A right factor whose first column adds up a row.
#[repr(align(64))]
struct Ones([u32; REGISTER]);

static ONES: Ones = {
    let mut ones = [0; REGISTER];
    let mut l = 0;
    while l < LANES {
        ones[l * LANES] = 0x3F80_3F80;
        l += 1;
    }
    Ones(ones)
};

/// Sixteen queries and a tile of keys.
struct Group {
    queries: *const i32,
    keys: *const i32,
    depth: usize,
    logits: *mut f32,
    weights: *mut i32,
    values: *const f32,
    columns: usize,
    /// Products that take all keys.
    steps: usize,
    num: *mut f32,
    totals: *mut f32,
}

impl Group {
    /// Logits of the queries.
    #[inline(always)]
    unsafe fn multiply_keys(&self, t: &mut impl Tiles) {
        // SAFETY: forwarded.
        unsafe {
            t.zero::<0>();
            t.zero::<1>();
            t.zero::<2>();
            t.zero::<3>();
            for step in (0..self.depth).step_by(LANES) {
                t.load::<6>(self.queries.add(step).cast(), self.depth);
                let keys = self.keys.add(step * TILE).cast::<f32>();
                t.load::<7>(keys, TILE);
                t.dot::<0, 6, 7>();
                t.load::<7>(keys.add(LANES), TILE);
                t.dot::<1, 6, 7>();
                t.load::<7>(keys.add(2 * LANES), TILE);
                t.dot::<2, 6, 7>();
                t.load::<7>(keys.add(3 * LANES), TILE);
                t.dot::<3, 6, 7>();
            }
            t.store::<0>(self.logits, TILE);
            t.store::<1>(self.logits.add(LANES), TILE);
            t.store::<2>(self.logits.add(2 * LANES), TILE);
            t.store::<3>(self.logits.add(3 * LANES), TILE);
        }
    }

    /// Adds weights times values; the sums of the weights themselves count as one more column.
    #[inline(always)]
    unsafe fn multiply_values(&self, t: &mut impl Tiles) {
        let mut n = 0;
        while n <= self.columns {
            // SAFETY: forwarded.
            n += unsafe {
                match self.columns + 1 - n {
                    1 => self.columns::<1>(t, n),
                    2 => self.columns::<2>(t, n),
                    3 => self.columns::<3>(t, n),
                    4 => self.columns::<4>(t, n),
                    5 => self.columns::<5>(t, n),
                    _ => self.columns::<MOST>(t, n),
                }
            };
        }
    }

    /// Where results of column `n` lie, and how far apart.
    #[inline(always)]
    unsafe fn results(&self, n: usize) -> (*mut f32, usize) {
        if n == self.columns {
            return (self.totals, TOKENS);
        }
        // SAFETY: forwarded.
        unsafe { (self.num.add(n * LANES), self.columns * LANES) }
    }

    #[inline(always)]
    unsafe fn values(&self, step: usize, n: usize) -> *const f32 {
        if n == self.columns {
            return ONES.0.as_ptr().cast();
        }
        // SAFETY: forwarded.
        unsafe { self.values.add((step * self.columns + n) * REGISTER) }
    }

    /// Columns `n .. n + N`. Returns N.
    #[inline(always)]
    unsafe fn columns<const N: usize>(&self, t: &mut impl Tiles, n: usize) -> usize {
        // SAFETY: forwarded.
        unsafe {
            macro_rules! each {
                ($($c:literal),*) => {
                    $(if $c < N {
                        let (results, stride) = self.results(n + $c);
                        t.load::<$c>(results, stride);
                    })*
                    for step in 0..self.steps {
                        t.load::<6>(self.weights.add(step * LANES).cast(), ROW);
                        $(if $c < N {
                            t.load::<7>(self.values(step, n + $c), LANES);
                            t.dot::<$c, 6, 7>();
                        })*
                    }
                    $(if $c < N {
                        let (results, stride) = self.results(n + $c);
                        t.store::<$c>(results, stride);
                    })*
                };
            }
            each!(0, 1, 2, 3, 4, 5);
        }
        N
    }
}
