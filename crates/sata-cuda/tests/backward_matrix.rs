//! The backward of bf16 on matrix units, which the emulated device has too, against the oracle's
//! analytic gradients of the very numbers that the device has.

#[path = "../../sata/tests/common/mod.rs"]
mod common;
mod gpu;
mod gradients;

use common::calls::spec;
use common::check::describe;
use common::gradients::{assert_gradients, rms, truth};
use common::{Fade, Inputs, Sizes, f64s, normal, rng};
use gpu::device;
use gradients::{bits, gradients};
use half::bf16;
use rand::Rng;
use rand::rngs::StdRng;
use sata::{Decay, Form, Near, Series};
use sata_cuda::Plan;

/// What weights and gradients in bf16 leave.
const ALLOWED: f64 = 1.2e-2;
/// How much more gradients by gates and slopes may be off, which are small differences of large sums.
const OF_DECAYS: f64 = 6.0;

struct Case {
    series: Series,
    terms: usize,
    gain: f64,
    dims: [usize; 2],
    near: (Near, usize, usize),
    decay: Decay,
    tokens: [usize; 2],
    causal: bool,
}

fn check(rng: &mut StdRng, case: Case) {
    let [d_key, d_value] = case.dims;
    let sizes = Sizes {
        batch: rng.random_range(1..=2),
        kv_heads: rng.random_range(1..=2),
        group: rng.random_range(1..=2),
        queries: case.tokens[0],
        keys: case.tokens[1],
        d_key,
        d_value,
    };
    let inputs = Inputs::<f32>::new(rng, sizes).gain(case.gain);
    let inputs = if rng.random_bool(0.3) { inputs.masked(rng) } else { inputs };
    let inputs = inputs.to::<bf16>();
    let fade = match case.decay {
        Decay::Gates if rng.random_bool(0.3) => Fade::closing(rng, sizes),
        decay => Fade::new(rng, decay, sizes),
    };
    let (near, block, sinks) = case.near;
    let spec = spec(sizes, &case.series, case.terms)
        .near(near)
        .block(block)
        .sinks(sinks)
        .decay(case.decay)
        .build()
        .unwrap();
    let dy: Vec<bf16> = normal(rng, sizes.y().iter().product());
    let want = truth(&spec, &inputs.to::<f32>(), &fade, case.causal, &f64s(&dy));
    let what = describe(&spec, &inputs, &fade, case.causal, "backward");
    for form in [Form::Direct, Form::State] {
        let plan = Plan::new(&device(), &spec).unwrap().with_form(form).with_chunk(64);
        let got = gradients::<bf16>(&plan, &inputs, &fade, case.causal, &dy);
        let what = format!("{what}, {form:?}");
        let [of_tensors, of_decays] = [0..3, 3..5].map(|which| {
            let only = |all: &[Vec<f64>; 5]| {
                std::array::from_fn(|i| if which.contains(&i) { all[i].clone() } else { vec![] })
            };
            [only(&got), only(&want)]
        });
        let keys = case.tokens[1];
        assert_gradients(&what, &of_tensors[0], &of_tensors[1], keys, ALLOWED);
        assert_gradients(&what, &of_decays[0], &of_decays[1], keys, OF_DECAYS * ALLOWED);
        let again = gradients::<bf16>(&plan, &inputs, &fade, case.causal, &dy);
        assert_eq!(bits(&got), bits(&again), "{what}, {form:?}: another run differs");
    }
}

const NEAR: [(Near, usize, usize); 6] = [
    (Near::None, 64, 0),
    (Near::None, 16, 5),
    (Near::Blocks(0), 16, 0),
    (Near::Blocks(1), 64, 4),
    (Near::Blocks(2), 24, 70),
    (Near::Blocks(1 << 20), 64, 0),
];

fn kind(rng: &mut StdRng) -> (Series, usize, f64, [usize; 2]) {
    let power = |exponent| Series::Power { exponent, floor: 0.1 };
    let mut all = vec![
        (Series::Taylor, 3, 1.0, [32, 32]),
        (Series::Taylor, 4, 0.2, [32, 32]),
        (Series::Taylor, 3, 1.0, [64, 64]),
        (Series::Taylor, 2, 0.1, [24, 40]),
        (power(4), 3, 1.0, [40, 8]),
        (Series::Fixed { coefficients: vec![0.7, 0.0, 0.3] }, 3, 1.0, [8, 56]),
    ];
    all.swap_remove(rng.random_range(0..all.len()))
}

#[test]
fn causal_gradients_are_the_oracles() {
    let mut rng = rng();
    for near in NEAR {
        for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
            for tokens in [1, 15, 17, 63, 64, 65, 129, 193] {
                if rng.random_bool(0.12) {
                    let (series, terms, gain, dims) = kind(&mut rng);
                    let tokens = [tokens; 2];
                    let case =
                        Case { series, terms, gain, dims, near, decay, tokens, causal: true };
                    check(&mut rng, case);
                }
            }
        }
    }
}

