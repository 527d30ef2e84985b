//! Gradients of calls, the oracle's, and what they may differ by.

use sata::{Call, Decay, Gradients, Plan, Real, Spec, View, ViewMut};
use sata_oracle::attention_gradients;

use super::truth::each_problem;
use super::{Fade, Inputs, f64s};

/// Gradients of one call, `[q, k, v, log_gates, slopes]`; the last two are empty where the spec has
/// none.
pub fn gradients<T: Real>(
    plan: &Plan,
    inputs: &Inputs<T>,
    fade: &Fade,
    causal: bool,
    dy: &[T],
) -> [Vec<f64>; 5] {
    let s = inputs.sizes;
    let nan = |n: usize| vec![T::from_f64(f64::NAN); n];
    let size = |shape: [usize; 4]| shape.iter().product::<usize>();
    let (mut dq, mut dk, mut dv) = (nan(size(s.q())), nan(size(s.k())), nan(size(s.v())));
    let (mut dg, mut dm) = (nan(s.batch * s.kv_heads * s.keys), vec![f64::NAN; s.kv_heads]);
    let (q, k, v) = (inputs.q(), inputs.k(), inputs.v());
    let mut call = if causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
    if let Some(mask) = &inputs.mask {
        call = call.key_mask(mask);
    }
    let call = fade.give(call, s, 0, s.keys);
    let mut out = Gradients::new(
        ViewMut::new(&mut dq, s.q()).unwrap(),
        ViewMut::new(&mut dk, s.k()).unwrap(),
        ViewMut::new(&mut dv, s.v()).unwrap(),
    );
    match fade.decay() {
        Decay::None => {}
        Decay::Slopes => out = out.slopes(&mut dm),
        Decay::Gates => {
            let shape = [s.batch, s.kv_heads, s.keys, 1];
            out = out.log_gates(ViewMut::new(&mut dg, shape).unwrap());
        }
    }
    plan.backward(call, View::new(dy, s.y()).unwrap(), out).unwrap();
    let dg = if fade.decay() == Decay::Gates { f64s(&dg) } else { vec![] };
    let dm = if fade.decay() == Decay::Slopes { dm } else { vec![] };
    [f64s(&dq), f64s(&dk), f64s(&dv), dg, dm]
}

/// The oracle's, in the same order.
pub fn truth<T: Real>(
    spec: &Spec,
    inputs: &Inputs<T>,
    fade: &Fade,
    causal: bool,
    dy: &[f64],
) -> [Vec<f64>; 5] {
    let s = inputs.sizes;
    let mut all: [Vec<f64>; 5] = Default::default();
    all[4] = vec![0.0; s.kv_heads];
    let per_batch = dy.len() / s.batch;
    let mut batch = 0;
    each_problem(spec, inputs, fade, causal, |problem| {
        let found = attention_gradients(problem, &dy[batch * per_batch..][..per_batch]);
        all[0].extend(found.q);
        all[1].extend(found.k);
        all[2].extend(found.v);
        all[3].extend(found.log_gates);
        for (sum, x) in all[4].iter_mut().zip(found.slopes) {
            *sum += x;
        }
        batch += 1;
    });
    if fade.decay() != Decay::Gates {
        all[3].clear();
    }
    if fade.decay() != Decay::Slopes {
        all[4].clear();
    }
    all
}

/// Root mean square.
pub fn rms(x: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = x.len().max(1) as f64;
    (x.map(|x| x * x).sum::<f64>() / n).sqrt()
}

/// Fails unless each gradient is off by at most `tolerance` of its own size and that of what it is
/// summed of together (a gradient that cancels to zero has no size of its own): dy for queries, keys
/// and values; a gate's is a sum over all tokens after it, a slope's one over all tokens, each times
/// its position.
#[track_caller]
pub fn assert_gradients(
    what: &str,
    got: &[Vec<f64>; 5],
    want: &[Vec<f64>; 5],
    keys: usize,
    tolerance: f64,
) {
    let keys = keys as f64;
    let names =
        [("dq", 1.0), ("dk", 1.0), ("dv", 1.0), ("dlog_gates", keys.sqrt()), ("dslopes", keys)];
    for ((name, of), (got, want)) in names.iter().zip(got.iter().zip(want)) {
        assert_eq!(got.len(), want.len(), "{what}: {name}");
        let error = rms(got.iter().zip(want).map(|(g, w)| g - w));
        let size = rms(want.iter().copied()) + of;
        let most = tolerance * size;
        assert!(error <= most, "{what}: {name} is off by {error:e}, of {size:e}");
    }
}
