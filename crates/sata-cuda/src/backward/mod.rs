//! The backward of whole calls: what a loss's gradient by the outputs makes of that by the inputs.

mod features;
mod gradients;
mod kernels;
mod matrix;
mod matrix_sums;
mod params;
mod stages;
mod state;
mod stream;
mod sweep;
mod table;

pub use gradients::Gradients;
pub use state::StateGradient;

use sata::{Decay, Form, Series};

use crate::forward::{past, stretches};
use crate::problem::{Fading, Problem, Stretch};
use crate::state::Arrays;
use crate::units::Units;
use crate::{Buffer, Call, Element, Error, Plan, RawView, View};
use features::Features;
use kernels::{Kernels, Kind};
use params::{Params, RawTokens};
use stages::{Generic, Stages};
use sweep::{Sizes, Sweep};
use table::{Cut, Row, Table};

/// Bytes of work memory where nothing is said.
const DEFAULT_WORKSPACE: usize = 1 << 30;

/// What a backward pass fills, besides what a [`Problem`] names.
#[derive(Debug)]
struct Wanted<'w> {
    /// dL/dy.
    pub dy: RawView,
    pub dq: RawView,
    pub dk: RawView,
    pub dv: RawView,
    /// f32, a view with dim 1.
    pub d_log_gates: Option<RawView>,
    /// `[kv_heads]` f64.
    pub d_slopes: Option<u64>,
    pub state: Option<&'w mut StateGradient>,
}

impl Plan {
    /// The gradients of Σ dy·y by everything that `call`, a forward call, was given: they are
    /// written to (not added to) what `gradients` names. `dy` is dL/dy
    /// `[batch, query_heads, queries, d_value]`. A query that sees no key has gradient 0; one whose
    /// denominator is 0 or not finite has gradients that are not finite.
    ///
    /// Nothing of the forward call is needed but its arguments: weights and features are made again,
    /// and nothing of the size of tokens × features is stored. A state is the one that the call
    /// *began* with ([`State::fork`](crate::State::fork) keeps it), and stays as it is. `strict` is of
    /// the forward call alone. All is f32 within, but that kernels for bf16 heads of 8 or 16 elements round
    /// features and sums to bf16 where they multiply them
    /// ([`Plan::without_matrix_units`] keeps to f32); and the same at every run.
    ///
    /// The work is in the order of the device's stream; nothing waits for it, but that a call with a
    /// state asks the device how far that has come first.
    ///
    /// # Errors
    /// Everything in [`Error`] that names an argument, before any work and with the gradients as
    /// they were; [`Error::Unsupported`] for series whose coefficients are each query's own
    /// ([`Series::Gauss`], [`Series::Hermite`]), for states that hold other orders than the spec's,
    /// and for keys and values that are too long for the device's shared memory;
    /// [`Error::OutOfMemory`] and what a device may report.
    pub fn backward<E: Element>(
        &self,
        call: Call<'_, '_, E>,
        dy: View<'_, E>,
        gradients: Gradients<'_, E>,
    ) -> Result<(), Error> {
        let shape = call.check(self, "dy", dy.shape())?;
        let (device, spec) = (self.device(), self.spec());
        if !dy.device().is_same(device) {
            return Err(Error::argument("dy", "it is on another device than the plan"));
        }
        gradients.check(device, spec, &call)?;
        let initial = call.state.as_deref();
        let sequences = stretches(&call, initial)?;
        let slopes = match call.slopes {
            Some(slopes) => {
                let units = self.once("units", || Ok(Units::new(device)))?;
                Some(units.table(slopes)?)
            }
            None => None,
        };
        let problem = Problem {
            device,
            spec,
            element: E::KERNEL_NAME,
            q: call.q.raw(),
            y: RawView::NONE,
            k: call.k.raw(),
            v: call.v.raw(),
            kv_heads: shape.kv_heads,
            group: shape.group,
            causal: call.causal,
            fading: match (spec.decay(), &slopes) {
                (Decay::Slopes, Some(slopes)) => Fading::Slopes(slopes.address()),
                (Decay::Gates, _) => Fading::Gates(call.raw_gates()),
                _ => Fading::None,
            },
            mask: call.raw_mask(),
            sequences,
            past: initial.map(past),
        };
        let wanted = Wanted {
            dy: dy.raw(),
            dq: gradients.q.raw(),
            dk: gradients.k.raw(),
            dv: gradients.v.raw(),
            d_log_gates: gradients.log_gates.map(|log_gates| log_gates.raw()),
            d_slopes: gradients.slopes.map(|slopes| slopes.address()),
            state: gradients.state,
        };
        backward(self, &problem, wanted)
    }
}

