//! The state form: chunks of tokens read the sums of all before them, then are added to them.

mod causal;
mod chunks;
mod full;
mod packed;

use std::ops::Range;

use super::Piece;
use super::method::Method;
use super::tally::Tally;
use super::window::{Room, Sinks, Source, Window};
use crate::arch::{Far, Scratch, TOKENS};
use crate::basis::Basis;
use crate::plan::Sizes;
use crate::state::{FoldWork, HeadState, Mark};
use crate::view::Rows;
use crate::{Element, Error, Plan, Real, State, parallel};

pub(super) use chunks::Chunk;
pub(super) use packed::{PackedSums, features};

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
            packed: PackedSums::new(env.method),
        }
    }

    /// Makes ready to fold the window's first `count` tokens, as [`Window::begin_fold`].
    fn begin_fold(&mut self, d_key: usize, count: usize) -> (T, Vec<T>) {
        let begun = self.window.begin_fold(d_key, count, &mut self.mark);
        self.fold.prepare(&self.window.values, count.next_multiple_of(TOKENS));
        begun
    }
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
