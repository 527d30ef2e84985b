//! The backward of whole calls against the oracle's analytic gradients.

#[path = "../../sata/tests/common/mod.rs"]
mod common;
mod gpu;
mod gradients;

use common::calls::spec;
use common::check::describe;
use common::gradients::{assert_gradients, rms, truth};
use common::{Fade, Inputs, Sizes, f64s, normal, rng};
use gpu::device;
use gradients::{Kind, bits, gradients, kinds};
use half::{bf16, f16};
use rand::Rng;
use rand::rngs::StdRng;
use sata::{Decay, Form, Near, Series, Spec};
use sata_cuda::{Buffer, Call, Element, Error, Gradients, Plan, View, ViewMut};

fn sizes(rng: &mut StdRng, [d_key, d_value]: [usize; 2], [queries, keys]: [usize; 2]) -> Sizes {
    Sizes {
        batch: rng.random_range(1..=2),
        kv_heads: rng.random_range(1..=2),
        group: rng.random_range(1..=3),
        queries,
        keys,
        d_key,
        d_value,
    }
}

/// One case in several ways of computing it.
fn check(
    rng: &mut StdRng,
    (series, terms, gain, dims): &Kind,
    (near, block, sinks): (Near, usize, usize),
    decay: Decay,
    tokens: [usize; 2],
    causal: bool,
) {
    let sizes = sizes(rng, *dims, tokens);
    let inputs = Inputs::<f32>::new(rng, sizes).gain(*gain);
    let inputs = if rng.random_bool(0.5) { inputs.masked(rng) } else { inputs };
    let fade = Fade::new(rng, decay, sizes);
    let spec = spec(sizes, series, *terms)
        .near(near)
        .block(block)
        .sinks(sinks)
        .decay(decay)
        .build()
        .unwrap();
    let dy = normal::<f32>(rng, sizes.y().iter().product());
    let want = truth(&spec, &inputs, &fade, causal, &f64s(&dy));
    let what = describe(&spec, &inputs, &fade, causal, "backward");
    let new = || Plan::new(&device(), &spec).unwrap();
    let (chunk, bytes) = (rng.random_range(1..50), rng.random_range(0..200_000));
    let plans = [
        (new(), "as chosen".to_string()),
        (new().with_form(Form::Direct), "direct".into()),
        (
            new().with_form(Form::State).with_chunk(chunk).with_work_bytes(bytes),
            format!("chunks of {chunk}, {bytes} bytes"),
        ),
    ];
    for (plan, how) in plans {
        let got = gradients::<f32>(&plan, &inputs, &fade, causal, &dy);
        assert_gradients(&format!("{what}, {how}"), &got, &want, tokens[1], 1e-4);
        let again = gradients::<f32>(&plan, &inputs, &fade, causal, &dy);
        assert_eq!(bits(&got), bits(&again), "{what}, {how}: another run differs");
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
    let kinds = kinds(&mut rng, 3);
    for near in NEAR {
        for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
            for tokens in [1, 2, 15, 16, 17, 33, 63, 64, 65, 129, 131] {
                if rng.random_bool(0.3) {
                    let kind = &kinds[rng.random_range(0..3)];
                    check(&mut rng, kind, near, decay, [tokens; 2], true);
                }
            }
        }
    }
}

#[test]
fn full_gradients_are_the_oracles() {
    let mut rng = rng();
    let kinds = kinds(&mut rng, 3);
    for near in [(Near::None, 64, 0), (Near::None, 16, 5)] {
        for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
            for tokens in [[1, 1], [1, 70], [33, 5], [64, 65], [40, 129], [150, 200]] {
                let kind = &kinds[rng.random_range(0..3)];
                check(&mut rng, kind, near, decay, tokens, false);
            }
        }
    }
}

/// The sizes that matter most, with chunks and parts of features as on a GPU.
#[test]
fn longer_sequences_take_sums() {
    let mut rng = rng();
    let kind = (Series::Taylor, 3, 1.0, [16, 16]);
    let near = (Near::Blocks(1), 64, 4);
    check(&mut rng, &kind, near, Decay::Gates, [700; 2], true);
}

