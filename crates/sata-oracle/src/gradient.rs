//! The derivatives of the operation, by the chain rule written out.

use crate::row::Row;
use crate::{Decay, Problem};

/// The derivatives of L = Σ dy · y, in the layouts of what they are derivatives by.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    /// By the queries, `[query_heads][queries][d_key]`.
    pub q: Vec<f64>,
    /// By the keys, `[kv_heads][keys][d_key]`.
    pub k: Vec<f64>,
    /// By the values, `[kv_heads][keys][d_value]`.
    pub v: Vec<f64>,
    /// By the slopes, `[kv_heads]`; zero where the decay is another.
    pub slopes: Vec<f64>,
    /// By the log gates, `[kv_heads][keys]`; zero where the decay is another.
    pub log_gates: Vec<f64>,
}

/// The gradients of [`attention`](crate::attention) for a given dL/dy, `[query_heads][queries][d_value]`, for every
/// series. Where the coefficients are chosen per query (`Gauss`, `Hermite`), their dependence on the far logits and
/// decays is part of it: these are the true derivatives.
///
/// With y = Σ w_s v_s / D, dL = Σ_s c_s dw_s + Σ_s (w_s/D) dy·dv_s, where c_s = dy·(v_s − y)/D, and
///
/// ```text
/// near   dw_s = w_s (dx_s + d(g_t − g_s))
/// far    dw_s = w_s d(g_t − g_s) + exp(g_t − g_s) (κ'(x_s) dx_s + dκ through its parameters)
/// ```
///
/// `Gauss` falls back to fewer nodes where the logits take fewer values than it has nodes. There the derivative is
/// that of the kernel with those fewer nodes.
pub fn attention_gradients(problem: &Problem, dy: &[f64]) -> Gradients {
    problem.check();
    let shape = problem.shape;
    let y_len = shape.query_heads * shape.queries * shape.d_value;
    assert!(dy.len() == y_len, "dy has {} elements, its sizes say {y_len}", dy.len());
    let mut gradients = Gradients {
        q: vec![0.0; problem.q.len()],
        k: vec![0.0; problem.k.len()],
        v: vec![0.0; problem.v.len()],
        slopes: vec![0.0; shape.kv_heads],
        log_gates: vec![0.0; shape.kv_heads * shape.keys],
    };
    for head in 0..shape.query_heads {
        for query in 0..shape.queries {
            let first = (head * shape.queries + query) * shape.d_value;
            add_query(problem, head, query, &dy[first..first + shape.d_value], &mut gradients);
        }
    }
    gradients
}

fn add_query(problem: &Problem, head: usize, query: usize, dy: &[f64], gradients: &mut Gradients) {
    let shape = problem.shape;
    let kv_head = problem.kv_head(head);
    let row = Row::new(problem, head, query);
    let denominator = row.denominator();
    let y: Vec<f64> = row.numerator(problem, kv_head).iter().map(|n| n / denominator).collect();

    // c_s, and the values' share. Weights and D both lack the factor exp(shift), which cancels in c_s dw_s.
    let mut c = vec![];
    for (seen, weight) in row.seen.iter().zip(&row.weights) {
        let value = problem.value(kv_head, seen.key);
        let dv = &mut gradients.v[(kv_head * shape.keys + seen.key) * shape.d_value..];
        let mut dot = 0.0;
        for e in 0..shape.d_value {
            dot += dy[e] * (value[e] - y[e]);
            dv[e] += dy[e] * weight / denominator;
        }
        c.push(dot / denominator);
    }

    // dL/dx_s and dL/d(g_t − g_s).
    let mut d_logits = vec![];
    let mut d_log_decays = vec![];
    let mut c_far = vec![];
    for (i, seen) in row.seen.iter().enumerate() {
        d_log_decays.push(c[i] * row.weights[i]);
        match &row.far {
            Some((_, kernel)) if !seen.near => {
                let c_kappa = c[i] * (seen.log_decay + kernel.log_scale() - row.shift).exp();
                d_logits.push(c_kappa * kernel.slope(seen.logit));
                c_far.push(c_kappa);
            }
            _ => d_logits.push(c[i] * row.weights[i]),
        }
    }
    if let Some((measure, kernel)) = &row.far {
        let through = kernel.through_parameters(measure, &c_far);
        let mut far = 0;
        for (i, seen) in row.seen.iter().enumerate() {
            if !seen.near {
                d_logits[i] += through.logits[far];
                d_log_decays[i] += through.log_decays[far];
                far += 1;
            }
        }
    }

    // x_s = scale · (q·k_s).
    let q = problem.query(head, query);
    let dq = &mut gradients.q[(head * shape.queries + query) * shape.d_key..];
    for (seen, d_logit) in row.seen.iter().zip(&d_logits) {
        let k = problem.key(kv_head, seen.key);
        let dk = &mut gradients.k[(kv_head * shape.keys + seen.key) * shape.d_key..];
        for i in 0..shape.d_key {
            dq[i] += problem.scale * d_logit * k[i];
            dk[i] += problem.scale * d_logit * q[i];
        }
    }

    // g_t − g_s = −m (t − s), or Σ_{s<r≤t} log f_r.
    let t = problem.position(query);
    for (seen, d_log_decay) in row.seen.iter().zip(&d_log_decays) {
        match &problem.decay {
            Decay::None => {}
            Decay::Slopes(_) => gradients.slopes[kv_head] -= d_log_decay * (t - seen.key) as f64,
            Decay::LogGates(_) => {
                for r in seen.key + 1..=t {
                    gradients.log_gates[kv_head * shape.keys + r] += d_log_decay;
                }
            }
        }
    }
}
