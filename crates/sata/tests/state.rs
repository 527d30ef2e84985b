//! States: packed, masked, merged, forked, shared between series, and refused.

mod common;
#[path = "common/forged.rs"]
mod forged;

use std::ops::Range;

use common::calls::bits;
use common::states::{assert_field, extend, load, plan, small, taylor};
use common::{Inputs, Sizes, assert_close, rng, tolerance};
use forged::Forged;
use sata::{Call, Form, Plan, Real, Series, Spec, State, View, ViewMut};

#[test]
fn packed_sequences_have_their_own_lengths() {
    let mut rng = rng();
    let plan = taylor(4, 5, 3, 8);
    let lengths = [[0, 7, 24, 1, 8], [9, 1, 3, 0, 8]];
    let mut state = State::<f64>::new(&plan, 5, 2).unwrap();
    let mut loaded = state.clone();
    for (round, lengths) in lengths.iter().enumerate() {
        let mut cu = vec![0];
        lengths.iter().for_each(|n| cu.push(cu[cu.len() - 1] + n));
        let total = cu[5];
        let sizes = Sizes { group: 2, kv_heads: 2, ..Sizes::self_attention(total, 4, 5) };
        let inputs = Inputs::<f64>::new(&mut rng, sizes);
        let run = |state: &mut State<f64>| {
            let mut y = vec![f64::NAN; total * 4 * 5];
            let call = Call::causal(inputs.q(), inputs.k(), inputs.v()).packed(&cu, &cu);
            plan.run(call.state(state), ViewMut::new(&mut y, sizes.y()).unwrap()).unwrap();
            y
        };
        assert_eq!(bits(&run(&mut state)), bits(&run(&mut loaded)));
        let file = state.to_bytes();
        loaded = load(&plan, &file).unwrap();
        assert!(loaded.to_bytes() == file);
        for i in 0..5 {
            let seen: u64 =
                (0..=round).map(|round| [[0, 7, 24, 1, 8], [9, 1, 3, 0, 8]][round][i]).sum();
            assert_eq!(loaded.position(i), seen);
        }
    }
}

#[test]
fn masked_tokens_stay_masked() {
    let mut rng = rng();
    let plan = taylor(3, 2, 3, 64);
    let sizes = Sizes::self_attention(20, 3, 2);
    let inputs = Inputs::<f64>::new(&mut rng, sizes).masked(&mut rng);
    let mask = inputs.mask.as_ref().unwrap();
    let mut state = State::<f64>::new(&plan, 1, 1).unwrap();
    let mut y = vec![0.0; 40];
    let call = Call::causal(inputs.q(), inputs.k(), inputs.v()).key_mask(mask).state(&mut state);
    plan.run(call, ViewMut::new(&mut y, sizes.y()).unwrap()).unwrap();
    let weights = &Forged::read(&state.to_bytes()).unwrap().tensors["open_weights"].data;
    for (t, weight) in weights.chunks(8).enumerate() {
        let want = if t < 20 && mask[t] { 1.0 } else { 0.0 };
        assert_eq!(f64::from_le_bytes(weight.try_into().unwrap()), want);
    }
    assert!(load::<f64>(&plan, &state.to_bytes()).unwrap().to_bytes() == state.to_bytes());
}

#[test]
fn merging_is_one_run_over_all() {
    fn one<T: Real>(cuts: [usize; 2], block: usize) {
        let mut rng = rng();
        let plan = taylor(5, 6, 3, block);
        let tokens = 140;
        let sizes =
            Sizes { batch: 2, kv_heads: 2, group: 2, ..Sizes::self_attention(tokens, 5, 6) };
        let inputs = Inputs::<T>::new(&mut rng, sizes);
        let want = inputs.oracle(3, &Series::Taylor, true);
        let made = |range: Range<usize>| {
            let mut state = State::<T>::new(&plan, 2, 2).unwrap();
            extend(&plan, &mut state, &inputs, range);
            state
        };
        let merged = |mut a: State<T>, b: &State<T>| {
            let bytes = a.bytes();
            a.merge(b).unwrap();
            assert_eq!(a.bytes(), bytes);
            a
        };
        let [a, b, c] = [made(0..cuts[0]), made(cuts[0]..cuts[1]), made(cuts[1]..120)];
        let left = merged(merged(a.fork(), &b), &c);
        let right = merged(a.fork(), &merged(b.fork(), &c));
        let empty = State::<T>::new(&plan, 2, 2).unwrap();
        let around = merged(merged(empty.fork(), &left), &empty);
        // The last 20 tokens read the past from the merged state.
        for (what, state) in
            [("left", left), ("right", right), ("around", around), ("one", made(0..120))]
        {
            assert_eq!(state.position(0), 120, "{what}");
            assert_eq!(state.position(1), 120, "{what}");
            // A merged state can be saved wherever its open block begins.
            let mut state = load::<T>(&plan, &state.to_bytes()).unwrap();
            let y = extend(&plan, &mut state, &inputs, 120..tokens);
            let want: Vec<f64> =
                want.chunks(tokens * 6).flat_map(|head| head[120 * 6..].to_vec()).collect();
            assert_close(&format!("{what} {cuts:?} {}", T::NAME), &y, &want, tolerance::<T>());
        }
    }
    for cuts in [[50, 75], [64, 96], [0, 1], [17, 17], [119, 120], [120, 120]] {
        one::<f64>(cuts, 32);
        one::<f32>(cuts, 32);
    }
    one::<f64>([50, 75], 1);
}

