//! Queries reading sums: packed sums, transposed, times columns of features.
//!
//! The product is `[column of values][query]`, so that features are right factors: pairs of them,
//! lane by lane the same query. Two more rows of the left factor are the sums of the features
//! themselves, as a bf16 number and what rounding took from it: all elements of an output share
//! its denominator.

use std::arch::x86_64::*;

use super::features::{Take, each_run};
use super::tiles::{Shapes, Tiles};
use super::vectors::{LANES, first, load_block, pair, rounded, store_second, transpose};
use crate::arch::kernels::{PANEL, Read, TOKENS};
use crate::basis::TILE;

/// Features of one product.
const STEP: usize = 32;
/// Products of a tile of features.
const STEPS: usize = TILE / STEP;
/// Groups of rows whose results have room in registers, for two vectors of queries; one more
/// register holds sums and one features.
const MOST: usize = 3;

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

/// Elements of one tile's packed sums: `[step][group][height][16 pairs]`.
pub(super) fn packed_len(padded: usize) -> usize {
    let split = Split::new(padded);
    split.groups * STEPS * split.register()
}

/// Whether the features of a tile fill one product alone. Then the other takes what rounding took
/// from the sums: these are the tiles of the lowest orders, whose few sums weigh most.
fn is_half(tile_len: usize) -> bool {
    tile_len <= STEP
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
            out.add((step * split.groups + group) * split.register() + row * LANES)
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
                    *pairs = pair::<true>(scaled(f), scaled(f + 1));
                }
                for (i, row) in transpose(pairs).into_iter().enumerate() {
                    _mm512_storeu_si512(row_at(column + i, step).cast(), row);
                }
                if is_half(len) {
                    for (i, pairs) in pairs.iter_mut().enumerate() {
                        *pairs =
                            pair::<true>(remainder(scaled(2 * i)), remainder(scaled(2 * i + 1)));
                    }
                    for (i, row) in transpose(pairs).into_iter().enumerate() {
                        _mm512_storeu_si512(row_at(column + i, 1).cast(), row);
                    }
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
            _mm512_storeu_si512(row_at(padded, step).cast(), pair::<true>(low, high));
            let left = pair::<true>(remainder(low), remainder(high));
            _mm512_storeu_si512(row_at(padded + 1, step).cast(), left);
            for row in padded + 2..split.groups * split.height {
                _mm512_storeu_si512(row_at(row, step).cast(), _mm512_setzero_si512());
            }
            if is_half(len) {
                for row in padded..split.groups * split.height {
                    _mm512_storeu_si512(row_at(row, 1).cast(), _mm512_setzero_si512());
                }
            }
        }
    }
}

/// What rounding takes from x.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
fn remainder(x: __m512) -> __m512 {
    _mm512_sub_ps(x, rounded(x))
}

/// Queries of a block.
const BLOCK: usize = 32;

/// Stores features as pairs, query by query.
struct Pairs {
    /// `[TILE / 2][BLOCK]` pairs.
    panel: *mut i32,
}

impl Take for Pairs {
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
    unsafe fn run<const W: usize, const ROUND: bool>(
        &mut self,
        f: usize,
        at: usize,
        prefix: [__m512; W],
        mut column: *const f32,
        ld: usize,
        mut len: usize,
    ) {
        // SAFETY: forwarded; f + len ≤ TILE and at + W·LANES ≤ BLOCK.
        unsafe {
            let feature = |column: *const f32, w: usize| {
                _mm512_mul_ps(prefix[w], _mm512_loadu_ps(column.add(w * LANES)))
            };
            let mut to = self.panel.add(f / 2 * BLOCK + at);
            if f % 2 == 1 {
                for w in 0..W {
                    store_second::<ROUND>(to.add(w * LANES), feature(column, w));
                }
                column = column.add(ld);
                to = to.add(BLOCK);
                len -= 1;
            }
            while len >= 2 {
                for w in 0..W {
                    let both = pair::<ROUND>(feature(column, w), feature(column.add(ld), w));
                    _mm512_storeu_si512(to.add(w * LANES).cast(), both);
                }
                column = column.add(2 * ld);
                to = to.add(BLOCK);
                len -= 2;
            }
            if len == 1 {
                for w in 0..W {
                    let one = first::<ROUND>(feature(column, w));
                    _mm512_storeu_si512(to.add(w * LANES).cast(), one);
                }
            }
        }
    }
}

