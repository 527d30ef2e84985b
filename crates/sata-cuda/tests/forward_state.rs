//! The past carried by a state: over any split, packed, read in full, between GPU and CPU.

#[path = "../../sata/tests/common/mod.rs"]
mod common;
mod gpu;

use common::settings::{Setting, settings};
use common::truth::{Truth, assert_rows, truth};
use common::{Fade, Inputs, Sizes, rng, tolerance};
use gpu::{OnDevice, blank, device, feed, part, part_mut};
use rand::Rng;
use rand::rngs::StdRng;
use sata::{Decay, Form, Near, Series, Spec};
use sata_cuda::{Buffer, Call, Plan, State, Storage, SumsType};

const TOKENS: usize = 120;

fn sizes() -> Sizes {
    Sizes { batch: 2, kv_heads: 2, group: 2, ..Sizes::self_attention(TOKENS, 5, 6) }
}

/// A plan that takes sums every few tokens, or never within a call.
fn plan_of(setting: &Setting, rng: &mut StdRng) -> Plan {
    let plan = Plan::new(&device(), &setting.spec(sizes())).unwrap();
    match rng.random_bool(0.5) {
        true => plan.with_form(Form::State).with_chunk(rng.random_range(8..40)),
        false => plan,
    }
}

/// Lengths that sum up to all tokens; some are 0.
fn lengths(rng: &mut StdRng, mut tokens: usize) -> Vec<usize> {
    let mut all = vec![];
    while tokens > 0 {
        let n = match rng.random_range(0..4) {
            0 => rng.random_range(0..=2),
            1 => rng.random_range(0..20),
            _ => rng.random_range(0..70),
        };
        all.push(n.min(tokens));
        tokens -= n.min(tokens);
    }
    all
}

fn case(setting: &Setting, rng: &mut StdRng) -> (Inputs<f32>, Fade, Truth) {
    let s = sizes();
    let mut inputs = Inputs::<f32>::new(rng, s);
    if rng.random_bool(0.5) {
        inputs.mask = Some((0..s.batch * s.keys).map(|_| rng.random_bool(0.7)).collect());
    }
    let fade = Fade::new(rng, setting.decay, s);
    let truth = truth(&setting.spec(s), &inputs, &fade, true);
    (inputs, fade, truth)
}

fn allowed(setting: &Setting) -> f64 {
    2.0 * setting.slack()[1] * tolerance::<f32>()
}

#[test]
fn any_split_gives_the_same() {
    let mut rng = rng();
    for setting in settings() {
        let plan = plan_of(&setting, &mut rng);
        let (inputs, fade, truth) = case(&setting, &mut rng);
        let there = OnDevice::new(plan.device(), &inputs, &fade);
        let mut state = State::new(&plan, 2, 2).unwrap();
        let mut y = blank(plan.device(), inputs.sizes);
        let (lengths, mut from) = (lengths(&mut rng, TOKENS), 0);
        for n in &lengths {
            let found = feed(&plan, &mut state, &there, from..from + n, &mut y);
            assert_eq!(found.queries, (2 * 4 * n) as u64);
            from += n;
        }
        let what = format!("{setting:?} in {lengths:?}");
        assert_rows(&what, &y.to_vec().unwrap(), &truth, allowed(&setting));
        assert_eq!(state.position(1).unwrap(), TOKENS as u64);
    }
}