#[test]
fn states_of_other_kinds_do_not_merge() {
    let mut state = State::<f64>::new(&taylor(3, 2, 3, 8), 2, 2).unwrap();
    let before = state.to_bytes();
    for (field, plan, counts) in [
        ("sequences", taylor(3, 2, 3, 8), [1, 2]),
        ("kv_heads", taylor(3, 2, 3, 8), [2, 1]),
        ("d_key", taylor(4, 2, 3, 8), [2, 2]),
        ("d_value", taylor(3, 1, 3, 8), [2, 2]),
        ("block", taylor(3, 2, 3, 9), [2, 2]),
        ("orders", taylor(3, 2, 2, 8), [2, 2]),
        ("orders", taylor(3, 2, 4, 8), [2, 2]),
    ] {
        let other = State::new(&plan, counts[0], counts[1]).unwrap();
        assert_field(state.merge(&other).unwrap_err(), field);
        assert!(state.to_bytes() == before);
    }
}

#[test]
fn forks_are_independent_and_reset_forgets() {
    let mut rng = rng();
    let plan = taylor(4, 3, 4, 8);
    let inputs = Inputs::<f32>::new(&mut rng, Sizes::self_attention(60, 4, 3));
    let mut state = State::<f32>::new(&plan, 1, 1).unwrap();
    let (new, size) = (state.to_bytes(), state.bytes());
    extend(&plan, &mut state, &inputs, 0..30);
    let half = state.to_bytes();
    let mut fork = state.fork();
    let a = extend(&plan, &mut state, &inputs, 30..60);
    assert!(fork.to_bytes() == half);
    let b = extend(&plan, &mut fork, &inputs, 30..60);
    assert_eq!(bits(&a), bits(&b));
    state.reset();
    assert!(state.to_bytes() == new);
    assert_eq!(state.position(0), 0);
    let c = extend(&plan, &mut state, &inputs, 0..60);
    let mut fresh = State::new(&plan, 1, 1).unwrap();
    assert_eq!(bits(&c), bits(&extend(&plan, &mut fresh, &inputs, 0..60)));
    assert_eq!(fork.position(0), 60);
    assert_eq!(state.bytes(), size);
}

#[test]
fn nothing_grows() {
    let mut rng = rng();
    let plan = taylor(4, 3, 4, 8);
    let inputs = Inputs::<f32>::new(&mut rng, Sizes::self_attention(300, 4, 3));
    let mut state = State::<f32>::new(&plan, 1, 1).unwrap();
    let (size, mut file) = (state.bytes(), 0);
    let mut first = 0;
    for n in [1, 1, 6, 7, 100, 1, 64, 0, 120].into_iter().chain(std::iter::repeat_n(0, 3)) {
        extend(&plan, &mut state, &inputs, first..first + n);
        first += n;
        assert_eq!(state.bytes(), size);
        let len = state.to_bytes().len();
        if file != 0 {
            assert!(len.abs_diff(file) <= 8, "digits of the position, to a multiple of 8");
        }
        file = len;
    }
    assert_eq!(state.position(0), 300);
}

