//! The same attention as a plain chunked implementation in 16 bits has it: features, logits, weights,
//! and sums as they are read are rounded to the type of the inputs, products are added up in f32, and
//! so are sums. What an implementation is held to: its error is to be at most twice this one's.

use rayon::prelude::*;
use sata::{Near, Spec};
use sata_cuda::Element;

use super::inputs::Inputs;

/// Rounds to `E`.
fn round<E: Element>(x: f32) -> f32 {
    E::from_compute(x).to_compute()
}

/// The monomials of one order at a time, each with the last index it may be multiplied by next and
/// the multiplicity of its indices.
struct Features {
    d: usize,
    /// Orders below `terms` that have coefficients.
    coefficients: Vec<f64>,
    /// By monomial: order, the monomial of the order before that it is made from, the index that is
    /// multiplied, and its multiplicity.
    made: Vec<(usize, usize, usize, f64)>,
}

impl Features {
    fn new(spec: &Spec) -> Option<Self> {
        let coefficients = spec.coefficients()?;
        let d = spec.d_key();
        // (last index, how often it occurs, multiplicity, place in `made`)
        let mut before = vec![(0, 0, 1.0, 0)];
        let mut made = vec![(0, 0, 0, 1.0)];
        for order in 1..coefficients.len() {
            let mut now = vec![];
            for &(last, often, multiplicity, place) in &before {
                for i in last..d {
                    // p!/∏ n_i! of one index more.
                    let often = if order > 1 && i == last { often + 1 } else { 1 };
                    let multiplicity = multiplicity * order as f64 / often as f64;
                    now.push((i, often, multiplicity, made.len()));
                    made.push((order, place, i, multiplicity));
                }
            }
            before = now;
        }
        Some(Features { d, coefficients, made })
    }

    /// The monomials of a vector, each multiplication rounded.
    fn of<E: Element>(&self, x: &[f32], to: &mut [f32]) {
        debug_assert_eq!(x.len(), self.d);
        to[0] = 1.0;
        for (at, &(_, from, i, _)) in self.made.iter().enumerate().skip(1) {
            to[at] = round::<E>(to[from] * x[i]);
        }
    }

    /// a_p c^-p and the multiplicity, by monomial.
    fn factors(&self, scale: f64) -> Vec<f32> {
        let factor = |&(order, _, _, multiplicity): &(usize, usize, usize, f64)| {
            (self.coefficients[order] * scale.powi(order as i32) * multiplicity) as f32
        };
        self.made.iter().map(factor).collect()
    }
}

/// Outputs `[batch, query_heads, queries, d_value]`; none for series whose coefficients are each
/// query's own.
pub fn outputs<E: Element>(spec: &Spec, inputs: &Inputs<E>, causal: bool) -> Option<Vec<E>> {
    let features = Features::new(spec)?;
    let s = inputs.sizes;
    let units: Vec<(usize, usize)> =
        (0..s.batch).flat_map(|b| (0..s.kv_heads).map(move |h| (b, h))).collect();
    let parts: Vec<Vec<E>> = units
        .into_par_iter()
        .map(|(batch, head)| unit(spec, &features, inputs, causal, batch, head))
        .collect();
    Some(parts.concat())
}

