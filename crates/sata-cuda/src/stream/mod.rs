//! The forward pass of small heads, bf16, on matrix units of `sm_80` and later: a sequence, or a
//! segment of it, is walked over once, with the sums in registers all the way.
//!
//! 1. Where a sequence is cut into segments: their sums (`stream_sums.cu`), and a scan over them.
//! 2. Each segment: queries read the sums before their chunk, keys since are weighed one by one,
//!    the chunk's keys are added (`stream_read.cu`).
//!
//! Sums are f32; features and what queries read are bf16, as inputs and outputs are.

mod params;
mod program;
mod schedule;
mod units;

use sata::{Form, Near};

use crate::generic::{Tally, Wish};
use crate::problem::Problem;
use crate::units::Units;
use crate::window::{Windows, address, sequences};
use crate::{Buffer, Error, Launch, Plan, RawView};
use params::{Chains, Stream};
use program::Program;
use schedule::Schedule;
use units::Shape;

const MOST_ORDER: usize = 4;
/// The longest sequence.
const MOST_TOKENS: usize = 1 << 30;
/// Sequences, and key/value heads, at most.
const MOST_BLOCKS: usize = 65_535;
/// Keys from which on blocks that are near are left to other kernels: they would be read for every
/// chunk.
const MOST_NEAR: usize = 1024;
const SCAN_THREADS: usize = 256;

/// Whether these kernels compute a problem.
pub(crate) fn serves(problem: &Problem<'_>, wish: Wish) -> bool {
    let spec = problem.spec;
    let (d_key, d_value) = (spec.d_key(), spec.d_value());
    let aligned = |x: &RawView, by: i64| {
        x.address.is_multiple_of(2 * by as u64)
            && [x.batch, x.head, x.token].iter().all(|stride| stride % by == 0)
    };
    let near = match spec.near() {
        Near::None => true,
        Near::Blocks(n) => {
            spec.block() % 16 == 0 && (n + 1).saturating_mul(spec.block()) <= MOST_NEAR
        }
    };
    problem.device.properties().capability >= (8, 0)
        && problem.element == "bf16"
        && problem.causal
        && problem.past.is_none()
        && problem.mask.is_none()
        && spec.sinks() == 0
        && [8, 16].contains(&d_key)
        && d_value % 8 == 0
        && d_value <= 2 * d_key
        && spec.coefficients().is_some()
        && spec.orders().iter().all(|&order| order <= MOST_ORDER)
        && near
        && aligned(&problem.q, 8)
        && aligned(&problem.k, 8)
        && aligned(&problem.v, 8)
        && aligned(&problem.y, 2)
        && wish.form != Some(Form::Direct)
        && problem.sequences.iter().all(|s| s.queries < MOST_TOKENS)
        && problem.sequences.len() <= MOST_BLOCKS
        && problem.kv_heads <= MOST_BLOCKS
        && shape(problem).fits()
}

fn shape(problem: &Problem<'_>) -> Shape {
    let spec = problem.spec;
    Shape {
        d_key: spec.d_key(),
        d_value: spec.d_value(),
        terms: spec.terms(),
        fades: problem.fades(),
        near: problem.near() >= 0,
        program: Program::new(spec.d_key(), &spec.orders()),
    }
}

/// Tables of a plan.
#[derive(Debug)]
struct Tables {
    shape: Shape,
    coefficients: Buffer<f32>,
    /// a_p · scale^p by order.
    a: [f32; 8],
}

impl Tables {
    fn new(plan: &Plan, problem: &Problem<'_>) -> Result<Self, Error> {
        let spec = plan.spec();
        let shape = shape(problem);
        let coefficients = spec.coefficients().unwrap_or_default();
        let factor = |(p, a): (usize, &f64)| a * spec.scale().powi(p as i32);
        let factors: Vec<f64> = coefficients.iter().enumerate().map(factor).collect();
        let table = shape.program.coefficients(&*plan.basis()?, &factors);
        let mut a = [0.0; 8];
        for (to, &from) in a.iter_mut().zip(&factors) {
            *to = from as f32;
        }
        Ok(Tables { coefficients: Buffer::from_slice(plan.device(), &table)?, a, shape })
    }
}

