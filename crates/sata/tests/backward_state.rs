//! The backward of calls that a state joins: parts give what one call over everything gives.

mod common;

use std::ops::Range;

use common::calls::{feed, part, part_mut, part_of_mask, plan_of, spec};
use common::gradients::{assert_gradients, gradients, truth};
use common::{Fade, Inputs, Sizes, f64s, normal, rng};
use rand::Rng;
use rand::rngs::StdRng;
use sata::{
    Call, Centre, Decay, Error, Form, Gradients, Level, Near, Plan, Real, Series, Spec, State,
    StateGradient, View, ViewMut,
};

/// All gradients of a whole, made in parts: `[q, k, v, log_gates, slopes]`.
struct Whole<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    log_gates: Vec<T>,
    slopes: Vec<f64>,
}

impl<T: Real> Whole<T> {
    fn new(s: Sizes) -> Self {
        let nan = |shape: [usize; 4]| vec![T::from_f64(f64::NAN); shape.iter().product()];
        Whole {
            q: nan(s.q()),
            k: nan(s.k()),
            v: nan(s.v()),
            log_gates: nan([s.batch, s.kv_heads, s.keys, 1]),
            slopes: vec![0.0; s.kv_heads],
        }
    }

    /// Backward through the part that began with `initial`: queries and keys of its own.
    #[allow(clippy::too_many_arguments)]
    fn part(
        &mut self,
        plan: &Plan,
        initial: &mut State<T>,
        inputs: &Inputs<T>,
        fade: &Fade,
        range: &Range<usize>,
        dy: &[T],
        by_state: &mut StateGradient<T>,
    ) {
        let (s, from, n) = (inputs.sizes, range.start, range.len());
        let mask = part_of_mask(inputs, range);
        let mut call = Call::causal(
            part(&inputs.q, s.q(), from, n),
            part(&inputs.k, s.k(), from, n),
            part(&inputs.v, s.v(), from, n),
        );
        if let Some(mask) = &mask {
            call = call.key_mask(mask);
        }
        let call = fade.give(call, s, from, n).state(initial);
        let mut slopes = vec![f64::NAN; s.kv_heads];
        let mut out = Gradients::new(
            part_mut(&mut self.q, s.q(), from, n),
            part_mut(&mut self.k, s.k(), from, n),
            part_mut(&mut self.v, s.v(), from, n),
        );
        match fade.decay() {
            Decay::None => {}
            Decay::Slopes => out = out.slopes(&mut slopes),
            Decay::Gates => {
                let shape = [s.batch, s.kv_heads, s.keys, 1];
                out = out.log_gates(part_mut(&mut self.log_gates, shape, from, n));
            }
        }
        plan.backward(call, part(dy, s.y(), from, n), out.state(by_state)).unwrap();
        self.slopes.iter_mut().zip(&slopes).for_each(|(sum, x)| *sum += x);
    }

    fn done(self, fade: &Fade) -> [Vec<f64>; 5] {
        let (gates, slopes) = (fade.decay() == Decay::Gates, fade.decay() == Decay::Slopes);
        [
            f64s(&self.q),
            f64s(&self.k),
            f64s(&self.v),
            if gates { f64s(&self.log_gates) } else { vec![] },
            if slopes { self.slopes } else { vec![] },
        ]
    }
}

/// Forward through parts, then backward from the last to the first.
fn in_parts<T: Real>(
    plan: &Plan,
    inputs: &Inputs<T>,
    fade: &Fade,
    dy: &[T],
    ranges: &[Range<usize>],
) -> [Vec<f64>; 5] {
    let s = inputs.sizes;
    let mut state = State::<T>::new(plan, s.batch, s.kv_heads).unwrap();
    let mut before = vec![];
    let mut y = common::calls::blank(s);
    for range in ranges {
        before.push(state.fork());
        feed(plan, &mut state, inputs, fade, range.clone(), &mut y);
    }
    let mut by_state = StateGradient::new(plan, s.batch, s.kv_heads).unwrap();
    let mut whole = Whole::new(s);
    for (range, initial) in ranges.iter().zip(&mut before).rev() {
        whole.part(plan, initial, inputs, fade, range, dy, &mut by_state);
        for sequence in 0..s.batch {
            assert_eq!(by_state.position(sequence), Some(range.start as u64));
            assert_eq!(initial.position(sequence), range.start as u64, "it stays as it was");
        }
    }
    whole.done(fade)
}

