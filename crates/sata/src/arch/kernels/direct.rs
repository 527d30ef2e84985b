//! The direct form: a panel of queries weighs a tile of keys one by one.

use super::gemm::{Left, Rows, gemm};
use super::{Direct, PANEL, TOKENS};
use crate::Real;
use crate::arch::vector::{Vector, exp};
use crate::basis::TILE;

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
