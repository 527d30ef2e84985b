//! The forward pass on Hopper (`sm_90a`) for bf16: features are made in registers and multiplied by
//! `wgmma`.
//!
//! 1. Keys and values in the layouts of the matrix unit, with weights of decay (`hopper_prepare.cu`).
//! 2. Sums of each chunk (`hopper_sums.cu`), and what precedes each chunk, in bf16 with coefficients
//!    (`hopper_scan.cu`).
//! 3. Queries read the sums before their chunk, and weigh the keys since (`hopper_read.cu`).
//!
//! Sums are f32; features and what queries read are bf16, as inputs and outputs are.

mod params;
pub(crate) mod prefix;
mod program;
mod schedule;
mod units;

use std::sync::Arc;

use sata::Form;

use crate::generic::{Tally, Wish};
use crate::problem::Problem;
use crate::units::Units;
use crate::window::{StateSums, Windows, address, marks, sequences};
use crate::{Buffer, Error, Launch, Plan, RawView};
use params::{Commit, Prepare, Read, References, Scan, Sums};
use program::{Program, Sizes};
use schedule::Schedule;
use units::Shape;

/// The highest order, the largest key and the largest value that the kernels make.
const MOST_ORDER: usize = 3;
const MOST_KEY: usize = 64;
const MOST_VALUE: usize = 71;
/// Queries of a sequence below which a call is left to other kernels.
const LEAST_QUERIES: usize = 64;
/// Blocks of a launch in y and z at most.
const MOST_BLOCKS: usize = 65_535;
/// Tokens of a window at most.
const MOST_TOKENS: usize = 1 << 30;
const PREPARE_THREADS: u32 = 128;
const SCAN_THREADS: usize = 128;

/// Whether these kernels compute a problem.
pub(crate) fn serves(problem: &Problem<'_>) -> bool {
    let spec = problem.spec;
    let (d_key, d_value) = (spec.d_key(), spec.d_value());
    let (properties, orders) = (problem.device.properties(), problem.orders());
    let aligned = |x: &RawView, by: i64| {
        x.address.is_multiple_of(2 * by as u64)
            && [x.batch, x.head, x.token].iter().all(|stride| stride % by == 0)
    };
    let value = if d_value % 8 == 0 { 8 } else { 1 };
    let out = if d_value % 2 == 0 { 2 } else { 1 };
    // Registers of the summing kernel hold so many columns.
    let fits = d_key > 8 || d_value < 24;
    properties.capability == (9, 0)
        && problem.element == "bf16"
        && d_key % 8 == 0
        && d_key <= MOST_KEY
        && d_value <= MOST_VALUE
        && fits
        && spec.coefficients().is_some()
        && orders == spec.orders()
        && orders.iter().all(|&order| order <= MOST_ORDER)
        && aligned(&problem.q, 8)
        && aligned(&problem.k, 8)
        && aligned(&problem.v, value)
        && aligned(&problem.y, out)
        && problem.sequences.iter().any(|s| s.queries >= LEAST_QUERIES)
        && problem.sequences.iter().all(|s| s.tokens() < MOST_TOKENS && s.queries < MOST_TOKENS)
        && problem.sequences.len() <= MOST_BLOCKS
        && problem.kv_heads * problem.group <= MOST_BLOCKS
        && spec.block() < MOST_TOKENS
        && problem.past.as_ref().is_none_or(|past| !past.is_bf16)
        && (problem.causal || (problem.past.is_none() && !problem.fades() && spec.sinks() == 0))
}

