//! The work of `sata attend`: plan, state, run.

use std::path::Path;
use std::time::Instant;

use sata::{Call, Diagnostics, Form, Plan, Real, Spec, State, View, ViewMut};
use serde::Serialize;

use super::input::Input;
use crate::failure::{Failure, Outcome};
use crate::machine;
use crate::output::Staged;
use crate::tensors::{Number, Tensor};

/// What to do with an input.
pub struct Task<'a> {
    /// The attention.
    pub spec: &'a Spec,
    /// Whether queries see only what is before them.
    pub causal: bool,
    /// Whether a denominator that is not positive is an error.
    pub strict: bool,
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

/// A state, in numbers.
#[derive(Clone, Debug, Serialize)]
pub struct StateReport {
    /// Tokens that its first sequence had seen before.
    pub before: u64,
    /// Tokens that its first sequence has seen now.
    pub after: u64,
    /// Its size.
    pub bytes: usize,
}

/// Runs a task in the number type `E`.
///
/// # Errors
/// Everything that the library refuses.
pub fn compute<E: Number>(task: &Task<'_>, input: &Input) -> Outcome<Done> {
    let [q_shape, k_shape, v_shape] = input.shapes;
    let plan = Plan::new(task.spec)?;
    check_memory::<E>(&plan)?;
    let mut state = match task.state_in {
        Some(path) => Some(load::<E>(&plan, path)?),
        None if task.state_out.is_some() => {
            Some(State::<E::Compute>::new(&plan, k_shape[0], k_shape[1])?)
        }
        None => None,
    };
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
    if let Some(state) = &mut state {
        call = call.state(state);
    }
    let start = Instant::now();
    let ran = plan.run(call.strict(task.strict), ViewMut::new(&mut y, y_shape)?);
    let seconds = start.elapsed().as_secs_f64();
    let diagnostics = ran.map_err(|error| explain(error, task.causal))?;

    let report = state.as_ref().map(|state| StateReport {
        before,
        after: state.position(0),
        bytes: state.bytes(),
    });
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

/// Loads the state of exactly this attention. (The library lets a state serve any series whose
/// orders it holds; from one run of the program to the next, a change is more likely a slip.)
fn load<E: Number>(plan: &Plan, path: &Path) -> Outcome<State<E::Compute>> {
    let state = State::<E::Compute>::load(plan, path)
        .map_err(|error| Failure::from(error).context("--state-in"))?;
    let describe = |spec: &Spec| {
        format!("{:?} with {} terms at scale {}", spec.series(), spec.terms(), spec.scale())
    };
    let (made, asked) = (describe(state.spec()), describe(plan.spec()));
    if made == asked {
        return Ok(state);
    }
    Err(Failure::new(format!(
        "--state-in {}: the state was made for {made}, but the call asks for {asked}",
        path.display()
    )))
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

fn explain(error: sata::Error, causal: bool) -> Failure {
    let causal_lengths = causal && matches!(&error, sata::Error::Shape { argument: "k", .. });
    let failure = Failure::from(error);
    if causal_lengths {
        failure.hint("--full lets every query see all keys, however many of each there are")
    } else {
        failure
    }
}
