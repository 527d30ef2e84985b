//! The state form: chunks of tokens read the sums of all before them, then are added to them.

use std::ops::Range;

use super::{Piece, finish, load, step};
use crate::arch::{Buffer, Direct, Far, Kernels, PANEL, Packed, Read, Scratch, TOKENS, Tokens};
use crate::basis::{Basis, TILE};
use crate::plan::Sizes;
use crate::state::{FoldWork, HeadState, fold_tokens};
use crate::view::Rows;
use crate::{Diagnostics, Element, Error, Plan, Real, State, parallel};

/// Chunks that slices of one head work through before their numerators are added up.
const STRETCH: usize = 8;

/// What all heads of a call share.
struct Env<'e, E: Element> {
    plan: &'e Plan,
    basis: &'e Basis,
    kernels: &'static Kernels<E::Compute>,
    rows: &'e Rows<'e, E>,
    coefficients: Vec<E::Compute>,
    scale: E::Compute,
    d_key: usize,
    d_value: usize,
    padded: usize,
    group: usize,
    /// Whether the past is wanted afterwards.
    keep: bool,
    chunk: usize,
    block: usize,
    /// Ranges of tiles, one per slice.
    parts: Vec<Range<usize>>,
}

/// One key/value head of one sequence.
struct Unit<'u, 'a, E: Element> {
    piece: &'u Piece<'a, E>,
    kv_head: usize,
    open: usize,
    head: &'u mut HeadState<E::Compute>,
}

/// Tokens `keys` of a unit, counted from its first open token, and what becomes of them.
struct Chunk {
    keys: Range<usize>,
    fold: bool,
}

impl Chunk {
    /// Those of its tokens that are new and so have queries.
    fn queries(&self, open: usize) -> Range<usize> {
        self.keys.start.max(open)..self.keys.end.max(open)
    }
}

