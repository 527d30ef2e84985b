//! The backward kernels for small heads of bf16, which walk with their sums, against the oracle's
//! gradients of the rounded numbers.

#[path = "../../sata/tests/common/mod.rs"]
mod common;
mod gpu;
mod gradients;

use common::calls::spec;
use common::check::describe;
use common::gradients::{rms, truth};
use common::{Fade, Inputs, Sizes, f64s, normal, rng};
use gpu::device;
use gradients::{bits, gradients};
use half::bf16;
use rand::rngs::StdRng;
use sata::{Decay, Near, Series};
use sata_cuda::{Buffer, Call, Gradients, Plan, View, ViewMut};

/// What bf16 features, sums and gradients leave of dq, dk and dv, and of gradients by gates, which are
/// sums that nearly cancel. Slopes' are sums of those times places.
const ALLOWED: [f64; 5] = [1.5e-2, 1.5e-2, 1e-2, 4e-2, 4e-2];
const OF_SLOPES: f64 = 5e-4;

struct Case {
    series: Series,
    terms: usize,
    near: Near,
    block: usize,
    decay: Decay,
    sizes: Sizes,
    /// Tokens between cuts.
    chunk: usize,
}

fn case(tokens: usize, dims: [usize; 2]) -> Case {
    let sizes = Sizes { kv_heads: 2, ..Sizes::self_attention(tokens, dims[0], dims[1]) };
    Case {
        series: Series::Taylor,
        terms: 4,
        near: Near::None,
        block: 64,
        decay: Decay::None,
        sizes,
        chunk: 1 << 20,
    }
}

fn check(rng: &mut StdRng, case: &Case) {
    let fade = Fade::new(rng, case.decay, case.sizes);
    check_fading(rng, case, &fade);
}

fn check_fading(rng: &mut StdRng, case: &Case, fade: &Fade) {
    let Case { sizes, .. } = *case;
    // An even number of terms is 0 at logits of −1.6, where denominators magnify what rounding left:
    // five deviations from here.
    let gain = if case.terms.is_multiple_of(2) { 0.3 } else { 0.5 };
    let inputs = Inputs::<f32>::new(rng, sizes).gain(gain).to::<bf16>();
    let spec = spec(sizes, &case.series, case.terms)
        .near(case.near)
        .block(case.block)
        .decay(case.decay)
        .build()
        .unwrap();
    let dy = normal::<bf16>(rng, sizes.y().iter().product());
    let want = truth(&spec, &inputs.to::<f32>(), fade, true, &f64s(&dy));
    let plan = Plan::new(&device(), &spec).unwrap().with_chunk(case.chunk);
    let got = gradients::<bf16>(&plan, &inputs, fade, true, &dy);
    let what = describe(&spec, &inputs, fade, true, "backward");
    let what = format!("{what}, cut every {}", case.chunk);
    let names = ["dq", "dk", "dv", "dlog_gates", "dslopes"];
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let name = names[i];
        assert_eq!(got.len(), want.len(), "{name}: {what}");
        let error = rms(got.iter().zip(want).map(|(g, w)| g - w));
        let size = rms(want.iter().copied());
        let of_slopes = if i == 4 { OF_SLOPES * (sizes.queries as f64).powf(1.5) } else { 0.0 };
        assert!(
            error <= ALLOWED[i] * size + of_slopes,
            "{name} is off by {error:e}, of {size:e}: {what}"
        );
    }
    let again = gradients::<bf16>(&plan, &inputs, fade, true, &dy);
    assert_eq!(bits(&got), bits(&again), "another run differs: {what}");
    // The kernels for all else give something else: these are not those.
    let generic = Plan::new(&device(), &spec).unwrap().without_matrix_units();
    let generic = gradients::<bf16>(&generic, &inputs, fade, true, &dy);
    assert_ne!(bits(&got), bits(&generic), "not computed by matrix units: {what}");
}

#[test]
fn keys_of_eight() {
    let mut rng = rng();
    for (tokens, chunk) in [(20, 64), (64, 64), (65, 64), (200, 64), (300, 128)] {
        check(&mut rng, &Case { chunk, ..case(tokens, [8, 8]) });
    }
}