/// Plans that read a state of theirs or of more orders, in every way of reading.
#[test]
fn a_state_serves_every_series_whose_orders_it_holds() {
    fn one<T: Real>() {
        let mut rng = rng();
        let (before, after) = (75, 40);
        let tokens = before + after;
        let writer = taylor(6, 5, 5, 16);
        let sizes = Sizes { kv_heads: 2, group: 2, ..Sizes::self_attention(tokens, 6, 5) };
        let inputs = Inputs::<T>::new(&mut rng, sizes);
        let mut state = State::<T>::new(&writer, 1, 2).unwrap();
        extend(&writer, &mut state, &inputs, 0..before);
        let file = state.to_bytes();
        for (series, terms) in [
            (Series::Taylor, 5),
            (Series::Taylor, 3),
            (Series::Taylor, 1),
            (Series::power(2), 3),
            (Series::power(4), 5),
            (Series::Power { exponent: 4, floor: 0.0 }, 5),
            (Series::Fixed { coefficients: vec![1.0, 0.0, 0.5, 0.0, 0.25] }, 5),
        ] {
            let what = format!("{series:?} P = {terms} {}", T::NAME);
            let mut spec = Spec::new(6, 5).series(series.clone()).block(16);
            if series == Series::Taylor {
                spec = spec.terms(terms);
            }
            let reader = Plan::new(&spec.build().unwrap()).unwrap();
            let want = inputs.oracle(terms, &series, true);
            let tail: Vec<f64> =
                want.chunks(tokens * 5).flat_map(|head| head[before * 5..].to_vec()).collect();
            let mut loaded = load::<T>(&reader, &file).unwrap();
            assert!(loaded.to_bytes() == file, "{what}");
            let steps = loaded.fork();
            let y = extend(&reader, &mut loaded, &inputs, before..tokens);
            assert_close(&what, &y, &tail, tolerance::<T>());
            let mut loaded = steps;
            let mut y = vec![T::ZERO; tail.len()];
            for t in 0..after {
                let one = extend(&reader, &mut loaded, &inputs, before + t..before + t + 1);
                for (head, row) in one.chunks(5).enumerate() {
                    y[(head * after + t) * 5..][..5].copy_from_slice(row);
                }
            }
            assert_close(&format!("{what}, steps"), &y, &tail, tolerance::<T>());
            // It still holds all orders, and serves the plan that made it.
            let mut last = load::<T>(&writer, &loaded.to_bytes()).unwrap();
            let full = Sizes { queries: 30, keys: 0, ..sizes };
            let more = Inputs::<T>::new(&mut rng, full);
            let mut y = vec![T::ZERO; 4 * 30 * 5];
            let call = Call::full(more.q(), more.k(), more.v()).state(&mut last);
            writer.run(call, ViewMut::new(&mut y, full.y()).unwrap()).unwrap();
            let whole = Inputs {
                sizes: Sizes { queries: 30, ..sizes },
                q: more.q.clone(),
                k: inputs.k.clone(),
                v: inputs.v.clone(),
                mask: None,
            };
            let want = whole.oracle(5, &Series::Taylor, false);
            assert_close(&format!("{what}, and back"), &y, &want, tolerance::<T>());
        }
    }
    one::<f64>();
    one::<f32>();
}

#[test]
fn a_state_of_another_spec_is_refused_by_field() {
    let state = State::<f64>::new(&taylor(3, 2, 3, 8), 1, 1).unwrap();
    let file = state.to_bytes();
    for (field, plan) in [
        ("d_key", taylor(4, 2, 3, 8)),
        ("d_value", taylor(3, 1, 3, 8)),
        ("block", taylor(3, 2, 3, 9)),
        ("orders", taylor(3, 2, 4, 8)),
        ("orders", plan(3, 2, Series::power(4), 8)),
    ] {
        assert_field(load::<f64>(&plan, &file).unwrap_err(), field);
        let mut state = state.fork();
        let shape = |d| [1, 1, 1, d];
        let x = [1.0; 8];
        let mut y = [7.0; 8];
        let (d_key, d_value) = (plan.spec().d_key(), plan.spec().d_value());
        let error = plan
            .step(
                &mut state,
                View::new(&x, shape(d_key)).unwrap(),
                View::new(&x, shape(d_key)).unwrap(),
                View::new(&x, shape(d_value)).unwrap(),
                ViewMut::new(&mut y, shape(d_value)).unwrap(),
            )
            .unwrap_err();
        assert_field(error, field);
        assert!(state.to_bytes() == file && y == [7.0; 8]);
    }
    let error = load::<f32>(&taylor(3, 2, 3, 8), &file).unwrap_err();
    assert_eq!(error.to_string(), "the state has dtype = F64, but the call has F32");
    let file = State::<f32>::new(&taylor(3, 2, 3, 8), 1, 1).unwrap().to_bytes();
    assert_field(load::<f64>(&taylor(3, 2, 3, 8), &file).unwrap_err(), "dtype");
    // Neither the scale nor the coefficients are part of it.
    let other = Spec::new(3, 2).terms(2).scale(3.0).block(8).build().unwrap();
    load::<f32>(&Plan::new(&other).unwrap(), &file).unwrap();
}

#[test]
fn states_cannot_count_beyond_their_numbers() {
    let plan = taylor(2, 1, 2, 4);
    let mut file = Forged::read(&small::<f32>(&plan).to_bytes()).unwrap();
    file.metadata.insert("positions".into(), "[9223372036854775807]".into());
    file.sign();
    let mut state = load::<f32>(&plan, &file.bytes()).unwrap();
    assert_eq!(state.position(0), i64::MAX as u64);
    let before = state.to_bytes();
    let other = state.fork();
    assert_field(state.merge(&other).unwrap_err(), "position");
    assert!(state.to_bytes() == before);
}

#[test]
fn a_plan_held_to_the_direct_form_still_serves_states() {
    let mut rng = rng();
    let plan = taylor(4, 3, 3, 8).with_form(Form::Direct);
    let inputs = Inputs::<f64>::new(&mut rng, Sizes::self_attention(50, 4, 3));
    let want = inputs.oracle(3, &Series::Taylor, true);
    let mut state = State::<f64>::new(&plan, 1, 1).unwrap();
    extend(&plan, &mut state, &inputs, 0..30);
    let mut state = load(&plan, &state.to_bytes()).unwrap();
    let y = extend(&plan, &mut state, &inputs, 30..50);
    assert_close("direct", &y, &want[30 * 3..], 1e-12);
}
