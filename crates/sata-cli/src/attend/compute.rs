//! The work of `sata attend`: plan, state, run.

use std::path::Path;
use std::time::Instant;

use sata::{Call, Diagnostics, Form, Plan, Real, Spec, View, ViewMut};

use super::decay::Fading;
use super::input::Input;
use super::past::{StateReport, past};
use crate::failure::{Failure, Outcome};
use crate::machine;
use crate::output::Staged;
use crate::tensors::{Number, Tensor};

/// What to do with an input.
pub struct Task<'a> {
    /// The attention.
    pub spec: &'a Spec,
    /// How weights fade.
    pub fading: &'a Fading<'a>,
    /// Whether queries see only what is before them.
    pub causal: bool,
    /// Whether a denominator that is not positive is an error.
    pub strict: bool,
    /// Whether to look at every head's logits.
    pub diagnose: bool,
    /// Whether keys and values are summed less their means.
    pub center: bool,
    /// The past to continue from.
    pub state_in: Option<&'a Path>,
    /// Where the past is left.
    pub state_out: Option<&'a Staged>,
}

/// What came of it.
#[derive(Debug)]
pub struct Done {
    /// The outputs.
    pub y: Tensor,
    /// What their denominators were like.
    pub diagnostics: Diagnostics,
    /// Number of features D.
    pub features: u128,
    /// Direct or state.
    pub form: Form,
    /// The kernels' name.
    pub kernels: &'static str,
    /// The instruction set.
    pub level: String,
    /// Seconds of the attention itself.
    pub seconds: f64,
    /// The state left, if one was asked for.
    pub state: Option<StateReport>,
}

/// Runs a task in the number type `E`.
///
/// # Errors
/// Everything that the library refuses.
pub fn compute<E: Number>(task: &Task<'_>, input: &Input) -> Outcome<Done> {
    let [q_shape, k_shape, v_shape] = input.shapes;
    let plan = Plan::new(task.spec)?;
    check_memory::<E>(&plan)?;
    let mut state = past::<E>(&plan, task, input)?;
    let before = state.as_ref().map_or(0, |state| state.position(0));

    let (q, k, v) = (E::take(&input.q.data), E::take(&input.k.data), E::take(&input.v.data));
    let (q, k, v) = (View::new(&q, q_shape)?, View::new(&k, k_shape)?, View::new(&v, v_shape)?);
    let y_shape = [q_shape[0], q_shape[1], q_shape[2], v_shape[3]];
    let mut y = vec![E::from_compute(<E::Compute as Real>::ZERO); y_shape.iter().product()];

    let units = k_shape[0] * k_shape[1];
    let group = (q_shape[1] / k_shape[1]).max(1);
    let lengths = [q_shape[2], k_shape[2]];
    let recipe =
        plan.recipe::<E>([units, group], lengths, task.causal, state.is_some(), machine::threads());

    let mut call = if task.causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
    if let Some(mask) = &input.key_mask {
        call = call.key_mask(mask);
    }
    if let Some(slopes) = task.fading.slopes() {
        call = call.slopes(slopes);
    }
    if let Some(gates) = task.fading.gates() {
        let [batch, heads, keys, _] = k_shape;
        call = call.log_gates(View::new(&gates.logs, [batch, heads, keys, 1])?);
    }
    if let Some(state) = &mut state {
        call = call.state(state);
    }
    let call = call.strict(task.strict).diagnose(task.diagnose);
    let start = Instant::now();
    let ran = plan.run(call, ViewMut::new(&mut y, y_shape)?);
    let seconds = start.elapsed().as_secs_f64();
    let diagnostics = ran.map_err(|error| explain(error, task))?;

    let report = state.as_ref().map(|state| StateReport::new(state, before));
    if let (Some(staged), Some(state)) = (task.state_out, &state) {
        state.save(staged.path()).map_err(|error| Failure::from(error).context("--state-out"))?;
    }
    let mut shape = input.q.shape.clone();
    if let Some(last) = shape.last_mut() {
        *last = v_shape[3];
    }
    Ok(Done {
        y: Tensor { shape, data: E::wrap(y) },
        diagnostics,
        features: recipe.features,
        form: recipe.form,
        kernels: recipe.kernels,
        level: plan.level().to_string(),
        seconds,
        state: report,
    })
}

/// Refuses a D whose state this machine could not hold, whether or not this call would make one.
fn check_memory<E: Number>(plan: &Plan) -> Outcome {
    let bytes = plan.state_bytes::<E>();
    let limit = machine::available_memory().unwrap_or(isize::MAX as u128);
    if bytes <= limit {
        return Ok(());
    }
    let (d_key, orders) = (plan.spec().d_key(), plan.spec().orders());
    let features = sata::basis::features(d_key, &orders);
    let what = "the state of one head";
    Err(sata::Error::TooLarge { d_key, orders, features, what, bytes, limit }.into())
}

fn explain(error: sata::Error, task: &Task<'_>) -> Failure {
    use sata::Error::{NonFinite, Shape, Spec};
    let causal_lengths = task.causal && matches!(&error, Shape { argument: "k", .. });
    let gate =
        matches!(&error, NonFinite { argument: "log_gates", .. } | Spec { field: "log_gates", .. });
    let failure = Failure::from(error);
    match task.fading.gates() {
        Some(gates) if gate => failure.context(format!("--gates {}", gates.name)),
        _ if causal_lengths => {
            failure.hint("--full lets every query see all keys, however many of each there are")
        }
        _ => failure,
    }
}
