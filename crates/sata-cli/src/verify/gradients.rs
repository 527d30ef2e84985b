//! The oracle's gradients, and how far others are from them.

use rayon::prelude::*;
use sata::{Decay, Spec};
use sata_cuda::Element;
use sata_oracle::attention_gradients;

use super::inputs::{Inputs, wide};
use super::machine::ByInputs;
use super::truth::Wide;
use crate::failure::Outcome;

/// The oracle's.
///
/// # Errors
/// For a series that it does not have.
pub fn truth<E: Element>(
    spec: &Spec,
    inputs: &Inputs<E>,
    causal: bool,
    dy: &[E],
) -> Outcome<ByInputs> {
    let s = inputs.sizes;
    let problems = Wide::new(spec, inputs, causal)?;
    let dy = wide(dy);
    let each = s.group * s.queries * s.d_value;
    let units: Vec<_> = (0..s.batch * s.kv_heads)
        .into_par_iter()
        .map(|unit| {
            let problem = problems.group(unit / s.kv_heads, unit % s.kv_heads);
            attention_gradients(&problem, &dy[unit * each..][..each])
        })
        .collect();
    let mut all = ByInputs { slopes: vec![0.0; s.kv_heads], ..ByInputs::default() };
    for (unit, found) in units.into_iter().enumerate() {
        all.q.extend(found.q);
        all.k.extend(found.k);
        all.v.extend(found.v);
        all.log_gates.extend(found.log_gates);
        all.slopes[unit % s.kv_heads] += found.slopes[0];
    }
    if spec.decay() != Decay::Gates {
        all.log_gates.clear();
    }
    if spec.decay() != Decay::Slopes {
        all.slopes.clear();
    }
    Ok(all)
}

/// Root mean square; 0 of nothing.
fn rms(x: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = x.len().max(1) as f64;
    (x.map(|x| x * x).sum::<f64>() / n).sqrt()
}

/// The largest error of a gradient and its name: over its own size and that of what it is summed of
/// together, since one that cancels to zero has no size of its own. That is dy for queries, keys and
/// values; a gate's is a sum over all tokens after it, a slope's one of numbers as large as positions
/// over all tokens.
pub fn error(got: &ByInputs, want: &ByInputs, keys: usize) -> (f64, &'static str) {
    let keys = keys as f64;
    let each = [
        ("dq", &got.q, &want.q, 1.0),
        ("dk", &got.k, &want.k, 1.0),
        ("dv", &got.v, &want.v, 1.0),
        ("dlog_gates", &got.log_gates, &want.log_gates, keys.sqrt()),
        ("dslopes", &got.slopes, &want.slopes, keys.powf(1.5)),
    ];
    let mut worst = (0.0, "nothing");
    for (name, got, want, of) in each {
        let error = match got.len() == want.len() {
            true => {
                let size = rms(want.iter().copied()) + of;
                rms(got.iter().zip(want).map(|(g, w)| g - w)) / size
            }
            false => f64::INFINITY,
        };
        let error = if error.is_nan() { f64::INFINITY } else { error };
        if error > worst.0 {
            worst = (error, name);
        }
    }
    worst
}

/// All gradients as bits.
pub fn bits(x: &ByInputs) -> Vec<u64> {
    [&x.q, &x.k, &x.v, &x.log_gates, &x.slopes].into_iter().flatten().map(|x| x.to_bits()).collect()
}
