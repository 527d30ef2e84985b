//! Centred states: the same answers, and digits kept where keys share a large mean.

mod common;

use common::calls::{bits, blank, feed, plan_of, read_full, spec};
use common::settings::{Setting, settings};
use common::truth::{assert_rows, row_error, truth};
use common::{Fade, Inputs, Sizes, rng, tolerance};
use rand::Rng;
use rand::rngs::StdRng;
use sata::{Centre, Error, Near, Plan, Real, Series, State, View};

fn sizes(tokens: usize) -> Sizes {
    Sizes { batch: 2, kv_heads: 2, group: 2, ..Sizes::self_attention(tokens, 3, 4) }
}

/// Vectors of some size for 2 heads.
fn random_centre(rng: &mut StdRng, s: Sizes) -> Centre {
    let mut vector = |d: usize| -> Vec<f64> {
        (0..s.kv_heads * d).map(|_| rng.random_range(-1.0..1.0)).collect()
    };
    let (keys, values) = (vector(s.d_key), vector(s.d_value));
    Centre::new(s.kv_heads, &keys, &values).unwrap()
}

/// The settings whose orders leave none out, which a centred state needs.
fn centrable() -> Vec<Setting> {
    let mut settings: Vec<Setting> = settings()
        .into_iter()
        .filter(|setting| !matches!(setting.series, Series::Power { .. } | Series::Fixed { .. }))
        .collect();
    settings.push(Setting {
        series: Series::Fixed { coefficients: vec![0.7, 0.2, 0.3] },
        ..settings[0].clone()
    });
    settings
}

#[test]
fn answers_are_those_of_a_state_without_a_centre() {
    fn one<T: Real>(rng: &mut StdRng, setting: &Setting) {
        let s = sizes(60);
        let inputs = Inputs::<T>::new(rng, s).masked(rng);
        let fade = Fade::new(rng, setting.decay, s);
        let spec = setting.spec(s);
        let plan = plan_of(&spec, None);
        let truth = truth(&spec, &inputs, &fade, true);
        // What a centre of size 1 adds to the logits, it must take off again: twice the rounding.
        let slack = 10.0 * setting.slack()[usize::from(size_of::<T>() == 4)];
        let mean = Centre::mean(inputs.k(), inputs.v()).unwrap();
        let zero = Centre::new(2, &[0.0; 6], &[0.0; 8]).unwrap();
        let random = random_centre(rng, s);
        for (name, centre) in [("mean", mean), ("zero", zero), ("random", random)] {
            for split in [vec![60], vec![1; 60], vec![7, 1, 1, 30, 0, 1, 20]] {
                let mut state = State::<T>::centred(&plan, 2, 2, centre.clone()).unwrap();
                let (mut y, mut from) = (blank(s), 0);
                for n in &split {
                    feed(&plan, &mut state, &inputs, &fade, from..from + n, &mut y);
                    from += n;
                }
                let what = format!("{name} {} {} calls, {setting:?}", T::NAME, split.len());
                assert_rows(&what, &y, &truth, slack * tolerance::<T>());
            }
        }
    }
    let mut rng = rng();
    for setting in centrable() {
        one::<f64>(&mut rng, &setting);
        one::<f32>(&mut rng, &setting);
    }
}

#[test]
fn full_calls_read_a_centred_past() {
    let mut rng = rng();
    for setting in centrable().into_iter().filter(|setting| setting.near == Near::None) {
        let s = Sizes { queries: 9, ..sizes(40) };
        let inputs = Inputs::<f64>::new(&mut rng, s);
        let fade = Fade::new(&mut rng, setting.decay, s);
        let spec = setting.spec(s);
        let plan = plan_of(&spec, None);
        let mut state = State::<f64>::centred(&plan, 2, 2, random_centre(&mut rng, s)).unwrap();
        let mut before = Inputs::new(&mut rng, Sizes { queries: 40, ..s });
        (before.k, before.v) = (inputs.k.clone(), inputs.v.clone());
        feed(&plan, &mut state, &before, &fade, 0..29, &mut blank(before.sizes));
        let y = read_full(&plan, &mut state, &inputs, &fade, 29);
        let allowed = 10.0 * setting.slack()[0] * 1e-12;
        let truth = truth(&spec, &inputs, &fade, false);
        assert_rows(&format!("{setting:?}"), &y, &truth, allowed);
    }
}

