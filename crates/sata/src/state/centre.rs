//! Constant vectors taken off keys and values before they are summed.

use crate::{Element, Error, Real, View};

/// A constant vector per key/value head, taken off every key, and another, off every value.
///
/// Sums of high powers of keys that share a large mean lose digits to it: what is asked of them is
/// how the keys differ. A centre near that mean keeps the digits and changes nothing else: q·k is
/// (q·centre) + q·(k − centre), of which the first part is the same for all keys, and an average
/// of values is their centre plus an average of what is left. It is fixed when a state is made,
/// saved with it, and needs to be neither exact nor of the same text.
#[derive(Clone, Debug, PartialEq)]
pub struct Centre {
    pub(crate) kv_heads: usize,
    /// `[kv_heads][d_key]`.
    pub(crate) keys: Vec<f64>,
    /// `[kv_heads][d_value]`.
    pub(crate) values: Vec<f64>,
}

impl Centre {
    /// From vectors of `kv_heads` heads, row-major: `keys` `[kv_heads][d_key]`, `values`
    /// `[kv_heads][d_value]`.
    ///
    /// # Errors
    /// [`Error::Shape`] when a length is no multiple of the heads; [`Error::NonFinite`].
    pub fn new(kv_heads: usize, keys: &[f64], values: &[f64]) -> Result<Self, Error> {
        for (argument, x) in [("centre keys", keys), ("centre values", values)] {
            if kv_heads == 0 || x.is_empty() || x.len() % kv_heads != 0 {
                let expected = format!("it must be a vector for each of {kv_heads} heads");
                return Err(Error::shape(argument, &[x.len()], expected));
            }
            if let Some(i) = x.iter().position(|x| !x.is_finite()) {
                let width = x.len() / kv_heads;
                let index = [0, i / width, 0, i % width];
                return Err(Error::NonFinite { argument, index, value: x[i] });
            }
        }
        Ok(Centre { kv_heads, keys: keys.to_vec(), values: values.to_vec() })
    }

    /// The means over batch and tokens of `k` `[batch, kv_heads, keys, d_key]` and `v`.
    ///
    /// # Errors
    /// As for [`Centre::new`].
    pub fn mean<E: Element>(k: View<'_, E>, v: View<'_, E>) -> Result<Self, Error> {
        if k.shape()[1] != v.shape()[1] {
            let expected = format!("k has {} heads", k.shape()[1]);
            return Err(Error::shape("v", &v.shape(), expected));
        }
        Self::new(k.shape()[1], &means(k), &means(v))
    }
}

/// `[heads][dim]`: means over batch and tokens, 0 where there are none.
fn means<E: Element>(x: View<'_, E>) -> Vec<f64> {
    let [batch, heads, tokens, dim] = x.shape();
    let count = ((batch * tokens) as f64).max(1.0);
    let mut means = vec![0.0; heads * dim];
    for b in 0..batch {
        for head in 0..heads {
            for token in 0..tokens {
                for (mean, &x) in means[head * dim..].iter_mut().zip(x.row(b, head, token)) {
                    *mean += x.to_compute().to_f64() / count;
                }
            }
        }
    }
    means
}
