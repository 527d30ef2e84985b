//! Slopes, gates, near blocks and diagnostics that cannot be: an error that names the argument and
//! what was wrong with it, and nothing has changed.

mod common;

use common::calls::{blank, part};
use common::{Fade, Inputs, Sizes, rng};
use sata::{Call, Decay, Error, Form, Near, Plan, Series, Spec, SpecBuilder, State, View, ViewMut};

const TOKENS: usize = 6;

fn sizes() -> Sizes {
    Sizes { batch: 2, kv_heads: 2, group: 2, ..Sizes::self_attention(TOKENS, 3, 4) }
}

fn builder() -> SpecBuilder {
    Spec::new(3, 4).terms(3).block(4)
}

/// What a call is given besides queries, keys and values.
#[derive(Clone, Debug, Default)]
struct Given {
    slopes: Option<Vec<f64>>,
    /// With their shape.
    log_gates: Option<(Vec<f32>, [usize; 4])>,
    mask: Option<Vec<bool>>,
    full: bool,
    diagnose: bool,
}

impl Given {
    fn slopes(slopes: &[f64]) -> Self {
        Given { slopes: Some(slopes.to_vec()), ..Given::default() }
    }

    fn gates(shape: [usize; 4]) -> Self {
        let gates = vec![-0.1; shape.iter().product()];
        Given { log_gates: Some((gates, shape)), ..Given::default() }
    }

    /// Gates of the right shape, one of them another.
    fn gate([batch, head, token]: [usize; 3], value: f32) -> Self {
        let mut given = Given::gates([2, 2, TOKENS, 1]);
        if let Some((gates, _)) = &mut given.log_gates {
            gates[(batch * 2 + head) * TOKENS + token] = value;
        }
        given
    }

    fn run(
        &self,
        plan: &Plan,
        inputs: &Inputs<f64>,
        state: Option<&mut State<f64>>,
        y: &mut [f64],
    ) -> Result<(), Error> {
        let (q, k, v) = (inputs.q(), inputs.k(), inputs.v());
        let mut call = if self.full { Call::full(q, k, v) } else { Call::causal(q, k, v) };
        if let Some(mask) = &self.mask {
            call = call.key_mask(mask);
        }
        if let Some(slopes) = &self.slopes {
            call = call.slopes(slopes);
        }
        if let Some((gates, shape)) = &self.log_gates {
            call = call.log_gates(View::new(gates, *shape).unwrap());
        }
        if let Some(state) = state {
            call = call.state(state);
        }
        let out = ViewMut::new(y, inputs.sizes.y()).unwrap();
        plan.run(call.diagnose(self.diagnose), out).map(|_| ())
    }
}

/// A past for a spec, so that a change would show.
fn past(plan: &Plan, inputs: &Inputs<f64>) -> State<f64> {
    let mut state = State::new(plan, 2, 2).unwrap();
    let given = match plan.spec().decay() {
        Decay::None => Given::default(),
        Decay::Slopes => Given::slopes(&[0.1, 0.2]),
        Decay::Gates => Given::gates([2, 2, TOKENS, 1]),
    };
    given.run(plan, inputs, Some(&mut state), &mut blank(inputs.sizes)).unwrap();
    state
}

/// The error of a call in every form, with and without a state, none of which changes anything; its
/// text must have all the words.
#[track_caller]
fn refused(builder: &SpecBuilder, given: &Given, words: &[&str]) -> Error {
    let inputs = Inputs::<f64>::new(&mut rng(), sizes());
    let spec = builder.clone().build().unwrap();
    let mut last = None;
    for form in [None, Some(Form::Direct), Some(Form::State)] {
        let mut plan = Plan::new(&spec).unwrap();
        if let Some(form) = form {
            plan = plan.with_form(form);
        }
        for with_state in [false, true] {
            let mut state = past(&plan, &inputs);
            let before = state.to_bytes();
            let mut y = vec![-7.0; inputs.sizes.y().iter().product()];
            let error = given
                .run(&plan, &inputs, with_state.then_some(&mut state), &mut y)
                .expect_err(&format!("{given:?} {form:?} state={with_state}"));
            let text = error.to_string();
            for word in words {
                assert!(text.contains(word), "'{word}' is not in: {text}");
            }
            assert!(y.iter().all(|&y| y == -7.0), "outputs changed");
            assert!(state.to_bytes() == before, "the state changed");
            last = Some(error);
        }
    }
    last.unwrap()
}

