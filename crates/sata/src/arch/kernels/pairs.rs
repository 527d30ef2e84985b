//! The backward of pairs: a panel of queries weighs keys one by one, and what their weights do to the
//! outputs is handed back to queries, keys and values.
//!
//! With weights w, D = Σ_s w_s and y = Σ_s w_s v_s / D, a loss Σ dy·y has
//!
//! ```text
//! dw_s = (dy·v_s − δ)/D,   δ = dy·y = Σ_s w_s (dy·v_s) / D,   dv_s = (w_s/D) dy
//! dx_s = w_s dw_s where weighed by exp,   exp(g_t − g_s) κ'(x_s) dw_s where by a polynomial κ
//! ```
//!
//! so that outputs are never needed. Each tile of keys is weighed relative to its own level, the
//! logarithm of about the largest weight that it could have; when all tiles are weighed, the highest
//! level is known, and D and δ with it. Then the tiles' weights, which have been kept, are used.

use super::gemm::{Left, Rows, gemm};
use super::{Sight, TOKENS, Tokens};
use crate::Real;
use crate::arch::Buffer;
use crate::arch::vector::{Vector, exp};

/// Queries of a panel.
pub(crate) const QUERIES: usize = 32;
/// Keys of a tile.
const KEYS: usize = 64;
/// Stands for the level of what weighs nothing: its exponential is 0 beside anything.
const NOTHING: f64 = -1e30;

/// Keys and values that are weighed, and their gradients.
pub(crate) struct Weighed<'a, T> {
    /// Transposed, with weights 1 or 0.
    pub keys: Tokens<'a, T>,
    /// The same row by row, `[count][padded_key]`.
    pub key_rows: &'a [T],
    /// `[count][padded]`.
    pub values: &'a [T],
    /// Logarithms of decays g of the keys, or empty.
    pub g: &'a [f64],
    /// Added to: `[count][padded_key]`.
    pub dk: &'a mut [T],
    /// Added to: `[count][padded]`.
    pub dv: &'a mut [T],
    /// Added to: Σ_t w dw of each key, `[count]`, or empty where it is not asked for.
    pub dw: &'a mut [f64],
}

/// Keys among those of [`Pairs::weighed`] that are weighed alike.
pub(crate) struct Stretch<'a, T> {
    /// Which of [`Pairs::weighed`].
    pub of: usize,
    /// What the panel's queries see of them; the length of `to` is that of the panel.
    pub sight: Sight<'a>,
    /// g at the queries' references, counted like that of the keys, or empty.
    pub own: &'a [f64],
    pub by: By<'a, T>,
}

/// How keys are weighed.
#[derive(Clone, Copy)]
pub(crate) enum By<'a, T> {
    Exponential,
    Polynomial {
        /// a_p.
        coefficients: &'a [T],
        /// g at each query less g at the last of these keys that it sees, or empty.
        gap: &'a [f64],
    },
}

/// What a panel's queries have read from sums.
#[derive(Clone, Copy)]
pub(crate) struct FromSums<'a, T> {
    /// The logarithm of what the sums are multiplied by; −10³⁰ where there are none.
    pub level: &'a [T],
    /// Their Σ w.
    pub den: &'a [T],
    /// Their Σ w (dy·v).
    pub dot: &'a [T],
}

/// Up to [`QUERIES`] queries of one head.
pub(crate) struct Pairs<'a, T> {
    pub d_key: usize,
    pub d_value: usize,
    /// Row lengths.
    pub padded_key: usize,
    pub padded: usize,
    /// Queries that exist; those up to a multiple of TOKENS are zero.
    pub count: usize,
    /// Scaled, `[d_key][QUERIES]`, and row by row, `[QUERIES][padded_key]`.
    pub queries: &'a [T],
    pub query_rows: &'a [T],
    /// dL/dy, `[d_value][QUERIES]`, and row by row, `[QUERIES][padded]`.
    pub dy: &'a [T],
    pub dy_rows: &'a [T],
    pub weighed: &'a mut [Weighed<'a, T>],
    pub stretches: &'a [Stretch<'a, T>],
    pub sums: Option<FromSums<'a, T>>,
    /// Added to: dL/dq but for the scale, `[QUERIES][padded_key]`.
    pub dq: &'a mut [T],
    /// What sums are multiplied by over D, `[QUERIES]`.
    pub factor: &'a mut [T],
    /// δ, `[QUERIES]`.
    pub delta: &'a mut [T],
    pub work: &'a mut PairsWork<T>,
}

