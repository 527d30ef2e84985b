//! One head's past: far sums, raw tokens that are open, sinks.

use super::mark::{Mark, running};
use super::sums::{FoldWork, SLACK, Sums};
use crate::arch::{Buffer, DECODE_SCRATCH, TOKENS, Tokens, prefetch};
use crate::basis::Basis;
use crate::{Decay, Near, Real, Spec};

/// Raw keys and values of some tokens.
#[derive(Clone, Debug)]
pub(crate) struct Raw<T> {
    /// `[d_key + 1][ld]`, transposed; the last row holds the weights, 1 or 0. A token of weight 0
    /// has a key of 0.
    pub keys: Buffer<T>,
    /// Tokens there is room for, a multiple of TOKENS.
    pub ld: usize,
    /// `[ld][d_value]` and slack.
    pub values: Buffer<T>,
    /// Logarithms, `[ld]`, where there is decay: of each open token's own; of all since the
    /// sequence's start for a sink.
    pub fading: Vec<f64>,
}

impl<T: Real> Raw<T> {
    /// Room for `tokens` tokens, which may fade.
    pub(crate) fn new([d_key, d_value]: [usize; 2], tokens: usize, fades: bool) -> Self {
        let ld = tokens.next_multiple_of(TOKENS);
        Raw {
            keys: Buffer::zeroed((d_key + 1) * ld),
            ld,
            values: Buffer::zeroed(ld * d_value + SLACK),
            fading: vec![0.0; if fades { ld } else { 0 }],
        }
    }

    /// Whether token `i` has a weight.
    pub(crate) fn is_live(&self, d_key: usize, i: usize) -> bool {
        self.keys[d_key * self.ld + i] != T::ZERO
    }

    /// Whether the weight of token `i` is 1, or 0 with a key of 0.
    pub(crate) fn is_sound(&self, d_key: usize, i: usize) -> bool {
        let weight = self.keys[d_key * self.ld + i];
        let gone = || (0..d_key).all(|c| self.keys[c * self.ld + i] == T::ZERO);
        weight == T::ONE || (weight == T::ZERO && gone())
    }

    /// Copies token `at` of `from` to place `to`.
    pub(crate) fn copy(&mut self, from: &Self, d_key: usize, d_value: usize, at: usize, to: usize) {
        for row in 0..=d_key {
            self.keys[row * self.ld + to] = from.keys[row * from.ld + at];
        }
        self.values[to * d_value..][..d_value]
            .copy_from_slice(&from.values[at * d_value..][..d_value]);
        if let Some(fading) = self.fading.get_mut(to) {
            *fading = from.fading[at];
        }
    }

    /// Forgets the first `count` of `all` tokens: the others move up, and what they leave is 0.
    pub(crate) fn shift(&mut self, d_key: usize, d_value: usize, count: usize, all: usize) {
        for row in self.keys.chunks_mut(self.ld.max(1)).take(d_key + 1) {
            row.copy_within(count..all, 0);
            row[all - count..all].fill(T::ZERO);
        }
        self.values.copy_within(count * d_value..all * d_value, 0);
        self.values[(all - count) * d_value..all * d_value].fill(T::ZERO);
        if !self.fading.is_empty() {
            self.fading.copy_within(count..all, 0);
            self.fading[all - count..all].fill(0.0);
        }
    }

    fn bytes(&self) -> usize {
        size_of::<T>() * (self.keys.len() + self.values.len()) + 8 * self.fading.len()
    }
}

/// One head's past.
#[derive(Clone, Debug)]
pub(crate) struct HeadState<T> {
    pub sums: Sums<T>,
    pub mark: Mark,
    pub open: Raw<T>,
    pub sinks: Raw<T>,
    /// The largest |k|² so far, less the centre.
    pub reach: f64,
    /// Working memory of a decode step.
    pub work: OneWork<T>,
}

/// Working memory for one query at a time.
#[derive(Clone, Debug, Default)]
pub(crate) struct OneWork<T> {
    /// For the kernels.
    pub kernel: Vec<T>,
    /// `[d_key]` and slack.
    pub query: Vec<T>,
    /// `[planes][d_value and slack]`.
    pub num: Vec<T>,
    /// `[planes]`.
    pub den: Vec<T>,
    /// `[P]`.
    pub coefficients: Vec<T>,
    /// Decays of the open tokens, far and near, and of the sinks.
    pub fading: [Vec<T>; 3],
    /// g at the open tokens.
    pub g: Vec<f64>,
}

