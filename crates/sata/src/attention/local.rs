//! From far sums and raw tokens to numerators and denominators, for some queries of one head.
//!
//! 1. Far tokens that are still raw are weighed by the polynomial. Where its coefficients are the
//!    query's own, their moments are added to those of the far sums first, the coefficients are
//!    made of them, and the numerators of all orders become one.
//! 2. Near tokens and sinks are weighed by exp. The far part enters as what has been summed so
//!    far: with its own logarithmic scale for a maximum.

use super::load;
use super::method::Method;
use super::standing::Standing;
use super::tally::Tally;
use super::window::{Sinks, Window};
use crate::arch::{Buffer, Coefficients, Direct, Fading, Moments, Scratch, Sight, TOKENS, Tokens};
use crate::series::Noise;
use crate::{Near, Real};

/// Some queries of one head, and all that they see but the far sums, which they have read.
pub(super) struct Local<'l, T: Real> {
    pub window: &'l Window<T>,
    pub sinks: &'l Sinks<T>,
    pub standing: &'l Standing<T>,
    pub queries: Tokens<'l, T>,
    pub query_head: usize,
    pub kv_head: usize,
    /// The largest |k| in the far sums; 0 when there are none.
    pub reach: f64,
    /// `[planes][count][padded]`; the first plane becomes the numerators.
    pub num: &'l mut [T],
    /// `[planes][count]`; the first becomes the denominators.
    pub den: &'l mut [T],
    pub scratch: &'l mut Scratch<T>,
}

/// `gap` of each query, 0 where nothing fades.
fn gap<T>(standing: &Standing<T>, t: usize) -> f64 {
    standing.gap.get(t).copied().unwrap_or(0.0)
}

impl<T: Real> Method<T> {
    /// Answers them.
    pub(super) fn weigh(&self, a: &mut Local<'_, T>, tally: &mut Tally) {
        let count = a.queries.count;
        let n = a.standing.len();
        let (plane, den_plane) = (count * self.padded, count);
        let farthest = a.standing.far.iter().copied().max().unwrap_or(0) as usize;
        let mut levels = vec![0.0; count];
        if !self.is_per_query() {
            if farthest > 0 {
                self.far_tokens(a, farthest, Coefficients::Same(&self.coefficients), None);
            }
        } else {
            if farthest > 0 {
                self.moments(a, farthest);
            }
            let mut each = Buffer::zeroed(self.terms * count);
            let mut work = FitWork::new(self);
            let squares = squares(&a.queries, self.d_key);
            for t in 0..n {
                let row = t * self.padded..(t + 1) * self.padded;
                if !a.standing.has_far[t] {
                    a.den[t] = T::ZERO;
                    a.num[row].fill(T::ZERO);
                    continue;
                }
                for (plane, &order) in self.orders.iter().enumerate() {
                    work.sums[order] = a.den[plane * den_plane + t].to_f64();
                }
                let shift = self.shift(a.kv_head, |c| a.queries.x[c * a.queries.ld + t].to_f64());
                work.reach = a.reach * squares[t].to_f64().sqrt();
                levels[t] = work.fit(self, shift, a.query_head, tally);
                a.den[t] = T::from_f64(work.denominator);
                for (p, &c) in work.coefficients.iter().enumerate() {
                    each[p * count + t] = T::from_f64(c);
                }
                mix(a.num, row, plane, &self.orders, &work.coefficients);
            }
            if farthest > 0 {
                let mut unused = vec![T::ZERO; count];
                let coefficients = Coefficients::Each { rows: &each, ld: count };
                self.far_tokens(a, farthest, coefficients, Some(&mut unused));
            }
        }
        if self.has_near() {
            let levels = levels.iter().enumerate().map(|(t, &level)| {
                let has_far = a.standing.has_far.get(t).copied().unwrap_or(false);
                far_maximum(has_far, level + gap(a.standing, t))
            });
            let mut max: Vec<T> = levels.collect();
            self.near_tokens(a, &mut max);
        }
    }

    /// b of a query: how much of each of its logits the centre of the keys has taken.
    pub(super) fn shift(&self, kv_head: usize, query: impl Fn(usize) -> f64) -> f64 {
        self.key_centre(kv_head)
            .map_or(0.0, |centre| centre.iter().enumerate().map(|(c, k)| query(c) * k).sum())
    }

    fn far_tokens(
        &self,
        a: &mut Local<'_, T>,
        farthest: usize,
        coefficients: Coefficients<'_, T>,
        den: Option<&mut [T]>,
    ) {
        let mut call = Direct {
            d_key: self.d_key,
            queries: a.queries,
            keys: a.window.tokens(farthest),
            values: &a.window.values,
            padded: self.padded,
            sight: Sight { from: &[], to: &a.standing.far },
            fading: self.fading(&a.standing.anchor, a.window),
            coefficients,
            num: a.num,
            den: den.unwrap_or(a.den),
            max: &mut [],
            scratch: a.scratch,
        };
        // SAFETY: kernels are only handed out for instruction sets that are there.
        unsafe { (self.kernels.polynomial)(&mut call) };
    }

    fn moments(&self, a: &mut Local<'_, T>, farthest: usize) {
        let mut call = Moments {
            d_key: self.d_key,
            queries: a.queries,
            keys: a.window.tokens(farthest),
            sight: Sight { from: &[], to: &a.standing.far },
            fading: self.fading(&a.standing.anchor, a.window),
            orders: &self.orders,
            sums: a.den,
            ld: a.queries.count,
            scratch: a.scratch,
        };
        // SAFETY: as above.
        unsafe { (self.kernels.moments)(&mut call) };
    }