/// Keys with a mean of 30 in every channel, in f32: sums of high powers drown what tells them apart.
#[test]
fn a_large_mean_costs_no_digits() {
    let mut rng = rng();
    for (near, block, sinks) in [(Near::None, 16, 0), (Near::Blocks(1), 16, 3)] {
        for (series, terms) in [(Series::Gauss, 4), (Series::Gauss, 6), (Series::hermite(), 4)] {
            let s = Sizes { kv_heads: 2, ..Sizes::self_attention(150, 8, 4) };
            let mut inputs = Inputs::<f32>::new(&mut rng, s);
            inputs.k.iter_mut().for_each(|k| *k += 30.0);
            inputs.v.iter_mut().for_each(|v| *v += 100.0);
            let spec =
                spec(s, &series, terms).near(near).block(block).sinks(sinks).build().unwrap();
            let plan = plan_of(&spec, None);
            // What the values have in common is found again by any weights; the rest is of interest.
            let mut truth = truth(&spec, &inputs, &Fade::None, true);
            truth.y.iter_mut().for_each(|y| *y -= 100.0);
            let answers = |mut state: State<f32>| {
                let mut y = blank(s);
                for range in [0..75, 75..76, 76..150] {
                    feed(&plan, &mut state, &inputs, &Fade::None, range, &mut y);
                }
                y.iter_mut().for_each(|y| *y -= 100.0);
                y
            };
            // Near the mean is good enough: it need not be that of this text.
            let about = Centre::new(2, &[30.2; 16], &[99.0; 8]).unwrap();
            let mean = Centre::mean(inputs.k(), inputs.v()).unwrap();
            let what = format!("{series:?} {terms} {near:?}");
            for centre in [about, mean] {
                let y = answers(State::centred(&plan, 1, 2, centre).unwrap());
                assert_rows(&what, &y, &truth, 3e-4);
            }
            let y = answers(State::new(&plan, 1, 2).unwrap());
            let without = row_error(&what, &y, &truth).relative;
            println!("{what}: {without:e} without a centre");
            if terms == 6 && near == Near::None {
                assert!(without > 1e-3, "this shows nothing: {without:e} without a centre");
            }
        }
    }
}

#[test]
fn it_is_saved_with_the_state_and_forked() {
    fn one<T: Real>(rng: &mut StdRng, setting: &Setting) {
        let s = sizes(40);
        let inputs = Inputs::<T>::new(rng, s);
        let fade = Fade::new(rng, setting.decay, s);
        let spec = setting.spec(s);
        let plan = plan_of(&spec, None);
        let centre = random_centre(rng, s);
        let truth = truth(&spec, &inputs, &fade, true);
        let slack = 10.0 * setting.slack()[usize::from(size_of::<T>() == 4)];
        for cut in [0, 5, 16, 29] {
            let mut state = State::<T>::centred(&plan, 2, 2, centre.clone()).unwrap();
            let mut y = blank(s);
            feed(&plan, &mut state, &inputs, &fade, 0..cut, &mut y);
            let file = state.to_bytes();
            let mut loaded = State::<T>::from_bytes(&plan, &file, "centred").unwrap();
            assert!(loaded.to_bytes() == file);
            let mut fork = state.fork();
            let (mut z, mut f) = (y.clone(), y.clone());
            feed(&plan, &mut state, &inputs, &fade, cut..40, &mut y);
            feed(&plan, &mut loaded, &inputs, &fade, cut..40, &mut z);
            feed(&plan, &mut fork, &inputs, &fade, cut..40, &mut f);
            let what = format!("{cut} {} {setting:?}", T::NAME);
            assert_eq!(bits(&y), bits(&z), "{what}");
            assert_eq!(bits(&y), bits(&f), "{what}");
            assert!(loaded.to_bytes() == state.to_bytes());
            assert_rows(&what, &y, &truth, slack * tolerance::<T>());
            // Forgetting the past does not forget the centre, nor does a new state have it.
            state.reset();
            let new = State::<T>::centred(&plan, 2, 2, centre.clone()).unwrap();
            assert!(state.to_bytes() == new.to_bytes(), "{what}");
            assert!(state.to_bytes() != State::<T>::new(&plan, 2, 2).unwrap().to_bytes(), "{what}");
        }
    }
    let mut rng = rng();
    for setting in centrable() {
        one::<f64>(&mut rng, &setting);
        one::<f32>(&mut rng, &setting);
    }
}

