//! The backward pass of causal attention by `mma.sync` (`sm_80` and later), for bf16, keys of 8 or 16
//! elements and values of up to 16: blocks of threads walk over sequences with all sums of a head in
//! registers, so that nothing but the call's own tensors touches memory (`stream_backward.cuh`).
//!
//! Long sequences are cut, so that all multiprocessors have work: then sums of what is before
//! (after) each cut come first.
//!
//! Sums are f32; features and what reads sums are bf16, as inputs and outputs are.

mod params;
mod units;

use sata::Decay;

use super::Wanted;
use crate::problem::Problem;
use crate::stream::cut;
use crate::units::{MOST_BLOCKS, Units, grid};
use crate::window::{Windows, address, sequences};
use crate::{Buffer, Error, Launch, Plan, RawView, Unit};
use params::{Item, Logs, OF_KEYS, OF_QUERIES, Range, Scan, Walk};
use units::Shape;

/// The highest order and the largest value that the kernels make.
const MOST_ORDER: usize = 3;
const MOST_VALUE: usize = 16;
/// Tokens of a call at most.
const MOST_TOKENS: usize = 1 << 30;
/// Chunks of a sequence below which it is not cut.
const LEAST_CHUNKS: usize = 8;
/// What summing a token costs of all that is done for one.
const SUMMING: f64 = 0.1;
/// Blocks of threads that sum, for each that may walk at once.
const PARTS: usize = 4;

/// Whether these kernels compute a call's gradients.
pub(super) fn serves(problem: &Problem<'_>, wanted: &Wanted<'_>) -> bool {
    let spec = problem.spec;
    let (d_key, d_value) = (spec.d_key(), spec.d_value());
    if !matches!(d_key, 8 | 16) || d_value > MOST_VALUE {
        return false;
    }
    let properties = problem.device.properties();
    let aligned = |x: &RawView, by: i64| {
        x.address.is_multiple_of(2 * by as u64)
            && [x.batch, x.head, x.token].iter().all(|stride| stride % by == 0)
    };
    let value = if d_value % 8 == 0 { 8 } else { 1 };
    let out = if d_value % 2 == 0 { 2 } else { 1 };
    let shared = properties.shared_per_block as usize;
    let shape = Shape::new(spec, problem.fades(), shared);
    let near = problem.near() >= 0;
    problem.element == "bf16"
        && (properties.capability >= (8, 0) || problem.device.is_emulated())
        && problem.causal
        && problem.past.is_none()
        && problem.mask.is_none()
        && wanted.state.is_none()
        && spec.sinks() == 0
        && spec.coefficients().is_some()
        && problem.orders() == spec.orders()
        && spec.orders().iter().all(|&order| order <= MOST_ORDER)
        && (!near || (spec.block().is_multiple_of(16) && spec.block() < MOST_TOKENS))
        && shape.lag <= units::MOST_LAG
        && shape.query_shared().max(shape.key_shared()) <= shared
        && aligned(&problem.q, 8)
        && aligned(&problem.k, 8)
        && aligned(&problem.v, value)
        && aligned(&wanted.dy, value)
        && aligned(&wanted.dq, 2)
        && aligned(&wanted.dk, 2)
        && aligned(&wanted.dv, out)
        && problem.kv_heads <= MOST_BLOCKS
        && problem.sequences.len() <= MOST_BLOCKS
        && problem.sequences.iter().map(|s| s.queries).sum::<usize>() < MOST_TOKENS
}

/// How a call is cut: items that walk, and parts of those of cut sequences that are summed.
#[derive(Debug, Default)]
struct Cuts {
    sequences: Vec<Item>,
    items: Vec<Item>,
    parts: Vec<Item>,
    /// Parts of each cut sequence.
    ranges: Vec<Range>,
}

impl Cuts {
    /// So that the `residents` blocks that run at once end together, or nearly, or items have `asked`
    /// chunks.
    fn new(problem: &Problem<'_>, chunk: usize, residents: usize, asked: Option<usize>) -> Self {
        let units = problem.sequences.len() * problem.kv_heads;
        let mut cuts = Cuts::default();
        let mut work = 0;
        for s in &problem.sequences {
            let chunks = s.queries.div_ceil(chunk);
            let whole = Item {
                q_batch: s.q_batch as i64,
                q_first: s.q_first as i64,
                k_batch: s.k_batch as i64,
                k_first: s.k_first as i64,
                work,
                tokens: s.queries as i32,
                chunks: chunks as i32,
                first: 0,
                end: chunks as i32,
                slot: 0,
                last_slot: 0,
            };
            work += s.queries as i64;
            cuts.sequences.push(whole);
            let long = || cut(chunks, chunk, units, residents, SUMMING).max(LEAST_CHUNKS);
            match chunks.div_ceil(asked.map_or_else(long, |asked| asked.max(1))) {
                0 => {}
                1 => cuts.items.push(whole),
                count => cuts.cut(whole, chunks, count),
            }
        }
        cuts
    }

