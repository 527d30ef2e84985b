//! What one query sees, and how it weighs it.

use crate::Problem;
use crate::kernel::{FarKernel, Measure};

/// The mean and deviation of one query's far logits, weighed by the decay exp(g_t − g_s).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FarMoments {
    /// μ.
    pub mean: f64,
    /// σ.
    pub deviation: f64,
}

/// A key that the query sees.
pub(crate) struct Seen {
    pub key: usize,
    /// x.
    pub logit: f64,
    /// g_t − g_s.
    pub log_decay: f64,
    pub near: bool,
}

/// All weights of one query.
pub(crate) struct Row {
    pub seen: Vec<Seen>,
    /// The far keys' logits under their normalised decays, and the kernel made for them; none without far keys.
    pub far: Option<(Measure, FarKernel)>,
    /// The logarithm of the scale taken off every weight, which leaves the output as it is.
    pub shift: f64,
    /// w_ts · exp(−shift), one per key seen.
    pub weights: Vec<f64>,
}

impl Row {
    pub fn new(problem: &Problem, head: usize, query: usize) -> Self {
        let log_decays = problem.log_decays(problem.kv_head(head), query);
        let mut seen = vec![];
        for key in 0..problem.shape.keys {
            if problem.sees(query, key) {
                seen.push(Seen {
                    key,
                    logit: problem.logit(head, query, key),
                    log_decay: log_decays[key],
                    near: problem.is_near(query, key),
                });
            }
        }

        let far_logits: Vec<f64> = seen.iter().filter(|s| !s.near).map(|s| s.logit).collect();
        let far_log_decays: Vec<f64> =
            seen.iter().filter(|s| !s.near).map(|s| s.log_decay).collect();
        let far = if far_logits.is_empty() {
            None
        } else {
            let measure = Measure::new(far_logits, &far_log_decays);
            let kernel = FarKernel::new(&problem.series, problem.terms, &measure);
            Some((measure, kernel))
        };

        // Each weight is exp(exponent) · factor.
        let mut exponents = vec![];
        let mut factors = vec![];
        for s in &seen {
            match &far {
                Some((_, kernel)) if !s.near => {
                    exponents.push(s.log_decay + kernel.log_scale());
                    factors.push(kernel.value(s.logit));
                }
                _ => {
                    exponents.push(s.log_decay + s.logit);
                    factors.push(1.0);
                }
            }
        }
        let shift = exponents.iter().copied().reduce(f64::max).unwrap_or(0.0);
        let weights = exponents.iter().zip(&factors).map(|(e, f)| (e - shift).exp() * f).collect();
        Row { seen, far, shift, weights }
    }

    pub fn moments(&self) -> Option<FarMoments> {
        self.far.as_ref().map(|(measure, _)| FarMoments {
            mean: measure.mean(),
            deviation: measure.variance().sqrt(),
        })
    }

    /// Σ_s w_ts · exp(−shift).
    pub fn denominator(&self) -> f64 {
        self.weights.iter().sum()
    }

    /// Σ_s w_ts v_s · exp(−shift).
    pub fn numerator(&self, problem: &Problem, kv_head: usize) -> Vec<f64> {
        let mut numerator = vec![0.0; problem.shape.d_value];
        for (s, weight) in self.seen.iter().zip(&self.weights) {
            let value = problem.value(kv_head, s.key);
            for e in 0..problem.shape.d_value {
                numerator[e] += weight * value[e];
            }
        }
        numerator
    }
}
