//! The kernels for Hopper's matrix units against the oracle: on a GPU that has them; elsewhere some
//! of it on the emulator.

#[path = "../../sata/tests/common/mod.rs"]
mod common;
mod gpu;

use common::truth::truth;
use common::{Fade, Inputs, Sizes, rng};
use gpu::{ALLOWED, OnDevice, blank, error, feed, hopper, run};
use half::bf16;
use sata::{Decay, Form, Near, Series, Spec, SpecBuilder};
use sata_cuda::{Device, Error, Plan, State};

/// All of them on a GPU, the first few where it is emulated.
fn some<T: Clone>(device: &Device, all: &[T], few: usize) -> Vec<T> {
    all[..if device.is_emulated() { few } else { all.len() }].to_vec()
}

fn check(
    device: &Device,
    spec: SpecBuilder,
    inputs: &Inputs<bf16>,
    fade: &Fade,
    causal: bool,
    chunk: usize,
) {
    let spec = spec.decay(fade.decay()).build().unwrap();
    let truth = truth(&spec, inputs, fade, causal);
    for form in [Form::State, Form::Direct] {
        if form == Form::Direct && !causal {
            continue;
        }
        let plan = Plan::new(device, &spec).unwrap().with_form(form).with_chunk(chunk);
        let (y, _) = run(&plan, inputs, fade, causal);
        let error = error(&y, &truth);
        let what = format!("{spec:?} {:?} causal={causal} {form:?} chunk={chunk}", inputs.sizes);
        eprintln!("{error:.2e} {what}");
        assert!(error < ALLOWED, "{error:e}: {what}");
        let (again, _) = run(&plan, inputs, fade, causal);
        let bits = |y: &[bf16]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
        assert!(bits(&y) == bits(&again), "two runs differ: {what}");
    }
}

fn sizes(tokens: usize, d: usize) -> Sizes {
    Sizes { kv_heads: 2, ..Sizes::self_attention(tokens, d, d) }
}

#[test]
fn gates_that_close() {
    let device = hopper();
    let mut rng = rng();
    for near in [Near::None, Near::Blocks(1)] {
        let s = sizes(203, 32);
        let inputs = Inputs::<bf16>::new(&mut rng, s).gain(0.5);
        let fade = Fade::closing(&mut rng, s);
        check(&device, Spec::new(32, 32).terms(3).near(near).block(16), &inputs, &fade, true, 64);
    }
}

#[test]
fn head_sizes_and_terms() {
    let device = hopper();
    let mut rng = rng();
    let tokens = if device.is_emulated() { 200 } else { 500 };
    for d in some(&device, &[16, 32, 8, 24, 40, 64], 2) {
        for terms in some(&device, &[3, 4, 1, 2], 2) {
            let inputs = Inputs::<bf16>::new(&mut rng, sizes(tokens, d)).gain(0.5);
            for causal in [true, false] {
                let spec = Spec::new(d, d).terms(terms);
                check(&device, spec, &inputs, &Fade::None, causal, 128);
            }
        }
    }
    for (d_key, d_value) in some(&device, &[(16, 5), (8, 17), (16, 40), (32, 7), (64, 71)], 2) {
        let s = Sizes { d_value, ..sizes(tokens, d_key) };
        let inputs = Inputs::<bf16>::new(&mut rng, s).gain(0.5);
        let spec = Spec::new(d_key, d_value).terms(3);
        check(&device, spec, &inputs, &Fade::None, true, 128);
    }
}

#[test]
fn lengths_around_tiles_rows_and_chunks() {
    let device = hopper();
    let mut rng = rng();
    let all = [65, 385, 449, 64, 127, 128, 129, 383, 384, 447, 448, 768, 769, 1000];
    for tokens in some(&device, &all, 3) {
        for near in [Near::None, Near::Blocks(1)] {
            let inputs = Inputs::<bf16>::new(&mut rng, sizes(tokens, 16));
            let spec = Spec::new(16, 16).terms(3).near(near);
            check(&device, spec, &inputs, &Fade::None, true, 192);
        }
    }
}

