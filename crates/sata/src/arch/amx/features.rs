//! Making features: as everywhere one f32 multiplication each, then made bf16 once.

use std::arch::x86_64::*;
use std::ops::Range;

use super::vectors::{INFLATE, LANES};
use crate::arch::kernels::{PANEL, Tokens};
use crate::basis::{Basis, Tile};

/// Takes the features of a run, `prefix · x_i` for `len` rows x_i at `column`, `ld` apart.
///
/// Features of orders 0 and 1, some of which are bf16 as they are, come to be rounded. The others
/// come a little too large, so that to cut them off is right on average: that costs nothing, since
/// it is their prefix that is made larger.
pub(super) trait Take {
    /// Features `f .. f + len` of those asked for, for the W vectors of tokens at `at`.
    ///
    /// # Safety
    /// The machine has AVX-512, and the rows are there.
    unsafe fn run<const W: usize, const ROUND: bool>(
        &mut self,
        f: usize,
        at: usize,
        prefix: [__m512; W],
        column: *const f32,
        ld: usize,
        len: usize,
    );
}

/// Makes features `which` of `tile` for every token and hands them over, run by run.
///
/// # Safety
/// `tokens` holds `d_key + 1` rows of `count` tokens, at most PANEL; `stack` holds `order` rows of
/// PANEL.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) unsafe fn each_run(
    basis: &Basis,
    tile: &Tile,
    which: Range<usize>,
    tokens: Tokens<'_, f32>,
    stack: *mut f32,
    take: &mut impl Take,
) {
    let mut vectors = tokens.count / LANES;
    let mut at = 0;
    let round = tile.order < 2;
    // SAFETY: forwarded; groups of vectors lie within `count`.
    unsafe {
        while vectors > 0 {
            let width = match (vectors, round) {
                (4.., false) => group::<4, false>(basis, tile, &which, tokens, at, stack, take),
                (4.., true) => group::<4, true>(basis, tile, &which, tokens, at, stack, take),
                (2 | 3, false) => group::<2, false>(basis, tile, &which, tokens, at, stack, take),
                (2 | 3, true) => group::<2, true>(basis, tile, &which, tokens, at, stack, take),
                (_, false) => group::<1, false>(basis, tile, &which, tokens, at, stack, take),
                (_, true) => group::<1, true>(basis, tile, &which, tokens, at, stack, take),
            };
            vectors -= width;
            at += width * LANES;
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
unsafe fn load<const W: usize>(from: *const f32) -> [__m512; W] {
    let mut out = [_mm512_setzero_ps(); W];
    for (w, out) in out.iter_mut().enumerate() {
        // SAFETY: forwarded.
        *out = unsafe { _mm512_loadu_ps(from.add(w * LANES)) };
    }
    out
}

/// W vectors of tokens. Returns W.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
unsafe fn group<const W: usize, const ROUND: bool>(
    basis: &Basis,
    tile: &Tile,
    which: &Range<usize>,
    tokens: Tokens<'_, f32>,
    at: usize,
    stack: *mut f32,
    take: &mut impl Take,
) -> usize {
    static ONES: [f32; PANEL] = [1.0; PANEL];
    // SAFETY: forwarded: indices are below d_key, whose row `d_key` holds the weights.
    unsafe {
        let x = tokens.x.as_ptr().add(at);
        let ld = tokens.ld;
        let mut root = load::<W>(x.add(basis.d_key() * ld));
        let width = match tile.order {
            0 => {
                take.run::<W, ROUND>(0, at, root, ONES.as_ptr(), 0, 1);
                return W;
            }
            p => p - 1,
        };
        if !ROUND {
            for root in &mut root {
                *root = _mm512_mul_ps(*root, _mm512_set1_ps(INFLATE));
            }
        }
        let stack = stack.add(at);
        let mut indices = basis.prefixes().as_ptr().add(tile.prefixes);
        let mut f = 0;
        let mut is_first = true;
        for run in basis.runs().get_unchecked(tile.runs.clone()) {
            let (start, end) = (f.max(which.start), (f + run.len as usize).min(which.end));
            if start >= which.end {
                break;
            }
            if start < end {
                // Level l of the stack is the weight times the first l + 1 indices.
                let keep = if is_first { 0 } else { run.keep as usize };
                is_first = false;
                let mut prefix =
                    if keep == 0 { root } else { load::<W>(stack.add((keep - 1) * PANEL)) };
                for level in keep..width {
                    let row = load::<W>(x.add(*indices.add(level) as usize * ld));
                    for w in 0..W {
                        prefix[w] = _mm512_mul_ps(prefix[w], row[w]);
                        _mm512_storeu_ps(stack.add(level * PANEL + w * LANES), prefix[w]);
                    }
                }
                let column = x.add((run.first as usize + start - f) * ld);
                take.run::<W, ROUND>(start - which.start, at, prefix, column, ld, end - start);
            }
            f += run.len as usize;
            indices = indices.add(width);
        }
    }
    W
}