#[test]
fn goes_on_on_the_cpu_and_back() {
    let mut rng = rng();
    for setting in settings() {
        let plan = plan_of(&setting, &mut rng);
        let (inputs, fade, truth) = case(&setting, &mut rng);
        let s = inputs.sizes;
        let there = OnDevice::new(plan.device(), &inputs, &fade);
        let mut y = blank(plan.device(), s);
        let host = sata::Plan::new(&setting.spec(s)).unwrap();
        let (first, second) = (rng.random_range(0..80), rng.random_range(80..TOKENS));

        let mut state = State::new(&plan, 2, 2).unwrap();
        feed(&plan, &mut state, &there, 0..first, &mut y);
        // As the CPU engine left it, and the file it would write.
        let mut there_too = sata::State::<f32>::new(&host, 2, 2).unwrap();
        let mut on_host = common::calls::blank::<f32>(s);
        common::calls::feed(&host, &mut there_too, &inputs, &fade, 0..first, &mut on_host);
        let mut moved = state.to_host(&plan).unwrap();
        for sequence in 0..2 {
            assert_eq!(moved.position(sequence), there_too.position(sequence));
        }
        let mut copy = y.to_vec().unwrap();
        common::calls::feed(&host, &mut moved, &inputs, &fade, first..second, &mut copy);
        let mut state = State::from_host(&plan, &moved).unwrap();
        let mut y = Buffer::from_slice(plan.device(), &copy).unwrap();
        feed(&plan, &mut state, &there, second..TOKENS, &mut y);
        let what = format!("{setting:?}, {first} on the GPU, to {second} on the CPU");
        assert_rows(&what, &y.to_vec().unwrap(), &truth, allowed(&setting));
    }
}

#[test]
fn what_is_kept_is_what_the_cpu_keeps() {
    let mut rng = rng();
    for setting in settings() {
        let plan = plan_of(&setting, &mut rng);
        let (inputs, fade, _) = case(&setting, &mut rng);
        let s = inputs.sizes;
        let there = OnDevice::new(plan.device(), &inputs, &fade);
        let mut y = blank(plan.device(), s);
        let mut state = State::new(&plan, 2, 2).unwrap();
        let cut = rng.random_range(0..TOKENS);
        feed(&plan, &mut state, &there, 0..cut, &mut y);
        feed(&plan, &mut state, &there, cut..TOKENS, &mut y);
        let host = sata::Plan::new(&setting.spec(s)).unwrap();
        let (want, _) = common::calls::feed_in(&host, &inputs, &fade, &[TOKENS]);
        let (got, want) = (state.to_host(&plan).unwrap().to_parts(), want.to_parts());
        assert_eq!(got.positions, want.positions);
        assert_eq!(got.open, want.open);
        assert_eq!(got.counts, want.counts, "{setting:?} at {cut}");
        let close = |name: &str, got: &[f64], want: &[f64], by: f64| {
            assert_eq!(got.len(), want.len(), "{name}");
            for (i, (g, w)) in got.iter().zip(want).enumerate() {
                let off = (g - w).abs();
                assert!(off <= by * w.abs().max(1.0), "{setting:?} {name} {i}: {g}, want {w}");
            }
        };
        let f64s = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
        close("lags", &got.lags, &want.lags, 1e-9);
        close("totals", &got.totals, &want.totals, 1e-9);
        close("reaches", &got.reaches, &want.reaches, 1e-6);
        close("sums", &f64s(&got.sums), &f64s(&want.sums), 2e-5);
        close("z", &f64s(&got.z), &f64s(&want.z), 2e-5);
        close("open fading", &got.open_fading, &want.open_fading, 0.0);
        close("sink fading", &got.sink_fading, &want.sink_fading, 1e-9);
        for (name, got, want) in [
            ("open keys", &got.open_keys, &want.open_keys),
            ("open weights", &got.open_weights, &want.open_weights),
            ("sink keys", &got.sink_keys, &want.sink_keys),
            ("sink weights", &got.sink_weights, &want.sink_weights),
        ] {
            assert_eq!(got, want, "{setting:?} {name} at {cut}");
        }
        // Values of tokens that are not there are nobody's business: they are 0 here.
        for (name, got, want, weights) in [
            ("open values", &got.open_values, &want.open_values, &want.open_weights),
            ("sink values", &got.sink_values, &want.sink_values, &want.sink_weights),
        ] {
            let want = want.iter().zip(weights.iter().flat_map(|w| [w; 6])).map(|(v, w)| v * w);
            assert_eq!(*got, want.collect::<Vec<_>>(), "{setting:?} {name} at {cut}");
        }
    }
}

