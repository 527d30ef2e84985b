//! The forward pass on any GPU: every feature and type, arithmetic in f32.
//!
//! 1. Sums of features of pieces of each sequence (`generic_sums.cu`).
//! 2. A scan over the pieces, from the state's sums on (`generic_scan.cu`).
//! 3. Queries read the sums of what came before their chunk (`generic_read.cu`).
//! 4. They weigh the raw tokens since, near ones and sinks; outputs (`generic_local.cu`).
//!
//! Short contexts are weighed token by token, which is step 4 alone.

mod params;
mod schedule;
mod tables;
mod tiles;

use std::sync::Arc;

use sata::Series;

use crate::problem::Problem;
use crate::units::{MOST_BLOCKS, Units, grid};
use crate::window::{Gathered, StateSums, Windows, address, marks, sequences};
use crate::{Buffer, Error, Launch, Plan, RawView, Unit, unit};
use params::{Local, Read, Scan, Sums};
use schedule::{Batch, Schedule, Sizes};
use tables::{Reading, Tables};
use tiles::{LocalTiles, THREADS, Tiles};

pub(crate) use params::Tally;
pub(crate) use schedule::Wish;

/// Parts that the features of one block's queries are split into at most.
const MOST_PARTS: usize = 32;
/// What rounding leaves in sums of f32, as on the CPU.
const ROUNDING: f64 = f32::EPSILON as f64;

/// Computes a problem; what it finds in denominators is added to `tally`.
pub(crate) fn run(
    plan: &Plan,
    problem: &Problem<'_>,
    wish: Wish,
    tally: &Buffer<Tally>,
) -> Result<(), Error> {
    let units = plan.once("units", || Ok(Units::new(plan.device())))?;
    let (d_key, orders) = (problem.spec.d_key(), problem.orders());
    let tables = plan.once(format!("{orders:?}"), || Tables::new(plan.device(), d_key, &orders))?;
    let reading =
        plan.once(format!("{orders:?}"), || Reading::new(plan.device(), problem.spec, &tables))?;
    let sizes = Sizes { features: tables.features, planes: reading.planes };
    let mut host = sequences(problem);
    let schedule = Schedule::new(problem, &mut host, sizes, wish);
    let windows = Windows::new(&units, problem, host, reading.each || problem.past.is_some())?;
    let work = Work::new(problem, &units, &tables, reading, &schedule, &windows)?;
    for batch in &schedule.batches {
        work.batch(batch, tally)?;
    }
    windows.settle(&units, problem)
}

fn sums_unit(element: &'static str) -> Unit {
    unit!("generic_sums.cu").define("KV", element).size_of::<Sums>("SUMS_BYTES")
}

fn scan_unit() -> Unit {
    unit!("generic_scan.cu").size_of::<Scan>("SCAN_BYTES")
}

fn read_unit(element: &'static str) -> Unit {
    unit!("generic_read.cu").define("E", element).size_of::<Read>("READ_BYTES")
}

fn local_unit(element: &'static str, kv: &'static str, highest: usize, each: bool) -> Unit {
    unit!("generic_local.cu")
        .define("E", element)
        .define("KV", kv)
        .define("HIGHEST", highest)
        .define("EACH", u8::from(each))
        .size_of::<Local>("LOCAL_BYTES")
}

/// What the batches of one call share.
struct Work<'w> {
    problem: &'w Problem<'w>,
    units: &'w Units,
    tables: &'w Tables,
    schedule: &'w Schedule,
    windows: &'w Windows,
    gathered: Option<Gathered<f32>>,
    /// k and v, or what was gathered, and its type.
    k: RawView,
    v: RawView,
    kv: &'static str,
    chunks: Buffer<params::Chunk>,
    pieces: Buffer<params::Piece>,
    reading: Arc<Reading>,
}

