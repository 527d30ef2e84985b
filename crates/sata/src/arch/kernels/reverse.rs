//! The backward of reading sums: what reading does to the tokens that read.

use super::gemm::{Left, Rows, gemm};
use super::{PANEL, TOKENS, Tokens};
use crate::Real;
use crate::arch::vector::Vector;
use crate::basis::{Basis, TILE, Tile};

/// With c_ft = sums_f·v_t:
///
/// ```text
/// dot[t] += Σ_f Φ_f(x_t) c_ft      by_sums[i][t] += Σ_f c_ft ∂Φ_f/∂x_ti
/// den[t] += Σ_f Φ_f(x_t) z_f       by_z[i][t]    += Σ_f z_f  ∂Φ_f/∂x_ti
/// ```
///
/// Features carry their token's weight. The two kinds are kept apart because a query's δ, which
/// weighs the one against the other, is only known when everything has been read.
pub(crate) struct ReadBack<'a, T> {
    pub basis: &'a Basis,
    pub tile: &'a Tile,
    pub tokens: Tokens<'a, T>,
    /// `[TILE][padded]`, times multiplicity and coefficient.
    pub sums: &'a [T],
    /// `[TILE]`, likewise.
    pub z: &'a [T],
    pub padded: usize,
    pub d_value: usize,
    /// Transposed, `[d_value][tokens.ld]`.
    pub values: &'a [T],
    /// `[d_key][tokens.ld]`.
    pub by_sums: &'a mut [T],
    pub by_z: &'a mut [T],
    /// `[tokens]`.
    pub dot: &'a mut [T],
    pub den: &'a mut [T],
    pub work: &'a mut ReadBackWork<T>,
}

/// Working memory of one thread.
#[derive(Debug)]
pub(crate) struct ReadBackWork<T> {
    /// `[TILE][PANEL]`, c.
    panel: crate::arch::Buffer<T>,
    /// `[order][PANEL]`: prefixes of the monomials, and what their features' gradients add up to.
    stack: [crate::arch::Buffer<T>; 3],
}

impl<T: Real> ReadBackWork<T> {
    /// For the orders of `basis`.
    pub(crate) fn new(basis: &Basis) -> Self {
        // Never empty: kernels point into it.
        let highest = basis.orders().last().copied().unwrap_or(0).max(1);
        let level = || crate::arch::Buffer::zeroed(highest * PANEL);
        let panel = crate::arch::Buffer::zeroed(TILE * PANEL);
        ReadBackWork { panel, stack: [level(), level(), level()] }
    }
}

/// See [`ReadBack`].
///
/// # Safety
/// The machine has G's instructions.
#[inline(always)]
pub(in crate::arch) unsafe fn read_back<G: Vector>(a: &mut ReadBack<'_, G::Elem>) {
    let (tile, ld, count) = (a.tile, a.tokens.ld, a.tokens.count);
    let rows = tile.len.next_multiple_of(8);
    assert!(count.is_multiple_of(TOKENS) && count <= ld && rows <= TILE);
    assert!(a.tokens.x.len() >= a.basis.d_key() * ld + count);
    assert!(a.d_value <= a.padded && a.values.len() + ld >= a.d_value * ld + count);
    assert!(a.sums.len() >= rows * a.padded && a.z.len() >= tile.len);
    let d = a.basis.d_key();
    assert!(a.by_sums.len() + ld >= d * ld + count && a.by_z.len() + ld >= d * ld + count);
    assert!(a.dot.len() >= count && a.den.len() >= count);
    assert!(a.work.stack.iter().all(|stack| stack.len() >= tile.order.saturating_sub(1) * PANEL));
    for at in (0..count).step_by(PANEL) {
        let columns = PANEL.min(count - at);
        let panel = &mut a.work.panel[..rows * PANEL];
        panel.fill(G::Elem::ZERO);
        // SAFETY: lengths were checked just now.
        unsafe {
            gemm::<G>(
                rows,
                a.d_value,
                columns,
                Left { base: a.sums.as_ptr(), row: a.padded, step: 1 },
                Rows { base: a.values.as_ptr().add(at), stride: ld },
                Rows { base: panel.as_mut_ptr(), stride: PANEL },
            );
            let mut lane = 0;
            if G::REGISTERS >= 32 {
                while lane + 4 * G::LANES <= columns {
                    group::<G, 4>(a, at, lane);
                    lane += 4 * G::LANES;
                }
            }
            while lane < columns {
                group::<G, 1>(a, at, lane);
                lane += G::LANES;
            }
        }
    }
}

/// Lanes of some tokens, and where their gradients go.
struct Column<V: Vector> {
    /// Elements of the token at hand; its gradients by sums and by z.
    x: *const V::Elem,
    by: [*mut V::Elem; 2],
    ld: usize,
    /// Prefixes, and gradients of what they are part of.
    stack: *mut V::Elem,
    adjoint: [*mut V::Elem; 2],
}