/// Queries of their own read a past and the keys that come with them, as on the CPU.
#[test]
fn full_reading_of_a_past() {
    let mut rng = rng();
    for setting in settings().into_iter().filter(|setting| setting.near == Near::None) {
        let plan = plan_of(&setting, &mut rng);
        let s = Sizes { queries: 30, ..sizes() };
        let inputs = Inputs::<f32>::new(&mut rng, s);
        let fade = Fade::new(&mut rng, setting.decay, s);
        let truth = truth(&setting.spec(s), &inputs, &fade, false);
        let there = OnDevice::new(plan.device(), &inputs, &fade);
        let mut state = State::new(&plan, 2, 2).unwrap();
        let cut = rng.random_range(0..TOKENS);
        for keys in [0..cut / 2, cut / 2..cut] {
            let mut none = blank::<f32>(plan.device(), Sizes { queries: 0, ..s });
            let call = there.part(false, 0..0, keys.clone()).state(&mut state);
            let shape = Sizes { queries: 0, ..s }.y();
            plan.run(call, part_mut(&mut none, shape, 0..0)).unwrap();
        }
        let mut y = blank::<f32>(plan.device(), s);
        let call = there.part(false, 0..30, cut..TOKENS).state(&mut state);
        plan.run(call, part_mut(&mut y, s.y(), 0..30)).unwrap();
        let what = format!("{setting:?} from {cut}");
        assert_rows(&what, &y.to_vec().unwrap(), &truth, allowed(&setting));
        assert_eq!(state.position(0).unwrap(), TOKENS as u64);
        // Once more without any new keys.
        let mut again = blank::<f32>(plan.device(), s);
        let call = there.part(false, 0..30, TOKENS..TOKENS).state(&mut state);
        plan.run(call, part_mut(&mut again, s.y(), 0..30)).unwrap();
        assert_rows(&what, &again.to_vec().unwrap(), &truth, allowed(&setting));
    }
}

/// What is packed of one sequence.
type Of<'o> = &'o dyn Fn(&(Inputs<f32>, Fade)) -> Vec<f32>;

/// Sequences of different lengths side by side, in three calls with a state.
#[test]
fn packed_sequences() {
    let mut rng = rng();
    for setting in settings() {
        let plan = plan_of(&setting, &mut rng);
        let device = plan.device();
        let all = [33usize, 0, 70, 1];
        let first = [20usize, 0, 33, 0];
        let each: Vec<(Inputs<f32>, Fade)> = all
            .iter()
            .map(|&tokens| {
                let s = Sizes { batch: 1, queries: tokens, keys: tokens, ..sizes() };
                let inputs = Inputs::<f32>::new(&mut rng, s);
                let fade = match (&setting.decay, setting.decay) {
                    // Slopes are those of the heads, for all sequences.
                    (Decay::Slopes, _) => Fade::Slopes(vec![0.25, 0.03]),
                    (_, decay) => Fade::new(&mut rng, decay, s),
                };
                (inputs, fade)
            })
            .collect();
        let mut state = State::new(&plan, all.len(), 2).unwrap();
        let mut y: Vec<Vec<f32>> =
            each.iter().map(|(x, _)| common::calls::blank(x.sizes)).collect();
        let mut from = [0; 4];
        // Two more each, where there are as many, and then the rest.
        let left: Vec<usize> = all.iter().zip(first).map(|(all, first)| all - first).collect();
        let few: Vec<usize> = left.iter().map(|&left| left.min(2)).collect();
        let rest: Vec<usize> = left.iter().zip(&few).map(|(left, few)| left - few).collect();
        for lengths in [first.to_vec(), few, rest] {
            let total: usize = lengths.iter().sum();
            let mut cu = vec![0];
            cu.extend(lengths.iter().scan(0, |sum, n| {
                *sum += n;
                Some(*sum)
            }));
            // [heads][total][dim] of the parts.
            let pack = |of: Of<'_>, heads: usize, dim: usize| {
                let mut out = vec![0.0f32; heads * total * dim];
                for (i, one) in each.iter().enumerate() {
                    let (rows, n) = (of(one), all[i]);
                    for head in 0..heads {
                        for t in 0..lengths[i] {
                            let at = (head * n + from[i] + t) * dim;
                            let to = (head * total + cu[i] + t) * dim;
                            out[to..to + dim].copy_from_slice(&rows[at..at + dim]);
                        }
                    }
                }
                Buffer::from_slice(device, &out).unwrap()
            };
            let q = pack(&|(x, _)| x.q.clone(), 4, 5);
            let k = pack(&|(x, _)| x.k.clone(), 2, 5);
            let v = pack(&|(x, _)| x.v.clone(), 2, 6);
            let gates = pack(
                &|(x, fade)| match fade {
                    Fade::Gates { log_gates, .. } => log_gates.clone(),
                    _ => vec![0.0; 2 * x.sizes.keys],
                },
                2,
                1,
            );
            let mut call = Call::causal(
                part(&q, [1, 4, total, 5], 0..total),
                part(&k, [1, 2, total, 5], 0..total),
                part(&v, [1, 2, total, 6], 0..total),
            )
            .packed(&cu, &cu)
            .state(&mut state);
            if setting.decay == Decay::Gates {
                call = call.log_gates(part(&gates, [1, 2, total, 1], 0..total));
            }
            if let Fade::Slopes(slopes) = &each[0].1 {
                call = call.slopes(slopes);
            }
            let mut out = Buffer::<f32>::uninit(device, 4 * total * 6).unwrap();
            out.fill_bytes(0xff).unwrap();
            plan.run(call, part_mut(&mut out, [1, 4, total, 6], 0..total)).unwrap();
            let out = out.to_vec().unwrap();
            for (i, &n) in lengths.iter().enumerate() {
                for head in 0..4 {
                    for t in 0..n {
                        let to = (head * all[i] + from[i] + t) * 6;
                        let at = (head * total + cu[i] + t) * 6;
                        y[i][to..to + 6].copy_from_slice(&out[at..at + 6]);
                    }
                }
                from[i] += n;
            }
        }
        for (i, (inputs, fade)) in each.iter().enumerate() {
            let truth = truth(&setting.spec(inputs.sizes), inputs, fade, true);
            assert_rows(&format!("{setting:?}, sequence {i}"), &y[i], &truth, allowed(&setting));
        }
    }
}

