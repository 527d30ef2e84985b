//! Raw tokens around a call's queries, in the kernels' layout.

use std::ops::Range;

use super::method::Method;
use super::{Piece, load};
use crate::arch::{Buffer, TOKENS, Tokens, stride};
use crate::state::{Mark, Raw, running};
use crate::{Element, Real};

/// The tokens of one key/value head of one sequence, counted from its first open token: those that
/// are open, then the call's.
pub(super) struct Source<'u, 'a, E: Element> {
    pub method: &'u Method<E::Compute>,
    pub piece: &'u Piece<'a, E>,
    pub kv_head: usize,
    /// How many are open, and their raw keys and values.
    pub open: usize,
    pub raw: Option<&'u Raw<E::Compute>>,
    /// Tokens of the sequence before the first open one.
    pub folded: u64,
}

impl<E: Element> Clone for Source<'_, '_, E> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<E: Element> Copy for Source<'_, '_, E> {}

/// Where raw tokens go.
pub(super) struct Room<'r, T> {
    /// `[d_key + 1][ld]`.
    pub keys: &'r mut [T],
    pub ld: usize,
    /// Rows of `stride`.
    pub values: &'r mut [T],
    pub stride: usize,
    /// `[ld]`, or empty where nothing fades.
    pub fading: &'r mut [f64],
}

impl<E: Element> Source<'_, '_, E> {
    /// Brings tokens `range` of the call to place `at`; those in `sinks`, if any, stay out: they
    /// get weight 0.
    pub(super) fn bring(
        &self,
        range: Range<usize>,
        room: Room<'_, E::Compute>,
        at: usize,
        without_sinks: bool,
    ) {
        let Room { keys, ld, values, stride, fading } = room;
        let (method, piece, head) = (self.method, self.piece, self.kv_head);
        load::keys(piece, head, range.clone(), keys, ld, at);
        load::values(piece, head, range.clone(), values, stride, at);
        let weights = method.d_key * ld;
        if let Some(centre) = method.key_centre(head) {
            for (channel, &c) in centre.iter().enumerate() {
                let c = E::Compute::from_f64(c);
                for t in at..at + range.len() {
                    if keys[weights + t] != E::Compute::ZERO {
                        keys[channel * ld + t] = keys[channel * ld + t] - c;
                    }
                }
            }
        }
        if let Some(centre) = method.value_centre(head) {
            for row in values[at * stride..].chunks_mut(stride).take(range.len()) {
                for (v, &c) in row.iter_mut().zip(centre) {
                    *v = *v - E::Compute::from_f64(c);
                }
            }
        }
        if without_sinks {
            let seen = self.folded + self.open as u64 + range.start as u64;
            let sinks = (method.sinks as u64).saturating_sub(seen).min(range.len() as u64) as usize;
            if sinks > 0 {
                load::clear(keys, ld, method.d_key + 1, at..at + sinks);
            }
        }
        for (log, token) in fading.iter_mut().skip(at).zip(range) {
            *log = piece.fading(head, token);
        }
    }

    /// Puts those of the call's tokens that are sinks where sinks are kept. `total` is g at the
    /// last folded token.
    pub(super) fn keep_sinks(&self, sinks: &mut Raw<E::Compute>, total: f64) {
        let seen = (self.folded + self.open as u64).min(self.method.sinks as u64) as usize;
        let count = (self.method.sinks - seen).min(self.piece.keys);
        if count == 0 {
            return;
        }
        let room = Room {
            keys: &mut sinks.keys,
            ld: sinks.ld,
            values: &mut sinks.values,
            stride: self.method.d_value,
            fading: &mut sinks.fading,
        };
        self.bring(0..count, room, seen, false);
        if self.method.fades {
            let open = self.raw.map_or(0.0, |raw| raw.fading[..self.open].iter().sum());
            let mut g: f64 = total + open;
            for log in &mut sinks.fading[seen..seen + count] {
                g += *log;
                *log = g;
            }
        }
    }
}