/// Refuses what has no backward.
fn check(problem: &Problem<'_>, state: Option<&StateGradient>) -> Result<(), Error> {
    let refused = |what: String| Err(Error::Unsupported { what });
    let series = match problem.spec.series() {
        Series::Gauss => Some("gauss"),
        Series::Hermite { .. } => Some("hermite"),
        _ => None,
    };
    if let Some(series) = series {
        return refused(format!(
            "the backward of series {series}, whose coefficients are each query's,"
        ));
    }
    let (holds, needs) = (problem.orders(), problem.spec.orders());
    if holds != needs {
        return refused(format!(
            "the backward of a call with a state that holds the orders {holds:?}, not the spec's \
             {needs:?},"
        ));
    }
    match state {
        Some(state) => {
            let ends = problem.sequences.iter().map(|s| s.folded + s.tokens() as u64);
            state.check(problem.spec, problem.kv_heads, ends)
        }
        None => Ok(()),
    }
}

/// Computes the gradients of a call that has been checked.
fn backward(plan: &Plan, problem: &Problem<'_>, mut wanted: Wanted<'_>) -> Result<(), Error> {
    check(problem, wanted.state.as_deref())?;
    if plan.wish().matrix && stream::serves(problem, &wanted) {
        return stream::run(plan, problem, &wanted);
    }
    let mut state = wanted.state.take();
    let (device, spec) = (problem.device, problem.spec);
    let features = plan.once("backward", || Features::new(device, spec, &*plan.basis()?))?;
    let kind = Kind::new(spec, problem.element, problem.causal);
    let kernels = plan.once(format!("{kind:?}"), || Kernels::new(device, &kind, features.count))?;
    let keep = state.is_some();
    let rows: Vec<Row> = problem.sequences.iter().enumerate().map(row(problem)).collect();
    let longest = rows.iter().map(Row::total).max().unwrap_or(0);
    let unit_kernels = match matrix::serves(plan, problem, &wanted, &kind) {
        true => Some(plan.once(format!("{kind:?}"), || matrix::Kernels::new(device, &kind))?),
        false => None,
    };
    let direct = unit_kernels.as_ref().and_then(|_| matrix::chunk(&kind, features.count, longest));
    let sums = match &unit_kernels {
        Some(_) => matrix_sums::choose(plan, problem, &kind, longest, keep)?,
        None => None,
    };
    let chunk = match &sums {
        Some((_, chunk)) => *chunk,
        None => choose_chunk(plan, problem, features.count, longest, keep, direct),
    };
    let table = Table::new(spec, Cut { causal: problem.causal, chunk, keep }, rows)?;
    // Copies that are kept: a new one would wait for all work before it.
    let kept = plan.once("units", || Ok(Units::new(device)))?;
    let sequences = kept.table(&table.raw())?;
    let folds = kept.table(&table.folds)?;
    let reads = kept.table(&table.reads)?;
    let fades = problem.fades();
    let of_fading = if fades { table.places * problem.kv_heads } else { 0 };
    let g = Buffer::<f64>::uninit(device, of_fading)?;
    let own = Buffer::<f64>::uninit(device, of_fading)?;
    let dw = Buffer::<f64>::uninit(device, of_fading)?;
    let folding = Buffer::<f32>::uninit(device, table.places * problem.kv_heads)?;
    let live = Buffer::<i32>::uninit(device, table.places)?;
    let queries = table.queries * problem.kv_heads * problem.group;
    let shift = Buffer::<f32>::uninit(device, queries)?;
    let inverse = Buffer::<f32>::uninit(device, queries)?;
    let delta = Buffer::<f32>::uninit(device, queries)?;
    let reading = Buffer::<f32>::uninit(device, queries)?;

    let mut params = params(problem, &features, &wanted);
    params.sequences = sequences.address();
    params.folds = folds.address();
    params.reads = reads.address();
    params.g = g.address();
    params.own = own.address();
    params.dw = dw.address();
    params.folding = folding.address();
    params.live = live.address();
    params.shift = shift.address();
    params.inverse = inverse.address();
    params.delta = delta.address();
    params.reading = reading.address();
    if let Some(state) = &mut state {
        state.give(&mut params)?;
    }
    let multiprocessors = device.properties().multiprocessors as usize;
    let stages = Generic {
        kernels: &kernels,
        features: features.count,
        d_value: spec.d_value(),
        multiprocessors,
    };
    let matrix = unit_kernels.as_deref().map(|kernels| matrix::Matrix { generic: stages, kernels });
    let pairs: &dyn Stages = matrix.as_ref().map_or(&stages, |matrix| matrix);
    let sizes = Sizes {
        d_key: spec.d_key(),
        d_value: spec.d_value(),
        kv_heads: problem.kv_heads,
        group: problem.group,
        causal: problem.causal,
        sums: problem.past.is_some() || keep || table.folds_any,
        sinks: problem.sequences.iter().map(|s| problem.sinks(s)).max().unwrap_or(0),
        multiprocessors,
        workspace: plan.wish().work_bytes.unwrap_or(DEFAULT_WORKSPACE),
    };
    let units = table.rows.len() * problem.kv_heads;
    stages.each_unit(&kernels.places, units, 256, &params)?;
    // Tiles of places of each.
    let tiles = (longest + 1).div_ceil(256);
    let weights = Params { far_tokens: tiles as i64, ..params };
    stages.each_unit(&kernels.weights, units * tiles, 256, &weights)?;
    let pass = match (&matrix, &sums) {
        (Some(matrix), Some((sums, _))) => {
            let pass =
                matrix_sums::Pass { plan, matrix, sums, kind: &kind, table: &table, sizes: &sizes };
            pass.units().map(|at_once| (pass, at_once))
        }
        _ => None,
    };
    match pass {
        Some((pass, at_once)) => pass.run(at_once, params)?,
        None => Sweep::new(device, pairs, &table, sizes, params)?.run()?,
    }
    if fades && (wanted.d_log_gates.is_some() || wanted.d_slopes.is_some() || keep) {
        stages.each_unit(&kernels.logs, units, 256, &params)?;
    }
    if wanted.d_slopes.is_some() {
        stages.each_unit(&kernels.slopes, problem.kv_heads, 1, &params)?;
    }
    if let Some(state) = state {
        state.moved(problem.sequences.iter().map(|s| s.folded + s.open as u64));
    }
    Ok(())
}

