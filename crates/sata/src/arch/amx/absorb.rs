//! Keys and values added to sums: rows of features, 32 tokens each, times values.
//!
//! The k-th pair of a row holds tokens k and k + 16 of 32: a lane of one vector and the same lane
//! of the next. Values are paired likewise, once per panel. Sums of the features themselves stay
//! on the vector units.
//!
//! Sums of a few features stay in tile registers over many tokens. Where they are parts of a tile,
//! features of one panel are made while the tile unit multiplies those of the panel before.

use std::arch::x86_64::*;

use super::features::{Take, each_run};
use super::tiles::{Shapes, Tiles};
use super::vectors::{INFLATE, LANES, first, pair};
use crate::arch::kernels::{Absorb, PANEL, TOKENS};
use crate::basis::TILE;

/// Tokens of one product.
pub(super) const STEP: usize = 32;
/// Pairs in a row of features.
const ROW: usize = PANEL / 2;
/// Elements of a tile register.
pub(super) const REGISTER: usize = 256;
/// Registers for sums; one more holds features and one values.
const MOST: usize = 6;
/// Tokens whose values stay near while one part of a tile after another takes them.
const SPAN: usize = 2 * PANEL;

pub(super) const SHAPES: Shapes = Shapes::new([16; 8]);

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
                    let values = pair::<true>(row(t, n), row(t + LANES, n));
                    _mm512_storeu_si512(out.add(l * LANES).cast(), values);
                }
            }
        }
    }
}

/// Stores features as rows of pairs and, where asked, adds them up lane by lane.
struct Rows {
    /// `[feature][ROW]` pairs.
    panel: *mut i32,
    /// `[feature][TOKENS]`.
    z: Option<*mut f32>,
}

impl Take for Rows {
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
    unsafe fn run<const W: usize, const ROUND: bool>(
        &mut self,
        f: usize,
        at: usize,
        prefix: [__m512; W],
        mut column: *const f32,
        ld: usize,
        len: usize,
    ) {
        // SAFETY: forwarded; f + len is at most what there is room for, at + W·LANES ≤ PANEL.
        unsafe {
            let mut to = self.panel.add(f * ROW + at / 2);
            let mut z = self.z.map(|z| z.add(f * TOKENS));
            for _ in 0..len {
                let mut row = prefix;
                for (w, row) in row.iter_mut().enumerate() {
                    *row = _mm512_mul_ps(*row, _mm512_loadu_ps(column.add(w * LANES)));
                }
                for w in 0..W / 2 {
                    let both = pair::<ROUND>(row[2 * w], row[2 * w + 1]);
                    _mm512_storeu_si512(to.add(w * LANES).cast(), both);
                }
                if W % 2 == 1 {
                    let one = first::<ROUND>(row[W - 1]);
                    _mm512_storeu_si512(to.add(W / 2 * LANES).cast(), one);
                }
                if let Some(z) = &mut z {
                    let mut width = W;
                    while width > 1 {
                        width /= 2;
                        for w in 0..width {
                            row[w] = _mm512_add_ps(row[w], row[w + width]);
                        }
                    }
                    let factor = _mm512_set1_ps(if ROUND { 1.0 } else { 1.0 / INFLATE });
                    let total = _mm512_fmadd_ps(row[0], factor, _mm512_loadu_ps(*z));
                    _mm512_storeu_ps(*z, total);
                    *z = z.add(TOKENS);
                }
                column = column.add(ld);
                to = to.add(ROW);
            }
        }
    }
}

