//! The softmax baseline against the oracle's softmax.

mod common;

use common::{Inputs, Sizes, assert_close, f64s, rng};
use sata::{Element, Real, View, ViewMut, conventional};
use sata_oracle::{Problem, Shape, softmax_attention};

fn check<E: Element>(sizes: Sizes, causal: Option<usize>, gain: f64, tolerance: f64) {
    let mut rng = rng();
    let mut inputs = Inputs::<E>::new(&mut rng, sizes);
    for q in &mut inputs.q {
        *q = E::from_compute(E::Compute::from_f64(q.to_compute().to_f64() * gain));
    }
    let (q, k, v) = (f64s(&inputs.q), f64s(&inputs.k), f64s(&inputs.v));
    let shape = Shape {
        query_heads: sizes.kv_heads * sizes.group,
        kv_heads: sizes.kv_heads,
        queries: sizes.queries,
        keys: sizes.keys,
        d_key: sizes.d_key,
        d_value: sizes.d_value,
    };
    let mut problem = Problem::new(shape, &q, &k, &v);
    problem.causal = causal.is_some();
    problem.offset = causal.unwrap_or(0);
    let want = softmax_attention(&problem).y;
    let mut y = vec![E::from_compute(E::Compute::from_f64(f64::NAN)); want.len()];
    conventional::attention(
        inputs.q(),
        inputs.k(),
        inputs.v(),
        problem.scale,
        causal.is_some(),
        causal.unwrap_or(0),
        ViewMut::new(&mut y, sizes.y()).unwrap(),
    )
    .unwrap();
    assert_close(&format!("{sizes:?} {causal:?} gain {gain}"), &y, &want, tolerance);
}

#[test]
fn blocked_softmax_is_softmax() {
    for (queries, keys, causal) in [
        (1, 1, Some(0)),
        (64, 64, Some(0)),
        (65, 65, Some(0)),
        (200, 200, Some(0)),
        (3, 200, Some(197)),
        (70, 200, Some(100)),
        (5, 130, None),
        (130, 5, None),
    ] {
        for (d_key, d_value) in [(1, 1), (8, 8), (7, 17), (32, 33)] {
            let sizes = Sizes { batch: 1, kv_heads: 2, group: 2, queries, keys, d_key, d_value };
            check::<f64>(sizes, causal, 1.0, 1e-13);
            check::<f32>(sizes, causal, 1.0, 1e-5);
            // Logits of some hundreds: the maximum must be taken out in time.
            check::<f64>(sizes, causal, 100.0, 1e-11);
        }
    }
}

#[test]
fn decode_is_the_last_row() {
    let mut rng = rng();
    for n in [1, 63, 64, 65, 5000, 9001] {
        let sizes =
            Sizes { batch: 1, kv_heads: 1, group: 1, queries: 1, keys: n, d_key: 9, d_value: 17 };
        let inputs = Inputs::<f64>::new(&mut rng, sizes);
        let mut want = vec![0.0; 17];
        conventional::attention(
            inputs.q(),
            inputs.k(),
            inputs.v(),
            0.3,
            false,
            0,
            ViewMut::new(&mut want, [1, 1, 1, 17]).unwrap(),
        )
        .unwrap();
        let mut got = vec![f64::NAN; 17];
        conventional::decode(&inputs.q, &inputs.k, &inputs.v, 0.3, &mut got).unwrap();
        assert_close(&format!("{n} tokens"), &got, &want, 1e-13);
    }
}

#[test]
fn misfits_are_refused() {
    let x = vec![1.0f32; 64];
    let mut y = vec![0.0f32; 64];
    let view = |shape| View::new(&x, shape).unwrap();
    let error = conventional::attention(
        view([1, 1, 4, 4]),
        view([1, 1, 3, 4]),
        view([1, 1, 3, 4]),
        1.0,
        true,
        0,
        ViewMut::new(&mut y, [1, 1, 4, 4]).unwrap(),
    );
    assert!(error.unwrap_err().to_string().contains("k has shape"));
}