/// Rows that need other tiles: of shared memory, of registers, of columns.
#[test]
fn long_keys_and_values() {
    let mut rng = rng();
    for dims in [[140, 10], [5, 150]] {
        let kind = (Series::Taylor, 2, 0.02, dims);
        check(&mut rng, &kind, (Near::Blocks(0), 16, 3), Decay::Gates, [70; 2], true);
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
    let plan = Plan::new(&device(), &spec).unwrap().with_form(Form::State).with_chunk(16);
    let got = gradients(&plan, &inputs, &Fade::None, true, &dy);
    assert_gradients("logits up to 80", &got, &want, 100, 1e-3);
}

/// A gate that forgets everything, now and then: what is far is beyond any float beside what is near.
#[test]
fn gates_that_forget_all_leave_what_comes_after() {
    let mut rng = rng();
    let sizes = Sizes { kv_heads: 2, ..Sizes::self_attention(150, 5, 6) };
    let inputs = Inputs::<f32>::new(&mut rng, sizes);
    let log_gates = (0..300).map(|t| if t % 37 == 20 { -1e4 } else { -0.01 }).collect();
    let fade = Fade::Gates { keys: 150, log_gates };
    let dy = normal::<f32>(&mut rng, sizes.y().iter().product());
    for near in [Near::None, Near::Blocks(0)] {
        let spec =
            Spec::new(5, 6).terms(3).near(near).block(8).decay(Decay::Gates).build().unwrap();
        let want = truth(&spec, &inputs, &fade, true, &f64s(&dy));
        let plan = Plan::new(&device(), &spec).unwrap().with_form(Form::State).with_chunk(16);
        let got = gradients(&plan, &inputs, &fade, true, &dy);
        assert_gradients("gates of e^-10000", &got, &want, 150, 1e-4);
    }
}

fn of_halves<E: Element>(unit: f64) {
    let mut rng = rng();
    let sizes = Sizes { kv_heads: 2, group: 2, ..Sizes::self_attention(90, 8, 8) };
    let inputs = Inputs::<f32>::new(&mut rng, sizes).to::<E>();
    let fade = Fade::new(&mut rng, Decay::Gates, sizes);
    let dy: Vec<E> = normal(&mut rng, sizes.y().iter().product());
    let spec = Spec::new(8, 8)
        .terms(3)
        .near(Near::Blocks(1))
        .block(16)
        .sinks(3)
        .decay(Decay::Gates)
        .build()
        .unwrap();
    // Of the very numbers that the device has; gates stay f32.
    let wide = inputs.to::<f32>();
    let want = truth(&spec, &wide, &fade, true, &f64s(&dy));
    let plan = Plan::new(&device(), &spec).unwrap().with_form(Form::State).with_chunk(16);
    let plan = plan.without_matrix_units();
    let got = gradients::<E>(&plan, &inputs, &fade, true, &dy);
    for (name, got, want, unit) in [
        ("dq", &got[0], &want[0], unit),
        ("dk", &got[1], &want[1], unit),
        ("dv", &got[2], &want[2], unit),
        ("dlog_gates", &got[3], &want[3], 1e-4),
    ] {
        let error = rms(got.iter().zip(want).map(|(g, w)| g - w));
        let size = rms(want.iter().copied());
        assert!(error <= unit * size, "{name} is off by {error:e}, of {size:e}");
    }
}

/// All is f32 within: what is lost is the rounding of the gradients themselves.
#[test]
fn gradients_of_bf16() {
    of_halves::<bf16>(1.0 / 512.0);
}

#[test]
fn gradients_of_f16() {
    of_halves::<f16>(1.0 / 4096.0 + 1e-5);
}

/// Sequences side by side have the gradients that each has alone; tokens of a packed projection are
/// rows apart.
#[test]
fn packed_sequences_have_their_own_gradients() {
    let mut rng = rng();
    let device = device();
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
        .sinks(2)
        .decay(Decay::Gates)
        .build()
        .unwrap();
    let plan = Plan::new(&device, &spec).unwrap().with_form(Form::State).with_chunk(8);
    // One buffer [total, 3, heads, d], as a projection leaves it.
    let row = 3 * heads * d;
    let qkv = Buffer::from_slice(&device, &normal::<f32>(&mut rng, total * row)).unwrap();
    let dy = Buffer::from_slice(&device, &normal::<f32>(&mut rng, total * heads * d)).unwrap();
    let gates: Vec<f32> = normal::<f32>(&mut rng, total * heads).iter().map(|g| -g.abs()).collect();
    let gates = Buffer::from_slice(&device, &gates).unwrap();
    // SAFETY: `at` and what follows it within the shape and strides lie in the buffers.
    let view = |of: &Buffer<f32>, at: usize, shape: [usize; 4], strides: [usize; 3]| unsafe {
        let address = of.address() + 4 * at as u64;
        View::from_raw(&device, address, of.len() - at.min(of.len()), shape, strides).unwrap()
    };
    let strided = |part: usize, from: usize, n: usize| {
        view(&qkv, from * row + part * heads * d, [1, heads, n, d], [total * row, d, row])
    };
    let run = |from: usize, n: usize, packed: bool| {
        let call = Call::causal(strided(0, from, n), strided(1, from, n), strided(2, from, n));
        let call = call.log_gates(view(&gates, from * heads, [1, heads, n, 1], [0, 1, heads]));
        let call = if packed { call.packed(&cu, &cu) } else { call };
        let nan = |len: usize| {
            let mut buffer = Buffer::<f32>::uninit(&device, len).unwrap();
            buffer.fill_bytes(0xff).unwrap();
            buffer
        };
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| nan(heads * n * d));
        let mut dg = nan(heads * n);
        // Token-major, as the projection.
        let (shape, strides) = ([1, heads, n, d], [n * heads * d, d, heads * d]);
        let out = Gradients::new(
            ViewMut::strided(&mut dq, shape, strides).unwrap(),
            ViewMut::strided(&mut dk, shape, strides).unwrap(),
            ViewMut::strided(&mut dv, shape, strides).unwrap(),
        );
        let gate_strides = [n * heads, 1, heads];
        let out = out.log_gates(ViewMut::strided(&mut dg, [1, heads, n, 1], gate_strides).unwrap());
        let dy = view(&dy, from * heads * d, shape, [total * heads * d, d, heads * d]);
        plan.backward(call, dy, out).unwrap();
        [dq, dk, dv, dg].map(|x| f64s(&x.to_vec().unwrap()))
    };
    let together = run(0, total, true);
    for (i, n) in lengths.into_iter().enumerate().filter(|(_, n)| *n > 0) {
        let alone = run(cu[i], n, false);
        for (together, alone) in together.iter().zip(&alone) {
            let width = together.len() / total;
            let part = &together[cu[i] * width..cu[i + 1] * width];
            let error = rms(part.iter().zip(alone).map(|(a, b)| a - b));
            assert!(error < 1e-5, "sequence {i} of {n} tokens: {error:e}");
        }
    }
}

