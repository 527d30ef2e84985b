//! The backward of calls that a state joins: parts give what one call over everything gives.

#[path = "../../sata/tests/common/mod.rs"]
mod common;
mod gpu;
mod gradients;

use std::ops::Range;

use common::calls::spec;
use common::check::describe;
use common::gradients::{assert_gradients, truth};
use common::{Fade, Inputs, Sizes, f64s, normal, rng};
use gpu::{OnDevice, blank, device, feed};
use gradients::{Whole, kinds, out_of};
use rand::Rng;
use rand::rngs::StdRng;
use sata::{Decay, Form, Near, Spec};
use sata_cuda::{Buffer, Call, Error, Plan, State, StateGradient, Storage, SumsType, View};

/// Forward through parts, then backward from the last to the first.
fn in_parts(
    plan: &Plan,
    inputs: &Inputs<f32>,
    fade: &Fade,
    dy: &[f32],
    ranges: &[Range<usize>],
) -> [Vec<f64>; 5] {
    let s = inputs.sizes;
    let there = OnDevice::new(plan.device(), inputs, fade);
    let dy = Buffer::from_slice(plan.device(), dy).unwrap();
    let mut state = State::new(plan, s.batch, s.kv_heads).unwrap();
    let mut before = vec![];
    let mut y = blank(plan.device(), s);
    for range in ranges {
        before.push(state.fork().unwrap());
        feed(plan, &mut state, &there, range.clone(), &mut y);
    }
    let mut by_state = StateGradient::new(plan, s.batch, s.kv_heads).unwrap();
    let mut whole = Whole::new(plan.device(), s, fade.decay());
    for (range, initial) in ranges.iter().zip(&mut before).rev() {
        let both = [range.clone(), range.clone()];
        whole.part(plan, &there, true, both, &dy, Some(initial), Some(&mut by_state));
        for sequence in 0..s.batch {
            assert_eq!(by_state.position(sequence), Some(range.start as u64));
            assert_eq!(
                initial.position(sequence).unwrap(),
                range.start as u64,
                "it stays as it was"
            );
        }
    }
    whole.done()
}

fn cuts(rng: &mut StdRng, tokens: usize) -> Vec<Range<usize>> {
    let mut at: Vec<usize> =
        (0..rng.random_range(1..4)).map(|_| rng.random_range(1..tokens)).collect();
    at.extend([0, tokens]);
    at.sort();
    at.dedup();
    at.windows(2).map(|w| w[0]..w[1]).collect()
}

const NEAR: [(Near, usize, usize); 7] = [
    (Near::None, 16, 0),
    (Near::None, 64, 5),
    (Near::Blocks(0), 16, 0),
    (Near::Blocks(1), 16, 5),
    (Near::Blocks(1), 3, 40),
    (Near::Blocks(2), 1, 1),
    (Near::Blocks(1), 64, 4),
];

