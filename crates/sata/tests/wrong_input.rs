//! Whatever is wrong with a call is an error that names it, and nothing has changed.

mod common;

use std::time::{Duration, Instant};

use common::{Inputs, Sizes, rng};
use half::{bf16, f16};
use sata::{
    Call, Decay, Diagnostics, Element, Error, Form, Level, Near, Plan, Real, Series, Spec, State,
    View, ViewMut, conventional,
};

const D_KEY: usize = 3;
const D_VALUE: usize = 2;

fn plan() -> Plan {
    Plan::new(&Spec::new(D_KEY, D_VALUE).terms(3).block(4).build().unwrap()).unwrap()
}

/// A call to make one thing wrong with: two sequences of five tokens, two heads read by two each.
#[derive(Clone)]
struct Case<E> {
    q: [usize; 4],
    k: [usize; 4],
    v: [usize; 4],
    out: [usize; 4],
    data: [Vec<E>; 3],
    mask: Option<Vec<bool>>,
    packed: Option<(Vec<usize>, Vec<usize>)>,
    causal: bool,
    /// Sequences and heads of the state.
    state: [usize; 2],
}

fn count(shape: [usize; 4]) -> usize {
    shape.iter().product()
}

impl<E: Element> Case<E> {
    fn new() -> Self {
        let [q, k, v, out] =
            [[2, 4, 5, D_KEY], [2, 2, 5, D_KEY], [2, 2, 5, D_VALUE], [2, 4, 5, D_VALUE]];
        let numbers = |shape, step: f64| {
            let number = |i| E::from_compute(E::Compute::from_f64((i as f64 * step).sin()));
            (0..count(shape)).map(number).collect()
        };
        Case {
            q,
            k,
            v,
            out,
            data: [numbers(q, 0.7), numbers(k, 1.1), numbers(v, 1.3)],
            mask: None,
            packed: None,
            causal: true,
            state: [2, 2],
        }
    }

    /// Ten tokens in a batch of one.
    fn packed(queries: &[usize], keys: &[usize]) -> Self {
        Case {
            q: [1, 4, 10, D_KEY],
            k: [1, 2, 10, D_KEY],
            v: [1, 2, 10, D_VALUE],
            out: [1, 4, 10, D_VALUE],
            packed: Some((queries.to_vec(), keys.to_vec())),
            ..Case::new()
        }
    }

    /// The shapes changed, with as much data as they need.
    fn shapes(change: impl FnOnce(&mut Self)) -> Self {
        let mut case = Self::new();
        change(&mut case);
        for (data, shape) in case.data.iter_mut().zip([case.q, case.k, case.v]) {
            data.resize(count(shape), E::from_compute(E::Compute::ONE));
        }
        case
    }

    fn run(
        &self,
        plan: &Plan,
        state: Option<&mut State<E::Compute>>,
        strict: bool,
    ) -> (Result<Diagnostics, Error>, Vec<E>) {
        let [q, k, v] = &self.data;
        let (q, k, v) = (
            View::new(q, self.q).unwrap(),
            View::new(k, self.k).unwrap(),
            View::new(v, self.v).unwrap(),
        );
        let mut call = if self.causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
        if let Some(mask) = &self.mask {
            call = call.key_mask(mask);
        }
        if let Some((queries, keys)) = &self.packed {
            call = call.packed(queries, keys);
        }
        if let Some(state) = state {
            call = call.state(state);
        }
        let mut y = vec![E::from_compute(E::Compute::from_f64(-7.0)); count(self.out)];
        let out = ViewMut::new(&mut y, self.out).unwrap();
        (plan.run(call.strict(strict), out), y)
    }

    /// The error of the call in every form, which is the same and changes nothing.
    #[track_caller]
    fn refused(&self) -> Error {
        let mut errors = vec![];
        for form in [None, Some(Form::Direct), Some(Form::State)] {
            for with_state in [false, true] {
                let plan = form.map_or_else(plan, |form| plan().with_form(form));
                let mut state = State::new(&plan, self.state[0], self.state[1]).unwrap();
                let past = Case::<E>::new();
                if self.state == [2, 2] {
                    past.run(&plan, Some(&mut state), true).0.unwrap();
                }
                let before = state.to_bytes();
                let (result, y) = self.run(&plan, with_state.then_some(&mut state), false);
                errors.push(result.unwrap_err());
                assert!(y.iter().all(|y| y.to_compute().to_f64() == -7.0), "outputs changed");
                assert!(state.to_bytes() == before, "the state changed");
            }
        }
        let text = errors[0].to_string();
        assert!(errors.iter().all(|error| error.to_string() == text), "{errors:?}");
        errors.remove(0)
    }

