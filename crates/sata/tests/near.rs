//! Near blocks and sinks, weighed exactly, against the oracle and against softmax.

mod common;

use common::calls::{blank, plan_of, run, spec};
use common::check::{check_form, check_forms};
use common::packed::run_packed;
use common::truth::{assert_rows, truth};
use common::{Fade, Inputs, Sizes, assert_close, f64s, rng, tolerance};
use half::{bf16, f16};
use rand::Rng;
use rand::rngs::StdRng;
use sata::{Element, Form, Near, Plan, Real, Series, Spec, ViewMut, conventional};

/// The series that are the same for every query, with their numbers of terms.
fn series() -> Vec<(Series, usize)> {
    vec![
        (Series::Taylor, 1),
        (Series::Taylor, 2),
        (Series::Taylor, 3),
        (Series::Taylor, 4),
        (Series::Fixed { coefficients: vec![0.7, 0.2, 0.0, 0.05] }, 4),
        (Series::power(2), 3),
        (Series::power(4), 5),
        (Series::Power { exponent: 2, floor: 0.0 }, 3),
    ]
}

/// Token counts at and around the ends of blocks.
fn tokens(block: usize) -> Vec<usize> {
    let mut tokens: Vec<usize> =
        [1, block - 1, block, block + 1, 2 * block - 1, 2 * block, 2 * block + 1, 5 * block + 3]
            .into_iter()
            .filter(|&n| n > 0)
            .collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

/// Random sizes and inputs of `tokens` tokens, sometimes several sequences, heads and masks.
fn some_inputs(rng: &mut StdRng, tokens: usize) -> Inputs<f32> {
    let sizes = Sizes {
        batch: rng.random_range(1..=2),
        kv_heads: rng.random_range(1..=2),
        group: rng.random_range(1..=2),
        ..Sizes::self_attention(tokens, rng.random_range(1..=5), rng.random_range(1..=9))
    };
    let inputs = Inputs::new(rng, sizes);
    if rng.random_bool(0.5) { inputs.masked(rng) } else { inputs }
}

#[test]
fn blocks_and_sinks_at_every_boundary() {
    let mut rng = rng();
    let mut turn = rng.random_range(0..8);
    for near in [Near::Blocks(0), Near::Blocks(1), Near::Blocks(2), Near::None] {
        for block in [1, 3, 16, 64] {
            for sinks in [0, 1, 5, 70] {
                for tokens in tokens(block) {
                    // Every series in turn: 3 is no divisor of the number of token counts.
                    turn += 3;
                    let (series, terms) = &series()[turn % 8];
                    let inputs = some_inputs(&mut rng, tokens);
                    let spec = spec(inputs.sizes, series, *terms)
                        .near(near)
                        .block(block)
                        .sinks(sinks)
                        .build()
                        .unwrap();
                    check_forms(&spec, &inputs, &Fade::None, true, [1.0; 2]);
                }
            }
        }
    }
}

#[test]
fn the_series_at_one_boundary() {
    let mut rng = rng();
    for (series, terms) in series() {
        for (near, block, sinks) in [(0, 16, 0), (1, 16, 5), (2, 7, 70), (1, 1, 1)] {
            let inputs = some_inputs(&mut rng, 97);
            let spec = spec(inputs.sizes, &series, terms)
                .near(Near::Blocks(near))
                .block(block)
                .sinks(sinks)
                .build()
                .unwrap();
            check_forms(&spec, &inputs, &Fade::None, true, [1.0; 2]);
        }
    }
}

#[test]
fn sinks_are_near_every_query_of_a_full_call() {
    let mut rng = rng();
    for sinks in [0, 1, 5, 70, 1000] {
        for (queries, keys) in [(1, 90), (40, 70), (3, 71), (130, 5), (2, 1)] {
            let (series, terms) = &series()[rng.random_range(0..8)];
            let sizes =
                Sizes { batch: 2, kv_heads: 2, group: 2, queries, keys, d_key: 4, d_value: 5 };
            let inputs = Inputs::new(&mut rng, sizes).masked(&mut rng);
            let spec = spec(sizes, series, *terms).sinks(sinks).block(16).build().unwrap();
            check_forms(&spec, &inputs, &Fade::None, false, [1.0; 2]);
        }
    }
}

/// Blocks are counted from where each sequence begins.
#[test]
fn packed_sequences_have_blocks_of_their_own() {
    fn one<T: Real>(rng: &mut StdRng, form: Form) {
        for (near, block, sinks) in [(0, 16, 0), (1, 16, 5), (1, 3, 1), (0, 64, 70), (2, 1, 0)] {
            let (series, terms) = &series()[rng.random_range(0..8)];
            let lengths = [0, 7, 65, 1, 33, 130];
            let s = Sizes { kv_heads: 2, group: 2, ..Sizes::self_attention(0, 4, 3) };
            let spec = spec(s, series, *terms)
                .near(Near::Blocks(near))
                .block(block)
                .sinks(sinks)
                .build()
                .unwrap();
            let all: Vec<(Inputs<T>, Fade)> = lengths
                .iter()
                .map(|&n| Inputs::new(rng, Sizes { queries: n, keys: n, ..s }).masked(rng))
                .map(|inputs| (inputs, Fade::None))
                .collect();
            let mut y: Vec<Vec<T>> = all.iter().map(|(inputs, _)| blank(inputs.sizes)).collect();
            run_packed(&plan_of(&spec, Some(form)), None, &all, &[0; 6], &lengths, &mut y);
            for ((inputs, fade), y) in all.iter().zip(&y) {
                let what = format!("{} of {lengths:?}, {spec:?}", inputs.sizes.keys);
                let truth = truth(&spec, inputs, fade, true);
                assert_rows(&what, y, &truth, tolerance::<T>());
            }
        }
    }
    let mut rng = rng();
    for form in [Form::Direct, Form::State] {
        one::<f64>(&mut rng, form);
        one::<f32>(&mut rng, form);
    }
}

/// Where everything is near, nothing is left to approximate, whatever the series.
#[test]
fn all_near_is_softmax() {
    fn one<E: Element>(rng: &mut StdRng, gain: f64, tolerance: f64) {
        for (tokens, near, block, sinks) in
            [(200, Near::Blocks(3), 64, 0), (90, Near::Blocks(9), 10, 3), (70, Near::None, 8, 70)]
        {
            let sizes = Sizes { kv_heads: 2, group: 2, ..Sizes::self_attention(tokens, 6, 7) };
            let inputs = Inputs::<E>::new(rng, sizes).gain(gain);
            for (series, terms) in [
                (Series::Taylor, 2),
                (Series::power(2), 3),
                (Series::Gauss, 4),
                (Series::hermite(), 3),
            ] {
                let spec = spec(sizes, &series, terms)
                    .near(near)
                    .block(block)
                    .sinks(sinks)
                    .build()
                    .unwrap();
                for form in [None, Some(Form::Direct), Some(Form::State)] {
                    for causal in [true, false] {
                        if !causal && near != Near::None {
                            continue;
                        }
                        let (y, found) = run(&plan_of(&spec, form), &inputs, &Fade::None, causal);
                        let mut want = blank::<E>(sizes);
                        conventional::attention(
                            inputs.q(),
                            inputs.k(),
                            inputs.v(),
                            spec.scale(),
                            causal,
                            0,
                            ViewMut::new(&mut want, sizes.y()).unwrap(),
                        )
                        .unwrap();
                        let what = format!("{spec:?} {form:?} causal={causal} {}", E::NAME);
                        assert_close(&what, &y, &f64s(&want), tolerance);
                        assert!(found.is_clean(), "{what}: {found}");
                    }
                }
            }
        }
    }
    let mut rng = rng();
    one::<f64>(&mut rng, 1.0, 1e-12);
    one::<f32>(&mut rng, 1.0, 1e-6);
    // Logits of some tens, whose own rounding is what is left.
    one::<f64>(&mut rng, 10.0, 1e-12);
    one::<f32>(&mut rng, 10.0, 2e-5);
}

/// Numbers whose largest logit is ±80: exp(±80) fits in f32, their products do not.
#[test]
fn logits_of_80_stay_in_range() {
    let mut rng = rng();
    // A block of one token leaves queries with nothing near but a logit of −80, below a polynomial
    // of thousands.
    for (near, block, sinks) in [
        (Near::Blocks(0), 1, 0),
        (Near::Blocks(1), 1, 1),
        (Near::Blocks(0), 16, 0),
        (Near::Blocks(1), 16, 5),
        (Near::Blocks(2), 64, 0),
        (Near::None, 16, 1),
    ] {
        for (series, terms) in series() {
            for decay in [sata::Decay::None, sata::Decay::Slopes, sata::Decay::Gates] {
                let sizes = Sizes { kv_heads: 2, ..Sizes::self_attention(70, 3, 4) };
                let mut inputs = Inputs::<f32>::new(&mut rng, sizes);
                let spec = spec(sizes, &series, terms)
                    .near(near)
                    .block(block)
                    .sinks(sinks)
                    .decay(decay)
                    .build()
                    .unwrap();
                let largest = largest_logit(&inputs) * spec.scale();
                inputs = inputs.gain(80.0 / largest);
                let fade = Fade::new(&mut rng, decay, sizes);
                // A logit of 80 is known to 80 roundings only.
                check_forms(&spec, &inputs, &fade, true, [100.0, 10.0]);
            }
        }
    }
}

/// The largest |q·k| of any head.
fn largest_logit(inputs: &Inputs<f32>) -> f64 {
    let s = inputs.sizes;
    let (q, k) = (f64s(&inputs.q), f64s(&inputs.k));
    let mut largest = 0f64;
    for head in 0..s.kv_heads {
        let rows = |x: &[f64], tokens: usize| -> Vec<Vec<f64>> {
            let n = tokens * s.d_key;
            x[head * n..(head + 1) * n].chunks(s.d_key).map(<[f64]>::to_vec).collect()
        };
        for q in rows(&q, s.queries) {
            for k in rows(&k, s.keys) {
                largest = largest.max(q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>().abs());
            }
        }
    }
    largest
}

#[test]
fn half_precision_inputs_are_computed_in_f32() {
    fn one<E: Element>(rng: &mut StdRng) {
        let sizes = Sizes { group: 2, ..Sizes::self_attention(150, 12, 10) };
        let inputs = Inputs::<E>::new(rng, sizes);
        let spec = spec(sizes, &Series::Taylor, 3)
            .near(Near::Blocks(1))
            .block(16)
            .sinks(3)
            .build()
            .unwrap();
        let truth = truth(&spec, &inputs, &Fade::None, true);
        // The rounding of outputs to E itself.
        let output = if E::NAME == "BF16" { 4e-3 } else { 5e-4 };
        for form in [Form::Direct, Form::State] {
            let slack = output / tolerance::<E>();
            check_form(&spec, &inputs, &Fade::None, true, form, &truth, slack);
        }
    }
    let mut rng = rng();
    one::<f16>(&mut rng);
    one::<bf16>(&mut rng);
}

/// What is near is weighed by exp, and so the answer is not that of the polynomial alone: the tests
/// above would not see the difference if there were none.
#[test]
fn near_makes_a_difference() {
    let mut rng = rng();
    let sizes = Sizes::self_attention(64, 4, 3);
    let inputs = Inputs::<f64>::new(&mut rng, sizes);
    let far = Spec::new(4, 3).terms(2).block(16).build().unwrap();
    let (alone, _) = run(&Plan::new(&far).unwrap(), &inputs, &Fade::None, true);
    for near in [
        spec(sizes, &Series::Taylor, 2).block(16).near(Near::Blocks(0)),
        spec(sizes, &Series::Taylor, 2).block(16).sinks(8),
    ] {
        let plan = Plan::new(&near.build().unwrap()).unwrap();
        let (y, _) = run(&plan, &inputs, &Fade::None, true);
        assert!(common::relative_rms(&y, &alone) > 1e-3);
    }
}

/// A call without a state keeps no token, whatever there would be room for.
#[test]
fn a_window_longer_than_memory() {
    let mut rng = rng();
    let inputs = Inputs::<f32>::new(&mut rng, Sizes::self_attention(40, 3, 2));
    for (series, terms) in series() {
        let spec = spec(inputs.sizes, &series, terms)
            .near(Near::Blocks((1 << 25) - 1))
            .block(64)
            .sinks(1 << 31)
            .build()
            .unwrap();
        check_forms(&spec, &inputs, &Fade::None, true, [1.0; 2]);
    }
}
