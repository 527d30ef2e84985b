//! What calls say about their own numbers, held to what the oracle counts.

mod common;

use common::calls::{blank, feed_in, part, part_mut, plan_of, run, spec};
use common::truth::{Truth, each_problem, truth};
use common::{Fade, Inputs, Sizes, assert_close, f64s, rng};
use rand::Rng;
use sata::{
    Call, Decay, Diagnostics, Error, Form, HeadDiagnostics, Near, Plan, Series, Spec, State,
    ViewMut,
};
use sata_oracle::softmax_attention;

fn diagnosed(
    plan: &Plan,
    inputs: &Inputs<f64>,
    fade: &Fade,
    causal: bool,
) -> (Vec<f64>, Diagnostics) {
    let s = inputs.sizes;
    let mut y = blank::<f64>(s);
    let (q, k, v) = (inputs.q(), inputs.k(), inputs.v());
    let mut call = if causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
    if let Some(mask) = &inputs.mask {
        call = call.key_mask(mask);
    }
    let call = fade.give(call, s, 0, s.keys).diagnose(true);
    let found = plan.run(call, ViewMut::new(&mut y, s.y()).unwrap()).unwrap();
    (y, found)
}

/// Pr[Poisson(λ) ≥ P], summed from P on, so that small ones keep their digits.
fn poisson_tail(lambda: f64, terms: usize) -> f64 {
    let mut term = (-lambda).exp();
    for p in 1..=terms {
        term *= lambda / p as f64;
    }
    let mut sum = 0.0;
    for p in terms..terms + 2000 {
        sum += term;
        term *= lambda / (p + 1) as f64;
    }
    sum
}

/// What a head's numbers must be, by the oracle.
fn wanted(spec: &Spec, truth: &Truth, s: Sizes, head: usize) -> HeadDiagnostics {
    let mut want = HeadDiagnostics::default();
    let (mut tails, mut variances) = (0.0, 0.0);
    for row in 0..truth.denominators.len() {
        if row / s.queries % (s.kv_heads * s.group) != head {
            continue;
        }
        want.queries += 1;
        want.non_positive += u64::from(truth.denominators[row] <= 0.0);
        if let Some(far) = &truth.far[row] {
            let variance = far.deviation * far.deviation;
            want.far += 1;
            want.mean += far.mean;
            variances += variance;
            want.max_deviation = want.max_deviation.max(far.deviation);
            tails += match spec.series() {
                Series::Taylor => poisson_tail(variance + far.mean * far.mean, spec.terms()),
                _ => poisson_tail(variance, spec.terms()),
            };
        }
    }
    let far = want.far as f64;
    want.mean /= far;
    want.deviation = (variances / far).sqrt();
    want.estimate = match spec.series() {
        Series::Taylor | Series::Gauss | Series::Hermite { .. } => Some((tails / far).sqrt()),
        _ => None,
    };
    want
}

#[track_caller]
fn near(what: &str, got: f64, want: f64, tolerance: f64) {
    let off = (got - want).abs();
    assert!(off <= tolerance * want.abs().max(1e-3), "{what}: got {got}, want {want}");
}

