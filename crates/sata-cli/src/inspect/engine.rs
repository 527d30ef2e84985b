//! The engine's outputs for the sampled queries of one head.

use sata::{Call, Diagnostics, Plan, Real, View, ViewMut};

use super::head::Head;
use super::sample::Sample;
use crate::tensors::Number;

/// Outputs, and what their denominators were like.
#[derive(Clone, Debug)]
pub struct Outputs {
    /// Of the sampled queries, `[queries][d_value]`.
    pub rows: Vec<f64>,
    /// Queries whose denominators were counted: all from the sample's first token on when causal,
    /// otherwise the sampled ones.
    pub counted: u64,
    /// Those that are zero or negative.
    pub non_positive: u64,
    /// Those that are not finite.
    pub non_finite: u64,
}

/// Runs a plan over one head.
///
/// # Errors
/// What the engine refuses.
pub fn engine<E: Number>(
    plan: &Plan,
    head: &Head<'_, E>,
    causal: bool,
    sample: &Sample,
) -> Result<Outputs, sata::Error> {
    let [queries, keys, d_key, d_value] = head.sizes;
    if !causal {
        let mut q = Vec::with_capacity(sample.positions.len() * d_key);
        for &t in &sample.positions {
            q.extend_from_slice(&head.q[t * d_key..][..d_key]);
        }
        let head = Head { q: &q, sizes: [sample.positions.len(), keys, d_key, d_value], ..*head };
        let (rows, seen) = run(plan, &head, false)?;
        return Ok(Outputs {
            rows: E::wrap(rows).to_f64(),
            counted: seen.queries,
            non_positive: seen.non_positive,
            non_finite: seen.non_finite,
        });
    }
    let (y, seen) = run(plan, head, true)?;
    // The queries before the first one looked at are counted apart, to be taken off.
    let before = match sample.from {
        0 => Diagnostics::default(),
        from => {
            let sizes = [from, from, d_key, d_value];
            let head = Head {
                q: &head.q[..from * d_key],
                k: &head.k[..from * d_key],
                v: &head.v[..from * d_value],
                sizes,
            };
            run(plan, &head, true)?.1
        }
    };
    let rows = sample.positions.iter().flat_map(|&t| y[t * d_value..][..d_value].iter().copied());
    Ok(Outputs {
        rows: E::wrap(rows.collect()).to_f64(),
        counted: (queries - sample.from) as u64,
        non_positive: seen.non_positive.saturating_sub(before.non_positive),
        non_finite: seen.non_finite.saturating_sub(before.non_finite),
    })
}

fn run<E: Number>(
    plan: &Plan,
    head: &Head<'_, E>,
    causal: bool,
) -> Result<(Vec<E>, Diagnostics), sata::Error> {
    let [queries, keys, d_key, d_value] = head.sizes;
    let q = View::new(head.q, [1, 1, queries, d_key])?;
    let k = View::new(head.k, [1, 1, keys, d_key])?;
    let v = View::new(head.v, [1, 1, keys, d_value])?;
    let call = if causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
    let mut y = vec![E::from_compute(<E::Compute as Real>::ZERO); queries * d_value];
    let seen = plan.run(call, ViewMut::new(&mut y, [1, 1, queries, d_value])?)?;
    Ok((y, seen))
}
