//! Decode among other calls: against the oracle, before and after prefill, on the CPU's states,
//! replayed from a graph; and what it refuses.

#[path = "../../sata/tests/common/mod.rs"]
mod common;
mod gpu;

use common::check::describe;
use common::truth::{assert_rows, truth};
use common::{Fade, Inputs, Sizes, relative_rms, rng, tolerance};
use gpu::{OnDevice, blank, device, feed, part, part_mut};
use rand::Rng;
use sata::{Decay, Near, Series, Spec};
use sata_cuda::{Buffer, Decoder, Error, Plan, State, Step, Storage, View, ViewMut};

/// Tokens `range` of every sequence, one step each; outputs go to their places in `y`.
fn step_by_step(
    plan: &Plan,
    state: &mut State,
    there: &OnDevice<f32>,
    range: std::ops::Range<usize>,
    y: &mut Buffer<f32>,
) {
    let s = there.sizes;
    let device = plan.device();
    let slopes = there.slopes.as_ref().map(|m| Buffer::from_slice(device, m).unwrap());
    for t in range {
        let step = step_of(there, slopes.as_ref(), t);
        plan.step(state, &step, part_mut(y, s.y(), t..t + 1)).unwrap();
    }
}

fn step_of<'a>(
    there: &'a OnDevice<f32>,
    slopes: Option<&'a Buffer<f64>>,
    t: usize,
) -> Step<'a, f32> {
    let s = there.sizes;
    let mut step = Step::new(
        part(&there.q, s.q(), t..t + 1),
        part(&there.k, s.k(), t..t + 1),
        part(&there.v, s.v(), t..t + 1),
    );
    if let Some(slopes) = slopes {
        step = step.slopes(slopes);
    }
    if let Some(gates) = &there.gates {
        step = step.log_gates(part(gates, [s.batch, s.kv_heads, s.keys, 1], t..t + 1));
    }
    step
}

fn specs() -> Vec<(Spec, Sizes)> {
    let spec = |d_key, d_value| Spec::new(d_key, d_value).block(8);
    let sizes = |d_key, d_value| Sizes {
        batch: 2,
        kv_heads: 2,
        group: 2,
        ..Sizes::self_attention(70, d_key, d_value)
    };
    vec![
        (spec(5, 6).terms(4).build().unwrap(), sizes(5, 6)),
        (
            spec(4, 8).terms(3).near(Near::Blocks(1)).sinks(3).decay(Decay::Gates).build().unwrap(),
            sizes(4, 8),
        ),
        (
            spec(6, 3)
                .series(Series::Gauss)
                .near(Near::Blocks(2))
                .sinks(1)
                .decay(Decay::Slopes)
                .build()
                .unwrap(),
            sizes(6, 3),
        ),
        (spec(3, 4).series(Series::power(4)).sinks(9).build().unwrap(), sizes(3, 4)),
        (
            spec(3, 4).series(Series::hermite()).terms(4).decay(Decay::Gates).build().unwrap(),
            sizes(3, 4),
        ),
    ]
}

/// A fitted series may differ by what rounding makes of its moments.
fn slack(spec: &Spec) -> f64 {
    if spec.coefficients().is_none() { 8.0 } else { 1.0 }
}

#[test]
fn steps_and_prefill_in_any_order_give_the_oracles_answer() {
    let mut rng = rng();
    for (spec, s) in specs() {
        let inputs = Inputs::<f32>::new(&mut rng, s);
        let fade = Fade::new(&mut rng, spec.decay(), s);
        let truth = truth(&spec, &inputs, &fade, true);
        let plan = Plan::new(&device(), &spec).unwrap();
        let there = OnDevice::new(plan.device(), &inputs, &fade);
        for mixed in [false, true] {
            let mut state = State::new(&plan, s.batch, s.kv_heads).unwrap();
            let mut y = blank::<f32>(plan.device(), s);
            let mut at = 0;
            while at < s.keys {
                let end = (at + rng.random_range(1..20)).min(s.keys);
                if mixed && rng.random_range(0..2) == 0 {
                    feed(&plan, &mut state, &there, at..end, &mut y);
                } else {
                    step_by_step(&plan, &mut state, &there, at..end, &mut y);
                }
                at = end;
            }
            let what = describe(&spec, &inputs, &fade, true, &format!("steps, mixed: {mixed}"));
            assert_rows(&what, &y.to_vec().unwrap(), &truth, slack(&spec) * tolerance::<f32>());
            for sequence in 0..s.batch {
                assert_eq!(state.position(sequence).unwrap(), s.keys as u64);
            }
        }
    }
}