/// Working memory of one thread.
#[derive(Debug, Default)]
pub(crate) struct PairsWork<T> {
    tiles: Vec<Tile>,
    /// `[rows][QUERIES]`: weights; then dy·v, at last dx; far, weights with κ' for κ.
    weights: Buffer<T>,
    dx: Buffer<T>,
    slopes: Buffer<T>,
    /// `[tiles][QUERIES]`: logarithm, Σ w, Σ w (dy·v) of each tile and query.
    level: Buffer<T>,
    den: Buffer<T>,
    dot: Buffer<T>,
}

/// Keys of one stretch that are weighed together.
#[derive(Clone, Copy, Debug)]
struct Tile {
    stretch: usize,
    first: usize,
    count: usize,
    /// Whether every query sees every key.
    whole: bool,
    /// Where its rows begin.
    row: usize,
    /// The last key that has a weight.
    last: usize,
}

impl<T: Real> Pairs<'_, T> {
    /// In whole vectors.
    fn padded_count(&self) -> usize {
        self.count.next_multiple_of(TOKENS)
    }

    fn check(&self) {
        let nq = self.padded_count();
        assert!(self.count > 0 && nq <= QUERIES);
        assert!(self.queries.len() >= self.d_key * QUERIES);
        assert!(self.query_rows.len() >= QUERIES * self.padded_key);
        assert!(self.dy.len() >= self.d_value * QUERIES);
        assert!(self.dy_rows.len() >= QUERIES * self.padded);
        assert!(self.dq.len() >= QUERIES * self.padded_key);
        assert!(self.factor.len() >= QUERIES && self.delta.len() >= QUERIES);
        assert!(self.padded >= self.d_value && self.padded_key >= self.d_key);
        for w in &*self.weighed {
            let n = w.keys.count;
            assert!(n.is_multiple_of(TOKENS) && n <= w.keys.ld);
            assert!(w.keys.x.len() >= (self.d_key + 1) * w.keys.ld);
            assert!(w.key_rows.len() >= n * self.padded_key && w.dk.len() >= n * self.padded_key);
            assert!(w.values.len() >= n * self.padded && w.dv.len() >= n * self.padded);
        }
        for s in self.stretches {
            assert!(
                s.sight.to.len() >= nq && (s.sight.from.is_empty() || s.sight.from.len() >= nq)
            );
            assert!(s.of < self.weighed.len());
        }
        if let Some(sums) = self.sums {
            let all = [sums.level, sums.den, sums.dot];
            assert!(all.iter().all(|x| x.len() >= QUERIES));
        }
    }

    /// Cuts the stretches into tiles.
    fn cut(&mut self) {
        let nq = self.padded_count();
        self.work.tiles.clear();
        let mut row = 0;
        for (stretch, s) in self.stretches.iter().enumerate() {
            let keys = self.weighed[s.of].keys;
            let weights = &keys.x[self.d_key * keys.ld..];
            let end = (s.sight.to[nq - 1] as usize).next_multiple_of(TOKENS).min(keys.count);
            let (from, all_from) = match s.sight.from {
                [] => (0, 0),
                from => (from[0] as usize / TOKENS * TOKENS, from[nq - 1] as usize),
            };
            // All queries see the keys before this, if they are past `all_from`.
            let all_to = s.sight.to[0] as usize;
            let edge = all_to / TOKENS * TOKENS;
            let mut first = from;
            while first < end {
                let mut next = (first + KEYS).min(end);
                if first < edge && edge < next {
                    next = edge;
                }
                if let Some(last) = (first..next).rfind(|&s| weights[s] != T::ZERO) {
                    let whole = first >= all_from && next <= all_to;
                    let count = next - first;
                    self.work.tiles.push(Tile { stretch, first, count, whole, row, last });
                    row += count;
                }
                first = next;
            }
        }
        let far = |s: &Stretch<'_, T>| matches!(s.by, By::Polynomial { .. });
        let slopes = self.stretches.iter().any(far);
        let tiles = self.work.tiles.len();
        self.work.weights.grown(row * QUERIES);
        self.work.dx.grown(row * QUERIES);
        if slopes {
            self.work.slopes.grown(row * QUERIES);
        }
        self.work.level.grown(tiles * QUERIES);
        self.work.den.grown(tiles * QUERIES);
        self.work.dot.grown(tiles * QUERIES);
    }
}

