//! The order of the steps: two sweeps over chunks, as many at once as memory allows.
//!
//! Forward, as the call itself: chunks' keys are summed, the sums run on, queries read them and
//! weigh what is raw, which gives D, δ and their own gradients. Backward: chunks' queries are summed
//! with their ĝ (see `backward.cuh`), the sums run back, keys read them and take what the queries
//! that weigh them one by one hand back. Neither sweep needs what the other has summed, and nothing
//! of the size of tokens × features is kept.

use super::params::Params;
use super::stages::{Ends, Scan, Span, Stages};
use super::table::Table;
use crate::{Buffer, Device, Error};

/// Most chunks, and units, of a launch: what a grid has in y and z.
const MOST_BLOCKS: usize = 65_535;
/// Bytes that shares of sinks may take.
const SINK_BYTES: usize = 1 << 26;
const MOST_SINK_SPLITS: usize = 64;

/// Sizes that a sweep is made for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub d_key: usize,
    pub d_value: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub causal: bool,
    /// Whether there are sums: of a state, of tokens that are folded, or gradients by them.
    pub sums: bool,
    /// Most sinks that a sequence has after the call.
    pub sinks: usize,
    pub multiprocessors: usize,
    /// Bytes of work memory that sums and what is read from them should fit into.
    pub workspace: usize,
}

/// How many units and chunks are at work at once, and in how many parts features are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Batch {
    units: usize,
    chunks: usize,
    query_splits: usize,
    key_splits: usize,
}

/// One backward pass.
pub(crate) struct Sweep<'s> {
    stages: &'s dyn Stages,
    table: &'s Table,
    sizes: Sizes,
    batch: Batch,
    params: Params,
    /// Held until all is enqueued.
    _work: [Buffer<f32>; 4],
    _sink_dw: Buffer<f64>,
}

impl<'s> Sweep<'s> {
    /// Takes the work memory. `params` has everything that does not depend on it.
    pub fn new(
        device: &Device,
        stages: &'s dyn Stages,
        table: &'s Table,
        sizes: Sizes,
        mut params: Params,
    ) -> Result<Self, Error> {
        let slot = stages.slot_len();
        let query_rows = 2 * sizes.d_key + 2;
        let key_rows = sizes.d_key + 1 + sizes.d_value;
        let batch = batch(stages, table, &sizes, [query_rows, key_rows]);
        let Batch { units, chunks, query_splits, key_splits } = batch;
        let far = (units * chunks)
            * (query_splits * sizes.group * table.widest_read * query_rows)
                .max(key_splits * table.widest_fold * key_rows);
        let if_sums = |n: usize| if sizes.sums { n } else { 0 };
        let slots = Buffer::<f32>::uninit(device, if_sums(units * chunks * slot))?;
        let carry = Buffer::<f32>::uninit(device, if_sums(2 * units * slot))?;
        let far = Buffer::<f32>::uninit(device, if_sums(far))?;
        let each = sizes.sinks * (sizes.d_key + sizes.d_value);
        let busy = (2 * sizes.multiprocessors).div_ceil(units.max(1));
        let splits = busy.clamp(1, MOST_SINK_SPLITS).min(table.longest.div_ceil(64).max(1));
        let splits = splits.min(SINK_BYTES / (4 * units * each).max(1)).max(1);
        let sink_rows = Buffer::<f32>::uninit(device, units * splits * each)?;
        let sink_dw = Buffer::<f64>::uninit(device, units * splits * sizes.sinks)?;
        params.slots = slots.address();
        params.carry = carry.address();
        params.far = far.address();
        params.slot_unit = (chunks * slot) as i64;
        params.slot_chunk = slot as i64;
        params.chunks = chunks as i32;
        params.sink_rows = sink_rows.address();
        params.sink_dw = sink_dw.address();
        params.sink_splits = splits as i64;
        params.most_sinks = sizes.sinks as i64;
        let work = [slots, carry, far, sink_rows];
        Ok(Sweep { stages, table, sizes, batch, params, _work: work, _sink_dw: sink_dw })
    }

    /// All steps.
    pub fn run(&self) -> Result<(), Error> {
        let all = self.table.rows.len() * self.sizes.kv_heads;
        for first in (0..all).step_by(self.batch.units) {
            let units = self.batch.units.min(all - first);
            let mut params = self.params;
            params.first_unit = first as i32;
            params.units = units as i32;
            let span = Span { params, chunks: 0, units };
            self.forward(span)?;
            self.backward(span)?;
            if self.sizes.sinks > 0 {
                let splits = self.params.sink_splits as usize;
                self.stages.sinks(&span, self.sizes.sinks, splits)?;
            }
        }
        Ok(())
    }

    /// `span` for chunks from `first` on, of `all`.
    fn chunks(&self, mut span: Span, first: usize, all: usize) -> Span {
        span.params.first_chunk = first as i32;
        span.chunks = self.batch.chunks.min(all.saturating_sub(first));
        span
    }

