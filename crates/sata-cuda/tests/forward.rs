//! Forward calls against the oracle: every series and option, direct and by sums.

#[path = "../../sata/tests/common/mod.rs"]
mod common;
mod gpu;

use common::check::describe;
use common::settings::{Setting, settings, slack};
use common::truth::{assert_rows, truth};
use common::{Fade, Inputs, Sizes, rng, tolerance};
use gpu::{device, run};
use rand::Rng;
use sata::{Decay, Form, Near, Series, Spec};
use sata_cuda::Plan;

/// Direct, and by sums taken every few tokens.
fn check(spec: &Spec, inputs: &Inputs<f32>, fade: &Fade, causal: bool, chunk: usize, slack: f64) {
    let truth = truth(spec, inputs, fade, causal);
    for form in [Form::Direct, Form::State] {
        let plan = Plan::new(&device(), spec).unwrap().with_form(form).with_chunk(chunk);
        let (y, found) = run(&plan, inputs, fade, causal);
        let what = describe(spec, inputs, fade, causal, &format!("{form:?}, chunks of {chunk}"));
        assert_rows(&what, &y, &truth, slack * tolerance::<f32>());
        assert_eq!(found.queries, truth.denominators.len() as u64, "{what}");
        assert_eq!(found.non_finite, 0, "{what}");
    }
}

/// Two sequences, two key/value heads, each read by two.
fn sizes(tokens: usize) -> Sizes {
    Sizes { batch: 2, kv_heads: 2, group: 2, ..Sizes::self_attention(tokens, 5, 6) }
}

#[test]
fn every_setting() {
    let mut rng = rng();
    for setting in settings() {
        let s = sizes(130);
        let spec = setting.spec(s);
        let mut inputs = Inputs::<f32>::new(&mut rng, s);
        if rng.random_bool(0.5) {
            inputs = inputs.masked(&mut rng);
        }
        let fade = Fade::new(&mut rng, setting.decay, s);
        check(&spec, &inputs, &fade, true, rng.random_range(8..80), setting.slack()[1]);
        if setting.near == Near::None {
            let inputs = Inputs::<f32>::new(&mut rng, Sizes { queries: 37, ..s });
            check(&spec, &inputs, &fade, false, rng.random_range(8..80), setting.slack()[1]);
        }
    }
}

#[test]
fn sizes_around_blocks_and_chunks() {
    let mut rng = rng();
    for tokens in [1, 2, 31, 32, 33, 63, 64, 65, 97, 128, 129] {
        for near in [Near::None, Near::Blocks(1)] {
            let s = Sizes { group: 3, kv_heads: 1, batch: 1, ..sizes(tokens) };
            let spec = Spec::new(5, 6).terms(3).near(near).block(16).build().unwrap();
            let inputs = Inputs::<f32>::new(&mut rng, s);
            check(&spec, &inputs, &Fade::None, true, 32, 1.0);
        }
    }
}

#[test]
fn series_of_any_orders() {
    let mut rng = rng();
    let of = |coefficients: &[f64]| Series::Fixed { coefficients: coefficients.to_vec() };
    for (series, terms) in [
        (Series::Taylor, 1),
        (Series::Taylor, 2),
        (Series::Taylor, 5),
        (Series::Taylor, 6),
        (of(&[0.3]), 1),
        (of(&[0.5, 0.0, 0.25, 0.0, 0.125]), 5),
        (of(&[0.0, 0.0, 1.0]), 3),
        (Series::power(4), 5),
        (Series::Power { exponent: 2, floor: 0.0 }, 3),
        (Series::power(12), 13),
        (Series::Gauss, 6),
        (Series::Gauss, 8),
        (Series::Hermite { tau: 0.7 }, 1),
        (Series::Hermite { tau: 0.9 }, 6),
    ] {
        let d = if terms > 8 { 2 } else { 3 };
        let s = Sizes { d_key: d, d_value: 4, ..sizes(70) };
        let s = Sizes { batch: 1, group: 1, ..s };
        let inputs = Inputs::<f32>::new(&mut rng, s);
        let spec = common::calls::spec(s, &series, terms).build().unwrap();
        let slack = slack(&series, terms, Decay::None)[1];
        let slack = if terms % 2 == 0 { 10.0 * slack } else { slack };
        check(&spec, &inputs, &Fade::None, true, 24, slack);
        check(&spec, &inputs, &Fade::None, false, 24, slack);
    }
}