#[test]
fn states_move_between_steps_on_gpu_and_cpu() {
    let mut rng = rng();
    for (spec, s) in specs() {
        let inputs = Inputs::<f32>::new(&mut rng, s);
        let fade = Fade::new(&mut rng, spec.decay(), s);
        let plan = Plan::new(&device(), &spec).unwrap();
        let there = OnDevice::new(plan.device(), &inputs, &fade);
        // The CPU alone.
        let host = sata::Plan::new(&spec).unwrap();
        let mut alone = sata::State::new(&host, s.batch, s.kv_heads).unwrap();
        let mut want = common::calls::blank::<f32>(s);
        common::calls::feed(&host, &mut alone, &inputs, &fade, 0..s.keys, &mut want);
        // In turns, changing in the middle of blocks.
        let mut y = blank::<f32>(plan.device(), s);
        let mut on_cpu = sata::State::new(&host, s.batch, s.kv_heads).unwrap();
        let mut got = common::calls::blank::<f32>(s);
        common::calls::feed(&host, &mut on_cpu, &inputs, &fade, 0..13, &mut got);
        let mut on_gpu = State::from_host(&plan, &on_cpu).unwrap();
        step_by_step(&plan, &mut on_gpu, &there, 13..50, &mut y);
        let mut on_cpu = on_gpu.to_host(&plan).unwrap();
        common::calls::feed(&host, &mut on_cpu, &inputs, &fade, 50..s.keys, &mut got);
        let y = y.to_vec().unwrap();
        for (row, got) in got.chunks_mut(s.d_value).enumerate() {
            if (13..50).contains(&(row % s.queries)) {
                got.copy_from_slice(&y[row * s.d_value..][..s.d_value]);
            }
        }
        let truth = truth(&spec, &inputs, &fade, true);
        let allowed = slack(&spec) * tolerance::<f32>();
        assert_rows(
            &describe(&spec, &inputs, &fade, true, "the CPU alone"),
            &want,
            &truth,
            allowed,
        );
        assert_rows(&describe(&spec, &inputs, &fade, true, "in turns"), &got, &truth, allowed);
        let (a, b) = (on_cpu.to_parts(), alone.to_parts());
        assert_eq!((&a.positions, &a.open, &a.counts), (&b.positions, &b.open, &b.counts));
        assert_eq!((&a.open_keys, &a.open_weights), (&b.open_keys, &b.open_weights));
        let [sums, wanted] = [a.sums, b.sums].map(|x| x.into_iter().map(f64::from).collect());
        let (sums, wanted): (Vec<f64>, Vec<f64>) = (sums, wanted);
        assert!(relative_rms(&sums, &wanted) < 1e-6, "sums of {spec:?}");
    }
}

#[test]
fn a_graph_of_a_step_is_replayed() {
    let mut rng = rng();
    let (spec, s) = specs().swap_remove(1);
    let inputs = Inputs::<f32>::new(&mut rng, s);
    let fade = Fade::new(&mut rng, spec.decay(), s);
    let plan = Plan::new(&device(), &spec).unwrap();
    let device = plan.device();
    let there = OnDevice::new(device, &inputs, &fade);
    let mut plain = State::new(&plan, s.batch, s.kv_heads).unwrap();
    let mut replayed = State::new(&plan, s.batch, s.kv_heads).unwrap();
    let heads = s.kv_heads * s.group;
    let shape = [s.batch, heads, 1, s.d_value];
    let count = shape.iter().product();
    let step = step_of(&there, None, 0);
    // Compiled, and its tables uploaded, before anything is captured.
    let decoder = Decoder::new::<f32>(&plan, &replayed, s.batch, heads).unwrap();
    let mut captured = Buffer::<f32>::uninit(device, count).unwrap();
    // SAFETY: state, inputs and outputs outlive the graph.
    let graph = unsafe {
        device.capture(|| {
            let out = ViewMut::new(&mut captured, shape)?;
            decoder.step(&mut replayed, &step, out)
        })
    }
    .unwrap();
    assert_eq!(replayed.position(0).unwrap(), 0, "a captured step is not yet taken");
    let mut y = Buffer::<f32>::uninit(device, count).unwrap();
    for _ in 0..40 {
        plan.step(&mut plain, &step, ViewMut::new(&mut y, shape).unwrap()).unwrap();
        graph.launch().unwrap();
        assert_eq!(y.to_vec().unwrap(), captured.to_vec().unwrap(), "bit for bit");
    }
    assert_eq!(replayed.position(1).unwrap(), 40);
}

#[test]
fn a_state_of_more_orders_serves() {
    let mut rng = rng();
    let s = Sizes { kv_heads: 2, ..Sizes::self_attention(60, 4, 4) };
    let inputs = Inputs::<f32>::new(&mut rng, s);
    let build = |series: &Series| {
        let terms = if matches!(series, Series::Power { .. }) { None } else { Some(3) };
        let builder = Spec::new(4, 4).block(8).series(series.clone());
        terms.map_or(builder.clone(), |terms| builder.terms(terms)).build().unwrap()
    };
    let wide = Spec::new(4, 4).block(8).terms(5).build().unwrap();
    let fade = Fade::new(&mut rng, Decay::None, s);
    for series in [Series::Taylor, Series::power(2), Series::hermite()] {
        let spec = build(&series);
        let plan = Plan::new(&device(), &spec).unwrap();
        let there = OnDevice::new(plan.device(), &inputs, &fade);
        let of_more = Plan::new(plan.device(), &wide).unwrap();
        let mut state = State::new(&of_more, s.batch, s.kv_heads).unwrap();
        let mut y = blank::<f32>(plan.device(), s);
        step_by_step(&plan, &mut state, &there, 0..s.keys, &mut y);
        let truth = truth(&spec, &inputs, &fade, true);
        let what = describe(&spec, &inputs, &fade, true, "a state of five orders");
        assert_rows(&what, &y.to_vec().unwrap(), &truth, slack(&spec) * tolerance::<f32>());
    }
}