    fn cut(&mut self, whole: Item, chunks: usize, count: usize) {
        let first_part = self.parts.len();
        let each = chunks.div_ceil(count);
        let part = each.div_ceil(PARTS);
        for first in (0..chunks).step_by(each) {
            let end = (first + each).min(chunks);
            let slot = self.parts.len() as i32;
            let keys = if end < chunks { OF_KEYS } else { 0 };
            let queries = if first > 0 { OF_QUERIES } else { 0 };
            for first in (first..end).step_by(part) {
                let (slot, last_slot) = (self.parts.len() as i32, keys | queries);
                let end = (first + part).min(end) as i32;
                self.parts.push(Item { first: first as i32, end, slot, last_slot, ..whole });
            }
            let last_slot = self.parts.len() as i32 - 1;
            let (first, end) = (first as i32, end as i32);
            self.items.push(Item { first, end, slot, last_slot, ..whole });
        }
        let count = self.parts.len() - first_part;
        self.ranges.push(Range { first: first_part as i32, count: count as i32 });
    }
}

/// Computes the gradients of a call that is served.
pub(super) fn run(plan: &Plan, problem: &Problem<'_>, wanted: &Wanted<'_>) -> Result<(), Error> {
    let (device, spec) = (problem.device, problem.spec);
    let units = plan.once("units", || Ok(Units::new(plan.device())))?;
    let shared = device.properties().shared_per_block as usize;
    let shape = Shape::new(spec, problem.fades(), shared);
    let blocks = device.properties().multiprocessors as usize * shape.blocks();
    let chunks = plan.wish().chunk.map(|tokens| tokens.div_ceil(shape.chunk()));
    let cuts = Cuts::new(problem, shape.chunk(), blocks, chunks);
    let windows = match problem.fades() {
        true => Some(Windows::new(&units, problem, sequences(problem), false)?),
        false => None,
    };
    let works: usize = problem.sequences.iter().map(|s| s.queries).sum();
    let queries = works * problem.kv_heads * problem.group;
    let items = units.table(&cuts.items)?;
    let parts = units.table(&cuts.parts)?;
    let ranges = units.table(&cuts.ranges)?;
    let of_fading = if problem.fades() { works * problem.kv_heads } else { 0 };
    let dw = Buffer::<f64>::uninit(device, of_fading)?;
    let inverse = Buffer::<f32>::uninit(device, queries)?;
    let tail = Buffer::<f32>::uninit(device, queries)?;
    let shift = Buffer::<f32>::uninit(device, if shape.near { queries } else { 0 })?;
    let slots = cuts.parts.len();
    let sums = Buffer::<f32>::uninit(device, problem.kv_heads * slots * shape.sums_len())?;
    let mut a = [0.0; 4];
    for (p, (to, from)) in a.iter_mut().zip(spec.coefficients().unwrap_or_default()).enumerate() {
        *to = (from * spec.scale().powi(p as i32)) as f32;
    }
    let walk = Walk {
        q: problem.q,
        k: problem.k,
        v: problem.v,
        dy: wanted.dy,
        dq: wanted.dq,
        dk: wanted.dk,
        dv: wanted.dv,
        items: items.address(),
        g: address(windows.as_ref().and_then(|windows| windows.g.as_ref())),
        dw: dw.address(),
        inverse: inverse.address(),
        tail: tail.address(),
        shift: shift.address(),
        sums: sums.address(),
        works: works as i64,
        group: problem.group as i32,
        slots: slots as i32,
        block: spec.block().min(MOST_TOKENS) as i32,
        near: problem.near() as i32,
        scale: spec.scale() as f32,
        a,
        unused: 0,
    };
    let steps =
        Steps { problem, units: &units, shape, cuts: &cuts, walk, ranges: ranges.address() };
    let of_parts = Walk { items: parts.address(), ..walk };
    steps.sum(&of_parts, "stream_backward_sum_keys", false)?;
    steps.walk("stream_backward_queries", &shape.queries(), shape.query_shared())?;
    steps.sum(&of_parts, "stream_backward_sum_queries", true)?;
    steps.walk("stream_backward_keys", &shape.keys(), shape.key_shared())?;
    if wanted.d_log_gates.is_some() || wanted.d_slopes.is_some() {
        steps.logs(&dw, wanted)?;
    }
    Ok(())
}

