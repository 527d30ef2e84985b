//! Figure 6 of the paper: memory and time of one more token, against conventional attention with a
//! KV cache.

use rayon::prelude::*;
use sata::cost;
use sata_cuda::{Buffer, Decoder, Plan, State, Step, View, ViewMut};
use serde::Serialize;

use super::noise::Of;
use super::one::{Replay, absorb, for_each_context, plans, replay, said};
use super::timer::Timing;
use super::{Bench, Report};
use crate::failure::Outcome;
use crate::plot::{Axis, COLORS, Figure, Key, Mark, Numerals, Panel, Style};
use crate::table::{grouped, seconds, three};

/// Bytes of an element of a KV cache: bf16.
const CACHE_ELEMENT: u128 = 2;

/// One head size and context.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// d_K = d_V.
    pub d: usize,
    /// Tokens in context.
    pub tokens: u64,
    /// Time of a step, and bytes of the state.
    pub replay: Replay,
    /// Bytes of a KV cache in bf16.
    pub cache_bytes: u128,
    /// Seconds in which those bytes can be read at the measured rate of a copy: a bound, not a
    /// measurement.
    pub cache_bound_seconds: f64,
}

/// A context that was really absorbed, token by token.
#[derive(Clone, Debug, Serialize)]
pub struct Prefilled {
    /// d_K = d_V.
    pub d: usize,
    /// Tokens in context.
    pub tokens: u64,
    /// Seconds in which they were absorbed and answered.
    pub seconds: f64,
    /// Time of a step after them.
    pub following: Timing,
    /// ‖y − truth‖ / ‖truth‖ of the step after them, against the same sum over all tokens in f64.
    pub relative_error: f64,
}

/// Measures all head sizes and contexts.
///
/// # Errors
/// What the library refuses, or the device has no room for.
pub fn points(bench: &Bench) -> Outcome<(Vec<Point>, Vec<Prefilled>)> {
    let (mut points, mut prefilled) = (vec![], vec![]);
    let dims = &bench.scope.dims;
    for (&d, plan) in dims.iter().zip(plans(bench, dims)?) {
        for_each_context(bench, &plan, |tokens, state| {
            let replay = replay(bench, &plan, state)?;
            bench.progress(&said(d, tokens, &replay));
            let cache_bytes = cost::cache_elements(d, d, tokens.into()) * CACHE_ELEMENT;
            points.push(Point {
                d,
                tokens,
                replay,
                cache_bytes,
                cache_bound_seconds: cache_bytes as f64 / bench.copy,
            });
            Ok(())
        })?;
        let one = really(bench, &plan, bench.scope.prefilled)?;
        bench.progress(&format!(
            "one head, d={d}, {} tokens absorbed in {}: {} µs a step, off by {} of f64",
            grouped(one.tokens.into()),
            seconds(one.seconds),
            three(1e6 * one.following.seconds),
            three(one.relative_error)
        ));
        prefilled.push(one);
    }
    Ok((points, prefilled))
}

/// Absorbs a context and looks at the step after it.
fn really(bench: &Bench, plan: &Plan, tokens: u64) -> Outcome<Prefilled> {
    let (device, d) = (&bench.device, plan.spec().d_key());
    let mut state = State::new(plan, 1, 1)?;
    absorb(bench, plan, &mut state, tokens)?;
    state.reset()?;
    let before = device.record()?;
    absorb(bench, plan, &mut state, tokens)?;
    let seconds = device.record()?.since(&before)?;
    // The next token, in f32, so that outputs are not rounded.
    let n = tokens as usize;
    let host = |of| bench.noise.to_host(of, (n + 1) * d);
    let [q, k, v] = [host(Of::Queries)?, host(Of::Keys)?, host(Of::Values)?];
    let last = |x: &[f32]| Buffer::from_slice(device, &x[n * d..]);
    let (next_q, next_k, next_v) = (last(&q)?, last(&k)?, last(&v)?);
    let shape = [1, 1, 1, d];
    let mut fork = state.fork()?;
    let mut y = Buffer::<f32>::uninit(device, d)?;
    y.fill_bytes(0xff)?;
    let step = Step::new(
        View::new(&next_q, shape)?,
        View::new(&next_k, shape)?,
        View::new(&next_v, shape)?,
    );
    Decoder::new::<f32>(plan, &fork, 1, 1)?.step(&mut fork, &step, ViewMut::new(&mut y, shape)?)?;
    let want = truth(plan.spec(), &q[n * d..], &k, &v);
    let got = y.to_vec()?;
    let square = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
    let off = square(&mut got.iter().zip(&want).map(|(&g, w)| f64::from(g) - w));
    let relative_error = (off / square(&mut want.iter().copied())).sqrt();
    let following = replay(bench, plan, state)?.following;
    Ok(Prefilled { d, tokens, seconds, following, relative_error })
}

