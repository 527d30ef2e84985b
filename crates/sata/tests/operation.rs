//! The operation against the oracle: sizes that straddle every boundary, every series, every form.

mod common;

use common::{Inputs, Sizes, assert_close, rng, tolerance};
use half::{bf16, f16};
use sata::{Call, Element, Form, Plan, Series, Spec, State, ViewMut};

fn plan(d_key: usize, d_value: usize, terms: usize, series: &Series) -> Plan {
    let mut spec = Spec::new(d_key, d_value).series(series.clone());
    if *series == Series::Taylor {
        spec = spec.terms(terms);
    }
    Plan::new(&spec.build().unwrap()).unwrap()
}

fn run<E: Element>(plan: &Plan, inputs: &Inputs<E>, causal: bool) -> Vec<E> {
    let nan = E::from_compute(sata::Real::from_f64(f64::NAN));
    let mut y = vec![nan; inputs.sizes.y().iter().product()];
    let (q, k, v) = (inputs.q(), inputs.k(), inputs.v());
    let mut call = if causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
    if let Some(mask) = &inputs.mask {
        call = call.key_mask(mask);
    }
    plan.run(call, ViewMut::new(&mut y, inputs.sizes.y()).unwrap()).unwrap();
    y
}

/// Both forms, causal and full, in f64 and f32.
fn check(sizes: Sizes, terms: usize, series: &Series, masked: bool) {
    fn one<E: Element>(sizes: Sizes, terms: usize, series: &Series, masked: bool) {
        let mut rng = rng();
        let mut inputs = Inputs::<E>::new(&mut rng, sizes);
        if masked {
            inputs = inputs.masked(&mut rng);
        }
        for causal in [true, false] {
            if causal && sizes.queries != sizes.keys {
                continue;
            }
            let want = inputs.oracle(terms, series, causal);
            // An even P lets denominators come close to 0, and many terms of one large negative
            // logit cancel: both magnify rounding, by as much as these very inputs say.
            let conditioned = terms.is_multiple_of(2) || terms > 8;
            let magnified = if conditioned { inputs.rounding(terms, series, causal) } else { 0.0 };
            let allowed = tolerance::<E>().max(magnified);
            for form in [Form::Direct, Form::State] {
                let plan = plan(sizes.d_key, sizes.d_value, terms, series).with_form(form);
                let got = run(&plan, &inputs, causal);
                let what =
                    format!("{sizes:?} P={terms} {series:?} causal={causal} {form:?} {}", E::NAME);
                assert_close(&what, &got, &want, allowed);
            }
        }
    }
    one::<f64>(sizes, terms, series, masked);
    one::<f32>(sizes, terms, series, masked);
}

#[test]
fn token_counts_straddle_panels_and_chunks() {
    for tokens in [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 257] {
        check(Sizes::self_attention(tokens, 8, 8), 3, &Series::Taylor, false);
    }
}

#[test]
fn head_sizes_straddle_vectors_and_tiles() {
    for (d_key, d_value) in [
        (1, 1),
        (2, 3),
        (3, 7),
        (5, 9),
        (8, 15),
        (7, 16),
        (9, 17),
        (16, 24),
        (15, 31),
        (17, 33),
        (33, 64),
        (64, 65),
        (70, 5),
    ] {
        let terms = if d_key > 20 { 3 } else { 5 };
        check(Sizes::self_attention(70, d_key, d_value), terms, &Series::Taylor, false);
    }
}

#[test]
fn every_number_of_terms() {
    for terms in 1..=8 {
        check(Sizes::self_attention(40, 4, 6), terms, &Series::Taylor, false);
    }
    check(Sizes::self_attention(40, 1, 2), 21, &Series::Taylor, false);
}

#[test]
fn batch_heads_groups_and_masks() {
    let sizes =
        Sizes { batch: 2, kv_heads: 3, group: 2, queries: 75, keys: 75, d_key: 6, d_value: 5 };
    check(sizes, 3, &Series::Taylor, false);
    check(sizes, 3, &Series::Taylor, true);
}

#[test]
fn more_or_fewer_queries_than_keys() {
    for (queries, keys) in [(1, 90), (3, 64), (130, 5), (65, 129)] {
        let sizes = Sizes { batch: 1, kv_heads: 2, group: 2, queries, keys, d_key: 5, d_value: 4 };
        check(sizes, 3, &Series::Taylor, false);
        check(sizes, 3, &Series::Taylor, true);
    }
}

