//! Queries reading sums: packed sums, transposed, times columns of features.
//!
//! The product is `[column of values][query]`, so that features are right factors: pairs of them,
//! lane by lane the same query. Two more rows of the left factor are the sums of the features
//! themselves, as a bf16 number and what rounding took from it: a denominator is common to all
//! elements of an output. Each is a bf16 number and what rounding left, so that the denominator,
//! which all elements of an output share, is no less exact than they are.

use std::arch::x86_64::*;

use super::features::{Take, each_run};
use super::tiles::{Shapes, Tiles};
use super::vectors::{LANES, first, load_block, pair, rounded, store_second, transpose};
use crate::arch::kernels::{PANEL, Scratch, TOKENS, Tokens};
use crate::basis::{Basis, TILE, Tile};

/// Features of one product.
const STEP: usize = 32;
/// Products of a tile of features.
const STEPS: usize = TILE / STEP;
/// Registers for results; one more holds sums and one features.
const MOST: usize = 6;

/// The rows of the left factor, split evenly among registers: time goes by rows.
#[derive(Clone, Copy)]
struct Split {
    groups: usize,
    height: usize,
}

impl Split {
    fn new(padded: usize) -> Self {
        let rows = padded + 2;
        let groups = rows.div_ceil(16);
        Split { groups, height: rows.div_ceil(groups) }
    }

    /// Elements of one register.
    fn register(self) -> usize {
        self.height * LANES
    }
}

/// Elements of one tile's packed sums: `[group][step][height][16 pairs]`.
pub(super) fn packed_len(padded: usize) -> usize {
    let split = Split::new(padded);
    split.groups * STEPS * split.register()
}

/// Prepares a tile's sums for reading: times multiplicity and coefficient, as bf16.
///
/// # Safety
/// The machine has AVX-512.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) unsafe fn pack(
    sums: &[f32],
    z: &[f32],
    multiplicities: &[f32],
    coefficient: f32,
    d_value: usize,
    out: &mut [f32],
    out_z: &mut [f32],
) {
    let padded = d_value.next_multiple_of(LANES);
    let len = multiplicities.len();
    assert!(len <= TILE && sums.len() >= len * d_value && z.len() >= len);
    assert!(out.len() >= packed_len(padded) && out_z.len() >= len);
    let split = Split::new(padded);
    let mut weights = [0.0; TILE];
    for (f, weight) in weights[..len].iter_mut().enumerate() {
        *weight = multiplicities[f] * coefficient;
        out_z[f] = z[f] * *weight;
    }
    let out = out.as_mut_ptr();
    // SAFETY: rows are below padded + 2 and features below TILE, which `out` has room for; only
    // what is inside `sums` is loaded.
    unsafe {
        let row_at = |row: usize, step: usize| {
            let (group, row) = (row / split.height, row % split.height);
            out.add((group * STEPS + step) * split.register() + row * LANES)
        };
        for step in 0..len.div_ceil(STEP) {
            for column in (0..padded).step_by(LANES) {
                let mask = u16::MAX >> (LANES - (d_value - column).min(LANES));
                let scaled = |f: usize| {
                    if f < len {
                        let row = sums.as_ptr().add(f * d_value + column);
                        _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, row), _mm512_set1_ps(weights[f]))
                    } else {
                        _mm512_setzero_ps()
                    }
                };
                let mut pairs = [_mm512_setzero_si512(); 16];
                for (i, pairs) in pairs.iter_mut().enumerate() {
                    let f = step * STEP + 2 * i;
                    *pairs = pair(scaled(f), scaled(f + 1));
                }
                for (i, row) in transpose(pairs).into_iter().enumerate() {
                    _mm512_storeu_si512(row_at(column + i, step).cast(), row);
                }
            }
            let mut own = [0.0_f32; STEP];
            for (i, own) in own.iter_mut().enumerate() {
                let f = step * STEP + i;
                *own = if f < len { out_z[f] } else { 0.0 };
            }
            // Vectors of even and odd places.
            let (a, b) = (_mm512_loadu_ps(own.as_ptr()), _mm512_loadu_ps(own.as_ptr().add(LANES)));
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            let (low, high) =
                (_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
            _mm512_storeu_si512(row_at(padded, step).cast(), pair(low, high));
            let left = |x| _mm512_sub_ps(x, rounded(x));
            _mm512_storeu_si512(row_at(padded + 1, step).cast(), pair(left(low), left(high)));
            for row in padded + 2..split.groups * split.height {
                _mm512_storeu_si512(row_at(row, step).cast(), _mm512_setzero_si512());
            }
        }
    }
}