#[test]
fn a_query_that_sees_nothing_has_no_gradient() {
    let mut rng = rng();
    let sizes = Sizes::self_attention(20, 3, 3);
    let spec = Spec::new(3, 3).terms(3).build().unwrap();
    let mut inputs = Inputs::<f32>::new(&mut rng, sizes);
    inputs.mask = Some((0..20).map(|t| t >= 4).collect());
    let dy = normal::<f32>(&mut rng, 60);
    for form in [Form::Direct, Form::State] {
        let plan = Plan::new(&device(), &spec).unwrap().with_form(form).with_chunk(3);
        let got = gradients(&plan, &inputs, &Fade::None, true, &dy);
        assert!(got[0][..12].iter().all(|&x| x == 0.0), "{:?}", &got[0][..12]);
        assert!(got.iter().flatten().all(|x| x.is_finite()));
        assert!(got[1][..12].iter().all(|&x| x == 0.0), "masked keys");
    }
}

/// The gradients by slopes and gates may be left out.
#[test]
fn what_is_not_asked_for_is_not_needed() {
    let mut rng = rng();
    let sizes = Sizes::self_attention(40, 3, 3);
    let inputs = Inputs::<f32>::new(&mut rng, sizes);
    let device = device();
    for decay in [Decay::Slopes, Decay::Gates] {
        let spec = Spec::new(3, 3).terms(3).decay(decay).build().unwrap();
        let plan = Plan::new(&device, &spec).unwrap();
        let fade = Fade::new(&mut rng, decay, sizes);
        let dy = normal::<f32>(&mut rng, 120);
        let all = gradients(&plan, &inputs, &fade, true, &dy);
        let there = gpu::OnDevice::new(&device, &inputs, &fade);
        let [mut a, mut b, mut c] = [(); 3].map(|()| gpu::blank::<f32>(&device, sizes));
        let out = gradients::out_of([&mut a, &mut b, &mut c], sizes);
        let dy = Buffer::from_slice(&device, &dy).unwrap();
        plan.backward(there.all(true), View::new(&dy, sizes.y()).unwrap(), out).unwrap();
        for (alone, all) in [a, b, c].iter().zip(&all) {
            assert_eq!(f64s(&alone.to_vec().unwrap()), *all);
        }
    }
}

