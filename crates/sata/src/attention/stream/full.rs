//! Full attention: all keys are folded first, then every query reads the finished context.

use std::ops::Range;

use super::{Env, Slice, Source, Unit, features};
use crate::arch::{Buffer, Direct, PANEL, Read, Scratch, TOKENS, Tokens, stride};
use crate::attention::{finish, load, step};
use crate::state::{HeadState, fold_tokens};
use crate::{Diagnostics, Element, parallel};

impl<E: Element> Env<'_, E> {
    /// Absorbs a head's keys, for queries that read the finished context.
    pub(super) fn absorb(&self, unit: &mut Unit<'_, '_, E>) -> Diagnostics {
        let mut chunks = self.chunks(unit.open, unit.piece.keys);
        if !self.keep {
            chunks.iter_mut().for_each(|chunk| chunk.fold = true);
        }
        let ld = stride(self.chunk.min(unit.open + unit.piece.keys));
        let Unit { piece, kv_head, open, head } = unit;
        let HeadState { sums, open: open_block, .. } = &mut **head;
        let source = Source { piece, kv_head: *kv_head, open: *open, block: open_block };
        let mut slices: Vec<Slice<'_, E::Compute>> = sums
            .split(self.basis, self.d_value, &self.parts)
            .into_iter()
            .enumerate()
            .map(|(index, far)| Slice::new(self, index, far, ld, 0))
            .collect();
        parallel::for_each(&mut slices, |slice| {
            for chunk in chunks.iter().filter(|chunk| chunk.fold) {
                source.load(&chunk.keys, slice, ld);
                let tokens = chunk.keys.len().next_multiple_of(TOKENS);
                let Slice { tiles, far, fold, keys, .. } = slice;
                fold_tokens(fold, self.basis, tiles.clone(), keys, ld, tokens, far);
            }
        });
        drop(slices);
        if self.keep {
            self.open(unit);
        }
        Diagnostics::default()
    }

    /// Every query of the call reads its head's finished context.
    pub(super) fn answer(&self, units: &[Unit<'_, '_, E>]) -> Diagnostics {
        let mut tasks = vec![];
        for unit in units {
            let queries = unit.piece.queries;
            // Fewer queries per task when there are threads to spare.
            let share = (queries * self.group * units.len()).div_ceil(parallel::threads());
            let width = self.chunk.min(share.next_multiple_of(PANEL)).max(PANEL);
            for g in 0..self.group {
                for first in (0..queries).step_by(width) {
                    tasks.push((unit, g, first..(first + width).min(queries)));
                }
            }
        }
        parallel::map_reduce(
            &mut tasks,
            Diagnostics::default(),
            |(unit, g, queries)| self.read(unit, *g, queries.clone()),
            Diagnostics::merged,
        )
    }

    fn read(&self, unit: &Unit<'_, '_, E>, g: usize, queries: Range<usize>) -> Diagnostics {
        let (piece, query_head) = (unit.piece, unit.kv_head * self.group + g);
        let open = if self.keep { (unit.open + piece.keys) % self.block } else { 0 };
        if queries.len() < TOKENS / 4 {
            return step::read_each(
                self.plan, piece, query_head, queries, self.rows, unit.head, open, self.basis,
            );
        }
        let padded = self.padded;
        let ld = stride(queries.len());
        let mut x = Buffer::zeroed((self.d_key + 1) * ld);
        let count = load::queries(piece, query_head, queries.clone(), self.scale, &mut x, ld);
        let mut num = Buffer::zeroed(count * padded);
        let mut den = Buffer::zeroed(count);
        let mut scratch = Scratch::new(self.basis);
        let mut packed = super::PackedSums::new(self);
        let sums = &unit.head.sums;
        for tiles in self.tiles_at_once(0..self.basis.tiles().len()) {
            let which = tiles[0].start..tiles[0].start + features(tiles);
            let rows = which.start * self.d_value..which.end * self.d_value;
            if !packed.pack(self, tiles, &sums.sums[rows], &sums.z[which]) {
                continue;
            }
            let mut call = Read {
                basis: self.basis,
                tiles,
                tokens: Tokens { x: &x, ld, count },
                packed: packed.as_ref(),
                padded,
                num: &mut num,
                den: &mut den,
                scratch: &mut scratch,
            };
            // SAFETY: kernels are only handed out for instruction sets that are there.
            unsafe { (self.kernels.read)(&mut call) };
        }
        self.read_open(unit, open, &x, ld, count, &mut num, &mut den, &mut scratch);
        // SAFETY: tasks answer disjoint queries.
        unsafe {
            finish(self.rows, piece, query_head, queries.start, &den[..queries.len()], &num, padded)
        }
    }

    /// Queries weigh the tokens of the open block.
    #[allow(clippy::too_many_arguments)]
    fn read_open(
        &self,
        unit: &Unit<'_, '_, E>,
        open: usize,
        x: &[E::Compute],
        ld: usize,
        count: usize,
        num: &mut [E::Compute],
        den: &mut [E::Compute],
        scratch: &mut Scratch<E::Compute>,
    ) {
        let block = &unit.head.open;
        let tokens = open.next_multiple_of(TOKENS);
        let mut values = Buffer::zeroed(tokens * self.padded);
        for t in 0..open {
            values[t * self.padded..][..self.d_value]
                .copy_from_slice(&block.values[t * self.d_value..][..self.d_value]);
        }
        let mut call = Direct {
            d_key: self.d_key,
            queries: Tokens { x, ld, count },
            keys: Tokens { x: &block.keys, ld: block.ld, count: tokens },
            values: &values,
            padded: self.padded,
            diagonal: None,
            coefficients: &self.coefficients,
            num,
            den,
            max: &mut [],
            scratch,
        };
        // SAFETY: kernels are only handed out for instruction sets that are there.
        unsafe { (self.kernels.polynomial)(&mut call) };
    }
}