fn some_series(rng: &mut StdRng) -> (Series, usize) {
    match rng.random_range(0..4) {
        0 => (Series::Taylor, 1),
        1 => (Series::Taylor, 5),
        2 => (Series::Power { exponent: 2, floor: 0.1 }, 3),
        _ => (Series::Taylor, 3),
    }
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
    for near in NEAR {
        for tokens in [2, 17, 33, 64, 65, 130, 260] {
            for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
                let sizes = Sizes {
                    batch: rng.random_range(1..=2),
                    kv_heads: rng.random_range(1..=2),
                    group: rng.random_range(1..=2),
                    queries: tokens,
                    keys: tokens,
                    d_key: [3, 8, 17][rng.random_range(0..3)],
                    d_value: [1, 8, 19][rng.random_range(0..3)],
                };
                let inputs = Inputs::<f32>::new(&mut rng, sizes);
                let inputs = if rng.random_bool(0.5) { inputs.masked(&mut rng) } else { inputs };
                let fade = Fade::new(&mut rng, decay, sizes);
                let (series, terms) = some_series(&mut rng);
                let (blocks, block, sinks) = near;
                let spec = spec(sizes, &series, terms)
                    .near(blocks)
                    .block(block)
                    .sinks(sinks)
                    .decay(decay)
                    .build()
                    .unwrap();
                let dy = normal::<f32>(&mut rng, sizes.y().iter().product());
                let ranges = cuts(&mut rng, tokens);
                let want = truth(&spec, &inputs, &fade, true, &f64s(&dy));
                let what = common::check::describe(&spec, &inputs, &fade, true, "backward");
                let what = format!("{what}, parts {ranges:?}");
                // A plan that is held to the direct form has states too.
                let form = [None, Some(Form::Direct)][rng.random_range(0..2)];
                let plan = plan_of(&spec, form);
                let got = in_parts::<f64>(&plan, &inputs.to(), &fade, &f64s(&dy), &ranges);
                assert_gradients(&format!("{what}, f64"), &got, &want, tokens, 1e-9);
                let got = in_parts::<f32>(&plan, &inputs, &fade, &dy, &ranges);
                assert_gradients(&format!("{what}, f32"), &got, &want, tokens, 1e-4);
            }
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
                let all = Sizes {
                    batch: 1,
                    kv_heads: 2,
                    group: rng.random_range(1..=2),
                    queries,
                    keys: first + more,
                    d_key: 5,
                    d_value: 4,
                };
                let context = Inputs::<f64>::new(&mut rng, all);
                let fade = Fade::new(&mut rng, decay, all);
                let own = Sizes { queries: first, keys: first, ..all };
                let mut begin = Inputs::<f64>::new(&mut rng, own);
                let cut = |x: &[f64], d: usize, n: usize| -> Vec<f64> {
                    let head = (first + more) * d;
                    (0..2).flat_map(|h| x[h * head..][..n * d].to_vec()).collect()
                };
                begin.k = cut(&context.k, 5, first);
                begin.v = cut(&context.v, 4, first);
                let begin_fade = match &fade {
                    Fade::Gates { log_gates, .. } => Fade::Gates {
                        keys: first,
                        log_gates: (0..2)
                            .flat_map(|h| log_gates[h * (first + more)..][..first].to_vec())
                            .collect(),
                    },
                    other => other.clone(),
                };
                let builder = spec(all, &Series::Taylor, 3).block(block).sinks(sinks).decay(decay);
                let spec = builder.build().unwrap();
                let plan = plan_of(&spec, None);
                let dy = normal::<f64>(&mut rng, all.y().iter().product());
                let begin_dy = normal::<f64>(&mut rng, own.y().iter().product());

                // The oracle: both losses apart, those by the context's beginning added up.
                let of_all = truth(&spec, &context, &fade, false, &dy);
                let of_begin = truth(&spec, &begin, &begin_fade, true, &begin_dy);

                let mut state = State::<f64>::new(&plan, 1, 2).unwrap();
                let mut empty = state.fork();
                let mut y = common::calls::blank(own);
                feed(&plan, &mut state, &begin, &begin_fade, 0..first, &mut y);
                let mut by_state = StateGradient::new(&plan, 1, 2).unwrap();
                let nan = |shape: [usize; 4]| vec![f64::NAN; shape.iter().product()];
                let (mut dq, mut dk, mut dv) = (nan(all.q()), nan(all.k()), nan(all.v()));
                let gate_shape = [1, 2, first + more, 1];
                let (mut dg, mut dm) = (nan(gate_shape), vec![0.0; 2]);
                let mut out = Gradients::new(
                    ViewMut::new(&mut dq, all.q()).unwrap(),
                    part_mut(&mut dk, all.k(), first, more),
                    part_mut(&mut dv, all.v(), first, more),
                );
                match decay {
                    Decay::None => {}
                    Decay::Slopes => out = out.slopes(&mut dm),
                    Decay::Gates => out = out.log_gates(part_mut(&mut dg, gate_shape, first, more)),
                }
                let call = Call::full(
                    context.q(),
                    part(&context.k, all.k(), first, more),
                    part(&context.v, all.v(), first, more),
                );
                let call = fade.give(call, all, first, more).state(&mut state);
                let dy = View::new(&dy, all.y()).unwrap();
                plan.backward(call, dy, out.state(&mut by_state)).unwrap();
                let mut whole = Whole::new(own);
                let range = 0..first;
                whole.part(
                    &plan,
                    &mut empty,
                    &begin,
                    &begin_fade,
                    &range,
                    &begin_dy,
                    &mut by_state,
                );
                let begun = whole.done(&begin_fade);

                let what = format!("{first} + {more} keys, {queries} queries, {block}, {decay:?}");
                let late = |x: &[f64], d: usize| -> Vec<f64> {
                    let head = (first + more) * d;
                    (0..2).flat_map(|h| x[h * head + first * d..(h + 1) * head].to_vec()).collect()
                };
                let gates = decay == Decay::Gates;
                let slopes = decay == Decay::Slopes;
                let last = |x: &[f64], d| if x.is_empty() { vec![] } else { late(x, d) };
                let got = [
                    dq,
                    late(&dk, 5),
                    late(&dv, 4),
                    if gates { late(&dg, 1) } else { vec![] },
                    vec![],
                ];
                let want = [
                    of_all[0].clone(),
                    late(&of_all[1], 5),
                    late(&of_all[2], 4),
                    last(&of_all[3], 1),
                    vec![],
                ];
                assert_gradients(&format!("{what}, reading"), &got, &want, first + more, 1e-9);
                let sum = |a: &[f64], b: &[f64]| -> Vec<f64> {
                    a.iter().zip(b).map(|(a, b)| a + b).collect()
                };
                let want = [
                    of_begin[0].clone(),
                    sum(&of_begin[1], &cut(&of_all[1], 5, first)),
                    sum(&of_begin[2], &cut(&of_all[2], 4, first)),
                    if gates { sum(&of_begin[3], &cut(&of_all[3], 1, first)) } else { vec![] },
                    if slopes { sum(&of_begin[4], &of_all[4]) } else { vec![] },
                ];
                let mut begun = begun;
                if slopes {
                    begun[4] = sum(&begun[4], &dm);
                }
                assert_gradients(&format!("{what}, context"), &begun, &want, first + more, 1e-9);
            }
        }
    }
}

