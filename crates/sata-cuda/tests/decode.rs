//! Decode steps against the CPU engine, for random subsets of sequences at different positions.

#[path = "../../sata/tests/common/mod.rs"]
mod common;

use rand::Rng;
use rand::seq::SliceRandom;
use sata::{Call, Decay, Near, Series, Spec};
use sata_cuda::{
    Buffer, Decoder, Device, Element, Plan, Recipe, State, Step, Storage, SumsType, View, ViewMut,
};

#[derive(Clone)]
struct Case {
    spec: Spec,
    sequences: usize,
    kv_heads: usize,
    group: usize,
    steps: usize,
    recipe: Option<Recipe>,
    sums: SumsType,
    low: bool,
    tolerance: f64,
    /// Deviation of the logits.
    width: f32,
}

impl Case {
    fn new(spec: Spec) -> Self {
        Case {
            spec,
            sequences: 2,
            kv_heads: 1,
            group: 1,
            steps: 70,
            recipe: None,
            sums: SumsType::F32,
            low: true,
            tolerance: 1e-6,
            width: 0.7,
        }
    }
}

fn recipe(warps: u32, team: u32, split: u32, lane_rows: u32, pass: u32) -> Recipe {
    Recipe {
        warps,
        team,
        split,
        lane_rows,
        in_flight: 8,
        once: team == 1,
        fold_tokens: if split.is_multiple_of(2) { 8 } else { 16 },
        blocks: 1,
        pass,
    }
}

/// The emulator, or GPU 0 where `SATA_TEST_DEVICE` is `cuda`.
pub fn device() -> Device {
    match std::env::var("SATA_TEST_DEVICE") {
        Ok(name) if name == "cuda" => Device::new(0).unwrap(),
        _ => Device::emulated().unwrap(),
    }
}