/// See the head of this page.
///
/// # Safety
/// The machine has the instructions of V, whose lanes divide the rows' lengths, and of G.
#[inline(always)]
pub(in crate::arch) unsafe fn pairs<V, G>(a: &mut Pairs<'_, V::Elem>)
where
    V: Vector,
    G: Vector<Elem = V::Elem>,
{
    a.check();
    assert!(a.padded.is_multiple_of(V::LANES) && a.padded_key.is_multiple_of(V::LANES));
    a.cut();
    // SAFETY: forwarded; lengths were checked just now.
    unsafe {
        for i in 0..a.work.tiles.len() {
            weigh::<G>(a, i);
        }
        settle::<G>(a);
        for i in 0..a.work.tiles.len() {
            hand_back::<V, G>(a, i);
        }
    }
}

/// Weights of a tile, dy·v, and their sums.
#[inline(always)]
unsafe fn weigh<G: Vector>(a: &mut Pairs<'_, G::Elem>, index: usize) {
    let nq = a.padded_count();
    let tile = a.work.tiles[index];
    let stretch = &a.stretches[tile.stretch];
    let weighed = &a.weighed[stretch.of];
    let rows = tile.row * QUERIES..(tile.row + tile.count) * QUERIES;
    let weights = &mut a.work.weights[rows.clone()];
    let dx = &mut a.work.dx[rows.clone()];
    weights.fill(Real::from_f64(0.0));
    dx.fill(Real::from_f64(0.0));
    let of_tile = index * QUERIES..(index + 1) * QUERIES;
    let level = &mut a.work.level[of_tile.clone()];
    let den = &mut a.work.den[of_tile.clone()];
    let dot = &mut a.work.dot[of_tile];
    // SAFETY: lengths were checked by `pairs`; the tile lies among the keys.
    unsafe {
        let keys = weighed.keys.x.as_ptr().add(tile.first);
        gemm::<G>(
            tile.count,
            a.d_key,
            nq,
            Left { base: keys, row: 1, step: weighed.keys.ld },
            Rows { base: a.queries.as_ptr(), stride: QUERIES },
            Rows { base: weights.as_mut_ptr(), stride: QUERIES },
        );
        gemm::<G>(
            tile.count,
            a.d_value,
            nq,
            Left {
                base: weighed.values.as_ptr().add(tile.first * a.padded),
                row: a.padded,
                step: 1,
            },
            Rows { base: a.dy.as_ptr(), stride: QUERIES },
            Rows { base: dx.as_mut_ptr(), stride: QUERIES },
        );
        let live = &weighed.keys.x[a.d_key * weighed.keys.ld + tile.first..][..tile.count];
        let tile = Scene { tile, nq, live, g: weighed.g, own: stretch.own, sight: stretch.sight };
        match stretch.by {
            By::Exponential => exponential::<G>(&tile, weights, level, den),
            By::Polynomial { coefficients, gap } => {
                let slopes = &mut a.work.slopes[rows];
                polynomial::<G>(&tile, coefficients, gap, weights, slopes, level, den);
            }
        }
        for t in (0..nq).step_by(G::LANES) {
            let (mut even, mut odd) = (zero::<G>(), zero::<G>());
            for s in (0..tile.tile.count).step_by(2) {
                let at = s * QUERIES + t;
                let next = at + QUERIES;
                let (w, x) = (weights.as_ptr(), dx.as_ptr());
                even = G::load(w.add(at)).mul_add(G::load(x.add(at)), even);
                odd = G::load(w.add(next)).mul_add(G::load(x.add(next)), odd);
            }
            even.add(odd).store(dot.as_mut_ptr().add(t));
        }
    }
}

#[inline(always)]
unsafe fn zero<V: Vector>() -> V {
    // SAFETY: forwarded.
    unsafe { V::splat(Real::from_f64(0.0)) }
}

/// A tile of keys and a panel of queries.
struct Scene<'s, T> {
    tile: Tile,
    nq: usize,
    /// Weights of the tile's keys.
    live: &'s [T],
    g: &'s [f64],
    own: &'s [f64],
    sight: Sight<'s>,
}

