//! The polynomials that weigh far keys, each with its derivatives.
//!
//! A far weight is κ(x) = exp(log_scale) · value(x). The first factor keeps the second in range where the kernel
//! follows e^x; it is 1 for coefficients that are the same for all queries.

mod divided_differences;
mod gauss;
mod hermite;
mod measure;
mod polynomial;

pub use divided_differences::exp_divided_differences;
pub use gauss::Gauss;
pub use hermite::Hermite;
pub use measure::Measure;
pub use polynomial::Polynomial;

use crate::Series;

/// The far kernel of one query.
#[derive(Clone, Debug)]
pub enum FarKernel {
    /// `Taylor`, `Fixed`, `Power`.
    Polynomial(Polynomial),
    /// `Gauss`.
    Gauss(Gauss),
    /// `Hermite`.
    Hermite(Hermite),
}

/// How a sum Σ_s c_s value(x_s), with the c_s and the arguments x_s held, follows the query's far logits through the
/// kernel's own parameters. One entry per far key each.
#[derive(Clone, Debug, PartialEq)]
pub struct ThroughParameters {
    /// By the logits that the kernel was fitted to.
    pub logits: Vec<f64>,
    /// By their log decays g_t − g_s.
    pub log_decays: Vec<f64>,
}

impl FarKernel {
    /// The kernel that a series has for a query with these far logits.
    pub fn new(series: &Series, terms: usize, measure: &Measure) -> Self {
        match series {
            Series::Gauss => FarKernel::Gauss(Gauss::new(terms / 2, measure)),
            Series::Hermite { tau } => FarKernel::Hermite(Hermite::new(terms, *tau, measure)),
            Series::Taylor | Series::Fixed(_) | Series::Power { .. } => {
                let coefficients = series.coefficients(terms).expect("the same for all queries");
                FarKernel::Polynomial(Polynomial { coefficients })
            }
        }
    }

    /// The logarithm of the factor that κ has over [`value`](Self::value).
    pub fn log_scale(&self) -> f64 {
        match self {
            FarKernel::Polynomial(_) => 0.0,
            FarKernel::Gauss(gauss) => gauss.log_scale(),
            FarKernel::Hermite(hermite) => hermite.log_scale(),
        }
    }

    /// κ(x) · exp(−log_scale).
    pub fn value(&self, x: f64) -> f64 {
        match self {
            FarKernel::Polynomial(polynomial) => polynomial.value(x),
            FarKernel::Gauss(gauss) => gauss.value(x),
            FarKernel::Hermite(hermite) => hermite.value(x),
        }
    }

    /// κ'(x) · exp(−log_scale).
    pub fn slope(&self, x: f64) -> f64 {
        match self {
            FarKernel::Polynomial(polynomial) => polynomial.slope(x),
            FarKernel::Gauss(gauss) => gauss.slope(x),
            FarKernel::Hermite(hermite) => hermite.slope(x),
        }
    }

    /// The derivatives of Σ_s c_s κ(x_s) · exp(−log_scale) through the parameters alone: the x_s under κ, and the
    /// factor exp(−log_scale), are held.
    pub fn through_parameters(&self, measure: &Measure, c: &[f64]) -> ThroughParameters {
        match self {
            FarKernel::Polynomial(_) => {
                ThroughParameters { logits: vec![0.0; c.len()], log_decays: vec![0.0; c.len()] }
            }
            FarKernel::Gauss(gauss) => gauss.through_parameters(measure, c),
            FarKernel::Hermite(hermite) => hermite.through_parameters(measure, c),
        }
    }
}
