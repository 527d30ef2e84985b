//! Conventional softmax attention, exact, blocked and vectorised: the baseline that approximations
//! and speeds are measured against.

use crate::arch::CacheOne;
use crate::attention::{Method, Piece, Seen, Shape, direct};
use crate::{Element, Error, Level, Real, View, ViewMut, parallel};

/// Softmax attention of `q` `[batch, query_heads, queries, d_key]` over `k` and `v`, exact to
/// rounding, in blocks with a running maximum, so that no matrix of weights is stored.
///
/// `scale` is c⁻¹. If `causal`, query t sees the keys 0 ..= `offset` + t; `offset` is unused
/// otherwise.
///
/// # Errors
/// [`Error::Shape`], [`Error::NonFinite`] or [`Error::Level`], before any work.
pub fn attention<E: Element>(
    q: View<'_, E>,
    k: View<'_, E>,
    v: View<'_, E>,
    scale: f64,
    causal: bool,
    offset: usize,
    mut out: ViewMut<'_, E>,
) -> Result<(), Error> {
    let [batch, query_heads, queries, d_key] = q.shape();
    let [_, kv_heads, keys, d_value] = v.shape();
    if k.shape() != [batch, kv_heads, keys, d_key] || v.shape()[0] != batch {
        let expected = format!("q has shape {:?} and v {:?}", q.shape(), v.shape());
        return Err(Error::shape("k", &k.shape(), expected));
    }
    if kv_heads == 0 || d_key == 0 || d_value == 0 || query_heads % kv_heads != 0 {
        let expected = format!("{kv_heads} key/value heads and sizes of at least 1 must fit it");
        return Err(Error::shape("q", &q.shape(), expected));
    }
    let wants = [batch, query_heads, queries, d_value];
    if out.shape() != wants {
        return Err(Error::shape("out", &out.shape(), format!("it must be {wants:?}")));
    }
    if keys == 0 || (causal && offset.checked_add(queries).is_none_or(|end| end > keys)) {
        let expected = format!("{queries} causal queries from offset {offset} need as many keys");
        return Err(Error::shape("k", &k.shape(), expected));
    }
    if !scale.is_finite() {
        return Err(Error::Spec {
            field: "scale",
            value: scale.to_string(),
            requires: "it must be finite".into(),
        });
    }
    q.check_finite("q")?;
    k.check_finite("k")?;
    v.check_finite("v")?;
    let kernels = E::Compute::kernels(Level::detect()?, d_value, false);
    let method = Method::softmax(kernels, [d_key, d_value], scale);
    let pieces: Vec<Piece<'_, E>> = (0..batch)
        .map(|batch| Piece {
            sequence: batch,
            q_batch: batch,
            q_first: 0,
            queries,
            k_batch: batch,
            k_first: 0,
            keys,
            mask: None,
            q,
            k,
            v,
            slopes: None,
            log_gates: None,
        })
        .collect();
    let seen = if causal { Seen::Offset(offset) } else { Seen::Full };
    let shape = Shape { kv_heads, group: query_heads / kv_heads };
    direct(&method, &pieces, &out.rows(), shape, seen);
    Ok(())
}

/// One query against a KV cache of n tokens, `keys` `[n, d_key]` and `values` `[n, d_value]`,
/// split over threads: a conventional decode step. Reading the cache is all it costs, so its
/// numbers are not checked: NaN in gives NaN out.
///
/// # Errors
/// [`Error::Shape`] when lengths do not fit, [`Error::Level`] for a bad `SATA_SIMD`.
pub fn decode<T: Real>(
    query: &[T],
    keys: &[T],
    values: &[T],
    scale: f64,
    out: &mut [T],
) -> Result<(), Error> {
    let (d_key, d_value) = (query.len(), out.len());
    if d_key == 0 || d_value == 0 || keys.is_empty() || !keys.len().is_multiple_of(d_key) {
        return Err(Error::shape("keys", &[keys.len()], format!("rows of {d_key}, at least one")));
    }
    let n = keys.len() / d_key;
    if values.len() != n * d_value {
        let expected = format!("{n} keys need {n} rows of {d_value}");
        return Err(Error::shape("values", &[values.len()], expected));
    }
    let kernels = T::kernels(Level::detect()?, d_value, false);
    let query: Vec<T> = query.iter().map(|&q| q * T::from_f64(scale)).collect();
    // Short caches are not worth a second thread.
    let share = n.div_ceil(parallel::threads()).max(1 << 12);
    let mut parts: Vec<_> = (0..n)
        .step_by(share)
        .map(|first| (first..(first + share).min(n), vec![T::ZERO; d_value], T::ZERO, T::LOWEST))
        .collect();
    parallel::for_each(&mut parts, |(range, num, den, max)| {
        let mut call = CacheOne {
            query: &query,
            keys: &keys[range.start * d_key..range.end * d_key],
            values: &values[range.start * d_value..range.end * d_value],
            num,
            d_value,
            den,
            max,
        };
        // SAFETY: kernels are only handed out for instruction sets that are there.
        unsafe { (kernels.cache_one)(&mut call) };
    });
    let top = parts.iter().fold(f64::MIN, |top, part| top.max(part.3.to_f64()));
    let mut den = 0.0;
    let mut num = vec![0.0; d_value];
    for (_, part, part_den, max) in &parts {
        let weight = (max.to_f64() - top).exp();
        den += weight * part_den.to_f64();
        num.iter_mut().zip(part).for_each(|(num, part)| *num += weight * part.to_f64());
    }
    out.iter_mut().zip(num).for_each(|(out, num)| *out = T::from_f64(num / den));
    Ok(())
}