/// Computes a problem; what it finds in denominators is added to `tally`.
pub(crate) fn run(
    plan: &Plan,
    problem: &Problem<'_>,
    wish: Wish,
    tally: &Buffer<Tally>,
) -> Result<(), Error> {
    let (device, spec) = (problem.device, problem.spec);
    let units = plan.once("units", || Ok(Units::new(plan.device())))?;
    let tables = plan.once("stream", || Tables::new(plan, problem))?;
    let shape = &tables.shape;
    let host = sequences(problem);
    let works: Vec<i64> = host.iter().map(|s| s.work).collect();
    let windows = match problem.fades() {
        true => Some(Windows::new(&units, problem, host, false)?),
        false => None,
    };
    let schedule = Schedule::new(problem, shape, &works, wish.chunk);
    if schedule.segments.is_empty() {
        return Ok(());
    }
    let sequences = Buffer::from_slice(device, &schedule.sequences)?;
    let segments = Buffer::from_slice(device, &schedule.segments)?;
    let summed = Buffer::from_slice(device, &schedule.summed)?;
    let slots = schedule.ends.len();
    let sums = Buffer::<f32>::uninit(device, slots * problem.kv_heads * shape.elements())?;
    let p = Stream {
        q: problem.q,
        k: problem.k,
        v: problem.v,
        y: problem.y,
        g: windows.as_ref().map_or(0, |windows| address(windows.g.as_ref())),
        sequences: sequences.address(),
        segments: summed.address(),
        sums: sums.address(),
        coefficients: tables.coefficients.address(),
        tally: tally.address(),
        works: windows.as_ref().map_or(0, |windows| windows.works) as i64,
        most_queries: problem.sequences.iter().map(|s| s.queries).max().unwrap_or(0) as i64,
        segment_count: schedule.summed.len() as i32,
        kv_heads: problem.kv_heads as i32,
        group: problem.group as i32,
        block: spec.block() as i32,
        near: problem.near() as i32,
        exp2_scale: (spec.scale() * std::f64::consts::LOG2_E) as f32,
        a: tables.a,
    };
    let launch = |segments: usize| {
        let blocks = (segments * problem.kv_heads).div_ceil(shape.units());
        self::launch([blocks, 1, 1], shape.threads(), shape.shared())
    };
    if !schedule.summed.is_empty() {
        let kernel = units.kernel("stream_sums", &shape.sums())?;
        // SAFETY: `Stream` is the kernel's own (its size is checked); sums have a place for each slot
        // and head; keys, values and what is known of tokens are the checked call's.
        unsafe { kernel.launch_on(device, launch(schedule.summed.len()), &p) }?;
        let chains = Buffer::from_slice(device, &schedule.chains)?;
        let ends = Buffer::from_slice(device, &schedule.ends)?;
        let scan = Chains {
            sums: sums.address(),
            g: p.g,
            sequences: sequences.address(),
            chains: chains.address(),
            ends: ends.address(),
            works: p.works,
            kv_heads: p.kv_heads,
            unused: 0,
        };
        let grid =
            [shape.elements().div_ceil(SCAN_THREADS), problem.kv_heads, schedule.chains.len()];
        let kernel = units.kernel("stream_scan", &shape.sums())?;
        // SAFETY: as above, with `Chains`.
        unsafe { kernel.launch_on(device, self::launch(grid, SCAN_THREADS, 0), &scan) }?;
    }
    let p =
        Stream { segments: segments.address(), segment_count: schedule.segments.len() as i32, ..p };
    let kernel = units.kernel("stream_read", &shape.read())?;
    // SAFETY: as above; q and y are the checked call's.
    unsafe { kernel.launch_on(device, launch(schedule.segments.len()), &p) }
}

fn launch(grid: [usize; 3], threads: usize, shared: usize) -> Launch {
    Launch { grid: grid.map(|n| n as u32), block: [threads as u32, 1, 1], shared: shared as u32 }
}
