//! Types and sizes: bf16 and f16, heads of any size, tensors of any strides.

#[path = "../../sata/tests/common/mod.rs"]
mod common;
mod gpu;

use common::check::describe;
use common::truth::{assert_rows, truth};
use common::{Fade, Inputs, Sizes, rng, tolerance};
use gpu::{device, run};
use half::{bf16, f16};
use rand::rngs::StdRng;
use sata::{Decay, Form, Near, Series, Spec};
use sata_cuda::{Buffer, Call, Element, Plan, View, ViewMut};

/// By sums and directly. Outputs are rounded to `E`, and all else is f32.
fn check<E: Element>(rng: &mut StdRng, s: Sizes, terms: usize, chunk: usize) {
    let spec = Spec::new(s.d_key, s.d_value).terms(terms).near(Near::Blocks(0)).block(16);
    let spec = spec.build().unwrap();
    let inputs = Inputs::<E>::new(rng, s);
    let truth = truth(&spec, &inputs, &Fade::None, true);
    let rounding = match E::KERNEL_NAME {
        "bf16" => 2f64.powi(-9),
        "f16" => 2f64.powi(-12),
        _ => tolerance::<f32>(),
    };
    for form in [Form::Direct, Form::State] {
        let plan = Plan::new(&device(), &spec).unwrap().with_form(form).with_chunk(chunk);
        let (y, _) = run(&plan, &inputs, &Fade::None, true);
        let what = format!("{form:?} {}", E::KERNEL_NAME);
        let what = describe(&spec, &inputs, &Fade::None, true, &what);
        assert_rows(&what, &y, &truth, rounding);
    }
}

#[test]
fn heads_of_any_size() {
    let mut rng = rng();
    for (d_key, d_value, terms) in
        [(1, 1, 5), (8, 8, 4), (7, 33, 3), (3, 70, 3), (70, 5, 3), (300, 2, 2), (1500, 1, 2)]
    {
        let s = Sizes::self_attention(70, d_key, d_value);
        check::<f32>(&mut rng, Sizes { group: 2, ..s }, terms, 32);
    }
}

/// So many features, and pieces so long, that kernels go through memory on the way.
#[test]
fn many_features_and_long_pieces() {
    let mut rng = rng();
    check::<f32>(&mut rng, Sizes::self_attention(50, 16, 3), 5, 16);
    check::<f32>(&mut rng, Sizes::self_attention(1500, 2, 3), 3, 1100);
}

#[test]
fn half_precision() {
    let mut rng = rng();
    for (d_key, d_value) in [(8, 16), (5, 3)] {
        let s = Sizes { group: 2, batch: 2, ..Sizes::self_attention(90, d_key, d_value) };
        check::<bf16>(&mut rng, s, 3, 32);
        check::<f16>(&mut rng, s, 3, 32);
    }
}

/// A state fed with bf16 holds those numbers exactly: in parts is as at once.
#[test]
fn half_precision_in_parts() {
    let mut rng = rng();
    let s = Sizes { kv_heads: 2, ..Sizes::self_attention(100, 5, 3) };
    let spec = Spec::new(5, 3).series(Series::Gauss).terms(4).near(Near::Blocks(1)).block(8);
    let spec = spec.sinks(3).decay(Decay::Gates).build().unwrap();
    let inputs = Inputs::<bf16>::new(&mut rng, s);
    let fade = Fade::new(&mut rng, Decay::Gates, s);
    let truth = truth(&spec, &inputs, &fade, true);
    let plan = Plan::new(&device(), &spec).unwrap().with_form(Form::State).with_chunk(24);
    let there = gpu::OnDevice::new(plan.device(), &inputs, &fade);
    let mut state = sata_cuda::State::new(&plan, 1, 2).unwrap();
    let mut y = gpu::blank(plan.device(), s);
    for range in [0..30, 30..37, 37..100] {
        gpu::feed(&plan, &mut state, &there, range, &mut y);
    }
    assert_rows("in parts", &y.to_vec().unwrap(), &truth, 2f64.powi(-8));
}

/// `[batch, tokens, heads, dim]` memory, with room between rows; a broadcast batch of keys.
#[test]
fn strides() {
    let mut rng = rng();
    let s = Sizes { batch: 2, kv_heads: 2, group: 2, ..Sizes::self_attention(50, 5, 6) };
    let mut inputs = Inputs::<f32>::new(&mut rng, s);
    // Both sequences have the same keys and values.
    let half = inputs.k.len() / 2;
    inputs.k.copy_within(..half, half);
    let half = inputs.v.len() / 2;
    inputs.v.copy_within(..half, half);
    let spec = Spec::new(5, 6).terms(3).decay(Decay::Slopes).build().unwrap();
    let slopes = vec![0.1, 0.02];
    let truth = truth(&spec, &inputs, &Fade::Slopes(slopes.clone()), true);
    let plan = Plan::new(&device(), &spec).unwrap().with_form(Form::State).with_chunk(16);
    let device = plan.device();
    let pitch = |dim: usize| dim + 3;
    let spread = |x: &[f32], shape: [usize; 4]| {
        let [batch, heads, tokens, dim] = shape;
        let (token, head) = (heads * pitch(dim), pitch(dim));
        let mut out = vec![f32::NAN; batch * tokens * token];
        for b in 0..batch {
            for h in 0..heads {
                for t in 0..tokens {
                    let at = ((b * heads + h) * tokens + t) * dim;
                    let to = b * tokens * token + t * token + h * head;
                    out[to..to + dim].copy_from_slice(&x[at..at + dim]);
                }
            }
        }
        (Buffer::from_slice(device, &out).unwrap(), [tokens * token, head, token])
    };
    let (q, q_strides) = spread(&inputs.q, s.q());
    let (k, k_strides) = spread(&inputs.k[..inputs.k.len() / 2], Sizes { batch: 1, ..s }.k());
    let (v, v_strides) = spread(&inputs.v[..inputs.v.len() / 2], Sizes { batch: 1, ..s }.v());
    let once = |[_, head, token]: [usize; 3]| [0, head, token];
    let call = Call::causal(
        View::strided(&q, s.q(), q_strides).unwrap(),
        View::strided(&k, s.k(), once(k_strides)).unwrap(),
        View::strided(&v, s.v(), once(v_strides)).unwrap(),
    );
    let (mut y, y_strides) = spread(&vec![0.0; s.y().iter().product()], s.y());
    let out = ViewMut::strided(&mut y, s.y(), y_strides).unwrap();
    plan.run(call.slopes(&slopes), out).unwrap();
    let y = View::strided(&y, s.y(), y_strides).unwrap().to_vec().unwrap();
    assert_rows("strided", &y, &truth, tolerance::<f32>());
}