/// See [`Absorb`]; any number of tokens.
///
/// # Safety
/// The machine has AVX-512 and what `t` needs.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) unsafe fn absorb(t: &mut impl Tiles, a: &mut Absorb<'_, f32>) {
    assert!(a.by.is_empty(), "tiles weigh all tokens alike");
    let count = a.tokens.count;
    let rows = a.tile.len.next_multiple_of(16);
    let padded = a.padded;
    let each = prepared_len(padded);
    assert!(count.is_multiple_of(TOKENS) && rows <= TILE && padded.is_multiple_of(LANES));
    assert!(a.tokens.x.len() >= a.basis.d_key() * a.tokens.ld + count);
    assert!(a.values.prepared.len() >= count.div_ceil(PANEL) * each);
    assert!(a.sums.len() >= rows * padded && a.z.len() >= rows * TOKENS);
    assert!(a.scratch.stack.len() >= a.tile.order * PANEL);
    assert!(a.scratch.panel.len() >= 2 * TILE * ROW);
    let panels = a.scratch.panel.as_mut_ptr();
    let stack = a.scratch.stack.as_mut_ptr();
    let columns = padded / LANES;
    // Rows of sixteen features whose sums, with these columns, have room in registers.
    let height = match columns {
        1 => 4,
        2 | 3 => 2,
        _ => 1,
    };
    let is_whole = 16 * height >= rows;
    let width = if is_whole { count.max(1) } else { SPAN };
    // SAFETY: the lengths were checked just now.
    unsafe {
        t.configure(&SHAPES);
        for span in (0..count).step_by(width) {
            let span = span..count.min(span + width);
            for column in (0..columns).step_by(MOST) {
                for row in (0..rows).step_by(16 * height) {
                    let mut block = Block {
                        left: panels,
                        values: a.values.prepared.as_ptr(),
                        columns,
                        column,
                        sums: a.sums.as_mut_ptr().add(row * padded + column * LANES),
                        steps: 0,
                    };
                    let shape = (((rows - row) / 16).min(height), MOST.min(columns - column));
                    block.begin(t, shape);
                    let which = row..a.tile.len.min(row + 16 * height);
                    for at in span.clone().step_by(PANEL) {
                        let mut tokens = a.tokens;
                        tokens.x = &tokens.x[at..];
                        tokens.count = PANEL.min(span.end - at);
                        // Where the tile unit is a panel behind, that is in the other half.
                        let to = panels.add(at / PANEL % 2 * TILE * ROW);
                        let features = which.len();
                        let missing = shape.0 * 16 - features;
                        to.add(features * ROW).write_bytes(0, missing * ROW);
                        let z = (column == 0).then(|| a.z.as_mut_ptr().add(row * TOKENS));
                        let mut take = Rows { panel: to.cast(), z };
                        each_run(a.basis, a.tile, which.clone(), tokens, stack, &mut take);
                        if !is_whole {
                            block.multiply(t, shape);
                        }
                        block.left = to;
                        block.values = a.values.prepared.as_ptr().add(at / PANEL * each);
                        block.steps = tokens.count.div_ceil(STEP);
                        if is_whole {
                            block.multiply(t, shape);
                        }
                    }
                    if !is_whole {
                        block.multiply(t, shape);
                    }
                    block.end(t, shape);
                }
            }
        }
        t.release();
    }
}

/// Features of a panel times values, with sums in tile registers.
struct Block {
    left: *const f32,
    /// Of the panel.
    values: *const f32,
    /// Columns of values, and the first that counts.
    columns: usize,
    column: usize,
    sums: *mut f32,
    steps: usize,
}

/// What is done in registers for each of some (row of sixteen, column, register).
macro_rules! registers {
    ($shape:expr, $do:ident) => {
        match $shape {
            (4, 1) => {
                $do!(4, 1, (0, [0 0] [1 1] [2 2] [3 3]));
            }
            (3, 1) => {
                $do!(3, 1, (0, [0 0] [1 1] [2 2]));
            }
            (2, n) => {
                $do!(2, n, (0, [0 0] [1 3]) (1, [0 1] [1 4]) (2, [0 2] [1 5]));
            }
            (_, n) => {
                $do!(1, n, (0, [0 0]) (1, [0 1]) (2, [0 2]) (3, [0 3]) (4, [0 4]) (5, [0 5]));
            }
        }
    };
}

impl Block {
    #[inline(always)]
    unsafe fn begin(&self, t: &mut impl Tiles, shape: (usize, usize)) {
        let padded = self.columns * LANES;
        macro_rules! load {
            ($k:expr, $n:expr, $(($column:literal, $([$row:literal $c:literal])*))*) => {
                $(if $column < $n {
                    $(t.load::<$c>(self.sums.add($row * 16 * padded + $column * LANES), padded);)*
                })*
            };
        }
        // SAFETY: forwarded.
        unsafe { registers!(shape, load) }
    }

    #[inline(always)]
    unsafe fn end(&self, t: &mut impl Tiles, shape: (usize, usize)) {
        let padded = self.columns * LANES;
        macro_rules! store {
            ($k:expr, $n:expr, $(($column:literal, $([$row:literal $c:literal])*))*) => {
                $(if $column < $n {
                    $(t.store::<$c>(self.sums.add($row * 16 * padded + $column * LANES), padded);)*
                })*
            };
        }
        // SAFETY: forwarded.
        unsafe { registers!(shape, store) }
    }

    #[inline(always)]
    unsafe fn multiply(&self, t: &mut impl Tiles, shape: (usize, usize)) {
        macro_rules! dot {
            ($k:expr, $n:expr, $(($column:literal, $([$row:literal $c:literal])*))*) => {
                for step in 0..self.steps {
                    let left = self.left.add(step * LANES);
                    let values = self.values.add((step * self.columns + self.column) * REGISTER);
                    if $k == 1 {
                        t.load::<6>(left, ROW);
                    }
                    $(if $column < $n {
                        t.load::<7>(values.add($column * REGISTER), LANES);
                        $(
                            if $k > 1 {
                                t.load::<6>(left.add($row * 16 * ROW), ROW);
                            }
                            t.dot::<$c, 6, 7>();
                        )*
                    })*
                }
            };
        }
        // SAFETY: forwarded.
        unsafe { registers!(shape, dot) }
    }
}