impl<T: Real> Scene<'_, T> {
    /// Sets what the queries do not see and what weighs 0 to `hidden`.
    fn hide(&self, rows: &mut [T], hidden: T) {
        let (mut low, mut high) = (0, if self.sight.from.is_empty() { self.nq } else { 0 });
        for (s, row) in rows.chunks_mut(QUERIES).take(self.tile.count).enumerate() {
            let key = self.tile.first + s;
            while low < self.nq && self.sight.to[low] as usize <= key {
                low += 1;
            }
            while high < self.nq && self.sight.from[high] as usize <= key {
                high += 1;
            }
            if self.live[s] == T::ZERO {
                row[..self.nq].fill(hidden);
            } else {
                row[..low].fill(hidden);
                row[high.max(low)..self.nq].fill(hidden);
            }
        }
    }

    /// g at the queries less g at the tile's last key of weight.
    fn since_last(&self) -> [f64; QUERIES] {
        let mut since = [0.0; QUERIES];
        if let Some(last) = self.g.get(self.tile.last) {
            since.iter_mut().zip(self.own).for_each(|(since, own)| *since = own - last);
        }
        since
    }

    /// g at the tile's last key of weight less g at each.
    fn before_last(&self) -> [f64; KEYS] {
        let mut before = [0.0; KEYS];
        if let Some(last) = self.g.get(self.tile.last) {
            let keys = &self.g[self.tile.first..];
            before[..self.tile.count].iter_mut().zip(keys).for_each(|(b, g)| *b = last - g);
        }
        before
    }

    /// `from` of each query and g at each key, counted from the tile's first, as two numbers each.
    fn split(&self, from: &[f64]) -> Split<T> {
        let mut split = Split { queries: [[T::ZERO; QUERIES]; 2], keys: [[T::ZERO; KEYS]; 2] };
        if let Some(base) = self.g.get(self.tile.first) {
            let Split { queries: [high, low], keys: [key_high, key_low] } = &mut split;
            for (i, g) in from.iter().enumerate().take(QUERIES) {
                (high[i], low[i]) = parts(g - base);
            }
            let keys = &self.g[self.tile.first..];
            for (i, g) in keys.iter().enumerate().take(self.tile.count) {
                (key_high[i], key_low[i]) = parts(g - base);
            }
        }
        split
    }
}

/// Decays of a tile's pairs: exp(queries − keys).
struct Split<T> {
    queries: [[T; QUERIES]; 2],
    keys: [[T; KEYS]; 2],
}

fn parts<T: Real>(g: f64) -> (T, T) {
    let lowest = T::LOWEST.to_f64();
    let high = T::from_f64(g.clamp(lowest, -lowest));
    (high, T::from_f64((g - high.to_f64()).clamp(lowest, -lowest)))
}

impl<T: Real> Split<T> {
    #[inline(always)]
    unsafe fn log<V: Vector<Elem = T>>(&self, s: usize, t: usize) -> V {
        // SAFETY: forwarded; s and t lie in the tile.
        unsafe {
            let large = V::load(self.queries[0].as_ptr().add(t)).sub(V::splat(self.keys[0][s]));
            large.add(V::load(self.queries[1].as_ptr().add(t)).sub(V::splat(self.keys[1][s])))
        }
    }
}

