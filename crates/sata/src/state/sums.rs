//! Far sums of one head, and folding tokens into them.

use crate::Real;
use crate::arch::{Absorb, Buffer, Far, Kernels, PANEL, Scratch, TOKENS, Tokens, Values};
use crate::basis::{Basis, TILE, Tile};

/// Elements readable beyond the end of sums, for loads of whole vectors.
pub(super) const SLACK: usize = 16;

/// Far sums of one head, Σ Φ(k) vᵀ and Σ Φ(k), in the order of the basis.
#[derive(Clone, Debug)]
pub(crate) struct Sums<T> {
    /// `[D][d_value]` and slack.
    pub sums: Buffer<T>,
    /// `[D]` and slack.
    pub z: Buffer<T>,
    /// What rounding took from `sums`, where sums are compensated.
    pub sums_low: Buffer<T>,
    /// What rounding took from `z`, likewise.
    pub z_low: Buffer<T>,
}

impl<T: Real> Sums<T> {
    pub(crate) fn new(features: usize, d_value: usize) -> Self {
        let low = if T::COMPENSATED { features } else { 0 };
        Sums {
            sums: Buffer::zeroed(features * d_value + SLACK),
            z: Buffer::zeroed(features + SLACK),
            sums_low: Buffer::zeroed(low * d_value),
            z_low: Buffer::zeroed(low),
        }
    }

    /// Makes them zeros.
    pub(crate) fn clear(&mut self) {
        for x in [&mut self.sums, &mut self.z, &mut self.sums_low, &mut self.z_low] {
            x.fill(T::ZERO);
        }
    }

    /// Multiplies by `factor`.
    pub(crate) fn fade(&mut self, factor: T) {
        if factor == T::ONE {
            return;
        }
        for (x, low) in [(&mut self.sums, &mut self.sums_low), (&mut self.z, &mut self.z_low)] {
            for (i, x) in x.iter_mut().enumerate() {
                let product = *x * factor;
                if let Some(low) = low.get_mut(i) {
                    *low = *low * factor + x.lost(factor, product);
                }
                *x = product;
            }
        }
    }

    /// Adds other sums of the same layout, compensated.
    pub(crate) fn add(&mut self, other: &Self) {
        add_compensated(&mut self.sums, &mut self.sums_low, &other.sums, &other.sums_low);
        add_compensated(&mut self.z, &mut self.z_low, &other.z, &other.z_low);
    }

    /// Splits them at tile boundaries: one part per range of tiles.
    pub(crate) fn split<'a>(
        &'a mut self,
        basis: &Basis,
        d_value: usize,
        parts: &[std::ops::Range<usize>],
    ) -> Vec<Far<'a, T>> {
        let mut out = Vec::with_capacity(parts.len());
        let (mut sums, mut z) = (&mut self.sums[..], &mut self.z[..]);
        let (mut sums_low, mut z_low) = (&mut self.sums_low[..], &mut self.z_low[..]);
        for part in parts {
            let features: usize = basis.tiles()[part.clone()].iter().map(|tile| tile.len).sum();
            let low = if T::COMPENSATED { features } else { 0 };
            out.push(Far {
                sums: cut(&mut sums, features * d_value),
                z: cut(&mut z, features),
                sums_low: cut(&mut sums_low, low * d_value),
                z_low: cut(&mut z_low, low),
            });
        }
        out
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of::<T>() * (self.sums.len() + self.z.len() + self.sums_low.len() + self.z_low.len())
    }
}

/// Takes the first `n` elements off a slice.
fn cut<'a, T>(slice: &mut &'a mut [T], n: usize) -> &'a mut [T] {
    let (head, tail) = std::mem::take(slice).split_at_mut(n);
    *slice = tail;
    head
}

fn add_compensated<T: Real>(to: &mut [T], low: &mut [T], from: &[T], from_low: &[T]) {
    if !T::COMPENSATED {
        to.iter_mut().zip(from).for_each(|(to, &from)| *to += from);
        return;
    }
    for (((to, low), &from), &from_low) in to.iter_mut().zip(low).zip(from).zip(from_low) {
        // TwoSum of the large parts; the small parts add up with what it left.
        let t = *to + from;
        let bb = t - *to;
        *low += ((*to - (t - bb)) + (from - bb)) + from_low;
        *to = t;
    }
}

/// Working memory for folding tokens into far sums.
#[derive(Debug)]
pub(crate) struct FoldWork<T: 'static> {
    pub kernels: &'static Kernels<T>,
    pub d_value: usize,
    pub padded: usize,
    /// What the kernels make of each panel's values.
    pub prepared: Buffer<T>,
    /// `[TILE][padded]`, a chunk's sums.
    pub sums: Buffer<T>,
    /// `[TILE][TOKENS]`, a chunk's lanes of Σ Φ.
    pub z: Buffer<T>,
    pub scratch: Scratch<T>,
}

impl<T: Real> FoldWork<T> {
    pub(crate) fn new(basis: &Basis, d_value: usize, kernels: &'static Kernels<T>) -> Self {
        let padded = d_value.next_multiple_of(kernels.lanes);
        FoldWork {
            kernels,
            d_value,
            padded,
            prepared: Buffer::zeroed(0),
            sums: Buffer::zeroed(TILE * padded),
            z: Buffer::zeroed(TILE * TOKENS),
            scratch: Scratch::new(basis),
        }
    }

    /// Prepares `values` (`tokens` rows) for absorbing.
    pub(crate) fn prepare(&mut self, values: &[T], tokens: usize) {
        let each = (self.kernels.prepared_len)(self.padded);
        if each == 0 {
            return;
        }
        let prepared = self.prepared.grown(tokens.div_ceil(PANEL) * each);
        for (panel, out) in prepared.chunks_mut(each).enumerate() {
            let first = panel * PANEL;
            let count = PANEL.min(tokens - first);
            let rows = &values[first * self.padded..(first + count) * self.padded];
            // SAFETY: kernels are only handed out for instruction sets that are there.
            unsafe { (self.kernels.prepare)(rows, count, self.padded, out) };
        }
    }

    /// Sums the tokens of each tile apart, then adds them to the tiles' far sums, of which `factor`
    /// is left. Their values have been prepared.
    pub(crate) fn fold_tiles(
        &mut self,
        basis: &Basis,
        tiles: &[Tile],
        from: Tokens<'_, T>,
        values: &[T],
        factor: T,
        far: &mut Far<'_, T>,
    ) {
        for tile in tiles {
            // A state may hold higher orders than the plan that goes on with it.
            self.scratch.stack.grown((tile.order + 1) * PANEL);
            let rows = tile.len.next_multiple_of(16).min(TILE);
            self.sums[..rows * self.padded].fill(T::ZERO);
            self.z[..rows * TOKENS].fill(T::ZERO);
            let mut call = Absorb {
                basis,
                tile,
                tokens: from,
                values: Values { rows: values, prepared: &self.prepared },
                by: &[],
                padded: self.padded,
                sums: &mut self.sums,
                z: &mut self.z,
                scratch: &mut self.scratch,
            };
            let mut part = far.part(tile.start - tiles[0].start, tile.len, self.d_value);
            // SAFETY: kernels are only handed out for instruction sets that are there.
            unsafe {
                (self.kernels.absorb)(&mut call);
                (self.kernels.fold)(&self.sums, &self.z, tile.len, self.d_value, factor, &mut part);
            }
        }
    }
}
