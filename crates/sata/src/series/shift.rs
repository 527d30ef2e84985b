//! Moving the origin of a polynomial, or of moments.

/// Rewrites Σ_p c_p (x + b)^p as Σ_p c_p x^p, in place (Horner's scheme, repeated).
pub(super) fn polynomial(c: &mut [f64], b: f64) {
    for start in 1..c.len() {
        for p in (start..c.len()).rev() {
            c[p - 1] += b * c[p];
        }
    }
}

/// Rewrites m_p = E\[x^p\] as E\[(x + b)^p\], in place: the transpose of [`polynomial`].
pub(super) fn moments(m: &mut [f64], b: f64) {
    for start in (1..m.len()).rev() {
        for p in start..m.len() {
            m[p] += b * m[p - 1];
        }
    }
}

/// Rewrites Newton's form c_0 + (y − z_0)(c_1 + (y − z_1)(c_2 + …)) as Σ_p c_p y^p, in place.
pub(super) fn newton(c: &mut [f64], z: &[f64]) {
    for start in (1..c.len()).rev() {
        for p in start..c.len() {
            c[p - 1] -= z[start - 1] * c[p];
        }
    }
}