impl<'w> Work<'w> {
    fn new(
        problem: &'w Problem<'w>,
        units: &'w Units,
        tables: &'w Tables,
        reading: Arc<Reading>,
        schedule: &'w Schedule,
        windows: &'w Windows,
    ) -> Result<Self, Error> {
        let device = problem.device;
        let gathered = if windows.has_open() {
            Some(windows.gather::<f32>(units, problem, "f32")?)
        } else {
            None
        };
        let [k, v] = match &gathered {
            Some(gathered) => gathered.views(windows.works, problem.dims()),
            None => [problem.k, problem.v],
        };
        Ok(Work {
            problem,
            units,
            tables,
            reading,
            schedule,
            windows,
            kv: if gathered.is_some() { "f32" } else { problem.element },
            gathered,
            k,
            v,
            chunks: Buffer::from_slice(device, &schedule.chunks)?,
            pieces: Buffer::from_slice(device, &schedule.pieces)?,
        })
    }

    /// Sequences and heads whose work arrays fit together.
    fn batch(&self, batch: &Batch, tally: &Buffer<Tally>) -> Result<(), Error> {
        let (device, d_value) = (self.problem.device, self.problem.spec.d_value());
        let matrices = batch.pieces.len() * batch.head_count() * self.tables.features;
        let sums = Buffer::<f32>::uninit(device, matrices * d_value)?;
        let z = Buffer::<f32>::uninit(device, matrices)?;
        if !batch.pieces.is_empty() {
            self.sum(batch, &sums, &z)?;
            self.scan(batch, &sums, &z, "scan")?;
        }
        let read = self.read(batch, &sums, &z)?;
        self.local(batch, &read, tally)?;
        if self.problem.past.is_some() && !batch.pieces.is_empty() {
            self.scan(batch, &sums, &z, "commit")?;
        }
        Ok(())
    }

    fn sum(&self, batch: &Batch, sums: &Buffer<f32>, z: &Buffer<f32>) -> Result<(), Error> {
        let features = self.tables.features;
        let tiles = Tiles::of_sums(self.problem.dims(), features);
        let (unit, shared) = tiles.sums(sums_unit(self.kv));
        let kernel = self.units.kernel("chunk_sums", &unit)?;
        let across = features.div_ceil(tiles.rows);
        let p = Sums {
            k: self.k,
            v: self.v,
            sequences: self.windows.sequences.address(),
            pieces: self.pieces.address_of(batch.pieces.start),
            live: self.windows.live.address(),
            last: self.windows.last.address(),
            g: address(self.windows.g.as_ref()),
            factors: self.tables.factors.address(),
            sums: sums.address(),
            z: z.address(),
            works: self.windows.works as i64,
            features: features as i64,
            first_piece: batch.pieces.start as i64,
            first_head: batch.heads.start as i32,
            heads: batch.head_count() as i32,
            width: self.tables.width as i32,
            tiles: across as i32,
            gathered: i32::from(self.gathered.is_some()),
            padding: 0,
        };
        let launch = Launch {
            grid: grid([batch.pieces.len() * across, batch.head_count(), tiles.column_tiles])?,
            block: [THREADS as u32, 1, 1],
            shared: shared as u32,
        };
        // SAFETY: `Sums` is the kernel's own; pieces lie within windows, and sums have a place for
        // each piece and head of the batch.
        unsafe { kernel.launch_on(self.problem.device, launch, &p) }
    }

