//! The state form: chunks of tokens read the sums of all before them, then are added to them.

mod causal;
mod full;

use std::ops::Range;

use super::Piece;
use super::method::Method;
use super::tally::Tally;
use super::window::{Room, Sinks, Source, Window};
use crate::arch::{Buffer, Far, Packed, Read, Scratch, TOKENS, Tokens};
use crate::basis::{Basis, TILE, Tile};
use crate::plan::Sizes;
use crate::state::{FoldWork, HeadState, Mark};
use crate::view::Rows;
use crate::{Element, Error, Near, Plan, Real, State, parallel};

/// Chunks that slices of one head work through before their numerators are added up.
const STRETCH: usize = 8;

/// What all heads of a call share.
struct Env<'e, E: Element> {
    method: &'e Method<E::Compute>,
    basis: &'e Basis,
    rows: &'e Rows<'e, E>,
    group: usize,
    /// Whether the past is wanted afterwards.
    keep: bool,
    chunk: usize,
    /// Ranges of tiles, one per slice.
    parts: Vec<Range<usize>>,
}

/// One key/value head of one sequence.
struct Unit<'u, 'a, E: Element> {
    piece: &'u Piece<'a, E>,
    kv_head: usize,
    open: usize,
    /// Tokens of the sequence before the first open one.
    folded: u64,
    head: &'u mut HeadState<E::Compute>,
}

/// Some tokens of a unit, counted from its first open token.
#[derive(Clone, Debug)]
struct Chunk {
    /// Those that have queries: all new.
    queries: Range<usize>,
    /// Far sums hold what comes before this.
    first: usize,
    /// What comes before this is folded afterwards.
    fold: usize,
}

impl Chunk {
    fn window(&self) -> Range<usize> {
        self.first..self.queries.end.max(self.fold)
    }
}

/// All pieces of a call, through `state`, which keeps the past only if `sizes.state`.
pub(super) fn stream<E: Element>(
    plan: &Plan,
    method: &Method<E::Compute>,
    pieces: &[Piece<'_, E>],
    rows: &Rows<'_, E>,
    sizes: Sizes,
    causal: bool,
    state: &mut State<E::Compute>,
) -> Result<Tally, Error> {
    let recipe = plan.choose::<E>(sizes);
    let basis = state.basis.clone();
    let env = Env {
        method,
        basis: &basis,
        rows,
        group: sizes.group,
        keep: sizes.state,
        chunk: recipe.chunk,
        parts: parts(&basis, recipe.slices),
    };
    let mut units: Vec<Unit<'_, '_, E>> = vec![];
    for (piece, sequence) in pieces.iter().zip(&mut state.sequences) {
        let folded = sequence.position - sequence.open as u64;
        for (kv_head, head) in sequence.heads.iter_mut().enumerate() {
            units.push(Unit { piece, kv_head, open: sequence.open, folded, head });
        }
    }
    let tally = parallel::map_reduce(
        &mut units,
        Tally::default(),
        |unit| {
            let now = unit.piece.reach(unit.kv_head, method.key_centre(unit.kv_head));
            unit.head.reach = unit.head.reach.max(now);
            let source = env.source(unit);
            let HeadState { open, sinks, mark, .. } = &mut *unit.head;
            Source { raw: Some(open), ..source }.keep_sinks(sinks, mark.total);
            if causal { env.causal(unit) } else { env.absorb(unit) }
        },
        Tally::merged,
    );
    let tally = if causal { tally } else { env.answer(&units) };
    for (piece, sequence) in pieces.iter().zip(&mut state.sequences) {
        sequence.position += piece.keys as u64;
        let total = sequence.open + piece.keys;
        sequence.open = total - method.folded(total);
    }
    Ok(tally)
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
struct Slice<'f, T: Real> {
    tiles: Range<usize>,
    far: Far<'f, T>,
    mark: Mark,
    /// Where the far sums stood before each chunk of the stretch.
    marks: Vec<Mark>,
    fold: FoldWork<T>,
    scratch: Scratch<T>,
    window: Window<T>,
    packed: PackedSums<T>,
}

impl<'f, T: Real> Slice<'f, T> {
    /// Working memory for windows of up to `tokens` tokens.
    fn new<E: Element<Compute = T>>(
        env: &Env<'_, E>,
        index: usize,
        far: Far<'f, T>,
        mark: Mark,
        tokens: usize,
    ) -> Self {
        Slice {
            tiles: env.parts[index].clone(),
            far,
            mark,
            marks: vec![],
            fold: FoldWork::new(env.basis, env.method.d_value, env.method.kernels),
            scratch: Scratch::new(env.basis),
            window: Window::new(env.method, tokens),
            packed: PackedSums::new(env),
        }
    }

    /// Makes ready to fold the window's first `count` tokens: sets their weights in the window,
    /// gives the factor that is left of the sums and what the weights were.
    fn begin_fold(&mut self, d_key: usize, count: usize) -> (T, Vec<T>) {
        let Window { keys, ld, g, values, .. } = &mut self.window;
        let padded = count.next_multiple_of(TOKENS);
        let weights = &mut keys[d_key * *ld..][..padded];
        let before = weights.to_vec();
        weights[count..].fill(T::ZERO);
        let live = |i: usize| before[i] != T::ZERO;
        let g = &g[..count.min(g.len())];
        let factor = self.mark.fold(count, g, live, |i, w| weights[i] = w);
        self.fold.prepare(values, padded);
        (factor, before)
    }

    /// Puts the weights back.
    fn end_fold(&mut self, d_key: usize, before: &[T]) {
        let ld = self.window.ld;
        self.window.keys[d_key * ld..][..before.len()].copy_from_slice(before);
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
        let each = (env.method.kernels.packed_len)(env.method.padded);
        let tiles = env.method.kernels.tiles;
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
                (env.method.kernels.pack)(
                    &sums[at * env.method.d_value..],
                    &z[at..],
                    &multiplicities[tile.start..tile.start + tile.len],
                    env.method.coefficient(tile),
                    env.method.d_value,
                    out,
                    out_z,
                );
            }
        }
        true
    }

    /// Queries read the tiles that were prepared, into the plane of their order.
    fn read<E: Element<Compute = T>>(
        &self,
        env: &Env<'_, E>,
        tiles: &[Tile],
        tokens: Tokens<'_, T>,
        num: &mut [T],
        den: &mut [T],
        scratch: &mut Scratch<T>,
    ) {
        let plane = env.method.plane(tiles[0].order);
        let mut call = Read {
            basis: env.basis,
            tiles,
            tokens,
            packed: Packed { sums: &self.sums, z: &self.z },
            padded: env.method.padded,
            num: &mut num[plane * tokens.count * env.method.padded..],
            den: &mut den[plane * tokens.count..],
            scratch,
        };
        // SAFETY: kernels are only handed out for instruction sets that are there.
        unsafe { (env.method.kernels.read)(&mut call) };
    }
}

