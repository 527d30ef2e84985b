//! The one register-tiled matrix product that reading, absorbing and the direct form share.

use crate::arch::vector::Vector;

/// Where the left matrix lies: element (m, k) at `base + m·row + k·step`.
#[derive(Clone, Copy)]
pub(super) struct Left<T> {
    pub base: *const T,
    pub row: usize,
    pub step: usize,
}

/// A matrix of contiguous rows.
#[derive(Clone, Copy)]
pub(super) struct Rows<P> {
    pub base: P,
    pub stride: usize,
}

/// `c[m][n] += Σ_k a[m][k] · b[k][n]` for `rows` (a multiple of 8) by `columns` (whole vectors).
///
/// # Safety
/// The machine has V's instructions; a, b and c cover `rows × depth`, `depth × columns` and
/// `rows × columns` with the strides given; c overlaps neither a nor b.
#[inline(always)]
pub(super) unsafe fn gemm<V: Vector>(
    rows: usize,
    depth: usize,
    columns: usize,
    a: Left<V::Elem>,
    b: Rows<*const V::Elem>,
    c: Rows<*mut V::Elem>,
) {
    debug_assert!(rows.is_multiple_of(8) && columns.is_multiple_of(V::LANES));
    let vectors = columns / V::LANES;
    let mut n = 0;
    // SAFETY: forwarded; every block lies inside the matrices.
    unsafe {
        while n < vectors {
            let left = vectors - n;
            let b = Rows { base: b.base.add(n * V::LANES), ..b };
            let c = Rows { base: c.base.add(n * V::LANES), ..c };
            // Three columns at once where that leaves no lone one behind.
            n += match left {
                1 => {
                    column::<V, 1>(rows, depth, a, b, c);
                    1
                }
                3 => {
                    column::<V, 3>(rows, depth, a, b, c);
                    3
                }
                _ => {
                    column::<V, 2>(rows, depth, a, b, c);
                    2
                }
            };
        }
    }
}

#[inline(always)]
unsafe fn column<V: Vector, const N: usize>(
    rows: usize,
    depth: usize,
    a: Left<V::Elem>,
    b: Rows<*const V::Elem>,
    c: Rows<*mut V::Elem>,
) {
    let mut m = 0;
    // SAFETY: forwarded.
    unsafe {
        if V::REGISTERS >= 32 {
            if N == 1 {
                while m + 16 <= rows {
                    block::<V, 16, N>(m, depth, a, b, c);
                    m += 16;
                }
            }
            while m < rows {
                block::<V, 8, N>(m, depth, a, b, c);
                m += 8;
            }
        } else if V::REGISTERS >= 16 {
            if N == 1 {
                while m < rows {
                    block::<V, 8, N>(m, depth, a, b, c);
                    m += 8;
                }
            } else {
                while m < rows {
                    block::<V, 4, N>(m, depth, a, b, c);
                    m += 4;
                }
            }
        } else {
            while m < rows {
                block::<V, 2, N>(m, depth, a, b, c);
                m += 2;
            }
        }
    }
}

/// An M by N·LANES block held in registers over the whole depth.
#[inline(always)]
unsafe fn block<V: Vector, const M: usize, const N: usize>(
    m: usize,
    depth: usize,
    a: Left<V::Elem>,
    b: Rows<*const V::Elem>,
    c: Rows<*mut V::Elem>,
) {
    // SAFETY: forwarded.
    unsafe {
        let a_base = a.base.add(m * a.row);
        let c_base = c.base.add(m * c.stride);
        let mut acc = [[V::splat(crate::Real::from_f64(0.0)); N]; M];
        for k in 0..depth {
            let mut right = [V::splat(crate::Real::from_f64(0.0)); N];
            for (n, right) in right.iter_mut().enumerate() {
                *right = V::load(b.base.add(k * b.stride + n * V::LANES));
            }
            let a_k = a_base.add(k * a.step);
            for (m, acc) in acc.iter_mut().enumerate() {
                let left = V::splat(*a_k.add(m * a.row));
                for (acc, &right) in acc.iter_mut().zip(&right) {
                    *acc = left.mul_add(right, *acc);
                }
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            for (n, acc) in acc.iter().enumerate() {
                let at = c_base.add(m * c.stride + n * V::LANES);
                V::load(at).add(*acc).store(at);
            }
        }
    }
}