#[test]
fn heads_are_as_the_oracle_counts_them() {
    let mut rng = rng();
    for (series, terms) in [
        (Series::Taylor, 3),
        (Series::Taylor, 4),
        (Series::Taylor, 5),
        (Series::Gauss, 4),
        (Series::Gauss, 6),
        (Series::hermite(), 3),
        (Series::hermite(), 4),
        (Series::Fixed { coefficients: vec![1.0, 0.9, 0.4] }, 3),
    ] {
        for (near_part, block, sinks) in [
            (Near::None, 16, 0),
            (Near::None, 16, 5),
            (Near::Blocks(1), 8, 3),
            (Near::Blocks(0), 1, 0),
        ] {
            for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
                let causal = near_part != Near::None || rng.random_bool(0.5);
                let s =
                    Sizes { batch: 2, kv_heads: 2, group: 2, ..Sizes::self_attention(60, 3, 4) };
                // Logits that deviate by some more than 1, so that denominators come out negative.
                let inputs = Inputs::<f64>::new(&mut rng, s).masked(&mut rng).gain(1.7);
                let fade = Fade::new(&mut rng, decay, s);
                let spec = spec(s, &series, terms)
                    .near(near_part)
                    .block(block)
                    .sinks(sinks)
                    .decay(decay)
                    .build()
                    .unwrap();
                let truth = truth(&spec, &inputs, &fade, causal);
                for form in [Form::Direct, Form::State] {
                    let plan = plan_of(&spec, Some(form));
                    let (y, found) = diagnosed(&plan, &inputs, &fade, causal);
                    let what = format!("{spec:?} {form:?} causal={causal}");
                    // The answers are what they are without.
                    let (plain, without) = run(&plan, &inputs, &fade, causal);
                    let same = common::truth::row_error(&what, &y, &truth).relative;
                    let other = common::truth::row_error(&what, &plain, &truth).relative;
                    assert!(same < 1e-8 && other < 1e-8, "{what}: {same:e} {other:e}");
                    assert!(without.heads.is_empty(), "nobody asked");
                    assert_eq!(found.queries, 2 * 4 * 60);
                    assert_eq!(found.heads.len(), 4, "{what}");
                    let sum = |of: fn(&HeadDiagnostics) -> u64| -> u64 {
                        found.heads.iter().map(of).sum()
                    };
                    assert_eq!(sum(|head| head.queries), found.queries, "{what}");
                    assert_eq!(sum(|head| head.non_positive), found.non_positive, "{what}");
                    assert_eq!(sum(|head| head.non_finite), 0, "{what}");
                    for (head, got) in found.heads.iter().enumerate() {
                        let want = wanted(&spec, &truth, s, head);
                        let what = format!("head {head}, {what}");
                        assert_eq!(got.queries, want.queries, "{what}");
                        assert_eq!(got.far, want.far, "{what}");
                        assert_eq!(got.non_positive, want.non_positive, "{what}");
                        near(&format!("mean, {what}"), got.mean, want.mean, 1e-6);
                        near(&format!("deviation, {what}"), got.deviation, want.deviation, 1e-6);
                        near(
                            &format!("largest deviation, {what}"),
                            got.max_deviation,
                            want.max_deviation,
                            1e-6,
                        );
                        match (got.estimate, want.estimate) {
                            (Some(got), Some(want)) => {
                                near(&format!("estimate, {what}"), got, want, 1e-5);
                            }
                            (got, want) => assert_eq!(got, want, "{what}"),
                        }
                    }
                }
            }
        }
    }
}

/// That the test above has had something to count.
#[test]
fn denominators_are_counted_per_head() {
    let mut rng = rng();
    let s = Sizes { group: 3, ..Sizes::self_attention(80, 3, 4) };
    let mut inputs = Inputs::<f64>::new(&mut rng, s).gain(4.0);
    // The second head asks nothing: all its logits are 0.
    inputs.q[80 * 3..2 * 80 * 3].fill(0.0);
    let spec = spec(s, &Series::Taylor, 4).build().unwrap();
    let (_, found) = diagnosed(&Plan::new(&spec).unwrap(), &inputs, &Fade::None, true);
    let counts: Vec<u64> = found.heads.iter().map(|head| head.non_positive).collect();
    assert!(counts[0] > 0 && counts[2] > 0, "{counts:?}");
    let quiet = &found.heads[1];
    assert_eq!((quiet.non_positive, quiet.mean, quiet.deviation), (0, 0.0, 0.0));
    assert!(quiet.estimate.unwrap() < 1e-9, "{quiet:?}");
    // In f32 overflow is counted where it happens.
    let mut inputs = inputs.to::<f32>();
    inputs.q[..3].fill(1e30);
    inputs.k[..3].fill(1e30);
    let mut y = blank::<f32>(s);
    let call = Call::causal(inputs.q(), inputs.k(), inputs.v()).diagnose(true);
    let plan = Plan::new(&spec).unwrap();
    let found = plan.run(call, ViewMut::new(&mut y, s.y()).unwrap()).unwrap();
    assert!(found.heads[0].non_finite >= 1, "{found:?}");
    let sum: u64 = found.heads.iter().map(|head| head.non_finite).sum();
    assert_eq!(sum, found.non_finite);
}

#[test]
fn without_a_far_past_there_is_nothing_to_say() {
    let mut rng = rng();
    let s = Sizes::self_attention(30, 3, 4);
    let inputs = Inputs::<f64>::new(&mut rng, s);
    let spec = spec(s, &Series::Taylor, 3).near(Near::Blocks(1)).block(16).build().unwrap();
    let (_, found) = diagnosed(&Plan::new(&spec).unwrap(), &inputs, &Fade::None, true);
    let head = &found.heads[0];
    assert_eq!((head.queries, head.far), (30, 0));
    assert_eq!((head.mean, head.deviation, head.max_deviation), (0.0, 0.0, 0.0));
}