/// All pieces of a call, through `state`, which keeps the past only if `sizes.state`.
pub(super) fn stream<E: Element>(
    plan: &Plan,
    pieces: &[Piece<'_, E>],
    rows: &Rows<'_, E>,
    sizes: Sizes,
    causal: bool,
    state: &mut State<E::Compute>,
) -> Result<Diagnostics, Error> {
    let recipe = plan.choose::<E>(sizes);
    let basis = state.basis.clone();
    let kernels = plan.kernels::<E>();
    let spec = plan.spec();
    let env = Env {
        plan,
        basis: &basis,
        kernels,
        rows,
        coefficients: plan.coefficients(),
        scale: E::Compute::from_f64(spec.scale()),
        d_key: spec.d_key(),
        d_value: spec.d_value(),
        padded: spec.d_value().next_multiple_of(kernels.lanes),
        group: sizes.group,
        keep: sizes.state,
        chunk: recipe.chunk,
        block: spec.block(),
        parts: parts(&basis, recipe.slices),
    };
    let mut units: Vec<Unit<'_, '_, E>> = vec![];
    for (piece, sequence) in pieces.iter().zip(&mut state.sequences) {
        for (kv_head, head) in sequence.heads.iter_mut().enumerate() {
            units.push(Unit { piece, kv_head, open: sequence.open, head });
        }
    }
    let diagnostics = parallel::map_reduce(
        &mut units,
        Diagnostics::default(),
        |unit| {
            if causal { env.causal(unit) } else { env.absorb(unit) }
        },
        Diagnostics::merged,
    );
    let diagnostics = if causal { diagnostics } else { env.answer(&units) };
    for (piece, sequence) in pieces.iter().zip(&mut state.sequences) {
        sequence.position += piece.keys as u64;
        sequence.open = (sequence.open + piece.keys) % env.block;
    }
    Ok(diagnostics)
}

/// Splits the tiles into `slices` ranges of about equally many features.
fn parts(basis: &Basis, slices: usize) -> Vec<Range<usize>> {
    let tiles = basis.tiles();
    let mut out = vec![];
    let mut first = 0;
    for slice in 1..=slices {
        let until = basis.len() * slice / slices;
        let end = if slice == slices {
            tiles.len()
        } else {
            tiles.partition_point(|tile| tile.start + tile.len <= until)
        };
        if end > first {
            out.push(first..end);
            first = end;
        }
    }
    out
}

/// One slice's working memory for a stretch of chunks.
struct Slice<'f, T: 'static> {
    index: usize,
    tiles: Range<usize>,
    far: Far<'f, T>,
    fold: FoldWork<T>,
    scratch: Scratch<T>,
    queries: Buffer<T>,
    keys: Buffer<T>,
    packed: Buffer<T>,
    packed_z: Buffer<T>,
    num: Buffer<T>,
    den: Buffer<T>,
}

impl<E: Element> Env<'_, E> {
    fn chunks(&self, open: usize, keys: usize) -> Vec<Chunk> {
        let total = open + keys;
        // What is kept folds in whole blocks; what is not kept need not fold its last chunk.
        let limit = if self.keep { total - total % self.block } else { total };
        let mut chunks = vec![];
        let mut first = 0;
        while first < limit {
            let end = (first + self.chunk).min(limit);
            chunks.push(Chunk { keys: first..end, fold: self.keep || end < limit });
            first = end;
        }
        if first < total {
            chunks.push(Chunk { keys: first..total, fold: false });
        }
        chunks
    }

    /// Reads and absorbs a head's tokens in order.
    fn causal(&self, unit: &mut Unit<'_, '_, E>) -> Diagnostics {
        let chunks = self.chunks(unit.open, unit.piece.keys);
        let longest = chunks.iter().map(|chunk| chunk.keys.len()).max().unwrap_or(0);
        let ld = longest.next_multiple_of(TOKENS);
        let Unit { piece, kv_head, open, head } = unit;
        let HeadState { sums, open: open_block, .. } = &mut **head;
        let stretch = if self.parts.len() == 1 { 1 } else { STRETCH };
        let rows = self.group * ld * stretch;
        let mut slices: Vec<Slice<'_, E::Compute>> = sums
            .split(self.basis, self.d_value, &self.parts)
            .into_iter()
            .enumerate()
            .map(|(index, far)| Slice {
                index,
                tiles: self.parts[index].clone(),
                far,
                fold: FoldWork::new(self.plan.spec(), self.kernels),
                scratch: Scratch::new(self.basis.orders().last().map_or(1, |p| p + 1)),
                queries: Buffer::zeroed(self.group * (self.d_key + 1) * ld),
                keys: Buffer::zeroed((self.d_key + 1) * ld),
                packed: Buffer::zeroed((self.kernels.packed_len)(self.padded)),
                packed_z: Buffer::zeroed(TILE),
                num: Buffer::zeroed(rows * self.padded),
                den: Buffer::zeroed(rows),
            })
            .collect();
        let mut diagnostics = Diagnostics::default();
        let mut done = 0;
        for stretch in chunks.chunks(stretch) {
            parallel::for_each(&mut slices, |slice| {
                slice.num.fill(E::Compute::ZERO);
                slice.den.fill(E::Compute::ZERO);
                for (i, chunk) in stretch.iter().enumerate() {
                    let direct = (done + i) % self.parts.len() == slice.index;
                    self.chunk(piece, *kv_head, *open, open_block, chunk, slice, [i, ld], direct);
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
    #[allow(clippy::too_many_arguments)]
    fn chunk(
        &self,
        piece: &Piece<'_, E>,
        kv_head: usize,
        open: usize,
        open_block: &crate::state::Open<E::Compute>,
        chunk: &Chunk,
        slice: &mut Slice<'_, E::Compute>,
        [place, ld]: [usize; 2],
        direct: bool,
    ) {
        let (d_key, padded) = (self.d_key, self.padded);
        let keys = chunk.keys.len();
        let tokens = keys.next_multiple_of(TOKENS);
        self.load(piece, kv_head, open, open_block, &chunk.keys, slice, ld);
        let queries = chunk.queries(open);
        let plane = (d_key + 1) * ld;
        let mut count = 0;
        for g in 0..self.group {
            count = load::queries(
                piece,
                kv_head * self.group + g,
                queries.start - open..queries.end - open,
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

    /// Prepares a tile's sums for reading; false when the series does not use its order.
    fn pack(
        &self,
        tile: &crate::basis::Tile,
        sums: &[E::Compute],
        z: &[E::Compute],
        packed: &mut [E::Compute],
        packed_z: &mut [E::Compute],
    ) -> bool {
        let coefficient = self.coefficients.get(tile.order).copied().unwrap_or_default();
        if coefficient == E::Compute::ZERO {
            return false;
        }
        let multiplicities = E::Compute::multiplicities(self.basis);
        let multiplicities = &multiplicities[tile.start..tile.start + tile.len];
        // SAFETY: kernels are only handed out for instruction sets that are there.
        unsafe {
            (self.kernels.pack)(
                sums,
                z,
                multiplicities,
                coefficient,
                self.d_value,
                packed,
                packed_z,
            );
        }
        true
    }

    /// Loads keys and values `range`, counted from the first open token.
    #[allow(clippy::too_many_arguments)]
    fn load(
        &self,
        piece: &Piece<'_, E>,
        kv_head: usize,
        open: usize,
        open_block: &crate::state::Open<E::Compute>,
        range: &Range<usize>,
        slice: &mut Slice<'_, E::Compute>,
        ld: usize,
    ) {
        let keys = range.len();
        let tokens = keys.next_multiple_of(TOKENS);
        let values = slice.fold.values.grown(ld * self.padded);
        let old = range.start.min(open)..range.end.min(open);
        for row in 0..self.d_key + 1 {
            let from = &open_block.keys[row * open_block.ld..][old.clone()];
            slice.keys[row * ld..][..old.len()].copy_from_slice(from);
        }
        for (t, token) in old.clone().enumerate() {
            let to = &mut values[t * self.padded..(t + 1) * self.padded];
            to.fill(E::Compute::ZERO);
            to[..self.d_value]
                .copy_from_slice(&open_block.values[token * self.d_value..][..self.d_value]);
        }
        let new = range.start.max(open) - open..range.end.max(open) - open;
        load::keys(piece, kv_head, new.clone(), &mut slice.keys, ld, old.len());
        load::values(piece, kv_head, new, values, self.padded, old.len());
        load::clear(&mut slice.keys, ld, self.d_key + 1, keys..tokens);
        values[keys * self.padded..tokens * self.padded].fill(E::Compute::ZERO);
    }

    /// Leaves the last tokens, those that fill no block, in the open block.
    fn open(&self, unit: &mut Unit<'_, '_, E>) {
        let Unit { piece, kv_head, open: before, head } = unit;
        let total = *before + piece.keys;
        let folded = total - total % self.block;
        let block = &mut head.open;
        let weights = self.d_key * block.ld;
        let at = if folded == 0 { *before } else { 0 };
        if folded > 0 {
            block.keys[weights..weights + block.ld].fill(E::Compute::ZERO);
        }
        // Open tokens that are left are all new ones, or follow the old ones.
        let new = folded.max(*before) - *before..piece.keys;
        load::keys(piece, *kv_head, new.clone(), &mut block.keys, block.ld, at);
        load::values(piece, *kv_head, new, &mut block.values, self.d_value, at);
    }

    /// Absorbs a head's keys, for queries that read the finished context.
    fn absorb(&self, unit: &mut Unit<'_, '_, E>) -> Diagnostics {
        let mut chunks = self.chunks(unit.open, unit.piece.keys);
        if !self.keep {
            chunks.iter_mut().for_each(|chunk| chunk.fold = true);
        }
        let ld = self.chunk.min(unit.open + unit.piece.keys).next_multiple_of(TOKENS);
        let Unit { piece, kv_head, open, head } = unit;
        let HeadState { sums, open: open_block, .. } = &mut **head;
        let mut slices: Vec<Slice<'_, E::Compute>> = sums
            .split(self.basis, self.d_value, &self.parts)
            .into_iter()
            .enumerate()
            .map(|(index, far)| Slice {
                index,
                tiles: self.parts[index].clone(),
                far,
                fold: FoldWork::new(self.plan.spec(), self.kernels),
                scratch: Scratch::new(1),
                queries: Buffer::zeroed(0),
                keys: Buffer::zeroed((self.d_key + 1) * ld),
                packed: Buffer::zeroed(0),
                packed_z: Buffer::zeroed(0),
                num: Buffer::zeroed(0),
                den: Buffer::zeroed(0),
            })
            .collect();
        parallel::for_each(&mut slices, |slice| {
            for chunk in chunks.iter().filter(|chunk| chunk.fold) {
                self.load(piece, *kv_head, *open, open_block, &chunk.keys, slice, ld);
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
    fn answer(&self, units: &[Unit<'_, '_, E>]) -> Diagnostics {
        let mut tasks = vec![];
        for unit in units {
            let queries = unit.piece.queries;
            // Fewer queries per task when there are threads to spare.
            let share = (queries * self.group * units.len()).div_ceil(parallel::threads());
            let width = self.chunk.min(share.next_multiple_of(PANEL));
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
        let ld = queries.len().next_multiple_of(TOKENS);
        let mut x = Buffer::zeroed((self.d_key + 1) * ld);
        let count = load::queries(piece, query_head, queries.clone(), self.scale, &mut x, ld);
        let mut num = Buffer::zeroed(count * padded);
        let mut den = Buffer::zeroed(count);
        let mut scratch = Scratch::new(self.basis.orders().last().map_or(1, |p| p + 1));
        let mut packed = Buffer::zeroed((self.kernels.packed_len)(padded));
        let mut packed_z = Buffer::zeroed(TILE);
        let sums = &unit.head.sums;
        for tile in self.basis.tiles() {
            let rows = tile.start * self.d_value..(tile.start + tile.len) * self.d_value;
            let z = &sums.z[tile.start..tile.start + tile.len];
            if !self.pack(tile, &sums.sums[rows], z, &mut packed, &mut packed_z) {
                continue;
            }
            for t in (0..count).step_by(PANEL) {
                let mut call = Read {
                    basis: self.basis,
                    tile,
                    tokens: Tokens { x: &x[t..], ld, count: PANEL.min(count - t) },
                    packed: Packed { sums: &packed, z: &packed_z },
                    padded,
                    num: &mut num[t * padded..],
                    den: &mut den[t..],
                    scratch: &mut scratch,
                };
                // SAFETY: kernels are only handed out for instruction sets that are there.
                unsafe { (self.kernels.read)(&mut call) };
            }
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
        for t in (0..count).step_by(PANEL) {
            let width = PANEL.min(count - t);
            for s in (0..tokens).step_by(TILE) {
                let mut call = Direct {
                    d_key: self.d_key,
                    queries: Tokens { x: &x[t..], ld, count: width },
                    keys: Tokens { x: &block.keys[s..], ld: block.ld, count: TILE.min(tokens - s) },
                    values: &values[s * self.padded..],
                    padded: self.padded,
                    diagonal: None,
                    coefficients: &self.coefficients,
                    num: &mut num[t * self.padded..],
                    den: &mut den[t..],
                    max: &mut [],
                    scratch,
                };
                // SAFETY: kernels are only handed out for instruction sets that are there.
                unsafe { (self.kernels.polynomial)(&mut call) };
            }
        }
    }
}