/// Logits become weights by exp, relative to the largest of the tile.
#[inline(always)]
unsafe fn exponential<V: Vector>(
    a: &Scene<'_, V::Elem>,
    rows: &mut [V::Elem],
    level: &mut [V::Elem],
    den: &mut [V::Elem],
) {
    let (nq, count) = (a.nq, a.tile.count);
    let fades = !a.g.is_empty();
    let mut offsets = [V::Elem::ZERO; KEYS];
    let mut since = [V::Elem::ZERO; QUERIES];
    let mut plain = true;
    // SAFETY: forwarded; rows cover the tile.
    unsafe {
        if a.tile.whole {
            let before = a.before_last();
            for ((offset, &before), &live) in offsets.iter_mut().zip(&before).zip(a.live) {
                let hidden = live == V::Elem::ZERO;
                *offset = if hidden { V::Elem::LOWEST } else { Real::from_f64(before) };
                plain &= *offset == V::Elem::ZERO;
            }
            for (to, from) in since.iter_mut().zip(a.since_last()) {
                *to = Real::from_f64(from.max(NOTHING));
            }
        } else {
            if fades {
                let split = a.split(a.own);
                for s in 0..count {
                    for t in (0..nq).step_by(V::LANES) {
                        let at = rows.as_mut_ptr().add(s * QUERIES + t);
                        V::load(at).add(split.log::<V>(s, t)).store(at);
                    }
                }
            }
            a.hide(rows, V::Elem::LOWEST);
        }
        let nothing = V::splat(Real::from_f64(NOTHING));
        let rows = rows.as_mut_ptr();
        for t in (0..nq).step_by(V::LANES) {
            let mut top = [nothing; 4];
            for s in (0..count).step_by(4) {
                for (i, top) in top.iter_mut().enumerate() {
                    let at = rows.add((s + i) * QUERIES + t);
                    let mut x = V::load(at);
                    if !plain {
                        x = x.add(V::splat(offsets[s + i]));
                        x.store(at);
                    }
                    *top = top.max(x);
                }
            }
            let top = top[0].max(top[1]).max(top[2].max(top[3]));
            let mut total = [zero::<V>(); 2];
            for s in (0..count).step_by(2) {
                for (i, total) in total.iter_mut().enumerate() {
                    let at = rows.add((s + i) * QUERIES + t);
                    let weight = exp(V::load(at).sub(top));
                    weight.store(at);
                    *total = total.add(weight);
                }
            }
            total[0].add(total[1]).store(den.as_mut_ptr().add(t));
            top.add(V::load(since.as_ptr().add(t))).max(nothing).store(level.as_mut_ptr().add(t));
        }
    }
}