/// Rows of results that there is room for on the stack.
const ROWS: usize = 18 * 16;

/// Whether [`read`] has room for values of this width.
pub(super) fn fits(padded: usize) -> bool {
    let split = Split::new(padded);
    split.groups * split.height <= ROWS
}

/// Results of a block of queries.
#[repr(align(64))]
struct Results {
    _room: [[f32; BLOCK]; ROWS],
}

/// See [`Read`].
///
/// Features are made while the tile unit multiplies those made before. Results stay in tile
/// registers over all tiles where they have room, else they are loaded and stored every few tiles.
///
/// # Safety
/// The machine has AVX-512 and what `t` needs.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) unsafe fn read(t: &mut impl Tiles, a: &mut Read<'_, f32>) {
    let (count, padded) = (a.tokens.count, a.padded);
    let each = packed_len(padded);
    assert!(count.is_multiple_of(TOKENS) && padded.is_multiple_of(LANES) && fits(padded));
    assert!(a.tokens.x.len() >= a.basis.d_key() * a.tokens.ld + count);
    assert!(a.packed.sums.len() >= a.tiles.len() * each);
    assert!(a.num.len() >= count * padded && a.den.len() >= count);
    let stack_len = a.scratch.stack.len();
    assert!(a.tiles.iter().all(|tile| stack_len >= tile.order * PANEL && tile.len <= TILE));
    assert!(a.scratch.panel.len() >= 2 * FEW * TILE / 2 * BLOCK);
    let split = Split::new(padded);
    let height = split.height as u8;
    let panels = a.scratch.panel.as_mut_ptr();
    let stack = a.scratch.stack.as_mut_ptr();
    let mut results = std::mem::MaybeUninit::<Results>::uninit();
    let results = results.as_mut_ptr().cast::<f32>();
    let stays = split.groups <= MOST;
    let few = if stays { 1 } else { FEW };
    // SAFETY: the lengths were checked just now.
    unsafe {
        t.configure(&Shapes::new([height, height, height, height, height, height, height, 16]));
        for at in (0..count).step_by(BLOCK) {
            let mut tokens = a.tokens;
            tokens.x = &tokens.x[at..];
            tokens.count = BLOCK.min(count - at);
            results.write_bytes(0, split.groups * split.height * BLOCK);
            let mut product = Product {
                steps: [(panels.cast_const(), panels.cast_const()); FEW * STEPS],
                count: 0,
                split,
                results,
                is_wide: tokens.count > LANES,
            };
            if stays {
                product.results(t, 0, true);
            }
            let mut packed = a.packed.sums.as_ptr();
            for (i, tiles) in a.tiles.chunks(few).enumerate() {
                // The tile unit is some tiles behind, in the other half of the room.
                let mut to = panels.add(i % 2 * FEW * TILE / 2 * BLOCK);
                let mut next = [(to.cast_const(), packed); FEW * STEPS];
                let mut steps = 0;
                for tile in tiles {
                    let mut take = Pairs { panel: to.cast() };
                    each_run(a.basis, tile, 0..tile.len, tokens, stack, &mut take);
                    let half = is_half(tile.len);
                    let used = if half { STEP } else { TILE } / 2;
                    for pair in tile.len.div_ceil(2)..used {
                        to.add(pair * BLOCK).write_bytes(0, BLOCK);
                    }
                    let second = to.add(if half { 0 } else { STEP / 2 * BLOCK });
                    next[steps] = (to, packed);
                    next[steps + 1] = (second, packed.add(split.groups * split.register()));
                    steps += STEPS;
                    to = to.add(used * BLOCK);
                    packed = packed.add(each);
                }
                product.add(t, stays);
                (product.steps, product.count) = (next, steps);
            }
            product.add(t, stays);
            if stays {
                product.results(t, 0, false);
            }
            let (num, den) = (a.num.as_mut_ptr().add(at * padded), a.den.as_mut_ptr().add(at));
            hand_over(results, tokens.count, padded, num, den);
        }
        t.release();
    }
}

