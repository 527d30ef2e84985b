//! Keys and values added to sums: rows of features, 32 tokens each, times values.
//!
//! The k-th pair of a row holds tokens k and k + 16 of 32: a lane of one vector and the same lane
//! of the next. Values are paired likewise, once per panel.

use std::arch::x86_64::*;

use super::features::{Take, each_run};
use super::tiles::{Shapes, Tiles};
use super::vectors::{LANES, first, pair};
use crate::arch::kernels::{Absorb, PANEL, TOKENS};
use crate::basis::TILE;

/// Tokens of one product.
const STEP: usize = 32;
/// Pairs in a row of the panel.
const ROW: usize = PANEL / 2;
/// Elements of a tile register.
const REGISTER: usize = 256;
/// Registers for sums; one more holds features and one values.
const MOST: usize = 6;

const SHAPES: Shapes = Shapes::new([16; 8]);

/// Elements of one panel's prepared values.
pub(super) fn prepared_len(padded: usize) -> usize {
    PANEL / STEP * (padded / LANES) * REGISTER
}

/// Values of a panel as right factors: `[step][16 columns][16 pairs]`.
///
/// # Safety
/// The machine has AVX-512.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) unsafe fn prepare(rows: &[f32], tokens: usize, padded: usize, out: &mut [f32]) {
    assert!(tokens <= PANEL && padded.is_multiple_of(LANES));
    assert!(rows.len() >= tokens * padded && out.len() >= prepared_len(padded));
    let columns = padded / LANES;
    // SAFETY: tokens and columns lie within the lengths checked just now.
    unsafe {
        let row = |t: usize, n: usize| {
            if t < tokens {
                _mm512_loadu_ps(rows.as_ptr().add(t * padded + n * LANES))
            } else {
                _mm512_setzero_ps()
            }
        };
        for step in 0..tokens.div_ceil(STEP) {
            for n in 0..columns {
                let out = out.as_mut_ptr().add((step * columns + n) * REGISTER);
                for l in 0..LANES {
                    let t = step * STEP + l;
                    let values = pair(row(t, n), row(t + LANES, n));
                    _mm512_storeu_si512(out.add(l * LANES).cast(), values);
                }
            }
        }
    }
}

/// Stores features as rows of pairs.
struct Rows {
    /// `[TILE][ROW]` pairs.
    panel: *mut i32,
}

impl Take for Rows {
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
    unsafe fn run<const W: usize>(
        &mut self,
        f: usize,
        at: usize,
        prefix: [__m512; W],
        mut column: *const f32,
        ld: usize,
        len: usize,
    ) {
        // SAFETY: forwarded; f + len ≤ TILE and at + W·LANES ≤ PANEL.
        unsafe {
            let mut to = self.panel.add(f * ROW + at / 2);
            for _ in 0..len {
                let feature = |w: usize| {
                    _mm512_mul_ps(prefix[w], _mm512_loadu_ps(column.add(w * LANES)))
                };
                for w in 0..W / 2 {
                    let both = pair(feature(2 * w), feature(2 * w + 1));
                    _mm512_storeu_si512(to.add(w * LANES).cast(), both);
                }
                if W % 2 == 1 {
                    _mm512_storeu_si512(to.add(W / 2 * LANES).cast(), first(feature(W - 1)));
                }
                column = column.add(ld);
                to = to.add(ROW);
            }
        }
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

/// See [`Absorb`]; any number of panels.
///
/// # Safety
/// The machine has AVX-512 and what `t` needs.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) unsafe fn absorb(t: &mut impl Tiles, a: &mut Absorb<'_, f32>) {
    let count = a.tokens.count;
    let rows = a.tile.len.next_multiple_of(16);
    let padded = a.padded;
    assert!(count.is_multiple_of(TOKENS) && rows <= TILE && padded.is_multiple_of(LANES));
    assert!(a.tokens.x.len() >= a.basis.d_key() * a.tokens.ld + count);
    assert!(a.values.prepared.len() >= count.div_ceil(PANEL) * prepared_len(padded));
    assert!(a.sums.len() >= rows * padded && a.z.len() >= rows * TOKENS);
    assert!(a.scratch.stack.len() >= a.tile.order * PANEL);
    assert!(a.scratch.panel.len() >= TILE * ROW);
    let panel = a.scratch.panel.as_mut_ptr();
    a.scratch.panel[a.tile.len * ROW..rows * ROW].fill(0.0);
    let columns = padded / LANES;
    // SAFETY: the lengths were checked just now.
    unsafe {
        t.configure(&SHAPES);
        let mut at = 0;
        while at < count {
            let mut tokens = a.tokens;
            tokens.x = &tokens.x[at..];
            tokens.count = PANEL.min(count - at);
            each_run(
                a.basis,
                a.tile,
                tokens,
                a.scratch.stack.as_mut_ptr(),
                &mut Rows { panel: panel.cast() },
            );
            let values = a.values.prepared.as_ptr().add(at / PANEL * prepared_len(padded));
            let steps = tokens.count.div_ceil(STEP);
            for row in (0..rows).step_by(16) {
                let product = Product {
                    features: panel.add(row * ROW),
                    values,
                    columns,
                    steps,
                    sums: a.sums.as_mut_ptr().add(row * padded),
                    z: a.z.as_mut_ptr().add(row * TOKENS),
                };
                let mut n = 0;
                // The sums of the features themselves count as one more column.
                while n <= columns {
                    n += match columns + 1 - n {
                        1 => product.add::<1>(t, n),
                        2 => product.add::<2>(t, n),
                        3 => product.add::<3>(t, n),
                        4 => product.add::<4>(t, n),
                        5 => product.add::<5>(t, n),
                        _ => product.add::<MOST>(t, n),
                    };
                }
            }
            at += PANEL;
        }
        t.release();
    }
}

/// Sixteen features of a panel times its values.
struct Product {
    features: *const f32,
    values: *const f32,
    columns: usize,
    steps: usize,
    sums: *mut f32,
    z: *mut f32,
}

impl Product {
    /// Where sums of column `n` lie, and how far apart.
    #[inline(always)]
    unsafe fn sums(&self, n: usize) -> (*mut f32, usize) {
        if n == self.columns {
            return (self.z, TOKENS);
        }
        // SAFETY: forwarded.
        unsafe { (self.sums.add(n * LANES), self.columns * LANES) }
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
    unsafe fn add<const N: usize>(&self, t: &mut impl Tiles, n: usize) -> usize {
        // SAFETY: forwarded.
        unsafe {
            macro_rules! each {
                ($($c:literal),*) => {
                    $(if $c < N {
                        let (sums, stride) = self.sums(n + $c);
                        t.load::<$c>(sums, stride);
                    })*
                    for step in 0..self.steps {
                        t.load::<6>(self.features.add(step * LANES), ROW);
                        $(if $c < N {
                            t.load::<7>(self.values(step, n + $c), LANES);
                            t.dot::<$c, 6, 7>();
                        })*
                    }
                    $(if $c < N {
                        let (sums, stride) = self.sums(n + $c);
                        t.store::<$c>(sums, stride);
                    })*
                };
            }
            each!(0, 1, 2, 3, 4, 5);
        }
        N
    }
}
