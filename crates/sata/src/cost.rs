//! What attention costs: the paper's formulas, what the operation really needs, and where the
//! fixed cost meets the growing one.
//!
//! All counts are per token and head. Multiplications and additions count one each.

use crate::basis::{features, features_of_order};

/// Elements of the hidden state of one order, the paper's (12): (d_V + 1)·m_p.
pub fn state_elements_of_order(d_key: usize, d_value: usize, p: usize) -> u128 {
    (d_value as u128 + 1).saturating_mul(features_of_order(d_key, p))
}

/// Elements of the hidden state over `orders`, the paper's (1) and (13) for orders 0 … P−1.
pub fn state_elements(d_key: usize, d_value: usize, orders: &[usize]) -> u128 {
    (d_value as u128 + 1).saturating_mul(features(d_key, orders))
}

/// FLOPs of one order as the paper prints them, (14): (4·d_V + 2p + 4)·m_p.
pub fn paper_flops_of_order(d_key: usize, d_value: usize, p: usize) -> u128 {
    (4 * d_value as u128 + 2 * p as u128 + 4).saturating_mul(features_of_order(d_key, p))
}

/// FLOPs of all orders below `terms` as the paper prints them, (2) and (15): the sum of (14).
pub fn paper_flops(d_key: usize, d_value: usize, terms: usize) -> u128 {
    (0..terms).fold(0, |sum: u128, p| sum.saturating_add(paper_flops_of_order(d_key, d_value, p)))
}

/// (2) and (15) in the paper's closed form, (4·d_V + 2(P·d_K + 1)/(d_K + 1) + 2)·D, which
/// [`paper_flops`] must equal.
pub fn paper_flops_closed(d_key: usize, d_value: usize, terms: usize) -> f64 {
    let orders: Vec<usize> = (0..terms).collect();
    let (d_k, d_v, p) = (d_key as f64, d_value as f64, terms as f64);
    (4.0 * d_v + 2.0 * (p * d_k + 1.0) / (d_k + 1.0) + 2.0) * features(d_key, &orders) as f64
}

/// FLOPs of one order by the paper's algorithm, counted again: (4·d_V + 2p + 2)·m_p, and
/// 2·d_V + 2 for order 0. The paper's (14) has two per feature too many.
pub fn corrected_flops_of_order(d_key: usize, d_value: usize, p: usize) -> u128 {
    if p == 0 {
        return 2 * d_value as u128 + 2;
    }
    (4 * d_value as u128 + 2 * p as u128 + 2).saturating_mul(features_of_order(d_key, p))
}

/// The sum of [`corrected_flops_of_order`] over orders below `terms`.
pub fn corrected_flops(d_key: usize, d_value: usize, terms: usize) -> u128 {
    (0..terms)
        .fold(0, |sum: u128, p| sum.saturating_add(corrected_flops_of_order(d_key, d_value, p)))
}

/// FLOPs of the two products with the state, 4·D·(d_V + 1): what this project's rates count,
/// features and normalisation not included.
pub fn useful_flops(d_key: usize, d_value: usize, orders: &[usize]) -> u128 {
    (4 * (d_value as u128 + 1)).saturating_mul(features(d_key, orders))
}

/// FLOPs of a feature map without symmetry: d_K^p features in place of m_p (figure 3).
pub fn naive_features_of_order(d_key: usize, p: usize) -> u128 {
    let p = u32::try_from(p).unwrap_or(u32::MAX);
    (d_key as u128).checked_pow(p).unwrap_or(u128::MAX)
}

/// Elements of a KV cache of `tokens`: n(d_K + d_V).
pub fn cache_elements(d_key: usize, d_value: usize, tokens: u128) -> u128 {
    (d_key as u128 + d_value as u128).saturating_mul(tokens)
}

/// FLOPs of conventional attention against `tokens` as the paper's text counts them:
/// n(2·d_K + 2·d_V + 3).
pub fn conventional_flops(d_key: usize, d_value: usize, tokens: u128) -> u128 {
    (2 * d_key as u128 + 2 * d_value as u128 + 3).saturating_mul(tokens)
}

/// FLOPs of conventional attention against `tokens` as the paper's public code counts them: 6·n·d
/// (for d_K = d_V = d).
pub fn conventional_flops_of_public_code(d: usize, tokens: u128) -> u128 {
    (6 * d as u128).saturating_mul(tokens)
}

/// Tokens from which a KV cache holds more elements than the state.
pub fn break_even_memory(d_key: usize, d_value: usize, orders: &[usize]) -> u128 {
    state_elements(d_key, d_value, orders).div_ceil((d_key as u128 + d_value as u128).max(1))
}

/// Tokens from which one decode step of conventional attention takes more FLOPs, by the paper's
/// count of both.
pub fn break_even_flops(d_key: usize, d_value: usize, terms: usize) -> u128 {
    let one = conventional_flops(d_key, d_value, 1);
    paper_flops(d_key, d_value, terms).div_ceil(one)
}

/// FLOPs for a query to weigh one key by the polynomial: logit, Horner, weighted sum.
pub fn direct_flops(d_key: usize, d_value: usize, terms: usize) -> u128 {
    2 * d_key as u128 + 2 * (d_value as u128 + 1) + 2 * terms as u128
}

/// Bytes of one head's far sums with elements of `bytes`, with and without the compensation that
/// f32 sums carry.
pub fn state_bytes(
    d_key: usize,
    d_value: usize,
    orders: &[usize],
    bytes: usize,
    compensated: bool,
) -> u128 {
    let elements = state_elements(d_key, d_value, orders).saturating_mul(bytes as u128);
    if compensated { elements.saturating_mul(2) } else { elements }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closed_form_is_the_sum() {
        for d in [1, 2, 8, 16, 33, 64] {
            for terms in 1..7 {
                let sum = paper_flops(d, d + 3, terms) as f64;
                let closed = paper_flops_closed(d, d + 3, terms);
                assert!((sum - closed).abs() <= 1e-9 * sum, "d = {d}, P = {terms}");
            }
        }
    }

    #[test]
    fn errata_of_15() {
        // What DESIGN says (15) is high by, in percent.
        for (d, percent) in [(8, 5.3), (16, 2.8), (32, 1.5), (64, 0.8)] {
            let excess = paper_flops(d, d, 4) as f64 / corrected_flops(d, d, 4) as f64 - 1.0;
            assert!((100.0 * excess - percent).abs() < 0.06, "d = {d}: {excess}");
        }
    }

    #[test]
    fn break_even_of_the_papers_heads() {
        for (d, tokens) in [(8, 93), (16, 515), (32, 3375), (64, 24327)] {
            assert!(break_even_memory(d, d, &[0, 1, 2, 3]).abs_diff(tokens) <= 1);
        }
    }
}
