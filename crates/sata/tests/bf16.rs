//! bf16 inputs, whose kernels may round more than those of f32: against the oracle on the same
//! inputs, in every form.

mod common;

use common::calls::{plan_of, run};
use common::truth::truth;
use common::{Fade, Inputs, Sizes, rng};
use half::bf16;
use sata::{Call, Decay, Form, Near, Plan, Series, Spec, State, ViewMut};

fn relative(got: &[bf16], want: &[f64]) -> f64 {
    let (error, size) = got.iter().zip(want).fold((0.0, 0.0), |(error, size), (got, want)| {
        (error + (got.to_f64() - want).powi(2), size + want * want)
    });
    (error / size).sqrt()
}

#[test]
fn errors_are_those_of_bf16() {
    let sizes = |tokens, d_key, d_value, group| Sizes {
        batch: 1,
        kv_heads: 2,
        group,
        queries: tokens,
        keys: tokens,
        d_key,
        d_value,
    };
    for (sizes, terms, series) in [
        (sizes(700, 8, 8, 1), 3, Series::Taylor),
        (sizes(333, 16, 16, 2), 3, Series::Taylor),
        (sizes(600, 16, 24, 1), 5, Series::Taylor),
        (sizes(400, 32, 32, 1), 3, Series::Taylor),
        (sizes(200, 40, 64, 1), 3, Series::Taylor),
        (sizes(150, 12, 100, 1), 3, Series::Taylor),
        (sizes(300, 9, 17, 1), 5, Series::Power { exponent: 4, floor: 1e-3 }),
    ] {
        for masked in [false, true] {
            let mut rng = rng();
            let mut inputs = Inputs::<bf16>::new(&mut rng, sizes);
            if masked {
                inputs = inputs.masked(&mut rng);
            }
            for causal in [true, false] {
                let want = inputs.oracle(terms, &series, causal);
                for form in [None, Some(Form::Direct), Some(Form::State)] {
                    let mut spec = Spec::new(sizes.d_key, sizes.d_value).series(series.clone());
                    if series == Series::Taylor {
                        spec = spec.terms(terms);
                    }
                    let spec = spec.block(48).build().unwrap();
                    let mut plan = Plan::new(&spec).unwrap();
                    let mut state = State::new(&plan, 1, sizes.kv_heads).unwrap();
                    if let Some(form) = form {
                        plan = plan.with_form(form);
                    }
                    let mut y = vec![bf16::NAN; inputs.sizes.y().iter().product()];
                    let (q, k, v) = (inputs.q(), inputs.k(), inputs.v());
                    let mut call = if causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
                    if let Some(mask) = &inputs.mask {
                        call = call.key_mask(mask);
                    }
                    if form.is_none() {
                        call = call.state(&mut state);
                    }
                    plan.run(call, ViewMut::new(&mut y, inputs.sizes.y()).unwrap()).unwrap();
                    let error = relative(&y, &want);
                    assert!(
                        error < 4e-3,
                        "{sizes:?} {series:?} causal={causal} {form:?}: {error:e}"
                    );
                }
            }
        }
    }
}

/// With all that a spec can ask for. Moments of bf16 features move nodes and coefficients of the
/// series per query by about as much as the features themselves are rounded.
#[test]
fn near_blocks_decay_and_series_per_query() {
    let sizes = Sizes { kv_heads: 2, group: 2, ..Sizes::self_attention(500, 16, 16) };
    let mut rng = rng();
    for (series, terms, limit) in [
        (Series::Taylor, 3, 4e-3),
        (Series::Gauss, 2, 4e-3),
        (Series::Gauss, 4, 8e-3),
        (Series::hermite(), 3, 8e-3),
        (Series::hermite(), 5, 8e-3),
    ] {
        for near in [Near::None, Near::Blocks(1)] {
            for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
                let inputs = Inputs::<bf16>::new(&mut rng, sizes).masked(&mut rng);
                let fade = Fade::new(&mut rng, decay, sizes);
                let spec = Spec::new(sizes.d_key, sizes.d_value)
                    .series(series.clone())
                    .terms(terms)
                    .near(near)
                    .block(48)
                    .sinks(3)
                    .decay(decay)
                    .build()
                    .unwrap();
                let want = truth(&spec, &inputs, &fade, true).y;
                for form in [Form::Direct, Form::State] {
                    let (y, _) = run(&plan_of(&spec, Some(form)), &inputs, &fade, true);
                    let seen = |x: &(&bf16, &f64)| !x.1.is_nan();
                    let (y, want): (Vec<bf16>, Vec<f64>) =
                        y.iter().zip(&want).filter(seen).map(|(y, want)| (*y, *want)).unzip();
                    let error = relative(&y, &want);
                    let what = format!("{series:?} P = {terms}, {near:?}, {decay:?}, {form:?}");
                    println!("{what}: {error:.1e}");
                    assert!(error < limit, "{what}: {error:e}");
                }
            }
        }
    }
}