/// Open blocks longer than a chunk, and nothing asked of the state: what is open is summed once.
#[test]
fn full_reading_of_a_long_open_block() {
    let mut rng = rng();
    let all = Sizes { queries: 90, ..Sizes::self_attention(300, 4, 4) };
    let context = Inputs::<f64>::new(&mut rng, all);
    let spec = Spec::new(4, 4).terms(3).block(256).build().unwrap();
    let plan = plan_of(&spec, None);
    let dy = normal::<f64>(&mut rng, all.y().iter().product());
    let want = truth(&spec, &context, &Fade::None, false, &dy);
    let mut state = State::<f64>::new(&plan, 1, 1).unwrap();
    let mut unread = vec![0.0; 200 * 4];
    let (k, v) = (part(&context.k, all.k(), 0, 200), part(&context.v, all.v(), 0, 200));
    plan.extend(&mut state, k, k, v, ViewMut::new(&mut unread, [1, 1, 200, 4]).unwrap()).unwrap();
    let (mut dq, mut dk, mut dv) = (vec![0.0; 360], vec![0.0; 400], vec![0.0; 400]);
    let out = Gradients::new(
        ViewMut::new(&mut dq, all.q()).unwrap(),
        ViewMut::new(&mut dk, [1, 1, 100, 4]).unwrap(),
        ViewMut::new(&mut dv, [1, 1, 100, 4]).unwrap(),
    );
    let (k, v) = (part(&context.k, all.k(), 200, 100), part(&context.v, all.v(), 200, 100));
    let call = Call::full(context.q(), k, v).state(&mut state);
    plan.backward(call, View::new(&dy, all.y()).unwrap(), out).unwrap();
    let got = [dq, dk, dv, vec![], vec![]];
    let want = [want[0].clone(), want[1][800..].to_vec(), want[2][800..].to_vec(), vec![], vec![]];
    assert_gradients("300 keys, 200 of them open", &got, &want, 300, 1e-9);
}

