//! The direct form: panels of queries weigh tiles of keys one by one.

use super::gemm::{Left, Rows, gemm};
use super::{Coefficients, Direct, Fading, Moments, PANEL, Sight, TOKENS, Tokens};
use crate::Real;
use crate::arch::vector::{Vector, exp};
use crate::basis::TILE;

/// Orders whose sums fit in registers.
const MOMENTS: usize = 8;

/// Up to a panel of queries and a tile of keys.
struct Block {
    queries: usize,
    query_count: usize,
    keys: usize,
    key_count: usize,
}

/// The blocks of a call in which any query sees any key, queries by queries.
fn blocks<'s>(nq: usize, nk: usize, sight: Sight<'s>) -> impl Iterator<Item = Block> + 's {
    let mut queries = 0;
    std::iter::from_fn(move || {
        if queries >= nq {
            return None;
        }
        // Half panels on a diagonal: less of a tile is computed in vain.
        let mut query_count = PANEL.min(nq - queries);
        let ends = sight.to.get(queries).zip(sight.to.get(queries + query_count - 1));
        if ends.is_some_and(|(first, last)| first != last) {
            query_count = (PANEL / 2).min(query_count);
        }
        let first = queries;
        queries += query_count;
        let from = sight.from.get(first).map_or(0, |&from| from as usize / TOKENS * TOKENS);
        let to = sight.to.get(queries - 1).map_or(nk, |&to| (to as usize).min(nk));
        Some((from..to).step_by(TILE).map(move |keys| {
            let key_count = TILE.min((to - keys).next_multiple_of(TOKENS));
            Block { queries: first, query_count, keys, key_count }
        }))
    })
    .flatten()
}

/// What of `sight` concerns a block's queries.
fn seen<'s>(sight: Sight<'s>, block: &Block) -> Sight<'s> {
    let queries = block.queries..block.queries + block.query_count;
    let part = |x: &'s [u32]| x.get(queries.clone()).unwrap_or_default();
    Sight { from: part(sight.from), to: part(sight.to) }
}

/// What of the decays concerns a block.
fn faded<'s, T>(fading: Option<Fading<'s, T>>, block: &Block) -> Option<Fading<'s, T>> {
    fading.map(|Fading { queries, keys }| Fading {
        queries: queries.map(|g| &g[block.queries..][..block.query_count]),
        keys: keys.map(|g| &g[block.keys..][..block.key_count]),
    })
}

fn part<'s, T: Real>(tokens: Tokens<'s, T>, at: usize, count: usize) -> Tokens<'s, T> {
    Tokens { x: &tokens.x[at..], ld: tokens.ld, count }
}

/// A block's logits and weights in the making, `[key][PANEL]`.
struct Panel<'p, T> {
    d_key: usize,
    queries: Tokens<'p, T>,
    keys: Tokens<'p, T>,
    /// Of the block's first key.
    first: usize,
    sight: Sight<'p>,
    fading: Option<Fading<'p, T>>,
    panel: &'p mut [T],
}

impl<T: Real> Panel<'_, T> {
    fn check(&self) {
        let (nq, nk) = (self.queries.count, self.keys.count);
        assert!(nq <= PANEL && nq.is_multiple_of(TOKENS));
        assert!(nk <= TILE && nk.is_multiple_of(TOKENS) && self.panel.len() >= TILE * PANEL);
        assert!(self.queries.x.len() >= (self.d_key - 1) * self.queries.ld + nq);
        assert!(self.keys.x.len() >= self.d_key * self.keys.ld + nk);
    }

    /// Weights of the keys.
    fn weights(&self) -> &[T] {
        &self.keys.x[self.d_key * self.keys.ld..][..self.keys.count]
    }

    /// Sets what the queries do not see to `hidden`.
    fn mask(&mut self, hidden: T) {
        let (nq, nk, first) = (self.queries.count, self.keys.count, self.first);
        // Queries `low .. high` see key s; both ends only grow with s.
        let (mut low, mut high) = (0, if self.sight.from.is_empty() { nq } else { 0 });
        for s in 0..nk {
            while low < nq && self.sight.to.get(low).is_some_and(|&to| to as usize <= first + s) {
                low += 1;
            }
            while high < nq && self.sight.from[high] as usize <= first + s {
                high += 1;
            }
            let row = &mut self.panel[s * PANEL..s * PANEL + nq];
            row[..low].fill(hidden);
            row[high.max(low)..].fill(hidden);
        }
    }

    /// Sets what the queries do not see and what weighs 0 to `hidden`.
    fn hide(&mut self, hidden: T) {
        let nq = self.queries.count;
        for s in 0..self.keys.count {
            if self.weights()[s] == T::ZERO {
                self.panel[s * PANEL..s * PANEL + nq].fill(hidden);
            }
        }
        self.mask(hidden);
    }
}

