//! Figure 6: memory and time per token, measured on this machine's CPU, against conventional
//! attention with a KV cache.

use std::time::Instant;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use sata::{Call, Form, Plan, Spec, State, View, ViewMut};
use serde::Serialize;

use super::progress::Progress;
use super::scope::{HEADS, Scope};
use crate::failure::Outcome;
use crate::machine;
use crate::plot::{Axis, COLORS, Figure, Key, Mark, Numerals, Panel, Style};

/// Terms.
pub const TERMS: usize = 4;
/// Tokens that are drawn at random; longer contexts repeat them.
const TILE: usize = 1024;
/// Timings of which the median is taken, as many as the paper's.
const TIMINGS: usize = 7;
/// Steps of one timing: a multiple of the block, so that each has its share of folds.
const STEPS: usize = 64;
/// Seconds that a timing of a KV cache takes at least.
const SHORTEST: f64 = 2e-3;

/// One head size and context length.
#[derive(Clone, Debug, Serialize)]
pub struct DecodePoint {
    /// d_K = d_V.
    pub d: usize,
    /// Tokens in context.
    pub tokens: u64,
    /// Bytes of the KV cache, f32.
    pub cache_bytes: u128,
    /// Seconds for one query against the cache.
    pub cache_seconds: f64,
    /// Bytes of the state.
    pub state_bytes: u128,
    /// Seconds of a step: absorbing one token and answering its query, folds included.
    pub state_seconds: f64,
}

/// Units of work, for the progress bar.
pub fn units(scope: &Scope) -> u64 {
    HEADS.iter().map(|&d| lengths(scope, d).len() as u64 * UNIT).sum()
}

const UNIT: u64 = 5;

/// Context lengths, each four times the one before, while a KV cache of them fits in memory.
fn lengths(scope: &Scope, d: usize) -> Vec<u64> {
    let free = machine::available_memory().unwrap_or(1 << 30) as f64;
    let bytes = ((free * scope.decode_memory) as u128).min(scope.decode_bytes);
    let fits = |&n: &u64| {
        n <= scope.decode_tokens && sata::cost::cache_elements(d, d, n.into()) * 4 <= bytes
    };
    let lengths: Vec<u64> =
        std::iter::successors(Some(TILE as u64), |n| n.checked_mul(4)).take_while(fits).collect();
    if lengths.is_empty() { vec![TILE as u64] } else { lengths }
}

