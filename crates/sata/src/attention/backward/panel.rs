//! One panel of queries: what it sees is weighed again and its gradients are handed back.

use std::ops::Range;

use super::Env;
use crate::arch::{
    Buffer, By, FromSums, Pairs, PairsWork, QUERIES, Sight, Stretch, TOKENS, Tokens, Weighed,
};
use crate::attention::method::Method;
use crate::attention::standing::Standing;
use crate::attention::window::{Sinks, Window};
use crate::attention::{Piece, load};
use crate::{Element, Near, Real};

/// Gradients of some keys in the making.
#[derive(Clone, Debug, Default)]
pub(super) struct Made<T> {
    /// `[tokens][padded_key]`.
    pub dk: Buffer<T>,
    /// `[tokens][padded]`.
    pub dv: Buffer<T>,
    /// Σ_t w dw, `[tokens]`, or empty.
    pub dw: Vec<f64>,
    /// Lengths of the rows of both: whole vectors.
    rows: [usize; 2],
}

impl<T: Real> Made<T> {
    /// Zeros for `tokens` tokens, and as many as make whole vectors.
    pub fn new<E: Element<Compute = T>>(env: &Env<'_, E>, tokens: usize) -> Self {
        let padded = [env.padded_key, env.method.padded];
        Self::zeros(tokens.next_multiple_of(TOKENS), padded, env.fades)
    }

    /// Zeros, with rows of these lengths.
    pub fn zeros(tokens: usize, rows: [usize; 2], fades: bool) -> Self {
        Made {
            dk: Buffer::zeroed(tokens * rows[0]),
            dv: Buffer::zeroed(tokens * rows[1]),
            dw: vec![0.0; if fades { tokens } else { 0 }],
            rows,
        }
    }

    /// Makes them zeros.
    pub fn clear(&mut self) {
        self.dk.fill(T::ZERO);
        self.dv.fill(T::ZERO);
        self.dw.fill(0.0);
    }

    /// Adds those of tokens `which` of others, whose rows may be padded otherwise, to those from `at`
    /// on.
    pub fn add_at(&mut self, at: usize, other: &Self, which: Range<usize>) {
        let (own, others) = (self.rows, other.rows);
        for (i, (to, from)) in
            [(&mut self.dk, &other.dk), (&mut self.dv, &other.dv)].into_iter().enumerate()
        {
            let to = to[at * own[i]..].chunks_mut(own[i]);
            let from = from[which.start * others[i]..which.end * others[i]].chunks(others[i]);
            for (to, from) in to.zip(from) {
                to.iter_mut().zip(from).for_each(|(a, &b)| *a += b);
            }
        }
        if !self.dw.is_empty() && !other.dw.is_empty() {
            self.dw[at..].iter_mut().zip(&other.dw[which]).for_each(|(a, &b)| *a += b);
        }
    }

    /// Adds others.
    pub fn add(&mut self, other: &Self) {
        self.dk.iter_mut().zip(&*other.dk).for_each(|(a, &b)| *a += b);
        self.dv.iter_mut().zip(&*other.dv).for_each(|(a, &b)| *a += b);
        self.dw.iter_mut().zip(&other.dw).for_each(|(a, &b)| *a += b);
    }
}

/// Raw keys that queries see.
pub(super) struct Raws<'r, T> {
    pub window: &'r Window<T>,
    pub sinks: &'r Sinks<T>,
    /// Their keys row by row.
    window_rows: Buffer<T>,
    sink_rows: Buffer<T>,
    /// g of the sinks since the sequence's start, or empty.
    sink_g: Vec<f64>,
}

impl<'r, T: Real> Raws<'r, T> {
    pub fn new<E: Element<Compute = T>>(
        env: &Env<'_, E>,
        window: &'r Window<T>,
        sinks: &'r Sinks<T>,
    ) -> Self {
        let sink_g = joined(&sinks.split, sinks.count);
        Raws {
            window,
            sinks,
            window_rows: rows(env, &window.keys, window.ld, window.count),
            sink_rows: rows(env, &sinks.keys, sinks.ld, sinks.count),
            sink_g: if env.method.fades { sink_g } else { vec![] },
        }
    }
}

