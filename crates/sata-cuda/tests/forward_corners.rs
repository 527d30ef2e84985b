//! Calls of nothing, denominators that are not positive or not finite, refusals, mixtures.

#[path = "../../sata/tests/common/mod.rs"]
mod common;
mod gpu;

use common::settings::{Setting, slack};
use common::truth::{assert_rows, truth};
use common::{Fade, Inputs, Sizes, rng, tolerance};
use gpu::{OnDevice, blank, device, feed, part_mut, run};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use sata::{Decay, Form, Near, Series, Spec};
use sata_cuda::{Error, Plan, State, ViewMut};

#[test]
fn nothing_at_all() {
    let mut rng = rng();
    let s = Sizes { batch: 2, kv_heads: 2, group: 2, ..Sizes::self_attention(0, 5, 6) };
    for near in [Near::None, Near::Blocks(1)] {
        let spec = Spec::new(5, 6).terms(3).near(near).sinks(2).build().unwrap();
        let plan = Plan::new(&device(), &spec).unwrap();
        let inputs = Inputs::<f32>::new(&mut rng, s);
        let (y, found) = run(&plan, &inputs, &Fade::None, true);
        assert!(y.is_empty() && found.is_clean() && found.queries == 0);
        let there = OnDevice::new(plan.device(), &inputs, &Fade::None);
        let mut state = State::new(&plan, 2, 2).unwrap();
        feed(&plan, &mut state, &there, 0..0, &mut blank(plan.device(), s));
        assert_eq!(state.position(0).unwrap(), 0);
        if near != Near::None {
            continue;
        }
        // Queries that see no key: their denominators are 0, with and without a state.
        let s = Sizes { queries: 3, ..s };
        let inputs = Inputs::<f32>::new(&mut rng, s);
        let (y, found) = run(&plan, &inputs, &Fade::None, false);
        assert!(y.iter().all(|y| y.is_nan()));
        assert_eq!((found.queries, found.non_positive, found.first), (24, 24, Some([0, 0, 0])));
        let there = OnDevice::new(plan.device(), &inputs, &Fade::None);
        let mut y = blank::<f32>(plan.device(), s);
        let call = there.all(false).state(&mut state);
        let found = plan.run(call, ViewMut::new(&mut y, s.y()).unwrap()).unwrap();
        assert_eq!((found.queries, found.non_positive), (24, 24));
    }
}