#[test]
fn full_gradients_are_the_oracles() {
    let mut rng = rng();
    for near in [(Near::None, 64, 0), (Near::None, 16, 5)] {
        for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
            for tokens in [[1, 1], [1, 70], [33, 5], [64, 65], [130, 129]] {
                if rng.random_bool(0.25) {
                    let (series, terms, gain, dims) = kind(&mut rng);
                    let case =
                        Case { series, terms, gain, dims, near, decay, tokens, causal: false };
                    check(&mut rng, case);
                }
            }
        }
    }
}

/// Queries and keys without norms: what is rounded of weights for dq is multiplied by keys of up to 30. A block before a
/// query's own is near, since x² beside a single key leaves denominators that rounding changes much.
#[test]
fn logits_of_any_size_and_gates() {
    let device = device();
    let mut rng = rng();
    let sizes = Sizes { kv_heads: 2, ..Sizes::self_attention(150, 32, 32) };
    for (series, terms, near, block) in
        [(Series::Taylor, 1, Near::Blocks(1 << 20), 64), (Series::power(2), 3, Near::Blocks(1), 16)]
    {
        for fade in [Fade::gates(sizes, 0.0), Fade::closing(&mut rng, sizes)] {
            for logits in [-150.0, 150.0, 0.0] {
                let inputs = Inputs::<bf16>::new(&mut rng, sizes).logits(logits);
                let spec = spec(sizes, &series, terms).near(near).block(block);
                let spec = spec.decay(Decay::Gates).build().unwrap();
                let dy: Vec<bf16> = normal(&mut rng, sizes.y().iter().product());
                let want = truth(&spec, &inputs.to::<f32>(), &fade, true, &f64s(&dy));
                for form in [Form::Direct, Form::State] {
                    let plan = Plan::new(&device, &spec).unwrap().with_form(form).with_chunk(64);
                    let got = gradients::<bf16>(&plan, &inputs, &fade, true, &dy);
                    let what = describe(&spec, &inputs, &fade, true, "backward");
                    assert_gradients(&format!("{what}, {form:?}"), &got, &want, 150, 8.0 * ALLOWED);
                }
            }
        }
    }
}

/// Through sums of the matrix units.
#[test]
fn sums_of_matrix_units() {
    let device = device();
    let long = !device.is_emulated();
    let mut rng = rng();
    let fixed = Series::Fixed { coefficients: vec![0.7, 0.0, 0.3] };
    let mut wrong = 0;
    let allowed = [1.0, 1.0, 1.0, OF_DECAYS, OF_DECAYS].map(|factor| factor * ALLOWED);
    for (i, (dims, series, terms, gain)) in [
        ([16, 16], Series::Taylor, 4, 0.3),
        ([24, 8], fixed, 3, 1.0),
        ([32, 32], Series::Taylor, 4, 0.3),
        ([32, 32], Series::Taylor, 3, 1.0),
        ([16, 24], Series::Taylor, 3, 1.0),
        ([40, 16], Series::Taylor, 2, 0.1),
        ([64, 64], Series::Taylor, 4, 0.3),
    ]
    .into_iter()
    .enumerate()
    {
        for (j, (near, block, sinks, decay, group, tokens)) in [
            (Near::None, 64, 0, Decay::None, 1, 140),
            (Near::Blocks(1), 64, 4, Decay::Gates, 2, 197),
            (Near::None, 64, 0, Decay::Slopes, 1, 130),
            (Near::Blocks(0), 16, 0, Decay::None, 3, 100),
        ]
        .into_iter()
        .enumerate()
        {
            // A few of them where that takes long.
            if !long && ((i + j) % 4 != 0 || i == 2 || i > 3) {
                continue;
            }
            let sizes = Sizes {
                batch: 2,
                kv_heads: if long { 8 } else { 1 },
                group,
                queries: tokens,
                keys: tokens,
                d_key: dims[0],
                d_value: dims[1],
            };
            let inputs = Inputs::<f32>::new(&mut rng, sizes).gain(gain);
            let inputs = if group == 2 { inputs.masked(&mut rng) } else { inputs };
            let inputs = inputs.to::<bf16>();
            let fade = Fade::new(&mut rng, decay, sizes);
            let spec = spec(sizes, &series, terms).near(near).block(block).sinks(sinks);
            let spec = spec.decay(decay).build().unwrap();
            let dy: Vec<bf16> = normal(&mut rng, sizes.y().iter().product());
            let want = truth(&spec, &inputs.to::<f32>(), &fade, true, &f64s(&dy));
            let plan = Plan::new(&device, &spec).unwrap().with_form(Form::State).with_chunk(64);
            let got = gradients::<bf16>(&plan, &inputs, &fade, true, &dy);
            let errors: Vec<f64> = got
                .iter()
                .zip(&want)
                .map(|(got, want)| {
                    let size = rms(want.iter().copied());
                    rms(got.iter().zip(want).map(|(g, w)| g - w)) / size.max(1e-30)
                })
                .collect();
            let again = gradients::<bf16>(&plan, &inputs, &fade, true, &dy);
            let what = describe(&spec, &inputs, &fade, true, "through sums");
            let same = bits(&got) == bits(&again);
            eprintln!("{errors:?} {same} {what}");
            if !same || !errors.iter().zip(allowed).all(|(&error, most)| error < most) {
                wrong += 1;
            }
        }
    }
    assert_eq!(wrong, 0, "cases are wrong");
}