/// Stores features as pairs, query by query.
struct Pairs {
    /// `[TILE / 2][PANEL]` pairs.
    panel: *mut i32,
}

impl Take for Pairs {
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
    unsafe fn run<const W: usize>(
        &mut self,
        f: usize,
        at: usize,
        prefix: [__m512; W],
        mut column: *const f32,
        ld: usize,
        mut len: usize,
    ) {
        // SAFETY: forwarded; f + len ≤ TILE and at + W·LANES ≤ PANEL.
        unsafe {
            let feature = |column: *const f32, w: usize| {
                _mm512_mul_ps(prefix[w], _mm512_loadu_ps(column.add(w * LANES)))
            };
            let mut to = self.panel.add(f / 2 * PANEL + at);
            if f % 2 == 1 {
                for w in 0..W {
                    store_second(to.add(w * LANES), feature(column, w));
                }
                column = column.add(ld);
                to = to.add(PANEL);
                len -= 1;
            }
            while len >= 2 {
                for w in 0..W {
                    let both = pair(feature(column, w), feature(column.add(ld), w));
                    _mm512_storeu_si512(to.add(w * LANES).cast(), both);
                }
                column = column.add(2 * ld);
                to = to.add(PANEL);
                len -= 2;
            }
            if len == 1 {
                for w in 0..W {
                    _mm512_storeu_si512(to.add(w * LANES).cast(), first(feature(column, w)));
                }
            }
        }
    }
}

/// Results of up to MOST registers of rows for a panel of queries.
#[repr(align(64))]
struct Results([f32; MOST * 16 * PANEL]);

/// What [`read`] reads.
pub(super) struct Reading<'a> {
    pub basis: &'a Basis,
    pub tiles: &'a [Tile],
    /// At most a panel.
    pub tokens: Tokens<'a, f32>,
    /// What [`pack`] left, [`packed_len`] elements per tile.
    pub packed: &'a [f32],
    pub padded: usize,
    pub num: &'a mut [f32],
    pub den: &'a mut [f32],
    pub scratch: &'a mut Scratch<f32>,
}

/// Reads any number of tiles at once: see [`Read`](crate::arch::kernels::Read).
///
/// # Safety
/// The machine has AVX-512 and what `t` needs.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) unsafe fn read(t: &mut impl Tiles, a: &mut Reading<'_>) {
    let (count, padded) = (a.tokens.count, a.padded);
    let each = packed_len(padded);
    assert!(count <= PANEL && count.is_multiple_of(TOKENS) && padded.is_multiple_of(LANES));
    assert!(a.tokens.x.len() >= a.basis.d_key() * a.tokens.ld + count);
    assert!(a.packed.len() >= a.tiles.len() * each);
    assert!(a.num.len() >= count * padded && a.den.len() >= count);
    assert!(a.tiles.iter().all(|tile| a.scratch.stack.len() >= tile.order * PANEL && tile.len <= TILE));
    assert!(a.scratch.panel.len() >= TILE / 2 * PANEL);
    let split = Split::new(padded);
    let panel = a.scratch.panel.as_mut_ptr();
    let height = split.height as u8;
    let mut results = std::mem::MaybeUninit::<Results>::uninit();
    let results = results.as_mut_ptr().cast::<f32>();
    // SAFETY: the lengths were checked just now.
    unsafe {
        t.configure(&Shapes::new([height, height, height, height, height, height, height, 16]));
        // Values wider than the registers take more than one pass.
        for block in (0..split.groups).step_by(MOST) {
            let groups = MOST.min(split.groups - block);
            results.write_bytes(0, groups * split.height * PANEL);
            for (i, tile) in a.tiles.iter().enumerate() {
                each_run(
                    a.basis,
                    tile,
                    a.tokens,
                    a.scratch.stack.as_mut_ptr(),
                    &mut Pairs { panel: panel.cast() },
                );
                let steps = tile.len.div_ceil(STEP);
                for pair in tile.len.div_ceil(2)..steps * STEP / 2 {
                    panel.add(pair * PANEL).write_bytes(0, PANEL);
                }
                let product = Product {
                    sums: a.packed.as_ptr().add(i * each + block * STEPS * split.register()),
                    features: panel,
                    steps,
                    height: split.height,
                    results,
                };
                for at in (0..count).step_by(LANES) {
                    match groups {
                        1 => product.add::<1>(t, at),
                        2 => product.add::<2>(t, at),
                        3 => product.add::<3>(t, at),
                        4 => product.add::<4>(t, at),
                        5 => product.add::<5>(t, at),
                        _ => product.add::<MOST>(t, at),
                    }
                }
            }
            let first_row = block * split.height;
            let rows = first_row..first_row + groups * split.height;
            hand_over(results, rows, count, padded, a.num.as_mut_ptr(), a.den.as_mut_ptr());
        }
        t.release();
    }
}

