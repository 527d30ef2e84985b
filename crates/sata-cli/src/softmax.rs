//! Exact softmax attention in f64, which the approximation is compared with.

use sata::{View, ViewMut};

use crate::failure::Outcome;

/// Sizes and setting of a comparison.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// `[batch, heads, tokens, dim]` of q, k and v.
    pub shapes: [[usize; 4]; 3],
    /// c⁻¹.
    pub scale: f64,
    /// Whether query i sees keys up to `offset` + i only.
    pub causal: bool,
    /// Keys before the first query's own.
    pub offset: usize,
}

/// How far below all others the logits of masked keys are put: their weights are then exactly 0.
const OUT_OF_REACH: f64 = 1e6;

/// Softmax attention of f64 inputs, `[batch, query_heads, queries, d_value]`.
///
/// # Errors
/// Shapes that do not fit.
pub fn softmax(
    setting: &Setting,
    [q, k, v]: [&[f64]; 3],
    key_mask: Option<&[bool]>,
) -> Outcome<Vec<f64>> {
    let [q_shape, mut k_shape, v_shape] = setting.shapes;
    let mut out = vec![0.0; q_shape[..3].iter().product::<usize>() * v_shape[3]];
    let out_shape = [q_shape[0], q_shape[1], q_shape[2], v_shape[3]];
    let y = ViewMut::new(&mut out, out_shape)?;
    let v = View::new(v, v_shape)?;
    let Setting { scale, causal, offset, .. } = *setting;
    match key_mask {
        None => {
            let (q, k) = (View::new(q, q_shape)?, View::new(k, k_shape)?);
            sata::conventional::attention(q, k, v, scale, causal, offset, y)?;
        }
        Some(mask) => {
            // One more channel, 1 in every query, holds what masking takes off a logit.
            let mut wide_q_shape = q_shape;
            wide_q_shape[3] += 1;
            let wide_q = widen(q, q_shape[3], |_| 1.0);
            let [_, heads, keys, d_key] = k_shape;
            let off = -OUT_OF_REACH / scale;
            let wide_k = widen(k, d_key, |row| {
                let (batch, token) = (row / (heads * keys), row % keys);
                if mask[batch * keys + token] { 0.0 } else { off }
            });
            k_shape[3] += 1;
            let (q, k) = (View::new(&wide_q, wide_q_shape)?, View::new(&wide_k, k_shape)?);
            sata::conventional::attention(q, k, v, scale, causal, offset, y)?;
        }
    }
    Ok(out)
}

/// Rows of `dim` numbers with one more at their end.
fn widen(data: &[f64], dim: usize, last: impl Fn(usize) -> f64) -> Vec<f64> {
    let mut wide = Vec::with_capacity(data.len() / dim * (dim + 1));
    for (i, row) in data.chunks_exact(dim).enumerate() {
        wide.extend_from_slice(row);
        wide.push(last(i));
    }
    wide
}