#[test]
fn only_states_of_one_centre_merge() {
    let mut rng = rng();
    for setting in centrable() {
        let s = sizes(60);
        let inputs = Inputs::<f64>::new(&mut rng, s);
        let fade = Fade::new(&mut rng, setting.decay, s);
        let spec = setting.spec(s);
        let plan = plan_of(&spec, None);
        let centre = random_centre(&mut rng, s);
        let cut = 4 * setting.block;
        let apart = |centre: Option<&Centre>, range: std::ops::Range<usize>| {
            let mut state = match centre {
                Some(centre) => State::centred(&plan, 2, 2, centre.clone()).unwrap(),
                None => State::new(&plan, 2, 2).unwrap(),
            };
            feed(&plan, &mut state, &inputs, &fade, range, &mut blank(s));
            state
        };
        let mut state = apart(Some(&centre), 0..cut);
        let before = state.to_bytes();
        let other = random_centre(&mut rng, s);
        let mut plain = apart(None, 0..cut);
        for wrong in [apart(Some(&other), cut..50), apart(None, cut..50)] {
            let error = state.merge(&wrong).unwrap_err();
            assert!(matches!(error, Error::State { .. }), "{error:?}");
            assert!(error.to_string().contains("centre"), "{error}");
            assert!(state.to_bytes() == before, "a refused merge changed it");
        }
        let unchanged = plain.to_bytes();
        let error = plain.merge(&apart(Some(&centre), cut..50)).unwrap_err();
        assert!(error.to_string().contains("centre"), "{error}");
        assert!(plain.to_bytes() == unchanged);

        state.merge(&apart(Some(&centre), cut..50)).unwrap();
        let mut y = blank(s);
        feed(&plan, &mut state, &inputs, &fade, 50..60, &mut y);
        let mut truth = truth(&spec, &inputs, &fade, true);
        // Only the last ten are compared.
        let (mut got, mut want, mut magnified) = (vec![], vec![], vec![]);
        for row in (0..truth.magnified.len()).filter(|row| row % 60 >= 50) {
            got.extend_from_slice(&y[row * 4..(row + 1) * 4]);
            want.extend_from_slice(&truth.y[row * 4..(row + 1) * 4]);
            magnified.push(truth.magnified[row]);
        }
        (truth.y, truth.magnified) = (want, magnified);
        let allowed = 10.0 * setting.slack()[0] * 1e-12;
        assert_rows(&format!("merged, {setting:?}"), &got, &truth, allowed);
    }
}

