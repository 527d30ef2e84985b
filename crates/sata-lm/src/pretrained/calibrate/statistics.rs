//! How keys, and the queries that read them, lie.

use super::gather::Recorded;
use super::linalg::{cholesky, eigenvectors, lower_inverse, product, transpose};
use crate::pretrained::attention::Calibration;

/// Tokens whose queries are left out: they see little.
const EARLY: usize = 64;

/// What a layer's text says about key/value head `kv_head` with heads of `d`; `turns` asks for the
/// directions too.
pub fn statistics(layer: &Recorded, kv_head: usize, d: usize, turns: bool) -> Calibration {
    let group = layer.queries.len() / layer.keys.len().max(1);
    let scale = (d as f64).powf(-0.5);
    let keys = &layer.keys[kv_head];
    let skip = EARLY.min(keys.len() / d / 2) * d;
    let (centre, mut spread) = moments(&[&keys[skip..]], d, 1.0);
    for i in 0..d * d {
        spread[i] -= centre[i / d] * centre[i % d];
    }
    let queries: Vec<&[f32]> =
        (kv_head * group..(kv_head + 1) * group).map(|head| &layer.queries[head][skip..]).collect();
    let (query, squares) = moments(&queries, d, scale);
    let metric = cholesky(&squares, d);
    let (mut key_turn, mut query_turn) = (vec![], vec![]);
    if turns {
        // Keys become white, and then the directions are those in which logits vary most.
        let l = cholesky(&spread, d);
        let inner = product(&product(&transpose(&l, d), &squares, d), &l, d);
        let rows = eigenvectors(&inner, d);
        key_turn = narrow(&product(&rows, &lower_inverse(&l, d), d));
        query_turn = narrow(&product(&rows, &transpose(&l, d), d));
    }
    Calibration {
        centre: narrow(&centre),
        query: narrow(&query),
        metric: narrow(&metric),
        keys: key_turn,
        queries: query_turn,
    }
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

/// Mean and mean of products of rows.
fn moments(parts: &[&[f32]], d: usize, scale: f64) -> (Vec<f64>, Vec<f64>) {
    let (mut mean, mut squares, mut count) = (vec![0.0; d], vec![0.0; d * d], 0.0);
    for row in parts.iter().flat_map(|part| part.chunks_exact(d)) {
        count += 1.0;
        for (i, &x) in row.iter().enumerate() {
            let x = f64::from(x) * scale;
            mean[i] += x;
            for (square, &y) in squares[i * d..(i + 1) * d].iter_mut().zip(row) {
                *square += x * f64::from(y) * scale;
            }
        }
    }
    let count = f64::max(count, 1.0);
    mean.iter_mut().chain(&mut squares).for_each(|x| *x /= count);
    (mean, squares)
}