#[test]
fn orders_near_sinks_decay_masks_groups() {
    let device = hopper();
    let mut rng = rng();
    let fixed = |a: &[f64]| Series::Fixed { coefficients: a.to_vec() };
    for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
        for (series, near, block, sinks) in [
            (Series::Taylor, Near::None, 64, 0),
            (Series::Taylor, Near::Blocks(0), 64, 0),
            (Series::Taylor, Near::Blocks(1), 64, 4),
            (Series::Taylor, Near::Blocks(2), 48, 70),
            (Series::power(2), Near::Blocks(1), 100, 1),
            (Series::Power { exponent: 2, floor: 0.0 }, Near::None, 64, 0),
            (fixed(&[0.5, 0.0, 0.3]), Near::Blocks(1), 32, 0),
        ] {
            let s = match device.is_emulated() {
                true => Sizes { batch: 2, kv_heads: 1, group: 2, ..sizes(450, 16) },
                false => Sizes { batch: 2, group: 3, ..sizes(700, 32) },
            };
            let inputs = Inputs::<bf16>::new(&mut rng, s).masked(&mut rng);
            let fade = Fade::new(&mut rng, decay, s);
            let mut spec = Spec::new(s.d_key, s.d_value).series(series.clone());
            if series == Series::Taylor {
                spec = spec.terms(3);
            }
            let spec = spec.near(near).block(block).sinks(sinks);
            check(&device, spec, &inputs, &fade, true, 128);
        }
    }
}

/// Queries to which nothing but what has faded far below the smallest f32 is left, in a tile of keys that ends hidden.
#[test]
fn hidden_stretches_that_fade() {
    let device = hopper();
    let mut rng = rng();
    let s = Sizes { batch: 2, ..sizes(330, 16) };
    for (near, sinks) in [(Near::None, 0), (Near::None, 40), (Near::Blocks(0), 3)] {
        let mut inputs = Inputs::<bf16>::new(&mut rng, s).gain(0.5);
        let hidden = |i: usize| (149..290).contains(&i) || i % 5 == 4;
        inputs.mask = Some((0..2 * s.keys).map(|i| !hidden(i % s.keys)).collect());
        let log_gates = (0..4 * s.keys).map(|i| -0.25 * (1 + i / s.keys) as f32).collect();
        for fade in [Fade::Slopes(vec![1.0, 0.4]), Fade::Gates { keys: s.keys, log_gates }] {
            let spec = Spec::new(16, 16).terms(3).near(near).sinks(sinks);
            check(&device, spec, &inputs, &fade, true, 128);
        }
    }
}

#[test]
fn any_split_with_a_state_is_one_call() {
    let device = hopper();
    let mut rng = rng();
    for decay in [Decay::None, Decay::Gates] {
        let settings = [(Near::Blocks(1), 5, 64), (Near::None, 0, 64), (Near::Blocks(1), 0, 80)];
        for (near, sinks, block) in some(&device, &settings, 1) {
            let s = Sizes { batch: 2, ..sizes(900, 16) };
            let inputs = Inputs::<bf16>::new(&mut rng, s);
            let fade = Fade::new(&mut rng, decay, s);
            let spec = Spec::new(16, 16).terms(3).near(near).sinks(sinks).block(block);
            let spec = spec.decay(decay).build().unwrap();
            let truth = truth(&spec, &inputs, &fade, true);
            let plan = Plan::new(&device, &spec).unwrap().with_form(Form::State).with_chunk(128);
            let there = OnDevice::new(&device, &inputs, &fade);
            let cuts = [vec![0, 64, 65, 400, 411, 900], vec![0, 900], vec![0, 100, 300, 900]];
            for cuts in some(&device, &cuts, 1) {
                let mut state = State::new(&plan, s.batch, s.kv_heads).unwrap();
                let mut y = blank::<bf16>(&device, s);
                for cut in cuts.windows(2) {
                    feed(&plan, &mut state, &there, cut[0]..cut[1], &mut y);
                }
                let error = error(&y.to_vec().unwrap(), &truth);
                eprintln!("{error:.2e} {spec:?} {cuts:?}");
                assert!(error < ALLOWED, "{error:e}: {spec:?} {cuts:?}");
                assert_eq!(state.position(0).unwrap(), 900);
            }
        }
    }
}

