//! The kernels of keys of 32 that walk over a sequence with its sums in registers, on Hopper's matrix units, against the
//! oracle: on a GPU that has them, or else emulated.

#[path = "../../sata/tests/common/mod.rs"]
mod common;
mod gpu;

use common::{Fade, Inputs, Sizes, f64s, normal, rng};
use gpu::hopper;
use gpu::one_pass::{check_lengths, check_own as check, sizes};
use half::bf16;
use sata::{Decay, Near, Series, Spec};
use sata_cuda::{Buffer, Call, Plan, View, ViewMut};

#[test]
fn values_and_terms() {
    let device = hopper();
    let mut rng = rng();
    for (d_value, all) in [(32, 1..=3), (8, 3..=3), (16, 2..=2), (24, 3..=3)] {
        for terms in all {
            let s = Sizes { d_value, ..sizes(400, 32) };
            let inputs = Inputs::<bf16>::new(&mut rng, s).gain(0.5);
            check(&device, Spec::new(32, d_value).terms(terms), &inputs, &Fade::None, 128);
        }
    }
}

#[test]
fn lengths_around_pieces_chunks_and_segments() {
    check_lengths(&hopper(), 32, 3);
}

#[test]
fn orders_near_decay_groups() {
    let device = hopper();
    let mut rng = rng();
    let fixed = |a: &[f64]| Series::Fixed { coefficients: a.to_vec() };
    for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
        for (series, near, block) in [
            (Series::Taylor, Near::None, 64),
            (Series::Taylor, Near::Blocks(1), 64),
            (Series::Taylor, Near::Blocks(2), 192),
            (Series::power(2), Near::None, 64),
            (Series::power(2), Near::Blocks(0), 256),
            (Series::Power { exponent: 2, floor: 0.0 }, Near::Blocks(1), 128),
            (fixed(&[0.5, 0.0, 0.3]), Near::Blocks(3), 64),
        ] {
            let s = Sizes { batch: 2, group: 3, ..sizes(530, 32) };
            let inputs = Inputs::<bf16>::new(&mut rng, s);
            let fade = Fade::new(&mut rng, decay, s);
            let mut spec = Spec::new(32, 32).series(series.clone());
            if series == Series::Taylor {
                spec = spec.terms(3);
            }
            check(&device, spec.near(near).block(block), &inputs, &fade, 128);
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
    check(&device, spec, &inputs, &Fade::None, 128);
}

/// As in tests of wide heads of other kernels: rows whose near logits are all far below 0, or have faded,
/// beside what is far and has faded to nothing.
#[test]
fn logits_of_any_size_and_gates() {
    let device = hopper();
    let mut rng = rng();
    let s = sizes(230, 32);
    for (series, near, block) in [
        (Series::Taylor, Near::Blocks(1), 64),
        (Series::power(2), Near::Blocks(0), 64),
        (Series::Taylor, Near::Blocks(0), 128),
    ] {
        for fade in
            [Fade::None, Fade::gates(s, 0.0), Fade::closing(&mut rng, s), Fade::gates(s, -40.0)]
        {
            for logits in [-150.0, 150.0, 0.0] {
                let inputs = Inputs::<bf16>::new(&mut rng, s).logits(logits);
                let spec = Spec::new(32, 32).terms(3).series(series.clone());
                check(&device, spec.near(near).block(block), &inputs, &fade, 128);
            }
        }
    }
}

/// Sequences side by side, token by token, have exactly the outputs that each has alone.
#[test]
fn packed_sequences() {
    let device = hopper();
    let mut rng = rng();
    let (heads, d, cu) = (2, 32, [0, 200, 200, 205, 475]);
    let spec = Spec::new(d, d).terms(3).decay(Decay::Gates).build().unwrap();
    let plan = Plan::new(&device, &spec).unwrap().with_chunk(128);
    let total = cu[4];
    let [q, k, v] = [(); 3].map(|()| normal::<bf16>(&mut rng, total * heads * d));
    let gates: Vec<f32> = normal::<f32>(&mut rng, total * heads).iter().map(|g| -g.abs()).collect();
    let run = |from: usize, n: usize, packed: bool| {
        let [q, k, v] = [&q, &k, &v].map(|x| {
            Buffer::from_slice(&device, &x[from * heads * d..(from + n) * heads * d]).unwrap()
        });
        let gates = Buffer::from_slice(&device, &gates[from * heads..(from + n) * heads]).unwrap();
        let (shape, strides) = ([1, heads, n, d], [n * heads * d, d, heads * d]);
        let view = |x| View::strided(x, shape, strides).unwrap();
        let gates = View::strided(&gates, [1, heads, n, 1], [n * heads, 1, heads]).unwrap();
        let call = Call::causal(view(&q), view(&k), view(&v)).log_gates(gates);
        let call = if packed { call.packed(&cu, &cu) } else { call };
        let mut y = Buffer::<bf16>::zeroed(&device, n * heads * d).unwrap();
        plan.run(call, ViewMut::strided(&mut y, shape, strides).unwrap()).unwrap();
        f64s(&y.to_vec().unwrap())
    };
    let together = run(0, total, true);
    for ends in cu.windows(2).filter(|ends| ends[0] < ends[1]) {
        let alone = run(ends[0], ends[1] - ends[0], false);
        assert!(alone.iter().all(|x| x.is_finite()) && alone.iter().any(|&x| x != 0.0));
        assert_eq!(together[ends[0] * heads * d..][..alone.len()], alone[..], "from {}", ends[0]);
    }
}
