//! Symmetric matrices in f64, row-major.

/// L of L Lᵀ = a, after the least multiple of the unit matrix that makes it positive definite.
pub(super) fn cholesky(a: &[f64], d: usize) -> Vec<f64> {
    let trace: f64 = (0..d).map(|i| a[i * d + i]).sum();
    let mut ridge = (trace / d as f64 * 1e-6).max(1e-12);
    loop {
        if let Some(l) = try_cholesky(a, d, ridge) {
            return l;
        }
        ridge *= 10.0;
    }
}

fn try_cholesky(a: &[f64], d: usize, ridge: f64) -> Option<Vec<f64>> {
    // A matrix of no numbers never becomes definite: its factor is the unit matrix.
    if !ridge.is_finite() || ridge > 1e30 {
        return Some((0..d * d).map(|i| if i % (d + 1) == 0 { 1.0 } else { 0.0 }).collect());
    }
    let mut l = vec![0.0; d * d];
    for i in 0..d {
        for j in 0..=i {
            let sum: f64 = (0..j).map(|k| l[i * d + k] * l[j * d + k]).sum();
            let rest = a[i * d + j] - sum;
            if i == j {
                let rest = rest + ridge;
                if rest.is_nan() || rest <= 0.0 {
                    return None;
                }
                l[i * d + i] = rest.sqrt();
            } else {
                l[i * d + j] = rest / l[j * d + j];
            }
        }
    }
    Some(l)
}

/// L⁻¹ of a lower triangular matrix.
pub(super) fn lower_inverse(l: &[f64], d: usize) -> Vec<f64> {
    let mut inverse = vec![0.0; d * d];
    for c in 0..d {
        for i in c..d {
            let sum: f64 = (c..i).map(|k| l[i * d + k] * inverse[k * d + c]).sum();
            let unit = if i == c { 1.0 } else { 0.0 };
            inverse[i * d + c] = (unit - sum) / l[i * d + i];
        }
    }
    inverse
}

/// a b.
pub(super) fn product(a: &[f64], b: &[f64], d: usize) -> Vec<f64> {
    let mut out = vec![0.0; d * d];
    for i in 0..d {
        for k in 0..d {
            let x = a[i * d + k];
            for j in 0..d {
                out[i * d + j] += x * b[k * d + j];
            }
        }
    }
    out
}

pub(super) fn transpose(a: &[f64], d: usize) -> Vec<f64> {
    (0..d * d).map(|i| a[i % d * d + i / d]).collect()
}

/// Eigenvectors as rows, that of the largest eigenvalue first: Jacobi's rotations.
pub(super) fn eigenvectors(a: &[f64], d: usize) -> Vec<f64> {
    const SWEEPS: usize = 30;
    let mut a = a.to_vec();
    let mut rows: Vec<f64> = (0..d * d).map(|i| if i % (d + 1) == 0 { 1.0 } else { 0.0 }).collect();
    for _ in 0..SWEEPS {
        let off: f64 = (0..d * d).filter(|i| i % (d + 1) != 0).map(|i| a[i] * a[i]).sum();
        let on: f64 = (0..d).map(|i| a[i * d + i] * a[i * d + i]).sum();
        if off.is_nan() || off <= 1e-22 * on {
            break;
        }
        for p in 0..d {
            for q in p + 1..d {
                if a[p * d + q] == 0.0 {
                    continue;
                }
                let theta = (a[q * d + q] - a[p * d + p]) / (2.0 * a[p * d + q]);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let t = if theta == 0.0 { 1.0 } else { t };
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                for k in 0..d {
                    let (x, y) = (a[k * d + p], a[k * d + q]);
                    (a[k * d + p], a[k * d + q]) = (c * x - s * y, s * x + c * y);
                }
                for k in 0..d {
                    let (x, y) = (a[p * d + k], a[q * d + k]);
                    (a[p * d + k], a[q * d + k]) = (c * x - s * y, s * x + c * y);
                    let (x, y) = (rows[p * d + k], rows[q * d + k]);
                    (rows[p * d + k], rows[q * d + k]) = (c * x - s * y, s * x + c * y);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|&i, &j| a[j * d + j].total_cmp(&a[i * d + i]));
    order.iter().flat_map(|&i| rows[i * d..(i + 1) * d].to_vec()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_and_eigenvectors_give_the_matrix_back() {
        let d = 7;
        let number = |i: usize| ((i * 7919 % 1009) as f64 / 1009.0) - 0.5;
        let b: Vec<f64> = (0..d * d).map(number).collect();
        let a = product(&b, &transpose(&b, d), d);
        let l = cholesky(&a, d);
        let back = product(&l, &transpose(&l, d), d);
        assert!(a.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-4));
        let unit = product(&l, &lower_inverse(&l, d), d);
        assert!(
            (0..d * d).all(|i| (unit[i] - if i % (d + 1) == 0 { 1.0 } else { 0.0 }).abs() < 1e-6)
        );
        let rows = eigenvectors(&a, d);
        let turned = product(&product(&rows, &a, d), &transpose(&rows, d), d);
        for i in 0..d {
            for j in 0..d {
                assert!(i == j || turned[i * d + j].abs() < 1e-9);
            }
            assert!(i == 0 || turned[i * d + i] <= turned[(i - 1) * d + i - 1]);
        }
    }
}