#[test]
fn what_is_right_is_taken() {
    let inputs = Inputs::<f64>::new(&mut rng(), sizes());
    let shape = [2, 2, TOKENS, 1];
    for (decay, given) in [
        (Decay::None, Given::default()),
        (Decay::Slopes, Given::slopes(&[0.0, 1e6])),
        (Decay::Slopes, Given::slopes(&[-0.0, f64::MIN_POSITIVE])),
        (Decay::Gates, Given::gates(shape)),
        (Decay::Gates, Given::gate([1, 1, 3], 0.0)),
        (Decay::Gates, Given::gate([1, 1, 3], -0.0)),
        (Decay::Gates, Given::gate([1, 1, 3], f32::MIN)),
    ] {
        for full in [false, true] {
            let plan = Plan::new(&builder().decay(decay).build().unwrap()).unwrap();
            let mut state = past(&plan, &inputs);
            let given = Given { full, mask: Some(vec![true; 2 * TOKENS]), ..given.clone() };
            let mut y = blank(inputs.sizes);
            given.run(&plan, &inputs, Some(&mut state), &mut y).unwrap();
            assert!(y.iter().all(|y: &f64| y.is_finite()), "{given:?}");
            assert_eq!(state.position(1), 2 * TOKENS as u64);
        }
    }
}

#[test]
fn slopes_must_be_there_exactly_where_the_spec_says() {
    let slopes = builder().decay(Decay::Slopes);
    refused(&slopes, &Given::default(), &["slopes"]);
    refused(&builder(), &Given::slopes(&[0.1, 0.2]), &["slopes"]);
    refused(&builder().decay(Decay::Gates), &Given::default(), &["log_gates"]);
    refused(&builder(), &Given::gates([2, 2, TOKENS, 1]), &["log_gates"]);
    // Both, or the one for the other.
    let both = Given { slopes: Some(vec![0.1; 2]), ..Given::gates([2, 2, TOKENS, 1]) };
    refused(&slopes, &both, &["log_gates"]);
    refused(&builder().decay(Decay::Gates), &both, &["slopes"]);
    refused(&slopes, &Given::gates([2, 2, TOKENS, 1]), &[]);
    refused(&builder().decay(Decay::Gates), &Given::slopes(&[0.1, 0.2]), &[]);
    // In a full call too, and near blocks change nothing about it.
    let full = Given { full: true, ..Given::default() };
    refused(&slopes, &full, &["slopes"]);
    refused(&builder().decay(Decay::Gates), &full, &["log_gates"]);
    refused(&slopes.near(Near::Blocks(1)), &Given::default(), &["slopes"]);
}

#[test]
fn slopes_are_one_per_key_value_head_and_finite() {
    let spec = builder().decay(Decay::Slopes);
    for len in [0, 1, 3, 4] {
        refused(&spec, &Given::slopes(&vec![0.5; len]), &["slopes", &len.to_string()]);
    }
    for (bad, text) in [
        (f64::NAN, "NaN"),
        (f64::INFINITY, "inf"),
        (f64::NEG_INFINITY, "-inf"),
        (-0.125, "-0.125"),
        (-f64::MIN_POSITIVE, "slopes"),
    ] {
        refused(&spec, &Given::slopes(&[0.5, bad]), &["slopes", text]);
        refused(&spec, &Given::slopes(&[bad, 0.5]), &["slopes", text]);
    }
}

