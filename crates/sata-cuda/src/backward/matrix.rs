//! The backward of bf16 on matrix units (`mma.sync`, of every GPU since sm_80): queries and keys
//! that weigh each other one by one. What goes through sums is left to the generic kernels.

use super::Wanted;
use super::kernels::Kind;
use super::params::Params;
use super::stages::{Ends, Generic, Scan, Span, Stages};
use crate::problem::Problem;
use crate::{Device, Error, Kernel, Launch, Plan, RawView, Unit, unit};

/// The longest key and value, and the most coefficients, that registers hold.
const MOST: usize = 64;
const MOST_TERMS: usize = 6;
/// Most places of a sequence: kernels count them in 32 bits.
const MOST_PLACES: usize = 1 << 30;
/// Queries or keys of a block, and tokens of a tile that passes.
const WARPS: usize = 4;
const TILE: usize = 64;
const STAGES: usize = 2;

/// Whether these kernels compute a problem.
pub(super) fn serves(plan: &Plan, problem: &Problem<'_>, wanted: &Wanted<'_>, kind: &Kind) -> bool {
    let aligned = |x: &RawView, by: i64| {
        x.address.is_multiple_of(2 * by as u64)
            && [x.batch, x.head, x.token].iter().all(|stride| stride % by == 0)
    };
    let properties = problem.device.properties();
    plan.wish().matrix
        && problem.element == "bf16"
        && (properties.capability >= (8, 0) || problem.device.is_emulated())
        && [kind.d_key, kind.d_value].iter().all(|&d| d % 8 == 0 && d <= MOST)
        && kind.terms <= MOST_TERMS
        && [&problem.q, &problem.k, &problem.v, &wanted.dy].iter().all(|x| aligned(x, 8))
        && [&wanted.dq, &wanted.dk, &wanted.dv].iter().all(|x| aligned(x, 2))
        && problem.sequences.iter().all(|s| s.tokens() < MOST_PLACES && s.queries < MOST_PLACES)
}

/// Tokens of a chunk where all is chosen here: what is weighed pair by pair costs less than sums do
/// up to so many.
pub(super) fn chunk(kind: &Kind, features: usize, longest: usize) -> Option<usize> {
    // Seconds on an H100, of a pair and of a token that goes through the generic kernels' sums.
    let fading = if kind.fades { 1.3 } else { 1.0 };
    let pair = (1.5e-12 + 1.8e-14 * (kind.d_key + kind.d_value) as f64) * fading;
    let number = if kind.d_value > 32 { 3e-14 } else { 1.5e-13 };
    let token = features as f64 * (5.0 * kind.d_value as f64 + 24.0) * number;
    (longest as f64 / 2.0 * pair <= token).then_some(longest.max(1))
}

/// Its kernels.
#[derive(Debug)]
pub(super) struct Kernels {
    queries: Kernel,
    keys: Kernel,
    rows: usize,
    bytes: [usize; 2],
}

/// Elements in whole steps of 16, and rows that lie in different banks.
fn pitch(dim: usize) -> usize {
    dim.next_multiple_of(16) + 8
}

impl Kernels {
    pub fn new(device: &Device, kind: &Kind) -> Result<Self, Error> {
        let rows = 16 * WARPS;
        let pitches = pitch(kind.d_key) + pitch(kind.d_value);
        let both = 2 * TILE * pitches;
        // Of `Shared` in the sources: stages, rows, what each warp knows of a tile.
        let queries = STAGES * (both + 12 * TILE) + 32 + 12 * rows + WARPS * 12 * TILE;
        let keys = STAGES * (both + 20 * TILE) + 4 * 48 + 24 + 8 * rows + WARPS * 20 * TILE;
        let long = kind.d_key.max(kind.d_value) > 48;
        let unit = |unit: Unit, bytes: usize| {
            kind.define(unit)
                .define("WARPS", WARPS)
                .define("ROW_TILES", 1)
                .define("BLOCKS", if long { 2 } else { 3 })
                .define("SHARED_BYTES", bytes)
                .hot()
        };
        Ok(Kernels {
            queries: device.kernel(
                &unit(unit!("matrix_backward_queries.cu"), queries),
                "matrix_backward_queries",
            )?,
            keys: device
                .kernel(&unit(unit!("matrix_backward_keys.cu"), keys), "matrix_backward_keys")?,
            rows,
            bytes: [queries, keys],
        })
    }
}

/// The generic steps, but for pairs.
pub(super) struct Matrix<'k> {
    pub generic: Generic<'k>,
    pub kernels: &'k Kernels,
}

impl Matrix<'_> {
    fn launch(
        &self,
        kernel: &Kernel,
        grid: [usize; 3],
        shared: usize,
        params: &Params,
    ) -> Result<(), Error> {
        if grid.contains(&0) {
            return Ok(());
        }
        // More blocks than fit are refused by the launch.
        let grid = grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let launch = Launch { grid, block: [32 * WARPS as u32, 1, 1], shared: shared as u32 };
        // SAFETY: the units are made with the size of `Params`; the sweep has set all addresses to
        // arrays of the sizes that go with the chunks and units of the grid.
        unsafe { kernel.launch(launch, params) }
    }
}

impl Stages for Matrix<'_> {
    fn slot_len(&self) -> usize {
        self.generic.slot_len()
    }

    fn splits(&self, tokens: usize, others: usize) -> usize {
        self.generic.splits(tokens, others)
    }

    fn absorb_keys(&self, span: &Span) -> Result<(), Error> {
        self.generic.absorb_keys(span)
    }

    fn absorb_queries(&self, span: &Span) -> Result<(), Error> {
        self.generic.absorb_queries(span)
    }

    fn scan(&self, span: &Span, how: Scan, ends: Ends) -> Result<(), Error> {
        self.generic.scan(span, how, ends)
    }

    fn read_queries(&self, span: &Span) -> Result<(), Error> {
        self.generic.read_queries(span)
    }

    fn read_keys(&self, span: &Span) -> Result<(), Error> {
        self.generic.read_keys(span)
    }

    fn queries(&self, span: &Span) -> Result<(), Error> {
        let Params { far_tokens, far_heads, .. } = span.params;
        let blocks = (far_tokens as usize).div_ceil(self.kernels.rows) * far_heads as usize;
        let grid = [blocks, span.chunks, span.units];
        self.launch(&self.kernels.queries, grid, self.kernels.bytes[0], &span.params)
    }

    fn keys(&self, span: &Span, tokens: usize) -> Result<(), Error> {
        let grid = [tokens.div_ceil(self.kernels.rows), span.chunks, span.units];
        self.launch(&self.kernels.keys, grid, self.kernels.bytes[1], &span.params)
    }

    fn sinks(&self, span: &Span, sinks: usize, splits: usize) -> Result<(), Error> {
        self.generic.sinks(span, sinks, splits)
    }
}