/// Tiles whose features are made at a time where results do not stay in registers.
const FEW: usize = 2;

/// Sums times features.
struct Product {
    /// Features and sums of each step.
    steps: [(*const f32, *const f32); FEW * STEPS],
    count: usize,
    split: Split,
    results: *mut f32,
    /// Whether there are more than sixteen queries.
    is_wide: bool,
}

impl Product {
    /// All groups of rows.
    #[inline(always)]
    unsafe fn add(&self, t: &mut impl Tiles, stays: bool) {
        // SAFETY: forwarded.
        unsafe {
            if stays {
                self.groups(t, 0);
                return;
            }
            for group in (0..self.split.groups).step_by(MOST) {
                self.results(t, group, true);
                self.groups(t, group);
                self.results(t, group, false);
            }
        }
    }

    #[inline(always)]
    unsafe fn groups(&self, t: &mut impl Tiles, group: usize) {
        // SAFETY: forwarded.
        unsafe {
            match (self.split.groups - group, self.is_wide) {
                (1, false) => self.dot::<1, false>(t, group),
                (1, true) => self.dot::<1, true>(t, group),
                (2, false) => self.dot::<2, false>(t, group),
                (2, true) => self.dot::<2, true>(t, group),
                (_, false) => self.dot::<3, false>(t, group),
                (_, true) => self.dot::<3, true>(t, group),
            }
        }
    }

    #[inline(always)]
    unsafe fn dot<const N: usize, const WIDE: bool>(&self, t: &mut impl Tiles, group: usize) {
        let register = self.split.register();
        // SAFETY: forwarded.
        unsafe {
            for &(features, sums) in &self.steps[..self.count] {
                let sums = sums.add(group * register);
                macro_rules! each {
                    ($([$g:literal $c:literal])*) => {
                        $(if $g < N {
                            t.load::<6>(sums.add($g * register), LANES);
                            t.dot::<$c, 6, 7>();
                        })*
                    };
                }
                t.load::<7>(features, BLOCK);
                each!([0 0] [1 1] [2 2]);
                if WIDE {
                    t.load::<7>(features.add(LANES), BLOCK);
                    each!([0 3] [1 4] [2 5]);
                }
            }
        }
    }

    /// Loads or stores up to three groups of rows.
    #[inline(always)]
    unsafe fn results(&self, t: &mut impl Tiles, group: usize, load: bool) {
        // SAFETY: forwarded.
        unsafe {
            macro_rules! each {
                ($at:expr, $([$g:literal $c:literal])*) => {
                    $(if group + $g < self.split.groups {
                        let rows = self.results.add((group + $g) * self.split.height * BLOCK + $at);
                        if load {
                            t.load::<$c>(rows, BLOCK);
                        } else {
                            t.store::<$c>(rows, BLOCK);
                        }
                    })*
                };
            }
            each!(0, [0 0] [1 1] [2 2]);
            if self.is_wide {
                each!(LANES, [0 3] [1 4] [2 5]);
            }
        }
    }
}

/// Adds results to numerators and denominators.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
unsafe fn hand_over(
    results: *const f32,
    count: usize,
    padded: usize,
    num: *mut f32,
    den: *mut f32,
) {
    // SAFETY: forwarded.
    unsafe {
        for t in (0..count).step_by(LANES) {
            let row = |row: usize| results.add(row * BLOCK + t);
            let mut total = _mm512_loadu_ps(den.add(t));
            for own in [padded, padded + 1] {
                total = _mm512_add_ps(total, _mm512_loadu_ps(row(own)));
            }
            _mm512_storeu_ps(den.add(t), total);
            for at in (0..padded).step_by(LANES) {
                let block = transpose(load_block(row(at), BLOCK));
                for (i, values) in block.into_iter().enumerate() {
                    let to = num.add((t + i) * padded + at);
                    let total = _mm512_add_ps(_mm512_loadu_ps(to), _mm512_castsi512_ps(values));
                    _mm512_storeu_ps(to, total);
                }
            }
        }
    }
}
