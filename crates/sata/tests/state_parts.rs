//! States as plain numbers: the same state comes of them, and what no state holds is refused.

mod common;

use common::rng;
use common::states::load;
use rand::Rng;
use rand::rngs::StdRng;
use sata::{
    Call, Centre, Decay, Error, Near, Plan, Real, Series, Spec, State, StateParts, View, ViewMut,
};

/// A past of 0 to 40 random tokens, some of them masked.
fn past<T: Real>(rng: &mut StdRng, plan: &Plan, centred: bool) -> State<T> {
    let (heads, tokens) = (2, rng.random_range(0..40));
    let mut state = if centred {
        let centre = Centre::new(heads, &[0.5; 6], &[0.25; 4]).unwrap();
        State::centred(plan, 3, heads, centre).unwrap()
    } else {
        State::new(plan, 3, heads).unwrap()
    };
    let (q, k): (Vec<T>, Vec<T>) = {
        let mut draw = || common::normal(rng, 3 * heads * tokens * 3);
        (draw(), draw())
    };
    let v: Vec<T> = common::normal(rng, 3 * heads * tokens * 2);
    let gates: Vec<f32> = (0..3 * heads * tokens).map(|_| -rng.random_range(0.0..0.5)).collect();
    let mask: Vec<bool> = (0..3 * tokens).map(|_| rng.random_bool(0.8)).collect();
    let shape = |dim| [3, heads, tokens, dim];
    let mut call = Call::causal(
        View::new(&q, shape(3)).unwrap(),
        View::new(&k, shape(3)).unwrap(),
        View::new(&v, shape(2)).unwrap(),
    );
    if plan.spec().decay() == Decay::Gates {
        call = call.log_gates(View::new(&gates, shape(1)).unwrap());
    }
    let mut y = vec![T::ZERO; 3 * heads * tokens * 2];
    let out = ViewMut::new(&mut y, shape(2)).unwrap();
    plan.run(call.key_mask(&mask).state(&mut state), out).unwrap();
    state
}

type Change = fn(&mut StateParts<f32>);

fn plans() -> Vec<Plan> {
    let specs = [
        Spec::new(3, 2).block(5),
        Spec::new(3, 2).block(4).near(Near::Blocks(1)).sinks(6).decay(Decay::Gates),
        Spec::new(3, 2).block(8).series(Series::power(2)).sinks(3),
        Spec::new(3, 2).block(70).series(Series::Gauss).decay(Decay::Gates),
    ];
    specs.map(|spec| Plan::new(&spec.build().unwrap()).unwrap()).into()
}

fn check_round_trip<T: Real>() {
    let mut rng = rng();
    for plan in plans() {
        for round in 0..8 {
            let centred = round % 2 == 1 && *plan.spec().series() != Series::power(2);
            let state = past::<T>(&mut rng, &plan, centred);
            let parts = state.to_parts();
            let again = State::from_parts(&plan, 2, &parts).unwrap();
            assert!(again.to_bytes() == state.to_bytes(), "{:?}", plan.spec());
            assert_eq!(again.to_parts(), parts);
            assert_eq!(again.bytes(), state.bytes());
            let loaded: State<T> = load(&plan, &state.to_bytes()).unwrap();
            assert_eq!(loaded.to_parts(), parts);
            assert_eq!(parts.open_weights.len(), 6 * state.capacity());
        }
    }
}

#[test]
fn a_state_comes_back_bit_for_bit() {
    check_round_trip::<f32>();
    check_round_trip::<f64>();
}

#[test]
fn parts_of_another_length_are_refused_by_name() {
    let plan = &plans()[1];
    let parts = State::<f32>::new(plan, 3, 2).unwrap().to_parts();
    let changed: [(&str, Change); 18] = [
        ("state", |p| p.positions.clear()),
        ("open", |p| p.open.push(0)),
        ("counts", |p| p.counts.truncate(3)),
        ("lags", |p| p.lags.clear()),
        ("totals", |p| p.totals.push(0.0)),
        ("reaches", |p| p.reaches.push(0.0)),
        ("sums", |p| p.sums.truncate(1)),
        ("sums_low", |p| p.sums_low.clear()),
        ("z", |p| p.z.push(0.0)),
        ("z_low", |p| p.z_low.clear()),
        ("open_keys", |p| p.open_keys.truncate(9)),
        ("open_values", |p| p.open_values.clear()),
        ("open_weights", |p| p.open_weights.clear()),
        ("open_fading", |p| p.open_fading.clear()),
        ("sink_keys", |p| p.sink_keys.clear()),
        ("sink_values", |p| p.sink_values.push(0.0)),
        ("sink_weights", |p| p.sink_weights.clear()),
        ("sink_fading", |p| p.sink_fading.push(0.0)),
    ];
    for (part, change) in changed {
        let mut parts = parts.clone();
        change(&mut parts);
        match State::from_parts(plan, 2, &parts) {
            Err(Error::Shape { argument, .. }) => assert_eq!(argument, part),
            other => panic!("{part}: {:?}", other.map(|_| ())),
        }
    }
    assert!(matches!(State::from_parts(plan, 1, &parts), Err(Error::Shape { .. })));
    let mut centred = parts.clone();
    centred.centre = Some(Centre::new(2, &[0.0; 4], &[0.0; 4]).unwrap());
    let refused = State::from_parts(plan, 2, &centred);
    assert!(matches!(refused, Err(Error::Shape { argument: "centre", .. })));
}

#[test]
fn what_no_state_holds_is_refused() {
    let plan = &plans()[1];
    let mut parts = State::<f32>::new(plan, 1, 1).unwrap().to_parts();
    // 13 tokens in blocks of 4 with the block before near: 8 folded, 6 of them sinks, 5 open.
    parts.positions = vec![13];
    parts.open = vec![5];
    parts.counts = vec![2];
    parts.sink_weights[..6].fill(1.0);
    parts.open_weights[..5].fill(1.0);
    let fine = State::from_parts(plan, 1, &parts).unwrap();
    assert_eq!((fine.position(0), fine.to_parts()), (13, parts.clone()));
    let changed: [(&str, Change); 15] = [
        ("positions", |p| p.open[0] = 9),
        ("positions", |p| p.open[0] = 4),
        ("positions", |p| p.positions[0] = u64::MAX),
        ("positions", |p| p.positions[0] = 3),
        ("counts", |p| p.counts[0] = 14),
        ("lags", |p| p.lags[0] = 1e-9),
        ("totals", |p| p.totals[0] = f64::NEG_INFINITY),
        ("open_fading", |p| p.open_fading[2] = f64::NAN),
        ("sink_fading", |p| p.sink_fading[0] = 0.5),
        ("reaches", |p| p.reaches[0] = -1.0),
        ("open_weights", |p| p.open_weights[1] = 0.5),
        ("open_weights", |p| {
            p.open_weights[1] = 0.0;
            p.open_keys[4] = 1.0;
        }),
        ("sink_weights", |p| p.sink_weights[5] = -1.0),
        ("sums", |p| {
            p.counts[0] = 0;
            p.z[3] = 1.0;
        }),
        // Its last sinks wait in the open blocks, without a weight there.
        ("open_weights", |p| {
            p.positions[0] = 7;
            p.open[0] = 7;
        }),
    ];
    for (i, (part, change)) in changed.into_iter().enumerate() {
        let mut parts = parts.clone();
        change(&mut parts);
        match State::from_parts(plan, 1, &parts) {
            Err(Error::Part { part: named, reason }) => assert_eq!(named, part, "{i}: {reason}"),
            other => panic!("{i}, {part}: {:?}", other.map(|_| ())),
        }
    }
}