#[test]
fn gates_have_the_shape_of_the_keys() {
    let spec = builder().decay(Decay::Gates);
    for shape in [
        [1, 2, TOKENS, 1],
        [3, 2, TOKENS, 1],
        [2, 1, TOKENS, 1],
        // Those of the query heads.
        [2, 4, TOKENS, 1],
        [2, 2, TOKENS - 1, 1],
        [2, 2, TOKENS + 1, 1],
        [2, 2, 0, 1],
        [2, 2, TOKENS, 0],
        [2, 2, TOKENS, 3],
        [2, 2, 1, TOKENS],
    ] {
        let error = refused(&spec, &Given::gates(shape), &["log_gates"]);
        assert!(error.to_string().contains(&format!("{shape:?}")), "{error}");
    }
}

#[test]
fn gates_are_finite_and_forget() {
    let spec = builder().decay(Decay::Gates);
    for place in [[0, 0, 0], [1, 0, 3], [1, 1, TOKENS - 1]] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            match refused(&spec, &Given::gate(place, bad), &["log_gates"]) {
                Error::NonFinite { index, value, .. } => {
                    assert_eq!(index, [place[0], place[1], place[2], 0]);
                    assert!(value == f64::from(bad) || value.is_nan() && bad.is_nan());
                }
                other => panic!("{other:?}"),
            }
        }
        for (bad, text) in [(0.25, "0.25"), (1.0, "1"), (f32::MIN_POSITIVE, "log_gates")] {
            refused(&spec, &Given::gate(place, bad), &["log_gates", text]);
        }
        // A masked key's gate forgets like any other, and is checked like any other.
        let mut mask = vec![true; 2 * TOKENS];
        mask[place[0] * TOKENS + place[2]] = false;
        for bad in [f32::NAN, 0.25] {
            let given = Given { mask: Some(mask.clone()), ..Given::gate(place, bad) };
            refused(&spec, &given, &["log_gates"]);
        }
    }
}

/// Gates of packed sequences are those of all tokens in a row.
#[test]
fn packed_gates_have_a_batch_of_one() {
    let s = Sizes { batch: 1, ..sizes() };
    let inputs = Inputs::<f64>::new(&mut rng(), s);
    let plan = Plan::new(&builder().decay(Decay::Gates).build().unwrap()).unwrap();
    let cu = [0, 2, TOKENS];
    for (shape, fits) in
        [([1, 2, TOKENS, 1], true), ([2, 2, TOKENS / 2, 1], false), ([2, 2, TOKENS, 1], false)]
    {
        let gates = vec![-0.5; shape.iter().product()];
        let mut y = vec![-7.0; s.y().iter().product()];
        let call = Call::causal(inputs.q(), inputs.k(), inputs.v())
            .packed(&cu, &cu)
            .log_gates(View::new(&gates, shape).unwrap());
        let found = plan.run(call, ViewMut::new(&mut y, s.y()).unwrap());
        match found {
            Ok(_) => assert!(fits, "{shape:?}"),
            Err(error) => {
                assert!(!fits && error.to_string().contains("log_gates"), "{shape:?}: {error}");
                assert!(y.iter().all(|&y| y == -7.0));
            }
        }
    }
}

/// A query of a full call stands nowhere, so it has no block.
#[test]
fn near_blocks_need_causal_calls() {
    let full = Given { full: true, ..Given::default() };
    for blocks in [0, 1, 5] {
        let spec = builder().near(Near::Blocks(blocks));
        refused(&spec, &full, &["near", &format!("Blocks({blocks})")]);
        refused(&spec.clone().sinks(3), &full, &["near"]);
        refused(&spec.series(Series::Gauss).terms(4), &full, &["near"]);
    }
}