/// A sequence, not yet cut.
fn row(problem: &Problem<'_>) -> impl Fn((usize, &Stretch)) -> Row {
    let capacity = problem.past.as_ref().map_or(1, |past| past.capacity.max(1)) as u64;
    move |(slot, s)| {
        let mut row = Row::default();
        (row.q_batch, row.q_first, row.queries) = (s.q_batch, s.q_first, s.queries);
        (row.k_batch, row.k_first, row.keys) = (s.k_batch, s.k_first, s.keys);
        (row.open, row.folded, row.slot) = (s.open, s.folded, slot);
        row.ring = (s.folded % capacity) as usize;
        row
    }
}

/// All that does not depend on how the work is cut.
fn params(problem: &Problem<'_>, features: &Features, wanted: &Wanted<'_>) -> Params {
    let spec = problem.spec;
    let (slopes, log_gates) = match problem.fading {
        Fading::None => (0, RawView::NONE),
        Fading::Slopes(slopes) => (slopes, RawView::NONE),
        Fading::Gates(gates) => (0, gates),
    };
    let past = problem.past.as_ref();
    let arrays = past.map_or_else(Arrays::default, |past| past.arrays);
    Params {
        q: problem.q,
        k: problem.k,
        v: problem.v,
        dy: wanted.dy,
        dq: wanted.dq,
        dk: wanted.dk,
        dv: wanted.dv,
        log_gates,
        d_log_gates: wanted.d_log_gates.unwrap_or(RawView::NONE),
        sequences: 0,
        folds: 0,
        reads: 0,
        mask: problem.mask.map_or(0, |(address, _)| address),
        slopes,
        d_slopes: wanted.d_slopes.unwrap_or(0),
        coefficients: features.coefficients.address(),
        features: features.features.address(),
        prefixes: features.prefixes.address(),
        factors: features.factors.address(),
        runs: features.runs.address(),
        tile_runs: features.tile_runs.address(),
        past: arrays.marks,
        past_sums: arrays.sums,
        past_z: arrays.z,
        past_sums_low: arrays.sums_low,
        past_z_low: arrays.z_low,
        past_is_bf16: past.map_or(0, |past| past.is_bf16.into()),
        open: RawTokens {
            keys: arrays.open_keys,
            values: arrays.open_values,
            fading: arrays.open_fading,
            weights: arrays.open_weights,
            most: past.map_or(1, |past| past.capacity.max(1) as i64),
        },
        sinks: RawTokens {
            keys: arrays.sink_keys,
            values: arrays.sink_values,
            fading: arrays.sink_fading,
            weights: arrays.sink_weights,
            most: past.map_or(1, |past| past.sinks.max(1) as i64),
        },
        final_sums: 0,
        final_z: 0,
        final_open: RawTokens::NONE,
        final_sinks: RawTokens::NONE,
        final_past: 0,
        initial_sums: 0,
        initial_z: 0,
        initial_open: RawTokens::NONE,
        initial_sinks: RawTokens::NONE,
        initial_past: 0,
        g: 0,
        own: 0,
        dw: 0,
        folding: 0,
        live: 0,
        shift: 0,
        inverse: 0,
        delta: 0,
        reading: 0,
        slots: 0,
        carry: 0,
        far: 0,
        slot_unit: 0,
        slot_chunk: 0,
        far_tokens: 0,
        far_split: 0,
        sink_rows: 0,
        sink_dw: 0,
        sink_splits: 1,
        most_sinks: 0,
        features_count: features.count as i64,
        mask_batch: problem.mask.map_or(0, |(_, stride)| stride as i64),
        block: i64::try_from(spec.block()).unwrap_or(i64::MAX),
        sink_count: spec.sinks() as i64,
        near: problem.near(),
        scale: spec.scale() as f32,
        kv_heads: problem.kv_heads as i32,
        group: problem.group as i32,
        sequences_count: problem.sequences.len() as i32,
        first_unit: 0,
        units: 0,
        first_chunk: 0,
        chunks: 0,
        far_heads: 1,
        splits: 1,
        mode: 0,
        flags: 0,
    }
}

