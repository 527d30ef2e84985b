//! One token of each of many heads, from graphs of whole steps: at what share of a copy's rate.

use half::bf16;
use rayon::prelude::*;
use sata::{Decay, Near};
use sata_cuda::{
    Buffer, Call, Decoder, Graph, Plan, State, Step, Storage, SumsType, View, ViewMut,
};
use serde::Serialize;

use super::Bench;
use super::attention::{Attention, Kernel};
use super::noise::{Of, gates};
use super::timer::{Timing, time};
use crate::failure::{Failure, Outcome};
use crate::table::three;

/// Different tokens that steps are made of, in turn.
const ROUNDS: usize = 8;
/// Key/value heads of a sequence.
const HEADS: usize = 32;
/// Bytes of states over those of the L2 cache, at least: no state is still there at its next step.
const BEYOND_L2: usize = 4;

/// Heads of one size and storage.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// In a few words.
    pub what: String,
    /// What was computed.
    pub attention: Attention,
    /// D.
    pub features: usize,
    /// Tokens of a block: so often the sums are written.
    pub block: usize,
    /// Type of the sums at rest.
    pub sums: &'static str,
    /// Whether what rounding takes from them is kept beside them.
    pub compensated: bool,
    /// Query heads per key/value head.
    pub group: usize,
    /// Key/value heads of all sequences.
    pub heads: usize,
    /// States that take turns.
    pub sets: usize,
    /// Of one step, as the mean over whole blocks, their folds included.
    pub timing: Timing,
    /// Nanoseconds per head.
    pub ns: f64,
    /// Bytes per head and step: see [`Many::bytes`].
    pub bytes: f64,
    /// Those over the time.
    pub bytes_per_second: f64,
    /// Of the copy's rate.
    pub share: f64,
    /// The same with open tokens counted, half of the open blocks on average.
    pub share_with_open: f64,
    /// What the share should be.
    pub target: Option<f64>,
}

/// What is measured.
#[derive(Clone, Debug)]
struct Many {
    attention: Attention,
    block: usize,
    storage: Storage,
    group: usize,
    heads: usize,
    target: Option<f64>,
}

/// All rows: usual sums first, then without compensation, then in bf16.
fn all(bench: &Bench) -> Vec<Many> {
    let scope = &bench.scope;
    let f32s = |compensated| Storage { sums: SumsType::F32, compensated };
    let mut all = vec![];
    for &d in &scope.dims {
        let (heads, target) = match d {
            8 => (8192, 0.70),
            16 => (2048, 0.80),
            32 => (256, 0.85),
            _ => (32, 0.85),
        };
        let many = Many {
            attention: Attention::paper(d),
            block: 64,
            storage: f32s(true),
            group: 1,
            heads: scope.heads(heads),
            target: (!scope.quick).then_some(target),
        };
        if d == 8 {
            // Short blocks: open tokens are read too, and are many beside so few features.
            all.push(Many { block: 16, ..many.clone() });
        }
        all.push(many.clone());
        if scope.quick {
            continue;
        }
        if d == 8 {
            all.push(Many { block: 16, storage: f32s(false), ..many.clone() });
        }
        all.push(Many { storage: f32s(false), ..many.clone() });
        let half = Storage { sums: SumsType::Bf16, compensated: false };
        all.push(Many { storage: half, target: None, ..many.clone() });
        if d == 32 {
            all.push(Many { group: 8, target: None, ..many.clone() });
            let attention =
                Attention { kernel: Kernel::Taylor(3), trained: true, ..many.attention };
            let heads = scope.heads(2048);
            all.push(Many { attention, storage: f32s(false), heads, target: None, ..many });
        }
    }
    all
}

