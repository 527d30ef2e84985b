//! The state form, in two passes over chunks of tokens.
//!
//! Forward, as the call itself: each chunk's queries read the far sums and weigh what is raw, which
//! gives D and δ, their own gradients and those by raw keys; then tokens are folded. Backward, with
//! Γ_f = Σ_t Φ_f(q_t)·[dy_t; −δ_t]/D_t over all queries that come after: the tokens of a fold take
//! their gradients from Γ as queries take outputs from sums, then the queries that read before it
//! are added. So neither pass needs what the other has summed, and nothing is kept but two numbers
//! per query.

use std::ops::Range;

use super::Env;
use super::gradients::{Out, by_logs};
use super::panel::{FromFar, Made, PanelWork, Raws};
use super::state::HeadGradient;
use crate::arch::{
    Absorb, Buffer, Far, QUERIES, ReadBack, ReadBackWork, Scratch, TOKENS, Tokens, Values, stride,
};
use crate::attention::standing::Standing;
use crate::attention::stream::{Chunk, PackedSums, features};
use crate::attention::window::{Sinks, Source, Window};
use crate::attention::{Piece, load};
use crate::basis::{Basis, TILE, Tile};
use crate::state::{FoldWork, HeadState, Mark, Raw, Sums};
use crate::{Element, Real, parallel};

/// One key/value head of one sequence.
pub(super) struct Unit<'u, 'a, E: Element> {
    pub piece: &'u Piece<'a, E>,
    pub kv_head: usize,
    /// What it goes on from: open tokens, tokens before them, the past.
    pub open: usize,
    pub folded: u64,
    pub past: Option<&'u HeadState<E::Compute>>,
    /// By the final state, then by the initial one.
    pub gradient: Option<&'u mut HeadGradient<E::Compute>>,
    /// By the slope.
    pub by_slope: f64,
}

/// What all units share.
pub(super) struct Sweep<'s, E: Element> {
    pub env: &'s Env<'s, E>,
    pub basis: &'s Basis,
    pub chunk: usize,
    pub causal: bool,
}

/// What a unit's queries leave for the second pass.
struct Asked<T> {
    /// What sums were multiplied by over D, and δ: `[group][queries]`.
    factor: Vec<T>,
    delta: Vec<T>,
}

/// Where some queries stand: the tokens around them, and the sums they read.
struct Place<'p, T: Real> {
    window: &'p Window<T>,
    sinks: &'p Sinks<T>,
    mark: Mark,
    sums: &'p Sums<T>,
}

/// Working memory of one thread.
struct Work<T: Real + 'static> {
    packed: PackedSums<T>,
    panel: PanelWork<T>,
    read_back: ReadBackWork<T>,
    scratch: Scratch<T>,
    fold: FoldWork<T>,
    /// `[d_key + 1][ld]`: tokens as features take them.
    x: Buffer<T>,
    /// `[d_value][ld]`: what they are multiplied with.
    values: Buffer<T>,
    /// `[count][padded]`: the same row by row, or numerators.
    rows: Buffer<T>,
    /// `[d_key][ld]`: gradients by sums and by z.
    by: [Buffer<T>; 2],
    /// `[count]`.
    dot: Buffer<T>,
    den: Buffer<T>,
}

