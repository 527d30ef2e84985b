//! The paper's appendix A2: the same numbers through sums of features.

use crate::features::{features, inner_product, monomials, multiplicities};
use crate::{Near, Problem};

/// What [`linear_attention`] gives.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LinearOutput {
    /// y, `[query_heads][queries][d_value]`.
    pub y: Vec<f64>,
    /// Z_T, `[query_heads][queries]`.
    pub denominators: Vec<f64>,
}

/// One order's constants and accumulated states.
struct Order {
    /// α_p = a_p · scale^p.
    alpha: f64,
    /// M_p.
    monomials: Vec<Vec<usize>>,
    /// The diagonal of C_p.
    multiplicities: Vec<u128>,
    /// Z_p = α_p Σ_t Φ_p(k_t), `[m_p]`.
    z: Vec<f64>,
    /// S_p = α_p Σ_t Φ_p(k_t) v_tᵀ, `[d_value][m_p]`: one sum per element of v.
    s: Vec<Vec<f64>>,
}

/// The recurrences of A2 over the tokens:
///
/// ```text
/// Z_{p,T} = exp(g_T − g_{T−1}) Z_{p,T−1} + α_p Φ_p(k_T)
/// S_{p,T} = exp(g_T − g_{T−1}) S_{p,T−1} + α_p Φ_p(k_T) v_Tᵀ
/// y_T = Σ_p ⟨Φ_p(q_T), S_{p,T}⟩_{C_p} / Σ_p ⟨Φ_p(q_T), Z_{p,T}⟩_{C_p}
/// ```
///
/// The decay is ours; A2 has none. A2 writes the numerator as S_{p,T}ᵀ Φ_p(q_T), without C_p, which does not give
/// its (17); C_p is applied here to S as to Z.
///
/// Panics unless the problem is causal with everything far and one set of coefficients for all queries (`Taylor`,
/// `Fixed`, `Power`): the rest has no such recurrence.
pub fn linear_attention(problem: &Problem) -> LinearOutput {
    problem.check();
    assert!(problem.causal, "causal is false: the recurrences of A2 are causal");
    assert!(
        problem.near == Near::None && problem.sinks == 0,
        "near is {:?} and sinks is {}: the recurrences of A2 have no near part",
        problem.near,
        problem.sinks
    );
    let Some(coefficients) = problem.series.coefficients(problem.terms) else {
        panic!("series is {:?}: A2 has one set of coefficients for all queries", problem.series);
    };

    let mut output = LinearOutput::default();
    for head in 0..problem.shape.query_heads {
        let kv_head = problem.kv_head(head);
        let mut orders = empty_state(problem, &coefficients);
        for token in 0..problem.offset + problem.shape.queries {
            forget(&mut orders, problem.log_step(kv_head, token).exp());
            if problem.key_mask.is_none_or(|mask| mask[token]) {
                add(&mut orders, problem.key(kv_head, token), problem.value(kv_head, token));
            }
            if token >= problem.offset {
                let (numerator, denominator) =
                    read(&orders, problem.query(head, token - problem.offset));
                output.y.extend(numerator.iter().map(|n| n / denominator));
                output.denominators.push(denominator);
            }
        }
    }
    output
}

/// The states before the first token. Orders that the series skips are not kept.
fn empty_state(problem: &Problem, coefficients: &[f64]) -> Vec<Order> {
    let mut orders = vec![];
    let mut scale_to_p = 1.0;
    for (p, a) in coefficients.iter().enumerate() {
        if *a != 0.0 {
            let monomials = monomials(problem.shape.d_key, p);
            let count = monomials.len();
            orders.push(Order {
                alpha: a * scale_to_p,
                multiplicities: multiplicities(&monomials),
                monomials,
                z: vec![0.0; count],
                s: vec![vec![0.0; count]; problem.shape.d_value],
            });
        }
        scale_to_p *= problem.scale;
    }
    orders
}

fn forget(orders: &mut [Order], factor: f64) {
    for order in orders {
        for z in &mut order.z {
            *z *= factor;
        }
        for s in order.s.iter_mut().flatten() {
            *s *= factor;
        }
    }
}

fn add(orders: &mut [Order], key: &[f64], value: &[f64]) {
    for order in orders {
        let phi = features(key, &order.monomials);
        for i in 0..phi.len() {
            order.z[i] += order.alpha * phi[i];
            for e in 0..value.len() {
                order.s[e][i] += order.alpha * phi[i] * value[e];
            }
        }
    }
}

/// (S_T, Z_T): the numerator and the denominator.
fn read(orders: &[Order], query: &[f64]) -> (Vec<f64>, f64) {
    let d_value = orders.first().map_or(0, |order| order.s.len());
    let mut numerator = vec![0.0; d_value];
    let mut denominator = 0.0;
    for order in orders {
        let phi = features(query, &order.monomials);
        denominator += inner_product(&phi, &order.z, &order.multiplicities);
        for e in 0..d_value {
            numerator[e] += inner_product(&phi, &order.s[e], &order.multiplicities);
        }
    }
    (numerator, denominator)
}