/// A past and a call, call after call, give what one call gives, added up.
#[test]
fn calls_with_a_state_count_the_past() {
    let mut rng = rng();
    for (series, terms) in [(Series::Taylor, 4), (Series::Gauss, 4), (Series::hermite(), 3)] {
        let s = Sizes { kv_heads: 2, group: 2, ..Sizes::self_attention(50, 3, 4) };
        let inputs = Inputs::<f64>::new(&mut rng, s);
        let spec = spec(s, &series, terms).near(Near::Blocks(0)).block(8).sinks(2).build().unwrap();
        let plan = Plan::new(&spec).unwrap();
        let truth = truth(&spec, &inputs, &Fade::None, true);
        let mut state = State::<f64>::new(&plan, 1, 2).unwrap();
        let mut y = blank::<f64>(s);
        let mut sums = vec![[0.0; 3]; 4];
        let mut from = 0;
        for n in [20, 1, 1, 9, 1, 18] {
            let call = Call::causal(
                part(&inputs.q, s.q(), from, n),
                part(&inputs.k, s.k(), from, n),
                part(&inputs.v, s.v(), from, n),
            );
            let out = part_mut(&mut y, s.y(), from, n);
            let found = plan.run(call.state(&mut state).diagnose(true), out).unwrap();
            assert_eq!(found.heads.len(), 4);
            for (sum, head) in sums.iter_mut().zip(&found.heads) {
                assert_eq!(head.queries, n as u64);
                let far = head.far as f64;
                sum[0] += far;
                sum[1] += far * head.mean;
                sum[2] += far * head.deviation * head.deviation;
            }
            from += n;
        }
        assert_close("answers", &y, &truth.y, 1e-8);
        for (head, [far, mean, variance]) in sums.into_iter().enumerate() {
            let want = wanted(&spec, &truth, s, head);
            assert_eq!(far, want.far as f64);
            near("mean", mean / far, want.mean, 1e-6);
            near("deviation", (variance / far).sqrt(), want.deviation, 1e-6);
        }
        // The same state by steps is in the same place.
        let (stepped, _) = feed_in(&plan, &inputs, &Fade::None, &[1; 50]);
        assert_eq!(stepped.position(0), state.position(0));
    }
}

/// ε/(1 − ε) with ε = e^R R^P/P!.
fn bound(r: f64, terms: usize) -> f64 {
    let mut epsilon = r.exp();
    for p in 1..=terms {
        epsilon *= r / p as f64;
    }
    epsilon / (1.0 - epsilon)
}