impl<E: Element> Sweep<'_, E> {
    /// All units; afterwards each has its slope's gradient.
    pub(super) fn run(&self, units: &mut [Unit<'_, '_, E>], out: &Out<'_, E>) {
        parallel::for_each(units, |unit| self.unit(unit, out));
    }

    fn work(&self) -> Work<E::Compute> {
        let (method, empty) = (self.env.method, Buffer::default);
        Work {
            packed: PackedSums::new(method),
            panel: PanelWork::new(self.env),
            read_back: ReadBackWork::new(self.basis),
            scratch: Scratch::new(self.basis),
            fold: FoldWork::new(self.basis, method.d_value, method.kernels),
            x: empty(),
            values: empty(),
            rows: empty(),
            by: [empty(), empty()],
            dot: empty(),
            den: empty(),
        }
    }

    fn unit(&self, unit: &mut Unit<'_, '_, E>, out: &Out<'_, E>) {
        let (method, piece, kv_head) = (self.env.method, unit.piece, unit.kv_head);
        let (open, total) = (unit.open, unit.open + piece.keys);
        let raw = unit.past.map(|past| &past.open);
        let source = Source { method, piece, kv_head, open, raw, folded: unit.folded };
        let keep = unit.gradient.is_some();
        let mut chunks = method.chunks(self.chunk, keep, open, piece.keys);
        if !self.causal && !keep {
            // Those before the last are folded anyway.
            chunks.iter_mut().rev().take(1).for_each(|last| last.fold = last.window().end);
        }
        let first_mark = unit.past.map_or(Mark::default(), |past| past.mark);
        let sinks = self.sinks(unit, source, first_mark.total);
        let mut made = Made::new(self.env, total);
        let mut of_sinks = Made::new(self.env, sinks.count);
        let end = method.folded(total);
        let mut later = 0.0;
        if let Some(gradient) = &unit.gradient {
            made.add_at(end, &gradient.open, 0..total - end);
            of_sinks.add_at(0, &gradient.sinks, 0..sinks.count);
            later = gradient.past;
        }

        // Forward: queries read and tokens are folded.
        let new = || Sums::new(self.basis.len(), method.d_value);
        let mut sums = unit.past.map_or_else(new, |past| past.sums.clone());
        let mut mark = first_mark;
        let mut marks = vec![];
        let size = self.env.group * piece.queries;
        let mut asked = Asked { factor: vec![Real::from_f64(0.0); size], delta: vec![] };
        asked.delta = asked.factor.clone();
        let mut work = self.work();
        let longest = chunks.iter().map(|chunk| chunk.window().len()).max().unwrap_or(0);
        let mut window = Window::new(method, longest.max(total - end));
        for chunk in &chunks {
            marks.push(mark);
            window.load(source, chunk.window());
            if self.causal && !chunk.queries.is_empty() {
                let place = Place { window: &window, sinks: &sinks, mark, sums: &sums };
                let first = chunk.queries.start - chunk.first;
                let stand = |which: Range<usize>| {
                    let which = first + which.start..first + which.end;
                    let (at, folded) = (chunk.first, source.folded);
                    Standing::causal(method, &window, &sinks, &mark, which, at, folded)
                };
                let queries = chunk.queries.start - open..chunk.queries.end - open;
                let own =
                    self.ask(unit, queries, &place, stand, &mut of_sinks, &mut asked, &mut work);
                made.add_at(chunk.first, &own, 0..window.count);
            }
            self.fold(chunk, &mut window, &mut mark, &mut sums, &mut work);
        }
        if !self.causal {
            // What is left is in the open block.
            window.load(source, if keep { end..total } else { 0..0 });
            let place = Place { window: &window, sinks: &sinks, mark, sums: &sums };
            let stand =
                |which: Range<usize>| Standing::full(method, &window, &sinks, &mark, which.len());
            for queries in self.batches(piece.queries) {
                let own =
                    self.ask(unit, queries, &place, stand, &mut of_sinks, &mut asked, &mut work);
                made.add_at(end, &own, 0..window.count);
            }
        }
        drop(sums);

        // Backward: what is folded takes its gradients, then queries before it are added.
        let mut gamma = match &mut unit.gradient {
            Some(gradient) => std::mem::replace(&mut gradient.sums, Sums::new(0, 0)),
            None => new(),
        };
        if !self.causal {
            for queries in self.batches(piece.queries) {
                self.add(unit, queries, Real::from_f64(1.0), &asked, &mut gamma, &mut work);
            }
        }
        for (chunk, mut mark) in chunks.iter().zip(marks).rev() {
            window.load(source, chunk.first..chunk.fold.max(chunk.first));
            let count = window.count;
            let (factor, before) = window.begin_fold(method.d_key, count, &mut mark);
            if count > 0 {
                self.unfold(&window, chunk.first, &mut made, &gamma, &mut work);
            }
            window.end_fold(method.d_key, &before);
            if self.causal && !chunk.queries.is_empty() {
                let queries = chunk.queries.start - open..chunk.queries.end - open;
                self.add(unit, queries, factor, &asked, &mut gamma, &mut work);
            } else {
                gamma.fade(factor);
            }
        }
        if let Some(gradient) = &mut unit.gradient {
            gradient.sums = gamma;
        }
        self.finish(unit, &mut made, &of_sinks, later, out);
    }

    fn sinks(
        &self,
        unit: &Unit<'_, '_, E>,
        source: Source<'_, '_, E>,
        total: f64,
    ) -> Sinks<E::Compute> {
        let method = self.env.method;
        if method.sinks == 0 {
            return Sinks::default();
        }
        let seen = unit.folded + (unit.open + unit.piece.keys) as u64;
        let count = seen.min(method.sinks as u64) as usize;
        let mut raw = match unit.past {
            Some(past) => past.sinks.clone(),
            None => Raw::new([method.d_key, method.d_value], count, method.fades),
        };
        source.keep_sinks(&mut raw, total);
        Sinks::new(method, &raw, count)
    }

    /// Queries that all read one finished context, some at a time.
    fn batches(&self, queries: usize) -> impl Iterator<Item = Range<usize>> + use<E> {
        let chunk = self.chunk;
        (0..queries).step_by(chunk).map(move |first| first..(first + chunk).min(queries))
    }

    /// Queries of all heads of the group, of the call's `which`, are answered again and take their
    /// gradients; gives those by the window's tokens.
    #[allow(clippy::too_many_arguments)]
    fn ask(
        &self,
        unit: &Unit<'_, '_, E>,
        which: Range<usize>,
        place: &Place<'_, E::Compute>,
        stand: impl Fn(Range<usize>) -> Standing<E::Compute>,
        of_sinks: &mut Made<E::Compute>,
        asked: &mut Asked<E::Compute>,
        work: &mut Work<E::Compute>,
    ) -> Made<E::Compute> {
        let (env, method, piece) = (self.env, self.env.method, unit.piece);
        let raws = Raws::new(env, place.window, place.sinks);
        let mut made = Made::new(env, place.window.count);
        let standing = stand(0..which.len());
        let ld = stride(which.len());
        for g in 0..env.group {
            let head = unit.kv_head * env.group + g;
            let sums = (place.mark.count > 0).then_some(place.sums);
            self.read(piece, head, which.clone(), &standing, sums, work);
            for first in (0..which.len()).step_by(QUERIES) {
                let own = first..(first + QUERIES).min(which.len());
                let queries = which.start + own.start..which.start + own.end;
                let standing = stand(own.clone());
                let mut from = FromFar::new(method, &standing);
                from.take(first, &work.dot, &work.den);
                env.load(piece, head, queries.clone(), &mut work.panel);
                let far = sums.map(|_| from.seen([&work.by[0][first..], &work.by[1][first..]], ld));
                let made = [&mut made, &mut *of_sinks];
                // SAFETY: this thread alone answers these queries.
                unsafe {
                    env.panel(piece, head, queries, &raws, &standing, far, made, &mut work.panel);
                }
                for t in 0..own.len() {
                    let at = g * piece.queries + which.start + first + t;
                    let faded = standing.factor.get(t).copied().unwrap_or(Real::from_f64(1.0));
                    (asked.factor[at], asked.delta[at]) = work.panel.settled(t);
                    asked.factor[at] = asked.factor[at] * faded;
                }
            }
        }
        made
    }

    /// Some queries of a head read the far sums: leaves `by`, `dot` and `den` in `work`.
    fn read(
        &self,
        piece: &Piece<'_, E>,
        head: usize,
        which: Range<usize>,
        standing: &Standing<E::Compute>,
        sums: Option<&Sums<E::Compute>>,
        work: &mut Work<E::Compute>,
    ) {
        let method = self.env.method;
        let ld = stride(which.len());
        work.zero(method.d_key, ld);
        let Some(sums) = sums else {
            return;
        };
        let x = work.x.grown((method.d_key + 1) * ld);
        let place = [piece.q_batch, head, piece.q_first + which.start];
        let n = which.len();
        let count = method.load_queries(piece, head, which, standing, x, ld);
        let values = work.values.grown(method.d_value * ld);
        load::transpose(&self.env.dy, place, n, None, values, ld, 0);
        load::clear(values, ld, method.d_value, n..count);
        self.read_back(sums, None, ld, count, work);
    }

    /// Tokens in `work` read `sums`; if `tokens` are given, those, which also want numerators.
    fn read_back(
        &self,
        sums: &Sums<E::Compute>,
        tokens: Option<Tokens<'_, E::Compute>>,
        ld: usize,
        count: usize,
        work: &mut Work<E::Compute>,
    ) {
        let method = self.env.method;
        let Work { packed, read_back, scratch, x, values, rows, by, dot, den, .. } = work;
        let [by_sums, by_z] = by;
        let numerators = tokens.is_some();
        let tokens = tokens.unwrap_or(Tokens { x, ld, count });
        let mut unused = vec![E::Compute::ZERO; if numerators { count } else { 0 }];
        for tiles in method.tiles_at_once(self.basis, 0..self.basis.tiles().len()) {
            let which = tiles[0].start..tiles[0].start + features(tiles);
            let of = which.start * method.d_value..which.end * method.d_value;
            if !packed.pack(method, self.basis, tiles, &sums.sums[of], &sums.z[which]) {
                continue;
            }
            if numerators {
                packed.read(method, self.basis, tiles, tokens, rows, &mut unused, scratch);
            }
            for (i, tile) in tiles.iter().enumerate() {
                let mut call = ReadBack {
                    basis: self.basis,
                    tile,
                    tokens,
                    sums: &packed.sums[i * TILE * method.padded..],
                    z: &packed.z[i * TILE..],
                    padded: method.padded,
                    d_value: method.d_value,
                    values,
                    by_sums,
                    by_z,
                    dot,
                    den,
                    work: read_back,
                };
                // SAFETY: kernels are only handed out for instruction sets that are there.
                unsafe { (method.kernels.read_back)(&mut call) };
            }
        }
    }

    /// A chunk's first tokens are folded.
    fn fold(
        &self,
        chunk: &Chunk,
        window: &mut Window<E::Compute>,
        mark: &mut Mark,
        sums: &mut Sums<E::Compute>,
        work: &mut Work<E::Compute>,
    ) {
        let method = self.env.method;
        let count = chunk.fold.saturating_sub(chunk.first);
        let (factor, before) = window.begin_fold(method.d_key, count, mark);
        if count > 0 {
            let tokens = window.tokens(count);
            work.fold.prepare(&window.values, tokens.count);
            let tiles = self.basis.tiles();
            let mut far = whole(sums, self.basis, method.d_value);
            work.fold.fold_tiles(self.basis, tiles, tokens, &window.values, factor, &mut far);
        }
        window.end_fold(method.d_key, &before);
    }

    /// The window's tokens, with the weights that they were folded with, take their gradients from
    /// those by the sums.
    fn unfold(
        &self,
        window: &Window<E::Compute>,
        first: usize,
        made: &mut Made<E::Compute>,
        gamma: &Sums<E::Compute>,
        work: &mut Work<E::Compute>,
    ) {
        let method = self.env.method;
        let tokens = window.tokens(window.count);
        let (ld, count, padded) = (window.ld, tokens.count, method.padded);
        work.zero(method.d_key, ld);
        work.rows.grown(count * padded)[..count * padded].fill(E::Compute::ZERO);
        let values = work.values.grown(method.d_value * ld);
        for (t, row) in window.values.chunks(padded).take(count).enumerate() {
            for (channel, &v) in row[..method.d_value].iter().enumerate() {
                values[channel * ld + t] = v;
            }
        }
        self.read_back(gamma, Some(tokens), ld, count, work);
        let padded_key = self.env.padded_key;
        for t in 0..window.count {
            let at = first + t;
            let dk = &mut made.dk[at * padded_key..][..method.d_key];
            for (channel, dk) in dk.iter_mut().enumerate() {
                *dk += work.by[0][channel * ld + t] + work.by[1][channel * ld + t];
            }
            let dv = &mut made.dv[at * padded..][..padded];
            dv.iter_mut().zip(&work.rows[t * padded..]).for_each(|(a, &b)| *a += b);
            if let Some(dw) = made.dw.get_mut(at) {
                *dw += work.dot[t].to_f64() + work.den[t].to_f64();
            }
        }
    }

    /// Adds the call's queries `which` to the gradients by sums, of which `factor` is left.
    fn add(
        &self,
        unit: &Unit<'_, '_, E>,
        which: Range<usize>,
        mut factor: E::Compute,
        asked: &Asked<E::Compute>,
        gamma: &mut Sums<E::Compute>,
        work: &mut Work<E::Compute>,
    ) {
        let (env, method, piece) = (self.env, self.env.method, unit.piece);
        let (n, ld, padded) = (which.len(), stride(which.len()), method.padded);
        for g in 0..env.group {
            let head = unit.kv_head * env.group + g;
            let x = work.x.grown((method.d_key + 1) * ld);
            let count = load::queries(piece, head, which.clone(), method.scale, x, ld);
            let own = g * piece.queries + which.start;
            x[method.d_key * ld..][..n].copy_from_slice(&asked.factor[own..own + n]);
            let rows = work.rows.grown(count * padded);
            rows[n * padded..].fill(E::Compute::ZERO);
            for t in 0..n {
                let row = &mut rows[t * padded..(t + 1) * padded];
                let from = env.dy.row(piece.q_batch, head, piece.q_first + which.start + t);
                row[method.d_value..].fill(E::Compute::ZERO);
                for (to, from) in row.iter_mut().zip(from) {
                    *to = from.to_compute();
                }
            }
            let by = work.den.grown(count);
            by[n..].fill(E::Compute::ZERO);
            for (by, &delta) in by.iter_mut().zip(&asked.delta[own..own + n]) {
                *by = E::Compute::ZERO - delta;
            }
            let tokens = Tokens { x: &work.x, ld, count };
            let mut far = whole(gamma, self.basis, method.d_value);
            for tile in self.basis.tiles().iter().filter(|tile| method.reads(tile)) {
                let part = far.part(tile.start, tile.len, method.d_value);
                let values = [&work.rows[..count * padded], &work.den[..count]];
                add_tile(
                    method.kernels,
                    self.basis,
                    tile,
                    tokens,
                    values,
                    factor,
                    part,
                    &mut work.fold,
                );
            }
            factor = Real::from_f64(1.0);
        }
    }

    /// Writes one unit's gradients.
    fn finish(
        &self,
        unit: &mut Unit<'_, '_, E>,
        made: &mut Made<E::Compute>,
        of_sinks: &Made<E::Compute>,
        later: f64,
        out: &Out<'_, E>,
    ) {
        let (method, piece, open) = (self.env.method, unit.piece, unit.open);
        // Sinks among the call's tokens are tokens of the call.
        let seen = unit.folded + open as u64;
        let old = seen.min(method.sinks as u64) as usize;
        let sinks = (seen + piece.keys as u64).min(method.sinks as u64) as usize;
        made.add_at(open, of_sinks, old..sinks);
        if let Some(gradient) = &mut unit.gradient {
            gradient.open.clear();
            gradient.open.add_at(0, made, 0..open);
            gradient.sinks.clear();
            gradient.sinks.add_at(0, of_sinks, 0..old);
        }
        for token in 0..piece.keys {
            let at = open + token;
            let dk = &made.dk[at * self.env.padded_key..][..method.d_key];
            let dv = &made.dv[at * method.padded..][..method.d_value];
            // SAFETY: this thread alone writes.
            unsafe { out.write_key(piece, unit.kv_head, token, [dk, dv]) };
        }
        if !self.env.fades {
            return;
        }
        let (by_log, past) = by_logs(&made.dw[open..open + piece.keys], later);
        // SAFETY: as above.
        unsafe { out.write_fading(piece, unit.kv_head, &by_log) };
        unit.by_slope = -by_log.iter().sum::<f64>();
        if let Some(gradient) = &mut unit.gradient {
            gradient.past = past;
        }
    }
}

