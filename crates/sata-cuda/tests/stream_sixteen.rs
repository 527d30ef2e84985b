//! The kernels of keys of 16 and order 3 that walk over a sequence with its sums in registers, on Hopper's matrix units, against the
//! oracle: on a GPU that has them, or else emulated.

#[path = "../../sata/tests/common/mod.rs"]
mod common;
mod gpu;

use common::{Fade, Inputs, Sizes, rng};
use gpu::one_pass::{check_lengths, check_own as check};
use gpu::{hopper, one_pass};
use half::bf16;
use sata::{Decay, Near, Series, Spec};

fn sizes(tokens: usize) -> Sizes {
    one_pass::sizes(tokens, 16)
}

#[test]
fn orders() {
    let device = hopper();
    let mut rng = rng();
    let fixed = |a: &[f64]| Series::Fixed { coefficients: a.to_vec() };
    for series in [Series::Taylor, fixed(&[1.0, 0.0, 0.0, 0.2])] {
        let inputs = Inputs::<bf16>::new(&mut rng, sizes(400)).gain(0.5);
        let mut spec = Spec::new(16, 16).series(series.clone());
        if series == Series::Taylor {
            spec = spec.terms(4);
        }
        check(&device, spec, &inputs, &Fade::None, 128);
    }
}

#[test]
fn lengths_around_pieces_chunks_and_segments() {
    check_lengths(&hopper(), 16, 4);
}

#[test]
fn near_decay_groups() {
    let device = hopper();
    let mut rng = rng();
    for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
        for (near, block, segment) in [
            (Near::None, 64, 256),
            (Near::Blocks(1), 64, 128),
            (Near::Blocks(2), 192, 256),
            (Near::Blocks(0), 256, 128),
        ] {
            let s = Sizes { batch: 2, group: 3, ..sizes(530) };
            let inputs = Inputs::<bf16>::new(&mut rng, s).gain(0.5);
            let fade = Fade::new(&mut rng, decay, s);
            let spec = Spec::new(16, 16).terms(4).near(near).block(block);
            check(&device, spec, &inputs, &fade, segment);
        }
    }
}

#[test]
fn large_logits_near_do_not_overflow() {
    let device = hopper();
    let mut rng = rng();
    // Logits of about ±80.
    let inputs = Inputs::<bf16>::new(&mut rng, sizes(300)).gain(17.0);
    let spec = Spec::new(16, 16).terms(4).near(Near::Blocks(4));
    check(&device, spec, &inputs, &Fade::None, 128);
}

/// As in tests of wide heads: rows whose near logits are all far below 0, or have faded, beside what is far
/// and has faded to nothing. Of order 3 there is so little that weights are positive at any of these logits.
#[test]
fn logits_of_any_size_and_gates() {
    let device = hopper();
    let mut rng = rng();
    let s = sizes(230);
    let series = Series::Fixed { coefficients: vec![1.0, 0.0, 0.5, 1e-5] };
    for (near, block) in [(1, 64), (0, 64), (0, 128)] {
        for fade in
            [Fade::None, Fade::gates(s, 0.0), Fade::closing(&mut rng, s), Fade::gates(s, -40.0)]
        {
            for logits in [-150.0, 150.0, 0.0] {
                let inputs = Inputs::<bf16>::new(&mut rng, s).logits(logits);
                let spec = Spec::new(16, 16).series(series.clone());
                check(&device, spec.near(Near::Blocks(near)).block(block), &inputs, &fade, 128);
            }
        }
    }
}