/// Logits of the panel.
#[inline(always)]
unsafe fn logits<V: Vector>(a: &mut Panel<'_, V::Elem>) {
    a.check();
    let (nq, nk) = (a.queries.count, a.keys.count);
    a.panel[..nk * PANEL].fill(Real::from_f64(0.0));
    // SAFETY: lengths were checked just now.
    unsafe {
        gemm::<V>(
            nk,
            a.d_key,
            nq,
            Left { base: a.keys.x.as_ptr(), row: 1, step: a.keys.ld },
            Rows { base: a.queries.x.as_ptr(), stride: a.queries.ld },
            Rows { base: a.panel.as_mut_ptr(), stride: PANEL },
        );
    }
}

/// The logarithm of the decay between key s and the queries from t on.
#[inline(always)]
unsafe fn decay<V: Vector>(fading: Fading<'_, V::Elem>, s: usize, t: usize) -> V {
    let Fading { queries: [high, low], keys: [key_high, key_low] } = fading;
    // SAFETY: the caller's s and t lie in the block, and both were cut to it.
    unsafe {
        let large = V::load(high.as_ptr().add(t)).sub(V::splat(*key_high.as_ptr().add(s)));
        large.add(V::load(low.as_ptr().add(t)).sub(V::splat(*key_low.as_ptr().add(s))))
    }
}

/// Each key's weight times its decay, which is at most 1: keys later than the query are not seen.
#[inline(always)]
unsafe fn weight<V: Vector>(a: &Panel<'_, V::Elem>, s: usize, t: usize) -> V {
    // SAFETY: forwarded.
    unsafe {
        let weight = V::splat(*a.keys.x.as_ptr().add(a.d_key * a.keys.ld + s));
        let Some(fading) = a.fading else {
            return weight;
        };
        let zero = V::splat(Real::from_f64(0.0));
        let lost = zero.sub(decay::<V>(fading, s, t)).max(zero);
        weight.mul(exp(zero.sub(lost)))
    }
}

/// See [`Moments`].
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(in crate::arch) unsafe fn moments<V: Vector>(a: &mut Moments<'_, V::Elem>) {
    let (nq, nk) = (a.queries.count, a.keys.count);
    let Some(&highest) = a.orders.last() else {
        return;
    };
    assert!(a.sums.len() >= (a.orders.len() - 1) * a.ld + nq);
    for block in blocks(nq, nk, a.sight) {
        let mut panel = Panel {
            d_key: a.d_key,
            queries: part(a.queries, block.queries, block.query_count),
            keys: part(a.keys, block.keys, block.key_count),
            first: block.keys,
            sight: seen(a.sight, &block),
            fading: faded(a.fading, &block),
            panel: &mut a.scratch.panel,
        };
        // SAFETY: lengths are checked here and in `logits`; t counts whole vectors of queries.
        unsafe {
            logits::<V>(&mut panel);
            let (from, to) = (block.keys, block.keys + block.key_count);
            for t in (0..block.query_count).step_by(V::LANES) {
                let at = block.queries + t;
                let mut total = [V::splat(Real::from_f64(0.0)); MOMENTS];
                let sums = a.sums.as_mut_ptr().add(at);
                let mut seen = [V::Elem::ZERO; TOKENS];
                // Keys that some of the vector's queries see, and those that all of them see.
                let bound =
                    |x: &[u32], i: usize, or: usize| x.get(at + i).map_or(or, |&x| x as usize);
                let (first, last) = (0, V::LANES - 1);
                let some =
                    bound(a.sight.from, first, 0).max(from)..bound(a.sight.to, last, to).min(to);
                let all = bound(a.sight.from, last, 0)..bound(a.sight.to, first, to);
                for s in some {
                    let mut w = weight::<V>(&panel, s - from, t);
                    if !all.contains(&s) {
                        for (i, seen) in seen[..V::LANES].iter_mut().enumerate() {
                            let range = bound(a.sight.from, i, 0)..bound(a.sight.to, i, to);
                            *seen = if range.contains(&s) { V::Elem::ONE } else { V::Elem::ZERO };
                        }
                        w = w.mul(V::load(seen.as_ptr()));
                    }
                    let x = V::load(panel.panel.as_ptr().add((s - from) * PANEL + t));
                    if highest < MOMENTS {
                        for total in &mut total[..=highest] {
                            *total = total.add(w);
                            w = w.mul(x);
                        }
                    } else {
                        let mut p = 0;
                        for (i, &order) in a.orders.iter().enumerate() {
                            while p < order {
                                w = w.mul(x);
                                p += 1;
                            }
                            let to = sums.add(i * a.ld);
                            V::load(to).add(w).store(to);
                        }
                    }
                }
                if highest < MOMENTS {
                    for (i, &order) in a.orders.iter().enumerate() {
                        let to = sums.add(i * a.ld);
                        V::load(to).add(total[order]).store(to);
                    }
                }
            }
        }
    }
}