/// Features of adjacent tiles.
fn features(tiles: &[Tile]) -> usize {
    tiles.iter().map(|tile| tile.len).sum()
}

impl<E: Element> Env<'_, E> {
    fn source<'u, 'a>(&'u self, unit: &Unit<'u, 'a, E>) -> Source<'u, 'a, E> {
        Source {
            method: self.method,
            piece: unit.piece,
            kv_head: unit.kv_head,
            open: unit.open,
            raw: None,
            folded: unit.folded,
        }
    }

    /// The chunks of `open` tokens of before and `keys` new ones.
    fn chunks(&self, open: usize, keys: usize) -> Vec<Chunk> {
        let total = open + keys;
        if self.method.near == Near::None {
            return self.far_chunks(open, total);
        }
        let folded = |place: usize| self.method.folded(place);
        let block = self.method.block;
        // Whole blocks, so that a chunk's first query has no far token that is still raw.
        let width = self.chunk.div_ceil(block).max(1).saturating_mul(block);
        let mut chunks = vec![];
        let mut start = open;
        while start < total {
            let end = (start / block * block).saturating_add(width).min(total);
            let fold = if self.keep || end < total { folded(end) } else { folded(start) };
            chunks.push(Chunk { queries: start..end, first: folded(start), fold });
            start = end;
        }
        chunks
    }

    /// The same with nothing near.
    fn far_chunks(&self, open: usize, total: usize) -> Vec<Chunk> {
        // What is kept folds in whole blocks; what is not kept need not fold its last chunk.
        let limit = if self.keep { self.method.folded(total) } else { total };
        let mut chunks = vec![];
        let mut first = 0;
        while first < limit {
            let end = (first + self.chunk).min(limit);
            let fold = if self.keep || end < limit { end } else { first };
            chunks.push(Chunk { queries: first.max(open)..end.max(open), first, fold });
            first = end;
        }
        if first < total {
            chunks.push(Chunk { queries: first.max(open)..total, first, fold: first });
        }
        chunks
    }

    /// Tiles in stretches to pack and read at a time; the series reads all of a stretch or none,
    /// and to one plane.
    fn tiles_at_once(&self, which: Range<usize>) -> impl Iterator<Item = &[Tile]> {
        let key = |tile: &Tile| (self.reads(tile), self.method.plane(tile.order));
        self.basis.tiles()[which]
            .chunk_by(move |a, b| key(a) == key(b))
            .flat_map(|tiles| tiles.chunks(self.method.kernels.tiles))
    }

    /// Whether the series uses a tile's order.
    fn reads(&self, tile: &Tile) -> bool {
        self.method.coefficient(tile) != E::Compute::ZERO
    }

    /// Leaves the last tokens, those that are not folded, in the open blocks.
    fn open(&self, unit: &mut Unit<'_, '_, E>) {
        let source = self.source(unit);
        let Unit { piece, open: before, head, .. } = unit;
        let folded = self.method.folded(*before + piece.keys);
        let (d_key, d_value) = (self.method.d_key, self.method.d_value);
        let raw = &mut head.open;
        raw.shift(d_key, d_value, folded.min(*before), *before);
        let at = before.saturating_sub(folded);
        let new = folded.max(*before) - *before..piece.keys;
        let room = Room {
            keys: &mut raw.keys,
            ld: raw.ld,
            values: &mut raw.values,
            stride: d_value,
            fading: &mut raw.fading,
        };
        source.bring(new, room, at, true);
    }

    /// The sinks of a unit as kernels take them, when the call's tokens are among them.
    fn sinks(&self, unit: &Unit<'_, '_, E>) -> Sinks<E::Compute> {
        if self.method.sinks == 0 {
            return Sinks::default();
        }
        let seen = unit.folded + (unit.open + unit.piece.keys) as u64;
        let count = seen.min(self.method.sinks as u64) as usize;
        Sinks::new(self.method, &unit.head.sinks, count)
    }
}