/// Computes a problem; what it finds in denominators is added to `tally`.
pub(crate) fn run(
    plan: &Plan,
    problem: &Problem<'_>,
    wish: Wish,
    tally: &Buffer<Tally>,
) -> Result<(), Error> {
    let spec = problem.spec;
    let units = plan.once("units", || Ok(Units::new(plan.device())))?;
    let orders = spec.orders();
    // A query that is not there itself may see nothing but what has faded, to which weights are then relative.
    let hidden = problem.fades() && problem.mask.is_some();
    let shape = Shape {
        sizes: Sizes::new(spec.d_key(), spec.d_value(), &orders),
        terms: spec.terms(),
        fades: problem.fades(),
        near: problem.near() >= 0 || spec.sinks() > 0 || hidden,
    };
    // The same for calls with a mask and without.
    let tables = plan.once("hopper", || Tables::new(plan, &shape))?;
    let host = sequences(problem);
    // Unless tokens may be missing or fade, all that is to know of them is how many there are.
    let plain =
        problem.past.is_none() && problem.mask.is_none() && !problem.fades() && spec.sinks() == 0;
    let (windows, gathered);
    if plain {
        (windows, gathered) = (None, None);
    } else {
        let made = Windows::lean(&units, problem, host.clone(), problem.past.is_some())?;
        gathered = match made.has_open() {
            true => Some(made.gather::<half::bf16>(&units, problem, problem.element)?),
            false => None,
        };
        windows = Some(made);
    }
    let wish = if problem.causal { wish } else { Wish { form: Some(Form::State), ..wish } };
    let schedule = Schedule::new(problem, &shape, &host, wish, gathered.is_some());
    let works = windows.as_ref().map_or(0, |windows| windows.works);
    let [k, v] = match &gathered {
        Some(gathered) => gathered.views(works, [spec.d_key(), spec.d_value()]),
        None => [problem.k, problem.v],
    };
    let work = Work {
        problem,
        units: &units,
        shape,
        tables: &tables,
        windows: windows.as_ref(),
        k,
        v,
        sequences: units.table(&schedule.sequences)?,
        tile_items: units.table(&schedule.tile_items)?,
        chunk_items: units.table(&schedule.chunk_items)?,
        row_items: units.table(&schedule.row_items)?,
        most_queries: host.iter().map(|s| s.queries).max().unwrap_or(0),
        schedule: &schedule,
    };
    for heads in &schedule.batches {
        work.heads(heads.clone(), tally)?;
    }
    match &windows {
        Some(windows) => windows.settle(&units, problem),
        None => Ok(()),
    }
}

/// Tables of a plan.
#[derive(Debug)]
struct Tables {
    coefficients: Buffer<f32>,
    places: Buffer<i32>,
    map: Buffer<i32>,
    /// a_p · scale^p by order.
    a: [f32; 8],
}

impl Tables {
    fn new(plan: &Plan, shape: &Shape) -> Result<Self, Error> {
        let spec = plan.spec();
        let coefficients = spec.coefficients().unwrap_or_default();
        let factor = |(p, a): (usize, &f64)| a * spec.scale().powi(p as i32);
        let factors: Vec<f64> = coefficients.iter().enumerate().map(factor).collect();
        let basis = plan.basis()?;
        let program = Program::new(&shape.sizes, &basis, &factors);
        let mut a = [0.0; 8];
        for (to, &from) in a.iter_mut().zip(&factors) {
            *to = from as f32;
        }
        Ok(Tables {
            coefficients: Buffer::from_slice(plan.device(), &program.coefficients)?,
            places: Buffer::from_slice(plan.device(), &program.places)?,
            map: Buffer::from_slice(plan.device(), &program.map)?,
            a,
        })
    }
}

/// What the batches of one call share.
struct Work<'w> {
    problem: &'w Problem<'w>,
    units: &'w Units,
    shape: Shape,
    tables: &'w Tables,
    schedule: &'w Schedule,
    windows: Option<&'w Windows>,
    k: RawView,
    v: RawView,
    sequences: Arc<Buffer<params::Sequence>>,
    tile_items: Arc<Buffer<params::Item>>,
    chunk_items: Arc<Buffer<params::Chunk>>,
    row_items: Arc<Buffer<params::Item>>,
    most_queries: i64,
}