/// Logits become weights by a polynomial κ, and the same with κ' for κ in `slopes`.
#[inline(always)]
unsafe fn polynomial<V: Vector>(
    a: &Scene<'_, V::Elem>,
    coefficients: &[V::Elem],
    gap: &[f64],
    rows: &mut [V::Elem],
    slopes: &mut [V::Elem],
    level: &mut [V::Elem],
    den: &mut [V::Elem],
) {
    let (nq, count) = (a.nq, a.tile.count);
    let fades = !a.g.is_empty();
    let mut factors = [V::Elem::ZERO; KEYS];
    let mut split = None;
    if a.tile.whole {
        for ((factor, before), &live) in factors.iter_mut().zip(a.before_last()).zip(a.live) {
            *factor = crate::state::faded::<V::Elem>(before) * live;
        }
        for (level, since) in level.iter_mut().zip(a.since_last()) {
            *level = Real::from_f64(since.max(NOTHING));
        }
    } else {
        factors[..count].copy_from_slice(a.live);
        if fades {
            // g at the last key that each sees.
            let mut anchor = [0.0; QUERIES];
            for ((anchor, own), gap) in anchor.iter_mut().zip(a.own).zip(gap) {
                *anchor = own - gap;
            }
            split = Some(a.split(&anchor));
        }
        level.fill(V::Elem::ZERO);
        for (level, gap) in level.iter_mut().zip(gap) {
            *level = Real::from_f64(gap.max(NOTHING));
        }
    }
    // SAFETY: forwarded; rows cover the tile.
    unsafe {
        let (x, slopes_at) = (rows.as_mut_ptr(), slopes.as_mut_ptr());
        for (s, &factor) in factors[..count].iter().enumerate() {
            for t in (0..nq).step_by(V::LANES) {
                let at = s * QUERIES + t;
                let x = x.add(at);
                let logit = V::load(x);
                let (mut w, mut slope) = (zero::<V>(), zero::<V>());
                for &a in coefficients.iter().rev() {
                    slope = slope.mul_add(logit, w);
                    w = w.mul_add(logit, V::splat(a));
                }
                let mut factor = V::splat(factor);
                if let Some(split) = &split {
                    // Keys later than the last one seen are hidden below.
                    let lost = zero::<V>().sub(split.log::<V>(s, t)).max(zero());
                    factor = factor.mul(exp(zero::<V>().sub(lost)));
                }
                w.mul(factor).store(x);
                slope.mul(factor).store(slopes_at.add(at));
            }
        }
        if !a.tile.whole {
            a.hide(rows, V::Elem::ZERO);
            a.hide(slopes, V::Elem::ZERO);
            // What sees nothing here has no level.
            let end = a.tile.first + count;
            for (t, level) in level.iter_mut().enumerate().take(nq) {
                let from = a.sight.from.get(t).map_or(0, |&from| from as usize).max(a.tile.first);
                let to = (a.sight.to[t] as usize).min(end);
                if !(from..to).any(|s| a.live[s - a.tile.first] != V::Elem::ZERO) {
                    *level = Real::from_f64(NOTHING);
                }
            }
        }
        for t in (0..nq).step_by(V::LANES) {
            let mut total = [zero::<V>(); 2];
            for s in (0..count).step_by(2) {
                for (i, total) in total.iter_mut().enumerate() {
                    *total = total.add(V::load(rows.as_ptr().add((s + i) * QUERIES + t)));
                }
            }
            total[0].add(total[1]).store(den.as_mut_ptr().add(t));
        }
    }
}

/// All tiles have been weighed: δ, and what each tile's weights are to be multiplied by, which takes
/// the place of its level.
#[inline(always)]
unsafe fn settle<V: Vector>(a: &mut Pairs<'_, V::Elem>) {
    let nq = a.padded_count();
    let tiles = a.work.tiles.len();
    let mut seen = [V::Elem::ZERO; QUERIES];
    // SAFETY: forwarded; all arrays hold QUERIES elements, or that for every tile.
    unsafe {
        let level = a.work.level.as_mut_ptr();
        let (den, dot) = (a.work.den.as_ptr(), a.work.dot.as_ptr());
        for t in (0..nq).step_by(V::LANES) {
            let mut top = V::splat(Real::from_f64(NOTHING));
            if let Some(sums) = a.sums {
                top = top.max(V::load(sums.level.as_ptr().add(t)));
            }
            for i in 0..tiles {
                top = top.max(V::load(level.add(i * QUERIES + t)));
            }
            top.store(seen.as_mut_ptr().add(t));
            let (mut total, mut all) = (zero::<V>(), zero::<V>());
            let factor = a.factor.as_mut_ptr().add(t);
            zero::<V>().store(factor);
            if let Some(sums) = a.sums {
                let by = exp(V::load(sums.level.as_ptr().add(t)).sub(top));
                by.store(factor);
                total = by.mul_add(V::load(sums.den.as_ptr().add(t)), total);
                all = by.mul_add(V::load(sums.dot.as_ptr().add(t)), all);
            }
            for i in 0..tiles {
                let at = i * QUERIES + t;
                let by = exp(V::load(level.add(at)).sub(top));
                by.store(level.add(at));
                total = by.mul_add(V::load(den.add(at)), total);
                all = by.mul_add(V::load(dot.add(at)), all);
            }
            total.store(a.delta.as_mut_ptr().add(t));
            let mut dots = [V::Elem::ZERO; QUERIES];
            all.store(dots.as_mut_ptr());
            for (i, all) in dots.into_iter().enumerate().take(V::LANES) {
                let total = a.delta[t + i];
                // A query that sees nothing, or is none, has no gradient.
                let none = t + i >= a.count || seen[t + i] <= Real::from_f64(NOTHING);
                let inverse = if none { V::Elem::ZERO } else { V::Elem::ONE / total };
                a.delta[t + i] = if none { V::Elem::ZERO } else { all * inverse };
                seen[t + i] = inverse;
            }
            let inverse = V::load(seen.as_ptr().add(t));
            V::load(factor).mul(inverse).store(factor);
            for i in 0..tiles {
                let at = level.add(i * QUERIES + t);
                V::load(at).mul(inverse).store(at);
            }
        }
    }
}