/// A gradient by a state goes from a plan of one instruction set to one of another, and begins anew.
#[test]
fn instruction_sets_may_change_between_calls() {
    let mut rng = rng();
    let sizes = Sizes::self_attention(50, 5, 3);
    let inputs = Inputs::<f64>::new(&mut rng, sizes);
    let spec = Spec::new(5, 3).terms(3).near(Near::Blocks(1)).block(8).sinks(3).build().unwrap();
    let dy = normal::<f64>(&mut rng, sizes.y().iter().product());
    let want = truth(&spec, &inputs, &Fade::None, true, &dy);
    for first in Level::available() {
        for second in Level::available() {
            let [first_plan, plan] =
                [first, second].map(|level| Plan::with_level(&spec, level).unwrap());
            let mut state = State::<f64>::new(&plan, 1, 1).unwrap();
            let mut before = state.fork();
            let mut y = common::calls::blank(sizes);
            feed(&plan, &mut state, &inputs, &Fade::None, 0..29, &mut y);
            let mut by_state = StateGradient::new(&first_plan, 1, 1).unwrap();
            for _ in 0..2 {
                by_state.reset();
                let mut whole = Whole::new(sizes);
                let none = Fade::None;
                whole.part(&first_plan, &mut state, &inputs, &none, &(29..50), &dy, &mut by_state);
                whole.part(&plan, &mut before, &inputs, &none, &(0..29), &dy, &mut by_state);
                let got = whole.done(&none);
                assert_gradients(&format!("{first}, then {second}"), &got, &want, 50, 1e-9);
            }
        }
    }
}

