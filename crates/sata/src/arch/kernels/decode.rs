//! One query at a time: memory is read once, in order, at the speed it comes.

use super::{DECODE_SCRATCH, How, PANEL, ReadOne, TOKENS, WeighOne};
use crate::Real;
use crate::arch::prefetch;
use crate::arch::vector::{Vector, exp};
use crate::basis::{Basis, Tile};

/// `num += Σ_r w[r] · rows[r]` for rows of `columns` (at least one) elements; asks for the line
/// that lies `ahead` bytes from each vector it reads.
///
/// # Safety
/// `w` holds `count` weights, `rows` `count` rows and one vector beyond, `num` whole vectors.
#[inline(always)]
unsafe fn add_rows<V: Vector>(
    w: *const V::Elem,
    rows: *const V::Elem,
    count: usize,
    columns: usize,
    num: *mut V::Elem,
    ahead: isize,
) {
    let vectors = columns.div_ceil(V::LANES);
    let mut n = 0;
    // SAFETY: forwarded.
    unsafe {
        while n < vectors {
            let (rows, num) = (rows.add(n * V::LANES), num.add(n * V::LANES));
            n += match vectors - n {
                1 => {
                    add_columns::<V, 1, 8>(w, rows, count, columns, num, ahead);
                    1
                }
                2 | 3 => {
                    add_columns::<V, 2, 4>(w, rows, count, columns, num, ahead);
                    2
                }
                _ => {
                    add_columns::<V, 4, 2>(w, rows, count, columns, num, ahead);
                    4
                }
            };
        }
    }
}

/// N vectors wide, U rows at a time: U·N independent sums hide the latency of the additions.
#[inline(always)]
unsafe fn add_columns<V: Vector, const N: usize, const U: usize>(
    w: *const V::Elem,
    rows: *const V::Elem,
    count: usize,
    stride: usize,
    num: *mut V::Elem,
    ahead: isize,
) {
    // SAFETY: forwarded.
    unsafe {
        let mut acc = [[V::splat(Real::from_f64(0.0)); N]; U];
        let mut r = 0;
        while r + U <= count {
            for (u, acc) in acc.iter_mut().enumerate() {
                let weight = V::splat(*w.add(r + u));
                for (n, acc) in acc.iter_mut().enumerate() {
                    let row = rows.add((r + u) * stride + n * V::LANES);
                    prefetch(row.wrapping_byte_offset(ahead));
                    let row = V::load(row);
                    *acc = weight.mul_add(row, *acc);
                }
            }
            r += U;
        }
        while r < count {
            let weight = V::splat(*w.add(r));
            for (n, acc) in acc[0].iter_mut().enumerate() {
                let row = V::load(rows.add(r * stride + n * V::LANES));
                *acc = weight.mul_add(row, *acc);
            }
            r += 1;
        }
        for n in 0..N {
            let mut total = V::load(num.add(n * V::LANES));
            for acc in &acc {
                total = total.add(acc[n]);
            }
            total.store(num.add(n * V::LANES));
        }
    }
}

/// The features of one tile for one query: lanes run over the last index.
///
/// # Safety
/// `query` has a vector beyond d_key, `features` one beyond a tile; `stack` has a place per order.
#[inline(always)]
unsafe fn features_of_one<V: Vector>(
    basis: &Basis,
    tile: &Tile,
    query: &[V::Elem],
    features: &mut [V::Elem],
    stack: *mut V::Elem,
) {
    if tile.order == 0 {
        features[0] = V::Elem::ONE;
        return;
    }
    let width = tile.order - 1;
    // SAFETY: indices are below d_key; first + len ≤ d_key and f + len ≤ TILE, and there is a
    // vector beyond either. What is written beyond is overwritten or unused.
    unsafe {
        let query = query.as_ptr();
        let mut to = features.as_mut_ptr();
        let mut indices = basis.prefixes().as_ptr().add(tile.prefixes);
        for run in basis.runs().get_unchecked(tile.runs.clone()) {
            let keep = run.keep as usize;
            let mut prefix = if keep == 0 { V::Elem::ONE } else { *stack.add(keep - 1) };
            for level in keep..width {
                prefix = prefix * *query.add(*indices.add(level) as usize);
                *stack.add(level) = prefix;
            }
            indices = indices.add(width);
            let prefix = V::splat(prefix);
            let from = query.add(run.first as usize);
            let len = run.len as usize;
            let mut i = 0;
            while i < len {
                V::load(from.add(i)).mul(prefix).store(to.add(i));
                i += V::LANES;
            }
            to = to.add(len);
        }
    }
}