#[test]
fn centres_that_do_not_fit_are_refused() {
    let s = sizes(1);
    let plan = Plan::new(&spec(s, &Series::Gauss, 4).build().unwrap()).unwrap();
    let centre = |heads, keys: usize, values: usize| {
        Centre::new(heads, &vec![0.5; keys], &vec![0.5; values]).unwrap()
    };
    State::<f32>::centred(&plan, 2, 2, centre(2, 6, 8)).unwrap();
    for wrong in [
        // Heads, d_key, d_value, and vectors whose lengths hide that the heads are others.
        centre(1, 3, 4),
        centre(2, 8, 8),
        centre(2, 6, 6),
        centre(1, 6, 8),
        centre(3, 9, 12),
        centre(6, 6, 12),
    ] {
        let what = format!("{wrong:?}");
        match State::<f32>::centred(&plan, 2, 2, wrong) {
            Err(error @ Error::Shape { .. }) => {
                assert!(error.to_string().contains("centre"), "{error}");
            }
            other => panic!("{what}: {:?}", other.map(|_| ())),
        }
    }
    for counts in [[0, 2], [2, 0]] {
        let made = State::<f32>::centred(&plan, counts[0], counts[1], centre(2, 6, 8));
        assert!(matches!(made, Err(Error::Shape { .. })), "{counts:?}");
    }
    // Vectors that are none.
    for (heads, keys, values) in [(0, 6, 8), (2, 5, 8), (2, 6, 7), (2, 0, 8), (2, 6, 0)] {
        let made = Centre::new(heads, &vec![0.5; keys], &vec![0.5; values]);
        assert!(matches!(made, Err(Error::Shape { .. })), "{heads} {keys} {values}");
    }
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let (mut keys, values) = (vec![0.5; 6], vec![0.5; 8]);
        keys[4] = bad;
        match Centre::new(2, &keys, &values) {
            Err(Error::NonFinite { argument, index: [0, 1, 0, 1], .. }) => {
                assert!(argument.contains("key"), "{argument}");
            }
            other => panic!("{other:?}"),
        }
        match Centre::new(2, &[0.5; 6], &[&[bad][..], &values[1..]].concat()) {
            Err(Error::NonFinite { argument, index: [0, 0, 0, 0], .. }) => {
                assert!(argument.contains("value"), "{argument}");
            }
            other => panic!("{other:?}"),
        }
    }
}

/// (q·centre + q·(k − centre))^p needs all orders up to p.
#[test]
fn series_that_leave_orders_out_are_refused() {
    let s = sizes(1);
    for series in [
        Series::power(2),
        Series::power(4),
        Series::Power { exponent: 2, floor: 0.0 },
        Series::Fixed { coefficients: vec![1.0, 0.0, 0.5] },
        Series::Fixed { coefficients: vec![0.0, 1.0] },
    ] {
        let plan = Plan::new(&spec(s, &series, 0).build().unwrap()).unwrap();
        let centre = Centre::new(2, &[0.5; 6], &[0.5; 8]).unwrap();
        let made = State::<f64>::centred(&plan, 2, 2, centre);
        assert!(matches!(made, Err(Error::Unsupported { .. })), "{series:?}");
    }
}

#[test]
fn means_are_over_batch_and_tokens() {
    let mut rng = rng();
    let s = sizes(7);
    let inputs = Inputs::<f64>::new(&mut rng, s);
    let mean = |x: &[f64], d: usize| -> Vec<f64> {
        let at = |b: usize, h: usize, t: usize, c: usize| x[((b * 2 + h) * 7 + t) * d + c];
        let of = |h: usize, c: usize| -> f64 {
            (0..2).flat_map(|b| (0..7).map(move |t| at(b, h, t, c))).sum::<f64>() / 14.0
        };
        (0..2).flat_map(|h| (0..d).map(move |c| of(h, c))).collect()
    };
    let found = Centre::mean(inputs.k(), inputs.v()).unwrap();
    let numbers = |centre: &Centre| -> Vec<f64> {
        format!("{centre:?}")
            .split(|c: char| !(c.is_ascii_digit() || "+-.e".contains(c)))
            .filter_map(|word| word.parse().ok())
            .collect()
    };
    let want = Centre::new(2, &mean(&inputs.k, 3), &mean(&inputs.v, 4)).unwrap();
    let (found, want) = (numbers(&found), numbers(&want));
    assert_eq!(found.len(), want.len());
    assert!(found.len() > 14);
    for (found, want) in found.iter().zip(&want) {
        assert!((found - want).abs() < 1e-14, "{found} is not {want}");
    }
    let other = View::new(&inputs.v, [2, 1, 14, 4]).unwrap();
    assert!(matches!(Centre::mean(inputs.k(), other), Err(Error::Shape { .. })));
}