/// Steps of random subsets of the sequences, against the CPU.
fn check<E: Element>(case: &Case) {
    let Case { spec, sequences, kv_heads, group, .. } = case;
    let (sequences, kv_heads, group) = (*sequences, *kv_heads, *group);
    let mut rng = common::rng();
    let device = device();
    let gpu = Plan::new(&device, spec).unwrap();
    let storage = Storage { sums: case.sums, compensated: case.low };
    let mut on_gpu = State::with_storage(&gpu, sequences, kv_heads, storage).unwrap();
    let (entries, query_heads) = (sequences, kv_heads * group);
    let mut decoder = match case.recipe {
        Some(recipe) => Decoder::with_recipe::<E>(&gpu, &on_gpu, entries, query_heads, recipe),
        None => Decoder::new::<E>(&gpu, &on_gpu, entries, query_heads),
    }
    .unwrap();
    println!("{spec:?} x{sequences} {kv_heads}·{group} {storage:?} {:?}", decoder.recipe());
    let plan = sata::Plan::new(spec).unwrap();
    let mut states: Vec<sata::State<f32>> =
        (0..sequences).map(|_| sata::State::new(&plan, 1, kv_heads).unwrap()).collect();
    let (dk, dv) = (spec.d_key(), spec.d_value());
    let (mut worst, mut error, mut size, mut answered) = (0f64, 0f64, 0f64, 0u64);
    let slopes: Vec<f64> = (0..kv_heads).map(|h| 0.02 + 0.03 * h as f64).collect();
    let slopes_on_device = Buffer::from_slice(&device, &slopes).unwrap();
    let fades = spec.decay();
    let spread = case.width.sqrt();
    for step in 0..case.steps {
        let mut order: Vec<u32> = (0..sequences as u32).collect();
        order.shuffle(&mut rng);
        // Some entries are left out.
        for entry in order.iter_mut().skip(1) {
            if rng.random_range(0..5) == 0 {
                *entry = u32::MAX;
            }
        }
        let mut random = |n: usize, scale: f32| -> Vec<E> {
            (0..n)
                .map(|_| {
                    let x: f32 = (0..4).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>();
                    E::from_compute(x * 0.866 * scale)
                })
                .collect()
        };
        let q = random(entries * kv_heads * group * dk, spread);
        let k = random(entries * kv_heads * dk, spread);
        let v = random(entries * kv_heads * dv, 1.0);
        let gates: Vec<f32> =
            (0..entries * kv_heads).map(|_| -0.2 * rng.random_range(0.0f32..1.0).powi(3)).collect();
        let upload = |x: &[E]| Buffer::from_slice(&device, x).unwrap();
        let (bq, bk, bv) = (upload(&q), upload(&k), upload(&v));
        let bg = Buffer::from_slice(&device, &gates).unwrap();
        let slots = Buffer::from_slice(&device, &order).unwrap();
        let nan = E::from_compute(f32::NAN);
        let y_shape = [entries, kv_heads * group, 1, dv];
        let mut y = upload(&vec![nan; y_shape.iter().product()]);
        let mut call = Step::new(
            View::new(&bq, [entries, kv_heads * group, 1, dk]).unwrap(),
            View::new(&bk, [entries, kv_heads, 1, dk]).unwrap(),
            View::new(&bv, [entries, kv_heads, 1, dv]).unwrap(),
        )
        .slots(&slots);
        match fades {
            Decay::Gates => {
                call = call.log_gates(View::new(&bg, [entries, kv_heads, 1, 1]).unwrap());
            }
            Decay::Slopes => call = call.slopes(&slopes_on_device),
            Decay::None => (),
        }
        let out = ViewMut::new(&mut y, y_shape).unwrap();
        decoder.step(&mut on_gpu, &call, out).unwrap();
        let y = y.to_vec().unwrap();
        for (entry, &sequence) in order.iter().enumerate() {
            let each = kv_heads * group * dv;
            let got = &y[entry * each..][..each];
            if sequence == u32::MAX {
                assert!(got.iter().all(|y| y.to_compute().is_nan()), "it was passed over");
                continue;
            }
            answered += (kv_heads * group) as u64;
            let mut want = vec![nan; each];
            let nk = kv_heads * dk;
            let (eq, ek) = (&q[entry * nk * group..][..nk * group], &k[entry * nk..][..nk]);
            let ev = &v[entry * kv_heads * dv..][..kv_heads * dv];
            let mut call = Call::causal(
                sata::View::new(eq, [1, kv_heads * group, 1, dk]).unwrap(),
                sata::View::new(ek, [1, kv_heads, 1, dk]).unwrap(),
                sata::View::new(ev, [1, kv_heads, 1, dv]).unwrap(),
            );
            match fades {
                Decay::Gates => {
                    let gates = &gates[entry * kv_heads..][..kv_heads];
                    call = call.log_gates(sata::View::new(gates, [1, kv_heads, 1, 1]).unwrap());
                }
                Decay::Slopes => call = call.slopes(&slopes),
                Decay::None => (),
            }
            let call = call.state(&mut states[sequence as usize]);
            let out = sata::ViewMut::new(&mut want, [1, kv_heads * group, 1, dv]).unwrap();
            plan.run(call, out).unwrap();
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let (got, want) = (f64::from(got.to_compute()), f64::from(want.to_compute()));
                let e = (got - want).abs();
                assert!(e.is_finite(), "step {step} entry {entry} [{i}]: {got} {want}");
                worst = worst.max(e);
                error += e * e;
                size += want * want;
            }
        }
    }
    let error = (error / size).sqrt();
    println!("relative RMS {error:.2e}, largest {worst:.2e}");
    assert!(error < case.tolerance, "{error:e} of {spec:?}");
    let found = decoder.diagnostics().unwrap();
    assert_eq!(found.queries, answered);
}

fn spec(d_key: usize, d_value: usize) -> sata::SpecBuilder {
    Spec::new(d_key, d_value).block(16)
}

fn many<E: Element>(cases: Vec<Case>) {
    // A GPU's compiler takes most of the time: some side by side.
    let at_once = if device().is_emulated() { 1 } else { 8 };
    for cases in cases.chunks(at_once) {
        std::thread::scope(|scope| {
            for case in cases {
                scope.spawn(move || check::<E>(case));
            }
        });
    }
}

