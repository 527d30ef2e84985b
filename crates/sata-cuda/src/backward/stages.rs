//! The steps that a backward pass is made of, and those of the generic kernels.

use super::kernels::Kernels;
use super::params::Params;
use crate::{Error, Kernel, Launch};

/// Chunks and units that a step is done for: `params` with the first of both set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub params: Params,
    pub chunks: usize,
    pub units: usize,
}

/// How [`Stages::scan`] goes over the chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scan {
    /// Sums of keys become the sums that each chunk reads.
    Forward,
    /// Sums of queries become the gradients by the sums after each chunk.
    Reverse,
    /// All are added up.
    Total,
}

/// What is carried into and out of a scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ends {
    /// It begins with what there is before: the state's sums, or 0.
    pub begin: bool,
    /// The end of the sequences is here: the gradient by the final state may join.
    pub last: bool,
    /// Their beginning is: the gradient by the initial state is what is left.
    pub first: bool,
}

/// Steps of a backward pass, each over all chunks and units of a span. `far_tokens`, `far_heads` and
/// `splits` of the parameters are set for those that read and those that use what was read.
pub(crate) trait Stages {
    /// Numbers in one set of sums.
    fn slot_len(&self) -> usize;
    /// Parts that the features are split into when `blocks` of tokens of a chunk read, so that the
    /// device is busy.
    fn splits(&self, tokens: usize, others: usize) -> usize;
    /// Each chunk's keys are summed.
    fn absorb_keys(&self, span: &Span) -> Result<(), Error>;
    /// Each chunk's queries are, with their gradients by numerators and denominators.
    fn absorb_queries(&self, span: &Span) -> Result<(), Error>;
    /// From sums of chunks to sums of all before, or after, them.
    fn scan(&self, span: &Span, how: Scan, ends: Ends) -> Result<(), Error>;
    /// Queries read sums.
    fn read_queries(&self, span: &Span) -> Result<(), Error>;
    /// Keys read the gradients by sums.
    fn read_keys(&self, span: &Span) -> Result<(), Error>;
    /// Queries weigh what is raw, and have all.
    fn queries(&self, span: &Span) -> Result<(), Error>;
    /// Keys of the chunks, up to `tokens` each, are weighed by what sees them raw, and have all.
    fn keys(&self, span: &Span, tokens: usize) -> Result<(), Error>;
    /// Sinks have all.
    fn sinks(&self, span: &Span, sinks: usize, splits: usize) -> Result<(), Error>;
}

/// The steps by kernels for every device, type and feature.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Generic<'k> {
    pub kernels: &'k Kernels,
    pub features: usize,
    pub d_value: usize,
    pub multiprocessors: usize,
}

const MOST_SPLITS: usize = 16;

impl Generic<'_> {
    fn launch(
        &self,
        kernel: &Kernel,
        grid: [usize; 3],
        threads: usize,
        shared: usize,
        params: &Params,
    ) -> Result<(), Error> {
        if grid.contains(&0) {
            return Ok(());
        }
        // More blocks than fit are refused by the launch.
        let grid = grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let launch = Launch { grid, block: [threads as u32, 1, 1], shared: shared as u32 };
        // SAFETY: the units are made with the size of `Params`; the sweep has set all addresses to
        // arrays of the sizes that go with the chunks and units of the grid.
        unsafe { kernel.launch(launch, params) }
    }

    /// A kernel that has one block for each unit, or whatever else there are `count` of.
    pub fn each_unit(
        &self,
        kernel: &Kernel,
        count: usize,
        threads: usize,
        params: &Params,
    ) -> Result<(), Error> {
        self.launch(kernel, [count, 1, 1], threads, 0, params)
    }

    fn absorb(&self, kernel: &Kernel, span: &Span) -> Result<(), Error> {
        let tiles = self.kernels.tiles.absorb;
        let blocks = self.features.div_ceil(tiles.features) * tiles.column_blocks;
        let grid = [blocks, span.chunks, span.units];
        self.launch(kernel, grid, tiles.threads, tiles.bytes, &span.params)
    }

    fn read(&self, kernel: &Kernel, bytes: usize, span: &Span) -> Result<(), Error> {
        let threads = 32 * self.kernels.tiles.read.warps;
        let Params { far_tokens, far_heads, splits, .. } = span.params;
        let blocks = (far_tokens as usize).div_ceil(threads) * far_heads as usize * splits as usize;
        self.launch(kernel, [blocks, span.chunks, span.units], threads, bytes, &span.params)
    }
}

