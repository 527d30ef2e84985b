//! The direct form: panels of queries weigh tiles of keys one by one.

use super::gemm::{Left, Rows, gemm};
use super::{Direct, PANEL, TOKENS, Tokens};
use crate::Real;
use crate::arch::vector::{Vector, exp};
use crate::basis::TILE;

/// Up to a panel of queries and a tile of keys.
struct Block {
    queries: usize,
    query_count: usize,
    keys: usize,
    key_count: usize,
    /// Counted within the block.
    diagonal: Option<isize>,
}

/// The blocks of a call in which any query sees any key, queries by queries.
fn blocks(nq: usize, nk: usize, diagonal: Option<isize>) -> impl Iterator<Item = Block> {
    // Half panels on a diagonal: less of a tile is computed in vain.
    let width = if diagonal.is_some() { PANEL / 2 } else { PANEL };
    (0..nq).step_by(width).flat_map(move |queries| {
        let query_count = width.min(nq - queries);
        let seen = diagonal.map_or(nk, |diagonal| {
            let last = (queries + query_count) as isize + diagonal;
            last.clamp(0, nk as isize) as usize
        });
        (0..seen).step_by(TILE).map(move |keys| {
            let key_count = TILE.min((seen - keys).next_multiple_of(TOKENS));
            let diagonal = diagonal.map(|diagonal| diagonal + queries as isize - keys as isize);
            let diagonal = diagonal.filter(|&diagonal| diagonal < key_count as isize);
            Block { queries, query_count, keys, key_count, diagonal }
        })
    })
}

impl<T: Real> Direct<'_, T> {
    /// The same for one block.
    #[inline(always)]
    fn block(&mut self, block: &Block) -> Direct<'_, T> {
        let Tokens { x, ld, .. } = self.queries;
        let queries = Tokens { x: &x[block.queries..], ld, count: block.query_count };
        let Tokens { x, ld, .. } = self.keys;
        let keys = Tokens { x: &x[block.keys..], ld, count: block.key_count };
        Direct {
            d_key: self.d_key,
            queries,
            keys,
            values: &self.values[block.keys * self.padded..],
            padded: self.padded,
            diagonal: block.diagonal,
            coefficients: self.coefficients,
            num: &mut self.num[block.queries * self.padded..],
            den: &mut self.den[block.queries..],
            max: self.max.get_mut(block.queries..).unwrap_or_default(),
            scratch: self.scratch,
        }
    }
}

fn check<T: Real>(a: &Direct<'_, T>) {
    let (nq, nk) = (a.queries.count, a.keys.count);
    assert!(nq <= PANEL && nq.is_multiple_of(TOKENS) && nk <= TILE && nk.is_multiple_of(TOKENS));
    assert!(a.queries.x.len() >= (a.d_key - 1) * a.queries.ld + nq);
    assert!(a.keys.x.len() >= a.d_key * a.keys.ld + nk);
    assert!(a.values.len() >= nk * a.padded);
    assert!(a.num.len() >= nq * a.padded && a.den.len() >= nq);
    assert!(!a.coefficients.is_empty() || a.max.len() >= nq);
}

/// Logits of the panel, `[key][query]`, into the scratch panel.
#[inline(always)]
unsafe fn logits<V: Vector>(a: &mut Direct<'_, V::Elem>) {
    let (nq, nk) = (a.queries.count, a.keys.count);
    a.scratch.panel[..nk * PANEL].fill(Real::from_f64(0.0));
    // SAFETY: lengths were checked by `check`.
    unsafe {
        gemm::<V>(
            nk,
            a.d_key,
            nq,
            Left { base: a.keys.x.as_ptr(), row: 1, step: a.keys.ld },
            Rows { base: a.queries.x.as_ptr(), stride: a.queries.ld },
            Rows { base: a.scratch.panel.as_mut_ptr(), stride: PANEL },
        );
    }
}

/// Sets what the diagonal hides to `hidden`.
fn mask<T: Real>(panel: &mut [T], diagonal: Option<isize>, nq: usize, nk: usize, hidden: T) {
    let Some(diagonal) = diagonal else { return };
    for s in 0..nk {
        // The first query that sees key s.
        let first = (s as isize - diagonal).clamp(0, nq as isize) as usize;
        panel[s * PANEL..s * PANEL + first].fill(hidden);
    }
}

/// Sets what the diagonal or a weight of 0 hides to `hidden`.
fn hide<T: Real>(a: &mut Direct<'_, T>, hidden: T) {
    let (nq, nk) = (a.queries.count, a.keys.count);
    for s in 0..nk {
        if a.keys.x[a.d_key * a.keys.ld + s] == T::ZERO {
            a.scratch.panel[s * PANEL..s * PANEL + nq].fill(hidden);
        }
    }
    mask(&mut a.scratch.panel, a.diagonal, nq, nk, hidden);
}

/// den += the panel's weights, summed over keys.
#[inline(always)]
unsafe fn add_to_denominators<V: Vector>(a: &mut Direct<'_, V::Elem>) {
    let panel = a.scratch.panel.as_ptr();
    let mut t = 0;
    // SAFETY: lengths were checked by `check`.
    unsafe {
        while t < a.queries.count {
            let mut total = V::load(a.den.as_ptr().add(t));
            for s in 0..a.keys.count {
                total = total.add(V::load(panel.add(s * PANEL + t)));
            }
            total.store(a.den.as_mut_ptr().add(t));
            t += V::LANES;
        }
    }
}

