//! Full attention: all keys are folded first, then every query reads the finished context.

use std::ops::Range;

use super::{Env, Slice, Unit, features};
use crate::arch::{Buffer, PANEL, Scratch, TOKENS, Tokens, stride};
use crate::attention::local::Local;
use crate::attention::standing::Standing;
use crate::attention::tally::Tally;
use crate::attention::window::{Sinks, Source, Window};
use crate::attention::{finish, step};
use crate::state::HeadState;
use crate::{Element, parallel};

impl<E: Element> Env<'_, E> {
    /// Absorbs a head's keys, for queries that read the finished context.
    pub(super) fn absorb(&self, unit: &mut Unit<'_, '_, E>) -> Tally {
        let mut chunks = self.method.chunks(self.chunk, self.keep, unit.open, unit.piece.keys);
        if !self.keep {
            // Those before the last are folded anyway.
            chunks.iter_mut().rev().take(1).for_each(|last| last.fold = last.window().end);
        }
        let longest = chunks.iter().map(|chunk| chunk.window().len()).max().unwrap_or(0);
        let source = self.source(unit);
        let HeadState { sums, mark, open: raw, .. } = &mut *unit.head;
        let source = Source { raw: Some(raw), ..source };
        let mut slices: Vec<Slice<'_, E::Compute>> = sums
            .split(self.basis, self.method.d_value, &self.parts)
            .into_iter()
            .enumerate()
            .map(|(index, far)| Slice::new(self, index, far, *mark, longest))
            .collect();
        parallel::for_each(&mut slices, |slice| {
            for chunk in chunks.iter().filter(|chunk| chunk.fold > chunk.first) {
                slice.window.load(source, chunk.first..chunk.fold);
                let (factor, _) = slice.begin_fold(self.method.d_key, chunk.fold - chunk.first);
                let Slice { tiles, far, fold, window, .. } = slice;
                let tokens = window.tokens(window.count);
                let tiles = &self.basis.tiles()[tiles.clone()];
                fold.fold_tiles(self.basis, tiles, tokens, &window.values, factor, far);
            }
        });
        let after = slices[0].mark;
        drop(slices);
        unit.head.mark = after;
        if self.keep {
            self.open(unit);
        }
        Tally::default()
    }

    /// Every query of the call reads its head's finished context.
    pub(super) fn answer(&self, units: &[Unit<'_, '_, E>]) -> Tally {
        let mut contexts: Vec<_> =
            units.iter().map(|unit| (unit, Window::default(), Sinks::default())).collect();
        parallel::for_each(&mut contexts, |(unit, window, sinks)| {
            let open = self.open_after(unit);
            *window = Window::new(self.method, open);
            window.load_raw(self.method, &unit.head.open, open);
            *sinks = self.sinks(unit);
        });
        let mut tasks = vec![];
        for context in &contexts {
            let queries = context.0.piece.queries;
            // Fewer queries per task when there are threads to spare.
            let share = (queries * self.group * units.len()).div_ceil(parallel::threads());
            let width = self.chunk.min(share.next_multiple_of(PANEL)).max(PANEL);
            for g in 0..self.group {
                for first in (0..queries).step_by(width) {
                    tasks.push((context, g, first..(first + width).min(queries)));
                }
            }
        }
        parallel::map_reduce(
            &mut tasks,
            Tally::default(),
            |((unit, window, sinks), g, queries)| {
                self.read(unit, window, sinks, *g, queries.clone())
            },
            Tally::merged,
        )
    }

    /// Tokens that wait in the open block after the call.
    fn open_after(&self, unit: &Unit<'_, '_, E>) -> usize {
        let total = unit.open + unit.piece.keys;
        if self.keep { total - self.method.folded(total) } else { 0 }
    }

    fn read(
        &self,
        unit: &Unit<'_, '_, E>,
        window: &Window<E::Compute>,
        sinks: &Sinks<E::Compute>,
        g: usize,
        queries: Range<usize>,
    ) -> Tally {
        let (piece, query_head) = (unit.piece, unit.kv_head * self.group + g);
        let (method, kv_head) = (self.method, unit.kv_head);
        if queries.len() < TOKENS / 4 {
            return step::read_each(
                method,
                piece,
                [query_head, kv_head],
                queries,
                self.rows,
                unit.head,
                [window.count, sinks.count],
                self.basis,
            );
        }
        let standing = Standing::full(method, window, sinks, &unit.head.mark, queries.len());
        let ld = stride(queries.len());
        let mut x = Buffer::zeroed((method.d_key + 1) * ld);
        let first = queries.start;
        let count = method.load_queries(piece, query_head, queries, &standing, &mut x, ld);
        let mut num = Buffer::zeroed(method.planes() * count * method.padded);
        let mut den = Buffer::zeroed(method.planes() * count);
        let mut scratch = Scratch::new(self.basis);
        let mut packed = super::PackedSums::new(method);
        let sums = &unit.head.sums;
        let tokens = Tokens { x: &x, ld, count };
        for tiles in method.tiles_at_once(self.basis, 0..self.basis.tiles().len()) {
            let which = tiles[0].start..tiles[0].start + features(tiles);
            let rows = which.start * method.d_value..which.end * method.d_value;
            if packed.pack(method, self.basis, tiles, &sums.sums[rows], &sums.z[which]) {
                packed.read(method, self.basis, tiles, tokens, &mut num, &mut den, &mut scratch);
            }
        }
        let mut tally = Tally::default();
        let mut local = Local {
            window,
            sinks,
            reach: unit.head.reach.sqrt(),
            standing: &standing,
            queries: tokens,
            query_head,
            kv_head,
            num: &mut num,
            den: &mut den,
            scratch: &mut scratch,
        };
        method.weigh(&mut local, &mut tally);
        // SAFETY: tasks answer disjoint queries.
        unsafe {
            let den = &den[..standing.len()];
            finish(method, self.rows, piece, [query_head, first], den, &num, &mut tally);
        }
        tally
    }
}