impl Stages for Generic<'_> {
    fn slot_len(&self) -> usize {
        // Kernels go through them four at a time.
        (self.features * (self.d_value + 1)).next_multiple_of(4)
    }

    fn splits(&self, tokens: usize, others: usize) -> usize {
        let blocks = tokens.div_ceil(32 * self.kernels.tiles.read.warps) * others;
        let tiles = self.features.div_ceil(super::features::TILE);
        (4 * self.multiprocessors).div_ceil(blocks.max(1)).min(tiles).clamp(1, MOST_SPLITS)
    }

    fn absorb_keys(&self, span: &Span) -> Result<(), Error> {
        self.absorb(&self.kernels.absorb_keys, span)
    }

    fn absorb_queries(&self, span: &Span) -> Result<(), Error> {
        self.absorb(&self.kernels.absorb_queries, span)
    }

    fn scan(&self, span: &Span, how: Scan, ends: Ends) -> Result<(), Error> {
        let mut params = span.params;
        params.mode = match how {
            Scan::Forward => 0,
            Scan::Reverse => 1,
            Scan::Total => 2,
        };
        params.flags =
            i32::from(ends.begin) | i32::from(ends.last) << 1 | i32::from(ends.first) << 2;
        let grid = [self.slot_len().div_ceil(1024), 1, span.units];
        self.launch(&self.kernels.scan, grid, 256, 0, &params)
    }

    fn read_queries(&self, span: &Span) -> Result<(), Error> {
        self.read(&self.kernels.read_queries, self.kernels.tiles.read.query_bytes, span)
    }

    fn read_keys(&self, span: &Span) -> Result<(), Error> {
        self.read(&self.kernels.read_keys, self.kernels.tiles.read.key_bytes, span)?;
        let tiles = self.kernels.tiles.values;
        let Params { far_tokens, splits, .. } = span.params;
        let blocks =
            (far_tokens as usize).div_ceil(tiles.tokens) * tiles.column_blocks * splits as usize;
        let grid = [blocks, span.chunks, span.units];
        self.launch(&self.kernels.values, grid, tiles.threads, tiles.bytes, &span.params)
    }

    fn queries(&self, span: &Span) -> Result<(), Error> {
        let tiles = self.kernels.tiles.pairs;
        let Params { far_tokens, far_heads, .. } = span.params;
        let blocks = (far_tokens as usize).div_ceil(tiles.tile) * far_heads as usize;
        let grid = [blocks, span.chunks, span.units];
        self.launch(&self.kernels.queries, grid, 256, tiles.query_bytes, &span.params)
    }

    fn keys(&self, span: &Span, tokens: usize) -> Result<(), Error> {
        let tiles = self.kernels.tiles.pairs;
        let grid = [tokens.div_ceil(tiles.tile), span.chunks, span.units];
        self.launch(&self.kernels.keys, grid, 256, tiles.key_bytes, &span.params)
    }

    fn sinks(&self, span: &Span, sinks: usize, splits: usize) -> Result<(), Error> {
        let tiles = self.kernels.tiles.pairs;
        let grid = [sinks.div_ceil(tiles.tile), splits, span.units];
        self.launch(&self.kernels.sinks, grid, 256, tiles.key_bytes, &span.params)?;
        self.launch(&self.kernels.sinks_end, [sinks, 1, span.units], 64, 0, &span.params)
    }
}