    fn scan(
        &self,
        batch: &Batch,
        sums: &Buffer<f32>,
        z: &Buffer<f32>,
        name: &'static str,
    ) -> Result<(), Error> {
        let (problem, features, d_value) =
            (self.problem, self.tables.features, self.problem.spec.d_value());
        let past = problem.past.as_ref();
        let p = Scan {
            sequences: self.windows.sequences.address(),
            last: self.windows.last.address(),
            g: address(self.windows.g.as_ref()),
            marks: marks(past),
            state: StateSums::of(past),
            pieces: self.pieces.address(),
            sums: sums.address(),
            z: z.address(),
            works: self.windows.works as i64,
            features: features as i64,
            d_value: d_value as i64,
            first_piece: batch.pieces.start as i64,
            first_sequence: batch.sequences.start as i32,
            sequence_count: batch.sequences.len() as i32,
            first_head: batch.heads.start as i32,
            heads: batch.head_count() as i32,
            kv_heads: problem.kv_heads as i32,
            padding: 0,
        };
        let kernel = self.units.kernel(name, &scan_unit())?;
        let blocks = (features * (d_value + 1)).div_ceil(256);
        let across = batch.sequences.len().min(MOST_BLOCKS);
        let launch = Launch {
            grid: grid([blocks, batch.head_count(), across])?,
            block: [256, 1, 1],
            shared: 0,
        };
        // SAFETY: `Scan` is the kernel's own; sums are those of the batch's pieces, the state's those
        // of the checked call.
        unsafe { kernel.launch_on(problem.device, launch, &p) }
    }

    /// The most rows (queries of a head's group) of a chunk of the batch, of those that read sums if
    /// `reading`.
    fn most_rows(&self, batch: &Batch, reading: bool) -> usize {
        let chunks = &self.schedule.chunks[batch.chunks.clone()];
        let chunks = chunks.iter().filter(|chunk| !reading || chunk.prefix >= 0);
        chunks.map(|chunk| chunk.count as usize * self.problem.group).max().unwrap_or(0)
    }

    fn read(&self, batch: &Batch, sums: &Buffer<f32>, z: &Buffer<f32>) -> Result<FarRead, Error> {
        let (problem, device) = (self.problem, self.problem.device);
        let rows = self.most_rows(batch, true);
        let (mut parts, mut tiles) = (1, None);
        if rows > 0 {
            let chosen = Tiles::of_read(self.problem.dims(), rows);
            let across = rows.div_ceil(chosen.rows);
            let blocks = batch.chunks.len() * across * batch.head_count() * chosen.column_tiles;
            let wanted = 2 * device.properties().multiprocessors as usize;
            parts = wanted
                .div_ceil(blocks)
                .clamp(1, (self.reading.group_count / 8).clamp(1, MOST_PARTS));
            tiles = Some((chosen, across));
        }
        let lines = if rows > 0 {
            parts * self.reading.planes * batch.head_count() * problem.group * batch.rows.len()
        } else {
            0
        };
        let read = FarRead {
            num: Buffer::uninit(device, lines * self.problem.spec.d_value())?,
            den: Buffer::uninit(device, lines)?,
            parts,
        };
        let Some((tiles, across)) = tiles else {
            return Ok(read);
        };
        let (unit, shared) = tiles.read(read_unit(problem.element), self.tables.width);
        let kernel = self.units.kernel("far_read", &unit)?;
        let past = problem.past.as_ref();
        let p = Read {
            q: problem.q,
            sequences: self.windows.sequences.address(),
            chunks: self.chunks.address(),
            factors: self.tables.factors.address(),
            multiplicities: self.tables.multiplicities.address(),
            groups: self.reading.groups.address(),
            planes: self.reading.plane_groups.address(),
            state: StateSums::of(past),
            sums: sums.address(),
            z: z.address(),
            num: read.num.address(),
            den: read.den.address(),
            features: self.tables.features as i64,
            first_piece: batch.pieces.start as i64,
            first_row: batch.rows.start as i64,
            rows: batch.rows.len() as i64,
            scale: problem.spec.scale() as f32,
            width: self.tables.width as i32,
            plane_count: self.reading.planes as i32,
            parts: parts as i32,
            tiles: across as i32,
            first_head: batch.heads.start as i32,
            heads: batch.head_count() as i32,
            kv_heads: problem.kv_heads as i32,
            group: problem.group as i32,
            first_chunk: batch.chunks.start as i32,
        };
        let launch = Launch {
            grid: grid([
                batch.chunks.len() * across,
                batch.head_count(),
                parts * tiles.column_tiles,
            ])?,
            block: [THREADS as u32, 1, 1],
            shared: shared as u32,
        };
        // SAFETY: `Read` is the kernel's own; sums are those of the batch's pieces or the state's,
        // num and den have a place for each part, plane, head and query of the batch.
        unsafe { kernel.launch_on(device, launch, &p) }?;
        Ok(read)
    }

