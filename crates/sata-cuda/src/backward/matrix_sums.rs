//! The backward of bf16 through sums on Hopper's matrix units: chunks of tokens, whose sums of keys
//! run forward and of queries run back (`hopper_sums.cu`), are read by the tokens of each chunk
//! (`matrix_backward_far.cu`), and pairs within a chunk are weighed as ever.
//!
//! Sums are f32 where they run, bf16 where they are read. As [`Sweep`](super::sweep::Sweep), but all
//! chunks of some heads at once.

use std::sync::Arc;

use sata::Form;

use super::kernels::Kind;
use super::matrix::Matrix;
use super::params::Params;
use super::stages::{Span, Stages};
use super::sweep::Sizes;
use super::table::Table;
use crate::generic::Wish;
use crate::hopper::prefix::{Prefix, Run};
use crate::problem::Problem;
use crate::units::{MOST_BLOCKS, Units};
use crate::{Buffer, Device, Error, Kernel, Launch, Plan, Unit, unit};

/// Bytes of work memory where nothing is said.
const WORK_BYTES: usize = 4 << 30;
/// Bytes that shares of sinks may take, and how many there are at most.
const SINK_BYTES: usize = 1 << 26;
const MOST_SINK_SPLITS: usize = 64;
const TILE: usize = 64;
/// Sums of queries that go on from a chunk are of this many heads at most, so that tables stay small.
const MOST_CHUNKS: usize = 1 << 14;

// Measured on an H100: seconds per pair and element of both kinds, per number of sums and token, and
// per number of sums, column and chunk.
const PAIR: f64 = 3.5e-14;
const NUMBER: f64 = 3.0e-14;
const TOUCH: f64 = 4.7e-14;

#[derive(Clone, Copy)]
#[repr(C)]
struct Records {
    params: Params,
    records: u64,
    references: u64,
    tiles: i32,
    places: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Far {
    params: Params,
    sums: u64,
    slopes: u64,
    places: i32,
    unused: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Slopes {
    sums: u64,
    slopes: u64,
    table: u64,
    count: i64,
}

/// Its kernels and tables.
#[derive(Debug)]
pub(super) struct Sums {
    prefix: Prefix,
    /// Of queries, of keys.
    far: [Kernel; 2],
    records: [Kernel; 2],
    slopes: Kernel,
    readers: usize,
    far_bytes: usize,
}

/// Warpgroups that read, and so the tokens of a block: as many as do without spilling registers.
fn readers(kind: &Kind) -> usize {
    if kind.d_key == 32 && kind.d_value <= 32 { 3 } else { 2 }
}

impl Sums {
    pub fn new(plan: &Plan, device: &Device, kind: &Kind) -> Result<Self, Error> {
        let prefix = Prefix::new(plan, kind.fades)?;
        let readers = readers(kind);
        let stage = (18 * 16 * prefix.columns()).max(128 * kind.d_key).next_multiple_of(128);
        let pitch = if kind.d_key % 16 == 8 { kind.d_key } else { kind.d_key + 8 };
        let rows = 8 * readers * TILE * pitch;
        // As many stages as there is room for.
        let room = (device.properties().shared_per_block as usize).saturating_sub(1024 + rows);
        let stages = (room / (stage + 16)).min(8);
        let far_bytes = stages * (stage + 16) + rows;
        let define =
            |unit: Unit, keys: usize| prefix.define(kind.define(unit)).define("KEYS", keys);
        let far = |keys| {
            define(unit!("matrix_backward_far.cu"), keys)
                .define("READERS", readers)
                .define("STAGES", stages)
                .define("SHARED_BYTES", far_bytes)
                .size_of::<Far>("FAR_BYTES")
                .hot()
                .matrix()
        };
        let records = |keys| {
            define(unit!("matrix_backward_records.cu"), keys).size_of::<Records>("RECORDS_BYTES")
        };
        let slopes =
            define(unit!("matrix_backward_slopes.cu"), 0).size_of::<Slopes>("SLOPES_BYTES");
        Ok(Sums {
            far: [
                device.kernel(&far(0), "matrix_backward_far")?,
                device.kernel(&far(1), "matrix_backward_far")?,
            ],
            records: [
                device.kernel(&records(0), "matrix_backward_records")?,
                device.kernel(&records(1), "matrix_backward_records")?,
            ],
            slopes: device.kernel(&slopes, "matrix_backward_slopes")?,
            prefix,
            readers,
            far_bytes,
        })
    }
}

/// Tokens of a chunk where sums are taken, or `None` where they cost more than weighing all pairs.
fn chunk(wish: Wish, kind: &Kind, group: usize, numbers: usize, longest: usize) -> Option<usize> {
    let pair = PAIR * (kind.d_key + kind.d_value) as f64 * group as f64;
    let touch = TOUCH * (numbers * kind.d_value) as f64;
    let rows = TILE * readers(kind);
    let best = ((2.0 * touch / pair).sqrt() / rows as f64).round().max(1.0) * rows as f64;
    let sums = NUMBER * numbers as f64 * (1.0 + group as f64) / 2.0;
    let pays = sums + touch / best + pair * best / 2.0 < pair * longest as f64 / 2.0;
    match (wish.form, wish.chunk) {
        (Some(Form::Direct), _) => None,
        (_, Some(chunk)) => Some(chunk),
        (Some(Form::State), None) => Some(best as usize),
        (None, None) => pays.then_some(best as usize),
    }
}

/// Whether sums are to be taken of a call that others of the matrix units compute: kernels, and tokens
/// of a chunk.
pub(super) fn choose(
    plan: &Plan,
    problem: &Problem<'_>,
    kind: &Kind,
    longest: usize,
    keep: bool,
) -> Result<Option<(Arc<Sums>, usize)>, Error> {
    let all: usize = problem.sequences.iter().map(|s| s.queries).sum();
    let heads = problem.sequences.len() * problem.kv_heads;
    let served = Prefix::serves(problem)
        && problem.causal
        && problem.past.is_none()
        && !keep
        // Chunks that a sequence does not have cost as much as those that it has.
        && 2 * all >= longest * problem.sequences.len();
    if !served {
        return Ok(None);
    }
    let numbers = Prefix::numbers(plan.spec());
    let Some(chunk) = chunk(plan.wish(), kind, problem.group, numbers, longest) else {
        return Ok(None);
    };
    let device = plan.device();
    let sums = plan.once(format!("{kind:?}"), || Sums::new(plan, device, kind))?;
    let some = chunk < longest && sums.prefix.summing(heads, device).is_some();
    Ok(some.then_some((sums, chunk)))
}

/// One backward pass through sums.
pub(super) struct Pass<'p> {
    pub plan: &'p Plan,
    pub matrix: &'p Matrix<'p>,
    pub sums: &'p Sums,
    pub kind: &'p Kind,
    pub table: &'p Table,
    pub sizes: &'p Sizes,
}

impl Pass<'_> {
    /// How many units are worked on at once; `None` where there are too few, or chunks too many.
    pub fn units(&self) -> Option<usize> {
        let all = self.table.rows.len() * self.sizes.kv_heads;
        let Table { most_folds, most_reads, .. } = *self.table;
        let chunks = most_folds.max(most_reads);
        let most = self.plan.wish().work_bytes.unwrap_or(WORK_BYTES);
        let at_once = (most / self.unit_bytes()).clamp(1, all.min(MOST_BLOCKS));
        // As even as can be.
        let at_once = all.div_ceil(all.div_ceil(at_once));
        let device = self.plan.device();
        let last = all - all / at_once * at_once;
        let enough = [at_once, if last == 0 { at_once } else { last }];
        (chunks < MOST_CHUNKS
            && self.table.most_folds > 1
            && enough.iter().all(|&n| self.sums.prefix.summing(n, device).is_some()))
        .then_some(at_once)
    }