impl Many {
    fn plan(&self, bench: &Bench) -> Outcome<Plan> {
        let builder = match self.attention.kernel {
            Kernel::Taylor(terms) => {
                sata::Spec::new(self.attention.d, self.attention.d).terms(terms)
            }
            Kernel::Power(exponent) => sata::Spec::new(self.attention.d, self.attention.d)
                .series(sata::Series::power(exponent)),
        };
        let builder = match self.attention.trained {
            true => builder.near(Near::Blocks(1)).decay(Decay::Gates),
            false => builder,
        };
        Ok(Plan::new(&bench.device, &builder.block(self.block).build()?)?)
    }

    /// Sequences and heads of each.
    fn shape(&self) -> [usize; 2] {
        let kv_heads = HEADS.min(self.heads);
        [self.heads / kv_heads, kv_heads]
    }

    /// Bytes of one head's far sums.
    fn far(&self, features: usize) -> f64 {
        features as f64 * (self.attention.d as f64 * self.storage.sums.width() as f64 + 4.0)
    }

    /// Bytes per head and step: sums read once, and written once each block, when what rounding
    /// takes from them is read and written as well, where that is kept.
    fn bytes(&self, features: usize) -> f64 {
        let folds = if self.storage.compensated { 3.0 } else { 1.0 };
        self.far(features) * (1.0 + folds / self.block as f64)
    }

    /// Bytes of open tokens per head and step, on average.
    fn open(&self) -> f64 {
        let blocks = if self.attention.trained { 1.5 } else { 0.5 };
        blocks * self.block as f64 * (4 * (2 * self.attention.d + 1)) as f64
    }

    fn name(&self) -> String {
        let mut name = self.attention.name();
        if self.group > 1 {
            name += &format!(", {} queries a head", self.group);
        }
        name
    }
}

/// A state and where its steps go.
struct Set {
    state: State,
    y: Buffer<bf16>,
}

/// Measures all rows.
///
/// # Errors
/// What the library refuses, or the device has no room for.
pub fn rows(bench: &Bench) -> Outcome<Vec<Row>> {
    let all = all(bench);
    bench.progress(&format!("compiling {} kernels for decoding", all.len()));
    let ready: Outcome<Vec<(Many, Plan)>> = all
        .into_par_iter()
        .map(|many| {
            let plan = many.plan(bench)?;
            let [sequences, kv_heads] = many.shape();
            let state = State::with_storage(&plan, sequences, kv_heads, many.storage)?;
            Decoder::new::<bf16>(&plan, &state, sequences, kv_heads * many.group)?;
            Ok((many, plan))
        })
        .collect();
    ready?.iter().map(|(many, plan)| row(bench, many, plan)).collect()
}

fn row(bench: &Bench, many: &Many, plan: &Plan) -> Outcome<Row> {
    let (device, features) = (&bench.device, plan.features()?);
    let [sequences, kv_heads] = many.shape();
    let heads = sequences * kv_heads;
    let bytes = many.far(features) * heads as f64;
    let l2 = device.properties().l2_bytes;
    let sets = ((BEYOND_L2 * l2) as f64 / bytes).ceil().clamp(2.0, 16.0) as usize;
    let sets = if bench.device.is_emulated() { 1 } else { sets };
    let mut sets: Vec<Set> = (0..sets)
        .map(|_| {
            Ok(Set {
                state: filled(bench, many, plan)?,
                y: Buffer::uninit(device, heads * many.group * many.attention.d)?,
            })
        })
        .collect::<Outcome<_>>()?;
    let decoder = Decoder::new::<bf16>(plan, &sets[0].state, sequences, kv_heads * many.group)?;
    let gates = gates(device, heads)?;
    // SAFETY: what steps use outlives the graph, which is dropped first.
    let graph: Graph = unsafe {
        device.capture::<Failure>(|| {
            for round in 0..ROUNDS {
                for set in &mut sets {
                    step(bench, many, &decoder, set, &gates, round)?;
                }
            }
            Ok(())
        })
    }?;
    // A whole block at a time.
    let replays = many.block.div_ceil(ROUNDS);
    let block = || (0..replays).try_for_each(|_| Ok(graph.launch()?));
    block()?;
    device.synchronize()?;
    let timing = time(device, bench.scope.runs, 1, block)?;
    let steps = (replays * ROUNDS * sets.len()) as f64;
    let timing = Timing {
        seconds: timing.seconds / steps,
        least: timing.least / steps,
        most: timing.most / steps,
        ..timing
    };
    drop(graph);
    let bytes = many.bytes(features);
    let rate = bytes * heads as f64 / timing.seconds;
    let row = Row {
        what: many.name(),
        attention: many.attention,
        features,
        block: many.block,
        sums: if many.storage.sums == SumsType::F32 { "f32" } else { "bf16" },
        compensated: many.storage.compensated,
        group: many.group,
        heads,
        sets: sets.len(),
        timing,
        ns: 1e9 * timing.seconds / heads as f64,
        bytes,
        bytes_per_second: rate,
        share: rate / bench.copy,
        share_with_open: (bytes + many.open()) * heads as f64 / timing.seconds / bench.copy,
        target: many.target,
    };
    bench.progress(&format!(
        "decode d={} {}, {} sums, blocks of {}, {heads} heads: {} ns a head, {} % of a copy",
        many.attention.d,
        row.what,
        row.sums,
        many.block,
        three(row.ns),
        three(100.0 * row.share),
    ));
    Ok(row)
}

