//! Conventional decode: one query against a KV cache, for comparison.

use super::{CacheOne, TOKENS};
use crate::Real;
use crate::arch::vector::{Vector, exp};

/// Keys weighed at a time.
const TILE: usize = 64;

/// See [`CacheOne`].
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(in crate::arch) unsafe fn cache_one<V: Vector>(a: &mut CacheOne<'_, V::Elem>) {
    let (d_key, d_value) = (a.query.len(), a.d_value);
    let count = a.keys.len() / d_key;
    assert!(a.values.len() >= count * d_value && a.num.len() >= d_value);
    let mut weights = [V::Elem::ZERO; TILE + TOKENS];
    let mut first = 0;
    while first < count {
        let n = TILE.min(count - first);
        for (s, x) in weights[..n].iter_mut().enumerate() {
            let key = &a.keys[(first + s) * d_key..][..d_key];
            // SAFETY: `dot` reads d_key elements of either.
            *x = unsafe { dot::<V>(a.query, key) };
        }
        let top = weights[..n].iter().fold(*a.max, |top, &x| if x > top { x } else { top });
        weights[n..].fill(top);
        // SAFETY: whole vectors within the array, which has a vector to spare.
        let shrink = unsafe {
            let shift = V::splat(top);
            let mut at = 0;
            while at < n {
                exp(V::load(weights.as_ptr().add(at)).sub(shift))
                    .store(weights.as_mut_ptr().add(at));
                at += V::LANES;
            }
            let mut one = [V::Elem::ZERO; TOKENS];
            exp(V::splat(*a.max).sub(shift)).store(one.as_mut_ptr());
            one[0]
        };
        *a.max = top;
        *a.den = *a.den * shrink;
        a.num[..d_value].iter_mut().for_each(|x| *x = *x * shrink);
        for (s, &w) in weights[..n].iter().enumerate() {
            *a.den += w;
            let value = &a.values[(first + s) * d_value..][..d_value];
            // SAFETY: `add_scaled` touches d_value elements of either.
            unsafe { add_scaled::<V>(w, value, &mut a.num[..d_value]) };
        }
        first += n;
    }
}

#[inline(always)]
unsafe fn dot<V: Vector>(a: &[V::Elem], b: &[V::Elem]) -> V::Elem {
    let n = a.len().min(b.len());
    let whole = n - n % V::LANES;
    let mut at = 0;
    // SAFETY: whole vectors below n.
    let mut total = unsafe {
        let mut sum = V::splat(V::Elem::ZERO);
        while at < whole {
            sum = V::load(a.as_ptr().add(at)).mul_add(V::load(b.as_ptr().add(at)), sum);
            at += V::LANES;
        }
        sum.sum()
    };
    for i in whole..n {
        total += a[i] * b[i];
    }
    total
}

#[inline(always)]
unsafe fn add_scaled<V: Vector>(w: V::Elem, from: &[V::Elem], to: &mut [V::Elem]) {
    let n = from.len().min(to.len());
    let whole = n - n % V::LANES;
    let mut at = 0;
    // SAFETY: whole vectors below n.
    unsafe {
        let weight = V::splat(w);
        while at < whole {
            let to = to.as_mut_ptr().add(at);
            weight.mul_add(V::load(from.as_ptr().add(at)), V::load(to)).store(to);
            at += V::LANES;
        }
    }
    for i in whole..n {
        to[i] += w * from[i];
    }
}