/// Transposed tokens row by row, `[tokens][padded_key]` in whole vectors of tokens.
fn rows<E: Element>(
    env: &Env<'_, E>,
    x: &[E::Compute],
    ld: usize,
    count: usize,
) -> Buffer<E::Compute> {
    let padded = env.padded_key;
    let mut rows = Buffer::zeroed(count.next_multiple_of(TOKENS) * padded);
    untranspose(x, ld, count, env.method.d_key, &mut rows, padded);
    rows
}

fn untranspose<T: Real>(x: &[T], ld: usize, count: usize, d: usize, rows: &mut [T], padded: usize) {
    for first in (0..count).step_by(TOKENS) {
        let n = TOKENS.min(count - first);
        for channel in 0..d {
            let from = &x[channel * ld + first..][..n];
            for (t, &x) in from.iter().enumerate() {
                rows[(first + t) * padded + channel] = x;
            }
        }
    }
}

/// Numbers that are kept as two.
fn joined<T: Real>([high, low]: &[Buffer<T>; 2], count: usize) -> Vec<f64> {
    high.iter().zip(&**low).take(count).map(|(h, l)| h.to_f64() + l.to_f64()).collect()
}

/// What a panel's queries have read from far sums.
pub(super) struct FromFar<T> {
    level: [T; QUERIES],
    den: [T; QUERIES],
    dot: [T; QUERIES],
}

/// The same, with the queries' gradients by what they have read.
#[derive(Clone, Copy)]
pub(super) struct Seen<'s, T> {
    from: FromSums<'s, T>,
    /// `[d_key][ld]`, by sums and by z.
    by: [&'s [T]; 2],
    ld: usize,
}

impl<T: Real> FromFar<T> {
    /// At what level each query's sums are.
    pub fn new(method: &Method<T>, standing: &Standing<T>) -> Self {
        // Stands for nothing beside anything.
        let nothing = T::from_f64(-1e30);
        let mut level = [nothing; QUERIES];
        for (t, level) in level.iter_mut().enumerate().take(standing.len()) {
            if standing.has_far[t] {
                let gap = if method.fades { standing.gap[t] } else { 0.0 };
                *level = if gap > -1e30 { T::from_f64(gap) } else { nothing };
            }
        }
        FromFar { level, den: [T::ZERO; QUERIES], dot: [T::ZERO; QUERIES] }
    }

    /// Takes what was read, from query `first` on.
    pub fn take(&mut self, first: usize, dot: &[T], den: &[T]) {
        for (to, from) in [(&mut self.dot, dot), (&mut self.den, den)] {
            to.iter_mut().zip(&from[first..]).for_each(|(to, &from)| *to = from);
        }
    }

    pub fn seen<'s>(&'s self, by: [&'s [T]; 2], ld: usize) -> Seen<'s, T> {
        let from = FromSums { level: &self.level, den: &self.den, dot: &self.dot };
        Seen { from, by, ld }
    }
}

/// Working memory of one thread.
pub(super) struct PanelWork<T> {
    /// Queries, `[d_key + 1][QUERIES]`, and row by row.
    x: Buffer<T>,
    query_rows: Buffer<T>,
    /// dL/dy, likewise.
    dy: Buffer<T>,
    dy_rows: Buffer<T>,
    dq: Buffer<T>,
    factor: Buffer<T>,
    delta: Buffer<T>,
    pairs: PairsWork<T>,
}

impl<T: Real> PanelWork<T> {
    pub fn new<E: Element<Compute = T>>(env: &Env<'_, E>) -> Self {
        let of = |n: usize| Buffer::zeroed(n * QUERIES);
        PanelWork {
            x: of(env.method.d_key + 1),
            query_rows: of(env.padded_key),
            dy: of(env.method.d_value),
            dy_rows: of(env.method.padded),
            dq: of(env.padded_key),
            factor: of(1),
            delta: of(1),
            pairs: PairsWork::default(),
        }
    }

    /// What query `t` multiplied its far sums by, over D; and its δ.
    pub fn settled(&self, t: usize) -> (T, T) {
        (self.factor[t], self.delta[t])
    }
}

impl<E: Element> Env<'_, E> {
    /// Loads queries of a head and their dL/dy.
    pub fn load(
        &self,
        piece: &Piece<'_, E>,
        head: usize,
        queries: Range<usize>,
        work: &mut PanelWork<E::Compute>,
    ) {
        let method = self.method;
        let (d_key, d_value, count) = (method.d_key, method.d_value, queries.len());
        let padded =
            load::queries(piece, head, queries.clone(), method.scale, &mut work.x, QUERIES);
        work.query_rows.fill(Real::from_f64(0.0));
        untranspose(&work.x, QUERIES, count, d_key, &mut work.query_rows, self.padded_key);
        let place = [piece.q_batch, head, piece.q_first + queries.start];
        load::transpose(&self.dy, place, count, None, &mut work.dy, QUERIES, 0);
        load::clear(&mut work.dy, QUERIES, d_value, count..padded);
        work.dy_rows.fill(Real::from_f64(0.0));
        untranspose(&work.dy, QUERIES, count, d_value, &mut work.dy_rows, method.padded);
    }