/// A state with some blocks in its sums.
fn filled(bench: &Bench, many: &Many, plan: &Plan) -> Outcome<State> {
    let (d, [sequences, kv_heads]) = (many.attention.d, many.shape());
    let mut state = State::with_storage(plan, sequences, kv_heads, many.storage)?;
    let open = if many.attention.trained { 2 } else { 0 };
    let tokens = (open + 1) * many.block;
    // As many sequences at once as there are random numbers for, all of the same tokens: strides of
    // 0 are views like others.
    let shape = [sequences, kv_heads, tokens, d];
    let strides = [0, tokens * d, d];
    let noise = |of| -> Outcome<View<'_, bf16>> {
        let one = bench.noise.view(of, [1, kv_heads, tokens, d])?;
        // SAFETY: every sequence reads the first one's numbers, which the view was checked for.
        Ok(unsafe {
            View::from_raw(&bench.device, one.address(), kv_heads * tokens * d, shape, strides)
        }?)
    };
    let mut call =
        Call::causal(noise(Of::Queries)?, noise(Of::Keys)?, noise(Of::Values)?).state(&mut state);
    let gates = gates(&bench.device, sequences * kv_heads * tokens)?;
    if many.attention.trained {
        call = call.log_gates(View::new(&gates, [sequences, kv_heads, tokens, 1])?);
    }
    let mut y = Buffer::<bf16>::uninit(&bench.device, shape.iter().product())?;
    plan.run(call, ViewMut::new(&mut y, shape)?)?;
    Ok(state)
}

fn step(
    bench: &Bench,
    many: &Many,
    decoder: &Decoder,
    set: &mut Set,
    gates: &Buffer<f32>,
    round: usize,
) -> Outcome {
    let (d, [sequences, kv_heads]) = (many.attention.d, many.shape());
    let query_heads = kv_heads * many.group;
    let at = |heads: usize| round * sequences * heads * d;
    let keys = [sequences, kv_heads, 1, d];
    let queries = [sequences, query_heads, 1, d];
    let mut step = Step::new(
        bench.noise.view_at(Of::Queries, at(query_heads), queries)?,
        bench.noise.view_at(Of::Keys, at(kv_heads), keys)?,
        bench.noise.view_at(Of::Values, at(kv_heads), keys)?,
    );
    if many.attention.trained {
        step = step.log_gates(View::new(gates, [sequences, kv_heads, 1, 1])?);
    }
    Ok(decoder.step(&mut set.state, &step, ViewMut::new(&mut set.y, queries)?)?)
}