    fn local(&self, batch: &Batch, read: &FarRead, tally: &Buffer<Tally>) -> Result<(), Error> {
        let (problem, spec, windows) = (self.problem, self.problem.spec, self.windows);
        let rows = self.most_rows(batch, false);
        if rows == 0 {
            return Ok(());
        }
        let tiles = LocalTiles::new(self.problem.dims());
        let unit = local_unit(problem.element, self.kv, self.reading.highest, self.reading.each);
        let (unit, shared) = tiles.unit(unit);
        let kernel = self.units.kernel("local", &unit)?;
        let across = rows.div_ceil(LocalTiles::ROWS);
        let past = problem.past.as_ref();
        let sinks = windows.sinks.as_ref();
        let (rule, tau) = match spec.series() {
            Series::Gauss => (1, 0.0),
            Series::Hermite { tau } => (2, *tau),
            _ => (0, 0.0),
        };
        let p = Local {
            q: problem.q,
            k: self.k,
            v: self.v,
            y: problem.y,
            sequences: windows.sequences.address(),
            chunks: self.chunks.address(),
            live: windows.live.address(),
            last: windows.last.address(),
            g: address(windows.g.as_ref()),
            num: read.num.address(),
            den: read.den.address(),
            marks: marks(past),
            reach: address(windows.reach.as_ref()),
            reach_before: past.map_or(0, |past| past.arrays.reaches),
            sink_keys: address(sinks.map(|sinks| &sinks.keys)),
            sink_values: address(sinks.map(|sinks| &sinks.values)),
            sink_live: address(sinks.map(|sinks| &sinks.live)),
            sink_last: address(sinks.map(|sinks| &sinks.last)),
            sink_g: address(sinks.and_then(|sinks| sinks.g.as_ref())),
            coefficients: self.reading.coefficients.address(),
            plane_of: self.reading.plane_of.address(),
            tally: tally.address(),
            works: windows.works as i64,
            first_row: batch.rows.start as i64,
            rows: batch.rows.len() as i64,
            block: spec.block() as i64,
            near: problem.near(),
            sinks: spec.sinks() as i64,
            sink_works: sinks.map_or(0, |sinks| sinks.works) as i64,
            most_queries: windows.host.iter().map(|s| s.queries).max().unwrap_or(0),
            tau,
            relative: 32.0 * ROUNDING,
            absolute: 4.0 * ROUNDING,
            scale: spec.scale() as f32,
            rule,
            terms: spec.terms() as i32,
            plane_count: self.reading.planes as i32,
            parts: read.parts as i32,
            tiles: across as i32,
            causal: i32::from(problem.causal),
            gathered: i32::from(self.gathered.is_some()),
            first_head: batch.heads.start as i32,
            heads: batch.head_count() as i32,
            kv_heads: problem.kv_heads as i32,
            group: problem.group as i32,
            first_chunk: batch.chunks.start as i32,
            padding: 0,
        };
        let launch = Launch {
            grid: grid([batch.chunks.len() * across, batch.head_count(), tiles.column_tiles])?,
            block: [THREADS as u32, 1, 1],
            shared: shared as u32,
        };
        // SAFETY: `Local` is the kernel's own; all arrays are the call's, which has been checked, or
        // made for it.
        unsafe { kernel.launch_on(problem.device, launch, &p) }
    }
}

/// What the reading kernel leaves: numerators and denominators by part, plane, head and query.
struct FarRead {
    num: Buffer<f32>,
    den: Buffer<f32>,
    parts: usize,
}
