//! How far one set of outputs is from another, absolutely and relatively.

use serde::Serialize;

/// Quantiles of |Y − Ŷ| that are reported, as fractions.
pub const QUANTILES: [f64; 6] = [0.05, 0.25, 0.5, 0.75, 0.95, 0.999];

/// Differences below this count as this, so that every one has a logarithm.
pub const SMALLEST: f64 = 1e-20;

/// Elementwise differences between outputs Ŷ and what they should be, Y.
#[derive(Clone, Debug, Serialize)]
pub struct Errors {
    /// Elements compared.
    pub elements: usize,
    /// Elements left out because Ŷ or Y is not finite there.
    pub not_finite: usize,
    /// √(Σ(Y−Ŷ)² / ΣY²).
    pub relative_rms: f64,
    /// median |Y−Ŷ| / median |Y|.
    pub relative_median: f64,
    /// median |Y|.
    pub median_output: f64,
    /// log10 |Y−Ŷ| at 5, 25, 50, 75, 95 and 99.9 %.
    pub log10_absolute: [f64; 6],
    /// log10 of the largest |Y−Ŷ|.
    pub log10_largest: f64,
}

impl Errors {
    /// Compares `got` with `want`; `None` when no element can be compared.
    pub fn new(got: impl IntoIterator<Item = f64>, want: &[f64]) -> Option<Self> {
        let mut differences = Vec::with_capacity(want.len());
        let mut sizes = Vec::with_capacity(want.len());
        let mut not_finite = 0;
        for (got, &want) in got.into_iter().zip(want) {
            if got.is_finite() && want.is_finite() {
                differences.push((got - want).abs());
                sizes.push(want.abs());
            } else {
                not_finite += 1;
            }
        }
        if differences.is_empty() {
            return None;
        }
        let square = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>();
        let relative_rms = (square(&differences) / square(&sizes)).sqrt();
        differences.sort_by(f64::total_cmp);
        sizes.sort_by(f64::total_cmp);
        let median_output = quantile(&sizes, 0.5);
        Some(Errors {
            elements: differences.len(),
            not_finite,
            relative_rms,
            relative_median: quantile(&differences, 0.5) / median_output,
            median_output,
            log10_absolute: QUANTILES.map(|q| log10(quantile(&differences, q))),
            log10_largest: log10(differences[differences.len() - 1]),
        })
    }

    /// log10 of the median |Y−Ŷ|.
    pub fn log10_median(&self) -> f64 {
        self.log10_absolute[2]
    }
}

/// log10 of a difference.
pub fn log10(difference: f64) -> f64 {
    difference.max(SMALLEST).log10()
}

/// A quantile of ascending numbers, linear between them; NaN of none.
pub fn quantile(sorted: &[f64], fraction: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let at = fraction * last as f64;
    let low = (at.floor() as usize).min(last);
    let (part, low, high) = (at - low as f64, sorted[low], sorted[(low + 1).min(last)]);
    // Infinities stay what they are instead of becoming 0·∞ or ∞ − ∞.
    if part == 0.0 || low == high { low } else { low + part * (high - low) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_interpolate() {
        assert_eq!(quantile(&[0.0, 1.0, 2.0], 0.5), 1.0);
        assert_eq!(quantile(&[0.0, 1.0], 0.25), 0.25);
        assert_eq!(quantile(&[3.0], 0.999), 3.0);
        assert!(quantile(&[], 0.5).is_nan());
        let infinite = [1.0, 2.0, f64::INFINITY, f64::INFINITY];
        assert_eq!([0.0, 1.0 / 3.0, 0.9, 1.0].map(|q| quantile(&infinite, q)), infinite);
    }

    #[test]
    fn known_errors() {
        let errors = Errors::new([1.1, 2.0, f64::NAN, -4.0], &[1.0, 2.0, 3.0, -4.4]).unwrap();
        assert_eq!((errors.elements, errors.not_finite), (3, 1));
        let rms = ((0.01f64 + 0.16) / (1.0 + 4.0 + 4.4 * 4.4)).sqrt();
        assert!((errors.relative_rms - rms).abs() < 1e-12);
        assert!((errors.relative_median - 0.1 / 2.0).abs() < 1e-12);
        assert!((errors.log10_largest - 0.4f64.log10()).abs() < 1e-12);
        assert!(Errors::new([f64::INFINITY], &[1.0]).is_none());
    }
}