/// Tokens of a chunk, by what weighing pairs, going through features and moving sums cost; `direct`
/// where other kernels weigh pairs, and do that for all of them at least as fast.
fn choose_chunk(
    plan: &Plan,
    problem: &Problem<'_>,
    features: usize,
    longest: usize,
    keep: bool,
    direct: Option<usize>,
) -> usize {
    let (d_key, d_value) = (problem.spec.d_key() as f64, problem.spec.d_value() as f64);
    let features = features as f64;
    let pair = 5.0 * d_key + 3.0 * d_value + 16.0;
    // Of one token of either kind, in multiplications: summed, read, handed back.
    let token = features * (5.0 * d_value + 24.0);
    let is_direct = match plan.wish().form {
        Some(form) => form == Form::Direct,
        None => {
            plan.wish().chunk.is_none()
                && (direct.is_some() || longest as f64 <= 2.0 * token / pair)
        }
    };
    if is_direct && problem.past.is_none() && !keep {
        return longest.max(1);
    }
    if let Some(chunk) = plan.wish().chunk {
        return chunk.max(1);
    }
    // Sums of a chunk are written, run on and read twice: as many bytes as hundreds of
    // multiplications take.
    let touch = 264.0 * features * (d_value + 1.0) / problem.group as f64;
    let chunk = (2.0 * touch / pair).sqrt() / 64.0;
    (chunk.round() as usize).clamp(1, 32) * 64
}