impl<T: Real> Direct<'_, T> {
    /// The same for one block.
    #[inline(always)]
    fn block(&mut self, block: &Block) -> (Panel<'_, T>, Mixing<'_, T>) {
        let (nq, nk) = (block.query_count, block.key_count);
        assert!(self.values.len() >= (block.keys + nk) * self.padded);
        assert!(self.num.len() >= (block.queries + nq) * self.padded);
        assert!(self.den.len() >= block.queries + nq);
        let panel = Panel {
            d_key: self.d_key,
            queries: part(self.queries, block.queries, nq),
            keys: part(self.keys, block.keys, nk),
            first: block.keys,
            sight: seen(self.sight, block),
            fading: faded(self.fading, block),
            panel: &mut self.scratch.panel,
        };
        let mixing = Mixing {
            values: &self.values[block.keys * self.padded..],
            padded: self.padded,
            num: &mut self.num[block.queries * self.padded..],
            den: &mut self.den[block.queries..],
            max: self.max.get_mut(block.queries..).unwrap_or_default(),
        };
        (panel, mixing)
    }
}

/// Where a block's weights go.
struct Mixing<'m, T> {
    values: &'m [T],
    padded: usize,
    num: &'m mut [T],
    den: &'m mut [T],
    max: &'m mut [T],
}

/// den += the panel's weights, summed over keys.
#[inline(always)]
unsafe fn add_to_denominators<V: Vector>(a: &Panel<'_, V::Elem>, to: &mut Mixing<'_, V::Elem>) {
    let panel = a.panel.as_ptr();
    let mut t = 0;
    // SAFETY: lengths were checked by `logits` and `block`.
    unsafe {
        while t < a.queries.count {
            let mut total = V::load(to.den.as_ptr().add(t));
            for s in 0..a.keys.count {
                total = total.add(V::load(panel.add(s * PANEL + t)));
            }
            total.store(to.den.as_mut_ptr().add(t));
            t += V::LANES;
        }
    }
}