    /// Hands back the gradients of queries that have been loaded: those of keys are added to `made`
    /// (window, sinks), those of the queries are written.
    ///
    /// # Safety
    /// No other thread answers the same queries.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn panel(
        &self,
        piece: &Piece<'_, E>,
        head: usize,
        queries: Range<usize>,
        raws: &Raws<'_, E::Compute>,
        standing: &Standing<E::Compute>,
        seen: Option<Seen<'_, E::Compute>>,
        [of_window, of_sinks]: [&mut Made<E::Compute>; 2],
        work: &mut PanelWork<E::Compute>,
    ) {
        let method = self.method;
        let count = queries.len();
        let Raws { window, sinks, .. } = raws;
        let fades = |g: Vec<f64>| if method.fades { g } else { vec![] };
        let own = fades(joined(&standing.own, count));
        let since = fades(joined(&standing.since, count));
        let mut stretches = vec![];
        if standing.far.iter().any(|&far| far > 0) {
            let by = By::Polynomial { coefficients: &method.coefficients, gap: &standing.gap };
            let sight = Sight { from: &[], to: &standing.far };
            stretches.push(Stretch { of: 0, sight, own: &own, by });
        }
        if method.near != Near::None && window.count > 0 {
            let sight = Sight { from: &standing.from, to: &standing.to };
            stretches.push(Stretch { of: 0, sight, own: &own, by: By::Exponential });
        }
        if sinks.count > 0 {
            let sight = Sight { from: &[], to: &standing.sinks };
            stretches.push(Stretch { of: 1, sight, own: &since, by: By::Exponential });
        }
        let count_of = |n: usize| n.next_multiple_of(TOKENS);
        let mut weighed = [
            Weighed {
                keys: Tokens { x: &window.keys, ld: window.ld, count: count_of(window.count) },
                key_rows: &raws.window_rows,
                values: &window.values,
                g: &window.g,
                dk: &mut of_window.dk,
                dv: &mut of_window.dv,
                dw: &mut of_window.dw,
            },
            Weighed {
                keys: Tokens { x: &sinks.keys, ld: sinks.ld, count: count_of(sinks.count) },
                key_rows: &raws.sink_rows,
                values: &sinks.values,
                g: &raws.sink_g,
                dk: &mut of_sinks.dk,
                dv: &mut of_sinks.dv,
                dw: &mut of_sinks.dw,
            },
        ];
        let mut pairs = Pairs {
            d_key: method.d_key,
            d_value: method.d_value,
            padded_key: self.padded_key,
            padded: method.padded,
            count,
            queries: &work.x,
            query_rows: &work.query_rows,
            dy: &work.dy,
            dy_rows: &work.dy_rows,
            weighed: &mut weighed,
            stretches: &stretches,
            sums: seen.map(|seen| seen.from),
            dq: &mut work.dq,
            factor: &mut work.factor,
            delta: &mut work.delta,
            work: &mut work.pairs,
        };
        pairs.dq.fill(Real::from_f64(0.0));
        // SAFETY: kernels are only handed out for instruction sets that are there.
        unsafe { (method.kernels.pairs)(&mut pairs) };
        for (t, token) in queries.enumerate() {
            let place = [piece.q_batch, head, piece.q_first + token];
            let row = &mut work.dq[t * self.padded_key..][..method.d_key];
            if let Some(Seen { by: [by_sums, by_z], ld, .. }) = seen {
                let (factor, delta) = (work.factor[t], work.delta[t]);
                for (channel, dq) in row.iter_mut().enumerate() {
                    let at = channel * ld + t;
                    *dq += factor * (by_sums[at] - delta * by_z[at]);
                }
            }
            // SAFETY: forwarded.
            unsafe { self.dq.write(place, row.iter().map(|&x| x * method.scale)) };
        }
    }
}