/// A state that holds more orders than a plan reads, and one of bf16 sums.
#[test]
fn other_states() {
    let mut rng = rng();
    let setting = |series, terms| Setting {
        series,
        terms,
        near: Near::Blocks(1),
        block: 8,
        sinks: 2,
        decay: Decay::Gates,
    };
    let s = sizes();
    let (wide, narrow) = (setting(Series::Gauss, 4), setting(Series::power(2), 3));
    let (inputs, fade, _) = case(&wide, &mut rng);
    let plans = [&wide, &narrow].map(|setting| Plan::new(&device(), &setting.spec(s)).unwrap());
    let [plan, reader] = plans.map(|plan| plan.with_form(Form::State).with_chunk(16));
    // Both devices are one: buffers of the first serve the second.
    let reader = Plan::new(plan.device(), reader.spec()).unwrap();
    let there = OnDevice::new(plan.device(), &inputs, &fade);
    let mut y = blank(plan.device(), s);
    let mut state = State::new(&plan, 2, 2).unwrap();
    feed(&plan, &mut state, &there, 0..50, &mut y);
    feed(&reader, &mut state, &there, 50..TOKENS, &mut y);
    let truth = truth(&narrow.spec(s), &inputs, &fade, true);
    let mut want = truth;
    // Only the second part was of that series.
    let y = y.to_vec().unwrap();
    let mut got = y.clone();
    for row in 0..got.len() / 6 {
        if row % TOKENS < 50 {
            got[row * 6..][..6].fill(f32::NAN);
            want.y[row * 6..][..6].fill(f64::NAN);
        }
    }
    assert_rows("narrow", &got, &want, 1e-4);

    for compensated in [false, true] {
        let storage = Storage { sums: SumsType::Bf16, compensated };
        let mut state = State::with_storage(&plan, 2, 2, storage).unwrap();
        let mut y = blank(plan.device(), s);
        for range in [0..50, 50..51, 51..TOKENS] {
            feed(&plan, &mut state, &there, range, &mut y);
        }
        let truth = common::truth::truth(&wide.spec(s), &inputs, &fade, true);
        let by = if compensated { 1e-3 } else { 5e-2 };
        assert_rows(&format!("bf16, {compensated}"), &y.to_vec().unwrap(), &truth, by);
    }
}