/// num += weightsᵀ · values.
#[inline(always)]
unsafe fn mix<V: Vector>(a: &mut Direct<'_, V::Elem>) {
    // SAFETY: lengths were checked by `check`.
    unsafe {
        gemm::<V>(
            a.queries.count,
            a.keys.count,
            a.padded,
            Left { base: a.scratch.panel.as_ptr(), row: 1, step: PANEL },
            Rows { base: a.values.as_ptr(), stride: a.padded },
            Rows { base: a.num.as_mut_ptr(), stride: a.padded },
        );
    }
}

/// See [`Direct`]: weights Σ_p a_p x^p.
///
/// # Safety
/// The machine has the instructions of V, in which values are mixed, and of G, in which weights
/// are made.
#[inline(always)]
pub(in crate::arch) unsafe fn polynomial<V, G>(a: &mut Direct<'_, V::Elem>)
where
    V: Vector,
    G: Vector<Elem = V::Elem>,
{
    for block in blocks(a.queries.count, a.keys.count, a.diagonal) {
        // SAFETY: forwarded.
        unsafe { polynomial_block::<V, G>(&mut a.block(&block)) };
    }
}

#[inline(always)]
unsafe fn polynomial_block<V, G>(a: &mut Direct<'_, V::Elem>)
where
    V: Vector,
    G: Vector<Elem = V::Elem>,
{
    check(a);
    let (nq, nk) = (a.queries.count, a.keys.count);
    let Some((&top, rest)) = a.coefficients.split_last() else {
        return;
    };
    // SAFETY: lengths were checked just now; the panel is TILE × PANEL.
    unsafe {
        logits::<G>(a);
        let panel = a.scratch.panel.as_mut_ptr();
        let weights = a.keys.x.as_ptr().add(a.d_key * a.keys.ld);
        for s in 0..nk {
            let weight = G::splat(*weights.add(s));
            let row = panel.add(s * PANEL);
            let mut t = 0;
            while t < nq {
                let x = G::load(row.add(t));
                let mut w = G::splat(top);
                for &c in rest.iter().rev() {
                    w = w.mul_add(x, G::splat(c));
                }
                w.mul(weight).store(row.add(t));
                t += G::LANES;
            }
        }
        mask(&mut a.scratch.panel, a.diagonal, nq, nk, Real::from_f64(0.0));
        add_to_denominators::<G>(a);
        mix::<V>(a);
    }
}

/// See [`Direct`]: weights exp(x − max), with what was summed before rescaled to the new maximum.
///
/// # Safety
/// The machine has the instructions of V, in which values are mixed, and of G, in which weights
/// are made.
#[inline(always)]
pub(in crate::arch) unsafe fn exponential<V, G>(a: &mut Direct<'_, V::Elem>)
where
    V: Vector,
    G: Vector<Elem = V::Elem>,
{
    for block in blocks(a.queries.count, a.keys.count, a.diagonal) {
        // SAFETY: forwarded.
        unsafe { exponential_block::<V, G>(&mut a.block(&block)) };
    }
}

#[inline(always)]
unsafe fn exponential_block<V, G>(a: &mut Direct<'_, V::Elem>)
where
    V: Vector,
    G: Vector<Elem = V::Elem>,
{
    check(a);
    let (nq, nk) = (a.queries.count, a.keys.count);
    let lowest = V::Elem::LOWEST;
    // SAFETY: lengths were checked just now; the panel is TILE × PANEL.
    unsafe {
        logits::<G>(a);
        hide(a, lowest);
        let panel = a.scratch.panel.as_mut_ptr();
        let mut rescale = [V::Elem::ONE; PANEL];
        let mut t = 0;
        while t < nq {
            let before = G::load(a.max.as_ptr().add(t));
            let mut top = before;
            for s in 0..nk {
                top = top.max(G::load(panel.add(s * PANEL + t)));
            }
            top.store(a.max.as_mut_ptr().add(t));
            let shrink = exp(before.sub(top));
            shrink.store(rescale.as_mut_ptr().add(t));
            G::load(a.den.as_ptr().add(t)).mul(shrink).store(a.den.as_mut_ptr().add(t));
            for s in 0..nk {
                let at = panel.add(s * PANEL + t);
                exp(G::load(at).sub(top)).store(at);
            }
            t += G::LANES;
        }
        // A query that has seen no key yet gave weight to hidden ones: take it away.
        hide(a, V::Elem::ZERO);
        add_to_denominators::<G>(a);
        for (t, &shrink) in rescale[..nq].iter().enumerate() {
            if shrink != V::Elem::ONE {
                let by = V::splat(shrink);
                let mut n = 0;
                while n < a.padded {
                    let at = a.num.as_mut_ptr().add(t * a.padded + n);
                    V::load(at).mul(by).store(at);
                    n += V::LANES;
                }
            }
        }
        mix::<V>(a);
    }
}
