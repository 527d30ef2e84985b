//! Analytic gradients against central differences, every field, fresh inputs every run.

mod common;

use common::{
    Data, all_series, assert_close, assert_close_above, fresh_rng, normals, random_decays,
};
use rand::rngs::StdRng;
use sata_oracle::{Decay, Near, Problem, Series, Shape, attention, attention_gradients};

/// (f(x + h) − f(x − h))/2h in every element of x.
fn central_differences(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let h = 1e-5;
    let mut moved = x.to_vec();
    let mut differences = vec![];
    for i in 0..x.len() {
        moved[i] = x[i] + h;
        let above = f(&moved);
        moved[i] = x[i] - h;
        let below = f(&moved);
        moved[i] = x[i];
        differences.push((above - below) / (2.0 * h));
    }
    differences
}

fn check(name: &str, problem: &Problem, dy: &[f64]) {
    // Some gradients are zero, such as those of a kernel of one term by q; there the differences are rounding.
    const FLOOR: f64 = 1e-3;
    let tolerance = 1e-6;
    let loss = |problem: &Problem| -> f64 {
        attention(problem).y.iter().zip(dy).map(|(y, dy)| y * dy).sum()
    };
    let gradients = attention_gradients(problem, dy);
    let field = |field: &str| format!("{name}, by {field}");

    let by_q = central_differences(problem.q, |q| loss(&Problem { q, ..problem.clone() }));
    assert_close_above(FLOOR, &field("q"), &gradients.q, &by_q, tolerance);
    let by_k = central_differences(problem.k, |k| loss(&Problem { k, ..problem.clone() }));
    assert_close_above(FLOOR, &field("k"), &gradients.k, &by_k, tolerance);
    let by_v = central_differences(problem.v, |v| loss(&Problem { v, ..problem.clone() }));
    assert_close_above(FLOOR, &field("v"), &gradients.v, &by_v, tolerance);

    let (mut by_slopes, mut by_log_gates) =
        (vec![0.0; gradients.slopes.len()], vec![0.0; gradients.log_gates.len()]);
    match &problem.decay {
        Decay::None => {}
        Decay::Slopes(slopes) => {
            by_slopes = central_differences(slopes, |m| {
                loss(&Problem { decay: Decay::Slopes(m.to_vec()), ..problem.clone() })
            });
        }
        Decay::LogGates(log_gates) => {
            by_log_gates = central_differences(log_gates, |f| {
                loss(&Problem { decay: Decay::LogGates(f.to_vec()), ..problem.clone() })
            });
        }
    }
    assert_close_above(FLOOR, &field("slopes"), &gradients.slopes, &by_slopes, tolerance);
    assert_close(&field("log gates"), &gradients.log_gates, &by_log_gates, tolerance);
}

/// Every series with every decay.
fn check_all(rng: &mut StdRng, shape: Shape, change: impl for<'a> Fn(Problem<'a>) -> Problem<'a>) {
    let data = Data::new(rng, shape);
    let dy = normals(rng, shape.query_heads * shape.queries * shape.d_value);
    for decay in random_decays(rng, shape) {
        for (series, terms) in all_series() {
            let name = format!("{series:?}, {terms} terms, {decay:?}");
            // The denominators of the Hermite series stay away from zero while the logits spread little.
            let scale = match series {
                Series::Hermite { .. } => 0.4,
                _ => 0.7,
            };
            check(
                &name,
                &change(Problem { series, terms, scale, decay: decay.clone(), ..data.problem() }),
                &dy,
            );
        }
    }
}

const SHAPE: Shape =
    Shape { query_heads: 2, kv_heads: 1, queries: 6, keys: 6, d_key: 2, d_value: 2 };

#[test]
fn causal() {
    check_all(&mut fresh_rng(), SHAPE, |problem| problem);
}

#[test]
fn full() {
    let shape = Shape { query_heads: 4, kv_heads: 2, queries: 3, ..SHAPE };
    check_all(&mut fresh_rng(), shape, |problem| Problem { causal: false, ..problem });
}

#[test]
fn near_blocks_and_sinks() {
    check_all(&mut fresh_rng(), SHAPE, |problem| Problem {
        near: Near::Blocks(1),
        block: 2,
        sinks: 1,
        ..problem
    });
}

#[test]
fn full_with_sinks() {
    check_all(&mut fresh_rng(), SHAPE, |problem| Problem { causal: false, sinks: 2, ..problem });
}

#[test]
fn masked() {
    // The first key stays, so that every query sees one.
    let mask: &'static [bool] = &[true, true, false, true, false, true];
    check_all(&mut fresh_rng(), SHAPE, |problem| Problem {
        key_mask: Some(mask),
        near: Near::Blocks(0),
        block: 2,
        ..problem
    });
}

#[test]
fn later_queries() {
    let shape = Shape { queries: 4, ..SHAPE };
    check_all(&mut fresh_rng(), shape, |problem| Problem {
        offset: 2,
        near: Near::Blocks(0),
        block: 3,
        ..problem
    });
}

#[test]
fn everything_near_is_the_gradient_of_softmax() {
    // dx_s = p_s dy·(v_s − y), p the softmax.
    let mut rng = fresh_rng();
    let shape = Shape { query_heads: 1, kv_heads: 1, queries: 1, keys: 7, d_key: 3, d_value: 2 };
    let data = Data::new(&mut rng, shape);
    let dy = normals(&mut rng, shape.d_value);
    let problem = Problem { causal: false, sinks: 7, ..data.problem() };
    let total: f64 = (0..7).map(|s| problem.logit(0, 0, s).exp()).sum();
    let y = attention(&problem).y;
    let mut by_q = vec![0.0; shape.d_key];
    for s in 0..7 {
        let p = problem.logit(0, 0, s).exp() / total;
        let dx: f64 = (0..shape.d_value).map(|e| p * dy[e] * (problem.value(0, s)[e] - y[e])).sum();
        for (by_q, k) in by_q.iter_mut().zip(problem.key(0, s)) {
            *by_q += problem.scale * dx * k;
        }
    }
    assert_close("q", &attention_gradients(&problem, &dy).q, &by_q, 1e-13);
}

#[test]
fn large_logits_have_finite_gradients() {
    let mut rng = fresh_rng();
    let data = Data::new(&mut rng, SHAPE);
    let dy = normals(&mut rng, SHAPE.query_heads * SHAPE.queries * SHAPE.d_value);
    for (series, terms) in [(Series::Gauss, 4), (Series::hermite(), 3), (Series::Taylor, 5)] {
        let problem = Problem {
            scale: 400.0,
            series,
            terms,
            near: Near::Blocks(0),
            block: 2,
            ..data.problem()
        };
        let gradients = attention_gradients(&problem, &dy);
        assert!(
            [&gradients.q, &gradients.k, &gradients.v].into_iter().flatten().all(|x| x.is_finite())
        );
    }
}
