//! Slopes and gates against the oracle: mild ones, and ones that forget everything.

mod common;

use common::calls::{blank, plan_of, run, spec};
use common::check::check_forms;
use common::packed::run_packed;
use common::truth::{assert_rows, truth};
use common::{Fade, Inputs, Sizes, assert_close, f64s, rng, tolerance};
use rand::Rng;
use rand::rngs::StdRng;
use sata::{Decay, Form, Near, Real, Series, alibi_slopes};

fn series() -> Vec<(Series, usize)> {
    vec![
        (Series::Taylor, 3),
        (Series::Taylor, 4),
        (Series::power(2), 3),
        (Series::Fixed { coefficients: vec![0.7, 0.0, 0.3] }, 3),
    ]
}

/// What is near: blocks, the tokens of each, sinks.
const NEAR: [(Near, usize, usize); 7] = [
    (Near::None, 64, 0),
    (Near::None, 5, 0),
    (Near::None, 16, 5),
    (Near::Blocks(0), 16, 0),
    (Near::Blocks(1), 16, 5),
    (Near::Blocks(1), 3, 70),
    (Near::Blocks(2), 1, 1),
];

fn inputs(rng: &mut StdRng, sizes: Sizes, masked: bool) -> Inputs<f32> {
    let inputs = Inputs::new(rng, sizes);
    if masked { inputs.masked(rng) } else { inputs }
}

#[test]
fn slopes_and_gates_are_as_the_oracle_has_them() {
    let mut rng = rng();
    for decay in [Decay::Slopes, Decay::Gates] {
        for (near, block, sinks) in NEAR {
            for (series, terms) in series() {
                for tokens in [1, 5, 16, 17, 33, 64, 65, 131] {
                    let sizes = Sizes {
                        batch: 2,
                        kv_heads: 2,
                        group: rng.random_range(1..=2),
                        ..Sizes::self_attention(tokens, 4, 3)
                    };
                    let masked = rng.random_bool(0.5);
                    let inputs = inputs(&mut rng, sizes, masked);
                    let fade = Fade::new(&mut rng, decay, sizes);
                    let spec = spec(sizes, &series, terms)
                        .near(near)
                        .block(block)
                        .sinks(sinks)
                        .decay(decay)
                        .build()
                        .unwrap();
                    check_forms(&spec, &inputs, &fade, true, [1.0; 2]);
                }
            }
        }
    }
}

/// A finished context has decayed to its end, whoever asks.
#[test]
fn full_calls_stand_at_the_last_key() {
    let mut rng = rng();
    for decay in [Decay::Slopes, Decay::Gates] {
        for sinks in [0, 5, 70] {
            for (queries, keys) in [(1, 90), (40, 64), (3, 71), (130, 5)] {
                let (series, terms) = &series()[rng.random_range(0..4)];
                let sizes =
                    Sizes { batch: 2, kv_heads: 2, group: 2, queries, keys, d_key: 4, d_value: 5 };
                let inputs = Inputs::new(&mut rng, sizes).masked(&mut rng);
                let fade = Fade::new(&mut rng, decay, sizes);
                let spec = spec(sizes, series, *terms)
                    .sinks(sinks)
                    .block(16)
                    .decay(decay)
                    .build()
                    .unwrap();
                check_forms(&spec, &inputs, &fade, false, [1.0; 2]);
            }
        }
    }
}

#[test]
fn packed_sequences_decay_on_their_own() {
    fn one<T: Real>(rng: &mut StdRng, decay: Decay, form: Form) {
        for (near, block, sinks) in NEAR {
            let (series, terms) = &series()[rng.random_range(0..4)];
            let lengths = [7, 0, 65, 1, 33];
            let s = Sizes { kv_heads: 2, group: 2, ..Sizes::self_attention(0, 4, 3) };
            let spec = spec(s, series, *terms)
                .near(near)
                .block(block)
                .sinks(sinks)
                .decay(decay)
                .build()
                .unwrap();
            // All sequences have the same slopes, and gates of their own.
            let slopes = Fade::new(rng, Decay::Slopes, s);
            let mut sequence = |n: usize| {
                let sizes = Sizes { queries: n, keys: n, ..s };
                let fade = match decay {
                    Decay::Slopes => slopes.clone(),
                    _ => Fade::new(rng, decay, sizes),
                };
                (Inputs::<T>::new(rng, sizes).masked(rng), fade)
            };
            let all: Vec<(Inputs<T>, Fade)> = lengths.iter().map(|&n| sequence(n)).collect();
            let mut y: Vec<Vec<T>> = all.iter().map(|(inputs, _)| blank(inputs.sizes)).collect();
            run_packed(&plan_of(&spec, Some(form)), None, &all, &[0; 5], &lengths, &mut y);
            for ((inputs, fade), y) in all.iter().zip(&y) {
                let what = format!("{} of {lengths:?}, {spec:?}", inputs.sizes.keys);
                assert_rows(&what, y, &truth(&spec, inputs, fade, true), tolerance::<T>());
            }
        }
    }
    let mut rng = rng();
    for decay in [Decay::Slopes, Decay::Gates] {
        for form in [Form::Direct, Form::State] {
            one::<f64>(&mut rng, decay, form);
            one::<f32>(&mut rng, decay, form);
        }
    }
}