#[test]
fn parts_have_the_gradients_of_the_whole() {
    let mut rng = rng();
    let kinds = kinds(&mut rng, 2);
    for near in NEAR {
        for tokens in [2, 17, 33, 64, 65, 130, 200] {
            for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
                if rng.random_bool(0.5) {
                    continue;
                }
                let (series, terms, gain, [d_key, d_value]) = &kinds[rng.random_range(0..2)];
                let sizes = Sizes {
                    batch: rng.random_range(1..=2),
                    kv_heads: rng.random_range(1..=2),
                    group: rng.random_range(1..=2),
                    queries: tokens,
                    keys: tokens,
                    d_key: *d_key,
                    d_value: *d_value,
                };
                let inputs = Inputs::<f32>::new(&mut rng, sizes).gain(*gain);
                let inputs = if rng.random_bool(0.5) { inputs.masked(&mut rng) } else { inputs };
                let fade = Fade::new(&mut rng, decay, sizes);
                let (blocks, block, sinks) = near;
                let spec = spec(sizes, series, *terms)
                    .near(blocks)
                    .block(block)
                    .sinks(sinks)
                    .decay(decay)
                    .build()
                    .unwrap();
                let dy = normal::<f32>(&mut rng, sizes.y().iter().product());
                let ranges = cuts(&mut rng, tokens);
                let want = truth(&spec, &inputs, &fade, true, &f64s(&dy));
                let what = describe(&spec, &inputs, &fade, true, "backward");
                // A plan that is held to the direct form has states too.
                let plan = Plan::new(&device(), &spec).unwrap();
                let (plan, how) = match rng.random_range(0..3) {
                    0 => (plan, "as chosen".to_string()),
                    1 => (plan.with_form(Form::Direct), "direct".into()),
                    _ => {
                        let (chunk, bytes) = (rng.random_range(1..40), rng.random_range(0..90_000));
                        let how = format!("chunks of {chunk}, {bytes} bytes");
                        (plan.with_chunk(chunk).with_work_bytes(bytes), how)
                    }
                };
                let got = in_parts(&plan, &inputs, &fade, &dy, &ranges);
                assert_gradients(
                    &format!("{what}, {how}, parts {ranges:?}"),
                    &got,
                    &want,
                    tokens,
                    1e-4,
                );
            }
        }
    }
}

/// Gradients by what a state kept of one kind are those by what it keeps of another.
#[test]
fn states_of_other_storage_have_the_same_gradients() {
    let mut rng = rng();
    let sizes = Sizes { kv_heads: 2, ..Sizes::self_attention(70, 5, 6) };
    let inputs = Inputs::<f32>::new(&mut rng, sizes);
    let spec = Spec::new(5, 6).terms(3).block(8).build().unwrap();
    let plan = Plan::new(&device(), &spec).unwrap();
    let there = OnDevice::new(plan.device(), &inputs, &Fade::None);
    let dy = normal::<f32>(&mut rng, sizes.y().iter().product());
    let want = truth(&spec, &inputs, &Fade::None, true, &f64s(&dy));
    let dy = Buffer::from_slice(plan.device(), &dy).unwrap();
    for sums in [SumsType::F32, SumsType::Bf16] {
        for compensated in [true, false] {
            let storage = Storage { sums, compensated };
            let mut state = State::with_storage(&plan, 1, 2, storage).unwrap();
            let mut empty = state.fork().unwrap();
            let mut y = blank(plan.device(), sizes);
            feed(&plan, &mut state, &there, 0..43, &mut y);
            let mut by_state = StateGradient::new(&plan, 1, 2).unwrap();
            let mut whole = Whole::new(plan.device(), sizes, Decay::None);
            for (range, initial) in [(43..70, &mut state), (0..43, &mut empty)] {
                let both = [range.clone(), range];
                whole.part(&plan, &there, true, both, &dy, Some(initial), Some(&mut by_state));
            }
            let rounded = sums == SumsType::Bf16 && !compensated;
            let tolerance = if rounded { 2e-2 } else { 1e-5 };
            assert_gradients(&format!("{storage:?}"), &whole.done(), &want, 70, tolerance);
        }
    }
}