    /// Where queries leave what they have read.
    fn for_queries(&self, mut span: Span) -> Span {
        let rows = 2 * self.sizes.d_key + 2;
        let tokens = self.table.widest_read;
        let Batch { units, chunks, query_splits, .. } = self.batch;
        span.params.far_tokens = tokens as i64;
        span.params.far_heads = self.sizes.group as i32;
        span.params.splits = query_splits as i32;
        span.params.far_split = (units * chunks * self.sizes.group * tokens * rows) as i64;
        span
    }

    /// Where keys do.
    fn for_keys(&self, mut span: Span) -> Span {
        let rows = self.sizes.d_key + 1 + self.sizes.d_value;
        let tokens = self.table.widest_fold;
        let Batch { units, chunks, key_splits, .. } = self.batch;
        span.params.far_tokens = tokens as i64;
        span.params.far_heads = 1;
        span.params.splits = key_splits as i32;
        span.params.far_split = (units * chunks * tokens * rows) as i64;
        span
    }

    /// Queries of some chunks have their gradients.
    fn answer(&self, span: Span) -> Result<(), Error> {
        let span = self.for_queries(span);
        if self.sizes.sums {
            self.stages.read_queries(&span)?;
        }
        self.stages.queries(&span)
    }

    fn forward(&self, span: Span) -> Result<(), Error> {
        let Table { most_folds, most_reads, .. } = *self.table;
        let step = self.batch.chunks;
        if self.sizes.sums {
            for first in (0..most_folds.max(1)).step_by(step) {
                let span = self.chunks(span, first, most_folds);
                self.stages.absorb_keys(&span)?;
                let ends = Ends { begin: first == 0, last: false, first: false };
                self.stages.scan(&span, Scan::Forward, ends)?;
                if self.sizes.causal {
                    self.answer(span)?;
                }
            }
            if self.sizes.causal {
                return Ok(());
            }
        }
        for first in (0..most_reads).step_by(step) {
            let mut span = self.chunks(span, first, most_reads);
            if !self.sizes.causal {
                // All read what has gone through all chunks.
                span.params.slots = span.params.carry;
                span.params.slot_unit = 2 * span.params.slot_chunk;
                span.params.slot_chunk = 0;
            }
            self.answer(span)?;
        }
        Ok(())
    }

    fn backward(&self, span: Span) -> Result<(), Error> {
        let Table { most_folds, most_reads, widest_fold, widest_tail, .. } = *self.table;
        let step = self.batch.chunks;
        if self.sizes.sums && !self.sizes.causal {
            for first in (0..most_reads.max(1)).step_by(step) {
                let span = self.chunks(span, first, most_reads);
                self.stages.absorb_queries(&span)?;
                let ends = Ends { begin: first == 0, last: false, first: false };
                self.stages.scan(&span, Scan::Total, ends)?;
            }
        }
        // Each sequence has one more stretch of keys than chunks: those that nothing folds.
        let last = most_folds / step * step;
        for first in (0..last + 1).step_by(step).rev() {
            let folds = self.chunks(span, first, most_folds);
            if self.sizes.sums {
                if self.sizes.causal {
                    self.stages.absorb_queries(&folds)?;
                }
                let ends = Ends {
                    begin: self.sizes.causal && first == last,
                    last: first == last,
                    first: first == 0,
                };
                self.stages.scan(&folds, Scan::Reverse, ends)?;
                self.stages.read_keys(&self.for_keys(folds))?;
            }
            let span = self.for_keys(self.chunks(span, first, most_folds + 1));
            self.stages.keys(&span, widest_fold.max(widest_tail))?;
        }
        Ok(())
    }
}

/// As many units at once as fit, then as many chunks of each.
fn batch(stages: &dyn Stages, table: &Table, sizes: &Sizes, rows: [usize; 2]) -> Batch {
    let all = (table.rows.len() * sizes.kv_heads).max(1);
    let most = (table.most_folds + 1).max(table.most_reads).min(MOST_BLOCKS);
    if !sizes.sums {
        let units = all.min(MOST_BLOCKS);
        return Batch { units, chunks: most, query_splits: 1, key_splits: 1 };
    }
    let slot = 4 * stages.slot_len();
    let far = 4 * (sizes.group * table.widest_read * rows[0]).max(table.widest_fold * rows[1]);
    let floats = sizes.workspace;
    let units = (floats / (2 * slot + slot + far)).clamp(1, all.min(MOST_BLOCKS));
    let left = (floats / units).saturating_sub(2 * slot);
    let chunks = (left / (slot + far)).clamp(1, most);
    // What is read in parts takes their number of times the memory.
    let fits = (left.saturating_sub(chunks * slot) / (chunks * far).max(1)).max(1);
    let splits = |tokens: usize, heads: usize| {
        stages.splits(tokens, heads * chunks.min(table.most_folds.max(1)) * units).min(fits)
    };
    Batch {
        units,
        chunks,
        query_splits: splits(table.widest_read, sizes.group),
        key_splits: splits(table.widest_fold, 1),
    }
}