#[test]
fn masks_hide_whole_chunks_and_sequences() {
    let mut rng = rng();
    for decay in [Decay::None, Decay::Gates] {
        for (near, sinks) in [(Near::None, 0), (Near::Blocks(1), 3), (Near::None, 40)] {
            let s = Sizes { batch: 3, ..sizes(100) };
            let spec = Spec::new(5, 6).terms(3).near(near).block(8).sinks(sinks).decay(decay);
            let mut inputs = Inputs::<f32>::new(&mut rng, s);
            // The second sequence has no key at all, the others none of some stretches.
            let hidden = |i: usize| match i / s.keys {
                0 => !(10..60).contains(&(i % s.keys)),
                1 => false,
                _ => !(0..70).contains(&(i % s.keys)),
            };
            inputs.mask = Some((0..s.batch * s.keys).map(hidden).collect());
            let fade = Fade::new(&mut rng, decay, s);
            let spec = spec.build().unwrap();
            check(&spec, &inputs, &fade, true, 16, 1.0);
            if near == Near::None {
                check(&spec, &inputs, &fade, false, 16, 1.0);
            }
        }
    }
}

#[test]
fn long_decays_and_large_logits() {
    let mut rng = rng();
    let s = sizes(120);
    // Gates that leave nothing of all before but for the few last tokens, and some that forget all.
    let setting = Setting {
        series: Series::Taylor,
        terms: 3,
        near: Near::Blocks(1),
        block: 8,
        sinks: 2,
        decay: Decay::Gates,
    };
    let inputs = Inputs::<f32>::new(&mut rng, s);
    for log_gate in [-30.0, -1e4] {
        let fade = Fade::gates(s, log_gate);
        check(&setting.spec(s), &inputs, &fade, true, 16, 1.0);
        let far = Setting { near: Near::None, sinks: 0, ..setting.clone() };
        check(&far.spec(s), &inputs, &fade, true, 16, 1.0);
        check(&far.spec(s), &inputs, &fade, false, 16, 1.0);
    }
    // Nothing but sinks, and now and then all before is forgotten.
    let gate = |i: usize| if i.is_multiple_of(9) { -3e4 } else { 0.0 };
    let log_gates = (0..s.batch * s.kv_heads * s.keys).map(gate).collect();
    let fade = Fade::Gates { keys: s.keys, log_gates };
    for near in [Near::None, Near::Blocks(1)] {
        let spec = Setting { sinks: 200, near, ..setting.clone() }.spec(s);
        check(&spec, &inputs, &fade, true, 16, 1.0);
    }
    // Near logits of about −200, and nothing far beside them.
    let mut low = inputs.clone();
    low.k = low.k.chunks(5).flat_map(|_| [1.0, -1.0, 0.5, 2.0, 1.0]).collect();
    low.q = low.q.chunks(5).flat_map(|_| [-60.0, 60.0, -30.0, -120.0, -60.0]).collect();
    let spec = Setting { block: 64, sinks: 0, decay: Decay::None, ..setting.clone() }.spec(s);
    let plan = Plan::new(&device(), &spec).unwrap();
    let (y, found) = run(&plan, &low, &Fade::None, true);
    assert!(found.is_clean(), "{found}");
    assert_rows("low logits", &y, &truth(&spec, &low, &Fade::None, true), tolerance::<f32>());
    // Logits of about ±80 among near ones.
    let inputs = inputs.gain(25.0);
    let spec = Setting { decay: Decay::None, series: Series::Gauss, terms: 2, ..setting };
    let plan = Plan::new(&device(), &spec.spec(s)).unwrap();
    let truth = truth(&spec.spec(s), &inputs, &Fade::None, true);
    let (y, found) = run(&plan, &inputs, &Fade::None, true);
    assert!(found.is_clean(), "{found}");
    assert_rows("large logits", &y, &truth, 1e-3);
}