impl Work<'_> {
    /// The heads of one batch.
    fn heads(&self, heads: std::ops::Range<usize>, tally: &Buffer<Tally>) -> Result<(), Error> {
        let (device, schedule, shape) = (self.problem.device, self.schedule, &self.shape);
        let count = heads.len();
        let past = self.problem.past.as_ref();
        let chunk_places = count * schedule.chunks;
        let sums = !schedule.chunk_items.is_empty();
        let initial = past.is_some();
        let elements = shape.sizes.elements();
        let tiles = Buffer::<u8>::uninit(device, count * schedule.tiles * shape.tile_bytes())?;
        let bytes = if sums { count * schedule.tiles * shape.sum_tile_bytes() } else { 0 };
        let sum_tiles = Buffer::<u8>::uninit(device, bytes)?;
        let places = |wanted: bool| if wanted { chunk_places * elements } else { 0 };
        let prefix = schedule.summing.prefix;
        let chunk_sums = Buffer::<f32>::uninit(device, places(sums && !prefix))?;
        let far = Buffer::<u16>::uninit(device, places(sums || initial))?;
        let total = match past {
            Some(_) => {
                Some(Buffer::<f32>::uninit(device, count * self.sequences.len() * elements)?)
            }
            None => None,
        };
        let references = match shape.fades {
            true => Some(Buffer::<f64>::uninit(device, chunk_places)?),
            false => None,
        };
        if let Some(references) = &references {
            self.find_references(&heads, references)?;
        }
        self.prepare(&heads, references.as_ref(), &tiles, &sum_tiles)?;
        let state = StateSums::of(past);
        if sums {
            self.sum(count, &sum_tiles, &chunk_sums, &far, references.as_ref())?;
        }
        if (sums && !prefix) || initial {
            let p = Scan {
                sums: chunk_sums.address(),
                far: far.address(),
                total: address(total.as_ref()),
                coefficients: self.tables.coefficients.address(),
                places: self.tables.places.address(),
                references: address(references.as_ref()),
                marks: marks(past),
                state,
                sequences: self.sequences.address(),
                features: self.tables.map.len() as i64,
                chunk_count: schedule.chunks as i32,
                sequence_count: self.sequences.len() as i32,
                first_head: heads.start as i32,
                kv_heads: self.problem.kv_heads as i32,
            };
            let threads = shape.sizes.blocks() * shape.sizes.columns();
            let grid = [threads.div_ceil(SCAN_THREADS), count, self.sequences.len()];
            let kernel = self.units.kernel("hopper_scan", &shape.scan())?;
            // SAFETY: `Scan` is the kernel's own (its size is checked); sums and far have a place for
            // each chunk, head and element; the state's arrays are those of the checked call.
            unsafe { kernel.launch_on(device, launch(grid, SCAN_THREADS, 0), &p) }?;
        }
        if !schedule.row_items.is_empty() {
            self.read(&heads, references.as_ref(), &tiles, &far, initial, tally)?;
        }
        let Some(total) = &total else {
            return Ok(());
        };
        let p = Commit {
            total: total.address(),
            map: self.tables.map.address(),
            references: address(references.as_ref()),
            marks: marks(past),
            state,
            sequences: self.sequences.address(),
            features: self.tables.map.len() as i64,
            chunk_count: schedule.chunks as i32,
            sequence_count: self.sequences.len() as i32,
            first_head: heads.start as i32,
            kv_heads: self.problem.kv_heads as i32,
        };
        let threads = self.tables.map.len() * (shape.sizes.d_value + 1);
        let grid = [threads.div_ceil(SCAN_THREADS), count, self.sequences.len()];
        let kernel = self.units.kernel("hopper_commit", &shape.scan())?;
        // SAFETY: `Commit` is the kernel's own; the state's arrays are those of the checked call.
        unsafe { kernel.launch_on(device, launch(grid, SCAN_THREADS, 0), &p) }
    }

    fn find_references(
        &self,
        heads: &std::ops::Range<usize>,
        references: &Buffer<f64>,
    ) -> Result<(), Error> {
        let windows = self.windows;
        let p = References {
            g: windows.map_or(0, |windows| address(windows.g.as_ref())),
            last: windows.map_or(0, |windows| windows.living()[1]),
            marks: marks(self.problem.past.as_ref()),
            references: references.address(),
            sequences: self.sequences.address(),
            works: windows.map_or(0, |windows| windows.works) as i64,
            sequence_count: self.sequences.len() as i32,
            chunk_count: self.schedule.chunks as i32,
            chunk_tokens: self.schedule.chunk_tokens as i32,
            first_head: heads.start as i32,
            kv_heads: self.problem.kv_heads as i32,
            unused: 0,
        };
        let kernel = self.units.kernel("hopper_references", &self.shape.prepare())?;
        let launch = launch([self.sequences.len(), heads.len(), 1], PREPARE_THREADS as usize, 0);
        // SAFETY: `References` is the kernel's own; there is a place for each chunk and head.
        unsafe { kernel.launch_on(self.problem.device, launch, &p) }
    }

    fn prepare(
        &self,
        heads: &std::ops::Range<usize>,
        references: Option<&Buffer<f64>>,
        tiles: &Buffer<u8>,
        sum_tiles: &Buffer<u8>,
    ) -> Result<(), Error> {
        if self.schedule.tile_items.is_empty() {
            return Ok(());
        }
        let windows = self.windows;
        let sinks = windows.and_then(|windows| windows.sinks.as_ref());
        let p = Prepare {
            k: self.k,
            v: self.v,
            g: windows.map_or(0, |windows| address(windows.g.as_ref())),
            live: windows.map_or(0, |windows| windows.living()[0]),
            sink_keys: address(sinks.map(|sinks| &sinks.keys)),
            sink_values: address(sinks.map(|sinks| &sinks.values)),
            sink_live: address(sinks.map(|sinks| &sinks.live)),
            sink_g: address(sinks.and_then(|sinks| sinks.g.as_ref())),
            references: address(references),
            tiles: tiles.address(),
            sum_tiles: sum_tiles.address(),
            sequences: self.sequences.address(),
            items: self.tile_items.address(),
            works: windows.map_or(0, |windows| windows.works) as i64,
            sink_works: sinks.map_or(0, |sinks| sinks.works) as i64,
            tile_count: self.schedule.tiles as i32,
            chunk_count: self.schedule.chunks as i32,
            chunk_tokens: self.schedule.chunk_tokens as i32,
            first_head: heads.start as i32,
        };
        let kernel = self.units.kernel("hopper_prepare", &self.shape.prepare())?;
        let grid = [self.tile_items.len(), heads.len(), 1];
        // SAFETY: `Prepare` is the kernel's own; records have a place for each tile and head; keys,
        // values and what is known of tokens are the checked call's.
        unsafe {
            kernel.launch_on(self.problem.device, launch(grid, PREPARE_THREADS as usize, 0), &p)
        }
    }

    fn sum(
        &self,
        heads: usize,
        tiles: &Buffer<u8>,
        sums: &Buffer<f32>,
        far: &Buffer<u16>,
        references: Option<&Buffer<f64>>,
    ) -> Result<(), Error> {
        let (device, summing) = (self.problem.device, &self.schedule.summing);
        let items = self.chunk_items.len();
        let most = device.properties().multiprocessors as usize;
        let (team, teams) = summing.teams(heads, most);
        let grid = match summing.prefix {
            true => [team * teams, 1, 1],
            false => [items * summing.blocks, heads, 1],
        };
        let parts = if summing.prefix { grid[0] } else { 0 };
        let left = Buffer::<u8>::uninit(device, parts * summing.kept)?;
        let ready = Buffer::<u32>::zeroed(device, parts * summing.flags())?;
        let p = Sums {
            tiles: tiles.address(),
            sums: sums.address(),
            far: far.address(),
            coefficients: self.tables.coefficients.address(),
            references: address(references),
            left: left.address(),
            ready: ready.address(),
            items: self.chunk_items.address(),
            item_count: items as i32,
            heads: heads as i32,
            tile_count: self.schedule.tiles as i32,
            chunk_count: self.schedule.chunks as i32,
            team: team as i32,
            unused: 0,
        };
        let kernel = self.units.kernel("hopper_sums", &summing.unit())?;
        let launch = launch(grid, summing.threads(), summing.shared);
        // SAFETY: `SumChunks` of the source; records, sums and far have places for each chunk and
        // head, the rest for each block of the launch.
        unsafe { kernel.launch_on(device, launch, &p) }
    }

    fn read(
        &self,
        heads: &std::ops::Range<usize>,
        references: Option<&Buffer<f64>>,
        tiles: &Buffer<u8>,
        far: &Buffer<u16>,
        initial: bool,
        tally: &Buffer<Tally>,
    ) -> Result<(), Error> {
        let (problem, schedule, shape) = (self.problem, self.schedule, &self.shape);
        let p = Read {
            q: problem.q,
            y: problem.y,
            far: far.address(),
            tiles: tiles.address(),
            sequences: self.sequences.address(),
            items: self.row_items.address(),
            references: address(references),
            last: self.windows.map_or(0, |windows| windows.living()[1]),
            tally: tally.address(),
            most_queries: self.most_queries,
            tile_count: schedule.tiles as i32,
            chunk_count: schedule.chunks as i32,
            chunk_tokens: schedule.chunk_tokens as i32,
            group: problem.group as i32,
            first_head: heads.start as i32,
            heads: (problem.kv_heads * problem.group) as i32,
            block: problem.spec.block() as i32,
            near_blocks: problem.near() as i32,
            full: i32::from(!problem.causal),
            initial: i32::from(initial),
            exp2_scale: (problem.spec.scale() * std::f64::consts::LOG2_E) as f32,
            item_count: self.row_items.len() as i32,
            head_count: (heads.len() * problem.group) as i32,
            unused: 0,
            a: self.tables.a,
        };
        let kernel = self.units.kernel("hopper_read", &shape.read())?;
        let most = problem.device.properties().multiprocessors as usize;
        let (items, query_heads) = (self.row_items.len(), heads.len() * problem.group);
        let grid = match shape.read_persists() {
            true => [most.min(items * query_heads), 1, 1],
            false => [items, query_heads, 1],
        };
        let launch = launch(grid, shape.read_threads(), shape.read_shared());
        // SAFETY: `ReadQueries` of the source; q and y are the checked call's, the rest has been made
        // for these heads.
        unsafe { kernel.launch_on(problem.device, launch, &p) }
    }
}

fn launch(grid: [usize; 3], threads: usize, shared: usize) -> Launch {
    Launch { grid: grid.map(|n| n as u32), block: [threads as u32, 1, 1], shared: shared as u32 }
}