/// Queries that read a finished context which a state holds in part: the context's own queries have
/// a loss too.
#[test]
fn full_reading_goes_back_through_the_state() {
    let mut rng = rng();
    for (block, sinks) in [(16, 0), (16, 5), (3, 0), (64, 70)] {
        for (first, more, queries) in [(1, 1, 1), (15, 3, 40), (16, 16, 5), (65, 70, 130)] {
            for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
                let keys = first + more;
                let group = rng.random_range(1..=2);
                let all =
                    Sizes { batch: 1, kv_heads: 2, group, queries, keys, d_key: 5, d_value: 4 };
                let context = Inputs::<f32>::new(&mut rng, all);
                let fade = Fade::new(&mut rng, decay, all);
                // The context with queries of its own, the first of which have a loss.
                let mut begin = Inputs::<f32>::new(&mut rng, Sizes { queries: keys, ..all });
                begin.k.clone_from(&context.k);
                begin.v.clone_from(&context.v);
                let spec = spec(all, &sata::Series::Taylor, 3)
                    .block(block)
                    .sinks(sinks)
                    .decay(decay)
                    .build()
                    .unwrap();
                let plan = Plan::new(&device(), &spec).unwrap();
                let plan = if rng.random_bool(0.5) { plan.with_chunk(16) } else { plan };
                let dy = normal::<f32>(&mut rng, all.y().iter().product());
                let mut begin_dy = normal::<f32>(&mut rng, begin.sizes.y().iter().product());
                for (row, x) in begin_dy.chunks_mut(4).enumerate() {
                    if row % keys >= first {
                        x.fill(0.0);
                    }
                }

                // The oracle: both losses apart, then added up.
                let of_all = truth(&spec, &context, &fade, false, &f64s(&dy));
                let of_begin = truth(&spec, &begin, &fade, true, &f64s(&begin_dy));
                let mut want = of_all.clone();
                for (want, x) in want.iter_mut().zip(&of_begin).skip(1) {
                    want.iter_mut().zip(x).for_each(|(a, b)| *a += b);
                }

                let there = OnDevice::new(plan.device(), &context, &fade);
                let of_its_own = OnDevice::new(plan.device(), &begin, &fade);
                let mut state = State::new(&plan, 1, 2).unwrap();
                let mut empty = state.fork().unwrap();
                let mut y = blank(plan.device(), begin.sizes);
                feed(&plan, &mut state, &of_its_own, 0..first, &mut y);
                let mut by_state = StateGradient::new(&plan, 1, 2).unwrap();
                let mut whole = Whole::new(plan.device(), all, decay);
                let dy = Buffer::from_slice(plan.device(), &dy).unwrap();
                let parts = [0..queries, first..keys];
                let by = Some(&mut by_state);
                whole.part(&plan, &there, false, parts, &dy, Some(&mut state), by);
                let mut early = Whole::new(plan.device(), begin.sizes, decay);
                let begin_dy = Buffer::from_slice(plan.device(), &begin_dy).unwrap();
                let parts = [0..first, 0..first];
                let by = Some(&mut by_state);
                early.part(&plan, &of_its_own, true, parts, &begin_dy, Some(&mut empty), by);

                let what = format!(
                    "{first} + {more} keys, {queries} queries, {block}, {sinks}, {decay:?}"
                );
                let mut got = whole.done();
                let begun = early.done();
                // What the first call wrote of keys is in its own arrays.
                for (i, width) in [(1, 5), (2, 4), (3, 1)] {
                    for (at, x) in got[i].iter_mut().enumerate() {
                        if at / width % keys < first {
                            *x = begun[i][at];
                        }
                    }
                }
                got[4].iter_mut().zip(&begun[4]).for_each(|(a, b)| *a += b);
                assert_gradients(&what, &got, &want, keys, 1e-4);
                let mut got = begun;
                for (at, x) in got[0].iter_mut().enumerate() {
                    if at / 5 % keys >= first {
                        *x = 0.0;
                    }
                }
                let only = |x: &[Vec<f64>; 5]| [x[0].clone(), vec![], vec![], vec![], vec![]];
                assert_gradients(&what, &only(&got), &only(&of_begin), keys, 1e-4);
            }
        }
    }
}

