//! One set of coefficients for all queries.

/// κ(x) = Σ_p a_p x^p.
#[derive(Clone, Debug, PartialEq)]
pub struct Polynomial {
    /// a_0, a_1, …
    pub coefficients: Vec<f64>,
}

impl Polynomial {
    /// Σ_p a_p x^p.
    pub fn value(&self, x: f64) -> f64 {
        let mut sum = 0.0;
        let mut x_to_p = 1.0;
        for a in &self.coefficients {
            sum += a * x_to_p;
            x_to_p *= x;
        }
        sum
    }

    /// Σ_{p≥1} p a_p x^{p−1}.
    pub fn slope(&self, x: f64) -> f64 {
        let mut sum = 0.0;
        let mut x_to_p_minus_1 = 1.0;
        for (p, a) in self.coefficients.iter().enumerate().skip(1) {
            sum += p as f64 * a * x_to_p_minus_1;
            x_to_p_minus_1 *= x;
        }
        sum
    }
}
