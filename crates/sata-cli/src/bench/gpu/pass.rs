//! One call, forward or forward and backward, ready to be enqueued again and again.

use sata::Diagnostics;
use sata_cuda::{Buffer, Call, Element, Gradients, Pending, Plan, View, ViewMut};

use super::attention::Attention;
use super::noise::{Noise, Of};
use super::timer::{Timing, time};
use super::{Bench, noise};
use crate::failure::Outcome;

/// Shortest measurement, seconds: calls that are shorter are measured several at once.
const SHORTEST: f64 = 5e-3;
/// Calls of one measurement at most.
const MOST_CALLS: usize = 32;

/// Batch, heads and tokens of a call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    pub batch: usize,
    pub heads: usize,
    pub tokens: usize,
}

/// A call and what it writes to.
struct Pass<'b, E> {
    plan: &'b Plan,
    noise: &'b Noise<E>,
    attention: Attention,
    shape: [usize; 4],
    gates: Option<Buffer<f32>>,
    y: Buffer<E>,
    /// By q, k, v, and gates, where there is a backward pass.
    back: Option<([Buffer<E>; 3], Buffer<f32>)>,
}

impl<'b, E: Element> Pass<'b, E> {
    fn new(
        plan: &'b Plan,
        noise: &'b Noise<E>,
        attention: Attention,
        shape: Shape,
        both: bool,
    ) -> Outcome<Self> {
        let device = plan.device();
        let Shape { batch, heads, tokens } = shape;
        let shape = [batch, heads, tokens, attention.d];
        let (n, rows) = (shape.iter().product(), batch * heads * tokens);
        let out = || Buffer::<E>::uninit(device, n);
        let back = match both {
            true => Some(([out()?, out()?, out()?], Buffer::uninit(device, rows)?)),
            false => None,
        };
        let gates = if attention.trained { Some(noise::gates(device, rows)?) } else { None };
        Ok(Pass { plan, noise, attention, shape, gates, y: out()?, back })
    }

    fn once(&mut self) -> Outcome<Pending> {
        let Pass { plan, noise, attention, shape, gates, y, back } = self;
        let shape = *shape;
        let [batch, heads, tokens, _] = shape;
        let gate_shape = [batch, heads, tokens, 1];
        let call = || -> Outcome<Call<'_, '_, E>> {
            let q = noise.view(Of::Queries, shape)?;
            let (k, v) = (noise.view(Of::Keys, shape)?, noise.view(Of::Values, shape)?);
            let call = if attention.causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
            Ok(match &*gates {
                Some(gates) => call.log_gates(View::new(gates, gate_shape)?),
                None => call,
            })
        };
        let pending = plan.enqueue(call()?, ViewMut::new(y, shape)?)?;
        if let Some(([q, k, v], by_gates)) = back {
            let mut out = Gradients::new(
                ViewMut::new(q, shape)?,
                ViewMut::new(k, shape)?,
                ViewMut::new(v, shape)?,
            );
            if gates.is_some() {
                out = out.log_gates(ViewMut::new(by_gates, gate_shape)?);
            }
            plan.backward(call()?, noise.view(Of::Outputs, shape)?, out)?;
        }
        Ok(pending)
    }
}

/// Time of a call, and what it was made with.
pub struct Measured {
    /// Of one call.
    pub timing: Timing,
    /// Heads that it had: fewer than asked for where all would have taken too long.
    pub heads: usize,
    /// Of the last call.
    pub diagnostics: Diagnostics,
}

/// Measures a plan's calls.
///
/// # Errors
/// What the library refuses, or the device has no room for.
pub fn measure<E: Element>(
    bench: &Bench,
    noise: &Noise<E>,
    plan: &Plan,
    attention: Attention,
    shape: Shape,
    both: bool,
) -> Outcome<Measured> {
    let (device, scope) = (&bench.device, &bench.scope);
    let mut heads = shape.heads;
    let mut runs = scope.runs;
    // A few heads first: they say how long all of them will take.
    let few = Shape { heads: heads.div_ceil(8), ..shape };
    let mut pass = Pass::new(plan, noise, attention, few, both)?;
    pass.once()?.wait()?;
    let each = time(device, 1, 1, || pass.once().map(drop))?.seconds / few.heads as f64;
    drop(pass);
    let most = scope.budget / (runs + 2) as f64;
    if each * heads as f64 > most {
        heads = ((most / each) as usize).clamp(1, heads);
        if each * heads as f64 > 3.0 * most {
            runs = runs.min(3);
        }
    }
    let mut pass = Pass::new(plan, noise, attention, Shape { heads, ..shape }, both)?;
    let mut diagnostics = pass.once()?.wait()?;
    let one = time(device, 1, 1, || {
        let pending = pass.once()?;
        drop(pending);
        Ok(())
    })?;
    let per = ((SHORTEST / one.seconds).ceil() as usize).clamp(1, MOST_CALLS);
    let timing = time(device, runs, per, || pass.once().map(drop))?;
    diagnostics.first = None;
    Ok(Measured { timing, heads, diagnostics })
}

/// Makes a plan and compiles what its calls need, by a call of a few tokens.
///
/// # Errors
/// As for [`measure`].
pub fn warm<E: Element>(
    bench: &Bench,
    noise: &Noise<E>,
    attention: Attention,
    both: bool,
) -> Outcome<Plan> {
    let spec = attention.spec()?;
    let shape = Shape { batch: 1, heads: 1, tokens: 512.min(bench.scope.tokens) };
    for form in [sata::Form::State, sata::Form::Direct] {
        let plan = Plan::new(&bench.device, &spec)?.with_form(form);
        Pass::new(&plan, noise, attention, shape, both)?.once()?.wait()?;
    }
    Ok(Plan::new(&bench.device, &spec)?)
}