#[test]
fn teams_and_splits() {
    let spec = spec(8, 8).terms(4).build().unwrap();
    for recipe in [
        recipe(1, 1, 1, 1, 1),
        recipe(2, 1, 1, 1, 1),
        recipe(4, 1, 1, 4, 1),
        recipe(2, 2, 1, 1, 1),
        recipe(2, 2, 2, 1, 1),
        recipe(4, 4, 3, 2, 1),
        recipe(2, 2, 40, 1, 1),
        // A whole head in one tile.
        recipe(1, 1, 1, 6, 1),
    ] {
        check::<f32>(&Case {
            recipe: Some(recipe),
            kv_heads: 2,
            sequences: 3,
            ..Case::new(spec.clone())
        });
    }
}

#[test]
fn series() {
    let gauss = |terms| spec(4, 6).series(Series::Gauss).terms(terms);
    let hermite = |terms| spec(4, 6).series(Series::hermite()).terms(terms);
    let fixed = |coefficients| spec(4, 6).series(Series::Fixed { coefficients });
    let mut cases = vec![];
    for (builder, recipe) in [
        (spec(4, 6).terms(1), recipe(1, 1, 1, 1, 1)),
        (spec(4, 6).terms(6), recipe(2, 2, 2, 1, 1)),
        (fixed(vec![1.0, 0.0, 0.5, 0.0, 0.0]), recipe(2, 1, 1, 1, 1)),
        (spec(4, 6).series(Series::power(2)), recipe(2, 2, 1, 1, 1)),
        (spec(4, 6).series(Series::Power { exponent: 4, floor: 0.0 }), recipe(1, 1, 1, 2, 1)),
        (gauss(2), recipe(1, 1, 1, 1, 1)),
        (gauss(4), recipe(2, 2, 3, 1, 1)),
        (gauss(6), recipe(2, 2, 1, 1, 1)),
        (hermite(1), recipe(1, 1, 1, 1, 1)),
        (hermite(3), recipe(2, 2, 2, 1, 1)),
        (hermite(4), recipe(2, 1, 1, 1, 1)),
    ] {
        for near in [Near::None, Near::Blocks(1)] {
            let spec = builder.clone().near(near).build().unwrap();
            let tolerance = 1e-6;
            cases.push(Case { recipe: Some(recipe), steps: 60, tolerance, ..Case::new(spec) });
        }
    }
    many::<f32>(cases);
}

#[test]
fn near_sinks_and_decay() {
    let mut cases = vec![];
    let nears = [Near::None, Near::Blocks(0), Near::Blocks(2)];
    let decays = [Decay::None, Decay::Slopes, Decay::Gates];
    for (i, near) in nears.into_iter().enumerate() {
        for (j, sinks) in [0, 3, 37].into_iter().enumerate() {
            for k in 0..2 {
                let series = [Series::Taylor, Series::Gauss][(i + j + k) % 2].clone();
                let decay = decays[(i + j + k) % 3];
                let spec = spec(4, 4).series(series).terms(4).near(near).sinks(sinks).decay(decay);
                let one = recipe(1, 1, 1, 1, 1);
                let recipe =
                    Some([one, recipe(2, 2, 2, 1, 1), recipe(1, 1, 1, 3, 1)][(i + j + k) % 3]);
                let spec = spec.build().unwrap();
                cases.push(Case { recipe, steps: 90, ..Case::new(spec) });
            }
        }
    }
    many::<f32>(cases);
}

#[test]
fn blocks_that_are_no_multiple_of_a_warp() {
    let mut cases = vec![];
    for block in [1, 7, 33, 64] {
        let spec = Spec::new(4, 4).terms(3).block(block).decay(Decay::Gates).near(Near::Blocks(1));
        cases.push(Case { steps: 150, ..Case::new(spec.build().unwrap()) });
        let spec = Spec::new(4, 4).terms(3).block(block).decay(Decay::Slopes).sinks(2);
        cases.push(Case { steps: 140, ..Case::new(spec.build().unwrap()) });
    }
    many::<f32>(cases);
}

