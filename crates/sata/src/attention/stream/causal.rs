//! Causal attention: each chunk's queries read what came before, then what leaves the near blocks
//! is folded.

use super::{Chunk, Env, STRETCH, Slice, Source, Unit, features};
use crate::arch::{Buffer, Scratch, Tokens, stride};
use crate::attention::finish;
use crate::attention::local::{Local, padded};
use crate::attention::standing::Standing;
use crate::attention::tally::Tally;
use crate::attention::window::{Sinks, Window};
use crate::state::HeadState;
use crate::{Element, Real, parallel};

/// Queries of a chunk, over the query heads of a group, and what they have summed.
struct Queries<T> {
    /// `[group][d_key + 1][ld]`.
    x: Buffer<T>,
    ld: usize,
    /// Tokens with queries, padded.
    count: usize,
}

/// What answers of a unit's chunks share.
struct Scene<'s, 'a, E: Element> {
    source: Source<'s, 'a, E>,
    /// The largest |k|.
    reach: f64,
    sinks: &'s Sinks<E::Compute>,
}

impl<E: Element> Env<'_, E> {
    /// Reads and absorbs a head's tokens in order.
    pub(super) fn causal(&self, unit: &mut Unit<'_, '_, E>) -> Tally {
        let chunks = self.method.chunks(self.chunk, self.keep, unit.open, unit.piece.keys);
        let longest = chunks.iter().map(|chunk| chunk.window().len()).max().unwrap_or(0);
        let widest = chunks.iter().map(|chunk| chunk.queries.len()).max().unwrap_or(0);
        let ld = stride(widest);
        let sinks = self.sinks(unit);
        let source = self.source(unit);
        let HeadState { sums, mark, open: raw, reach, .. } = &mut *unit.head;
        let source = Source { raw: Some(raw), ..source };
        let scene = Scene { source, reach: reach.sqrt(), sinks: &sinks };
        let stretch = if self.parts.len() == 1 { 1 } else { STRETCH };
        // Elements of one chunk's numerators and denominators, over the group.
        let (plane, planes) = (padded(widest.max(1)), self.method.planes());
        let den_len = self.group * planes * plane;
        let num_len = den_len * self.method.padded;
        let mut slices: Vec<_> = sums
            .split(self.basis, self.method.d_value, &self.parts)
            .into_iter()
            .enumerate()
            .map(|(index, far)| {
                let slice = Slice::new(self, index, far, *mark, longest);
                let x = Buffer::zeroed(self.group * (self.method.d_key + 1) * ld);
                let queries = Queries { x, ld, count: 0 };
                let num = Buffer::<E::Compute>::zeroed(stretch * num_len);
                (slice, queries, num, Buffer::<E::Compute>::zeroed(stretch * den_len))
            })
            .collect();
        let mut tally = Tally::default();
        for stretch in chunks.chunks(stretch) {
            let alone = slices.len() == 1;
            let mut found: Vec<_> = slices
                .iter_mut()
                .map(|(slice, queries, num, den)| (slice, queries, num, den, Tally::default()))
                .collect();
            parallel::for_each(&mut found, |(slice, queries, num, den, tally)| {
                num.fill(E::Compute::ZERO);
                den.fill(E::Compute::ZERO);
                slice.marks.clear();
                let places = num.chunks_mut(num_len).zip(den.chunks_mut(den_len));
                for (chunk, (num, den)) in stretch.iter().zip(places) {
                    slice.marks.push(slice.mark);
                    slice.window.load(scene.source, chunk.window());
                    let standing = self.stand(&scene, chunk, &slice.window, &slice.mark);
                    self.read_and_fold(&scene, chunk, slice, &standing, queries, num, den);
                    if alone {
                        let Slice { window, scratch, .. } = &mut **slice;
                        self.conclude(
                            &scene, chunk, window, &standing, queries, num, den, scratch, tally,
                        );
                    }
                }
            });
            tally = found.into_iter().fold(tally, |tally, (.., own)| tally.merged(own));
            if alone {
                continue;
            }
            let (first, others) = slices.split_at_mut(1);
            let (Slice { marks, .. }, _, num, den) = &mut first[0];
            for (_, _, other_num, other_den) in others {
                num.iter_mut().zip(&other_num[..]).for_each(|(a, &b)| *a += b);
                den.iter_mut().zip(&other_den[..]).for_each(|(a, &b)| *a += b);
            }
            let places = num.chunks_mut(num_len).zip(den.chunks_mut(den_len));
            let mut tasks: Vec<_> = stretch.iter().zip(&*marks).zip(places).collect();
            tally = tally.merged(parallel::map_reduce(
                &mut tasks,
                Tally::default(),
                |((chunk, mark), (num, den))| {
                    let mut window = Window::new(self.method, chunk.window().len());
                    window.load(scene.source, chunk.window());
                    let standing = self.stand(&scene, chunk, &window, mark);
                    let x = Buffer::zeroed(self.group * (self.method.d_key + 1) * ld);
                    let mut queries = Queries { x, ld, count: 0 };
                    self.load_queries(&scene, chunk, &standing, &mut queries);
                    let mut scratch = Scratch::new(self.basis);
                    let mut tally = Tally::default();
                    self.conclude(
                        &scene,
                        chunk,
                        &window,
                        &standing,
                        &queries,
                        num,
                        den,
                        &mut scratch,
                        &mut tally,
                    );
                    tally
                },
                Tally::merged,
            ));
        }
        let after = slices[0].0.mark;
        drop(slices);
        unit.head.mark = after;
        if self.keep {
            self.open(unit);
        }
        tally
    }

    fn stand(
        &self,
        scene: &Scene<'_, '_, E>,
        chunk: &Chunk,
        window: &Window<E::Compute>,
        mark: &crate::state::Mark,
    ) -> Standing<E::Compute> {
        let which = chunk.queries.start - chunk.first..chunk.queries.end - chunk.first;
        Standing::causal(
            self.method,
            window,
            scene.sinks,
            mark,
            which,
            chunk.first,
            scene.source.folded,
        )
    }

    fn load_queries(
        &self,
        scene: &Scene<'_, '_, E>,
        chunk: &Chunk,
        standing: &Standing<E::Compute>,
        queries: &mut Queries<E::Compute>,
    ) {
        let Source { piece, kv_head, open, .. } = scene.source;
        let ld = queries.ld;
        let plane = (self.method.d_key + 1) * ld;
        for (g, x) in queries.x.chunks_mut(plane).take(self.group).enumerate() {
            let which = chunk.queries.start - open..chunk.queries.end - open;
            let head = kv_head * self.group + g;
            queries.count = self.method.load_queries(piece, head, which, standing, x, ld);
        }
    }

    /// One chunk of one slice: its queries read what came before, then tokens are folded.
    #[allow(clippy::too_many_arguments)]
    fn read_and_fold(
        &self,
        scene: &Scene<'_, '_, E>,
        chunk: &Chunk,
        slice: &mut Slice<'_, E::Compute>,
        standing: &Standing<E::Compute>,
        queries: &mut Queries<E::Compute>,
        num: &mut [E::Compute],
        den: &mut [E::Compute],
    ) {
        let (d_key, d_value) = (self.method.d_key, self.method.d_value);
        self.load_queries(scene, chunk, standing, queries);
        let count = queries.count;
        let reads = !chunk.queries.is_empty() && slice.mark.count > 0;
        let folds = chunk.fold - chunk.first;
        let (factor, before) = slice.begin_fold(d_key, folds);
        let each = self.method.planes() * count;
        let Slice { far, fold, scratch, packed, window, .. } = slice;
        let tokens = window.tokens(folds);
        let base = self.basis.tiles()[slice.tiles.start].start;
        for tiles in self.method.tiles_at_once(self.basis, slice.tiles.clone()) {
            let mut far = far.part(tiles[0].start - base, features(tiles), d_value);
            if reads && packed.pack(self.method, self.basis, tiles, far.sums, far.z) {
                for g in 0..self.group {
                    let x = &queries.x[g * (d_key + 1) * queries.ld..];
                    packed.read(
                        self.method,
                        self.basis,
                        tiles,
                        Tokens { x, ld: queries.ld, count },
                        &mut num[g * each * self.method.padded..],
                        &mut den[g * each..],
                        scratch,
                    );
                }
            }
            if folds > 0 {
                fold.fold_tiles(self.basis, tiles, tokens, &window.values, factor, &mut far);
            }
        }
        slice.window.end_fold(d_key, &before);
    }

    /// Raw tokens are weighed and outputs written.
    #[allow(clippy::too_many_arguments)]
    fn conclude(
        &self,
        scene: &Scene<'_, '_, E>,
        chunk: &Chunk,
        window: &Window<E::Compute>,
        standing: &Standing<E::Compute>,
        queries: &Queries<E::Compute>,
        num: &mut [E::Compute],
        den: &mut [E::Compute],
        scratch: &mut Scratch<E::Compute>,
        tally: &mut Tally,
    ) {
        if chunk.queries.is_empty() {
            return;
        }
        let Source { piece, kv_head, open, .. } = scene.source;
        let count = queries.count;
        let each = self.method.planes() * count;
        for g in 0..self.group {
            let num = &mut num[g * each * self.method.padded..][..each * self.method.padded];
            let den = &mut den[g * each..][..each];
            let query_head = kv_head * self.group + g;
            let x = &queries.x[g * (self.method.d_key + 1) * queries.ld..];
            let mut local = Local {
                window,
                sinks: scene.sinks,
                reach: scene.reach,
                standing,
                queries: Tokens { x, ld: queries.ld, count },
                query_head,
                kv_head,
                num,
                den,
                scratch,
            };
            self.method.weigh(&mut local, tally);
            // SAFETY: this unit alone answers these query heads, and each chunk once.
            unsafe {
                let den = &den[..standing.len()];
                let place = [query_head, chunk.queries.start - open];
                finish(self.method, self.rows, piece, place, den, num, tally);
            }
        }
    }
}