#[test]
fn small_working_memory_and_many_parts() {
    let mut rng = rng();
    let s = Sizes { batch: 3, kv_heads: 3, ..sizes(90) };
    let spec = Spec::new(5, 6).terms(4).near(Near::Blocks(1)).block(8).build().unwrap();
    let inputs = Inputs::<f32>::new(&mut rng, s);
    let whole = Plan::new(&device(), &spec).unwrap().with_form(Form::State).with_chunk(16);
    let (want, _) = run(&whole, &inputs, &Fade::None, true);
    for bytes in [1, 30_000, 100_000, 1 << 20] {
        let plan = Plan::new(&device(), &spec).unwrap().with_form(Form::State).with_chunk(16);
        let (y, _) = run(&plan.with_work_bytes(bytes), &inputs, &Fade::None, true);
        let same = y.iter().zip(&want).filter(|(a, b)| (**a - **b).abs() > 1e-5).count();
        assert_eq!(same, 0, "{bytes} bytes");
    }
}

/// Far logits that are all alike, or nearly, made of products of features that cancel: what is left
/// of their spread is rounding, of which a series per query must not make nodes.
#[test]
fn rounding_makes_no_nodes() {
    let mut rng = rng();
    let d = 8;
    for (spread, part) in
        [(0.0, 1.0), (0.0, 0.1), (0.0, 1e-3), (1e-3, 1.0), (0.05, 0.1), (0.3, 0.1), (0.3, 1.0)]
    {
        let mut inputs = Inputs::<f32>::new(&mut rng, Sizes::self_attention(256, d, 4));
        // Keys that differ by `spread`, queries whose product with them is a `part` of what it was.
        let key: Vec<f32> = (0..d).map(|c| 2.0 * inputs.k[c]).collect();
        let square: f32 = key.iter().map(|k| k * k).sum();
        for t in 0..256 {
            for (to, k) in inputs.k[t * d..].iter_mut().zip(&key) {
                *to = k + spread as f32 * rng.random_range(-1.0..1.0f32);
            }
            let q = &mut inputs.q[t * d..(t + 1) * d];
            let along = q.iter().zip(&key).map(|(q, k)| q * k).sum::<f32>() / square;
            for (q, k) in q.iter_mut().zip(&key) {
                *q -= (1.0 - part as f32) * along * k;
            }
        }
        for (series, terms) in
            [(Series::Gauss, 2), (Series::Gauss, 4), (Series::Gauss, 6), (Series::hermite(), 4)]
        {
            let spec = Spec::new(d, 4).series(series.clone()).terms(terms);
            let spec = spec.near(Near::Blocks(0)).block(64).build().unwrap();
            let want = truth(&spec, &inputs, &Fade::None, true).y;
            let plan = Plan::new(&device(), &spec).unwrap().with_form(Form::State).with_chunk(64);
            let (y, found) = run(&plan, &inputs, &Fade::None, true);
            let error = common::relative_rms(&common::f64s(&y), &want);
            let what = format!("{series:?} P = {terms}, spread {spread}, part {part}");
            assert!(error < 2e-3 && found.is_clean(), "{what}: {error:e} {found:?}");
        }
    }
}

/// More tokens than one round of a scan has.
#[test]
fn long_windows() {
    let mut rng = rng();
    let s = Sizes::self_attention(2300, 2, 1);
    let spec = Spec::new(2, 1).terms(3).decay(Decay::Gates).sinks(1).build().unwrap();
    let mut inputs = Inputs::<f32>::new(&mut rng, s);
    // None is there between the first few tokens and the second round.
    inputs.mask = Some((0..s.keys).map(|t| !(30..=2100).contains(&t)).collect());
    let fade = Fade::gates(s, -1e-3);
    let truth = truth(&spec, &inputs, &fade, true);
    let plan = Plan::new(&device(), &spec).unwrap().with_form(Form::State).with_chunk(256);
    let (y, _) = run(&plan, &inputs, &fade, true);
    assert_rows("long windows", &y, &truth, tolerance::<f32>());
}
