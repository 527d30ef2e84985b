//! Causal attention: each chunk's queries read what came before, then its keys are folded.

use super::{Chunk, Env, STRETCH, Slice, Source, Unit};
use crate::arch::{Direct, PANEL, Packed, Read, TOKENS, Tokens};
use crate::attention::{finish, load};
use crate::basis::TILE;
use crate::state::HeadState;
use crate::{Diagnostics, Element, Real, parallel};

impl<E: Element> Env<'_, E> {
    /// Reads and absorbs a head's tokens in order.
    pub(super) fn causal(&self, unit: &mut Unit<'_, '_, E>) -> Diagnostics {
        let chunks = self.chunks(unit.open, unit.piece.keys);
        let longest = chunks.iter().map(|chunk| chunk.keys.len()).max().unwrap_or(0);
        let ld = longest.next_multiple_of(TOKENS);
        let Unit { piece, kv_head, open, head } = unit;
        let HeadState { sums, open: open_block, .. } = &mut **head;
        let stretch = if self.parts.len() == 1 { 1 } else { STRETCH };
        let rows = self.group * ld * stretch;
        let source = Source { piece, kv_head: *kv_head, open: *open, block: open_block };
        let mut slices: Vec<Slice<'_, E::Compute>> = sums
            .split(self.basis, self.d_value, &self.parts)
            .into_iter()
            .enumerate()
            .map(|(index, far)| Slice::new(self, index, far, ld, rows))
            .collect();
        let mut diagnostics = Diagnostics::default();
        let mut done = 0;
        for stretch in chunks.chunks(stretch) {
            parallel::for_each(&mut slices, |slice| {
                slice.num.fill(E::Compute::ZERO);
                slice.den.fill(E::Compute::ZERO);
                for (i, chunk) in stretch.iter().enumerate() {
                    let direct = (done + i) % self.parts.len() == slice.index;
                    self.chunk(source, chunk, slice, [i, ld], direct);
                }
            });
            let (first, others) = slices.split_at_mut(1);
            let first = &mut first[0];
            for other in others {
                first.num.iter_mut().zip(&other.num[..]).for_each(|(a, &b)| *a += b);
                first.den.iter_mut().zip(&other.den[..]).for_each(|(a, &b)| *a += b);
            }
            for (i, chunk) in stretch.iter().enumerate() {
                let queries = chunk.queries(*open);
                for g in 0..self.group {
                    let row = (i * self.group + g) * ld;
                    // SAFETY: this unit alone answers these query heads.
                    diagnostics = diagnostics.merged(unsafe {
                        finish(
                            self.rows,
                            piece,
                            *kv_head * self.group + g,
                            queries.start - *open,
                            &first.den[row..row + queries.len()],
                            &first.num[row * self.padded..],
                            self.padded,
                        )
                    });
                }
            }
            done += stretch.len();
        }
        drop(slices);
        if self.keep {
            self.open(unit);
        }
        diagnostics
    }

    /// One chunk of one slice: its queries read what came before and each other, then its keys
    /// are folded.
    fn chunk(
        &self,
        source: Source<'_, '_, E>,
        chunk: &Chunk,
        slice: &mut Slice<'_, E::Compute>,
        [place, ld]: [usize; 2],
        direct: bool,
    ) {
        let (d_key, padded) = (self.d_key, self.padded);
        let keys = chunk.keys.len();
        let tokens = keys.next_multiple_of(TOKENS);
        source.load(&chunk.keys, slice, ld);
        let queries = chunk.queries(source.open);
        let plane = (d_key + 1) * ld;
        let mut count = 0;
        for g in 0..self.group {
            count = load::queries(
                source.piece,
                source.kv_head * self.group + g,
                queries.start - source.open..queries.end - source.open,
                self.scale,
                &mut slice.queries[g * plane..(g + 1) * plane],
                ld,
            );
        }
        let panels = || (0..count).step_by(PANEL).map(|t| (t, PANEL.min(count - t)));
        let Slice { far, fold, scratch, packed, packed_z, num, den, .. } = slice;
        if direct {
            for g in 0..self.group {
                let row = (place * self.group + g) * ld;
                // Half panels: less of a tile on the diagonal is computed in vain.
                for t in (0..count).step_by(PANEL / 2) {
                    let width = (PANEL / 2).min(count - t);
                    // Queries and keys counted from the chunk's first key.
                    let first = queries.start - chunk.keys.start + t;
                    let seen = (first + width).min(tokens);
                    let mut s = 0;
                    while s < seen {
                        let tile = TILE.min(seen.next_multiple_of(TOKENS) - s);
                        let mut call = Direct {
                            d_key,
                            queries: Tokens {
                                x: &slice.queries[g * plane + t..],
                                ld,
                                count: width,
                            },
                            keys: Tokens { x: &slice.keys[s..], ld, count: tile },
                            values: &fold.values[s * padded..],
                            padded,
                            diagonal: (s + tile > first).then(|| first as isize - s as isize),
                            coefficients: &self.coefficients,
                            num: &mut num[(row + t) * padded..],
                            den: &mut den[row + t..],
                            max: &mut [],
                            scratch,
                        };
                        // SAFETY: kernels are only handed out for instruction sets that are there.
                        unsafe { (self.kernels.polynomial)(&mut call) };
                        s += tile;
                    }
                }
            }
        }
        if chunk.fold {
            fold.prepare(tokens);
        }
        let base = self.basis.tiles()[slice.tiles.start].start;
        for index in slice.tiles.clone() {
            let tile = &self.basis.tiles()[index];
            let mut far = far.part(tile.start - base, tile.len, self.d_value);
            if self.pack(tile, far.sums, far.z, packed, packed_z) && count > 0 {
                for g in 0..self.group {
                    let row = (place * self.group + g) * ld;
                    for (t, width) in panels() {
                        let mut call = Read {
                            basis: self.basis,
                            tile,
                            tokens: Tokens { x: &slice.queries[g * plane + t..], ld, count: width },
                            packed: Packed { sums: packed, z: packed_z },
                            padded,
                            num: &mut num[(row + t) * padded..],
                            den: &mut den[row + t..],
                            scratch,
                        };
                        // SAFETY: as above.
                        unsafe { (self.kernels.read)(&mut call) };
                    }
                }
            }
            if chunk.fold {
                fold.fold_tile(self.basis, index, &slice.keys, ld, tokens, &mut far);
            }
        }
    }
}
