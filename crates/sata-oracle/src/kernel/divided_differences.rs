//! Divided differences of the exponential function.

/// `f[z_0]`, `f[z_0, z_1]`, …, `f[z_0, …, z_m]` of f(x) = e^{x − max z}. The points may come in any order and may be
/// equal.
///
/// By Opitz's theorem they are the first row of e^A, where A has the points on its diagonal and ones above it. With
/// the least point taken off the diagonal no element of A is negative, so the series of e^{A/2^k} and the k squarings
/// only ever add: no digit is cancelled, however close the points are (McCurdy, Ng and Parlett, 1984).
pub fn exp_divided_differences(points: &[f64]) -> Vec<f64> {
    let size = points.len();
    let least = points.iter().copied().fold(f64::INFINITY, f64::min);
    let largest = points.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let span = largest - least;
    assert!(span.is_finite(), "the points span {span}");

    let mut halvings = 0;
    let mut small = 1.0;
    while (span + 1.0) * small > 0.5 {
        halvings += 1;
        small /= 2.0;
    }

    // A/2^k, A measured from the least point.
    let mut a = vec![vec![0.0; size]; size];
    for i in 0..size {
        a[i][i] = (points[i] - least) * small;
        if i + 1 < size {
            a[i][i + 1] = small;
        }
    }

    // e^{A/2^k} = Σ_j (A/2^k)^j / j!. The j-th power has its first element j places above the diagonal only at the
    // j-th term, so there must be well over `size` terms.
    let mut power = identity(size);
    let mut exponential = identity(size);
    for j in 1..size + 16 {
        power = product(&power, &a);
        for element in power.iter_mut().flatten() {
            *element /= j as f64;
        }
        for r in 0..size {
            for c in 0..size {
                exponential[r][c] += power[r][c];
            }
        }
    }

    // From the least point to the largest, before the squarings, so that nothing overflows.
    for element in exponential.iter_mut().flatten() {
        *element *= (-span * small).exp();
    }
    for _ in 0..halvings {
        exponential = product(&exponential, &exponential);
    }
    exponential.swap_remove(0)
}

fn identity(size: usize) -> Vec<Vec<f64>> {
    let mut matrix = vec![vec![0.0; size]; size];
    for i in 0..size {
        matrix[i][i] = 1.0;
    }
    matrix
}

fn product(a: &[Vec<f64>], b: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let size = a.len();
    let mut c = vec![vec![0.0; size]; size];
    for i in 0..size {
        for j in 0..size {
            for l in 0..size {
                c[i][j] += a[i][l] * b[l][j];
            }
        }
    }
    c
}
