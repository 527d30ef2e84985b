//! The forward pass of small heads, bf16, on matrix units of `sm_80` and later: a sequence, or a
//! segment of it, is walked over once, with the sums in registers all the way.
//!
//! 1. Where a sequence is cut into segments: their sums (`stream_sums.cu`), and a scan over them.
//! 2. Each segment: queries read the sums before their chunk, keys since are weighed one by one,
//!    the chunk's keys are added (`stream_read.cu`).
//!
//! Keys of 32 have kernels of their own, for Hopper's `wgmma` (`stream_wide_sums.cu`,
//! `stream_wide_read.cu`): orders up to 2. So have keys of 16 with order 3
//! (`stream_sixteen_sums.cu`, `stream_sixteen_read.cu`).
//!
//! Sums are f32; features and what queries read are bf16, as inputs and outputs are.

mod params;
mod program;
mod schedule;
mod units;

use std::sync::Arc;

use sata::{Form, Near};

use crate::generic::{Tally, Wish};
use crate::problem::Problem;
use crate::units::Units;
use crate::window::{Windows, address, sequences};
use crate::{Buffer, Device, Error, Kernel, Launch, Plan, RawView};
use params::{Chains, Stream};
use program::{Program, multiplicities};
use schedule::Schedule;
pub(crate) use schedule::cut;
use units::{Blocks, Shape, WIDE};

const MOST_ORDER: usize = 4;
/// The same, and values at most, of the keys that `wgmma` is for; blocks are pieces of so many tokens.
const WIDE_ORDER: usize = 2;
const WIDE_VALUE: usize = 32;
const WIDE_PIECE: usize = 64;
/// The longest sequence.
const MOST_TOKENS: usize = 1 << 30;
/// Sequences, and key/value heads, at most.
const MOST_BLOCKS: usize = 65_535;
/// Keys from which on blocks that are near are left to other kernels: they would be read for every
/// chunk.
const MOST_NEAR: usize = 1024;
const SCAN_THREADS: usize = 256;
/// Queries of a short sequence at most, and where `stream_sixteen.cuh` is the other choice.
const SHORT: usize = 1024;
const SHORT_OF_SIXTEEN: usize = 512;
/// Bytes that are kept between launches at most, unless one head needs more.
const WORK_BYTES: usize = 1 << 30;

/// Whether these kernels compute a problem.
pub(crate) fn serves(problem: &Problem<'_>, wish: Wish) -> bool {
    let spec = problem.spec;
    let (d_key, d_value) = (spec.d_key(), spec.d_value());
    let aligned = |x: &RawView, by: i64| {
        x.address.is_multiple_of(2 * by as u64)
            && [x.batch, x.head, x.token].iter().all(|stride| stride % by == 0)
    };
    let wide = d_key == WIDE;
    let (most_order, most_value) =
        if wide { (WIDE_ORDER, WIDE_VALUE) } else { (MOST_ORDER, 2 * d_key) };
    let near = match spec.near() {
        Near::None => true,
        Near::Blocks(n) => {
            spec.block().is_multiple_of(if wide { WIDE_PIECE } else { 16 })
                && (n + 1).saturating_mul(spec.block()) <= MOST_NEAR
        }
    };
    let capability = problem.device.properties().capability;
    (if wide { capability == (9, 0) } else { capability >= (8, 0) })
        && problem.element == "bf16"
        && problem.causal
        && problem.past.is_none()
        && problem.mask.is_none()
        && spec.sinks() == 0
        && [8, 16, WIDE].contains(&d_key)
        && d_value % 8 == 0
        && d_value <= most_value
        && spec.coefficients().is_some()
        && spec.orders().iter().all(|&order| order <= most_order)
        && near
        && aligned(&problem.q, 8)
        && aligned(&problem.k, 8)
        && aligned(&problem.v, 8)
        && aligned(&problem.y, 2)
        && wish.form != Some(Form::Direct)
        && problem.sequences.iter().all(|s| s.queries < MOST_TOKENS)
        && problem.sequences.len() <= MOST_BLOCKS
        && problem.kv_heads <= MOST_BLOCKS
}