#[test]
fn keys_of_sixteen() {
    let mut rng = rng();
    for (tokens, chunk) in [(127, 128), (260, 128)] {
        check(&mut rng, &Case { chunk, ..case(tokens, [16, 16]) });
    }
}

#[test]
fn decays() {
    let mut rng = rng();
    for decay in [Decay::Slopes, Decay::Gates] {
        check(&mut rng, &Case { decay, chunk: 64, ..case(150, [8, 8]) });
        check(&mut rng, &Case { decay, chunk: 128, ..case(150, [16, 16]) });
    }
}

#[test]
fn gates_that_close() {
    let mut rng = rng();
    for near in [Near::None, Near::Blocks(1)] {
        for (tokens, d, chunk) in [(150, 8, 64), (200, 16, 128)] {
            let decay = Decay::Gates;
            let case = Case { terms: 3, near, decay, chunk, ..case(tokens, [d, d]) };
            let fade = Fade::closing(&mut rng, case.sizes);
            check_fading(&mut rng, &case, &fade);
        }
    }
}

/// Rows whose near logits are all far below 0, or have faded, beside what is far and has faded, wherever
/// cuts, chunks and blocks are. What is rounded of weights for dq is multiplied by keys of up to 30.
#[test]
fn logits_of_any_size_and_gates() {
    let device = device();
    let mut rng = rng();
    for (d, tokens, chunk, near, block) in [
        (8, 200, 64, Near::Blocks(1), 32),
        (8, 330, 64, Near::Blocks(2), 48),
        (8, 330, 128, Near::Blocks(1), 64),
        (8, 330, 1 << 20, Near::Blocks(0), 16),
        (8, 200, 64, Near::None, 64),
        (16, 400, 128, Near::Blocks(1), 64),
    ] {
        let sizes = Sizes { group: 2, ..Sizes::self_attention(tokens, d, d) };
        let closing = Fade::closing(&mut rng, sizes);
        let same = [0.0, -1.0, -2.5, -40.0].map(|log_gate| Fade::gates(sizes, log_gate));
        for fade in same.into_iter().chain([closing]) {
            for logits in [-150.0, 150.0, 0.0] {
                let inputs = Inputs::<bf16>::new(&mut rng, sizes).logits(logits);
                let spec = spec(sizes, &Series::Taylor, 3).near(near).block(block);
                let spec = spec.decay(Decay::Gates).build().unwrap();
                let dy: Vec<bf16> = normal(&mut rng, sizes.y().iter().product());
                let want = truth(&spec, &inputs.to::<f32>(), &fade, true, &f64s(&dy));
                let plan = Plan::new(&device, &spec).unwrap().with_chunk(chunk);
                let got = gradients::<bf16>(&plan, &inputs, &fade, true, &dy);
                let what = describe(&spec, &inputs, &fade, true, "backward");
                let what = format!("{what}, logits {logits}, cut every {chunk}");
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    let error = rms(got.iter().zip(want).map(|(g, w)| g - w));
                    let size = rms(want.iter().copied());
                    let of = if i == 3 { (tokens as f64).sqrt() } else { 1.0 };
                    // Of either sign logits are small sums of large products, whose squares features
                    // of bf16 do not have.
                    let most =
                        if logits == 0.0 { f64::MAX } else { 4.0 * ALLOWED[i] * size + 0.01 * of };
                    assert!(error <= most, "gradient {i} is off by {error:e}, of {size:e}: {what}");
                }
            }
        }
    }
}

#[test]
fn near_blocks() {
    let mut rng = rng();
    for (near, block, decay) in [
        (0, 64, Decay::None),
        (1, 64, Decay::Gates),
        (1, 16, Decay::None),
        (2, 48, Decay::Gates),
        (1, 128, Decay::Slopes),
    ] {
        let near = Near::Blocks(near);
        check(&mut rng, &Case { near, block, decay, chunk: 64, ..case(270, [8, 8]) });
    }
    let near = Near::Blocks(1);
    check(&mut rng, &Case { near, decay: Decay::Gates, chunk: 128, ..case(300, [16, 16]) });
    // The mean of what is far alone.
    for terms in [1, 3] {
        let mut case = Case { near, decay: Decay::Gates, terms, ..case(300, [16, 16]) };
        case.sizes = Sizes { batch: 3, ..case.sizes };
        check(&mut rng, &case);
    }
}