    /// That it is refused for the shape of one argument, with a text that has some numbers.
    #[track_caller]
    fn misfits(&self, name: &str, shape: &[usize], text: &str) {
        let error = self.refused();
        match &error {
            Error::Shape { argument, got, expected }
                if *argument == name && got == shape && expected.contains(text) => {}
            _ => panic!("wanted {name} {shape:?} and '{text}', got {error:?}"),
        }
    }
}

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

#[track_caller]
fn assert_state(error: Error, name: &str, holds: &str, wants: &str) {
    match &error {
        Error::State { field, state, call }
            if (*field, &**state, &**call) == (name, holds, wants) => {}
        _ => panic!("wanted {name}: {holds} and {wants}, got {error:?}"),
    }
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
fn what_this_engine_does_not_do_is_refused_by_name() {
    for (spec, name) in [
        (Spec::new(4, 4).near(Near::Blocks(1)), "near = Blocks(1)"),
        (Spec::new(4, 4).sinks(2), "sinks = 2"),
        (Spec::new(4, 4).decay(Decay::Slopes), "decay = Slopes"),
        (Spec::new(4, 4).decay(Decay::Gates), "decay = Gates"),
        (Spec::new(4, 4).series(Series::Gauss), "series = Gauss"),
        (Spec::new(4, 4).series(Series::Hermite { tau: 0.9 }), "series = Hermite"),
    ] {
        match Plan::new(&spec.build().unwrap()) {
            Err(Error::Unsupported { what, .. }) => assert!(what.contains(name), "{what}"),
            other => panic!("{name}: {other:?}"),
        }
    }
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
fn slices_that_are_too_short_are_refused() {
    let data = [0.0f32; 24];
    let view = |shape| View::new(&data, shape);
    view([1, 2, 3, 4]).unwrap();
    for shape in
        [[2, 2, 3, 4], [1, 2, 3, 5], [5, 5, 1, 1], [1 << 32, 1 << 32, 1, 1], [usize::MAX; 4]]
    {
        let mut out = data;
        for error in [view(shape).unwrap_err(), ViewMut::new(&mut out, shape).unwrap_err()] {
            match error {
                Error::View { shape: found, needs, len: 24, .. } => {
                    assert_eq!(found, shape);
                    assert!(needs > 24);
                }
                other => panic!("{other:?}"),
            }
        }
    }
    let strided = |shape, strides| View::strided(&data, shape, strides).map(|_| ());
    strided([2, 2, 2, 4], [8, 4, 8]).unwrap();
    strided([1, 1, 6, 4], [usize::MAX, usize::MAX, 4]).unwrap();
    strided([9, 9, 9, 24], [0, 0, 0]).unwrap();
    for (shape, strides) in [
        ([2, 2, 2, 5], [12, 4, 8]),
        ([2, 1, 6, 4], [1, 0, 4]),
        ([2, 1, 1, 1], [24, 0, 0]),
        ([1, 2, 1, 1], [0, usize::MAX, 0]),
        ([1, 3, 2, 1], [0, usize::MAX, usize::MAX]),
        ([1, 1, 1, 25], [0, 0, 0]),
    ] {
        let error = strided(shape, strides).unwrap_err();
        assert!(matches!(error, Error::View { len: 24, .. }), "{shape:?} {strides:?} {error:?}");
        let mut out = data;
        let error = ViewMut::strided(&mut out, shape, strides).unwrap_err();
        assert!(matches!(error, Error::View { argument: "out", .. }), "{error:?}");
    }
    // Parts of a view.
    let view = view([2, 1, 3, 4]).unwrap();
    for (batch, tokens) in [(0, 0..3), (1, 1..3), (1, 3..3), (0, 0..0)] {
        assert_eq!(view.slice(batch, tokens.clone()).unwrap().shape(), [1, 1, tokens.len(), 4]);
    }
    #[allow(clippy::reversed_empty_ranges)]
    for (batch, tokens) in [(2, 0..1), (0, 0..4), (0, 2..1), (1, 4..4), (usize::MAX, 0..0)] {
        let error = view.slice(batch, tokens).unwrap_err();
        assert!(matches!(error, Error::Shape { argument: "tokens", .. }), "{error:?}");
    }
}

#[test]
fn outputs_that_overlap_are_refused() {
    let mut y = [0.0f64; 64];
    for (shape, strides, fits) in [
        ([2, 2, 2, 4], [16, 8, 4], true),
        ([2, 2, 2, 4], [4, 8, 16], true),
        ([2, 2, 2, 4], [8, 4, 16], true),
        ([1, 1, 4, 4], [0, 0, 5], true),
        ([1, 1, 4, 4], [0, 0, 4], true),
        ([1, 2, 2, 4], [0, 9, 5], true),
        ([1, 2, 2, 4], [0, 8, 5], false),
        // One and the same row for all.
        ([1, 1, 2, 4], [0, 0, 0], false),
        ([1, 2, 1, 4], [0, 0, 0], false),
        ([2, 1, 1, 4], [0, 0, 0], false),
        // Rows that reach into the next.
        ([1, 1, 4, 4], [0, 0, 3], false),
        ([1, 2, 2, 4], [0, 6, 4], false),
        ([1, 2, 2, 4], [0, 4, 6], false),
        ([2, 2, 2, 4], [12, 8, 4], false),
        ([2, 2, 2, 4], [4, 4, 16], false),
    ] {
        match ViewMut::strided(&mut y, shape, strides) {
            Ok(_) if fits => {}
            Err(Error::Shape { argument: "out", got, expected }) if !fits => {
                assert_eq!(got, shape);
                assert!(expected.contains("overlap"), "{expected}");
            }
            other => panic!("{shape:?} {strides:?}: {other:?}"),
        }
    }
    // Nothing overlaps where there is nothing.
    for shape in [[0, 2, 2, 4], [2, 0, 2, 4], [2, 2, 0, 4], [2, 2, 2, 0]] {
        ViewMut::strided(&mut y, shape, [0, 0, 0]).unwrap();
        ViewMut::strided(&mut y, shape, [usize::MAX; 3]).unwrap();
    }
}

#[test]
fn softmax_names_what_does_not_fit_too() {
    let x = [0.5f64; 64];
    let view = |shape| View::new(&x, shape).unwrap();
    let run = |q, k, v, out, causal, offset| {
        let mut y = [-7.0; 64];
        let out = ViewMut::new(&mut y, out).unwrap();
        let result = conventional::attention(view(q), view(k), view(v), 1.0, causal, offset, out);
        assert!(result.is_ok() || y == [-7.0; 64]);
        result
    };
    let good = [1, 2, 3, 4];
    run(good, good, good, good, true, 0).unwrap();
    for (q, k, v, out, causal, offset, name) in [
        ([2, 2, 3, 4], good, good, [2, 2, 3, 4], false, 0, "k"),
        (good, [1, 2, 3, 5], good, good, false, 0, "k"),
        (good, [1, 2, 2, 4], good, good, false, 0, "k"),
        ([1, 3, 3, 4], good, good, [1, 3, 3, 4], false, 0, "q"),
        (good, [1, 0, 3, 4], [1, 0, 3, 4], good, false, 0, "q"),
        (good, good, good, [1, 2, 3, 3], false, 0, "out"),
        (good, good, good, good, true, 1, "k"),
        (good, good, good, good, true, usize::MAX, "k"),
        (good, [1, 2, 0, 4], [1, 2, 0, 4], good, false, 0, "k"),
    ] {
        match run(q, k, v, out, causal, offset) {
            Err(Error::Shape { argument, .. }) => assert_eq!(argument, name),
            other => panic!("{other:?}"),
        }
    }
    let mut bad = x;
    bad[7] = f64::NAN;
    let mut y = [0.0; 24];
    let bad = View::new(&bad, good).unwrap();
    let out = ViewMut::new(&mut y, good).unwrap();
    let error =
        conventional::attention(bad, view(good), view(good), 1.0, false, 0, out).unwrap_err();
    assert!(
        matches!(error, Error::NonFinite { argument: "q", index: [0, 0, 1, 3], .. }),
        "{error:?}"
    );
}

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
            let want =
                Diagnostics { queries: 6, non_positive: 1, non_finite: 0, first: Some([0, 1, 1]) };
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
                non_finite: 0,
                first: Some([0, 0, 0]),
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
