//! Making features: one multiplication each, from a monomial of one order less.

use super::{PANEL, Tokens};
use crate::arch::vector::Vector;
use crate::basis::{Basis, Tile};

/// Makes the features of `tile` for every token and hands them to `emit(f, at, row)`: feature `f`
/// of the tile for the tokens `at ..`, W vectors of them at a time.
///
/// # Safety
/// The machine has V's instructions; `tokens` holds `d_key + 1` rows of `count` tokens; `stack`
/// holds `order` rows of PANEL.
#[inline(always)]
pub(super) unsafe fn each_feature<V: Vector>(
    basis: &Basis,
    tile: &Tile,
    tokens: Tokens<'_, V::Elem>,
    stack: *mut V::Elem,
    mut emit: impl Emit<V>,
) {
    let vectors = tokens.count / V::LANES;
    // SAFETY: forwarded; groups of vectors lie within `count`.
    unsafe {
        let mut v = 0;
        while v + 4 <= vectors {
            group::<V, 4>(basis, tile, tokens, v * V::LANES, stack, &mut emit);
            v += 4;
        }
        while v < vectors {
            group::<V, 1>(basis, tile, tokens, v * V::LANES, stack, &mut emit);
            v += 1;
        }
    }
}

/// Takes features as they are made.
pub(super) trait Emit<V: Vector> {
    /// Feature `f` of the tile for the tokens `at .. at + W·LANES`.
    ///
    /// # Safety
    /// As for [`each_feature`].
    unsafe fn emit<const W: usize>(&mut self, f: usize, at: usize, row: [V; W]);

    /// The tokens `at .. at + W·LANES` have had all their features.
    ///
    /// # Safety
    /// As for [`each_feature`].
    unsafe fn end<const W: usize>(&mut self, at: usize);
}

#[inline(always)]
unsafe fn load<V: Vector, const W: usize>(p: *const V::Elem) -> [V; W] {
    // SAFETY: forwarded.
    unsafe {
        let mut out = [V::splat(crate::Real::from_f64(0.0)); W];
        for (w, out) in out.iter_mut().enumerate() {
            *out = V::load(p.add(w * V::LANES));
        }
        out
    }
}

#[inline(always)]
unsafe fn group<V: Vector, const W: usize>(
    basis: &Basis,
    tile: &Tile,
    tokens: Tokens<'_, V::Elem>,
    at: usize,
    stack: *mut V::Elem,
    emit: &mut impl Emit<V>,
) {
    // SAFETY: forwarded: indices are below d_key, whose row `d_key` holds the weights.
    unsafe {
        let x = tokens.x.as_ptr().add(at);
        let stack = stack.add(at);
        let root = load::<V, W>(x.add(basis.d_key() * tokens.ld));
        let width = match tile.order {
            0 => {
                emit.emit(0, at, root);
                emit.end::<W>(at);
                return;
            }
            p => p - 1,
        };
        let runs = basis.runs().get_unchecked(tile.runs.clone());
        let mut indices = basis.prefixes().as_ptr().add(tile.prefixes);
        let mut f = 0;
        for run in runs {
            let keep = run.keep as usize;
            // Level l of the stack is the weight times the first l + 1 indices.
            let mut prefix =
                if keep == 0 { root } else { load::<V, W>(stack.add((keep - 1) * PANEL)) };
            for level in keep..width {
                let row = load::<V, W>(x.add(*indices.add(level) as usize * tokens.ld));
                for w in 0..W {
                    prefix[w] = prefix[w].mul(row[w]);
                    prefix[w].store(stack.add(level * PANEL + w * V::LANES));
                }
            }
            let mut column = x.add(run.first as usize * tokens.ld);
            for _ in 0..run.len {
                let mut row = load::<V, W>(column);
                for w in 0..W {
                    row[w] = prefix[w].mul(row[w]);
                }
                emit.emit(f, at, row);
                f += 1;
                column = column.add(tokens.ld);
            }
            indices = indices.add(width);
        }
        emit.end::<W>(at);
    }
}
