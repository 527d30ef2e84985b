//! The backward of whole calls against the oracle's analytic gradients.

mod common;

use common::calls::{plan_of, spec};
use common::gradients::{assert_gradients, gradients, rms, truth};
use common::{Fade, Inputs, Sizes, f64s, normal, rng};
use rand::Rng;
use rand::rngs::StdRng;
use sata::{Call, Decay, Error, Form, Gradients, Near, Series, Spec, View, ViewMut};

fn case(rng: &mut StdRng, tokens: [usize; 2]) -> Sizes {
    Sizes {
        batch: rng.random_range(1..=2),
        kv_heads: rng.random_range(1..=2),
        group: rng.random_range(1..=2),
        queries: tokens[0],
        keys: tokens[1],
        d_key: [1, 3, 8, 16, 17][rng.random_range(0..5)],
        d_value: [1, 4, 8, 16, 19][rng.random_range(0..5)],
    }
}

/// Series whose weights stay well above 0 at the logits of these tests.
fn series() -> [(Series, usize, f64); 6] {
    [
        (Series::Taylor, 1, 1.0),
        (Series::Taylor, 3, 1.0),
        (Series::Taylor, 5, 1.0),
        (Series::Taylor, 4, 0.15),
        (Series::Power { exponent: 2, floor: 0.1 }, 3, 1.0),
        (Series::Fixed { coefficients: vec![0.7, 0.0, 0.3] }, 3, 1.0),
    ]
}

fn check(rng: &mut StdRng, near: (Near, usize, usize), tokens: [usize; 2], causal: bool) {
    for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
        let (series, terms, gain) = &series()[rng.random_range(0..6)];
        let sizes = case(rng, tokens);
        let inputs = Inputs::<f32>::new(rng, sizes).gain(*gain);
        let inputs = if rng.random_bool(0.5) { inputs.masked(rng) } else { inputs };
        let fade = Fade::new(rng, decay, sizes);
        let (near, block, sinks) = near;
        let spec = spec(sizes, series, *terms)
            .near(near)
            .block(block)
            .sinks(sinks)
            .decay(decay)
            .build()
            .unwrap();
        let dy = normal::<f32>(rng, sizes.y().iter().product());
        let want = truth(&spec, &inputs, &fade, causal, &f64s(&dy));
        let what = common::check::describe(&spec, &inputs, &fade, causal, "backward");
        let dy_f64: Vec<f64> = f64s(&dy);
        for form in [Form::Direct, Form::State] {
            let plan = plan_of(&spec, Some(form));
            let what = format!("{what}, {form:?}");
            let got = gradients::<f64>(&plan, &inputs.to(), &fade, causal, &dy_f64);
            assert_gradients(&format!("{what}, f64"), &got, &want, tokens[1], 1e-9);
            let got = gradients::<f32>(&plan, &inputs, &fade, causal, &dy);
            assert_gradients(&format!("{what}, f32"), &got, &want, tokens[1], 1e-4);
        }
    }
}

const NEAR: [(Near, usize, usize); 8] = [
    (Near::None, 64, 0),
    (Near::None, 16, 5),
    (Near::Blocks(0), 16, 0),
    (Near::Blocks(1), 16, 5),
    (Near::Blocks(1), 3, 70),
    (Near::Blocks(2), 1, 1),
    (Near::Blocks(1), 64, 4),
    (Near::Blocks(1 << 20), 64, 0),
];

#[test]
fn causal_gradients_are_the_oracles() {
    let mut rng = rng();
    for near in NEAR {
        for tokens in [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 131, 300] {
            check(&mut rng, near, [tokens; 2], true);
        }
    }
}

#[test]
fn full_gradients_are_the_oracles() {
    let mut rng = rng();
    for near in [(Near::None, 64, 0), (Near::None, 16, 5)] {
        for tokens in [[1, 1], [1, 70], [33, 5], [64, 65], [40, 129], [150, 200]] {
            check(&mut rng, near, tokens, false);
        }
    }
}

/// Large logits: near weights are relative to each query's own largest.
#[test]
fn logits_of_eighty_stay_finite() {
    let mut rng = rng();
    let sizes = Sizes::self_attention(100, 8, 8);
    let spec = Spec::new(8, 8).terms(3).near(Near::Blocks(1)).block(16).build().unwrap();
    let inputs = Inputs::<f32>::new(&mut rng, sizes).gain(25.0);
    let dy = normal::<f32>(&mut rng, sizes.y().iter().product());
    let want = truth(&spec, &inputs, &Fade::None, true, &f64s(&dy));
    let plan = plan_of(&spec, None);
    let got = gradients(&plan, &inputs, &Fade::None, true, &dy);
    assert_gradients("logits up to 80", &got, &want, 100, 1e-3);
}

