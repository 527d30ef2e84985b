//! Plans and states for tests of states.

use std::ops::Range;

use sata::{Error, Plan, Real, Series, Spec, State, ViewMut};

use super::calls::part;
use super::{Inputs, Sizes, rng};

pub fn plan(d_key: usize, d_value: usize, series: Series, block: usize) -> Plan {
    Plan::new(&Spec::new(d_key, d_value).series(series).block(block).build().unwrap()).unwrap()
}

pub fn taylor(d_key: usize, d_value: usize, terms: usize, block: usize) -> Plan {
    Plan::new(&Spec::new(d_key, d_value).terms(terms).block(block).build().unwrap()).unwrap()
}

/// Tokens `range` through `state`; outputs `[batch, query_heads, range, d_value]`.
pub fn extend<T: Real>(
    plan: &Plan,
    state: &mut State<T>,
    inputs: &Inputs<T>,
    range: Range<usize>,
) -> Vec<T> {
    let (s, from, n) = (inputs.sizes, range.start, range.len());
    let shape = [s.batch, s.kv_heads * s.group, n, s.d_value];
    let mut y = vec![T::from_f64(f64::NAN); shape.iter().product()];
    let q = part(&inputs.q, s.q(), from, n);
    let k = part(&inputs.k, s.k(), from, n);
    let v = part(&inputs.v, s.v(), from, n);
    plan.extend(state, q, k, v, ViewMut::new(&mut y, shape).unwrap()).unwrap();
    y
}

pub fn load<T: Real>(plan: &Plan, bytes: &[u8]) -> Result<State<T>, Error> {
    State::from_bytes(plan, bytes, "there.safetensors")
}

/// A small state with something in every tensor.
pub fn small<T: Real>(plan: &Plan) -> State<T> {
    let mut rng = rng();
    let spec = plan.spec();
    let inputs = Inputs::<T>::new(&mut rng, Sizes::self_attention(5, spec.d_key(), spec.d_value()));
    let mut state = State::new(plan, 1, 1).unwrap();
    extend(plan, &mut state, &inputs, 0..5);
    state
}

#[track_caller]
pub fn assert_field(error: Error, want: &str) {
    match &error {
        Error::State { field, .. } if *field == want => {}
        _ => panic!("wanted Error::State about {want}, got {error:?}"),
    }
}
