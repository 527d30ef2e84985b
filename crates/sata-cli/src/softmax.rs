//! Exact softmax attention in f64, which the approximation is compared with.

use sata::{View, ViewMut};

use crate::failure::Outcome;

/// Sizes and setting of a comparison.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    /// `[batch, heads, tokens, dim]` of q, k and v.
    pub shapes: [[usize; 4]; 3],
    /// c⁻¹.
    pub scale: f64,
    /// Whether query i sees keys up to its own only.
    pub causal: bool,
    /// `[batch · keys]`: which keys exist.
    pub key_mask: Option<&'a [bool]>,
    /// `[batch, kv_heads, keys]`: g_t − g_{t−1}, the logarithm of what the past fades by at each
    /// key; weights carry exp(g_t − g_s). At most 0.
    pub fading: Option<&'a [f64]>,
}

/// How far below all others the logits of masked keys are put: their weights are then exactly 0.
const OUT_OF_REACH: f64 = 1e6;

/// A key fades the past by no more than this at once: what came before is then forgotten, and
/// sums of it keep the digits of logits.
const FORGOTTEN: f64 = -1e4;

/// Queries whose decays are counted from the same token, for the same reason.
const BLOCK: usize = 256;

/// Softmax attention of f64 inputs, `[batch, query_heads, queries, d_value]`.
///
/// # Errors
/// Shapes that do not fit.
pub fn softmax(setting: &Setting<'_>, [q, k, v]: [&[f64]; 3]) -> Outcome<Vec<f64>> {
    let [q_shape, k_shape, v_shape] = setting.shapes;
    let Setting { scale, causal, .. } = *setting;
    let mut out = vec![0.0; q_shape[..3].iter().product::<usize>() * v_shape[3]];
    let out_shape = [q_shape[0], q_shape[1], q_shape[2], v_shape[3]];
    let v = View::new(v, v_shape)?;
    if setting.key_mask.is_none() && setting.fading.is_none() {
        let (q, k) = (View::new(q, q_shape)?, View::new(k, k_shape)?);
        let y = ViewMut::new(&mut out, out_shape)?;
        sata::conventional::attention(q, k, v, scale, causal, 0, y)?;
        return Ok(out);
    }
    // One more channel, 1 in every query, holds what masks and decays add to a logit.
    let q = widen(q, q_shape[3], scale, 1.0);
    let mut k = widen(k, k_shape[3], 1.0, 0.0);
    let [wide_q, wide_k] = [q_shape, k_shape].map(|[b, h, n, d]| [b, h, n, d + 1]);
    let queries = q_shape[2];
    let block = if causal && setting.fading.is_some() { BLOCK } else { queries.max(1) };
    for first in (0..queries).step_by(block) {
        let n = block.min(queries - first);
        let from = if causal { first } else { k_shape[2].saturating_sub(1) };
        set_last(setting, &mut k, from);
        let q = part(&q[first * wide_q[3]..], wide_q, n)?;
        let [b, h, tokens, d] = out_shape;
        let strides = [h * tokens * d, tokens * d, d];
        let y = ViewMut::strided(&mut out[first * d..], [b, h, n, d], strides)?;
        let k = View::new(&k, wide_k)?;
        sata::conventional::attention(q, k, v, 1.0, causal, first, y)?;
    }
    Ok(out)
}

/// The first `n` tokens of every head of memory of this shape.
fn part(data: &[f64], [b, h, tokens, d]: [usize; 4], n: usize) -> Outcome<View<'_, f64>> {
    Ok(View::strided(data, [b, h, n, d], [h * tokens * d, tokens * d, d])?)
}

/// Rows of `dim` numbers times `factor`, with one more at their end.
fn widen(data: &[f64], dim: usize, factor: f64, last: f64) -> Vec<f64> {
    let mut wide = Vec::with_capacity(data.len() / dim * (dim + 1));
    for row in data.chunks_exact(dim) {
        wide.extend(row.iter().map(|x| factor * x));
        wide.push(last);
    }
    wide
}

