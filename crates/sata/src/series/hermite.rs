//! The least-squares fit of e^x under a normal density.

use super::shift;

/// With v = (tau·σ)² and y = x − μ, the kernel is e^{μ+v/2} Σ_{p<P} v^{p/2}/p! He_p(y/√v)
/// = e^{μ+v/2} Σ_j b_j y^j, where collecting powers of y gives
///
/// ```text
/// b_j = 1/j! Σ_{k: j+2k<P} (−v/2)^k/k!
/// ```
///
/// `moments` are E\[x^p\], of which P, and at least 3, are given; they are overwritten. Returns
/// the scale's logarithm, and E of the polynomial: possibly negative, as such fits are.
pub(super) fn fit(moments: &mut [f64], variance: f64, tau: f64, c: &mut [f64]) -> (f64, f64) {
    let terms = c.len();
    let mean = moments[1];
    let v = tau * tau * variance;

    // From the highest order downwards, one more k joins at every second one.
    let (mut power, mut partial, mut k) = (1.0, 1.0, 0.0);
    for j in (0..terms).rev() {
        if (terms - j) % 2 == 1 && j + 1 < terms {
            k += 1.0;
            power *= -0.5 * v / k;
            partial += power;
        }
        c[j] = partial;
    }
    let mut factorial = 1.0;
    for (j, c) in c.iter_mut().enumerate().skip(2) {
        factorial *= j as f64;
        *c /= factorial;
    }

    // About the mean the terms are small where the logits are; about 0 they would cancel.
    let mut mass = c[0];
    if variance > 0.0 {
        shift::moments(moments, -mean);
        moments[2] = variance;
        for j in 2..terms {
            mass += c[j] * moments[j];
        }
    }
    shift::polynomial(c, -mean);
    (mean + 0.5 * v, mass)
}