#[test]
fn series_that_name_some_orders() {
    for series in [
        Series::power(2),
        Series::power(4),
        Series::Power { exponent: 2, floor: 0.0 },
        Series::Fixed { coefficients: vec![1.0, 0.0, 0.5] },
        Series::Fixed { coefficients: vec![0.3, 0.2, 0.4, 0.0, 0.1] },
    ] {
        let terms = match &series {
            Series::Power { exponent, .. } => exponent + 1,
            Series::Fixed { coefficients } => coefficients.len(),
            _ => unreachable!(),
        };
        check(Sizes::self_attention(130, 6, 9), terms, &series, false);
    }
}

#[test]
fn half_precision_inputs_are_computed_in_f32() {
    fn one<E: Element>() {
        let mut rng = rng();
        let inputs = Inputs::<E>::new(&mut rng, Sizes::self_attention(150, 12, 10));
        let want = inputs.oracle(3, &Series::Taylor, true);
        let plan = plan(12, 10, 3, &Series::Taylor).with_form(Form::State);
        // The rounding of outputs to E itself.
        let output = if E::NAME == "BF16" { 4e-3 } else { 5e-4 };
        assert_close(E::NAME, &run(&plan, &inputs, true), &want, output);
    }
    one::<f16>();
    one::<bf16>();
}

#[test]
fn any_split_gives_the_same_numbers() {
    let mut rng = rng();
    let sizes =
        Sizes { batch: 2, kv_heads: 2, group: 2, queries: 210, keys: 210, d_key: 7, d_value: 6 };
    for block in [1, 7, 64, 100] {
        let inputs = Inputs::<f64>::new(&mut rng, sizes).masked(&mut rng);
        let want = inputs.oracle(3, &Series::Taylor, true);
        let spec = Spec::new(7, 6).terms(3).block(block).build().unwrap();
        let plan = Plan::new(&spec).unwrap();
        let mask = inputs.mask.as_ref().unwrap();
        for split in [
            vec![210],
            vec![1; 210],
            vec![63, 1, 1, 64, 0, 65, 16],
            vec![100, 110],
            vec![1, 208, 1],
        ] {
            let mut state = State::new(&plan, 2, 2).unwrap();
            let mut y = vec![f64::NAN; want.len()];
            let mut first = 0;
            for n in split {
                let part = |x: &[f64], heads: usize, d: usize| -> Vec<f64> {
                    let mut out = vec![];
                    for row in 0..2 * heads {
                        out.extend_from_slice(
                            &x[(row * 210 + first) * d..(row * 210 + first + n) * d],
                        );
                    }
                    out
                };
                let (q, k, v) =
                    (part(&inputs.q, 4, 7), part(&inputs.k, 2, 7), part(&inputs.v, 2, 6));
                let m: Vec<bool> = (0..2)
                    .flat_map(|b| mask[b * 210 + first..b * 210 + first + n].to_vec())
                    .collect();
                let mut out = vec![f64::NAN; 2 * 4 * n * 6];
                let call = Call::causal(
                    sata::View::new(&q, [2, 4, n, 7]).unwrap(),
                    sata::View::new(&k, [2, 2, n, 7]).unwrap(),
                    sata::View::new(&v, [2, 2, n, 6]).unwrap(),
                )
                .key_mask(&m)
                .state(&mut state);
                plan.run(call, ViewMut::new(&mut out, [2, 4, n, 6]).unwrap()).unwrap();
                for row in 0..8 {
                    y[(row * 210 + first) * 6..(row * 210 + first + n) * 6]
                        .copy_from_slice(&out[row * n * 6..(row + 1) * n * 6]);
                }
                first += n;
            }
            assert_eq!(state.position(1), 210);
            assert_close(&format!("block {block}"), &y, &want, 1e-12);
        }
    }
}

#[test]
fn features_split_over_threads_and_stretches_of_chunks() {
    // One head on three threads: its features are split, and its chunks are more than a stretch.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    pool.install(|| {
        let mut rng = rng();
        let sizes = Sizes::self_attention(1500, 9, 11);
        let plan = plan(9, 11, 5, &Series::Taylor).with_form(Form::State);
        let recipe = plan.recipe::<f64>([1, 1], [1500, 1500], true, false, 3);
        assert!(recipe.slices > 1 && 1500 > 8 * recipe.chunk, "{recipe:?} does not test this");
        let inputs = Inputs::<f64>::new(&mut rng, sizes);
        for causal in [true, false] {
            let want = inputs.oracle(5, &Series::Taylor, causal);
            assert_close("split", &run(&plan, &inputs, causal), &want, 1e-12);
        }
        let inputs = Inputs::<f32>::new(&mut rng, sizes);
        let want = inputs.oracle(5, &Series::Taylor, true);
        assert_close("split", &run(&plan, &inputs, true), &want, 1e-5);
    });
}