impl<T: Real> OneWork<T> {
    fn new(spec: &Spec, open: usize, sinks: usize) -> Self {
        let planes = spec.orders().len();
        let fades = usize::from(spec.decay() != Decay::None);
        OneWork {
            kernel: vec![T::ZERO; DECODE_SCRATCH + spec.orders().last().unwrap_or(&0) + 1],
            query: vec![T::ZERO; spec.d_key() + SLACK],
            num: vec![T::ZERO; planes * (spec.d_value() + SLACK)],
            den: vec![T::ZERO; planes],
            coefficients: vec![T::ZERO; spec.terms().max(spec.orders().last().unwrap_or(&0) + 1)],
            fading: [open, open, sinks].map(|n| vec![T::ZERO; n * fades]),
            g: Vec::with_capacity(open * fades),
        }
    }
}

/// Tokens that wait before the oldest block is folded: the blocks that are near to a query.
pub(crate) fn capacity(spec: &Spec) -> usize {
    match spec.near() {
        Near::None => spec.block(),
        Near::Blocks(n) => n.saturating_add(1).saturating_mul(spec.block()),
    }
}

impl<T: Real> HeadState<T> {
    /// With room for so many open tokens and sinks.
    pub(crate) fn new(spec: &Spec, basis: &Basis, [open, sinks]: [usize; 2]) -> Self {
        let (sizes, fades) = ([spec.d_key(), spec.d_value()], spec.decay() != Decay::None);
        let open = Raw::new(sizes, open, fades);
        let sinks = Raw::new(sizes, sinks, fades);
        HeadState {
            sums: Sums::new(basis.len(), spec.d_value()),
            mark: Mark::default(),
            work: OneWork::new(spec, open.ld, sinks.ld),
            open,
            sinks,
            reach: 0.0,
        }
    }

    pub(crate) fn reset(&mut self) {
        self.sums.clear();
        for buffer in [
            &mut self.open.keys,
            &mut self.open.values,
            &mut self.sinks.keys,
            &mut self.sinks.values,
        ] {
            buffer.fill(T::ZERO);
        }
        self.open.fading.fill(0.0);
        self.sinks.fading.fill(0.0);
        self.mark = Mark::default();
        self.reach = 0.0;
    }

    pub(crate) fn bytes(&self) -> usize {
        self.sums.bytes() + self.open.bytes() + self.sinks.bytes()
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

    /// Folds the first `count` of `open` open tokens into the far sums; the others move up.
    pub(crate) fn fold_open(
        &mut self,
        basis: &Basis,
        count: usize,
        open: usize,
        work: &mut FoldWork<T>,
    ) {
        if count == 0 {
            return;
        }
        let g = running(&self.open.fading[..count.min(self.open.fading.len())]);
        let raw = std::mem::replace(&mut self.open, Raw::empty());
        self.fold_raw(basis, &raw, 0..count, &g, |_| true, work);
        self.open = raw;
        self.open.shift(basis.d_key(), work.d_value, count, open);
    }

    /// Folds some tokens of `raw` that follow the last one folded; `g` as for [`Mark::fold`], and
    /// those that are not to be `summed` only let the past fade.
    pub(crate) fn fold_raw(
        &mut self,
        basis: &Basis,
        raw: &Raw<T>,
        which: std::ops::Range<usize>,
        g: &[f64],
        summed: impl Fn(usize) -> bool,
        work: &mut FoldWork<T>,
    ) {
        let (d_key, d_value, padded) = (basis.d_key(), work.d_value, work.padded);
        let (first, count) = (which.start, which.len());
        let ld = count.next_multiple_of(TOKENS);
        let mut keys = Buffer::zeroed((d_key + 1) * ld);
        let mut values = Buffer::zeroed(ld * padded);
        for row in 0..=d_key {
            keys[row * ld..][..count].copy_from_slice(&raw.keys[row * raw.ld + first..][..count]);
        }
        for t in 0..count {
            values[t * padded..][..d_value]
                .copy_from_slice(&raw.values[(first + t) * d_value..][..d_value]);
        }
        let weights = &mut keys[d_key * ld..];
        let live: Vec<bool> =
            (0..count).map(|i| weights[i] != T::ZERO && summed(first + i)).collect();
        for (weight, live) in weights.iter_mut().zip(&live) {
            *weight = if *live { T::ONE } else { T::ZERO };
        }
        let factor = self.mark.fold(count, g, |i| live[i], |i, w| weights[i] = w);
        let tokens = Tokens { x: &keys, ld, count: ld };
        let all = 0..basis.tiles().len();
        if let Some(mut far) = self.sums.split(basis, d_value, &[all]).pop() {
            work.prepare(&values, ld);
            work.fold_tiles(basis, basis.tiles(), tokens, &values, factor, &mut far);
        }
    }
}

impl<T: Real> Raw<T> {
    fn empty() -> Self {
        Raw { keys: Buffer::default(), ld: 0, values: Buffer::default(), fading: vec![] }
    }
}
