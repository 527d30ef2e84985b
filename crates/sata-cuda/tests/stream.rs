//! The kernels that walk over a sequence with its sums in registers, against the oracle.

#[path = "../../sata/tests/common/mod.rs"]
mod common;
mod gpu;

use common::{Fade, Inputs, Sizes, rng};
use gpu::device;
use gpu::one_pass::{check, sizes};
use half::bf16;
use sata::{Decay, Near, Series, Spec};

#[test]
fn gates_that_close() {
    let device = device();
    let mut rng = rng();
    for near in [Near::None, Near::Blocks(1)] {
        for d in [8, 16] {
            let s = sizes(203, d);
            let inputs = Inputs::<bf16>::new(&mut rng, s).gain(0.5);
            let fade = Fade::closing(&mut rng, s);
            check(&device, Spec::new(d, d).terms(3).near(near).block(16), &inputs, &fade, 64);
        }
    }
}

/// As in tests of wide heads: rows whose near logits are all far below 0, or have faded, beside what is
/// far and has faded to nothing.
#[test]
fn logits_of_any_size_and_gates() {
    let device = device();
    let mut rng = rng();
    for (d, terms, series, near, block) in [
        (8, 3, Series::power(2), Near::Blocks(0), 16),
        (8, 3, Series::Taylor, Near::Blocks(1), 32),
        (16, 3, Series::power(2), Near::Blocks(0), 16),
    ] {
        let s = sizes(150, d);
        for fade in
            [Fade::None, Fade::gates(s, 0.0), Fade::closing(&mut rng, s), Fade::gates(s, -9e3)]
        {
            for logits in [-150.0, 150.0, 0.0] {
                let inputs = Inputs::<bf16>::new(&mut rng, s).logits(logits);
                let spec = Spec::new(d, d).terms(terms).series(series.clone());
                check(&device, spec.near(near).block(block), &inputs, &fade, 64);
            }
        }
    }
}

#[test]
fn head_sizes_and_terms() {
    let device = device();
    let mut rng = rng();
    for (d_key, d_value, all) in
        [(8, 8, 1..=5), (16, 16, 3..=5), (8, 16, 2..=2), (16, 8, 3..=3), (16, 24, 2..=2)]
    {
        for terms in all {
            let s = Sizes { d_value, ..sizes(150, d_key) };
            let inputs = Inputs::<bf16>::new(&mut rng, s).gain(0.5);
            check(&device, Spec::new(d_key, d_value).terms(terms), &inputs, &Fade::None, 64);
        }
    }
}

#[test]
fn lengths_around_tiles_chunks_and_segments() {
    let device = device();
    let mut rng = rng();
    for tokens in [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 160, 161, 255, 256, 257] {
        for near in [Near::None, Near::Blocks(0), Near::Blocks(1)] {
            for d in [8, 16] {
                let inputs =
                    Inputs::<bf16>::new(&mut rng, Sizes { kv_heads: 1, ..sizes(tokens, d) });
                let spec = Spec::new(d, d).terms(3).near(near).block(32);
                check(&device, spec, &inputs, &Fade::None, 128);
            }
        }
    }
}

#[test]
fn orders_near_decay_groups() {
    let device = device();
    let mut rng = rng();
    let fixed = |a: &[f64]| Series::Fixed { coefficients: a.to_vec() };
    for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
        for (d, series, near, block) in [
            (8, Series::Taylor, Near::None, 64),
            (8, Series::Taylor, Near::Blocks(0), 16),
            (16, Series::Taylor, Near::Blocks(1), 64),
            (8, Series::Taylor, Near::Blocks(2), 48),
            (16, Series::power(2), Near::Blocks(1), 112),
            (8, Series::power(4), Near::Blocks(1), 64),
            (16, Series::Power { exponent: 2, floor: 0.0 }, Near::None, 64),
            (8, fixed(&[0.5, 0.0, 0.3]), Near::Blocks(1), 32),
        ] {
            let s = Sizes { batch: 2, group: 3, ..sizes(300, d) };
            let inputs = Inputs::<bf16>::new(&mut rng, s);
            let fade = Fade::new(&mut rng, decay, s);
            let mut spec = Spec::new(d, d).series(series.clone());
            if series == Series::Taylor {
                spec = spec.terms(3);
            }
            check(&device, spec.near(near).block(block), &inputs, &fade, 128);
        }
    }
}

#[test]
fn large_logits_near_do_not_overflow() {
    let device = device();
    let mut rng = rng();
    for d in [8, 16] {
        // Logits of about ±80.
        let inputs = Inputs::<bf16>::new(&mut rng, sizes(200, d)).gain(17.0);
        let spec = Spec::new(d, d).terms(3).near(Near::Blocks(4));
        check(&device, spec, &inputs, &Fade::None, 128);
    }
}
