//! The state form: queries read far sums, keys and values are absorbed into them.

use super::features::{Emit, each_feature};
use super::gemm::{Left, Rows, gemm};
use super::{Absorb, Far, PANEL, Packed, Read, TOKENS, Values};
use crate::arch::vector::Vector;
use crate::basis::{TILE, Tile};

/// Stores features as panel rows and adds them, times z, to the denominators.
struct Reading<V: Vector> {
    panel: *mut V::Elem,
    z: *const V::Elem,
    den: *mut V::Elem,
    /// Denominators of the tokens at hand, one register a vector.
    total: [V; 4],
}

impl<V: Vector> Emit<V> for Reading<V> {
    #[inline(always)]
    unsafe fn emit<const W: usize>(&mut self, f: usize, at: usize, row: [V; W]) {
        // SAFETY: f < TILE and at + W·LANES ≤ PANEL.
        unsafe {
            let z = V::splat(*self.z.add(f));
            for (w, row) in row.iter().enumerate() {
                row.store(self.panel.add(f * PANEL + at + w * V::LANES));
                self.total[w] = row.mul_add(z, self.total[w]);
            }
        }
    }

    #[inline(always)]
    unsafe fn end<const W: usize>(&mut self, at: usize) {
        // SAFETY: den covers the panel's tokens.
        unsafe {
            for w in 0..W {
                let den = self.den.add(at + w * V::LANES);
                V::load(den).add(self.total[w]).store(den);
                self.total[w] = V::splat(crate::Real::from_f64(0.0));
            }
        }
    }
}

