//! One query at a time: decode.

use std::ops::Range;

use super::local::{FitWork, far_maximum};
use super::method::Method;
use super::tally::Tally;
use super::window::{Room, Source};
use super::{Piece, finish};
use crate::arch::{How, ReadOne, WeighOne};
use crate::basis::Basis;
use crate::state::{FoldWork, HeadState, OneWork, Raw, Sums, faded, running_into};
use crate::view::Rows;
use crate::{Element, Near, Real, State, parallel};

/// Features that one task reads: enough to hide the cost of handing a task out.
const TASK_FEATURES: usize = 1 << 15;

/// Every sequence takes one token.
pub(super) fn steps<E: Element>(
    method: &Method<E::Compute>,
    pieces: &[Piece<'_, E>],
    rows: &Rows<'_, E>,
    group: usize,
    state: &mut State<E::Compute>,
) -> Tally {
    let basis = state.basis.clone();
    let each = TASK_FEATURES.div_ceil(basis.len()).max(1);
    let mut tasks = vec![];
    for (piece, sequence) in pieces.iter().zip(&mut state.sequences) {
        let open = sequence.open;
        let folded = sequence.position - open as u64;
        sequence.position += 1;
        sequence.open = open + 1 - method.folded(open + 1);
        for (i, heads) in sequence.heads.chunks_mut(each).enumerate() {
            tasks.push((piece, open, folded, i * each, heads));
        }
    }
    parallel::map_reduce(
        &mut tasks,
        Tally::default(),
        |(piece, open, folded, first, heads)| {
            let (open, folded) = (*open, *folded);
            let mut tally = Tally::default();
            let mut fold = None;
            // One head's working memory serves all of the task: it stays in cache.
            let mut work =
                heads.first_mut().map(|head| std::mem::take(&mut head.work)).unwrap_or_default();
            let mut fit = FitWork::new(method);
            for i in 0..heads.len() {
                let ahead = ahead(&heads[i].sums, heads.get(i + 1).map(|next| &next.sums));
                if let Some(next) = heads.get(i + 1) {
                    next.prefetch_open(open + 1);
                }
                let head = &mut heads[i];
                let kv_head = *first + i;
                let source = Source { method, piece, kv_head, open, raw: None, folded };
                append(source, head);
                let sinks = (folded + open as u64 + 1).min(method.sinks as u64) as usize;
                let one = One::new(method, &basis, head, [open + 1, sinks], ahead, &mut work);
                for query_head in kv_head * group..(kv_head + 1) * group {
                    let place = [query_head, kv_head, 0];
                    // SAFETY: tasks answer disjoint heads.
                    unsafe { one.answer(piece, rows, place, &mut work, &mut fit, &mut tally) };
                }
                let count = method.folded(open + 1);
                if count > 0 {
                    let fold = fold.get_or_insert_with(|| {
                        FoldWork::new(&basis, method.d_value, method.kernels)
                    });
                    head.fold_open(&basis, count, open + 1, fold);
                }
            }
            if let Some(head) = heads.first_mut() {
                head.work = work;
            }
            tally
        },
        Tally::merged,
    )
}

/// Where to ask for memory while `sums` are read: further on in them where they are large, else in
/// the next head's.
fn ahead<T: Real>(sums: &Sums<T>, next: Option<&Sums<T>>) -> isize {
    const FURTHER: usize = 8192;
    if size_of_val(&sums.sums[..]) >= 8 * FURTHER {
        return FURTHER as isize;
    }
    next.map_or(0, |next| {
        next.sums.as_ptr().addr().wrapping_sub(sums.sums.as_ptr().addr()) as isize
    })
}

/// Puts the piece's only token where it waits, and among the sinks if it is one.
fn append<E: Element>(source: Source<'_, '_, E>, head: &mut HeadState<E::Compute>) {
    let HeadState { open: raw, sinks, mark, reach, .. } = head;
    if source.folded + (source.open as u64) < source.method.sinks as u64 {
        Source { raw: Some(raw), ..source }.keep_sinks(sinks, mark.total);
    }
    let centre = source.method.key_centre(source.kv_head);
    *reach = reach.max(source.piece.reach(source.kv_head, centre));
    let room = Room {
        keys: &mut raw.keys,
        ld: raw.ld,
        values: &mut raw.values,
        stride: source.method.d_value,
        fading: &mut raw.fading,
    };
    source.bring(0..1, room, source.open, true);
}

/// A few queries read a finished context, of which `open` tokens are raw, one by one.
#[allow(clippy::too_many_arguments)]
pub(super) fn read_each<E: Element>(
    method: &Method<E::Compute>,
    piece: &Piece<'_, E>,
    [query_head, kv_head]: [usize; 2],
    queries: Range<usize>,
    rows: &Rows<'_, E>,
    head: &HeadState<E::Compute>,
    [open, sinks]: [usize; 2],
    basis: &Basis,
) -> Tally {
    let mut work = head.work.clone();
    let ahead = ahead(&head.sums, None);
    let one = One::new(method, basis, head, [open, sinks], ahead, &mut work);
    let mut fit = FitWork::new(method);
    let mut tally = Tally::default();
    for query in queries {
        let place = [query_head, kv_head, query];
        // SAFETY: the caller's task alone answers these queries.
        unsafe { one.answer(piece, rows, place, &mut work, &mut fit, &mut tally) };
    }
    tally
}

/// One key/value head's past as the queries of its last token see it.
struct One<'o, T: Real> {
    method: &'o Method<T>,
    basis: &'o Basis,
    sums: &'o Sums<T>,
    open: (&'o Raw<T>, usize),
    sinks: (&'o Raw<T>, usize),
    ahead: isize,
    /// Whether there are far tokens.
    has_far: bool,
    /// Whether far sums hold any.
    has_sums: bool,
    /// The largest |k| in the far sums; 0 when there are none.
    reach: f64,
    /// What is left of the far sums.
    factor: T,
    /// g at the last token that has a weight less g at the last far one.
    gap: f64,
}

impl<'o, T: Real> One<'o, T> {
    fn new(
        method: &'o Method<T>,
        basis: &'o Basis,
        head: &'o HeadState<T>,
        [open, sinks]: [usize; 2],
        ahead: isize,
        work: &mut OneWork<T>,
    ) -> Self {
        let raw = &head.open;
        let is_far = method.near == Near::None;
        let live = |i: usize| raw.is_live(method.d_key, i);
        let newest = (0..open).rfind(|&i| live(i));
        let last = if is_far { newest } else { None };
        let mut one = One {
            method,
            basis,
            sums: &head.sums,
            open: (raw, open),
            sinks: (&head.sinks, sinks),
            ahead,
            has_far: head.mark.count > 0 || last.is_some(),
            has_sums: head.mark.count > 0,
            reach: if head.mark.count > 0 { head.reach.sqrt() } else { 0.0 },
            factor: T::ONE,
            gap: 0.0,
        };
        if method.fades {
            running_into(&raw.fading[..open], &mut work.g);
            let g = &work.g;
            let old = &head.sinks;
            let own = match newest {
                Some(newest) => g[newest],
                None if head.mark.count > 0 => -head.mark.lag,
                None => (0..sinks)
                    .rfind(|&i| old.is_live(method.d_key, i))
                    .map_or(0.0, |i| old.fading[i] - head.mark.total),
            };
            let anchor = last.map_or(-head.mark.lag, |last| g[last]);
            one.factor = faded(anchor + head.mark.lag);
            one.gap = own - anchor;
            let since = head.mark.total + own;
            let [far, near, old] = &mut work.fading;
            let (to, from) = if is_far { (far, anchor) } else { (near, own) };
            for (to, g) in to.iter_mut().zip(g) {
                *to = T::from_f64(from - g);
            }
            for (old, g) in old.iter_mut().zip(&head.sinks.fading[..sinks]) {
                *old = T::from_f64(since - g);
            }
        }
        one
    }

    /// One query's output is written.
    ///
    /// # Safety
    /// No other thread writes the same row.
    unsafe fn answer<E: Element<Compute = T>>(
        &self,
        piece: &Piece<'_, E>,
        rows: &Rows<'_, E>,
        [query_head, kv_head, query]: [usize; 3],
        work: &mut OneWork<T>,
        fit: &mut FitWork,
        tally: &mut Tally,
    ) {
        let method = self.method;
        let row = piece.q.row(piece.q_batch, query_head, piece.q_first + query);
        for (x, &q) in work.query.iter_mut().zip(row) {
            *x = q.to_compute() * method.scale;
        }
        let planes = method.planes();
        work.num[..planes * method.padded].fill(T::ZERO);
        work.den[..planes].fill(T::ZERO);
        self.read(work, planes);
        let is_far = method.near == Near::None;
        let mut level = 0.0;
        if method.is_per_query() {
            if is_far {
                self.weigh(self.open, 0, How::Moments(&method.orders), work);
            }
            level = self.fit(kv_head, query_head, work, fit, tally);
            if is_far {
                let den = work.den[0];
                let coefficients = std::mem::take(&mut work.coefficients);
                self.weigh(self.open, 0, How::Polynomial(&coefficients[..method.terms]), work);
                work.coefficients = coefficients;
                work.den[0] = den;
            }
        } else if is_far {
            self.weigh(self.open, 0, How::Polynomial(&method.coefficients), work);
        }
        if method.has_near() {
            let mut max = far_maximum(self.has_far, level + self.gap);
            if !is_far {
                self.weigh(self.open, 1, How::Exponential(&mut max), work);
            }
            self.weigh(self.sinks, 2, How::Exponential(&mut max), work);
        }
        // SAFETY: forwarded from the caller.
        unsafe {
            finish(method, rows, piece, [query_head, query], &work.den[..1], &work.num, tally);
        }
    }

    /// Far sums, each order to its plane.
    fn read(&self, work: &mut OneWork<T>, planes: usize) {
        if !self.has_sums {
            return;
        }
        let method = self.method;
        let mut read = ReadOne {
            basis: self.basis,
            query: &work.query,
            sums: &self.sums.sums,
            z: &self.sums.z,
            d_value: method.d_value,
            ahead: self.ahead,
            coefficients: &method.coefficients,
            planes: &method.planes_of,
            num: &mut work.num[..planes * method.padded],
            den: &mut work.den[..planes],
            scratch: &mut work.kernel,
        };
        // SAFETY: kernels are only handed out for instruction sets that are there.
        unsafe { (method.kernels.read_one)(&mut read) };
        if self.factor != T::ONE {
            for x in work.num[..planes * method.padded].iter_mut().chain(&mut work.den[..planes]) {
                *x = *x * self.factor;
            }
        }
    }

    /// Coefficients of the query, and the numerators of all orders in one; gives the logarithm of
    /// their scale.
    fn fit(
        &self,
        kv_head: usize,
        query_head: usize,
        work: &mut OneWork<T>,
        fit: &mut FitWork,
        tally: &mut Tally,
    ) -> f64 {
        let method = self.method;
        if !self.has_far {
            work.den[0] = T::ZERO;
            work.coefficients.fill(T::ZERO);
            return 0.0;
        }
        for (plane, &order) in method.orders.iter().enumerate() {
            fit.sums[order] = work.den[plane].to_f64();
        }
        let shift = method.shift(kv_head, |c| work.query[c].to_f64());
        let square = work.query[..method.d_key].iter().fold(T::ZERO, |sum, &x| sum + x * x);
        fit.reach = self.reach * square.to_f64().sqrt();
        let level = fit.fit(method, shift, query_head, tally);
        super::local::mix(
            &mut work.num,
            0..method.padded,
            method.padded,
            &method.orders,
            &fit.coefficients,
        );
        for (to, &c) in work.coefficients.iter_mut().zip(&fit.coefficients) {
            *to = T::from_f64(c);
        }
        work.den[0] = T::from_f64(fit.denominator);
        level
    }

    /// Raw tokens, faded by `work.fading[fading]`.
    fn weigh(
        &self,
        (raw, count): (&Raw<T>, usize),
        fading: usize,
        how: How<'_, T>,
        work: &mut OneWork<T>,
    ) {
        if count == 0 {
            return;
        }
        let method = self.method;
        let mut weigh = WeighOne {
            query: &work.query,
            keys: &raw.keys,
            ld: raw.ld,
            count,
            fading: &work.fading[fading],
            values: &raw.values,
            d_value: method.d_value,
            how,
            num: &mut work.num[..method.padded],
            den: &mut work.den,
            scratch: &mut work.kernel,
        };
        // SAFETY: kernels are only handed out for instruction sets that are there.
        unsafe { (method.kernels.weigh_one)(&mut weigh, method.d_key) };
    }
}