/// What a tile's weights do to queries, keys and values.
#[inline(always)]
unsafe fn hand_back<V, G>(a: &mut Pairs<'_, V::Elem>, index: usize)
where
    V: Vector,
    G: Vector<Elem = V::Elem>,
{
    let nq = a.padded_count();
    let tile = a.work.tiles[index];
    let stretch = &a.stretches[tile.stretch];
    let far = matches!(stretch.by, By::Polynomial { .. });
    let weighed = &mut a.weighed[stretch.of];
    let rows = tile.row * QUERIES..(tile.row + tile.count) * QUERIES;
    let weights = &mut a.work.weights[rows.clone()];
    let dx = &mut a.work.dx[rows.clone()];
    let slopes = if far { &a.work.slopes[rows] } else { &[][..] };
    let factors = &a.work.level[index * QUERIES..];
    let asked = !weighed.dw.is_empty();
    // SAFETY: lengths were checked by `pairs`; the tile lies among the keys.
    unsafe {
        let (w_at, x_at) = (weights.as_mut_ptr(), dx.as_mut_ptr());
        let (factors, delta) = (factors.as_ptr(), a.delta.as_ptr());
        for s in 0..tile.count {
            let mut total = zero::<G>();
            for t in (0..nq).step_by(G::LANES) {
                let at = s * QUERIES + t;
                let factor = G::load(factors.add(t));
                let w = G::load(w_at.add(at)).mul(factor);
                let dw = G::load(x_at.add(at)).sub(G::load(delta.add(t)));
                let both = w.mul(dw);
                w.store(w_at.add(at));
                if far {
                    G::load(slopes.as_ptr().add(at)).mul(factor).mul(dw).store(x_at.add(at));
                } else {
                    both.store(x_at.add(at));
                }
                total = total.add(both);
            }
            if asked {
                weighed.dw[tile.first + s] += total.sum().to_f64();
            }
        }
        gemm::<V>(
            tile.count,
            nq,
            a.padded,
            Left { base: w_at, row: QUERIES, step: 1 },
            Rows { base: a.dy_rows.as_ptr(), stride: a.padded },
            Rows { base: weighed.dv.as_mut_ptr().add(tile.first * a.padded), stride: a.padded },
        );
        gemm::<V>(
            tile.count,
            nq,
            a.padded_key,
            Left { base: x_at, row: QUERIES, step: 1 },
            Rows { base: a.query_rows.as_ptr(), stride: a.padded_key },
            Rows {
                base: weighed.dk.as_mut_ptr().add(tile.first * a.padded_key),
                stride: a.padded_key,
            },
        );
        gemm::<V>(
            nq,
            tile.count,
            a.padded_key,
            Left { base: x_at, row: 1, step: QUERIES },
            Rows {
                base: weighed.key_rows.as_ptr().add(tile.first * a.padded_key),
                stride: a.padded_key,
            },
            Rows { base: a.dq.as_mut_ptr(), stride: a.padded_key },
        );
    }
}