/// W vectors of tokens of the panel that begins at `at`, from its token `lane` on.
#[inline(always)]
unsafe fn group<V: Vector, const W: usize>(a: &mut ReadBack<'_, V::Elem>, at: usize, lane: usize) {
    let zero = V::Elem::ZERO;
    // SAFETY: `read_back` has checked that all lie within their arrays: indices are below d_key,
    // whose row `d_key` of x holds the weights.
    unsafe {
        let [stack, by_sums, by_z] = &mut a.work.stack;
        let c = Column::<V> {
            x: a.tokens.x.as_ptr().add(at + lane),
            by: [a.by_sums.as_mut_ptr().add(at + lane), a.by_z.as_mut_ptr().add(at + lane)],
            ld: a.tokens.ld,
            stack: stack.as_mut_ptr().add(lane),
            adjoint: [by_sums.as_mut_ptr().add(lane), by_z.as_mut_ptr().add(lane)],
        };
        let panel = a.work.panel.as_ptr().add(lane);
        let root: [V; W] = load(c.x.add(a.basis.d_key() * c.ld));
        let (mut dot, mut den) = ([V::splat(zero); W], [V::splat(zero); W]);
        if a.tile.order == 0 {
            let (by, z) = (load::<V, W>(panel), V::splat(a.z[0]));
            for w in 0..W {
                dot[w] = root[w].mul(by[w]);
                den[w] = root[w].mul(z);
            }
        } else {
            let width = a.tile.order - 1;
            let runs = a.basis.runs().get_unchecked(a.tile.runs.clone());
            let first = a.basis.prefixes().as_ptr().add(a.tile.prefixes);
            let mut indices = first;
            let mut f = 0;
            for (r, run) in runs.iter().enumerate() {
                let keep = run.keep as usize;
                if r > 0 {
                    let before = indices;
                    indices = indices.add(width);
                    unwind::<V, W>(&c, &root, before, keep..width);
                }
                let mut prefix =
                    if keep == 0 { root } else { load(c.stack.add((keep - 1) * PANEL)) };
                for level in keep..width {
                    let row: [V; W] = load(c.x.add(*indices.add(level) as usize * c.ld));
                    for w in 0..W {
                        prefix[w] = prefix[w].mul(row[w]);
                        let place = level * PANEL + w * V::LANES;
                        prefix[w].store(c.stack.add(place));
                        V::splat(zero).store(c.adjoint[0].add(place));
                        V::splat(zero).store(c.adjoint[1].add(place));
                    }
                }
                let (mut by_sums, mut by_z) = ([V::splat(zero); W], [V::splat(zero); W]);
                let mut offset = run.first as usize * c.ld;
                for _ in 0..run.len {
                    let z = V::splat(*a.z.get_unchecked(f));
                    for w in 0..W {
                        let place = offset + w * V::LANES;
                        let x = V::load(c.x.add(place));
                        let by = V::load(panel.add(f * PANEL + w * V::LANES));
                        let to = c.by[0].add(place);
                        prefix[w].mul_add(by, V::load(to)).store(to);
                        let to = c.by[1].add(place);
                        prefix[w].mul_add(z, V::load(to)).store(to);
                        by_sums[w] = x.mul_add(by, by_sums[w]);
                        by_z[w] = x.mul_add(z, by_z[w]);
                    }
                    f += 1;
                    offset += c.ld;
                }
                for w in 0..W {
                    dot[w] = prefix[w].mul_add(by_sums[w], dot[w]);
                    den[w] = prefix[w].mul_add(by_z[w], den[w]);
                    if width > 0 {
                        let place = (width - 1) * PANEL + w * V::LANES;
                        for (adjoint, by) in c.adjoint.iter().zip([by_sums[w], by_z[w]]) {
                            V::load(adjoint.add(place)).add(by).store(adjoint.add(place));
                        }
                    }
                }
            }
            unwind::<V, W>(&c, &root, indices, 0..width);
        }
        for w in 0..W {
            let place = at + lane + w * V::LANES;
            for (sum, to) in [(dot[w], &mut *a.dot), (den[w], &mut *a.den)] {
                let to = to.as_mut_ptr().add(place);
                V::load(to).add(sum).store(to);
            }
        }
    }
}

/// Levels of the stack are left: what their prefixes' gradients have added up to goes to their last
/// index and to the level below.
#[inline(always)]
unsafe fn unwind<V: Vector, const W: usize>(
    c: &Column<V>,
    root: &[V; W],
    indices: *const u32,
    levels: std::ops::Range<usize>,
) {
    // SAFETY: forwarded.
    unsafe {
        for level in levels.rev() {
            let offset = *indices.add(level) as usize * c.ld;
            let below = if level == 0 { *root } else { load(c.stack.add((level - 1) * PANEL)) };
            for (by, adjoint) in c.by.iter().zip(c.adjoint) {
                for (w, below) in below.iter().enumerate() {
                    let lane = w * V::LANES;
                    let own = V::load(adjoint.add(level * PANEL + lane));
                    let to = by.add(offset + lane);
                    below.mul_add(own, V::load(to)).store(to);
                    if level > 0 {
                        let to = adjoint.add((level - 1) * PANEL + lane);
                        V::load(c.x.add(offset + lane)).mul_add(own, V::load(to)).store(to);
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn load<V: Vector, const W: usize>(p: *const V::Elem) -> [V; W] {
    // SAFETY: forwarded.
    unsafe {
        let mut out = [V::splat(V::Elem::ZERO); W];
        for (w, out) in out.iter_mut().enumerate() {
            *out = V::load(p.add(w * V::LANES));
        }
        out
    }
}