#[test]
fn grouped_queries() {
    let mut cases = vec![];
    for (group, pass) in [(2, 2), (3, 3), (4, 4), (8, 8), (16, 16), (5, 2), (7, 4)] {
        let near = if group % 2 == 0 { Near::Blocks(1) } else { Near::None };
        let series = if group % 4 == 0 { Series::Gauss } else { Series::Taylor };
        let tolerance = 1e-6;
        let spec = spec(4, 8).series(series).terms(4).near(near).sinks(1).build().unwrap();
        let team = 1 + group as u32 % 2;
        let recipe = Some(recipe(2, team, team, 1, pass));
        cases.push(Case { group, kv_heads: 2, recipe, steps: 50, tolerance, ..Case::new(spec) });
    }
    many::<f32>(cases);
}

#[test]
fn sizes_of_all_kinds() {
    let mut cases = vec![];
    for (d_key, d_value, terms) in [
        (1, 1, 5),
        (3, 5, 4),
        (5, 10, 3),
        (6, 12, 3),
        (16, 24, 3),
        (7, 96, 2),
        (4, 128, 3),
        (5, 132, 3),
        (3, 257, 2),
    ] {
        let near = if d_key % 2 == 0 { Near::Blocks(0) } else { Near::None };
        let spec = spec(d_key, d_value).terms(terms).near(near).decay(Decay::Gates);
        cases.push(Case { steps: 40, group: 2, ..Case::new(spec.build().unwrap()) });
    }
    many::<f32>(cases);
}

#[test]
fn tiles_that_are_no_whole_number_of_loads() {
    // A warp loads 32 / 3, 5, 6, 9, 10 rows at once, rounded down, and goes over several tiles of 32 or 64.
    let mut cases = vec![];
    for d_value in [12, 20, 24, 36, 40] {
        for (team, lane_rows) in [(1, 1), (2, 1), (1, 2)] {
            let recipe = Some(recipe(2, team, 1, lane_rows, 1));
            let spec = spec(6, d_value).terms(5).build().unwrap();
            cases.push(Case { recipe, kv_heads: 2, steps: 40, ..Case::new(spec) });
        }
    }
    many::<f32>(cases);
}

#[test]
fn number_types() {
    let case = |series, near| {
        let spec = spec(8, 8).terms(4).series(series).near(near).build().unwrap();
        Case { tolerance: 4e-3, ..Case::new(spec) }
    };
    check::<half::bf16>(&case(Series::Taylor, Near::None));
    check::<half::bf16>(&case(Series::Gauss, Near::Blocks(1)));
    check::<half::f16>(&case(Series::Taylor, Near::None));
}

#[test]
fn sums_in_bf16() {
    for d_value in [8, 4, 6, 3] {
        let spec = spec(6, d_value).terms(3).build().unwrap();
        let case = Case { sums: SumsType::Bf16, tolerance: 1e-2, steps: 100, ..Case::new(spec) };
        check::<f32>(&case);
        check::<f32>(&Case { low: false, tolerance: 2e-2, ..case });
    }
}

#[test]
fn hundreds_of_steps_without_compensation() {
    let spec = spec(6, 8).terms(3).decay(Decay::Gates).build().unwrap();
    check::<f32>(&Case { low: false, steps: 500, ..Case::new(spec) });
}

#[test]
fn logits_that_exponentials_of_would_overflow() {
    let mut cases = vec![];
    for series in [Series::Taylor, Series::Gauss] {
        let spec = spec(4, 4).series(series).terms(4).near(Near::Blocks(1)).sinks(2);
        let spec = spec.build().unwrap();
        // Rounding of a logit of 100 is 1e-5 of its weight.
        cases.push(Case { width: 100.0, tolerance: 1e-3, ..Case::new(spec) });
    }
    many::<f32>(cases);
}