/// After `reset` a gradient serves any state again.
#[test]
fn a_gradient_begins_anew() {
    let mut rng = rng();
    let sizes = Sizes::self_attention(50, 5, 6);
    let inputs = Inputs::<f32>::new(&mut rng, sizes);
    let spec = Spec::new(5, 6).terms(3).near(Near::Blocks(1)).block(8).sinks(3).build().unwrap();
    let plan = Plan::new(&device(), &spec).unwrap();
    let there = OnDevice::new(plan.device(), &inputs, &Fade::None);
    let dy = normal::<f32>(&mut rng, sizes.y().iter().product());
    let want = truth(&spec, &inputs, &Fade::None, true, &f64s(&dy));
    let dy = Buffer::from_slice(plan.device(), &dy).unwrap();
    let mut state = State::new(&plan, 1, 1).unwrap();
    let mut before = state.fork().unwrap();
    let mut y = blank(plan.device(), sizes);
    feed(&plan, &mut state, &there, 0..29, &mut y);
    let mut by_state = StateGradient::new(&plan, 1, 1).unwrap();
    for _ in 0..2 {
        by_state.reset().unwrap();
        assert_eq!(by_state.position(0), None);
        let mut whole = Whole::new(plan.device(), sizes, Decay::None);
        for (range, initial) in [(29..50, &mut state), (0..29, &mut before)] {
            let both = [range.clone(), range];
            whole.part(&plan, &there, true, both, &dy, Some(initial), Some(&mut by_state));
        }
        assert_gradients("twice", &whole.done(), &want, 50, 1e-5);
    }
}

#[test]
fn wrong_states_are_refused_before_any_work() {
    let device = device();
    let spec = |terms: usize| Spec::new(3, 3).terms(terms).block(4).build().unwrap();
    let plan_of = |terms| Plan::new(&device, &spec(terms)).unwrap();
    let plan = plan_of(3);
    let x = Buffer::from_slice(&device, &[0.5f32; 12]).unwrap();
    let shape = [1, 1, 4, 3];
    let view = || View::new(&x, shape).unwrap();
    let sizes = Sizes::self_attention(4, 3, 3);
    let [mut a, mut b, mut c] =
        [(); 3].map(|()| Buffer::from_slice(&device, &[7.0f32; 12]).unwrap());
    let mut found = vec![];
    let mut refuse = |state: &mut State, by_state: &mut StateGradient| {
        let out = out_of([&mut a, &mut b, &mut c], sizes).state(by_state);
        let call = Call::causal(view(), view(), view()).state(state);
        let error = plan.backward(call, view(), out).unwrap_err();
        found.push(error.to_string());
        error
    };
    let state = || State::new(&plan, 1, 1).unwrap();
    let zeros = |terms| StateGradient::new(&plan_of(terms), 1, 1).unwrap();
    let mut larger = State::new(&plan_of(4), 1, 1).unwrap();
    assert!(matches!(refuse(&mut larger, &mut zeros(3)), Error::Unsupported { .. }));
    refuse(&mut state(), &mut zeros(5));
    refuse(&mut state(), &mut StateGradient::new(&plan, 2, 1).unwrap());
    refuse(&mut state(), &mut StateGradient::new(&plan, 1, 2).unwrap());
    for (error, words) in found.iter().zip(["orders", "spec", "sequences", "kv_heads"]) {
        assert!(error.contains(words), "{error} should name {words}");
    }
    for buffer in [&a, &b, &c] {
        assert!(buffer.to_vec().unwrap().iter().all(|&x| x == 7.0), "something was written");
    }
    assert!(StateGradient::new(&plan, 0, 1).is_err() && StateGradient::new(&plan, 1, 0).is_err());
    // Of a state at another position.
    let mut by_state = zeros(3);
    let mut later = state();
    let mut y = blank::<f32>(&device, sizes);
    let out = sata_cuda::ViewMut::new(&mut y, shape).unwrap();
    plan.extend(&mut later, view(), view(), view(), out).unwrap();
    for expected in [true, false] {
        let out = out_of([&mut a, &mut b, &mut c], sizes).state(&mut by_state);
        let call = Call::causal(view(), view(), view()).state(&mut later);
        let result = plan.backward(call, view(), out);
        assert_eq!(result.is_ok(), expected);
        if let Err(error) = result {
            let error = error.to_string();
            assert!(error.contains("position") && error.contains('8'), "{error}");
        }
        assert_eq!(by_state.position(0), Some(4));
    }
}