#[test]
fn a_bound_is_given_where_it_says_something_and_holds() {
    let mut rng = rng();
    for terms in [3, 5, 7] {
        for (near_part, block, sinks) in
            [(Near::None, 16, 0), (Near::None, 16, 3), (Near::Blocks(0), 4, 0)]
        {
            for decay in [Decay::None, Decay::Gates] {
                let s = Sizes { kv_heads: 2, group: 2, ..Sizes::self_attention(40, 3, 4) };
                let mut inputs = Inputs::<f64>::new(&mut rng, s);
                let fade = Fade::new(&mut rng, decay, s);
                let spec = spec(s, &Series::Taylor, terms)
                    .near(near_part)
                    .block(block)
                    .sinks(sinks)
                    .decay(decay)
                    .build()
                    .unwrap();
                let norms = |x: &[f64], from: usize, n: usize| -> f64 {
                    let rows = x[from * 3..(from + n) * 3].chunks(3);
                    rows.map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt())
                        .fold(0.0, f64::max)
                };
                let largest = |inputs: &Inputs<f64>, head: usize| {
                    let (q, k) =
                        (norms(&inputs.q, head * 40, 40), norms(&inputs.k, head / 2 * 40, 40));
                    q * k * spec.scale()
                };
                // R of 0.7 leaves ε well below 1 for 3 terms.
                let all = |inputs: &Inputs<f64>| {
                    norms(&inputs.q, 0, 160) * norms(&inputs.k, 0, 80) * spec.scale()
                };
                let gain = 0.7 / all(&inputs);
                inputs = inputs.gain(gain);
                let (y, found) = diagnosed(&Plan::new(&spec).unwrap(), &inputs, &fade, true);
                let mut softmax = vec![];
                each_problem(&spec, &inputs, &fade, true, |problem| {
                    softmax.extend(softmax_attention(problem).y);
                });
                let v = inputs.v.iter().fold(0f64, |most, v| most.max(v.abs()));
                let loosest = bound(all(&inputs), terms);
                for (head, got) in found.heads.iter().enumerate() {
                    let got =
                        got.bound.unwrap_or_else(|| panic!("no bound for head {head}, {spec:?}"));
                    // Of this head's queries and keys, or of all the call's; near keys need none.
                    let tightest = match (near_part, sinks) {
                        (Near::None, 0) => bound(largest(&inputs, head), terms),
                        _ => 0.0,
                    };
                    assert!(
                        tightest * (1.0 - 1e-9) <= got && got <= loosest * (1.0 + 1e-9),
                        "head {head}: {tightest} <= {got} <= {loosest}"
                    );
                    let rows = head * 160..(head + 1) * 160;
                    for (y, want) in y[rows.clone()].iter().zip(&softmax[rows]) {
                        assert!(
                            (y - want).abs() <= got * v + 1e-14,
                            "head {head}: {y} {want} {got}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn no_bound_where_it_would_say_nothing() {
    let mut rng = rng();
    let s = Sizes::self_attention(40, 3, 4);
    let small = Inputs::<f64>::new(&mut rng, s).gain(0.01);
    let large = Inputs::<f64>::new(&mut rng, s).gain(10.0);
    let of = |series: Series, terms: usize, inputs: &Inputs<f64>| {
        let plan = Plan::new(&spec(s, &series, terms).build().unwrap()).unwrap();
        diagnosed(&plan, inputs, &Fade::None, true).1.heads[0].bound
    };
    assert!(of(Series::Taylor, 3, &small).is_some());
    assert_eq!(of(Series::Taylor, 3, &large), None);
    for (series, terms) in [
        (Series::Taylor, 4),
        (Series::Gauss, 4),
        (Series::hermite(), 3),
        (Series::Fixed { coefficients: vec![1.0, 1.0, 0.5] }, 3),
    ] {
        assert_eq!(of(series.clone(), terms, &small), None, "{series:?}");
    }
}

/// A bound must hold for keys of the past too, or not be given.
#[test]
fn a_bound_does_not_forget_the_past() {
    let mut rng = rng();
    let s = Sizes::self_attention(40, 3, 4);
    let mut inputs = Inputs::<f64>::new(&mut rng, s).gain(0.02);
    // The past has keys 100 times as large as those that come later.
    inputs.k[..30 * 3].iter_mut().for_each(|k| *k *= 100.0);
    let spec = spec(s, &Series::Taylor, 3).block(8).build().unwrap();
    let plan = Plan::new(&spec).unwrap();
    let mut state = State::<f64>::new(&plan, 1, 1).unwrap();
    let mut y = blank::<f64>(s);
    for range in [0..30, 30..40] {
        let (from, n) = (range.start, range.len());
        let call = Call::causal(
            part(&inputs.q, s.q(), from, n),
            part(&inputs.k, s.k(), from, n),
            part(&inputs.v, s.v(), from, n),
        );
        let out = part_mut(&mut y, s.y(), from, n);
        let found = plan.run(call.state(&mut state).diagnose(true), out).unwrap();
        assert_eq!(found.heads[0].bound, None, "{range:?}");
    }
}

#[test]
fn diagnosing_needs_the_orders_0_to_2() {
    let mut rng = rng();
    let s = Sizes::self_attention(20, 3, 4);
    let inputs = Inputs::<f64>::new(&mut rng, s);
    for (series, terms) in [
        (Series::Taylor, 1),
        (Series::Taylor, 2),
        (Series::Gauss, 2),
        (Series::power(2), 3),
        (Series::power(4), 5),
        (Series::Fixed { coefficients: vec![1.0, 0.0, 0.5] }, 3),
        (Series::Fixed { coefficients: vec![0.0, 1.0, 0.5] }, 3),
    ] {
        for form in [None, Some(Form::Direct), Some(Form::State)] {
            let plan = plan_of(&spec(s, &series, terms).build().unwrap(), form);
            let mut state = State::<f64>::new(&plan, 1, 1).unwrap();
            let before = state.to_bytes();
            let mut y = vec![-7.0; 20 * 4];
            for with_state in [false, true] {
                let mut call = Call::causal(inputs.q(), inputs.k(), inputs.v()).diagnose(true);
                if with_state {
                    call = call.state(&mut state);
                }
                match plan.run(call, ViewMut::new(&mut y, s.y()).unwrap()) {
                    Err(error @ Error::Unsupported { .. }) => {
                        assert!(error.to_string().contains("diagnos"), "{error}");
                    }
                    other => panic!("{series:?} {terms}: {other:?}"),
                }
                assert!(y.iter().all(|&y| y == -7.0));
            }
            assert!(state.to_bytes() == before);
        }
    }
    // Hermite keeps them, however few its terms.
    for terms in [1, 2] {
        let spec = spec(s, &Series::hermite(), terms).build().unwrap();
        let (y, found) = diagnosed(&Plan::new(&spec).unwrap(), &inputs, &Fade::None, true);
        let truth = truth(&spec, &inputs, &Fade::None, true);
        assert_close("answers", &y, &f64s(&truth.y), 1e-8);
        let want = wanted(&spec, &truth, s, 0);
        near("deviation", found.heads[0].deviation, want.deviation, 1e-6);
        near("estimate", found.heads[0].estimate.unwrap(), want.estimate.unwrap(), 1e-5);
    }
}
