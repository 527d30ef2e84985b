//! Attention over a whole text, where every query sees all tokens.

use rayon::prelude::*;
use sata::{Call, Plan, View, ViewMut, conventional};

use super::memory::Memory;
use super::qkv::{Qkv, interleaved};
use super::setting::{HeadSetting, Setting, of_exp};
use crate::pretrained::error::PretrainedError;

/// Answers all queries of a text in layer `layer`, `[tokens][heads · d]`. Nothing is near.
pub(crate) fn attend_whole(
    setting: &Setting,
    layer: usize,
    qkv: &Qkv<'_>,
) -> Result<Vec<f32>, PretrainedError> {
    let group = qkv.heads() / qkv.kv_heads();
    let answers: Result<Vec<Vec<Vec<f32>>>, PretrainedError> = (0..qkv.kv_heads())
        .into_par_iter()
        .map(|i| {
            let queries: Vec<Vec<f32>> =
                (i * group..(i + 1) * group).map(|head| qkv.queries(head)).collect();
            let (keys, values) = (qkv.keys(i), qkv.values(i));
            one(setting, [layer, i], &queries, &keys, &values, qkv.head_dim())
        })
        .collect();
    Ok(interleaved(&answers?, qkv))
}

/// One key/value head: queries `[heads][tokens][d]`.
fn one(
    setting: &Setting,
    [layer, kv_head]: [usize; 2],
    queries: &[Vec<f32>],
    keys: &[f32],
    values: &[f32],
    d: usize,
) -> Result<Vec<Vec<f32>>, PretrainedError> {
    let (group, tokens) = (queries.len(), keys.len() / d);
    let shapes = [[1, group, tokens, d], [1, 1, tokens, d]];
    let q = queries.concat();
    let mut out = vec![0.0; q.len()];
    match setting.head(layer, kv_head) {
        HeadSetting::Memory(memory) => {
            let known = setting.calibration(layer, kv_head);
            return Ok(Memory::new(memory, known, d).attend_all(queries, keys, values));
        }
        HeadSetting::Softmax => {
            let scale = (d as f64).powf(-0.5);
            let [q, k, v] = [
                View::new(&q, shapes[0])?,
                View::new(keys, shapes[1])?,
                View::new(values, shapes[1])?,
            ];
            let out = ViewMut::new(&mut out, shapes[0])?;
            conventional::attention(q, k, v, scale, false, 0, out)?;
        }
        HeadSetting::Spec { spec } => {
            let centre = setting.calibration(layer, kv_head).filter(|_| of_exp(spec));
            let centred = centre.map(|known| known.centred(keys));
            let call = Call::full(
                View::new(&q, shapes[0])?,
                View::new(centred.as_deref().unwrap_or(keys), shapes[1])?,
                View::new(values, shapes[1])?,
            );
            Plan::new(spec)?.run(call, ViewMut::new(&mut out, shapes[0])?)?;
        }
    }
    Ok(out.chunks_exact(tokens * d).map(<[f32]>::to_vec).collect())
}