/// Whether sequences are so short that it is faster to weigh all keys by the polynomial, which other
/// kernels do better (measured on an H100 at d = 16, P = 4).
pub(crate) fn is_short(problem: &Problem<'_>, wish: Wish) -> bool {
    let spec = problem.spec;
    let short = if is_sixteen(problem) { SHORT_OF_SIXTEEN } else { SHORT };
    spec.d_key() == 16
        && spec.near() == Near::None
        && spec.orders().contains(&3)
        && wish.form.is_none()
        && wish.chunk.is_none()
        && problem.sequences.iter().all(|s| s.queries <= short)
}

/// Whether `stream_sixteen.cuh` computes a problem that these kernels serve.
fn is_sixteen(problem: &Problem<'_>) -> bool {
    let spec = problem.spec;
    let orders = spec.orders();
    problem.device.properties().capability == (9, 0)
        && spec.d_key() == 16
        && spec.d_value() == 16
        && orders.iter().max() == Some(&3)
        && (spec.near() == Near::None || spec.block().is_multiple_of(WIDE_PIECE))
}

fn shape(problem: &Problem<'_>) -> Shape {
    let spec = problem.spec;
    let sixteen = is_sixteen(problem);
    Shape {
        d_key: spec.d_key(),
        d_value: spec.d_value(),
        terms: spec.terms(),
        fades: problem.fades(),
        near: problem.near() >= 0,
        program: match spec.d_key() {
            WIDE => Program::wide(),
            _ if sixteen => Program::sixteen(),
            d_key => Program::new(d_key, &spec.orders()),
        },
        takes: false,
        gives: false,
        sixteen,
    }
}

/// Tables of a plan.
#[derive(Debug)]
struct Tables {
    parts: Vec<Part>,
    /// a_p · scale^p by order.
    a: [f32; 8],
}

/// The features of one launch.
#[derive(Debug)]
struct Part {
    shape: Shape,
    coefficients: Buffer<f32>,
    sums: Kernel,
    scan: Kernel,
    read: Kernel,
}

impl Tables {
    fn new(plan: &Plan, units: &Units, problem: &Problem<'_>) -> Result<Self, Error> {
        let spec = plan.spec();
        let coefficients = spec.coefficients().unwrap_or_default();
        let factor = |(p, a): (usize, &f64)| a * spec.scale().powi(p as i32);
        let factors: Vec<f64> = coefficients.iter().enumerate().map(factor).collect();
        let mut left = multiplicities(&*plan.basis()?);
        let part = |shape: Shape| {
            let (sums, read) = match &shape {
                shape if shape.is_wide() => ("stream_wide_sums", "stream_wide_read"),
                shape if shape.sixteen => ("stream_sixteen_sums", "stream_sixteen_read"),
                _ => ("stream_sums", "stream_read"),
            };
            let table = shape.program.coefficients(&mut left, &factors);
            Ok(Part {
                coefficients: Buffer::from_slice(plan.device(), &table)?,
                sums: units.kernel(sums, &shape.sums())?,
                scan: units.kernel("stream_scan", &shape.sums())?,
                read: units.kernel(read, &shape.read())?,
                shape,
            })
        };
        let parts = shape(problem).parts().into_iter().map(part).collect::<Result<_, Error>>()?;
        let mut a = [0.0; 8];
        for (to, &from) in a.iter_mut().zip(&factors) {
            *to = from as f32;
        }
        Ok(Tables { parts, a })
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
    let tables = plan.once("stream", || Tables::new(plan, &units, problem))?;
    let host = sequences(problem);
    let shape = &tables.parts[0].shape;
    let registers = tables.parts[0].read.properties().registers;
    let gpu = device.properties();
    let residents = shape.residents(registers, gpu.shared_per_block as usize);
    let residents = residents * gpu.multiprocessors as usize;
    // Blocks that sum are as many as those that read.
    let summing = residents / shape.read_blocks().units * shape.sums_blocks().units;
    let residents = [summing, residents];
    let schedule = Schedule::new(problem, shape, &host, wish.chunk, residents);
    if schedule.segments.is_empty() {
        return Ok(());
    }
    let rows: usize = host.iter().map(|s| s.queries as usize).sum();
    let windows = match problem.fades() {
        true => Some(Windows::lean(&units, problem, host, false)?),
        false => None,
    };
    let work = Work {
        schedule: &schedule,
        sequences: units.table(&schedule.sequences)?,
        segments: units.table(&schedule.segments)?,
        summed: units.table(&schedule.summed)?,
        chains: units.table(&schedule.chains)?,
        ends: units.table(&schedule.ends)?,
    };
    let p = Stream {
        q: problem.q,
        k: problem.k,
        v: problem.v,
        y: problem.y,
        g: windows.as_ref().map_or(0, |windows| address(windows.g.as_ref())),
        sequences: work.sequences.address(),
        segments: 0,
        sums: 0,
        coefficients: 0,
        partial: 0,
        tally: tally.address(),
        works: windows.as_ref().map_or(0, |windows| windows.works) as i64,
        rows: rows as i64,
        most_queries: problem.sequences.iter().map(|s| s.queries).max().unwrap_or(0) as i64,
        segment_count: 0,
        kv_heads: problem.kv_heads as i32,
        group: problem.group as i32,
        block: spec.block() as i32,
        near: problem.near() as i32,
        first_head: 0,
        heads: 0,
        exp2_scale: (spec.scale() * std::f64::consts::LOG2_E) as f32,
        a: tables.a,
    };
    // Heads at once, by what is kept between launches.
    let columns = shape.columns();
    let partial = if tables.parts.len() > 1 { problem.group * rows * columns } else { 0 };
    let most = wish.work_bytes.unwrap_or(WORK_BYTES);
    let at_once = (most / (4 * partial).max(1)).clamp(1, problem.kv_heads);
    for first in (0..problem.kv_heads).step_by(at_once) {
        let heads = at_once.min(problem.kv_heads - first);
        let partial = Buffer::<f32>::uninit(device, heads * partial)?;
        let p = Stream {
            partial: partial.address(),
            first_head: first as i32,
            heads: heads as i32,
            ..p
        };
        for part in &tables.parts {
            work.part(device, part, p)?;
        }
    }
    Ok(())
}

/// What the launches of one call share.
struct Work<'w> {
    schedule: &'w Schedule,
    sequences: Arc<Buffer<params::Sequence>>,
    segments: Arc<Buffer<params::Segment>>,
    summed: Arc<Buffer<params::Segment>>,
    chains: Arc<Buffer<params::Chain>>,
    ends: Arc<Buffer<i32>>,
}