/// What the launches of one call share.
struct Steps<'s> {
    problem: &'s Problem<'s>,
    units: &'s Units,
    shape: Shape,
    cuts: &'s Cuts,
    walk: Walk,
    ranges: u64,
}

impl Steps<'_> {
    /// Sums before (after) each part.
    fn sum(&self, walk: &Walk, name: &'static str, reverse: bool) -> Result<(), Error> {
        if self.cuts.parts.is_empty() {
            return Ok(());
        }
        let (device, heads, shape) = (self.problem.device, self.problem.kv_heads, &self.shape);
        let kernel = self.units.kernel(name, &shape.sums())?;
        let launch = Launch {
            grid: grid([self.cuts.parts.len(), heads, 1])?,
            block: [shape.threads() as u32, 1, 1],
            shared: shape.sum_shared() as u32,
        };
        // SAFETY: `Walk` is the kernel's own (its size is checked); there are sums for each part and
        // head, and what is read is the checked call's or has been made for all its tokens.
        unsafe { kernel.launch_on(device, launch, walk) }?;
        let p = Scan { walk: *walk, ranges: self.ranges, reverse: reverse.into() };
        let kernel = self.units.kernel("stream_backward_scan", &shape.sums())?;
        let blocks = [shape.sums_len().div_ceil(256), self.cuts.ranges.len(), heads];
        let launch = Launch { grid: grid(blocks)?, block: [256, 1, 1], shared: 0 };
        // SAFETY: `Scan` is the kernel's own; the ranges are of the parts.
        unsafe { kernel.launch_on(device, launch, &p) }
    }

    fn walk(&self, name: &'static str, unit: &Unit, shared: usize) -> Result<(), Error> {
        if self.cuts.items.is_empty() {
            return Ok(());
        }
        let kernel = self.units.kernel(name, unit)?;
        let launch = Launch {
            grid: grid([self.cuts.items.len(), self.problem.kv_heads, 1])?,
            block: [self.shape.threads() as u32, 1, 1],
            shared: shared as u32,
        };
        // SAFETY: `Walk` is the kernel's own; tensors are the checked call's, the rest has been made
        // for its tokens and heads.
        unsafe { kernel.launch_on(self.problem.device, launch, &self.walk) }
    }

    /// Gradients by gates or slopes from those by the logarithms.
    fn logs(&self, dw: &Buffer<f64>, wanted: &Wanted<'_>) -> Result<(), Error> {
        let (device, heads) = (self.problem.device, self.problem.kv_heads);
        let count = self.cuts.sequences.len();
        let sequences = self.units.table(&self.cuts.sequences)?;
        let slopes = Buffer::<f64>::uninit(device, heads * count)?;
        let by_slopes = self.problem.spec.decay() == Decay::Slopes;
        let p = Logs {
            dw: dw.address(),
            d_log_gates: wanted.d_log_gates.unwrap_or(RawView::NONE),
            slopes: slopes.address(),
            d_slopes: wanted.d_slopes.unwrap_or(0),
            sequences: sequences.address(),
            works: self.walk.works,
            sequence_count: count as i32,
            unused: 0,
        };
        if count > 0 {
            let kernel = self.units.kernel("stream_backward_logs", &units::logs())?;
            let launch = Launch { grid: grid([count, heads, 1])?, block: [256, 1, 1], shared: 0 };
            // SAFETY: `Logs` is the kernel's own; there is a number for each token, and each sequence.
            unsafe { kernel.launch_on(device, launch, &p) }?;
        }
        if by_slopes && wanted.d_slopes.is_some() {
            let kernel = self.units.kernel("stream_backward_slopes", &units::logs())?;
            let launch = Launch { grid: grid([heads, 1, 1])?, block: [1, 1, 1], shared: 0 };
            // SAFETY: as above; there is a slope for each head.
            unsafe { kernel.launch_on(device, launch, &p) }?;
        }
        Ok(())
    }
}