/// A stretch of tokens ready to be weighed.
#[derive(Default)]
pub(super) struct Window<T> {
    /// `[d_key + 1][ld]`.
    pub keys: Buffer<T>,
    pub ld: usize,
    pub count: usize,
    /// `[ld][padded]`.
    pub values: Buffer<T>,
    /// g at each token less g at the last before the window; empty where nothing fades.
    pub g: Vec<f64>,
    /// The same as two numbers each, and whatever for those beyond.
    pub split: [Buffer<T>; 2],
    /// For i = 0 … count: how many tokens there are up to the last before i that has a weight.
    pub live: Vec<u32>,
}

impl<T: Real> Window<T> {
    /// Room for `tokens` tokens.
    pub(super) fn new(method: &Method<T>, tokens: usize) -> Self {
        let ld = stride(tokens);
        let fading = if method.fades { ld } else { 0 };
        Window {
            keys: Buffer::zeroed((method.d_key + 1) * ld),
            ld,
            count: 0,
            values: Buffer::zeroed(ld * method.padded),
            g: Vec::with_capacity(fading),
            split: [Buffer::zeroed(fading), Buffer::zeroed(fading)],
            live: Vec::with_capacity(ld + 1),
        }
    }

    /// Loads tokens `range`; those up to a multiple of TOKENS are zero.
    pub(super) fn load<E: Element<Compute = T>>(
        &mut self,
        source: Source<'_, '_, E>,
        range: Range<usize>,
    ) {
        let method = source.method;
        let (d_key, padded, ld) = (method.d_key, method.padded, self.ld);
        self.count = range.len();
        let old = range.start.min(source.open)..range.end.min(source.open);
        let mut fading = vec![0.0; if method.fades { self.count } else { 0 }];
        if let Some(raw) = source.raw {
            self.copy(raw, old.clone(), method.d_value, padded, &mut fading);
        }
        let new =
            range.start.max(source.open) - source.open..range.end.max(source.open) - source.open;
        let room = Room {
            keys: &mut self.keys,
            ld,
            values: &mut self.values,
            stride: padded,
            fading: &mut fading,
        };
        source.bring(new, room, old.len(), true);
        self.finish(d_key, padded, &fading);
    }

    /// Loads the first `count` raw tokens.
    pub(super) fn load_raw(&mut self, method: &Method<T>, raw: &Raw<T>, count: usize) {
        let mut fading = vec![0.0; if method.fades { count } else { 0 }];
        self.count = count;
        self.copy(raw, 0..count, method.d_value, method.padded, &mut fading);
        self.finish(method.d_key, method.padded, &fading);
    }

    fn copy(
        &mut self,
        raw: &Raw<T>,
        old: Range<usize>,
        d_value: usize,
        padded: usize,
        fading: &mut [f64],
    ) {
        let rows = raw.keys.len() / raw.ld.max(1);
        for row in 0..rows {
            let from = &raw.keys[row * raw.ld..][old.clone()];
            self.keys[row * self.ld..][..old.len()].copy_from_slice(from);
        }
        for (t, token) in old.clone().enumerate() {
            let to = &mut self.values[t * padded..(t + 1) * padded];
            to[d_value..].fill(T::ZERO);
            to[..d_value].copy_from_slice(&raw.values[token * d_value..][..d_value]);
        }
        for (to, token) in fading.iter_mut().zip(old) {
            *to = raw.fading[token];
        }
    }

    fn finish(&mut self, d_key: usize, padded: usize, fading: &[f64]) {
        let end = self.count.next_multiple_of(TOKENS);
        load::clear(&mut self.keys, self.ld, d_key + 1, self.count..end);
        self.values[self.count * padded..end * padded].fill(T::ZERO);
        self.g = running(fading);
        let [high, low] = &mut self.split;
        for (i, &g) in self.g.iter().enumerate() {
            (high[i], low[i]) = split(g);
        }
        let weights = &self.keys[d_key * self.ld..][..self.count];
        self.live.clear();
        self.live.push(0);
        let mut last = 0;
        for (i, &weight) in weights.iter().enumerate() {
            if weight != T::ZERO {
                last = i as u32 + 1;
            }
            self.live.push(last);
        }
    }