/// As many heads as make the summing kernel go through each from its beginning, and more.
#[test]
fn many_heads_and_chunks() {
    let device = hopper();
    let mut rng = rng();
    let all = [(32, 3, 40), (8, 4, 100), (16, 4, 100), (32, 4, 11), (64, 3, 13)];
    for (d, terms, kv_heads) in some(&device, &all, 1) {
        let kv_heads = if device.is_emulated() { 3 } else { kv_heads };
        for (decay, near) in [
            (Decay::None, Near::None),
            (Decay::Gates, Near::Blocks(1)),
            (Decay::Slopes, Near::None),
        ] {
            let s = Sizes { batch: 2, kv_heads, ..Sizes::self_attention(450, d, d) };
            let inputs = Inputs::<bf16>::new(&mut rng, s).gain(0.5);
            let fade = Fade::new(&mut rng, decay, s);
            check(&device, Spec::new(d, d).terms(terms).near(near), &inputs, &fade, true, 64);
        }
    }
}

#[test]
fn large_logits_near_do_not_overflow() {
    let device = hopper();
    let mut rng = rng();
    // Logits of about ±80.
    let inputs = Inputs::<bf16>::new(&mut rng, sizes(300, 32)).gain(17.0);
    let spec = Spec::new(32, 32).terms(3).near(Near::Blocks(4));
    check(&device, spec, &inputs, &Fade::None, true, 128);
}

/// Queries and keys without norms, as training makes them: logits of hundreds, of either sign, whose
/// largest in a row may be far below 0, or may have faded away, beside gates from open to closed.
#[test]
fn logits_of_any_size_and_gates() {
    let device = hopper();
    let mut rng = rng();
    let s = sizes(150, 32);
    for (terms, series, near, block) in [
        (1, Series::Taylor, Near::Blocks(1 << 20), 64),
        (3, Series::power(2), Near::Blocks(0), 16),
        (3, Series::Taylor, Near::Blocks(1), 32),
    ] {
        for fade in
            [Fade::None, Fade::gates(s, 0.0), Fade::closing(&mut rng, s), Fade::gates(s, -40.0)]
        {
            for logits in [-150.0, 150.0, 0.0] {
                let inputs = Inputs::<bf16>::new(&mut rng, s).logits(logits);
                let spec = Spec::new(32, 32).terms(terms).series(series.clone());
                check(&device, spec.near(near).block(block), &inputs, &fade, true, 64);
            }
        }
    }
}

/// Without a GPU, where there is a compiler for one: calls of bf16 choose these kernels, and they
/// compile, without spilling registers.
#[test]
fn calls_compile_for_hopper_without_spills() {
    let target = match sata_cuda::offline::Target::h100() {
        Ok(target) => target,
        Err(Error::NoCompiler { .. }) => {
            eprintln!("no compiler of device code here: nothing was compiled");
            return;
        }
        Err(other) => panic!("{other}"),
    };
    let device = target.device();
    let mut rng = rng();
    for d in [8, 16, 32, 64] {
        // Few heads, whose chunks are summed apart, and enough to go through each from its beginning.
        for (decay, kv_heads) in
            [(Decay::None, 1), (Decay::None, 1024 / d), (Decay::Gates, 1024 / d)]
        {
            let inputs = Inputs::<bf16>::new(&mut rng, Sizes { kv_heads, ..sizes(1000, d) });
            let fade = Fade::new(&mut rng, decay, inputs.sizes);
            let spec = Spec::new(d, d).terms(4).near(Near::Blocks(1)).decay(decay).build().unwrap();
            let plan = Plan::new(&device, &spec).unwrap().with_form(Form::State).with_chunk(64);
            run(&plan, &inputs, &fade, true);
        }
    }
    let compiled = target.compiled();
    let of = |file: &str| compiled.iter().filter(|c| c.unit.file() == file).count();
    for file in [
        "stream_sums.cu",
        "stream_read.cu",
        "hopper_prepare.cu",
        "hopper_sums.cu",
        "hopper_scan.cu",
        "hopper_read.cu",
    ] {
        assert!(of(file) > 0, "no call chose {file}");
    }
    for compilation in compiled.iter().filter(|compilation| compilation.unit.is_hot()) {
        for kernel in &compilation.kernels {
            let title = compilation.unit.title();
            assert_eq!(kernel.spill_stores, 0, "{}: {title}", kernel.name);
        }
    }
}