impl Work<'_> {
    /// The features of one part, for the heads that `p` names.
    fn part(&self, device: &Device, part: &Part, p: Stream) -> Result<(), Error> {
        let (shape, schedule, heads) = (&part.shape, self.schedule, p.heads as usize);
        let sums = schedule.ends.len() * heads * shape.elements();
        let sums = Buffer::<f32>::uninit(device, sums)?;
        let p = Stream { sums: sums.address(), coefficients: part.coefficients.address(), ..p };
        let over = |segments: &Buffer<params::Segment>| Stream {
            segments: segments.address(),
            segment_count: segments.len() as i32,
            ..p
        };
        let launch = |segments: &Buffer<params::Segment>, blocks: Blocks| {
            let count = (segments.len() * heads).div_ceil(blocks.units);
            self::launch([count, 1, 1], blocks.threads, blocks.shared)
        };
        if !self.summed.is_empty() {
            let blocks = launch(&self.summed, shape.sums_blocks());
            // SAFETY: `Stream` is the kernel's own (its size is checked); sums have a place for each
            // slot and head; keys, values and what is known of tokens are the checked call's.
            unsafe { part.sums.launch_on(device, blocks, &over(&self.summed)) }?;
            let scan = Chains {
                sums: p.sums,
                g: p.g,
                sequences: p.sequences,
                chains: self.chains.address(),
                ends: self.ends.address(),
                works: p.works,
                first_head: p.first_head,
                heads: p.heads,
            };
            let grid = [shape.elements().div_ceil(SCAN_THREADS), heads, schedule.chains.len()];
            // SAFETY: as above, with `Chains`.
            unsafe { part.scan.launch_on(device, self::launch(grid, SCAN_THREADS, 0), &scan) }?;
        }
        let blocks = launch(&self.segments, shape.read_blocks());
        // SAFETY: as above; q and y are the checked call's, and between launches there is a place
        // for each row of the heads.
        unsafe { part.read.launch_on(device, blocks, &over(&self.segments)) }
    }
}

fn launch(grid: [usize; 3], threads: usize, shared: usize) -> Launch {
    Launch { grid: grid.map(|n| n as u32), block: [threads as u32, 1, 1], shared: shared as u32 }
}
