//! Dense products and norms in f32.

use gemm::Parallelism;
use rayon::prelude::*;

/// Rows of one product that are worth the second thread.
const THREADED: usize = 1 << 18;

/// `out[t][r] = Σ_c x[t][c] w[r][c]`: rows of `x` by a matrix `[rows, columns]`, or by several below
/// one another.
pub(super) fn times(x: &[f32], w: &[f32], columns: usize, out: &mut [f32]) {
    product(x, w, columns, out, false);
}

/// The same, added to `out`.
pub(super) fn add_times(x: &[f32], w: &[f32], columns: usize, out: &mut [f32]) {
    product(x, w, columns, out, true);
}

fn product(x: &[f32], w: &[f32], columns: usize, out: &mut [f32], add: bool) {
    let (tokens, rows) = (x.len() / columns, w.len() / columns);
    assert_eq!(out.len(), tokens * rows);
    if tokens == 0 || rows == 0 {
        return;
    }
    if tokens == 1 {
        return one(x, w, columns, out, add);
    }
    let work = tokens * rows * columns;
    let parallelism = if work < THREADED { Parallelism::None } else { Parallelism::Rayon(0) };
    // SAFETY: the lengths above are those of row-major matrices of these sizes.
    unsafe {
        gemm::gemm(
            tokens,
            rows,
            columns,
            out.as_mut_ptr(),
            1,
            rows as isize,
            add,
            x.as_ptr(),
            1,
            columns as isize,
            w.as_ptr(),
            columns as isize,
            1,
            if add { 1.0 } else { 0.0 },
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Adds `weights` `[rows, n]` times `values` `[n, d]` to `out` `[rows, d]`.
pub(super) fn add_product(weights: &[f32], values: &[f32], d: usize, out: &mut [f32]) {
    let (n, rows) = (values.len() / d, out.len() / d);
    assert_eq!(weights.len(), rows * n);
    if n == 0 || rows == 0 {
        return;
    }
    // SAFETY: the lengths above are those of row-major matrices of these sizes.
    unsafe {
        gemm::gemm(
            rows,
            d,
            n,
            out.as_mut_ptr(),
            1,
            d as isize,
            true,
            weights.as_ptr(),
            1,
            n as isize,
            values.as_ptr(),
            1,
            d as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// One token: every row is read once, so nothing is packed.
fn one(x: &[f32], w: &[f32], columns: usize, out: &mut [f32], add: bool) {
    let row = |(out, row): (&mut f32, &[f32])| {
        let sum = dot(x, row);
        *out = if add { *out + sum } else { sum };
    };
    if w.len() < THREADED {
        out.iter_mut().zip(w.chunks_exact(columns)).for_each(row);
    } else {
        let pairs = out.par_iter_mut().zip(w.par_chunks_exact(columns));
        pairs.with_min_len(64).for_each(row);
    }
}

/// Σ x y, in sixteen sums at once.
pub(super) fn dot(x: &[f32], y: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let (x_parts, y_parts) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest: f32 = x_parts.remainder().iter().zip(y_parts.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in x_parts.zip(y_parts) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum += x * y;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// x / √(mean x² + ε) · weight, row by row.
pub(super) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let scale = 1.0 / (dot(x, x) / width as f32 + epsilon).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }
}

/// (x − mean) / √(variance + ε) · weight + bias, row by row, in place.
pub(super) fn layer_norm(x: &mut [f32], weight: &[f32], bias: &[f32], epsilon: f32) {
    let width = weight.len();
    for x in x.chunks_exact_mut(width) {
        let mean = x.iter().sum::<f32>() / width as f32;
        x.iter_mut().for_each(|x| *x -= mean);
        let scale = 1.0 / (dot(x, x) / width as f32 + epsilon).sqrt();
        for ((x, weight), bias) in x.iter_mut().zip(weight).zip(bias) {
            *x = *x * scale * weight + bias;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_those_of_plain_loops() {
        for (tokens, rows, columns) in [(1, 1, 1), (1, 7, 33), (3, 5, 16), (130, 70, 65)] {
            let number = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 50.0;
            let x: Vec<f32> = (0..tokens * columns).map(number).collect();
            let w: Vec<f32> = (0..rows * columns).map(|i| number(i + 13)).collect();
            let mut out = vec![1.0; tokens * rows];
            add_times(&x, &w, columns, &mut out);
            for t in 0..tokens {
                for r in 0..rows {
                    let want: f32 =
                        (0..columns).map(|c| x[t * columns + c] * w[r * columns + c]).sum();
                    let got = out[t * rows + r];
                    assert!((got - 1.0 - want).abs() < 1e-4, "{got} {want}");
                }
            }
        }
    }

    #[test]
    fn norms() {
        let mut out = [0.0; 2];
        rms_norm(&[3.0, 4.0], &[1.0, 2.0], 0.0, &mut out);
        let root = 12.5f32.sqrt();
        assert!((out[0] - 3.0 / root).abs() < 1e-6 && (out[1] - 8.0 / root).abs() < 1e-6);
        let mut x = [1.0, 3.0];
        layer_norm(&mut x, &[1.0, 2.0], &[0.5, 0.0], 0.0);
        assert!((x[0] + 0.5).abs() < 1e-6 && (x[1] - 2.0).abs() < 1e-6);
    }
}
