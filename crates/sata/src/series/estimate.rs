//! What to expect of a series, from how its logits are spread.

/// Pr\[Poisson(λ) ≥ terms\]. Its root estimates the relative error of `terms` terms fitted to
/// normal logits of variance λ, or of as many Taylor terms for logits of mean square λ.
pub(crate) fn poisson_tail(lambda: f64, terms: usize) -> f64 {
    if lambda.is_nan() {
        return f64::NAN;
    }
    if terms == 0 || lambda == f64::INFINITY {
        return 1.0;
    }
    if lambda <= 0.0 {
        return 0.0;
    }
    // The side of `terms` that does not hold the mode is summed, outwards from its largest term,
    // so that neither side is ever a small difference.
    let from = terms as f64;
    if from > lambda {
        let (mut term, mut sum, mut p) = (1.0, 0.0, from);
        while term > sum * f64::EPSILON {
            sum += term;
            p += 1.0;
            term *= lambda / p;
        }
        (ln_power_over_factorial(lambda, terms) - lambda).exp() * sum
    } else {
        let (mut term, mut sum, mut p) = (1.0, 0.0, from - 1.0);
        while term > sum * f64::EPSILON {
            sum += term;
            term *= p / lambda;
            p -= 1.0;
        }
        1.0 - (ln_power_over_factorial(lambda, terms - 1) - lambda).exp() * sum
    }
}

/// A bound on |ŷ − y| against exact exponentials, in multiples of the largest |v|, for Taylor's
/// series where no logit exceeds `reach` in magnitude: ε/(1 − ε) with ε = e^R R^P/P!.
///
/// Only for an odd number of terms, whose polynomial is positive, and only where it says
/// anything: below 1.
pub(crate) fn taylor_bound(reach: f64, terms: usize) -> Option<f64> {
    if terms.is_multiple_of(2) {
        return None;
    }
    let epsilon = (ln_power_over_factorial(reach, terms) + reach).exp();
    let bound = epsilon / (1.0 - epsilon);
    // Both false for a reach that is NaN.
    (epsilon < 1.0 && bound < 1.0).then_some(bound)
}

/// ln(x^p/p!), a logarithm so that no size of either overflows.
fn ln_power_over_factorial(x: f64, p: usize) -> f64 {
    (1..=p).map(|i| (x / i as f64).ln()).sum()
}
