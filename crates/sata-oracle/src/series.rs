//! Which polynomial weighs the far past.

/// The coefficients a_p of the far kernel κ(x) = Σ_p a_p x^p, P of them: `P` is [`Problem::terms`](crate::Problem).
#[derive(Clone, Debug, PartialEq)]
pub enum Series {
    /// a_p = 1/p!, the paper's (3).
    Taylor,
    /// The coefficients a_0, a_1, … themselves. Their number is P; `terms` is not read.
    Fixed(Vec<f64>),
    /// κ = x^exponent + floor. The orders are {0, exponent}; `terms` is not read.
    Power {
        /// An even number, at least 2.
        exponent: usize,
        /// The order-0 coefficient ε, which keeps the denominator positive.
        floor: f64,
    },
    /// Per query: e^x interpolated in value and slope at the P/2 Gauss nodes of the query's far logits
    /// ([`Gauss`](crate::kernel::Gauss)). P must be even.
    Gauss,
    /// Per query: the least-squares fit of e^x under N(μ, (τσ)²), with μ and σ the mean and deviation of the
    /// query's far logits ([`Hermite`](crate::kernel::Hermite)).
    Hermite {
        /// The fit's deviation over that of the logits.
        tau: f64,
    },
}

impl Series {
    /// κ = x^exponent + 10⁻³.
    pub fn power(exponent: usize) -> Self {
        Series::Power { exponent, floor: 1e-3 }
    }

    /// `Hermite` with τ = 0.9 σ.
    pub fn hermite() -> Self {
        Series::Hermite { tau: 0.9 }
    }

    /// a_0, a_1, …, with zeros for the orders a series skips, or `None` where every query has its own.
    pub fn coefficients(&self, terms: usize) -> Option<Vec<f64>> {
        match self {
            Series::Taylor => Some((0..terms).map(|p| 1.0 / factorial(p)).collect()),
            Series::Fixed(coefficients) => Some(coefficients.clone()),
            Series::Power { exponent, floor } => {
                let mut coefficients = vec![0.0; exponent + 1];
                coefficients[0] = *floor;
                coefficients[*exponent] = 1.0;
                Some(coefficients)
            }
            Series::Gauss | Series::Hermite { .. } => None,
        }
    }

    /// Panics, naming what is wrong, unless the series can be evaluated with this many terms.
    pub(crate) fn check(&self, terms: usize) {
        match self {
            Series::Taylor => assert!(terms >= 1, "terms is 0: Taylor needs at least 1"),
            Series::Fixed(coefficients) => {
                assert!(!coefficients.is_empty(), "Fixed has no coefficients");
                assert!(
                    coefficients.iter().all(|a| a.is_finite()),
                    "Fixed has a coefficient that is not finite"
                );
            }
            Series::Power { exponent, floor } => {
                assert!(
                    *exponent >= 2 && exponent % 2 == 0,
                    "Power has exponent {exponent}: it must be even and at least 2"
                );
                assert!(floor.is_finite(), "Power has floor {floor}: it must be finite");
            }
            Series::Gauss => {
                assert!(
                    terms >= 2 && terms.is_multiple_of(2),
                    "terms is {terms}: Gauss needs an even number, at least 2"
                );
            }
            Series::Hermite { tau } => {
                assert!(terms >= 1, "terms is 0: Hermite needs at least 1");
                assert!(
                    tau.is_finite() && *tau >= 0.0,
                    "Hermite has tau {tau}: it must be finite and not negative"
                );
            }
        }
    }
}

/// p!
pub(crate) fn factorial(p: usize) -> f64 {
    (1..=p).map(|i| i as f64).product()
}