/// A sequence longer than any chunk, one head, in the form that is chosen for it.
#[test]
fn long_sequences_take_the_state_form() {
    let mut rng = rng();
    let sizes = Sizes::self_attention(1500, 8, 8);
    let fade = Fade::new(&mut rng, Decay::Gates, sizes);
    let inputs = Inputs::<f64>::new(&mut rng, sizes);
    let spec = Spec::new(8, 8).terms(3).near(Near::Blocks(1)).decay(Decay::Gates).build().unwrap();
    let dy = normal::<f64>(&mut rng, sizes.y().iter().product());
    let want = truth(&spec, &inputs, &fade, true, &dy);
    let plan = plan_of(&spec, None);
    let recipe = plan.recipe::<f64>([1, 1], [1500, 1500], true, false, 1);
    assert_eq!(recipe.form, sata::Form::State);
    let got = gradients(&plan, &inputs, &fade, true, &dy);
    assert_gradients("1500 tokens", &got, &want, 1500, 1e-9);
}

#[test]
fn wrong_states_are_refused_before_any_work() {
    let spec = |terms: usize| Spec::new(3, 3).terms(terms).block(4).build().unwrap();
    let plan = plan_of(&spec(3), None);
    let x = [0.5f64; 12];
    let shape = [1, 1, 4, 3];
    let view = || View::new(&x, shape).unwrap();
    let mut found = vec![];
    let (mut a, mut b, mut c) = ([7.0; 12], [7.0; 12], [7.0; 12]);
    let mut refuse = |state: &mut State<f64>, by_state: &mut StateGradient<f64>| {
        let out = Gradients::new(
            ViewMut::new(&mut a, shape).unwrap(),
            ViewMut::new(&mut b, shape).unwrap(),
            ViewMut::new(&mut c, shape).unwrap(),
        );
        let call = Call::causal(view(), view(), view()).state(state);
        let error = plan.backward(call, view(), out.state(by_state)).unwrap_err();
        found.push(error.to_string());
        error
    };
    let state = || State::<f64>::new(&plan, 1, 1).unwrap();
    let zeros = |terms| StateGradient::new(&plan_of(&spec(terms), None), 1, 1).unwrap();
    let centre = Centre::new(1, &[0.1; 3], &[0.2; 3]).unwrap();
    let mut centred = State::centred(&plan, 1, 1, centre).unwrap();
    assert!(matches!(refuse(&mut centred, &mut zeros(3)), Error::Unsupported { .. }));
    let mut larger = State::<f64>::new(&plan_of(&spec(4), None), 1, 1).unwrap();
    assert!(matches!(refuse(&mut larger, &mut zeros(3)), Error::Unsupported { .. }));
    refuse(&mut state(), &mut zeros(5));
    refuse(&mut state(), &mut StateGradient::new(&plan, 2, 1).unwrap());
    refuse(&mut state(), &mut StateGradient::new(&plan, 1, 2).unwrap());
    assert!(a.iter().chain(&b).chain(&c).all(|&x| x == 7.0), "something was written");
    // Of a state at another position.
    let mut by_state = zeros(3);
    let mut later = state();
    let mut y = [0.0; 12];
    plan.extend(&mut later, view(), view(), view(), ViewMut::new(&mut y, shape).unwrap()).unwrap();
    let out = Gradients::new(
        ViewMut::new(&mut a, shape).unwrap(),
        ViewMut::new(&mut b, shape).unwrap(),
        ViewMut::new(&mut c, shape).unwrap(),
    );
    let call = Call::causal(view(), view(), view()).state(&mut later);
    plan.backward(call, view(), out.state(&mut by_state)).unwrap();
    assert_eq!(by_state.position(0), Some(4));
    let out = Gradients::new(
        ViewMut::new(&mut a, shape).unwrap(),
        ViewMut::new(&mut b, shape).unwrap(),
        ViewMut::new(&mut c, shape).unwrap(),
    );
    let call = Call::causal(view(), view(), view()).state(&mut later);
    let error = plan.backward(call, view(), out.state(&mut by_state)).unwrap_err().to_string();
    assert!(error.contains("position") && error.contains('8'), "{error}");
    for (error, words) in found.iter().zip(["centre", "orders", "spec", "sequences", "kv_heads"]) {
        assert!(error.contains(words), "{error} should name {words}");
    }
}
