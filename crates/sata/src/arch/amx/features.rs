//! Making features: as everywhere one f32 multiplication each, then rounded once to bf16.

use std::arch::x86_64::*;

use super::vectors::LANES;
use crate::arch::kernels::{PANEL, Tokens};
use crate::basis::{Basis, Tile};

/// Takes the features of a run, `prefix · x_i` for `len` rows x_i at `column`, `ld` apart.
pub(super) trait Take {
    /// Features `f .. f + len` of the tile for the W vectors of tokens at `at`.
    ///
    /// # Safety
    /// The machine has AVX-512, and the rows are there.
    unsafe fn run<const W: usize>(
        &mut self,
        f: usize,
        at: usize,
        prefix: [__m512; W],
        column: *const f32,
        ld: usize,
        len: usize,
    );
}

/// Makes the features of `tile` for every token and hands them over, run by run.
///
/// # Safety
/// `tokens` holds `d_key + 1` rows of `count` tokens; `stack` holds `order` rows of PANEL.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) unsafe fn each_run(
    basis: &Basis,
    tile: &Tile,
    tokens: Tokens<'_, f32>,
    stack: *mut f32,
    take: &mut impl Take,
) {
    let mut vectors = tokens.count / LANES;
    let mut at = 0;
    // SAFETY: forwarded; groups of vectors lie within `count`.
    unsafe {
        while vectors > 0 {
            let width = match vectors {
                4.. => {
                    group::<4>(basis, tile, tokens, at, stack, take);
                    4
                }
                2 | 3 => {
                    group::<2>(basis, tile, tokens, at, stack, take);
                    2
                }
                _ => {
                    group::<1>(basis, tile, tokens, at, stack, take);
                    1
                }
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

#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
unsafe fn group<const W: usize>(
    basis: &Basis,
    tile: &Tile,
    tokens: Tokens<'_, f32>,
    at: usize,
    stack: *mut f32,
    take: &mut impl Take,
) {
    static ONES: [f32; PANEL] = [1.0; PANEL];
    // SAFETY: forwarded: indices are below d_key, whose row `d_key` holds the weights.
    unsafe {
        let x = tokens.x.as_ptr().add(at);
        let ld = tokens.ld;
        let root = load::<W>(x.add(basis.d_key() * ld));
        let width = match tile.order {
            0 => {
                take.run(0, at, root, ONES.as_ptr(), 0, 1);
                return;
            }
            p => p - 1,
        };
        let stack = stack.add(at);
        let mut indices = basis.prefixes().as_ptr().add(tile.prefixes);
        let mut f = 0;
        for run in basis.runs().get_unchecked(tile.runs.clone()) {
            let keep = run.keep as usize;
            // Level l of the stack is the weight times the first l + 1 indices.
            let mut prefix =
                if keep == 0 { root } else { load::<W>(stack.add((keep - 1) * PANEL)) };
            for level in keep..width {
                let row = load::<W>(x.add(*indices.add(level) as usize * ld));
                for w in 0..W {
                    prefix[w] = _mm512_mul_ps(prefix[w], row[w]);
                    _mm512_storeu_ps(stack.add(level * PANEL + w * LANES), prefix[w]);
                }
            }
            let len = run.len as usize;
            take.run(f, at, prefix, x.add(run.first as usize * ld), ld, len);
            f += len;
            indices = indices.add(width);
        }
    }
}