/// See [`Read`]. Products are made in vectors V, which fit d_value, features in vectors G.
///
/// # Safety
/// The machine has the instructions of both.
#[inline(always)]
pub(in crate::arch) unsafe fn read<V, G>(a: &mut Read<'_, V::Elem>)
where
    V: Vector,
    G: Vector<Elem = V::Elem>,
{
    let each = TILE * a.padded;
    for (i, tile) in a.tiles.iter().enumerate() {
        for t in (0..a.tokens.count).step_by(PANEL) {
            let mut panel = Read {
                basis: a.basis,
                tiles: a.tiles,
                tokens: a.tokens.panel(t),
                packed: Packed { sums: &a.packed.sums[i * each..], z: &a.packed.z[i * TILE..] },
                padded: a.padded,
                num: &mut a.num[t * a.padded..],
                den: &mut a.den[t..],
                scratch: a.scratch,
            };
            // SAFETY: forwarded.
            unsafe { read_panel::<V, G>(&mut panel, tile) };
        }
    }
}

/// One tile and one panel.
#[inline(always)]
unsafe fn read_panel<V, G>(a: &mut Read<'_, V::Elem>, tile: &Tile)
where
    V: Vector,
    G: Vector<Elem = V::Elem>,
{
    let Packed { sums, z } = a.packed;
    let count = a.tokens.count;
    assert!(count <= PANEL && count.is_multiple_of(TOKENS) && tile.len <= TILE);
    assert!(a.tokens.x.len() >= a.basis.d_key() * a.tokens.ld + count);
    assert!(sums.len() >= tile.len * a.padded && z.len() >= tile.len);
    assert!(a.num.len() >= count * a.padded && a.den.len() >= count);
    assert!(a.scratch.stack.len() >= tile.order * PANEL);
    let panel = a.scratch.panel.as_mut_ptr();
    // SAFETY: the lengths were checked just now; the panel is TILE × PANEL.
    unsafe {
        let total = [G::splat(crate::Real::from_f64(0.0)); 4];
        each_feature::<G>(
            a.basis,
            tile,
            a.tokens,
            a.scratch.stack.as_mut_ptr(),
            Reading { panel, z: z.as_ptr(), den: a.den.as_mut_ptr(), total },
        );
        gemm::<V>(
            count,
            tile.len,
            a.padded,
            Left { base: panel, row: 1, step: PANEL },
            Rows { base: sums.as_ptr(), stride: a.padded },
            Rows { base: a.num.as_mut_ptr(), stride: a.padded },
        );
    }
}

/// Stores features as panel rows and adds up their tokens, each times `by` if BY, lane by lane.
struct Absorbing<V: Vector, const BY: bool> {
    panel: *mut V::Elem,
    z: *mut V::Elem,
    by: *const V::Elem,
}

impl<V: Vector, const BY: bool> Emit<V> for Absorbing<V, BY> {
    #[inline(always)]
    unsafe fn emit<const W: usize>(&mut self, f: usize, at: usize, row: [V; W]) {
        // SAFETY: f < TILE, at + W·LANES ≤ PANEL, z has TOKENS ≥ LANES elements per feature, and
        // `by` one per token.
        unsafe {
            let z = self.z.add(f * TOKENS);
            let mut total = V::load(z);
            for (w, row) in row.iter().enumerate() {
                row.store(self.panel.add(f * PANEL + at + w * V::LANES));
                total = if BY {
                    row.mul_add(V::load(self.by.add(at + w * V::LANES)), total)
                } else {
                    total.add(*row)
                };
            }
            total.store(z);
        }
    }

    #[inline(always)]
    unsafe fn end<const W: usize>(&mut self, _at: usize) {}
}

/// See [`Absorb`]. Products are made in vectors V, which fit d_value, features in vectors G.
///
/// # Safety
/// The machine has the instructions of both.
#[inline(always)]
pub(in crate::arch) unsafe fn absorb<V, G>(a: &mut Absorb<'_, V::Elem>)
where
    V: Vector,
    G: Vector<Elem = V::Elem>,
{
    for t in (0..a.tokens.count).step_by(PANEL) {
        let mut panel = Absorb {
            basis: a.basis,
            tile: a.tile,
            tokens: a.tokens.panel(t),
            values: Values { rows: &a.values.rows[t * a.padded..], prepared: &[] },
            by: a.by.get(t..).unwrap_or(&[]),
            padded: a.padded,
            sums: a.sums,
            z: a.z,
            scratch: a.scratch,
        };
        // SAFETY: forwarded.
        unsafe {
            if a.by.is_empty() {
                absorb_panel::<V, G, false>(&mut panel);
            } else {
                absorb_panel::<V, G, true>(&mut panel);
            }
        }
    }
}

/// One panel.
#[inline(always)]
unsafe fn absorb_panel<V, G, const BY: bool>(a: &mut Absorb<'_, V::Elem>)
where
    V: Vector,
    G: Vector<Elem = V::Elem>,
{
    let count = a.tokens.count;
    let rows = a.tile.len.next_multiple_of(8);
    assert!(count <= PANEL && count.is_multiple_of(TOKENS) && a.tile.len <= TILE);
    assert!(a.tokens.x.len() >= a.basis.d_key() * a.tokens.ld + count);
    assert!(a.values.rows.len() >= count * a.padded && (!BY || a.by.len() >= count));
    assert!(a.sums.len() >= rows * a.padded && a.z.len() >= a.tile.len * TOKENS);
    assert!(a.scratch.stack.len() >= a.tile.order * PANEL);
    a.scratch.panel[a.tile.len * PANEL..rows * PANEL].fill(crate::Real::from_f64(0.0));
    let panel = a.scratch.panel.as_mut_ptr();
    // SAFETY: the lengths were checked just now; the panel is TILE × PANEL.
    unsafe {
        each_feature::<G>(
            a.basis,
            a.tile,
            a.tokens,
            a.scratch.stack.as_mut_ptr(),
            Absorbing::<G, BY> { panel, z: a.z.as_mut_ptr(), by: a.by.as_ptr() },
        );
        gemm::<V>(
            rows,
            count,
            a.padded,
            Left { base: panel, row: PANEL, step: 1 },
            Rows { base: a.values.rows.as_ptr(), stride: a.padded },
            Rows { base: a.sums.as_mut_ptr(), stride: a.padded },
        );
    }
}

/// Prepares a tile's sums for [`read`]: times multiplicity and coefficient, rows padded.
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(in crate::arch) unsafe fn pack<V: Vector>(
    sums: &[V::Elem],
    z: &[V::Elem],
    multiplicities: &[V::Elem],
    coefficient: V::Elem,
    d_value: usize,
    out: &mut [V::Elem],
    out_z: &mut [V::Elem],
) {
    let padded = d_value.next_multiple_of(V::LANES);
    let len = multiplicities.len();
    assert!(sums.len() >= len * d_value && z.len() >= len);
    assert!(out.len() >= len * padded && out_z.len() >= len);
    // Rows are loaded in whole vectors; those that would reach beyond the slice go one by one.
    let whole = if len * d_value < padded { 0 } else { (len * d_value - padded) / d_value + 1 };
    for ((out, &z), &m) in out_z.iter_mut().zip(z).zip(multiplicities) {
        *out = z * (m * coefficient);
    }
    for f in whole.min(len)..len {
        let weight = multiplicities[f] * coefficient;
        let row = &mut out[f * padded..(f + 1) * padded];
        row.fill(crate::Real::from_f64(0.0));
        for (to, &from) in row.iter_mut().zip(&sums[f * d_value..(f + 1) * d_value]) {
            *to = from * weight;
        }
    }
    for (f, &m) in multiplicities[..whole.min(len)].iter().enumerate() {
        let weight = m * coefficient;
        // SAFETY: the lengths were checked just now.
        unsafe {
            let weight = V::splat(weight);
            let from = sums.as_ptr().add(f * d_value);
            let to = out.as_mut_ptr().add(f * padded);
            let mut at = 0;
            while at < padded {
                V::load(from.add(at)).mul(weight).store(to.add(at));
                at += V::LANES;
            }
        }
    }
}

/// Multiplies the far sums of one tile by `factor` and adds a chunk's sums to them, keeping what
/// rounding would lose (Knuth's TwoSum, so that it holds whichever of the two is larger; the
/// product's own rounding error by a fused multiplication).
///
/// # Safety
/// The machine has the instructions of V and G.
#[inline(always)]
pub(in crate::arch) unsafe fn fold<V, G>(
    sums: &[V::Elem],
    z: &[V::Elem],
    len: usize,
    d_value: usize,
    factor: V::Elem,
    far: &mut Far<'_, V::Elem>,
) where
    V: Vector,
    G: Vector<Elem = V::Elem>,
{
    let padded = d_value.next_multiple_of(V::LANES);
    let compensated = <V::Elem as crate::Real>::COMPENSATED;
    assert!(len <= TILE && sums.len() >= len * padded && z.len() >= len * TOKENS);
    assert!(far.sums.len() >= len * d_value && far.z.len() >= len);
    assert!(!compensated || (far.sums_low.len() >= len * d_value && far.z_low.len() >= len));
    // SAFETY: the lengths were checked just now, and z has TOKENS ≥ LANES elements per feature.
    unsafe {
        if padded == d_value {
            add_all::<V>(&sums[..len * d_value], factor, far.sums, far.sums_low);
        } else {
            for f in 0..len {
                let row = f * d_value..(f + 1) * d_value;
                let low = if compensated { &mut far.sums_low[row.clone()] } else { &mut [][..] };
                add_all::<V>(&sums[f * padded..][..d_value], factor, &mut far.sums[row], low);
            }
        }
        let mut totals = [<V::Elem as crate::Real>::ZERO; TILE];
        for (f, total) in totals[..len].iter_mut().enumerate() {
            *total = G::load(z.as_ptr().add(f * TOKENS)).sum();
        }
        add_all::<V>(&totals[..len], factor, far.z, far.z_low);
    }
}

/// to = to·factor + from, element by element, with what rounding takes kept in `low` where there
/// is one.
#[inline(always)]
unsafe fn add_all<V: Vector>(
    from: &[V::Elem],
    factor: V::Elem,
    to: &mut [V::Elem],
    low: &mut [V::Elem],
) {
    let compensated = <V::Elem as crate::Real>::COMPENSATED;
    let n = from.len();
    let whole = n - n % V::LANES;
    let fades = factor != <V::Elem as crate::Real>::ONE;
    let mut at = 0;
    // SAFETY: forwarded; `at` stays below the shortest length, in whole vectors.
    unsafe {
        let (from, to, low) = (from.as_ptr(), to.as_mut_ptr(), low.as_mut_ptr());
        let by = V::splat(factor);
        while at < whole {
            let (x, mut sum) = (V::load(from.add(at)), V::load(to.add(at)));
            if compensated {
                let mut small = V::load(low.add(at));
                if fades {
                    let product = sum.mul(by);
                    // sum·factor − product, exactly, where the machine fuses.
                    let lost = sum.mul_add(by, V::splat(crate::Real::from_f64(0.0)).sub(product));
                    small = small.mul_add(by, lost);
                    sum = product;
                }
                let (t, e) = two_sum(sum, x.add(small));
                t.store(to.add(at));
                e.store(low.add(at));
            } else if fades {
                sum.mul_add(by, x).store(to.add(at));
            } else {
                sum.add(x).store(to.add(at));
            }
            at += V::LANES;
        }
    }
    for i in whole..n {
        let (mut sum, mut small) = (to[i], if compensated { low[i] } else { from[i] });
        if fades {
            let product = sum * factor;
            if compensated {
                small = small * factor + crate::Real::lost(sum, factor, product);
            }
            sum = product;
        }
        if !compensated {
            to[i] = sum + small;
            continue;
        }
        let b = from[i] + small;
        let t = sum + b;
        let bb = t - sum;
        low[i] = (sum - (t - bb)) + (b - bb);
        to[i] = t;
    }
}

/// a + b and what rounding took from it.
#[inline(always)]
unsafe fn two_sum<V: Vector>(a: V, b: V) -> (V, V) {
    // SAFETY: forwarded.
    unsafe {
        let t = a.add(b);
        let bb = t.sub(a);
        (t, a.sub(t.sub(bb)).add(b.sub(bb)))
    }
}