#[test]
fn bad_denominators_are_counted() {
    let mut rng = rng();
    let s = Sizes { batch: 2, kv_heads: 1, group: 3, ..Sizes::self_attention(70, 5, 6) };
    let spec = Spec::new(5, 6).terms(2).build().unwrap();
    let inputs = Inputs::<f32>::new(&mut rng, s).gain(3.0);
    let truth = truth(&spec, &inputs, &Fade::None, true);
    for form in [Form::Direct, Form::State] {
        let plan = Plan::new(&device(), &spec).unwrap().with_form(form).with_chunk(16);
        let (_, found) = run(&plan, &inputs, &Fade::None, true);
        let negative: Vec<usize> =
            (0..truth.denominators.len()).filter(|&i| truth.denominators[i] <= 0.0).collect();
        assert!(negative.len() > 5, "two terms go below 0");
        assert_eq!(found.non_positive, negative.len() as u64);
        let place = [negative[0] / 210, negative[0] % 210 / 70, negative[0] % 70];
        assert_eq!(found.first, Some(place));

        // A key that is not finite, in the second sequence, spoils what comes after it.
        let mut broken = inputs.clone();
        broken.k[(70 + 40) * 5 + 1] = f32::NAN;
        let (_, found) = run(&plan, &broken, &Fade::None, true);
        assert_eq!(found.non_finite, 3 * 30);
        // Unless it is masked.
        broken.mask = Some((0..140).map(|i| i != 70 + 40).collect());
        let (_, found) = run(&plan, &broken, &Fade::None, true);
        assert_eq!(found.non_finite, 0);

        let there = OnDevice::new(plan.device(), &inputs, &Fade::None);
        let mut y = blank::<f32>(plan.device(), s);
        let out = ViewMut::new(&mut y, s.y()).unwrap();
        match plan.run(there.all(true).strict(true), out) {
            Err(Error::Call(sata::Error::Denominators(found))) => {
                assert_eq!(found.non_positive, negative.len() as u64);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn refused_before_any_work() {
    let mut rng = rng();
    let s = Sizes { batch: 2, kv_heads: 2, group: 2, ..Sizes::self_attention(10, 5, 6) };
    let plan = Plan::new(&device(), &Spec::new(5, 6).terms(3).build().unwrap()).unwrap();
    let inputs = Inputs::<f32>::new(&mut rng, s);
    let there = OnDevice::new(plan.device(), &inputs, &Fade::None);
    let mut state = State::new(&plan, 3, 2).unwrap();
    let mut y = blank::<f32>(plan.device(), s);
    let wrong = plan.run(there.all(true).state(&mut state), ViewMut::new(&mut y, s.y()).unwrap());
    assert!(matches!(wrong, Err(Error::Call(sata::Error::State { field: "sequences", .. }))));
    let short = Sizes { queries: 9, ..s };
    let wrong = plan.run(there.all(true), ViewMut::new(&mut y, short.y()).unwrap());
    assert!(matches!(wrong, Err(Error::Call(sata::Error::Shape { argument: "out", .. }))));
    assert!(y.to_vec().unwrap().iter().all(|y| y.is_nan()));
    // An order that there are no tables for.
    let spec = Spec::new(1, 6).series(Series::power(200)).build().unwrap();
    let plan = Plan::new(&device(), &spec).unwrap();
    let inputs = Inputs::<f32>::new(&mut rng, Sizes { d_key: 1, ..s });
    let there = OnDevice::new(plan.device(), &inputs, &Fade::None);
    let mut y = blank::<f32>(plan.device(), s);
    let wrong = plan.run(there.all(true), ViewMut::new(&mut y, s.y()).unwrap());
    assert!(matches!(wrong, Err(Error::Unsupported { .. })), "{wrong:?}");
}

/// Queries of one sequence read the keys of another of its own length, or of none.
#[test]
fn packed_full() {
    let mut rng = rng();
    let (cu_queries, cu_keys) = ([0, 3, 3, 40, 41], [0, 50, 60, 60, 133]);
    let s =
        Sizes { kv_heads: 2, group: 2, queries: 41, keys: 133, ..Sizes::self_attention(0, 5, 6) };
    let inputs = Inputs::<f32>::new(&mut rng, s);
    let spec = Spec::new(5, 6).terms(3).sinks(4).build().unwrap();
    for form in [Form::Direct, Form::State] {
        let plan = Plan::new(&device(), &spec).unwrap().with_form(form).with_chunk(16);
        let there = OnDevice::new(plan.device(), &inputs, &Fade::None);
        let mut y = blank::<f32>(plan.device(), s);
        let out = ViewMut::new(&mut y, s.y()).unwrap();
        let found = plan.run(there.all(false).packed(&cu_queries, &cu_keys), out).unwrap();
        // Those of the third sequence have no key.
        assert_eq!((found.queries, found.non_positive), (41 * 4, 37 * 4));
        assert_eq!(found.first, Some([2, 0, 0]));
        let y = y.to_vec().unwrap();
        for i in [0, 3] {
            let (q, k) = (cu_queries[i]..cu_queries[i + 1], cu_keys[i]..cu_keys[i + 1]);
            let own = Sizes { queries: q.len(), keys: k.len(), ..s };
            let cut =
                |x: &[f32], heads: usize, all: usize, dim: usize, r: std::ops::Range<usize>| {
                    let row =
                        |h: usize| x[(h * all + r.start) * dim..(h * all + r.end) * dim].to_vec();
                    (0..heads).flat_map(row).collect::<Vec<f32>>()
                };
            let mut part = Inputs::<f32>::new(&mut rng, own);
            part.q = cut(&inputs.q, 4, 41, 5, q.clone());
            part.k = cut(&inputs.k, 2, 133, 5, k.clone());
            part.v = cut(&inputs.v, 2, 133, 6, k);
            let truth = truth(&spec, &part, &Fade::None, false);
            let got = cut(&y, 4, 41, 6, q);
            assert_rows(&format!("{form:?}, sequence {i}"), &got, &truth, tolerance::<f32>());
        }
    }
}

fn any_setting(rng: &mut StdRng) -> Setting {
    let fixed = |a: &[f64]| Series::Fixed { coefficients: a.to_vec() };
    let (series, terms) = [
        (Series::Taylor, 1),
        (Series::Taylor, 3),
        (Series::Taylor, 5),
        (Series::Gauss, 2),
        (Series::Gauss, 4),
        (Series::hermite(), 1),
        (Series::hermite(), 3),
        (Series::hermite(), 4),
        (Series::power(2), 3),
        (Series::power(4), 5),
        (fixed(&[0.5, 0.0, 0.25, 0.0, 0.125]), 5),
        (fixed(&[1.0, -0.2, 0.6]), 3),
    ]
    .choose(rng)
    .unwrap()
    .clone();
    let near = match rng.random_range(0..5) {
        0 | 1 => Near::None,
        n => Near::Blocks(n - 2),
    };
    Setting {
        series,
        terms,
        near,
        block: *[1, 3, 8, 16, 64].choose(rng).unwrap(),
        sinks: *[0, 0, 0, 2, 5, 70].choose(rng).unwrap(),
        decay: *[Decay::None, Decay::Slopes, Decay::Gates].choose(rng).unwrap(),
    }
}

/// Everything at once, at random: one call, then call by call with states moved between engines.
#[test]
fn mixtures() {
    let mut rng = rng();
    let cases = std::env::var("SATA_CASES").map_or(40, |n| n.parse().expect("a number"));
    for _ in 0..cases {
        let setting = any_setting(&mut rng);
        let tokens = *[1, 7, 64, 65, 100, 150].choose(&mut rng).unwrap();
        let s = Sizes {
            batch: rng.random_range(1..3),
            kv_heads: rng.random_range(1..3),
            group: rng.random_range(1..4),
            ..Sizes::self_attention(tokens, 5, 6)
        };
        let mut inputs = Inputs::<f32>::new(&mut rng, s);
        if rng.random_bool(0.5) {
            inputs.mask = Some((0..s.batch * s.keys).map(|_| rng.random_bool(0.7)).collect());
        }
        let fade = Fade::new(&mut rng, setting.decay, s);
        let spec = setting.spec(s);
        let mut plan = Plan::new(&device(), &spec).unwrap();
        if rng.random_bool(0.7) {
            plan = plan.with_form(Form::State).with_chunk(rng.random_range(1..60));
        }
        if rng.random_bool(0.3) {
            plan = plan.with_work_bytes(rng.random_range(1..100_000));
        }
        let truth = truth(&spec, &inputs, &fade, true);
        let allowed =
            10.0 * tolerance::<f32>() * slack(&setting.series, setting.terms, setting.decay)[1];
        let what = format!("{setting:?} {s:?} {:?}", inputs.mask.is_some());
        let (y, found) = run(&plan, &inputs, &fade, true);
        assert_rows(&format!("at once: {what}"), &y, &truth, allowed);
        assert_eq!(found.queries, truth.denominators.len() as u64);

        let there = OnDevice::new(plan.device(), &inputs, &fade);
        let mut state = State::new(&plan, s.batch, s.kv_heads).unwrap();
        let mut y = blank(plan.device(), s);
        let mut from = 0;
        while from < tokens {
            let n = rng.random_range(0..=40).min(tokens - from);
            feed(&plan, &mut state, &there, from..from + n, &mut y);
            from += n;
            if rng.random_bool(0.3) {
                let host = state.to_host(&plan).unwrap();
                let bytes = host.to_bytes();
                let again = sata::State::from_bytes(plan.host(), &bytes, "a state").unwrap();
                state = State::from_host(&plan, &again).unwrap();
            }
        }
        assert_rows(&format!("in parts: {what}"), &y.to_vec().unwrap(), &truth, allowed);
        if setting.near == Near::None {
            full(&mut rng, &plan, &setting, inputs.sizes, allowed);
        }
    }
}

/// Queries of their own that read a past, and the keys that come with them.
fn full(rng: &mut StdRng, plan: &Plan, setting: &Setting, s: Sizes, allowed: f64) {
    let s = Sizes { queries: rng.random_range(1..70), ..s };
    let inputs = Inputs::<f32>::new(rng, s).masked(rng);
    let fade = Fade::new(rng, setting.decay, s);
    let spec = setting.spec(s);
    let truth = truth(&spec, &inputs, &fade, false);
    let what = format!("full: {setting:?} {s:?}");
    let (y, _) = run(plan, &inputs, &fade, false);
    assert_rows(&what, &y, &truth, allowed);
    let there = OnDevice::new(plan.device(), &inputs, &fade);
    let mut state = State::new(plan, s.batch, s.kv_heads).unwrap();
    let cut = rng.random_range(0..=s.keys);
    let none = Sizes { queries: 0, ..s };
    let mut y = blank::<f32>(plan.device(), none);
    let call = there.part(false, 0..0, 0..cut).state(&mut state);
    plan.run(call, part_mut(&mut y, none.y(), 0..0)).unwrap();
    let mut y = blank::<f32>(plan.device(), s);
    let call = there.part(false, 0..s.queries, cut..s.keys).state(&mut state);
    plan.run(call, ViewMut::new(&mut y, s.y()).unwrap()).unwrap();
    assert_rows(&format!("{what} from {cut}"), &y.to_vec().unwrap(), &truth, allowed);
}
