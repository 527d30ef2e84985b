//! The state form: chunks of tokens read the sums of all before them, then are added to them.

mod causal;
mod full;

use std::ops::Range;

use super::{Piece, load};
use crate::arch::{Buffer, Far, Kernels, Packed, Scratch, TOKENS};
use crate::basis::{Basis, TILE, Tile};
use crate::plan::Sizes;
use crate::state::{FoldWork, HeadState, Open};
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
    packed: PackedSums<T>,
    num: Buffer<T>,
    den: Buffer<T>,
}

impl<'f, T: Real> Slice<'f, T> {
    /// Working memory for chunks of up to `ld` tokens; `rows` is how many queries, over the query
    /// heads and chunks of a stretch, have numerators at once (0 where nothing is read).
    fn new<E: Element<Compute = T>>(
        env: &Env<'_, E>,
        index: usize,
        far: Far<'f, T>,
        ld: usize,
        rows: usize,
    ) -> Self {
        let reads = usize::from(rows > 0);
        Slice {
            index,
            tiles: env.parts[index].clone(),
            far,
            fold: FoldWork::new(env.basis, env.d_value, env.kernels),
            scratch: Scratch::new(env.basis),
            queries: Buffer::zeroed(reads * env.group * (env.d_key + 1) * ld),
            keys: Buffer::zeroed((env.d_key + 1) * ld),
            packed: PackedSums::new(env),
            num: Buffer::zeroed(rows * env.padded),
            den: Buffer::zeroed(rows),
        }
    }
}

/// Sums prepared for reading.
struct PackedSums<T> {
    sums: Buffer<T>,
    z: Buffer<T>,
    /// Elements of one tile's sums.
    each: usize,
}

impl<T: Real> PackedSums<T> {
    /// Room for the tiles that are read at a time.
    fn new<E: Element<Compute = T>>(env: &Env<'_, E>) -> Self {
        let each = (env.kernels.packed_len)(env.padded);
        let tiles = env.kernels.tiles;
        PackedSums { sums: Buffer::zeroed(tiles * each), z: Buffer::zeroed(tiles * TILE), each }
    }

    /// Prepares adjacent tiles' sums; false when the series does not use their order.
    fn pack<E: Element<Compute = T>>(
        &mut self,
        env: &Env<'_, E>,
        tiles: &[Tile],
        sums: &[T],
        z: &[T],
    ) -> bool {
        if !env.reads(&tiles[0]) {
            return false;
        }
        let multiplicities = T::multiplicities(env.basis);
        let out = self.sums.chunks_mut(self.each).zip(self.z.chunks_mut(TILE));
        for (tile, (out, out_z)) in tiles.iter().zip(out) {
            let at = tile.start - tiles[0].start;
            // SAFETY: kernels are only handed out for instruction sets that are there.
            unsafe {
                (env.kernels.pack)(
                    &sums[at * env.d_value..],
                    &z[at..],
                    &multiplicities[tile.start..tile.start + tile.len],
                    env.coefficient(tile),
                    env.d_value,
                    out,
                    out_z,
                );
            }
        }
        true
    }

    fn as_ref(&self) -> Packed<'_, T> {
        Packed { sums: &self.sums, z: &self.z }
    }
}

/// Features of adjacent tiles.
fn features(tiles: &[Tile]) -> usize {
    tiles.iter().map(|tile| tile.len).sum()
}

/// The keys and values of a unit, counted from its first open token.
#[derive(Clone, Copy)]
struct Source<'u, 'a, E: Element> {
    piece: &'u Piece<'a, E>,
    kv_head: usize,
    open: usize,
    block: &'u Open<E::Compute>,
}

impl<E: Element> Source<'_, '_, E> {
    /// Loads tokens `range` into a slice's `keys` and values; tokens up to a multiple of TOKENS
    /// are zero.
    fn load(&self, range: &Range<usize>, slice: &mut Slice<'_, E::Compute>, ld: usize) {
        let (d_key, d_value) = (self.piece.k.shape()[3], slice.fold.d_value);
        let padded = slice.fold.padded;
        let keys = range.len();
        let tokens = keys.next_multiple_of(TOKENS);
        let values = slice.fold.values.grown(ld * padded);
        let old = range.start.min(self.open)..range.end.min(self.open);
        for row in 0..d_key + 1 {
            let from = &self.block.keys[row * self.block.ld..][old.clone()];
            slice.keys[row * ld..][..old.len()].copy_from_slice(from);
        }
        for (t, token) in old.clone().enumerate() {
            let to = &mut values[t * padded..(t + 1) * padded];
            to.fill(E::Compute::ZERO);
            to[..d_value].copy_from_slice(&self.block.values[token * d_value..][..d_value]);
        }
        let new = range.start.max(self.open) - self.open..range.end.max(self.open) - self.open;
        load::keys(self.piece, self.kv_head, new.clone(), &mut slice.keys, ld, old.len());
        load::values(self.piece, self.kv_head, new, values, padded, old.len());
        load::clear(&mut slice.keys, ld, d_key + 1, keys..tokens);
        values[keys * padded..tokens * padded].fill(E::Compute::ZERO);
    }
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

    /// Tiles in stretches to pack and read at a time; the series reads all of a stretch or none.
    fn tiles_at_once(&self, which: Range<usize>) -> impl Iterator<Item = &[Tile]> {
        self.basis.tiles()[which]
            .chunk_by(|a, b| self.reads(a) == self.reads(b))
            .flat_map(|tiles| tiles.chunks(self.kernels.tiles))
    }

    /// Whether the series uses a tile's order.
    fn reads(&self, tile: &Tile) -> bool {
        self.coefficient(tile) != E::Compute::ZERO
    }

    fn coefficient(&self, tile: &Tile) -> E::Compute {
        self.coefficients.get(tile.order).copied().unwrap_or_default()
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
}