/// See [`ReadOne`].
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(in crate::arch) unsafe fn read_one<V: Vector>(a: &mut ReadOne<'_, V::Elem>) {
    let basis = a.basis;
    let padded = a.d_value.next_multiple_of(V::LANES);
    let planes = a.planes.iter().max().map_or(1, |last| last + 1);
    assert!(a.query.len() >= basis.d_key() + V::LANES);
    assert!(a.num.len() >= planes * padded && a.den.len() >= planes);
    assert!(a.planes.is_empty() || a.planes.len() >= a.coefficients.len());
    assert!(a.sums.len() >= basis.len() * a.d_value + V::LANES);
    assert!(a.z.len() >= basis.len() + V::LANES);
    assert!(a.scratch.len() >= DECODE_SCRATCH + basis.orders().last().copied().unwrap_or(0));
    let multiplicities = V::Elem::multiplicities(basis);
    let (features, stack) = a.scratch.split_at_mut(DECODE_SCRATCH);
    for tile in basis.tiles() {
        let coefficient = a.coefficients.get(tile.order).copied().unwrap_or_default();
        if coefficient == V::Elem::ZERO {
            continue;
        }
        let plane = a.planes.get(tile.order).copied().unwrap_or(0);
        // SAFETY: lengths were checked above: `features` has a tile and a vector, `stack` a place
        // per order.
        unsafe { features_of_one::<V>(basis, tile, a.query, features, stack.as_mut_ptr()) };
        // Weights: features times multiplicity and coefficient; zero beyond the tile.
        let multiplicities = &multiplicities[tile.start..tile.start + tile.len];
        for (x, &m) in features.iter_mut().zip(multiplicities) {
            *x = *x * (m * coefficient);
        }
        features[tile.len..tile.len + V::LANES].fill(V::Elem::ZERO);
        // SAFETY: lengths were checked above.
        unsafe {
            let mut total = V::splat(V::Elem::ZERO);
            let mut at = 0;
            while at < tile.len {
                let w = V::load(features.as_ptr().add(at));
                let z = V::load(a.z.as_ptr().add(tile.start + at));
                total = w.mul_add(z, total);
                at += V::LANES;
            }
            a.den[plane] += total.sum();
            add_rows::<V>(
                features.as_ptr(),
                a.sums.as_ptr().add(tile.start * a.d_value),
                tile.len,
                a.d_value,
                a.num.as_mut_ptr().add(plane * padded),
                a.ahead,
            );
        }
    }
}

/// See [`WeighOne`].
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(in crate::arch) unsafe fn weigh_one<V: Vector>(a: &mut WeighOne<'_, V::Elem>, d_key: usize) {
    let padded = a.d_value.next_multiple_of(V::LANES);
    assert!(a.count <= a.ld && a.ld.is_multiple_of(V::LANES));
    assert!(a.query.len() >= d_key && a.keys.len() >= (d_key + 1) * a.ld);
    assert!(a.values.len() >= a.count * a.d_value + V::LANES);
    assert!(a.fading.is_empty() || a.fading.len() >= a.ld);
    assert!(a.num.len() >= padded || matches!(a.how, How::Moments(_)));
    assert!(a.scratch.len() >= PANEL && !a.den.is_empty());
    let mut s = 0;
    while s < a.count {
        let step = (a.count - s).min(PANEL);
        let (weights, _) = a.scratch.split_at_mut(PANEL);
        // SAFETY: the lengths were checked just now; vectors stay within ld, a whole number of
        // them.
        unsafe {
            let whole = step.next_multiple_of(V::LANES);
            let mut at = 0;
            while at < whole {
                let column = a.keys.as_ptr().add(s + at);
                let mut x = V::splat(V::Elem::ZERO);
                for (i, &q) in a.query[..d_key].iter().enumerate() {
                    x = V::splat(q).mul_add(V::load(column.add(i * a.ld)), x);
                }
                x.store(weights.as_mut_ptr().add(at));
                at += V::LANES;
            }
            let mask = a.keys.as_ptr().add(d_key * a.ld + s);
            let fading = (!a.fading.is_empty()).then(|| a.fading.as_ptr().add(s));
            match &mut a.how {
                How::Polynomial(coefficients) => {
                    polynomial_one::<V>(weights, whole, coefficients, mask, fading);
                }
                How::Exponential(max) => {
                    let before = **max;
                    **max = exponential_one::<V>(weights, whole, before, mask, fading);
                    let mut shrink = [V::Elem::ZERO; TOKENS];
                    exp(V::splat(before).sub(V::splat(**max))).store(shrink.as_mut_ptr());
                    let shrink = shrink[0];
                    if shrink != V::Elem::ONE {
                        a.den[0] = a.den[0] * shrink;
                        a.num[..padded].iter_mut().for_each(|x| *x = *x * shrink);
                    }
                }
                How::Moments(orders) => {
                    moments_one::<V>(weights, whole, orders, mask, fading, a.den);
                    s += step;
                    continue;
                }
            }
            let mut total = V::splat(V::Elem::ZERO);
            let mut at = 0;
            while at < whole {
                total = total.add(V::load(weights.as_ptr().add(at)));
                at += V::LANES;
            }
            a.den[0] += total.sum();
            add_rows::<V>(
                weights.as_ptr(),
                a.values.as_ptr().add(s * a.d_value),
                step,
                a.d_value,
                a.num.as_mut_ptr(),
                0,
            );
        }
        s += step;
    }
}