/// The query heads of one key/value head.
fn unit<E: Element>(
    spec: &Spec,
    features: &Features,
    inputs: &Inputs<E>,
    causal: bool,
    batch: usize,
    kv_head: usize,
) -> Vec<E> {
    let (s, scale) = (inputs.sizes, spec.scale() as f32);
    let (d_key, d_value, block) = (s.d_key, s.d_value, spec.block());
    let slot = batch * s.kv_heads + kv_head;
    let floats = |x: &[E], row: usize, d: usize| -> Vec<f32> {
        x[row * d..][..d].iter().map(|x| x.to_compute()).collect()
    };
    let factors = features.factors(spec.scale());
    let (count, width) = (features.made.len(), d_value + 1);
    let near = match spec.near() {
        Near::None => None,
        Near::Blocks(n) => Some(n),
    };
    let there = |key: usize| inputs.mask.as_ref().is_none_or(|mask| mask[batch * s.keys + key]);
    // g at each token.
    let mut g = vec![0.0f64; s.keys];
    let mut sum = 0.0;
    for (key, g) in g.iter_mut().enumerate() {
        sum += match (&inputs.gates, &inputs.slopes) {
            (Some(gates), _) => f64::from(gates[slot * s.keys + key]),
            (_, Some(slopes)) => -slopes[kv_head],
            _ => 0.0,
        };
        *g = sum;
    }
    let mut sums = vec![0.0f32; count * width];
    let mut phi = vec![0.0f32; count];
    let mut rounded = vec![0.0f32; count * width];
    // Tokens that are in the sums, and where the sums' decay stands.
    let (mut folded, mut at) = (0, 0.0);
    let mut out = vec![E::from_compute(f32::NAN); s.group * s.queries * d_value];
    for query in 0..s.queries {
        let (end, fold) = match (causal, near) {
            (true, near) => {
                let blocks = (query / block).saturating_sub(near.unwrap_or(0));
                (query + 1, blocks * block)
            }
            (false, _) => (s.keys, s.keys),
        };
        if folded < fold {
            let now = g[fold - 1];
            let faded = (now - at).exp() as f32;
            sums.iter_mut().for_each(|x| *x *= faded);
            for key in (folded..fold).filter(|&key| there(key) && key >= spec.sinks()) {
                features.of::<E>(&floats(&inputs.k, slot * s.keys + key, d_key), &mut phi);
                let weight = (now - g[key]).exp() as f32;
                let v = floats(&inputs.v, slot * s.keys + key, d_value);
                for (phi, sums) in phi.iter().zip(sums.chunks_exact_mut(width)) {
                    let phi = if weight == 1.0 { *phi } else { round::<E>(phi * weight) };
                    for (sum, v) in sums.iter_mut().zip(&v) {
                        *sum += phi * v;
                    }
                    sums[d_value] += phi;
                }
            }
            (folded, at) = (fold, now);
            rounded.iter_mut().zip(&sums).for_each(|(to, &x)| *to = round::<E>(x));
        }
        let own = g[end - 1];
        for head in 0..s.group {
            let query_row = (slot * s.group + head) * s.queries + query;
            let q = floats(&inputs.q, query_row, d_key);
            let mut total = vec![0.0f32; width];
            if folded > 0 {
                features.of::<E>(&q, &mut phi);
                for ((phi, factor), sums) in
                    phi.iter().zip(&factors).zip(rounded.chunks_exact(width))
                {
                    let phi = round::<E>(phi * factor);
                    for (total, sum) in total.iter_mut().zip(sums) {
                        *total += phi * sum;
                    }
                }
                let faded = (own - at).exp() as f32;
                total.iter_mut().for_each(|x| *x *= faded);
            }
            let sinks = 0..spec.sinks().min(folded).min(end);
            for key in sinks.chain(folded..end).filter(|&key| there(key)) {
                let k = floats(&inputs.k, slot * s.keys + key, d_key);
                let dot: f32 = q.iter().zip(&k).map(|(q, k)| q * k).sum();
                let x = round::<E>(round::<E>(dot) * scale);
                let weight = if near.is_some() && key >= folded || key < spec.sinks() {
                    x.exp()
                } else {
                    features.coefficients.iter().rev().fold(0.0, |sum, &a| sum * x + a as f32)
                };
                let weight = round::<E>(weight * (own - g[key]).exp() as f32);
                let v = floats(&inputs.v, slot * s.keys + key, d_value);
                for (total, v) in total.iter_mut().zip(&v) {
                    *total += weight * v;
                }
                total[d_value] += weight;
            }
            let y = &mut out[(head * s.queries + query) * d_value..][..d_value];
            for (y, n) in y.iter_mut().zip(&total) {
                *y = E::from_compute(n / total[d_value]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use sata::{Decay, Series};

    use super::super::inputs::Sizes;
    use super::super::truth;
    use super::*;

    /// In f32 the naive formula is the operation itself, whatever the spec says.
    #[test]
    fn is_the_operation() {
        let mut rng = StdRng::seed_from_u64(rand::random());
        let of = || Spec::new(3, 4).terms(3).block(8);
        for builder in [
            of(),
            of().terms(5),
            Spec::new(3, 4).series(Series::power(4)).block(8),
            of().near(Near::Blocks(1)).sinks(3),
            of().near(Near::Blocks(0)).decay(Decay::Gates),
            of().sinks(5).decay(Decay::Slopes),
        ] {
            let spec = builder.build().unwrap();
            for causal in [true, false] {
                if !causal && spec.near() != Near::None {
                    continue;
                }
                let sizes = Sizes { batch: 2, kv_heads: 2, group: 2, ..Sizes::new(50, 3, 4) };
                let inputs = Inputs::<f32>::new(&mut rng, &spec, sizes, 1.0, true);
                let rows = truth::rows(&spec, &inputs, causal, None).unwrap();
                let y = outputs(&spec, &inputs, causal).unwrap();
                let error = truth::error(&y, &rows);
                assert!(error < 1e-5, "{spec:?}, causal {causal}: {error:e}");
            }
        }
        let gauss = Spec::new(3, 4).series(Series::Gauss).build().unwrap();
        assert!(Features::new(&gauss).is_none());
    }
}
