//! Denominators that are not positive or not finite are counted, reported, and never hidden.

mod common;

use common::case::{Case, D_KEY, D_VALUE, plan};
use common::{Inputs, Sizes, rng};
use sata::{Call, Diagnostics, Error, Form, Plan, Spec, State, View, ViewMut};

/// One key whose logit makes 1 + x negative, seen by the second query of the second head.
fn negative() -> Case<f64> {
    let mut case = Case::shapes(|case| {
        (case.q, case.k, case.v) = ([1, 2, 3, D_KEY], [1, 1, 3, D_KEY], [1, 1, 3, D_VALUE]);
        case.out = [1, 2, 3, D_VALUE];
        case.state = [1, 1];
    });
    for data in &mut case.data {
        let len = data.len();
        *data = vec![0.0; len];
    }
    case.data[1][3] = 10.0;
    case.data[0][(3 + 1) * D_KEY] = -10.0;
    case.data[2] = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    case
}

#[test]
fn denominators_are_reported_and_strict_makes_them_an_error() {
    let case = negative();
    for form in [Form::Direct, Form::State] {
        for with_state in [false, true] {
            let spec = Spec::new(D_KEY, D_VALUE).terms(2).block(2).build().unwrap();
            let plan = Plan::new(&spec).unwrap().with_form(form);
            let mut states = [false, true].map(|_| State::new(&plan, 1, 1).unwrap());
            let [lax, strict] = &mut states;
            let (found, y) = case.run(&plan, with_state.then_some(lax), false);
            let found = found.unwrap();
            let want = Diagnostics {
                queries: 6,
                non_positive: 1,
                first: Some([0, 1, 1]),
                ..Diagnostics::default()
            };
            assert_eq!(found, want);
            // 1 for the first key and 1 − 100/√3 for the second, as computed: nothing is hidden.
            let w = 1.0 - 100.0 / 3f64.sqrt();
            let at = (3 + 1) * D_VALUE;
            for (y, want) in y[at..at + 2].iter().zip([1.0 + 3.0 * w, 2.0 + 4.0 * w]) {
                assert!((y - want / (1.0 + w)).abs() < 1e-12);
            }
            let (error, same) = case.run(&plan, with_state.then_some(strict), true);
            match error {
                Err(Error::Denominators(found)) => assert_eq!(found, want),
                other => panic!("{other:?}"),
            }
            assert_eq!(y, same, "outputs are as without strict");
            assert!(states[0].to_bytes() == states[1].to_bytes());
            assert_eq!(states[1].position(0), if with_state { 3 } else { 0 });
        }
    }
}

#[test]
fn denominators_of_no_key_at_all_are_zero() {
    let mut rng = rng();
    for form in [Form::Direct, Form::State] {
        let plan = plan().with_form(form);
        // All keys masked; and no keys.
        for keys in [5, 0] {
            let sizes = Sizes {
                batch: 2,
                kv_heads: 1,
                group: 2,
                queries: 4,
                keys,
                d_key: D_KEY,
                d_value: D_VALUE,
            };
            let inputs = Inputs::<f64>::new(&mut rng, sizes);
            let mask = vec![false; 2 * keys];
            let mut y = vec![0.0; 2 * 2 * 4 * D_VALUE];
            let call = Call::full(inputs.q(), inputs.k(), inputs.v()).key_mask(&mask);
            let found = plan.run(call, ViewMut::new(&mut y, sizes.y()).unwrap()).unwrap();
            let want = Diagnostics {
                queries: 16,
                non_positive: 16,
                first: Some([0, 0, 0]),
                ..Diagnostics::default()
            };
            assert_eq!(found, want);
            assert!(y.iter().all(|y| y.is_nan()), "0 / 0 is not made up into a number");
        }
    }
}

#[test]
fn overflow_is_counted() {
    for form in [Form::Direct, Form::State] {
        let plan = plan().with_form(form);
        let x = [1e30f32; 12];
        let v = [1.0f32; 8];
        let view = View::new(&x, [1, 1, 4, 3]).unwrap();
        let mut y = [0.0; 8];
        let call = Call::causal(view, view, View::new(&v, [1, 1, 4, 2]).unwrap());
        let found = plan.run(call, ViewMut::new(&mut y, [1, 1, 4, 2]).unwrap()).unwrap();
        assert_eq!((found.queries, found.non_finite, found.first), (4, 4, Some([0, 0, 0])));
        assert!(y.iter().all(|y| y.is_nan()));
    }
}
