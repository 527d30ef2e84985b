//! The past that a call continues from or leaves.

use std::path::Path;

use sata::{Plan, Real, Spec, State};
use serde::Serialize;

use super::centre::centre;
use super::compute::Task;
use super::input::Input;
use super::report::series;
use crate::failure::{Failure, Outcome};
use crate::tensors::Number;

/// A state, in numbers.
#[derive(Clone, Debug, Serialize)]
pub struct StateReport {
    /// Tokens that its first sequence had seen before.
    pub before: u64,
    /// Tokens that its first sequence has seen now.
    pub after: u64,
    /// Its size.
    pub bytes: usize,
    /// Whether it keeps keys and values less a constant.
    pub centred: bool,
}

impl StateReport {
    /// What became of a state that had seen `before` tokens.
    pub fn new<T: Real>(state: &State<T>, before: u64) -> Self {
        StateReport {
            before,
            after: state.position(0),
            bytes: state.bytes(),
            centred: state.centre().is_some(),
        }
    }
}

/// The state that a call needs, if it needs one.
///
/// # Errors
/// A state that cannot be read, was made for another attention, or has no room.
pub fn past<E: Number>(
    plan: &Plan,
    task: &Task<'_>,
    input: &Input,
) -> Outcome<Option<State<E::Compute>>> {
    let [batch, heads, ..] = input.shapes[1];
    if let Some(path) = task.state_in {
        return load::<E>(plan, path).map(Some);
    }
    if task.center {
        let centre = centre::<E>(input, task.causal)?;
        return Ok(Some(State::centred(plan, batch, heads, centre)?));
    }
    match task.state_out {
        Some(_) => Ok(Some(State::new(plan, batch, heads)?)),
        None => Ok(None),
    }
}

/// Loads the state of exactly this attention. (The library lets a state serve any series whose
/// orders it holds; from one run of the program to the next, a change is more likely a slip.)
fn load<E: Number>(plan: &Plan, path: &Path) -> Outcome<State<E::Compute>> {
    let state = State::<E::Compute>::load(plan, path)
        .map_err(|error| Failure::from(error).context("--state-in"))?;
    let fields = |spec: &Spec| (spec.series().clone(), spec.terms(), spec.scale());
    if fields(state.spec()) == fields(plan.spec()) {
        return Ok(state);
    }
    let describe = |spec: &Spec| format!("{}, scale {}", series(spec), spec.scale());
    Err(Failure::new(format!(
        "--state-in {}: the state was made for {}, but the call asks for {}",
        path.display(),
        describe(state.spec()),
        describe(plan.spec())
    )))
}
