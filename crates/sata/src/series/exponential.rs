//! Divided differences of the exponential function.

/// The largest span of points over which one power series is summed.
const STRIDE: f64 = 16.0;

/// `f[z_0]`, `f[z_0, z_1]`, …, `f[z_0, …, z_m]` of f(z) = e^{z − z_m}, for ascending points z,
/// equal ones included.
///
/// They are the first row of e^A, A with the points on its diagonal and ones beside it (Opitz).
/// Measured from the least point no element of A is negative, so the row's power series only
/// ever adds: no digit is cancelled, however close the points are. A long span is walked in
/// strides, each a multiplication of the row by the same e^{A/strides}.
pub(super) fn divided_differences(z: &[f64], row: &mut [f64]) {
    let least = z[0];
    let last = z.len() - 1;
    let span = z[last] - least;
    let strides = (span / STRIDE).ceil().max(1.0);
    let stride = 1.0 / strides;
    let shrink = (-span * stride).exp();
    // Terms after which no point's series still grows.
    let enough = last as f64 + span * stride;

    let mut term = [0.0; 2 * super::jacobi::MOST_NODES];
    let term = &mut term[..z.len()];
    row.fill(0.0);
    row[0] = 1.0;
    let mut walked = 0.0;
    while walked < strides {
        term.copy_from_slice(row);
        let mut j = 1.0;
        loop {
            let factor = stride / j;
            let mut settled = true;
            for i in (1..=last).rev() {
                term[i] = (term[i] * (z[i] - least) + term[i - 1]) * factor;
                row[i] += term[i];
                settled &= term[i] <= 0.25 * f64::EPSILON * row[i];
            }
            // The least point is 0 itself.
            term[0] = 0.0;
            // A number that is not finite never settles.
            if (settled && j > enough) || j > enough + 200.0 {
                break;
            }
            j += 1.0;
        }
        for element in row.iter_mut() {
            *element *= shrink;
        }
        walked += 1.0;
    }
}