/// A step has no place for slopes or gates: the error says which call has.
#[test]
fn steps_and_extensions_of_a_spec_with_decay_are_refused() {
    let inputs = Inputs::<f64>::new(&mut rng(), sizes());
    let s = inputs.sizes;
    for (decay, word) in [(Decay::Slopes, "slopes"), (Decay::Gates, "log_gates")] {
        for near in [Near::None, Near::Blocks(1)] {
            let plan = Plan::new(&builder().decay(decay).near(near).build().unwrap()).unwrap();
            let mut state = past(&plan, &inputs);
            let before = state.to_bytes();
            for n in [1, 3] {
                let mut y = vec![-7.0; 2 * 4 * n * 4];
                let (q, k, v) = (
                    part(&inputs.q, s.q(), 0, n),
                    part(&inputs.k, s.k(), 0, n),
                    part(&inputs.v, s.v(), 0, n),
                );
                let out = ViewMut::new(&mut y, [2, 4, n, 4]).unwrap();
                let found = match n {
                    1 => plan.step(&mut state, q, k, v, out),
                    _ => plan.extend(&mut state, q, k, v, out),
                };
                let text = found.unwrap_err().to_string();
                assert!(text.contains(word) && text.contains("run"), "{text}");
                assert!(y.iter().all(|&y| y == -7.0));
                assert!(state.to_bytes() == before);
            }
        }
    }
}

/// A state holds what its spec says is near and how it fades: no other spec may go on with it.
#[test]
fn a_state_of_another_spec_is_refused_by_field() {
    let inputs = Inputs::<f64>::new(&mut rng(), sizes());
    let s = inputs.sizes;
    let base = builder().near(Near::Blocks(1)).sinks(2).decay(Decay::Gates);
    let plan = |builder: &SpecBuilder| Plan::new(&builder.clone().build().unwrap()).unwrap();
    let own = plan(&base);
    let state = past(&own, &inputs);
    let file = state.to_bytes();
    for (field, other) in [
        ("near", base.clone().near(Near::Blocks(2))),
        ("near", base.clone().near(Near::None)),
        ("sinks", base.clone().sinks(3)),
        ("block", base.clone().block(5)),
        ("decay", base.clone().decay(Decay::Slopes)),
        ("decay", base.clone().decay(Decay::None)),
        ("orders", base.clone().terms(4)),
        ("orders", base.clone().series(Series::Gauss).terms(4)),
    ] {
        let other = plan(&other);
        let named = |error: Error| match &error {
            Error::State { field: found, .. } if *found == field => {}
            _ => panic!("wanted {field}: {error:?}"),
        };
        named(State::<f64>::from_bytes(&other, &file, "a state").unwrap_err());
        let fade = Fade::new(&mut rng(), other.spec().decay(), s);
        let (mut fork, mut y) = (state.fork(), vec![-7.0; s.y().iter().product()]);
        let call = Call::causal(inputs.q(), inputs.k(), inputs.v());
        let call = fade.give(call, s, 0, TOKENS).state(&mut fork);
        named(other.run(call, ViewMut::new(&mut y, s.y()).unwrap()).unwrap_err());
        assert!(y.iter().all(|&y| y == -7.0) && fork.to_bytes() == file);
        // Nor do the two merge.
        let next = past(&other, &inputs);
        named(fork.merge(&next).unwrap_err());
        assert!(fork.to_bytes() == file);
    }
    // Neither the scale nor the series is part of it, where the orders are.
    for served in [base.clone().scale(0.1), base.clone().series(Series::hermite()), base.terms(1)] {
        State::<f64>::from_bytes(&plan(&served), &file, "a state").unwrap();
    }
}

/// A past so large that it cannot be is refused before anything is made of it.
#[test]
fn near_parts_beyond_memory_are_refused() {
    for spec in [
        builder().near(Near::Blocks(1 << 50)),
        builder().near(Near::Blocks(usize::MAX)),
        builder().near(Near::Blocks(1 << 40)).block(1 << 40),
        builder().sinks(1 << 60),
        builder().sinks(usize::MAX),
    ] {
        let spec = spec.build();
        // A spec may know by itself that it is too much.
        let Ok(spec) = spec else { continue };
        let plan = match Plan::new(&spec) {
            Ok(plan) => plan,
            Err(Error::TooLarge { .. } | Error::Spec { .. }) => continue,
            Err(other) => panic!("{spec:?}: {other:?}"),
        };
        match State::<f32>::new(&plan, 1, 1) {
            Err(Error::TooLarge { .. }) => {}
            other => panic!("{spec:?}: {:?}", other.map(|_| ())),
        }
    }
}