/// Sequences side by side have the gradients that each has alone; tokens of a packed projection are
/// rows apart.
#[test]
fn packed_sequences_have_their_own_gradients() {
    let mut rng = rng();
    let lengths = [5, 0, 40, 1, 33];
    let (heads, d) = (2, 8);
    let total: usize = lengths.iter().sum();
    let mut cu = vec![0];
    for n in lengths {
        cu.push(cu[cu.len() - 1] + n);
    }
    let spec = Spec::new(d, d)
        .terms(3)
        .near(Near::Blocks(1))
        .block(8)
        .decay(Decay::Gates)
        .build()
        .unwrap();
    let plan = plan_of(&spec, None);
    // One buffer [total, 3, heads, d], as a projection leaves it.
    let row = 3 * heads * d;
    let qkv = normal::<f64>(&mut rng, total * row);
    let dy = normal::<f64>(&mut rng, total * heads * d);
    let gates: Vec<f32> = normal::<f32>(&mut rng, total * heads).iter().map(|g| -g.abs()).collect();
    let strided = |part: usize, from: usize, n: usize| {
        let at = from * row + part * heads * d;
        View::strided(&qkv[at.min(qkv.len())..], [1, heads, n, d], [total * row, d, row]).unwrap()
    };
    let gates_of = |from: usize, n: usize| {
        let at = (from * heads).min(gates.len());
        View::strided(&gates[at..], [1, heads, n, 1], [total * heads, 1, heads]).unwrap()
    };
    let dy_of = |from: usize, n: usize| {
        let at = (from * heads * d).min(dy.len());
        View::strided(&dy[at..], [1, heads, n, d], [total * heads * d, d, heads * d]).unwrap()
    };
    let run = |from: usize, n: usize, packed: bool| {
        let call = Call::causal(strided(0, from, n), strided(1, from, n), strided(2, from, n));
        let call = call.log_gates(gates_of(from, n));
        let call = if packed { call.packed(&cu, &cu) } else { call };
        let (mut dq, mut dk, mut dv) =
            (vec![0.0; heads * n * d], vec![0.0; heads * n * d], vec![0.0; heads * n * d]);
        let mut dg = vec![0.0; heads * n];
        let shape = [1, heads, n, d];
        // Token-major, as the projection.
        let strides = [n * heads * d, d, heads * d];
        let out = Gradients::new(
            ViewMut::strided(&mut dq, shape, strides).unwrap(),
            ViewMut::strided(&mut dk, shape, strides).unwrap(),
            ViewMut::strided(&mut dv, shape, strides).unwrap(),
        );
        let gate_strides = [n * heads, 1, heads];
        let out = out.log_gates(ViewMut::strided(&mut dg, [1, heads, n, 1], gate_strides).unwrap());
        plan.backward(call, dy_of(from, n), out).unwrap();
        [dq, dk, dv, dg]
    };
    let together = run(0, total, true);
    for (i, n) in lengths.into_iter().enumerate().filter(|(_, n)| *n > 0) {
        let alone = run(cu[i], n, false);
        for (together, alone) in together.iter().zip(&alone) {
            let width = together.len() / total;
            let part = &together[cu[i] * width..cu[i + 1] * width];
            let error = rms(part.iter().zip(alone).map(|(a, b)| a - b));
            assert!(error < 1e-12, "sequence {i} of {n} tokens: {error:e}");
        }
    }
}

#[test]
fn a_query_that_sees_nothing_has_no_gradient() {
    let mut rng = rng();
    let sizes = Sizes::self_attention(20, 3, 3);
    let spec = Spec::new(3, 3).terms(3).build().unwrap();
    let mut inputs = Inputs::<f64>::new(&mut rng, sizes);
    inputs.mask = Some((0..20).map(|t| t >= 4).collect());
    let dy = normal::<f64>(&mut rng, 60);
    let got = gradients(&plan_of(&spec, None), &inputs, &Fade::None, true, &dy);
    assert!(got[0][..12].iter().all(|&x| x == 0.0), "{:?}", &got[0][..12]);
    assert!(got.iter().flatten().all(|x| x.is_finite()));
    assert!(got[1][..12].iter().all(|&x| x == 0.0), "masked keys");
}

#[test]
fn wrong_calls_are_refused_before_any_work() {
    let x = [0.5f64; 12];
    let (mut a, mut b, mut c) = ([7.0; 12], [7.0; 12], [7.0; 12]);
    let shape = [1, 1, 4, 3];
    let view = || View::new(&x, shape).unwrap();
    let mut refuse = |spec: &Spec, dy: View<'_, f64>, short: bool| {
        let plan = plan_of(spec, None);
        let out = Gradients::new(
            ViewMut::new(&mut a, shape).unwrap(),
            ViewMut::new(&mut b, shape).unwrap(),
            if short {
                ViewMut::new(&mut c[..9], [1, 1, 3, 3]).unwrap()
            } else {
                ViewMut::new(&mut c, shape).unwrap()
            },
        );
        plan.backward(Call::causal(view(), view(), view()), dy, out).unwrap_err()
    };
    let taylor = Spec::new(3, 3).terms(3).build().unwrap();
    let dy = [0.5; 9];
    let wrong = refuse(&taylor, View::new(&dy, [1, 1, 3, 3]).unwrap(), false).to_string();
    assert!(wrong.contains("dy") && wrong.contains("[1, 1, 3, 3]"), "{wrong}");
    let wrong = refuse(&taylor, view(), true).to_string();
    assert!(wrong.contains("gradients.v") && wrong.contains("[1, 1, 3, 3]"), "{wrong}");
    let mut nan = x;
    nan[5] = f64::NAN;
    let wrong = refuse(&taylor, View::new(&nan, shape).unwrap(), false).to_string();
    assert!(wrong.contains("dy"), "{wrong}");
    for series in [Series::Gauss, Series::hermite()] {
        let spec = Spec::new(3, 3).series(series).build().unwrap();
        let wrong = refuse(&spec, view(), false);
        assert!(matches!(wrong, Error::Unsupported { .. }), "{wrong}");
    }
    assert!(a.iter().chain(&b).chain(&c).all(|&x| x == 7.0), "something was written");
}
