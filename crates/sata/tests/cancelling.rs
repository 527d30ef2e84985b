//! Far logits that are all alike, or nearly, made of products of features that cancel: what is
//! left of their spread is rounding, of which a series per query must not make nodes.

mod common;

use common::calls::{plan_of, run};
use common::truth::truth;
use common::{Fade, Inputs, Sizes, relative_rms, rng};
use rand::Rng;
use sata::{Decay, Element, Form, Near, Plan, Series, Spec, State, View, ViewMut};

/// 256 keys that differ from one another by `spread`, queries whose product with them is a `part`
/// of what it would be.
fn inputs(d: usize, spread: f64, part: f64) -> Inputs<f32> {
    let mut rng = rng();
    let mut inputs = Inputs::<f32>::new(&mut rng, Sizes::self_attention(256, d, 4));
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
    inputs
}

fn check<E: Element>(inputs: &Inputs<E>, series: &Series, terms: usize, limit: f64) {
    let d = inputs.sizes.d_key;
    let spec = Spec::new(d, 4).series(series.clone()).terms(terms).near(Near::Blocks(0)).block(64);
    let spec = spec.build().unwrap();
    let fade = Fade::new(&mut rng(), Decay::None, inputs.sizes);
    let want = truth(&spec, inputs, &fade, true).y;
    let (y, found) = run(&plan_of(&spec, Some(Form::State)), inputs, &fade, true);
    let y: Vec<f64> = y.iter().map(|y| sata::Real::to_f64(y.to_compute())).collect();
    let error = relative_rms(&y, &want);
    assert!(error < limit, "{series:?} P = {terms}, d = {d}, {}: {error:e} {found:?}", E::NAME);
}

#[test]
fn rounding_makes_no_nodes() {
    for d in [1, 8, 16, 32] {
        for (spread, part) in
            [(0.0, 1.0), (0.0, 0.1), (0.0, 1e-3), (1e-3, 1.0), (0.05, 0.1), (0.3, 0.1), (0.3, 1.0)]
        {
            let inputs = inputs(d, spread, part);
            for (series, terms) in
                [(Series::Gauss, 2), (Series::Gauss, 4), (Series::Gauss, 6), (Series::hermite(), 4)]
            {
                if d == 32 && terms > 4 {
                    continue;
                }
                println!("d = {d}, spread {spread}, part {part}");
                check(&inputs, &series, terms, 2e-3);
                check(&inputs.to::<f64>(), &series, terms, 1e-6);
            }
        }
    }
}

/// Powers of tiny logits underflow, and their inverses overflow.
#[test]
fn many_terms_of_tiny_logits_end() {
    let mut rng = rng();
    let inputs = Inputs::<f64>::new(&mut rng, Sizes::self_attention(60, 1, 4));
    for scale in [1e-4, 1e-8, 1e-10, 1e-14, 1e-30, 1e-300] {
        for terms in [4, 20, 22, 24, 32] {
            let spec = Spec::new(1, 4).series(Series::Gauss).terms(terms).scale(scale).block(4);
            let spec = spec.build().unwrap();
            for form in [Form::Direct, Form::State] {
                let plan = Plan::new(&spec).unwrap().with_form(form);
                let mut y = vec![0.0; 240];
                let call = sata::Call::causal(inputs.q(), inputs.k(), inputs.v()).strict(true);
                plan.run(call, ViewMut::new(&mut y, inputs.sizes.y()).unwrap()).unwrap();
                // An average, for logits are all 0 beside 1.
                let last: Vec<f64> = (0..4)
                    .map(|c| inputs.v.iter().skip(c).step_by(4).sum::<f64>() / 60.0)
                    .collect();
                for (y, want) in y[236..].iter().zip(&last) {
                    assert!((y - want).abs() < 1e-3, "{scale} {terms} {form:?}: {y} for {want}");
                }
            }
        }
    }
}

/// A state serves calls of fewer orders and of coefficients that end in zeros; with a centre, not
/// those that leave lower orders out.
#[test]
fn states_with_a_centre_serve_what_they_can() {
    let made = Plan::new(&Spec::new(3, 2).terms(3).block(4).build().unwrap()).unwrap();
    let centre = sata::Centre::new(1, &[0.5, -0.3, 0.2], &[0.1, 0.2]).unwrap();
    let x = [0.3, -0.2, 0.5];
    let (key, value) = (View::new(&x, [1, 1, 1, 3]).unwrap(), [1.0, 2.0]);
    let value = View::new(&value, [1, 1, 1, 2]).unwrap();
    let step = |series: Series, diagnose: bool| {
        let spec = Spec::new(3, 2).series(series).block(4).build().unwrap();
        let mut state = State::centred(&made, 1, 1, centre.clone()).unwrap();
        let mut y = [0.0f64; 2];
        let call = sata::Call::causal(key, key, value).state(&mut state).diagnose(diagnose);
        let out = ViewMut::new(&mut y, [1, 1, 1, 2]).unwrap();
        Plan::new(&spec).unwrap().run(call, out).map(|_| y)
    };
    let zeros = vec![1.0, 0.5, 0.1, 0.0, 0.0];
    for (coefficients, diagnose) in [(vec![1.0, 0.5, 0.0, 0.0], false), (zeros, true)] {
        let y = step(Series::Fixed { coefficients }, diagnose).unwrap();
        assert!((y[0] - 1.0).abs() < 1e-14 && (y[1] - 2.0).abs() < 1e-14);
    }
    let refused = step(Series::power(2), false).unwrap_err().to_string();
    assert!(refused.contains("centre"), "{refused}");
}

#[test]
fn more_sinks_than_anybody_has() {
    let mut rng = rng();
    let inputs = Inputs::<f64>::new(&mut rng, Sizes::self_attention(5, 3, 2));
    let answer = |sinks: usize| {
        let spec = Spec::new(3, 2).terms(3).sinks(sinks).build().unwrap();
        let mut y = vec![0.0; 10];
        let call = sata::Call::full(inputs.q(), inputs.k(), inputs.v()).strict(true);
        let plan = Plan::new(&spec).unwrap().with_form(Form::Direct);
        plan.run(call, ViewMut::new(&mut y, inputs.sizes.y()).unwrap()).unwrap();
        y
    };
    assert_eq!(answer(5), answer(1 << 31));
    assert!(Spec::new(3, 2).sinks(1 << 32).build().is_err());
}