/// Measures all head sizes and lengths.
///
/// # Errors
/// What the library refuses, which on an ordinary machine is nothing.
pub fn run(scope: &Scope, progress: &Progress) -> Outcome<Vec<DecodePoint>> {
    let mut points = vec![];
    for d in HEADS {
        let mut rng = SmallRng::seed_from_u64(scope.seed);
        let mut draw = || (0..TILE * d).map(|_| rng.sample(StandardNormal)).collect::<Vec<f32>>();
        let [q, k, v] = [draw(), draw(), draw()];
        let lengths = lengths(scope, d);
        let capacity = lengths.last().map_or(0, |&n| n as usize * d);
        let (mut keys, mut values) = (Vec::with_capacity(capacity), Vec::with_capacity(capacity));

        let plan = Plan::new(&Spec::new(d, d).terms(TERMS).build()?)?.with_form(Form::State);
        let mut state = State::<f32>::new(&plan, 1, 1)?;
        let shape = [1, 1, TILE, d];
        let mut y = vec![0.0f32; TILE * d];
        let call =
            Call::causal(View::new(&q, shape)?, View::new(&k, shape)?, View::new(&v, shape)?);
        plan.run(call.state(&mut state), ViewMut::new(&mut y, shape)?)?;
        for n in lengths {
            progress.doing(format!("figure 6: d = {d}, {n} tokens"));
            while keys.len() < n as usize * d {
                keys.extend_from_slice(&k);
                values.extend_from_slice(&v);
            }
            // The past of twice the tokens: its own, and as much again after it.
            while state.position(0) < n {
                let again = state.fork();
                state.merge(&again)?;
            }
            points.push(DecodePoint {
                d,
                tokens: n,
                cache_bytes: (keys.len() + values.len()) as u128 * 4,
                cache_seconds: time_cache(&q[..d], &keys, &values)?,
                state_bytes: state.bytes() as u128,
                state_seconds: time_state(&plan, &state, [&q, &k, &v])?,
            });
            progress.done(UNIT);
        }
    }
    Ok(points)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn time_cache(query: &[f32], keys: &[f32], values: &[f32]) -> Outcome<f64> {
    let scale = 1.0 / (query.len() as f64).sqrt();
    let mut out = vec![0.0f32; query.len()];
    let mut once = || sata::conventional::decode(query, keys, values, scale, &mut out);
    once()?;
    let mut times = vec![];
    for _ in 0..TIMINGS {
        let (start, mut steps) = (Instant::now(), 0);
        while start.elapsed().as_secs_f64() < SHORTEST || steps == 0 {
            once()?;
            steps += 1;
        }
        times.push(start.elapsed().as_secs_f64() / f64::from(steps));
    }
    Ok(median(times))
}

fn time_state(plan: &Plan, state: &State<f32>, [q, k, v]: [&[f32]; 3]) -> Outcome<f64> {
    // A fork, so that the state stays at its round number of tokens.
    let mut state = state.fork();
    let d = plan.spec().d_key();
    let shape = [1, 1, 1, d];
    let mut y = vec![0.0f32; d];
    let mut times = vec![];
    for timing in 0..=TIMINGS {
        let start = Instant::now();
        for step in 0..STEPS {
            let at = step * d..(step + 1) * d;
            let row = |x| View::new(x, shape);
            let (q, k, v) = (row(&q[at.clone()])?, row(&k[at.clone()])?, row(&v[at])?);
            plan.step(&mut state, q, k, v, ViewMut::new(&mut y, shape)?)?;
        }
        // The first one warms up.
        if timing > 0 {
            times.push(start.elapsed().as_secs_f64() / STEPS as f64);
        }
    }
    Ok(median(times))
}

/// Figure 6.
pub fn figure(points: &[DecodePoint]) -> Figure {
    let longest = points.iter().map(|point| point.tokens).max().unwrap_or(1);
    let x = || Axis::log("tokens in context", 1e3, longest as f64, Numerals::Counts);
    let panel = |title: &str,
                 label: &str,
                 ours: fn(&DecodePoint) -> f64,
                 cache: fn(&DecodePoint) -> f64| {
        let mut marks = vec![];
        for (d, color) in HEADS.into_iter().zip(COLORS) {
            let curve = |of: fn(&DecodePoint) -> f64| -> Vec<(f64, f64)> {
                let of_head = points.iter().filter(|point| point.d == d);
                of_head.map(|point| (point.tokens as f64, of(point))).collect()
            };
            marks.push(Mark::dashed(curve(cache), color));
            marks.push(Mark::dots(curve(cache), color));
            marks.push(Mark::line(curve(ours), color));
            marks.push(Mark::dots(curve(ours), color));
        }
        let values = points.iter().flat_map(|point| [ours(point), cache(point)]);
        Panel {
            title: title.into(),
            x: x(),
            y: Axis::decades(label, values, Numerals::Powers),
            marks,
        }
    };
    let mut keys = vec![];
    for (d, color) in HEADS.into_iter().zip(COLORS) {
        keys.push(Key::line(format!("constant cost, d = {d}"), color, Style::Solid));
        keys.push(Key::line(format!("KV cache, d = {d}"), color, Style::Dashed));
    }
    Figure {
        id: "figure6".into(),
        title: "Figure 6 · Memory and time of one more token, measured on this CPU".into(),
        subtitle: vec![format!(
            "one head, one query, f32, {TERMS} Taylor terms, {} threads; medians of {TIMINGS}; no \
             point is extrapolated",
            machine::threads()
        )],
        columns: 2,
        panels: vec![
            panel(
                "Memory held, per token of context",
                "bytes",
                |point| point.state_bytes as f64 / point.tokens as f64,
                |point| point.cache_bytes as f64 / point.tokens as f64,
            ),
            panel(
                "Time of one decode step",
                "seconds",
                |point| point.state_seconds,
                |point| point.cache_seconds,
            ),
        ],
        keys,
    }
}
