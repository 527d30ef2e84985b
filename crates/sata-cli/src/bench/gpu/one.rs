//! One token of one head, replayed from a graph, after contexts of any length.

use half::bf16;
use rayon::prelude::*;
use sata_cuda::{Buffer, Call, Decoder, Plan, State, Step, ViewMut};
use serde::Serialize;

use super::Bench;
use super::attention::Attention;
use super::noise::Of;
use super::timer::{Timing, time};
use crate::failure::{Failure, Outcome};
use crate::table::{grouped, three};

/// Tokens of the shortest context, which longer ones repeat.
pub const SHORTEST: u64 = 1024;
/// Head sizes up to which a target is set, and what it is.
const LARGEST: usize = 32;
const MOST_SECONDS: f64 = 12e-6;

/// One head size and context.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// d_K = d_V.
    pub d: usize,
    /// Tokens in context.
    pub tokens: u64,
    /// Time of a replay.
    pub replay: Replay,
    /// Seconds that a step should take at most.
    pub target: Option<f64>,
}

/// How long one step takes from a graph.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Replay {
    /// Replays that follow each other, as the mean over a block, its fold included.
    pub following: Timing,
    /// One replay, from one point of the stream to the next.
    pub alone: Timing,
    /// Bytes of the state.
    pub state_bytes: usize,
}

/// Measures each head size at some contexts.
///
/// # Errors
/// What the library refuses, or the device has no room for.
pub fn rows(bench: &Bench) -> Outcome<Vec<Row>> {
    let scope = &bench.scope;
    let dims: Vec<usize> = scope.dims.iter().copied().filter(|&d| d <= LARGEST).collect();
    let mut rows = vec![];
    for (d, plan) in dims.iter().copied().zip(plans(bench, &dims)?) {
        let lengths = lengths(scope.longest);
        let some: Vec<u64> = [0, lengths.len() / 3, 2 * lengths.len() / 3, lengths.len() - 1]
            .map(|i| lengths[i])
            .into_iter()
            .collect();
        for_each_context(bench, &plan, |tokens, state| {
            if some.contains(&tokens) {
                let replay = replay(bench, &plan, state)?;
                bench.progress(&said(d, tokens, &replay));
                let target = (!scope.quick).then_some(MOST_SECONDS);
                rows.push(Row { d, tokens, replay, target });
            }
            Ok(())
        })?;
    }
    Ok(rows)
}

/// What was measured, for those who wait.
pub fn said(d: usize, tokens: u64, replay: &Replay) -> String {
    format!(
        "one head, d={d}, after {} tokens: {} µs a step, {} µs alone",
        grouped(tokens.into()),
        three(1e6 * replay.following.seconds),
        three(1e6 * replay.alone.seconds)
    )
}

/// Plans of the paper's setting, the kernels of one head compiled side by side.
///
/// # Errors
/// What the library refuses.
pub fn plans(bench: &Bench, dims: &[usize]) -> Outcome<Vec<Plan>> {
    dims.par_iter()
        .map(|&d| {
            let plan = Plan::new(&bench.device, &Attention::paper(d).spec()?)?;
            Decoder::new::<bf16>(&plan, &State::new(&plan, 1, 1)?, 1, 1)?;
            Ok(plan)
        })
        .collect()
}

/// Context lengths, each four times the one before, and the longest.
pub fn lengths(longest: u64) -> Vec<u64> {
    let mut all: Vec<u64> = std::iter::successors(Some(SHORTEST), |n| n.checked_mul(4))
        .take_while(|&n| n < longest)
        .collect();
    all.push(longest.max(SHORTEST));
    all.dedup();
    all
}

/// Calls `each` with states of contexts of [`lengths`].
///
/// A state costs the same wherever it stands, so it need not be filled token by token: the first
/// tokens are absorbed by the device, and the pasts of longer contexts are merged from shorter ones
/// of the same tokens, over and over.
///
/// # Errors
/// What the library refuses, and what `each` fails with.
pub fn for_each_context(
    bench: &Bench,
    plan: &Plan,
    mut each: impl FnMut(u64, State) -> Outcome,
) -> Outcome {
    let mut state = State::new(plan, 1, 1)?;
    absorb(bench, plan, &mut state, SHORTEST)?;
    let mut host = state.to_host(plan)?;
    for tokens in lengths(bench.scope.longest) {
        while host.position(0) < tokens {
            let again = host.fork();
            host.merge(&again)?;
        }
        each(host.position(0), State::from_host(plan, &host)?)?;
    }
    Ok(())
}

/// Tokens of a call that absorbs a long context.
const CALL: u64 = 1 << 16;

/// Puts the first `tokens` random tokens into an empty state of one head, answering each.
///
/// # Errors
/// What the library refuses.
pub fn absorb(bench: &Bench, plan: &Plan, state: &mut State, tokens: u64) -> Outcome {
    let d = plan.spec().d_key();
    let mut y = Buffer::<bf16>::uninit(&bench.device, CALL.min(tokens) as usize * d)?;
    for first in (0..tokens).step_by(CALL as usize) {
        let shape = [1, 1, CALL.min(tokens - first) as usize, d];
        let view = |of| bench.noise.view_at(of, first as usize * d, shape);
        let call =
            Call::causal(view(Of::Queries)?, view(Of::Keys)?, view(Of::Values)?).state(&mut *state);
        plan.enqueue(call, ViewMut::new(&mut y, shape)?)?;
    }
    Ok(bench.device.synchronize()?)
}

/// Measures steps of a state, which takes their tokens.
///
/// # Errors
/// What the library refuses.
pub fn replay(bench: &Bench, plan: &Plan, mut state: State) -> Outcome<Replay> {
    let (device, d) = (&bench.device, plan.spec().d_key());
    let decoder = Decoder::new::<bf16>(plan, &state, 1, 1)?;
    let shape = [1, 1, 1, d];
    let mut y = Buffer::<bf16>::uninit(device, d)?;
    let step = Step::new(
        bench.noise.view(Of::Queries, shape)?,
        bench.noise.view(Of::Keys, shape)?,
        bench.noise.view(Of::Values, shape)?,
    );
    let state_bytes = state.bytes();
    // SAFETY: state, decoder and output outlive the graph.
    let graph = unsafe {
        device.capture::<Failure>(|| {
            Ok(decoder.step(&mut state, &step, ViewMut::new(&mut y, shape)?)?)
        })
    }?;
    let block = plan.spec().block();
    for _ in 0..block {
        graph.launch()?;
    }
    device.synchronize()?;
    let following = time(device, bench.scope.runs, block, || Ok(graph.launch()?))?;
    device.synchronize()?;
    let mut alone = vec![];
    for _ in 0..block {
        let before = device.record()?;
        graph.launch()?;
        alone.push(device.record()?.since(&before)?);
    }
    drop(graph);
    Ok(Replay { following, alone: Timing::new(alone, 1), state_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_end_with_the_longest() {
        assert_eq!(lengths(1 << 12), [1 << 10, 1 << 12]);
        assert_eq!(lengths(1 << 13), [1 << 10, 1 << 12, 1 << 13]);
        assert_eq!(lengths(1), [1 << 10]);
        assert_eq!(lengths(1 << 27).len(), 10);
    }
}