/// Calls of which no key is there: the past fades all the same.
#[test]
fn masked_calls() {
    let mut rng = rng();
    for setting in settings() {
        let plan = plan_of(&setting, &mut rng);
        let s = sizes();
        let mut inputs = Inputs::<f32>::new(&mut rng, s);
        inputs.mask =
            Some((0..s.batch * s.keys).map(|i| !(20..90).contains(&(i % s.keys))).collect());
        let fade = Fade::new(&mut rng, setting.decay, s);
        let truth = truth(&setting.spec(s), &inputs, &fade, true);
        let there = OnDevice::new(plan.device(), &inputs, &fade);
        let mut state = State::new(&plan, 2, 2).unwrap();
        let mut y = blank(plan.device(), s);
        for range in [0..24, 24..50, 50..83, 83..TOKENS] {
            feed(&plan, &mut state, &there, range, &mut y);
        }
        assert_rows(&format!("{setting:?}"), &y.to_vec().unwrap(), &truth, allowed(&setting));
        let parts = state.to_host(&plan).unwrap().to_parts();
        let host = sata::Plan::new(&setting.spec(s)).unwrap();
        let (want, _) = common::calls::feed_in(&host, &inputs, &fade, &[30, 50, 40]);
        for (got, want) in parts.lags.iter().zip(&want.to_parts().lags) {
            assert!((got - want).abs() < 1e-9, "{setting:?}: {got}, want {want}");
        }
    }
}

/// Sums so large that f32 loses what a block adds keep it all the same.
#[test]
fn what_rounding_takes_is_kept() {
    let spec = Spec::new(1, 1).terms(1).block(8).build().unwrap();
    let plan = Plan::new(&device(), &spec).unwrap();
    let large = 2f32.powi(26);
    let host = sata::State::<f32>::new(plan.host(), 1, 1).unwrap();
    let mut parts = host.to_parts();
    parts.positions = vec![1 << 26];
    parts.counts = vec![1 << 26];
    parts.sums = vec![large];
    parts.z = vec![large];
    let host = sata::State::from_parts(plan.host(), 1, &parts).unwrap();
    let mut state = State::from_host(&plan, &host).unwrap();
    let s = Sizes::self_attention(20, 1, 1);
    let mut inputs = Inputs::<f32>::new(&mut rng(), s);
    inputs.v.fill(0.25);
    let there = OnDevice::new(plan.device(), &inputs, &Fade::None);
    for _ in 0..4 {
        feed(&plan, &mut state, &there, 0..20, &mut blank(plan.device(), s));
    }
    let parts = state.to_host(&plan).unwrap().to_parts();
    assert_eq!(parts.counts, [(1 << 26) + 80]);
    assert_eq!(f64::from(parts.z[0]) + f64::from(parts.z_low[0]), f64::from(large) + 80.0);
    assert_eq!(f64::from(parts.sums[0]) + f64::from(parts.sums_low[0]), f64::from(large) + 20.0);
}

/// Runs again are the same, bit for bit.
#[test]
fn repeats_are_identical() {
    let mut rng = rng();
    for setting in settings().into_iter().skip(6).step_by(3) {
        let plan = Plan::new(&device(), &setting.spec(sizes())).unwrap();
        let plan = plan.with_form(Form::State).with_chunk(16);
        let (inputs, fade, _) = case(&setting, &mut rng);
        let there = OnDevice::new(plan.device(), &inputs, &fade);
        let mut all = vec![];
        for _ in 0..2 {
            let mut state = State::new(&plan, 2, 2).unwrap();
            let mut y = blank(plan.device(), inputs.sizes);
            feed(&plan, &mut state, &there, 0..77, &mut y);
            feed(&plan, &mut state, &there, 77..TOKENS, &mut y);
            let bits: Vec<u32> = y.to_vec().unwrap().iter().map(|y: &f32| y.to_bits()).collect();
            all.push((bits, state.to_host(&plan).unwrap().to_bytes()));
        }
        assert!(all[0] == all[1], "{setting:?}");
    }
}
