//! The least-squares fit of e^x under a normal distribution.

use super::{Measure, ThroughParameters};

/// κ(x) = e^{μ+v/2} Σ_{p<P} τ^p/p! He_p((x−μ)/τ), with v = τ² = (tau·σ)² and μ, σ the far logits' mean and deviation.
///
/// H_p(u) = τ^p He_p(u/τ) is computed by H_{p+1} = u H_p − p v H_{p−1}, which needs no division by τ, so that σ = 0
/// is nothing special: there κ(μ) = e^μ. For P ≤ 2 the deviation is not among the moments that a state of P orders
/// holds; it is used here all the same.
#[derive(Clone, Debug, PartialEq)]
pub struct Hermite {
    terms: usize,
    tau: f64,
    mean: f64,
    variance: f64,
}

impl Hermite {
    /// The fit for these logits.
    pub fn new(terms: usize, tau: f64, measure: &Measure) -> Self {
        Hermite { terms, tau, mean: measure.mean(), variance: measure.variance() }
    }

    /// v = (tau·σ)².
    fn v(&self) -> f64 {
        self.tau * self.tau * self.variance
    }

    /// F_n(u) = Σ_{p<n} H_p(u)/p!.
    fn partial_sum(&self, n: usize, u: f64) -> f64 {
        let v = self.v();
        let (mut h_before, mut h) = (0.0, 1.0);
        let mut factorial = 1.0;
        let mut sum = 0.0;
        for p in 0..n {
            sum += h / factorial;
            (h_before, h) = (h, u * h - p as f64 * v * h_before);
            factorial *= (p + 1) as f64;
        }
        sum
    }

    /// μ + v/2.
    pub fn log_scale(&self) -> f64 {
        self.mean + self.v() / 2.0
    }

    /// F_P(x − μ).
    pub fn value(&self, x: f64) -> f64 {
        self.partial_sum(self.terms, x - self.mean)
    }

    /// F_{P−1}(x − μ), because H_p' = p H_{p−1}.
    pub fn slope(&self, x: f64) -> f64 {
        self.partial_sum(self.terms - 1, x - self.mean)
    }

    /// See [`FarKernel::through_parameters`](super::FarKernel::through_parameters).
    ///
    /// ∂H_p/∂v = −½ p(p−1) H_{p−2}, hence with everything divided by e^{μ+v/2}
    ///
    /// ```text
    /// ∂κ/∂μ = F_P − F_{P−1}          ∂κ/∂v = ½ (F_P − F_{P−2})
    /// dμ  = Σ_s ω_s (dx_s + (x_s−μ) dg_s)
    /// dσ² = Σ_s ω_s (2 (x_s−μ) dx_s + ((x_s−μ)² − σ²) dg_s)      where dg_s is that of g_t − g_s
    /// ```
    pub fn through_parameters(&self, measure: &Measure, c: &[f64]) -> ThroughParameters {
        let mut by_mean = 0.0;
        let mut by_v = 0.0;
        for (x, c) in measure.points.iter().zip(c) {
            let u = x - self.mean;
            let value = self.partial_sum(self.terms, u);
            by_mean += c * (value - self.partial_sum(self.terms - 1, u));
            by_v += c * 0.5 * (value - self.partial_sum(self.terms.saturating_sub(2), u));
        }
        let by_variance = self.tau * self.tau * by_v;

        let mut logits = vec![];
        let mut log_decays = vec![];
        for (x, weight) in measure.points.iter().zip(&measure.weights) {
            let u = x - self.mean;
            logits.push(weight * (by_mean + by_variance * 2.0 * u));
            log_decays.push(weight * (by_mean * u + by_variance * (u * u - self.variance)));
        }
        ThroughParameters { logits, log_decays }
    }
}
