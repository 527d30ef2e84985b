//! Specs that cannot be, and those that no machine can hold.

use std::time::{Duration, Instant};

use sata::{Call, Error, Form, Level, Plan, Series, Spec, State, View, ViewMut};

#[test]
fn specs_that_cannot_be_name_the_field() {
    let refused = |name: &str, text: &str, spec: Result<Spec, Error>| match spec {
        Err(Error::Spec { field, value, requires }) => {
            assert_eq!(field, name);
            assert!(value.contains(text), "{value}");
            assert!(!requires.is_empty());
        }
        other => panic!("{name} {text}: {other:?}"),
    };
    let spec = || Spec::new(4, 4);
    refused("d_key", "0", Spec::new(0, 4).build());
    refused("d_value", "0", Spec::new(4, 0).build());
    refused("terms", "0", spec().terms(0).build());
    refused("block", "0", spec().block(0).build());
    for scale in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        refused("scale", &scale.to_string(), spec().scale(scale).build());
    }
    let series = |series| spec().series(series).build();
    refused("series", "[]", series(Series::Fixed { coefficients: vec![] }));
    refused("series", "[0.0, 0.0]", series(Series::Fixed { coefficients: vec![0.0; 2] }));
    refused("series", "a_1 = NaN", series(Series::Fixed { coefficients: vec![1.0, f64::NAN] }));
    for exponent in [0, 1, 3] {
        refused("series", &format!("power:{exponent}"), series(Series::power(exponent)));
    }
    for floor in [-1.0, f64::NAN, f64::INFINITY] {
        refused("series", &floor.to_string(), series(Series::Power { exponent: 2, floor }));
    }
    refused("series", "NaN", series(Series::Hermite { tau: f64::NAN }));
    refused("terms", "3", spec().series(Series::Gauss).terms(3).build());
    refused("terms", "4", spec().series(Series::power(2)).terms(4).build());
    refused(
        "terms",
        "1",
        spec().series(Series::Fixed { coefficients: vec![1.0; 2] }).terms(1).build(),
    );
    // The same from a file.
    let json = serde_json::to_string(&spec().build().unwrap()).unwrap();
    serde_json::from_str::<Spec>(&json).unwrap();
    let error =
        serde_json::from_str::<Spec>(&json.replace("\"block\":64", "\"block\":0")).unwrap_err();
    assert!(error.to_string().contains("block is 0"), "{error}");
}

#[test]
fn an_unknown_level_is_refused_by_name() {
    let error = "avx1024".parse::<Level>().unwrap_err().to_string();
    assert!(error.contains("'avx1024'") && error.contains("portable"), "{error}");
}

#[test]
fn features_beyond_memory_are_refused_with_their_number() {
    let start = Instant::now();
    // C(64 + 11, 11) features.
    let features = 75u128 * 74 * 73 * 72 * 71 * 70 * 69 * 68 * 67 * 66 * 65 / 39_916_800;
    let spec = Spec::new(64, 64).terms(12).build().unwrap();
    let plan = Plan::new(&spec).unwrap().with_form(Form::State);
    let check = |error: Error, wants: &str| match &error {
        Error::TooLarge { d_key: 64, orders, features: found, what, bytes, limit } => {
            assert_eq!(orders, &(0..12).collect::<Vec<_>>());
            assert_eq!(*found, features);
            assert_eq!(*what, wants);
            assert!(bytes > limit);
            let text = error.to_string();
            assert!(
                text.contains(&features.to_string()) && text.contains(&bytes.to_string()),
                "{text}"
            );
        }
        _ => panic!("{error:?}"),
    };
    check(plan.basis().unwrap_err(), "the basis");
    check(State::<f32>::new(&plan, 1, 1).unwrap_err(), "the state");
    check(State::<f64>::new(&plan, 3, 5).unwrap_err(), "the state");
    let x = vec![0.5f32; 64 * 8];
    let mut y = vec![-7.0f32; 64 * 8];
    let shape = [1, 2, 4, 64];
    let view = View::new(&x, shape).unwrap();
    for call in [Call::causal(view, view, view), Call::full(view, view, view)] {
        check(plan.run(call, ViewMut::new(&mut y, shape).unwrap()).unwrap_err(), "the state");
        assert!(y.iter().all(|&y| y == -7.0));
    }
    // A few tokens need no features.
    let plan = Plan::new(&spec).unwrap();
    plan.run(Call::causal(view, view, view), ViewMut::new(&mut y, shape).unwrap()).unwrap();
    assert!(y.iter().all(|&y| (y - 0.5).abs() < 1e-6));

    // Other sizes that multiply beyond memory, or beyond numbers.
    let large = |spec: sata::SpecBuilder, sequences, heads| {
        let plan = Plan::new(&spec.build().unwrap()).unwrap();
        for error in [
            State::<f64>::new(&plan, sequences, heads).map(|_| ()),
            State::<f32>::new(&plan, sequences, heads).map(|_| ()),
        ] {
            assert!(matches!(error, Err(Error::TooLarge { .. })), "{error:?}");
        }
    };
    // A spec itself refuses sizes beyond 2^48.
    let size = 1 << 48;
    large(Spec::new(size, 4).terms(2), 1, 1);
    large(Spec::new(4, size), 1, 1);
    large(Spec::new(4, 4).block(size), 1, 1);
    for huge in [1 << 40, 1 << 62, usize::MAX] {
        large(Spec::new(4, 4), huge, 1);
        large(Spec::new(4, 4), 1, huge);
        large(Spec::new(4, 4), huge, huge);
        large(Spec::new(size, size).block(size), huge, huge);
    }
    large(Spec::new(1 << 20, 1).terms(64), 1, 1);
    large(Spec::new(512, 512).series(Series::power(8)), 1, 1);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

#[test]
fn extreme_specs_are_refused_before_anything_is_made() {
    let refused = |spec: sata::SpecBuilder, word: &str| {
        let text = spec.build().unwrap_err().to_string();
        assert!(text.contains(word), "{text}");
    };
    refused(Spec::new(8, 8).terms(1 << 62), "terms is 4611686018427387904");
    refused(Spec::new(8, 8).series(sata::Series::power(usize::MAX - 1)), "power:");
    refused(Spec::new(usize::MAX, 8), "d_key is 18446744073709551615");
    refused(Spec::new(8, usize::MAX), "d_value is 18446744073709551615");
    refused(Spec::new(8, 8).block(usize::MAX), "block is 18446744073709551615");
    assert!(sata::basis::Basis::new(0, &[0, 1]).is_err());
    assert_eq!(sata::basis::features(0, &[1, 2]), 0);
    assert_eq!(sata::cost::break_even_memory(0, 0, &[0]), 1);
    let plan = Plan::new(&Spec::new(8, 8).build().unwrap()).unwrap();
    assert!(plan.recipe::<f32>([0, 0], [0, 0], true, true, 0).slices >= 1);
}