/// Decays whose exponentials are 0 in every number type, so that only differences can be taken.
#[test]
fn strong_decay_forgets_and_stays_finite() {
    let mut rng = rng();
    for (near, block, sinks) in NEAR {
        for (series, terms) in series() {
            for kind in 0..7 {
                let sizes = Sizes { kv_heads: 2, ..Sizes::self_attention(70, 3, 4) };
                // With the query's own key masked, the strongest of all would take every digit of
                // the others' logits, in the oracle too.
                let masked = kind != 4 && rng.random_bool(0.6);
                let inputs = inputs(&mut rng, sizes, masked);
                let gates = |mut of: Box<dyn FnMut(usize) -> f32>| {
                    let log_gates = (0..2 * 70).map(|i| of(i % 70)).collect();
                    Fade::Gates { keys: 70, log_gates }
                };
                let (b, mut own) = (block, rng.clone());
                let fade = match kind {
                    // A block forgets by exp(−10⁴) in all.
                    0 => gates(Box::new(move |_| -1e4 / b as f32)),
                    // Single tokens that forget as much: first and last of a block, or anywhere.
                    1 => gates(Box::new(move |t| if t % b == 0 { -1e4 } else { -0.1 })),
                    2 => gates(Box::new(move |t| if t % b == b - 1 { -1e4 } else { 0.0 })),
                    3 => gates(Box::new(move |_| if own.random_bool(0.1) { -1e4 } else { -0.05 })),
                    // The strongest that a number holds, which cannot even be added up in f32.
                    4 => {
                        gates(Box::new(move |_| if own.random_bool(0.2) { f32::MIN } else { 0.0 }))
                    }
                    5 => Fade::Slopes(vec![1e4 / block as f64, 0.0]),
                    _ => Fade::Slopes(vec![1e6, 3.0]),
                };
                rng.random::<u64>();
                let spec = spec(sizes, &series, terms)
                    .near(near)
                    .block(block)
                    .sinks(sinks)
                    .decay(fade.decay())
                    .build()
                    .unwrap();
                check_forms(&spec, &inputs, &fade, true, [10.0, 10.0]);
            }
        }
    }
}

/// Where the last keys are masked and have forgotten, all that is left weighs exp(−10⁴): a common
/// factor, which must not be taken for nothing.
#[test]
fn a_masked_key_still_forgets_and_what_is_left_counts() {
    let mut rng = rng();
    let sizes = Sizes::self_attention(40, 3, 4);
    for (near, block, sinks) in NEAR {
        for log_gate in [-0.3, -100.0, -1e4] {
            let mut inputs = Inputs::<f32>::new(&mut rng, sizes);
            inputs.mask = Some((0..40).map(|t| t < 8).collect());
            let gates = (0..40).map(|t| if t % 4 == 1 { log_gate } else { -0.1 }).collect();
            let fade = Fade::Gates { keys: 40, log_gates: gates };
            let spec = spec(sizes, &Series::Taylor, 3)
                .near(near)
                .block(block)
                .sinks(sinks)
                .decay(Decay::Gates)
                .build()
                .unwrap();
            check_forms(&spec, &inputs, &fade, true, [10.0, 10.0]);
            if near == Near::None {
                check_forms(&spec, &inputs, &fade, false, [10.0, 10.0]);
            }
        }
        // That a masked key's gate is heard: without it the answer is another.
        let mut inputs = Inputs::<f64>::new(&mut rng, sizes);
        inputs.mask = Some((0..40).map(|t| t != 30).collect());
        let spec = spec(sizes, &Series::Taylor, 3)
            .near(near)
            .block(block)
            .sinks(sinks)
            .decay(Decay::Gates)
            .build()
            .unwrap();
        let answer = |log_gate: f32| {
            let gates = (0..40).map(|t| if t == 30 { log_gate } else { 0.0 }).collect();
            let fade = Fade::Gates { keys: 40, log_gates: gates };
            run(&plan_of(&spec, None), &inputs, &fade, true).0
        };
        let (kept, forgot) = (answer(0.0), answer(-5.0));
        assert_close("before it", &kept[..30 * 4], &forgot[..30 * 4], 1e-12);
        assert!(common::relative_rms(&kept[31 * 4..], &forgot[31 * 4..]) > 1e-3, "{spec:?}");
    }
}