/// A vector of keys' weights and decays.
///
/// # Safety
/// There are that many.
#[inline(always)]
unsafe fn weight_one<V: Vector>(
    mask: *const V::Elem,
    fading: Option<*const V::Elem>,
    at: usize,
) -> V {
    // SAFETY: forwarded.
    unsafe {
        let weight = V::load(mask.add(at));
        match fading {
            Some(fading) => {
                let zero = V::splat(V::Elem::ZERO);
                let lost = zero.sub(V::load(fading.add(at))).max(zero);
                weight.mul(exp(zero.sub(lost)))
            }
            None => weight,
        }
    }
}

/// Logits become weights.
///
/// # Safety
/// All are `whole` long, a multiple of the lanes.
#[inline(always)]
unsafe fn polynomial_one<V: Vector>(
    x: &mut [V::Elem],
    whole: usize,
    coefficients: &[V::Elem],
    mask: *const V::Elem,
    fading: Option<*const V::Elem>,
) {
    let Some((&top, rest)) = coefficients.split_last() else {
        return;
    };
    let mut at = 0;
    while at < whole {
        // SAFETY: forwarded.
        unsafe {
            let to = x.as_mut_ptr().add(at);
            let x = V::load(to);
            let mut w = V::splat(top);
            for &c in rest.iter().rev() {
                w = w.mul_add(x, V::splat(c));
            }
            w.mul(weight_one(mask, fading, at)).store(to);
        }
        at += V::LANES;
    }
}

/// Logits become weights exp(x − max) for the larger of `max` and the largest of them, which is
/// returned; those of keys that weigh 0 become 0.
///
/// # Safety
/// All are `whole` long, a multiple of the lanes.
#[inline(always)]
unsafe fn exponential_one<V: Vector>(
    x: &mut [V::Elem],
    whole: usize,
    max: V::Elem,
    mask: *const V::Elem,
    fading: Option<*const V::Elem>,
) -> V::Elem {
    let (one, lowest) = (V::Elem::ONE, V::Elem::LOWEST);
    // SAFETY: forwarded.
    unsafe {
        let mut top = V::splat(max);
        let mut at = 0;
        while at < whole {
            let to = x.as_mut_ptr().add(at);
            let mut x = V::load(to);
            if let Some(fading) = fading {
                x = x.add(V::load(fading.add(at)));
            }
            // A key of weight 0 is the lowest there is: 0·x − (0 − 1)·lowest.
            let weight = V::load(mask.add(at));
            let hidden = V::splat(one).sub(weight).mul(V::splat(lowest));
            let x = weight.mul_add(x, hidden);
            x.store(to);
            top = top.max(x);
            at += V::LANES;
        }
        let mut lanes = [lowest; TOKENS];
        top.store(lanes.as_mut_ptr());
        // Written so that NaN stays.
        let top = lanes[..V::LANES].iter().fold(max, |top, &x| if x <= top { top } else { x });
        let mut at = 0;
        while at < whole {
            let to = x.as_mut_ptr().add(at);
            let w = exp(V::load(to).sub(V::splat(top)));
            w.mul(V::load(mask.add(at))).store(to);
            at += V::LANES;
        }
        top
    }
}

/// Adds Σ w x^p to `den`, for each of the ascending orders p.
///
/// # Safety
/// All are `whole` long, a multiple of the lanes.
#[inline(always)]
unsafe fn moments_one<V: Vector>(
    x: &[V::Elem],
    whole: usize,
    orders: &[usize],
    mask: *const V::Elem,
    fading: Option<*const V::Elem>,
    den: &mut [V::Elem],
) {
    let mut at = 0;
    while at < whole {
        // SAFETY: forwarded.
        unsafe {
            let x = V::load(x.as_ptr().add(at));
            let mut w: V = weight_one(mask, fading, at);
            let mut p = 0;
            for (&order, den) in orders.iter().zip(den.iter_mut()) {
                while p < order {
                    w = w.mul(x);
                    p += 1;
                }
                *den += w.sum();
            }
        }
        at += V::LANES;
    }
}