/// One tile's sums times its features.
struct Product {
    sums: *const f32,
    features: *const f32,
    steps: usize,
    height: usize,
    results: *mut f32,
}

impl Product {
    /// N registers of rows for the sixteen queries at `at`.
    #[inline(always)]
    unsafe fn add<const N: usize>(&self, t: &mut impl Tiles, at: usize) {
        let register = self.height * LANES;
        // SAFETY: forwarded.
        unsafe {
            let results = self.results.add(at);
            macro_rules! each {
                ($($c:literal),*) => {
                    $(if $c < N { t.load::<$c>(results.add($c * self.height * PANEL), PANEL); })*
                    for step in 0..self.steps {
                        t.load::<7>(self.features.add(step * LANES * PANEL + at), PANEL);
                        $(if $c < N {
                            t.load::<6>(self.sums.add(($c * STEPS + step) * register), LANES);
                            t.dot::<$c, 6, 7>();
                        })*
                    }
                    $(if $c < N { t.store::<$c>(results.add($c * self.height * PANEL), PANEL); })*
                };
            }
            each!(0, 1, 2, 3, 4, 5);
        }
    }
}

/// Adds result rows `rows`, `[row][PANEL]`, to numerators and denominators.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
unsafe fn hand_over(
    results: *const f32,
    rows: std::ops::Range<usize>,
    count: usize,
    padded: usize,
    num: *mut f32,
    den: *mut f32,
) {
    // SAFETY: forwarded.
    unsafe {
        let row = |row: usize, t: usize| results.add((row - rows.start) * PANEL + t);
        for t in (0..count).step_by(LANES) {
            for at in padded..padded + 2 {
                if rows.contains(&at) {
                    let total = _mm512_add_ps(_mm512_loadu_ps(den.add(t)), _mm512_loadu_ps(row(at, t)));
                    _mm512_storeu_ps(den.add(t), total);
                }
            }
            // Blocks of sixteen rows, the last of which may reach back into the one before.
            let end = rows.end.min(padded);
            let mut at = rows.start;
            while at < end {
                let width = LANES.min(end - at);
                let mut block = [_mm512_setzero_si512(); 16];
                for (i, block) in block[..width].iter_mut().enumerate() {
                    *block = _mm512_loadu_si512(row(at + i, t).cast());
                }
                if width == LANES {
                    block = load_block(row(at, t), PANEL);
                }
                let mask = u16::MAX >> (LANES - width);
                for (i, values) in transpose(block).into_iter().enumerate() {
                    let to = num.add((t + i) * padded + at);
                    let total =
                        _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), _mm512_castsi512_ps(values));
                    _mm512_mask_storeu_ps(to, mask, total);
                }
                at += width;
            }
        }
    }
}
