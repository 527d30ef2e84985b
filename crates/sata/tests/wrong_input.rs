//! Whatever is wrong with a call is an error that names it, and nothing has changed.

mod common;

use common::case::{Case, D_KEY, D_VALUE, assert_state, plan};
use half::{bf16, f16};
use sata::{Call, Diagnostics, Element, Error, Form, Real, State, View, ViewMut};

#[test]
fn the_case_itself_is_right() {
    for causal in [true, false] {
        let case = Case::<f64> { causal, mask: Some(vec![true; 10]), ..Case::new() };
        case.run(&plan(), None, true).0.unwrap();
        let case = Case::<f64> { causal, ..Case::packed(&[0, 4, 10], &[0, 4, 10]) };
        case.run(&plan(), None, true).0.unwrap();
        let mut state = State::new(&plan(), 2, 2).unwrap();
        case.run(&plan(), Some(&mut state), true).0.unwrap();
    }
}

#[test]
fn non_finite_inputs_are_named_with_their_place() {
    fn one<E: Element>() {
        for (argument, name) in ["q", "k", "v"].into_iter().enumerate() {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                for causal in [true, false] {
                    let mut case = Case::<E> { causal, ..Case::new() };
                    let shape = [case.q, case.k, case.v][argument];
                    let place = [1, shape[1] - 1, 3, shape[3] - 1];
                    let at = ((place[0] * shape[1] + place[1]) * shape[2] + place[2]) * shape[3]
                        + place[3];
                    case.data[argument][at] = E::from_compute(E::Compute::from_f64(bad));
                    match case.refused() {
                        Error::NonFinite { argument, index, value } => {
                            assert_eq!((argument, index), (name, place));
                            assert!(value == bad || value.is_nan() && bad.is_nan());
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
        }
    }
    one::<f32>();
    one::<f64>();
    one::<f16>();
    one::<bf16>();
    // A masked key too: what is masked is no place for garbage.
    let mut case = Case::<f64> { mask: Some([vec![true; 9], vec![false]].concat()), ..Case::new() };
    case.data[1][59] = f64::NAN;
    let text = case.refused().to_string();
    assert_eq!(text, "k holds NaN at [1, 1, 4, 2] [batch, head, token, channel]");
}

#[test]
fn what_lies_between_rows_is_nobodys() {
    let case = Case::<f64>::new();
    let (_, want) = case.run(&plan(), None, true);
    let spread = |data: &[f64], d: usize| -> Vec<f64> {
        data.chunks(d).flat_map(|row| [row, &[f64::NAN, f64::INFINITY]].concat()).collect()
    };
    let [q, k, v] = [(0, D_KEY), (1, D_KEY), (2, D_VALUE)].map(|(i, d)| spread(&case.data[i], d));
    let strides = |shape: [usize; 4]| {
        let token = shape[3] + 2;
        [shape[1] * shape[2] * token, shape[2] * token, token]
    };
    let mut y = vec![f64::NEG_INFINITY; 2 * 4 * 5 * 4];
    let call = Call::causal(
        View::strided(&q, case.q, strides(case.q)).unwrap(),
        View::strided(&k, case.k, strides(case.k)).unwrap(),
        View::strided(&v, case.v, strides(case.v)).unwrap(),
    );
    let out = ViewMut::strided(&mut y, case.out, strides(case.out)).unwrap();
    plan().run(call, out).unwrap();
    for (row, want) in y.chunks(4).zip(want.chunks(2)) {
        assert_eq!(&row[..2], want);
        assert_eq!(&row[2..], [f64::NEG_INFINITY; 2], "what lies between rows was written");
    }
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    fn case(change: impl FnOnce(&mut Case<f32>)) -> Case<f32> {
        Case::shapes(change)
    }
    // Zero batch or heads.
    for zero in [0, 1] {
        case(|case| case.q[zero] = 0).misfits("q", &case(|case| case.q[zero] = 0).q, "at least 1");
        case(|case| case.k[zero] = 0).misfits("k", &case(|case| case.k[zero] = 0).k, "at least 1");
        case(|case| case.v[zero] = 0).misfits("v", &case(|case| case.v[zero] = 0).v, "at least 1");
        let all = case(|case| {
            for shape in [&mut case.q, &mut case.k, &mut case.v, &mut case.out] {
                shape[zero] = 0;
            }
        });
        all.misfits("q", &all.q, "at least 1");
    }
    // d.
    for d in [0, 2, 4] {
        case(|case| case.q[3] = d).misfits("q", &[2, 4, 5, d], "d_key = 3");
        case(|case| case.k[3] = d).misfits("k", &[2, 2, 5, d], "d_key = 3");
    }
    for d in [0, 1, 3] {
        case(|case| case.v[3] = d).misfits("v", &[2, 2, 5, d], "d_value = 2");
        case(|case| case.out[3] = d).misfits("out", &[2, 4, 5, d], "[2, 4, 5, 2]");
    }
    // Batch.
    case(|case| case.q[0] = 3).misfits("k", &[2, 2, 5, 3], "batch 3");
    case(|case| case.k[0] = 1).misfits("v", &[2, 2, 5, 2], "[1, 2, 5, 3]");
    case(|case| case.v[0] = 3).misfits("v", &[3, 2, 5, 2], "[2, 2, 5, 3]");
    case(|case| case.out[0] = 1).misfits("out", &[1, 4, 5, 2], "[2, 4, 5, 2]");
    // Heads.
    case(|case| case.v[1] = 1).misfits("v", &[2, 1, 5, 2], "[2, 2, 5, 3]");
    case(|case| case.out[1] = 2).misfits("out", &[2, 2, 5, 2], "[2, 4, 5, 2]");
    for heads in [1, 3, 5] {
        case(|case| case.q[1] = heads).misfits("q", &[2, heads, 5, 3], "multiple of the 2");
    }
    // Tokens.
    case(|case| case.q[2] = 4).misfits("k", &[2, 2, 5, 3], "as many keys as queries, 4");
    case(|case| case.k[2] = 4).misfits("v", &[2, 2, 5, 2], "[2, 2, 4, 3]");
    case(|case| case.v[2] = 6).misfits("v", &[2, 2, 6, 2], "[2, 2, 5, 3]");
    for tokens in [0, 4, 6] {
        case(|case| case.out[2] = tokens).misfits("out", &[2, 4, tokens, 2], "[2, 4, 5, 2]");
        let full = case(|case| {
            case.causal = false;
            case.q[2] = tokens;
        });
        full.misfits("out", &[2, 4, 5, 2], &format!("[2, 4, {tokens}, 2]"));
    }
    // Masks.
    for len in [0, 5, 9, 11, 20] {
        let masked = Case::<f32> { mask: Some(vec![true; len]), ..Case::new() };
        masked.misfits("key_mask", &[len], "10 elements");
    }
}

#[test]
fn lengths_of_packed_sequences_must_add_up() {
    let good: &[usize] = &[0, 4, 10];
    for bad in [
        &[][..],
        &[0],
        &[10],
        &[1, 10],
        &[0, 4, 9],
        &[0, 4, 11],
        &[0, 7, 4, 10],
        &[0, 11, 10],
        &[4, 10],
        &[0, usize::MAX, 10],
    ] {
        Case::<f64>::packed(bad, bad).misfits(
            "cu_queries",
            &[bad.len()],
            "from 0 to the 10 tokens",
        );
        Case::<f64>::packed(good, bad).misfits("cu_keys", &[bad.len()], "from 0 to the 10 tokens");
    }
    Case::<f64>::packed(good, &[0, 10]).misfits("cu_keys", &[2], "3 elements");
    Case::<f64>::packed(good, &[0, 5, 10]).misfits("cu_keys", &[3], "same lengths");
    let mut batch = Case::<f64>::new();
    batch.packed = Some((vec![0, 5], vec![0, 5]));
    batch.misfits("cu_queries", &[2], "batch of 1");
    // As many as the state has.
    let mut three = Case::<f64>::packed(&[0, 4, 10, 10], &[0, 4, 10, 10]);
    let mut state = State::new(&plan(), 2, 2).unwrap();
    let before = state.to_bytes();
    let (result, y) = three.run(&plan(), Some(&mut state), false);
    assert_state(result.unwrap_err(), "sequences", "2", "3");
    assert!(y.iter().all(|&y| y == -7.0) && state.to_bytes() == before);
    // A mask of packed sequences is one for all.
    three.mask = Some(vec![true; 9]);
    three.misfits("key_mask", &[9], "10 elements");
}

#[test]
fn a_state_of_other_counts_is_refused() {
    let case = Case::<f64>::new();
    for (counts, name, holds) in [
        ([1, 2], "sequences", "1"),
        ([3, 2], "sequences", "3"),
        ([2, 1], "kv_heads", "1"),
        ([2, 4], "kv_heads", "4"),
    ] {
        let mut state = State::new(&plan(), counts[0], counts[1]).unwrap();
        let before = state.to_bytes();
        let (result, y) = case.run(&plan(), Some(&mut state), false);
        assert_state(result.unwrap_err(), name, holds, "2");
        assert!(y.iter().all(|&y| y == -7.0) && state.to_bytes() == before);
        // As does a step, and an extension.
        let x = [1.0; 64];
        let view = |heads, d| View::new(&x, [2, heads, 1, d]).unwrap();
        let mut y = [-7.0; 16];
        let wants = [2, 4, 1, 2];
        let (q, k, v) = (view(4, 3), view(2, 3), view(2, 2));
        let out = ViewMut::new(&mut y, wants).unwrap();
        assert_state(plan().step(&mut state, q, k, v, out).unwrap_err(), name, holds, "2");
        let out = ViewMut::new(&mut y, wants).unwrap();
        assert_state(plan().extend(&mut state, q, k, v, out).unwrap_err(), name, holds, "2");
        assert!(y == [-7.0; 16] && state.to_bytes() == before);
    }
    for counts in [[0, 1], [1, 0], [0, 0]] {
        let error = State::<f64>::new(&plan(), counts[0], counts[1]).unwrap_err();
        assert!(matches!(error, Error::Shape { argument: "state", .. }), "{error:?}");
    }
}

#[test]
fn a_call_of_no_tokens_does_nothing() {
    for form in [Form::Direct, Form::State] {
        for causal in [true, false] {
            for with_state in [true, false] {
                let plan = plan().with_form(form);
                let case = Case::<f32>::shapes(|case| {
                    case.causal = causal;
                    for shape in [&mut case.q, &mut case.k, &mut case.v, &mut case.out] {
                        shape[2] = 0;
                    }
                });
                let mut state = State::new(&plan, 2, 2).unwrap();
                let before = state.to_bytes();
                let found = case.run(&plan, with_state.then_some(&mut state), true).0.unwrap();
                assert_eq!(found, Diagnostics::default());
                assert!(state.to_bytes() == before);
            }
        }
    }
}