/// ALiBi with explicit softmax: x − m·(t − s).
#[test]
fn slopes_are_alibi() {
    let mut rng = rng();
    let sizes = Sizes { kv_heads: 4, group: 2, ..Sizes::self_attention(90, 5, 6) };
    let inputs = Inputs::<f64>::new(&mut rng, sizes);
    let slopes = alibi_slopes(4);
    let mut want = vec![];
    for head in 0..8 {
        let kv = head / 2;
        for t in 0..90 {
            let q = &inputs.q[(head * 90 + t) * 5..][..5];
            let (mut sum, mut y) = (0.0, [0.0; 6]);
            for s in 0..=t {
                let k = &inputs.k[(kv * 90 + s) * 5..][..5];
                let x: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / 5f64.sqrt();
                let w = (x - slopes[kv] * (t - s) as f64).exp();
                sum += w;
                for (y, v) in y.iter_mut().zip(&inputs.v[(kv * 90 + s) * 6..][..6]) {
                    *y += w * v;
                }
            }
            want.extend(y.map(|y| y / sum));
        }
    }
    let spec = spec(sizes, &Series::Taylor, 1)
        .near(Near::Blocks(5))
        .block(16)
        .decay(Decay::Slopes)
        .build()
        .unwrap();
    let fade = Fade::Slopes(slopes);
    for form in [Form::Direct, Form::State] {
        let plan = plan_of(&spec, Some(form));
        assert_close("f64", &run(&plan, &inputs, &fade, true).0, &want, 1e-12);
        assert_close("f32", &run(&plan, &inputs.to::<f32>(), &fade, true).0, &want, 1e-5);
    }
}

#[test]
fn alibi_slopes_are_the_published_ones() {
    let near = |got: Vec<f64>, want: &[f64]| {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() <= 1e-15, "{got} is not {want}");
        }
    };
    near(alibi_slopes(0), &[]);
    near(alibi_slopes(1), &[1.0 / 256.0]);
    near(alibi_slopes(2), &[1.0 / 16.0, 1.0 / 256.0]);
    let eight = [2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0].map(|x: f64| 1.0 / x);
    near(alibi_slopes(8), &eight);
    // Eight of 8 heads, then every other of 16: 2^−½, 2^−1½, …
    let more = [0.707_106_781_186_547_5, 0.353_553_390_593_273_8, 0.176_776_695_296_636_9];
    let more = [&more[..], &[0.088_388_347_648_318_44]].concat();
    near(alibi_slopes(12), &[&eight[..], &more].concat());
    near(alibi_slopes(3), &[1.0 / 16.0, 1.0 / 256.0, 0.25]);
    near(alibi_slopes(16)[..2].to_vec(), &[0.5f64.sqrt(), 0.5]);
}

#[test]
fn no_decay_is_a_decay_of_nothing() {
    let mut rng = rng();
    for (near, block, sinks) in NEAR {
        for (series, terms) in series() {
            let sizes = Sizes { kv_heads: 2, group: 2, ..Sizes::self_attention(75, 4, 3) };
            let inputs = Inputs::<f64>::new(&mut rng, sizes).masked(&mut rng);
            let of = |decay: Decay| {
                let spec = spec(sizes, &series, terms).near(near).block(block).sinks(sinks);
                spec.decay(decay).build().unwrap()
            };
            let plain = of(Decay::None);
            let truth = truth(&plain, &inputs, &Fade::None, true);
            for form in [Form::Direct, Form::State] {
                for fade in
                    [Fade::Slopes(vec![0.0; 2]), Fade::gates(sizes, 0.0), Fade::gates(sizes, -0.0)]
                {
                    let plan = plan_of(&of(fade.decay()), Some(form));
                    let (y, _) = run(&plan, &inputs, &fade, true);
                    assert_rows(&format!("{fade:?} {form:?}"), &y, &truth, 1e-12);
                }
            }
        }
    }
}

/// The first gate has nothing before it to forget, and a slope is a gate that never changes.
#[test]
fn gates_and_slopes_say_the_same_where_they_can() {
    let mut rng = rng();
    for (near, block, sinks) in NEAR {
        let sizes = Sizes { batch: 2, kv_heads: 1, ..Sizes::self_attention(80, 4, 3) };
        let inputs = Inputs::<f64>::new(&mut rng, sizes);
        let of = |decay: Decay| {
            let spec = spec(sizes, &Series::Taylor, 3).near(near).block(block).sinks(sinks);
            plan_of(&spec.decay(decay).build().unwrap(), None)
        };
        let slope = 0.0625; // The same number in f32.
        let (want, _) = run(&of(Decay::Slopes), &inputs, &Fade::Slopes(vec![slope]), true);
        let mut fade = Fade::gates(sizes, -slope as f32);
        for first in [-slope as f32, 0.0, -30.0] {
            if let Fade::Gates { log_gates, .. } = &mut fade {
                (log_gates[0], log_gates[80]) = (first, first);
            }
            let (y, _) = run(&of(Decay::Gates), &inputs, &fade, true);
            assert_close(&format!("{near:?} {first}"), &y, &f64s(&want), 1e-12);
        }
    }
}
