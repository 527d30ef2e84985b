//! Softmax attention, which the operation approximates.

use crate::{Output, Problem};

/// y_t = Σ_s exp(g_t − g_s + x_ts) v_s / Σ_s exp(g_t − g_s + x_ts), with the largest exponent taken off first.
///
/// Reads the problem's data, visibility and decay. `series`, `terms`, `near`, `block` and `sinks` change nothing
/// here, and no key is far.
pub fn softmax_attention(problem: &Problem) -> Output {
    problem.check();
    let shape = problem.shape;
    let mut output = Output::default();
    for head in 0..shape.query_heads {
        let kv_head = problem.kv_head(head);
        for query in 0..shape.queries {
            let log_decays = problem.log_decays(kv_head, query);
            let mut keys = vec![];
            let mut exponents = vec![];
            for key in 0..shape.keys {
                if problem.sees(query, key) {
                    keys.push(key);
                    exponents.push(log_decays[key] + problem.logit(head, query, key));
                }
            }
            let shift = exponents.iter().copied().reduce(f64::max).unwrap_or(0.0);

            let mut denominator = 0.0;
            let mut numerator = vec![0.0; shape.d_value];
            for (&key, exponent) in keys.iter().zip(&exponents) {
                let weight = (exponent - shift).exp();
                denominator += weight;
                let value = problem.value(kv_head, key);
                for e in 0..shape.d_value {
                    numerator[e] += weight * value[e];
                }
            }
            output.push(&numerator, denominator, shift, None);
        }
    }
    output
}