#[test]
fn wrong_calls_are_refused_before_any_work() {
    let device = device();
    let x = Buffer::from_slice(&device, &[0.5f32; 12]).unwrap();
    let [mut a, mut b, mut c] =
        [(); 3].map(|()| Buffer::from_slice(&device, &[7.0f32; 12]).unwrap());
    let shape = [1, 1, 4, 3];
    let view = || View::new(&x, shape).unwrap();
    let mut refuse = |spec: &Spec, dy: View<'_, f32>, short: bool| {
        let plan = Plan::new(&device, spec).unwrap();
        let out = Gradients::new(
            ViewMut::new(&mut a, shape).unwrap(),
            ViewMut::new(&mut b, shape).unwrap(),
            ViewMut::new(&mut c, if short { [1, 1, 3, 3] } else { shape }).unwrap(),
        );
        plan.backward(Call::causal(view(), view(), view()), dy, out).unwrap_err()
    };
    let taylor = Spec::new(3, 3).terms(3).build().unwrap();
    let wrong = refuse(&taylor, View::new(&x, [1, 1, 3, 3]).unwrap(), false).to_string();
    assert!(wrong.contains("dy") && wrong.contains("[1, 1, 3, 3]"), "{wrong}");
    let wrong = refuse(&taylor, view(), true).to_string();
    assert!(wrong.contains("gradients.v") && wrong.contains("[1, 1, 3, 3]"), "{wrong}");
    for series in [Series::Gauss, Series::hermite()] {
        let spec = Spec::new(3, 3).series(series).build().unwrap();
        let wrong = refuse(&spec, view(), false);
        assert!(matches!(wrong, Error::Unsupported { .. }), "{wrong}");
    }
    let elsewhere = gpu::device();
    let there = Buffer::from_slice(&elsewhere, &[0.5f32; 12]).unwrap();
    let wrong = refuse(&taylor, View::new(&there, shape).unwrap(), false);
    assert!(matches!(wrong, Error::Argument { argument: "dy", .. }), "{wrong}");
    let plan = Plan::new(&device, &taylor).unwrap();
    let mut slopes = Buffer::from_slice(&device, &[7.0f64]).unwrap();
    let sizes = Sizes::self_attention(4, 3, 3);
    let out = gradients::out_of([&mut a, &mut b, &mut c], sizes).slopes(&mut slopes);
    let wrong = plan.backward(Call::causal(view(), view(), view()), view(), out).unwrap_err();
    assert!(wrong.to_string().contains("gradients.slopes"), "{wrong}");
    let mut gates = Buffer::from_slice(&device, &[7.0f32; 4]).unwrap();
    let out = gradients::out_of([&mut a, &mut b, &mut c], sizes)
        .log_gates(ViewMut::new(&mut gates, [1, 1, 4, 1]).unwrap());
    let wrong = plan.backward(Call::causal(view(), view(), view()), view(), out).unwrap_err();
    assert!(wrong.to_string().contains("gradients.log_gates"), "{wrong}");
    for buffer in [a, b, c] {
        assert!(buffer.to_vec().unwrap().iter().all(|&x| x == 7.0), "something was written");
    }
}
