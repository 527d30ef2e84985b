//! One head's past: far sums and the open block.

use crate::arch::{
    Absorb, Buffer, DECODE_SCRATCH, Far, Kernels, PANEL, Scratch, TOKENS, Tokens, Values, prefetch,
};
use crate::basis::{Basis, TILE, Tile};
use crate::{Real, Spec};

/// Elements readable beyond the end of sums, for loads of whole vectors.
const SLACK: usize = 16;

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

/// Raw keys and values of the open block.
#[derive(Clone, Debug)]
pub(crate) struct Open<T> {
    /// `[d_key + 1][ld]`, transposed; the last row holds the weights.
    pub keys: Buffer<T>,
    /// Tokens there is room for, a multiple of TOKENS.
    pub ld: usize,
    /// `[ld][d_value]` and slack.
    pub values: Buffer<T>,
}

/// One head's past.
#[derive(Clone, Debug)]
pub(crate) struct HeadState<T> {
    pub sums: Sums<T>,
    pub open: Open<T>,
    /// Working memory of a decode step: the kernels', then a query and a numerator with slack.
    pub scratch: Vec<T>,
}

impl<T: Real> HeadState<T> {
    pub(crate) fn new(spec: &Spec, basis: &Basis) -> Self {
        let ld = spec.block().next_multiple_of(TOKENS);
        HeadState {
            sums: Sums::new(basis.len(), spec.d_value()),
            open: Open {
                keys: Buffer::zeroed((spec.d_key() + 1) * ld),
                ld,
                values: Buffer::zeroed(ld * spec.d_value() + SLACK),
            },
            scratch: vec![
                T::ZERO;
                DECODE_SCRATCH + spec.terms() + spec.d_key() + spec.d_value() + 3 * SLACK
            ],
        }
    }

    pub(crate) fn reset(&mut self) {
        for buffer in [
            &mut self.sums.sums,
            &mut self.sums.z,
            &mut self.sums.sums_low,
            &mut self.sums.z_low,
            &mut self.open.keys,
            &mut self.open.values,
        ] {
            buffer.fill(T::ZERO);
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.sums.bytes() + size_of::<T>() * (self.open.keys.len() + self.open.values.len())
    }

    /// Asks for what a step with `open` open tokens will read besides the sums, while another head
    /// is at work.
    pub(crate) fn prefetch_open(&self, open: usize) {
        const LINE: usize = 64;
        let line = LINE / size_of::<T>();
        let ask = |x: &[T]| x.iter().step_by(line).take(64).for_each(|x| prefetch(x));
        ask(&self.sums.z);
        let rows = self.open.keys.len() / self.open.ld;
        for row in 0..rows {
            ask(&self.open.keys[row * self.open.ld..][..open.min(self.open.ld)]);
        }
        ask(&self.open.values[..open * (self.open.values.len() - SLACK) / self.open.ld]);
    }

    /// Folds the first `count` tokens, all that are open, into the far sums.
    pub(crate) fn fold_open(&mut self, basis: &Basis, count: usize, work: &mut FoldWork<T>) {
        let d_value = work.d_value;
        let all = 0..basis.tiles().len();
        let HeadState { sums, open, .. } = self;
        let Some(mut far) = sums.split(basis, d_value, &[all]).pop() else {
            return;
        };
        let padded = work.padded;
        let tokens = count.next_multiple_of(TOKENS).min(open.ld);
        let values = work.values.grown(tokens * padded);
        values.fill(T::ZERO);
        for t in 0..count {
            values[t * padded..][..d_value].copy_from_slice(&open.values[t * d_value..][..d_value]);
        }
        fold_tokens(work, basis, 0..basis.tiles().len(), &open.keys, open.ld, tokens, &mut far);
        // What was folded weighs nothing as an open token.
        let weights = basis.d_key() * open.ld;
        open.keys[weights..weights + open.ld].fill(T::ZERO);
    }
}

/// Working memory for folding tokens into far sums.
#[derive(Debug)]
pub(crate) struct FoldWork<T: 'static> {
    pub kernels: &'static Kernels<T>,
    pub d_value: usize,
    pub padded: usize,
    /// `[tokens][padded]`.
    pub values: Buffer<T>,
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
            values: Buffer::zeroed(0),
            prepared: Buffer::zeroed(0),
            sums: Buffer::zeroed(TILE * padded),
            z: Buffer::zeroed(TILE * TOKENS),
            scratch: Scratch::new(basis),
        }
    }

    /// Prepares `values` (`tokens` rows) for absorbing.
    pub(crate) fn prepare(&mut self, tokens: usize) {
        let each = (self.kernels.prepared_len)(self.padded);
        if each == 0 {
            return;
        }
        let prepared = self.prepared.grown(tokens.div_ceil(PANEL) * each);
        for (panel, out) in prepared.chunks_mut(each).enumerate() {
            let first = panel * PANEL;
            let count = PANEL.min(tokens - first);
            let rows = &self.values[first * self.padded..(first + count) * self.padded];
            // SAFETY: kernels are only handed out for instruction sets that are there.
            unsafe { (self.kernels.prepare)(rows, count, self.padded, out) };
        }
    }

    /// Sums `tokens` tokens of each tile apart, then adds them to the tiles' far sums.
    pub(crate) fn fold_tiles(
        &mut self,
        basis: &Basis,
        tiles: &[Tile],
        x: &[T],
        ld: usize,
        tokens: usize,
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
                tokens: Tokens { x, ld, count: tokens },
                values: Values { rows: &self.values, prepared: &self.prepared },
                padded: self.padded,
                sums: &mut self.sums,
                z: &mut self.z,
                scratch: &mut self.scratch,
            };
            let mut part = far.part(tile.start - tiles[0].start, tile.len, self.d_value);
            // SAFETY: kernels are only handed out for instruction sets that are there.
            unsafe {
                (self.kernels.absorb)(&mut call);
                (self.kernels.fold)(&self.sums, &self.z, tile.len, self.d_value, &mut part);
            }
        }
    }
}

/// Folds `tokens` tokens whose values lie in `work` into the far sums of some tiles, which `far`
/// holds.
pub(crate) fn fold_tokens<T: Real>(
    work: &mut FoldWork<T>,
    basis: &Basis,
    tiles: std::ops::Range<usize>,
    x: &[T],
    ld: usize,
    tokens: usize,
    far: &mut Far<'_, T>,
) {
    work.prepare(tokens);
    work.fold_tiles(basis, &basis.tiles()[tiles], x, ld, tokens, far);
}