#[test]
fn denominators_that_are_not_positive_are_counted() {
    let spec = Spec::new(1, 1).terms(2).scale(1.0).build().unwrap();
    let plan = Plan::new(&device(), &spec).unwrap();
    let device = plan.device();
    let mut state = State::new(&plan, 3, 1).unwrap();
    let mut decoder = Decoder::new::<f32>(&plan, &state, 3, 2).unwrap();
    // Weights 1 + q·k: 2 and 4; −3 and 0; NaN and 1.
    let q = [1.0, 3.0, -4.0, -1.0, f32::NAN, 0.0];
    let q = Buffer::from_slice(device, &q).unwrap();
    let one = Buffer::from_slice(device, &[1.0f32; 3]).unwrap();
    let mut y = Buffer::<f32>::uninit(device, 6).unwrap();
    let one = View::new(&one, [3, 1, 1, 1]).unwrap();
    let step = Step::new(View::new(&q, [3, 2, 1, 1]).unwrap(), one, one);
    decoder.step(&mut state, &step, ViewMut::new(&mut y, [3, 2, 1, 1]).unwrap()).unwrap();
    let found = decoder.diagnostics().unwrap();
    assert_eq!((found.queries, found.non_positive, found.non_finite), (6, 2, 1));
    assert_eq!(found.first, Some([1, 0, 0]));
    let found = decoder.diagnostics().unwrap();
    assert!(found.queries == 0 && found.is_clean() && found.first.is_none());
}

#[test]
fn misfits_are_refused_by_name() {
    let device = device();
    let spec = Spec::new(4, 2).terms(3).decay(Decay::Gates).build().unwrap();
    let plan = Plan::new(&device, &spec).unwrap();
    let mut state = State::new(&plan, 3, 2).unwrap();
    let refused = |made: Result<Decoder, Error>| made.unwrap_err().to_string();
    assert!(refused(Decoder::new::<f32>(&plan, &state, 0, 2)).contains('q'));
    assert!(refused(Decoder::new::<f32>(&plan, &state, 1, 3)).contains("2 key/value heads"));
    let other = Plan::new(&device, &Spec::new(4, 3).decay(Decay::Gates).build().unwrap()).unwrap();
    assert!(refused(Decoder::new::<f32>(&other, &state, 1, 2)).contains("d_value"));

    let decoder = Decoder::new::<f32>(&plan, &state, 2, 4).unwrap();
    let mut recipe = *decoder.recipe();
    recipe.team = 3;
    assert!(refused(Decoder::with_recipe::<f32>(&plan, &state, 2, 4, recipe)).contains("team"));
    let x = Buffer::<f32>::zeroed(&device, 64).unwrap();
    let slots = Buffer::<u32>::zeroed(&device, 3).unwrap();
    let slopes = Buffer::<f64>::zeroed(&device, 2).unwrap();
    let view = |shape| View::new(&x, shape).unwrap();
    let step = Step::new(view([2, 4, 1, 4]), view([2, 2, 1, 4]), view([2, 2, 1, 2]));
    let mut y = Buffer::<f32>::zeroed(&device, 64).unwrap();
    let mut refused = |state: &mut State, step: &Step<'_, f32>, shape| {
        let out = ViewMut::new(&mut y, shape).unwrap();
        decoder.step(state, step, out).unwrap_err().to_string()
    };
    let good = [2, 4, 1, 2];
    assert!(refused(&mut state, &step, good).contains("log_gates"));
    let gates = view([2, 2, 1, 1]);
    let step = step.log_gates(gates);
    assert!(refused(&mut state, &step.slots(&slots), good).contains("slots"));
    assert!(refused(&mut state, &step.slopes(&slopes), good).contains("slopes"));
    assert!(refused(&mut state, &step, [2, 4, 1, 4]).contains("out"));
    let wrong = Step::new(view([2, 4, 1, 4]), view([2, 1, 1, 4]), view([2, 2, 1, 2]));
    assert!(refused(&mut state, &wrong.log_gates(gates), good).contains('k'));
    let mut more = State::new(&plan, 4, 2).unwrap();
    assert!(refused(&mut more, &step, good).contains("sequences"));
    let storage = Storage { compensated: true, ..state.storage() };
    let mut kept = State::with_storage(&plan, 3, 2, storage).unwrap();
    assert!(refused(&mut kept, &step, good).contains("sums"));
    decoder.step(&mut state, &step, ViewMut::new(&mut y, good).unwrap()).unwrap();
}
