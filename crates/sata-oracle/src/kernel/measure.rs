//! The far logits of one query as a discrete distribution.

/// The logits x_s, each with weight ω_s = exp(g_t − g_s) / Σ_r exp(g_t − g_r).
#[derive(Clone, Debug, PartialEq)]
pub struct Measure {
    /// x_s.
    pub points: Vec<f64>,
    /// ω_s, which sum to 1.
    pub weights: Vec<f64>,
}

impl Measure {
    /// From the logits and their log decays g_t − g_s. Panics without any.
    pub fn new(points: Vec<f64>, log_decays: &[f64]) -> Self {
        assert!(!points.is_empty() && points.len() == log_decays.len());
        let largest = log_decays.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let unnormalised: Vec<f64> = log_decays.iter().map(|g| (g - largest).exp()).collect();
        let total: f64 = unnormalised.iter().sum();
        let weights = unnormalised.iter().map(|w| w / total).collect();
        Measure { points, weights }
    }

    /// Σ_s ω_s f(x_s).
    pub fn expect(&self, f: impl Fn(f64) -> f64) -> f64 {
        let mut sum = 0.0;
        for (x, w) in self.points.iter().zip(&self.weights) {
            sum += w * f(*x);
        }
        sum
    }

    /// μ = Σ ω_s x_s, taken from the first point, so that equal logits have themselves as their mean.
    pub fn mean(&self) -> f64 {
        let origin = self.points[0];
        origin + self.expect(|x| x - origin)
    }

    /// σ² = Σ ω_s (x_s − μ)².
    pub fn variance(&self) -> f64 {
        let mean = self.mean();
        self.expect(|x| (x - mean) * (x - mean))
    }
}