/// Σ p(x) v / Σ p(x) over all tokens, in f64.
fn truth(spec: &sata::Spec, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f64> {
    let (d, scale) = (q.len(), spec.scale());
    let coefficients = spec.coefficients().unwrap_or_default();
    let sums = k
        .par_chunks(4096 * d)
        .zip(v.par_chunks(4096 * d))
        .map(|(k, v)| {
            let mut sums = vec![0.0; d + 1];
            for (k, v) in k.chunks_exact(d).zip(v.chunks_exact(d)) {
                let x: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                let x = x * scale;
                let weight = coefficients.iter().rev().fold(0.0, |sum, a| sum * x + a);
                for (sum, &v) in sums.iter_mut().zip(v) {
                    *sum += weight * f64::from(v);
                }
                sums[d] += weight;
            }
            sums
        })
        .reduce(|| vec![0.0; d + 1], |a, b| a.iter().zip(&b).map(|(a, b)| a + b).collect());
    sums[..d].iter().map(|sum| sum / sums[d]).collect()
}

/// The figure.
pub fn figure(report: &Report) -> Figure {
    let points = &report.figure6;
    let longest = points.iter().map(|point| point.tokens).max().unwrap_or(1);
    let dims = &report.scope.dims;
    let panel = |title: &str,
                 label: &str,
                 ours: fn(&Point) -> f64,
                 cache: fn(&Point) -> f64,
                 measured: bool| {
        let mut marks = vec![];
        let mut values: Vec<f64> =
            points.iter().flat_map(|point| [ours(point), cache(point)]).collect();
        for (d, color) in dims.iter().zip(COLORS) {
            let curve = |of: fn(&Point) -> f64| -> Vec<(f64, f64)> {
                let of_head = points.iter().filter(|point| point.d == *d);
                of_head.map(|point| (point.tokens as f64, of(point))).collect()
            };
            marks.push(Mark::dashed(curve(cache), color));
            if let (true, Some(beside)) = (measured, &report.beside) {
                let sdpa: Vec<(f64, f64)> = beside
                    .decode
                    .iter()
                    .filter(|step| step.d == *d)
                    .map(|step| (step.tokens as f64, step.seconds))
                    .collect();
                values.extend(sdpa.iter().map(|point| point.1));
                marks.push(Mark::Line {
                    points: sdpa.clone(),
                    color: color.into(),
                    style: Style::Dotted,
                });
                marks.push(Mark::dots(sdpa, color));
            }
            marks.push(Mark::line(curve(ours), color));
            marks.push(Mark::dots(curve(ours), color));
        }
        Panel {
            title: title.into(),
            x: Axis::log("tokens in context", 1e3, longest as f64, Numerals::Counts),
            y: Axis::decades(label, values, Numerals::Powers),
            marks,
        }
    };
    let mut keys = vec![];
    for (d, color) in dims.iter().zip(COLORS) {
        keys.push(Key::line(format!("constant cost, d = {d}"), color, Style::Solid));
        keys.push(Key::line(format!("KV cache, d = {d}: a bound"), color, Style::Dashed));
        if report.beside.is_some() {
            keys.push(Key::line(format!("torch SDPA, d = {d}"), color, Style::Dotted));
        }
    }
    Figure {
        id: "figure6-gpu".into(),
        title: format!("Figure 6 · Memory and time of one more token, {}", report.machine.name),
        subtitle: vec![
            "one head, one query, four Taylor terms, f32 sums; a step replayed from a CUDA graph, \
             means over blocks of 64, medians"
                .into(),
            "KV cache in bf16: its bytes at the measured rate of a copy, below which no attention \
             over it can be"
                .into(),
        ],
        columns: 2,
        panels: vec![
            panel(
                "Memory held, per token of context",
                "bytes",
                |point| point.replay.state_bytes as f64 / point.tokens as f64,
                |point| point.cache_bytes as f64 / point.tokens as f64,
                false,
            ),
            panel(
                "Time of one decode step",
                "seconds",
                |point| point.replay.following.seconds,
                |point| point.cache_bound_seconds,
                true,
            ),
        ],
        keys,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_in_f64_is_that_of_the_oracle() {
        let spec = sata::Spec::new(2, 2).terms(3).build().unwrap();
        let (q, k, v) = ([0.5f32, -1.0], [1.0f32, 0.25, -0.5, 0.75], [1.0f32, 2.0, -3.0, 0.5]);
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let shape = sata_oracle::Shape {
            query_heads: 1,
            kv_heads: 1,
            queries: 1,
            keys: 2,
            d_key: 2,
            d_value: 2,
        };
        let (wq, wk, wv) = (wide(&q), wide(&k), wide(&v));
        let mut problem = sata_oracle::Problem::new(shape, &wq, &wk, &wv);
        (problem.causal, problem.terms) = (false, 3);
        let want = sata_oracle::attention(&problem).y;
        for (got, want) in truth(&spec, &q, &k, &v).iter().zip(want) {
            assert!((got - want).abs() < 1e-14);
        }
    }
}
