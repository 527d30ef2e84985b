//! Causal attention: each chunk's queries read what came before, then its keys are folded.

use super::{Chunk, Env, STRETCH, Slice, Source, Unit, features};
use crate::arch::{Direct, Read, TOKENS, Tokens, stride};
use crate::attention::{finish, load};
use crate::state::HeadState;
use crate::{Diagnostics, Element, Real, parallel};

impl<E: Element> Env<'_, E> {
    /// Reads and absorbs a head's tokens in order.
    pub(super) fn causal(&self, unit: &mut Unit<'_, '_, E>) -> Diagnostics {
        let chunks = self.chunks(unit.open, unit.piece.keys);
        let longest = chunks.iter().map(|chunk| chunk.keys.len()).max().unwrap_or(0);
        let ld = stride(longest);
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
        let Slice { far, fold, scratch, packed, num, den, .. } = slice;
        let rows = |g: usize| (place * self.group + g) * ld;
        let columns = |g: usize| Tokens { x: &slice.queries[g * plane..], ld, count };
        if direct {
            for g in 0..self.group {
                let mut call = Direct {
                    d_key,
                    queries: columns(g),
                    keys: Tokens { x: &slice.keys, ld, count: tokens },
                    values: &fold.values,
                    padded,
                    // Queries counted from the chunk's first key.
                    diagonal: Some((queries.start - chunk.keys.start) as isize),
                    coefficients: &self.coefficients,
                    num: &mut num[rows(g) * padded..],
                    den: &mut den[rows(g)..],
                    max: &mut [],
                    scratch,
                };
                // SAFETY: kernels are only handed out for instruction sets that are there.
                unsafe { (self.kernels.polynomial)(&mut call) };
            }
        }
        if chunk.fold {
            fold.prepare(tokens);
        }
        let base = self.basis.tiles()[slice.tiles.start].start;
        for tiles in self.tiles_at_once(slice.tiles.clone()) {
            let mut far = far.part(tiles[0].start - base, features(tiles), self.d_value);
            if count > 0 && packed.pack(self, tiles, far.sums, far.z) {
                for g in 0..self.group {
                    let mut call = Read {
                        basis: self.basis,
                        tiles,
                        tokens: columns(g),
                        packed: packed.as_ref(),
                        padded,
                        num: &mut num[rows(g) * padded..],
                        den: &mut den[rows(g)..],
                        scratch,
                    };
                    // SAFETY: as above.
                    unsafe { (self.kernels.read)(&mut call) };
                }
            }
            if chunk.fold {
                fold.fold_tiles(self.basis, tiles, &slice.keys, ld, tokens, &mut far);
            }
        }
    }
}