impl<T: Real> Work<T> {
    /// Zeroes what reading adds to, for up to `ld` tokens.
    fn zero(&mut self, d_key: usize, ld: usize) {
        for by in &mut self.by {
            by.grown(d_key * ld).fill(T::ZERO);
        }
        self.dot.grown(ld).fill(T::ZERO);
        self.den.grown(ld).fill(T::ZERO);
    }
}

/// All sums as one stretch.
fn whole<'a, T: Real>(sums: &'a mut Sums<T>, basis: &Basis, d_value: usize) -> Far<'a, T> {
    let all = 0..basis.tiles().len();
    sums.split(basis, d_value, &[all]).swap_remove(0)
}

/// Adds tokens' features times values, and times `by`, to one tile of sums.
#[allow(clippy::too_many_arguments)]
fn add_tile<T: Real>(
    kernels: &crate::arch::Kernels<T>,
    basis: &Basis,
    tile: &Tile,
    tokens: Tokens<'_, T>,
    [rows, by]: [&[T]; 2],
    factor: T,
    mut far: Far<'_, T>,
    fold: &mut FoldWork<T>,
) {
    let padded = fold.padded;
    let features = tile.len.next_multiple_of(16).min(TILE);
    fold.sums[..features * padded].fill(T::ZERO);
    fold.z[..features * TOKENS].fill(T::ZERO);
    let mut call = Absorb {
        basis,
        tile,
        tokens,
        values: Values { rows, prepared: &[] },
        by,
        padded,
        sums: &mut fold.sums,
        z: &mut fold.z,
        scratch: &mut fold.scratch,
    };
    // SAFETY: kernels are only handed out for instruction sets that are there.
    unsafe {
        (kernels.absorb)(&mut call);
        (kernels.fold)(&fold.sums, &fold.z, tile.len, fold.d_value, factor, &mut far);
    }
}
