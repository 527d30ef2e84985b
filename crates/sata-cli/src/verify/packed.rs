//! Sequences of their own lengths side by side in a batch of one.

use std::ops::Range;

use sata::Spec;
use sata_cuda::Element;

use super::inputs::{Inputs, Sizes};
use super::truth::{self, Row};
use crate::failure::Outcome;

/// Where each of some lengths begins, and where the last ends.
pub fn cumulative(lengths: &[usize]) -> Vec<usize> {
    let mut all = vec![0];
    all.extend(lengths.iter().scan(0, |sum, n| {
        *sum += n;
        Some(*sum)
    }));
    all
}

/// Tokens `range` of `[heads, all, dim]`.
fn cut<T: Copy>(x: &[T], heads: usize, dim: usize, range: &Range<usize>) -> Vec<T> {
    let all = x.len() / (heads * dim);
    (0..heads)
        .flat_map(|h| x[(h * all + range.start) * dim..(h * all + range.end) * dim].to_vec())
        .collect()
}

/// The oracle's rows of each sequence, at their places among all.
///
/// # Errors
/// For a series that the oracle does not have.
pub fn rows<E: Element>(
    spec: &Spec,
    inputs: &Inputs<E>,
    cu: &[usize],
    causal: bool,
) -> Outcome<Vec<Row>> {
    let s = inputs.sizes;
    let mut all = vec![];
    for pair in cu.windows(2) {
        let range = pair[0]..pair[1];
        let own = Inputs {
            sizes: Sizes { queries: range.len(), keys: range.len(), ..s },
            q: cut(&inputs.q, s.query_heads(), s.d_key, &range),
            k: cut(&inputs.k, s.kv_heads, s.d_key, &range),
            v: cut(&inputs.v, s.kv_heads, s.d_value, &range),
            mask: inputs.mask.as_ref().map(|mask| mask[range.clone()].to_vec()),
            slopes: inputs.slopes.clone(),
            gates: inputs.gates.as_ref().map(|gates| cut(gates, s.kv_heads, 1, &range)),
        };
        if range.is_empty() {
            continue;
        }
        all.extend(truth::rows(spec, &own, causal, None)?.into_iter().map(|row| {
            let (head, query) = (row.index / range.len(), row.index % range.len());
            Row { index: head * s.queries + range.start + query, ..row }
        }));
    }
    Ok(all)
}