    /// Tiles of a chunk of keys, and of one of queries.
    fn tiles(&self) -> [usize; 2] {
        let Table { widest_fold, widest_read, .. } = *self.table;
        [widest_fold.div_ceil(TILE).max(1), self.sizes.group * widest_read.div_ceil(TILE).max(1)]
    }

    fn chunks(&self) -> usize {
        self.table.most_folds.max(self.table.most_reads)
    }

    fn far_len(&self) -> usize {
        let Kind { d_key, d_value, .. } = *self.kind;
        let Table { widest_fold, widest_read, .. } = *self.table;
        let queries = self.sizes.group * widest_read * (2 * d_key + 2);
        (self.chunks() + 1) * queries.max(widest_fold * (d_key + 1 + d_value))
    }

    fn unit_bytes(&self) -> usize {
        let [keys, queries] = self.tiles();
        let prefix = &self.sums.prefix;
        let records = self.chunks() * keys.max(queries) * prefix.tile_bytes();
        let sums = (self.chunks() + 1) * (prefix.elements() + prefix.slopes.len()) * 2;
        records + sums + 4 * self.far_len()
    }

    /// All steps, `at_once` units at a time.
    pub fn run(&self, at_once: usize, mut params: Params) -> Result<(), Error> {
        let device = self.plan.device();
        let units = self.plan.once("units", || Ok(Units::new(device)))?;
        let (chunks, prefix) = (self.chunks(), &self.sums.prefix);
        let places = chunks + 1;
        let [keys, queries] = self.tiles();
        let all = self.table.rows.len() * self.sizes.kv_heads;
        let records = at_once * chunks * keys.max(queries) * prefix.tile_bytes();
        let records = Buffer::<u8>::uninit(device, records)?;
        let sums = Buffer::<u16>::uninit(device, at_once * places * prefix.elements())?;
        let slopes = Buffer::<u16>::uninit(device, at_once * places * prefix.slopes.len())?;
        let references = if self.kind.fades { at_once * places } else { 0 };
        let references = Buffer::<f64>::uninit(device, references)?;
        let far = Buffer::<f32>::uninit(device, at_once * self.far_len())?;
        let each = self.sizes.sinks * (self.kind.d_key + self.kind.d_value);
        let busy = 2 * device.properties().multiprocessors as usize;
        let splits = busy.div_ceil(at_once).min(self.table.longest.div_ceil(TILE));
        let splits = splits.clamp(1, MOST_SINK_SPLITS);
        let splits = splits.min(SINK_BYTES / (4 * at_once * each).max(1)).max(1);
        let sink_rows = Buffer::<f32>::uninit(device, at_once * splits * each)?;
        let sink_dw = Buffer::<f64>::uninit(device, at_once * splits * self.sizes.sinks)?;
        params.sink_rows = sink_rows.address();
        params.sink_dw = sink_dw.address();
        params.sink_splits = splits as i64;
        params.most_sinks = self.sizes.sinks as i64;
        params.far = far.address();
        params.first_chunk = 0;
        params.chunks = places as i32;
        params.splits = 1;
        let forward = (0..chunks - 1).map(|c| [c * keys, keys, c]).collect();
        let back = (1..chunks).rev().map(|c| [c * queries, queries, chunks - 1 - c]).collect();
        for first in (0..all).step_by(at_once) {
            let count = at_once.min(all - first);
            params.first_unit = first as i32;
            params.units = count as i32;
            let Some(sum) = prefix.summing(count, device) else {
                return Err(Error::Unsupported { what: format!("the backward of {count} heads") });
            };
            let run = |chunks, tiles: usize| Run {
                device,
                chunks,
                records: records.address(),
                tiles,
                references: references.address(),
                far: sums.address(),
                places,
            };
            let far = |params| Far {
                params,
                sums: sums.address(),
                slopes: slopes.address(),
                places: places as i32,
                unused: 0,
            };
            let record = |params, tiles: usize| Records {
                params,
                records: records.address(),
                references: references.address(),
                tiles: tiles as i32,
                places: places as i32,
            };
            let of_queries = Params {
                far_tokens: self.table.widest_read as i64,
                far_heads: self.sizes.group as i32,
                ..params
            };
            let of_keys =
                Params { far_tokens: self.table.widest_fold as i64, far_heads: 1, ..params };
            let span = |params, chunks| Span { params, chunks, units: count };
            // Keys are summed, and queries read.
            let kernels = self.sums;
            launch(&kernels.records[1], [keys, chunks, count], 128, 0, &record(of_keys, keys))?;
            sum(&units, run(&forward, chunks * keys))?;
            let derive = Slopes {
                sums: sums.address(),
                slopes: slopes.address(),
                table: prefix.slopes.address(),
                count: prefix.slopes.len() as i64,
            };
            let grid = [prefix.slopes.len().div_ceil(256), places, count];
            launch(&kernels.slopes, grid, 256, 0, &derive)?;
            self.read(0, self.table.widest_read, self.sizes.group, count, &far(of_queries))?;
            self.matrix.queries(&span(of_queries, self.table.most_reads))?;
            // Queries are summed, and keys read.
            let grid = [queries, chunks, count];
            launch(&kernels.records[0], grid, 128, 0, &record(of_queries, queries))?;
            sum(&units, run(&back, chunks * queries))?;
            self.read(1, self.table.widest_fold, 1, count, &far(of_keys))?;
            let Table { widest_fold, widest_tail, most_folds, .. } = *self.table;
            self.matrix.keys(&span(of_keys, most_folds + 1), widest_fold.max(widest_tail))?;
            if self.sizes.sinks > 0 {
                self.matrix.sinks(&span(of_keys, 1), self.sizes.sinks, splits)?;
            }
        }
        Ok(())
    }

    fn read(
        &self,
        keys: usize,
        tokens: usize,
        heads: usize,
        units: usize,
        far: &Far,
    ) -> Result<(), Error> {
        let readers = self.sums.readers;
        let blocks = tokens.div_ceil(TILE * readers) * heads;
        let grid = [blocks, self.chunks(), units];
        launch(&self.sums.far[keys], grid, 128 * (readers + 1), self.sums.far_bytes, far)
    }
}

fn launch<P: Copy>(
    kernel: &Kernel,
    grid: [usize; 3],
    threads: usize,
    shared: usize,
    params: &P,
) -> Result<(), Error> {
    if grid.contains(&0) {
        return Ok(());
    }
    let grid = grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
    let launch = Launch { grid, block: [threads as u32, 1, 1], shared: shared as u32 };
    // SAFETY: the units are made with the sizes of their parameters, whose addresses are those of
    // arrays that have been made for the chunks and units of the grid.
    unsafe { kernel.launch(launch, params) }
}