/// num += weightsᵀ · values.
#[inline(always)]
unsafe fn mix<V: Vector>(a: &Panel<'_, V::Elem>, to: &mut Mixing<'_, V::Elem>) {
    // SAFETY: lengths were checked by `logits` and `block`.
    unsafe {
        gemm::<V>(
            a.queries.count,
            a.keys.count,
            to.padded,
            Left { base: a.panel.as_ptr(), row: 1, step: PANEL },
            Rows { base: to.values.as_ptr(), stride: to.padded },
            Rows { base: to.num.as_mut_ptr(), stride: to.padded },
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
    let coefficients = a.coefficients;
    for block in blocks(a.queries.count, a.keys.count, a.sight) {
        let at = block.queries;
        let (mut panel, mut mixing) = a.block(&block);
        // SAFETY: forwarded; lengths are checked in `logits`, here and in `block`.
        unsafe {
            logits::<G>(&mut panel);
            match coefficients {
                Coefficients::Same([]) => return,
                Coefficients::Same(a) => weigh::<G, false>(&mut panel, a.as_ptr(), 1, a.len()),
                Coefficients::Each { rows, ld } => {
                    let terms = rows.len() / ld;
                    assert!(terms > 0 && at + panel.queries.count <= ld);
                    weigh::<G, true>(&mut panel, rows.as_ptr().add(at), ld, terms);
                }
            }
            panel.mask(Real::from_f64(0.0));
            add_to_denominators::<G>(&panel, &mut mixing);
            mix::<V>(&panel, &mut mixing);
        }
    }
}

/// Logits become weights by the polynomial whose coefficient of order p lies at `rows + p·ld`, one
/// for all queries or one for EACH.
#[inline(always)]
unsafe fn weigh<V: Vector, const EACH: bool>(
    a: &mut Panel<'_, V::Elem>,
    rows: *const V::Elem,
    ld: usize,
    terms: usize,
) {
    for s in 0..a.keys.count {
        let mut t = 0;
        while t < a.queries.count {
            // SAFETY: forwarded; s and t lie in the panel, and with EACH there are as many
            // coefficients of an order as queries.
            unsafe {
                let at = a.panel.as_mut_ptr().add(s * PANEL + t);
                let x = V::load(at);
                let mut from = rows.add((terms - 1) * ld);
                let mut w = if EACH { V::load(from.add(t)) } else { V::splat(*from) };
                for _ in 1..terms {
                    from = from.sub(ld);
                    w = w.mul_add(x, if EACH { V::load(from.add(t)) } else { V::splat(*from) });
                }
                w.mul(weight::<V>(a, s, t)).store(at);
            }
            t += V::LANES;
        }
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
    assert!(a.max.len() >= a.queries.count);
    for block in blocks(a.queries.count, a.keys.count, a.sight) {
        let (mut panel, mut mixing) = a.block(&block);
        // SAFETY: forwarded.
        unsafe { exponential_block::<V, G>(&mut panel, &mut mixing) };
    }
}

#[inline(always)]
unsafe fn exponential_block<V, G>(a: &mut Panel<'_, V::Elem>, to: &mut Mixing<'_, V::Elem>)
where
    V: Vector,
    G: Vector<Elem = V::Elem>,
{
    let (nq, nk) = (a.queries.count, a.keys.count);
    let lowest = V::Elem::LOWEST;
    // SAFETY: lengths are checked in `logits` and were in `block`; the panel is TILE × PANEL.
    unsafe {
        logits::<G>(a);
        if let Some(fading) = a.fading {
            for s in 0..nk {
                for t in (0..nq).step_by(G::LANES) {
                    let at = a.panel.as_mut_ptr().add(s * PANEL + t);
                    G::load(at).add(decay::<G>(fading, s, t)).store(at);
                }
            }
        }
        a.hide(lowest);
        let panel = a.panel.as_mut_ptr();
        let mut rescale = [V::Elem::ONE; PANEL];
        // Whether some queries may have seen no key yet.
        let blind = to.max[..nq].contains(&lowest);
        let mut t = 0;
        while t < nq {
            let before = G::load(to.max.as_ptr().add(t));
            let mut top = before;
            for s in 0..nk {
                top = top.max(G::load(panel.add(s * PANEL + t)));
            }
            top.store(to.max.as_mut_ptr().add(t));
            let shrink = exp(before.sub(top));
            shrink.store(rescale.as_mut_ptr().add(t));
            let mut total = G::load(to.den.as_ptr().add(t)).mul(shrink);
            if blind {
                total.store(to.den.as_mut_ptr().add(t));
            }
            for s in 0..nk {
                let at = panel.add(s * PANEL + t);
                let weight = exp(G::load(at).sub(top));
                weight.store(at);
                total = total.add(weight);
            }
            if !blind {
                total.store(to.den.as_mut_ptr().add(t));
            }
            t += G::LANES;
        }
        if blind {
            // A query that has seen no key yet gave weight to hidden ones: take it away.
            a.hide(V::Elem::ZERO);
            add_to_denominators::<G>(a, to);
        }
        for (t, &shrink) in rescale[..nq].iter().enumerate() {
            if shrink != V::Elem::ONE {
                let by = V::splat(shrink);
                let mut n = 0;
                while n < to.padded {
                    let at = to.num.as_mut_ptr().add(t * to.padded + n);
                    V::load(at).mul(by).store(at);
                    n += V::LANES;
                }
            }
        }
        mix::<V>(a, to);
    }
}