    fn fading<'f>(
        &self,
        queries: &'f [Buffer<T>; 2],
        window: &'f Window<T>,
    ) -> Option<Fading<'f, T>> {
        self.fades.then(|| Fading { queries: [&queries[0], &queries[1]], keys: window.fading() })
    }

    fn near_tokens(&self, a: &mut Local<'_, T>, max: &mut [T]) {
        if self.near != Near::None && a.window.count > 0 {
            let mut call = Direct {
                d_key: self.d_key,
                queries: a.queries,
                keys: a.window.tokens(a.window.count),
                values: &a.window.values,
                padded: self.padded,
                sight: Sight { from: &a.standing.from, to: &a.standing.to },
                fading: self.fading(&a.standing.own, a.window),
                coefficients: Coefficients::NONE,
                num: a.num,
                den: a.den,
                max,
                scratch: a.scratch,
            };
            // SAFETY: as above.
            unsafe { (self.kernels.exponential)(&mut call) };
        }
        if a.sinks.count > 0 {
            let mut call = Direct {
                d_key: self.d_key,
                queries: a.queries,
                keys: Tokens { x: &a.sinks.keys, ld: a.sinks.ld, count: a.sinks.ld },
                values: &a.sinks.values,
                padded: self.padded,
                sight: Sight { from: &[], to: &a.standing.sinks },
                fading: self.fades.then(|| Fading {
                    queries: [&a.standing.since[0], &a.standing.since[1]],
                    keys: [&a.sinks.split[0], &a.sinks.split[1]],
                }),
                coefficients: Coefficients::NONE,
                num: a.num,
                den: a.den,
                max,
                scratch: a.scratch,
            };
            // SAFETY: as above.
            unsafe { (self.kernels.exponential)(&mut call) };
        }
    }

    /// Queries of a head in the kernels' layout, each with what far sums have faded by for weight.
    pub(super) fn load_queries<E: crate::Element<Compute = T>>(
        &self,
        piece: &super::Piece<'_, E>,
        query_head: usize,
        which: std::ops::Range<usize>,
        standing: &Standing<T>,
        x: &mut [T],
        ld: usize,
    ) -> usize {
        let count = load::queries(piece, query_head, which, self.scale, x, ld);
        x[self.d_key * ld..][..standing.factor.len()].copy_from_slice(&standing.factor);
        count
    }
}

/// What the far part is to exponentials that are added to it: a sum relative to e^`level`, or
/// nothing yet.
pub(super) fn far_maximum<T: Real>(has_far: bool, level: f64) -> T {
    if !has_far || level < T::LOWEST.to_f64() { T::LOWEST } else { T::from_f64(level) }
}

/// |q|² of queries, with the scale.
fn squares<T: Real>(queries: &Tokens<'_, T>, d_key: usize) -> Vec<T> {
    let mut squares = vec![T::ZERO; queries.count];
    for row in queries.x.chunks(queries.ld).take(d_key) {
        squares.iter_mut().zip(row).for_each(|(square, &x)| *square += x * x);
    }
    squares
}

/// The numerators of all orders become one: `row` of planes of `plane` elements each.
pub(super) fn mix<T: Real>(
    num: &mut [T],
    row: std::ops::Range<usize>,
    plane: usize,
    orders: &[usize],
    coefficients: &[f64],
) {
    let (first, others) = num.split_at_mut(plane);
    let c = |order: usize| T::from_f64(coefficients.get(order).copied().unwrap_or(0.0));
    let first = &mut first[row.clone()];
    let lowest = c(orders[0]);
    first.iter_mut().for_each(|x| *x = *x * lowest);
    for (other, &order) in others.chunks(plane).zip(&orders[1..]) {
        let c = c(order);
        for (x, &y) in first.iter_mut().zip(&other[row.clone()]) {
            *x += y * c;
        }
    }
}

/// One query's moments and coefficients.
pub(super) struct FitWork {
    /// By order.
    pub sums: Vec<f64>,
    /// By order.
    pub coefficients: Vec<f64>,
    pub denominator: f64,
    /// What no logit of the far sums exceeds.
    pub reach: f64,
}

impl FitWork {
    pub(super) fn new<T: Real>(method: &Method<T>) -> Self {
        let highest = method.orders.last().copied().unwrap_or(0);
        FitWork {
            sums: vec![0.0; (highest + 1).max(method.terms)],
            coefficients: vec![0.0; method.terms],
            denominator: 0.0,
            reach: 0.0,
        }
    }

    /// Makes coefficients of the sums; gives the logarithm of their scale.
    pub(super) fn fit<T: Real>(
        &mut self,
        method: &Method<T>,
        shift: f64,
        query_head: usize,
        tally: &mut Tally,
    ) -> f64 {
        let noise = Noise { reach: self.reach, ..method.noise };
        let fit = method.rule.fit(&self.sums, noise, shift, &mut self.coefficients);
        self.denominator = fit.denominator;
        if method.diagnose {
            tally.far(query_head, fit.mean, fit.variance, &method.rule, method.terms);
        }
        fit.log_scale
    }
}

/// A multiple of TOKENS.
pub(super) fn padded(count: usize) -> usize {
    count.next_multiple_of(TOKENS)
}