#[test]
fn groups_and_batches() {
    let mut rng = rng();
    for (near, decay) in [(Near::None, Decay::None), (Near::Blocks(1), Decay::Gates)] {
        let mut case = Case { near, decay, chunk: 64, ..case(140, [8, 8]) };
        case.sizes = Sizes { batch: 2, group: 3, ..case.sizes };
        check(&mut rng, &case);
    }
}

#[test]
fn orders_and_values() {
    let mut rng = rng();
    let power = Series::Power { exponent: 2, floor: 0.1 };
    for (series, terms, dims) in [
        (Series::Taylor, 1, [8, 5]),
        (Series::Taylor, 2, [16, 8]),
        (Series::Taylor, 3, [8, 16]),
        (Series::Taylor, 3, [16, 1]),
        (power.clone(), 3, [8, 7]),
        (power, 3, [16, 16]),
        (Series::Taylor, 4, [16, 12]),
    ] {
        check(&mut rng, &Case { series, terms, chunk: 64, ..case(200, dims) });
    }
}

/// Sequences side by side have exactly the gradients that each has alone.
#[test]
fn packed_sequences() {
    let mut rng = rng();
    let device = device();
    let lengths = [70, 0, 5, 130];
    let (heads, d, total) = (2, 8, 205);
    let cu = [0, 70, 70, 75, 205];
    let spec = sata::Spec::new(d, d)
        .terms(3)
        .near(Near::Blocks(1))
        .block(16)
        .decay(Decay::Gates)
        .build()
        .unwrap();
    let plan = Plan::new(&device, &spec).unwrap().with_chunk(64);
    // Token-major.
    let [q, k, v, dy] = [(); 4].map(|()| normal::<bf16>(&mut rng, total * heads * d));
    let gates: Vec<f32> = normal::<f32>(&mut rng, total * heads).iter().map(|g| -g.abs()).collect();
    let run = |from: usize, n: usize, packed: bool| {
        let rows = |x: &[bf16]| {
            Buffer::from_slice(&device, &x[from * heads * d..(from + n) * heads * d]).unwrap()
        };
        let [q, k, v, dy] = [&q, &k, &v, &dy].map(|x| rows(x));
        let gates = Buffer::from_slice(&device, &gates[from * heads..(from + n) * heads]).unwrap();
        let (shape, strides) = ([1, heads, n, d], [n * heads * d, d, heads * d]);
        let (gate_shape, gate_strides) = ([1, heads, n, 1], [n * heads, 1, heads]);
        let view = |x| View::strided(x, shape, strides).unwrap();
        let call = Call::causal(view(&q), view(&k), view(&v));
        let call = call.log_gates(View::strided(&gates, gate_shape, gate_strides).unwrap());
        let call = if packed { call.packed(&cu, &cu) } else { call };
        let [mut dq, mut dk, mut dv] =
            [(); 3].map(|()| Buffer::<bf16>::zeroed(&device, n * heads * d).unwrap());
        let mut dg = Buffer::<f32>::zeroed(&device, n * heads).unwrap();
        let out = Gradients::new(
            ViewMut::strided(&mut dq, shape, strides).unwrap(),
            ViewMut::strided(&mut dk, shape, strides).unwrap(),
            ViewMut::strided(&mut dv, shape, strides).unwrap(),
        );
        let out = out.log_gates(ViewMut::strided(&mut dg, gate_shape, gate_strides).unwrap());
        plan.backward(call, view(&dy), out).unwrap();
        let all = [dq, dk, dv].map(|x| f64s(&x.to_vec().unwrap()));
        (all, f64s(&dg.to_vec().unwrap()))
    };
    let (together, gates_together) = run(0, total, true);
    for (i, n) in lengths.into_iter().enumerate().filter(|(_, n)| *n > 0) {
        let (alone, gates_alone) = run(cu[i], n, false);
        for (together, alone) in together.iter().zip(&alone) {
            assert!(alone.iter().any(|&x| x != 0.0));
            assert_eq!(together[cu[i] * heads * d..][..alone.len()], alone[..], "sequence {i}");
        }
        assert_eq!(gates_together[cu[i] * heads..][..gates_alone.len()], gates_alone[..]);
    }
}