/// Sets every key's last channel: g_from − g_s, and far less where it is masked.
fn set_last(setting: &Setting<'_>, k: &mut [f64], from: usize) {
    let [_, heads, keys, dim] = setting.shapes[1];
    for (unit, rows) in k.chunks_exact_mut((keys * (dim + 1)).max(1)).enumerate() {
        let fade = |key: usize| {
            setting.fading.map_or(0.0, |fading| fading[unit * keys + key].max(FORGOTTEN))
        };
        let mut g = 0.0;
        for key in (0..=from).rev() {
            rows[key * (dim + 1) + dim] = g;
            g += fade(key);
        }
        let lowest = g.min(0.0);
        let mut g = 0.0;
        for key in from + 1..keys {
            g -= fade(key);
            rows[key * (dim + 1) + dim] = g;
        }
        if let Some(mask) = setting.key_mask {
            let mask = &mask[unit / heads * keys..][..keys];
            for (row, _) in rows.chunks_exact_mut(dim + 1).zip(mask).filter(|(_, there)| !**there) {
                row[dim] = lowest - OUT_OF_REACH;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::hash::{BuildHasher, Hasher, RandomState};

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use rand_distr::StandardNormal;
    use sata_oracle::{Decay, Problem, Shape, softmax_attention};

    use super::*;

    fn relative(got: &[f64], want: &[f64]) -> f64 {
        let square = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
        let off = square(&mut got.iter().zip(want).map(|(g, w)| g - w));
        (off / square(&mut want.iter().copied())).sqrt()
    }

    /// Compares with the oracle under these decays, `[batch][kv_heads][keys]`.
    fn check(causal: bool, masked: bool, limit: f64, fading: impl Fn(&mut StdRng) -> f64) {
        let seed = RandomState::new().build_hasher().finish();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let (batch, kv_heads, group, d_key, d_value) = (2, 2, 2, 5, 3);
        let (queries, keys) = if causal { (600, 600) } else { (7, 90) };
        let mut normal =
            |n: usize| -> Vec<f64> { (0..batch * n).map(|_| rng.sample(StandardNormal)).collect() };
        let sizes = [
            kv_heads * group * queries * d_key,
            kv_heads * keys * d_key,
            kv_heads * keys * d_value,
        ];
        let [q, k, v] = sizes.map(&mut normal);
        let fading: Vec<f64> = (0..batch * kv_heads * keys).map(|_| fading(&mut rng)).collect();
        // The first key of every sequence is there, so that no query is left without one.
        let mask: Vec<bool> =
            (0..batch * keys).map(|i| i % keys == 0 || rng.random_bool(0.7)).collect();
        let setting = Setting {
            shapes: [
                [batch, kv_heads * group, queries, d_key],
                [batch, kv_heads, keys, d_key],
                [batch, kv_heads, keys, d_value],
            ],
            scale: -0.7,
            causal,
            key_mask: masked.then_some(&mask),
            fading: Some(&fading),
        };
        let got = softmax(&setting, [&q, &k, &v]).unwrap();
        let query_heads = kv_heads * group;
        let shape = Shape { query_heads, kv_heads, queries, keys, d_key, d_value };
        let mut want = vec![];
        for b in 0..batch {
            let part = |x: &[f64], n: usize| x[b * n..][..n].to_vec();
            let (q, k, v) = (part(&q, sizes[0]), part(&k, sizes[1]), part(&v, sizes[2]));
            let mut problem = Problem::new(shape, &q, &k, &v);
            problem.scale = setting.scale;
            problem.causal = causal;
            problem.key_mask = setting.key_mask.map(|mask| &mask[b * keys..][..keys]);
            problem.decay = Decay::LogGates(part(&fading, kv_heads * keys));
            want.extend(softmax_attention(&problem).y);
        }
        let error = relative(&got, &want);
        assert!(error < limit, "causal {causal}, masked {masked}: {error:e}");
    }

    #[test]
    fn decays_and_masks_are_those_of_the_oracle() {
        for causal in [true, false] {
            for masked in [false, true] {
                check(causal, masked, 1e-12, |rng| -0.1 * rng.random::<f64>());
                check(causal, masked, 1e-12, |_| -0.5);
            }
        }
    }

    #[test]
    fn what_is_forgotten_costs_few_digits() {
        check(true, false, 1e-10, |rng| if rng.random_bool(0.1) { -1e30 } else { -0.01 });
    }
}