    /// Makes ready to fold the first `count` tokens: sets their weights in the window, gives the
    /// factor that is left of the sums and what the weights were.
    pub(super) fn begin_fold(
        &mut self,
        d_key: usize,
        count: usize,
        mark: &mut Mark,
    ) -> (T, Vec<T>) {
        let Window { keys, ld, g, .. } = self;
        let padded = count.next_multiple_of(TOKENS);
        let weights = &mut keys[d_key * *ld..][..padded];
        let before = weights.to_vec();
        weights[count..].fill(T::ZERO);
        let live = |i: usize| before[i] != T::ZERO;
        let g = &g[..count.min(g.len())];
        let factor = mark.fold(count, g, live, |i, w| weights[i] = w);
        (factor, before)
    }

    /// Puts the weights back.
    pub(super) fn end_fold(&mut self, d_key: usize, before: &[T]) {
        self.keys[d_key * self.ld..][..before.len()].copy_from_slice(before);
    }

    /// g at the `count`-th token, at the last before the window for 0.
    pub(super) fn g_after(&self, count: usize) -> f64 {
        count.checked_sub(1).and_then(|last| self.g.get(last)).copied().unwrap_or(0.0)
    }

    /// Its first `count` tokens, in whole vectors.
    pub(super) fn tokens(&self, count: usize) -> Tokens<'_, T> {
        Tokens { x: &self.keys, ld: self.ld, count: count.next_multiple_of(TOKENS) }
    }

    /// Logarithms of decays of the tokens as kernels take them.
    pub(super) fn fading(&self) -> [&[T]; 2] {
        [&self.split[0], &self.split[1]]
    }
}

/// g as the sum of two numbers, both finite.
pub(super) fn split<T: Real>(g: f64) -> (T, T) {
    let lowest = T::LOWEST.to_f64();
    let high = T::from_f64(g.clamp(lowest, -lowest));
    (high, T::from_f64((g - high.to_f64()).clamp(lowest, -lowest)))
}

/// Sinks as kernels take them.
#[derive(Default)]
pub(super) struct Sinks<T> {
    pub keys: Buffer<T>,
    pub ld: usize,
    pub count: usize,
    /// `[ld][padded]`.
    pub values: Buffer<T>,
    pub split: [Buffer<T>; 2],
    /// g since the sequence's start of each that has a weight, and its place; where they fade.
    live: Vec<(usize, f64)>,
}

impl<T: Real> Sinks<T> {
    /// g at the last of the first `count` that has a weight.
    pub(super) fn last(&self, count: usize) -> Option<f64> {
        self.live.iter().rfind(|(i, _)| *i < count).map(|(_, g)| *g)
    }

    /// The first `count` tokens of `raw`.
    pub(super) fn new(method: &Method<T>, raw: &Raw<T>, count: usize) -> Self {
        let mut values = Buffer::zeroed(raw.ld * method.padded);
        for t in 0..count {
            values[t * method.padded..][..method.d_value]
                .copy_from_slice(&raw.values[t * method.d_value..][..method.d_value]);
        }
        let mut both = [Buffer::zeroed(raw.ld), Buffer::zeroed(raw.ld)];
        for (i, &g) in raw.fading.iter().enumerate().take(count) {
            (both[0][i], both[1][i]) = split(g);
        }
        let live = (0..count.min(raw.fading.len())).filter(|&i| raw.is_live(method.d_key, i));
        let live = live.map(|i| (i, raw.fading[i])).collect();
        Sinks { keys: raw.keys.clone(), ld: raw.ld, count, values, split: both, live }
    }
}
