//! How the coefficients of one query are made from its per-order sums.
//!
//! With D_p = Σ_s ω_s x_s^p of a query's far logits x_s, D_p/D_0 are the exact moments of those
//! logits: their mean and deviation, and the nodes of their Gauss quadrature, come for free. All
//! of this is done once per query, so nothing here allocates for the usual numbers of terms.

mod estimate;
mod exponential;
mod gauss;
mod hermite;
mod jacobi;
mod shift;
#[cfg(test)]
mod tests;

pub(crate) use estimate::{poisson_tail, taylor_bound};

/// What a query's far logits have been found to be, and the polynomial made for them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Fit {
    /// The kernel is e^{log_scale} Σ c_p x^p; −∞ where there is no far past.
    pub log_scale: f64,
    /// Σ_p c_p D_p.
    pub denominator: f64,
    /// Mean of the true far logits; NaN where no order that tells it is held.
    pub mean: f64,
    /// Their variance; 0 where rounding leaves nothing of it, NaN where no order tells it.
    pub variance: f64,
}

/// How the coefficients of one query are made.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Rule {
    /// These coefficients a_p about the true logit, for every query.
    Fixed(Vec<f64>),
    /// e^x in value and slope at the Gauss nodes of the far logits.
    Gauss,
    /// The least-squares fit of e^x under N(μ, (tau·σ)²).
    Hermite { tau: f64 },
}

/// What rounding may have changed in sums D_p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Noise {
    /// Relative to Σ_s ω_s |x_s|^p.
    pub relative: f64,
    /// Relative to D_0 reach^p: sums of features of keys whose logits cancel are off by this much.
    pub absolute: f64,
    /// At least the largest |x|; 0 where no sums of features are among the D_p.
    pub reach: f64,
}

/// Moments kept on the stack.
const STACK: usize = 32;
/// What f64 arithmetic alone leaves uncertain, however exact the sums.
const LEAST_NOISE: f64 = 8.0 * f64::EPSILON;

impl Rule {
    /// Makes the polynomial of one query: writes c\[0..P\] such that a far key's weight is
    /// e^{log_scale} Σ_p c_p x^p.
    ///
    /// * `sums`: D_p for p < P, and for `Hermite` D_1 and D_2 in any case. Any D_p beyond these is
    ///   only looked at for the mean and variance. For `Fixed`, D_p that a state does not hold
    ///   are 0.
    /// * `noise`: the rounding errors of the D_p.
    /// * `shift`: b, where true logits are x + b. `log_scale` is then relative to e^b.
    ///
    /// Sums that are not finite, and a D_0 that is negative, give NaN.
    pub(crate) fn fit(&self, sums: &[f64], noise: Noise, shift: f64, c: &mut [f64]) -> Fit {
        let noise = Noise { relative: noise.relative.max(LEAST_NOISE), ..noise };
        match self {
            Rule::Fixed(a) => fixed(a, sums, noise, shift, c),
            Rule::Gauss => {
                let needed = c.len().min(2 * jacobi::MOST_NODES);
                let mut moments = [0.0; 2 * jacobi::MOST_NODES];
                let moments = &mut moments[..needed];
                if let Some(fit) = normalise(sums, moments, c) {
                    return fit;
                }
                let mean = moments[1];
                let variance = match sums.get(2) {
                    Some(second) => spread(mean, second / sums[0], noise),
                    None => f64::NAN,
                };
                let (log_scale, mass) = gauss::fit(moments, variance, noise, c);
                let denominator = as_summed(sums[0] * mass, c, sums);
                Fit { log_scale, denominator, mean: mean + shift, variance }
            }
            Rule::Hermite { tau } => {
                let needed = c.len().max(3);
                let (mut stack, mut heap) = ([0.0; STACK], vec![]);
                let moments = if needed <= STACK {
                    &mut stack[..needed]
                } else {
                    heap.resize(needed, 0.0);
                    &mut heap[..]
                };
                if let Some(fit) = normalise(sums, moments, c) {
                    return fit;
                }
                let mean = moments[1];
                let variance = spread(mean, moments[2], noise);
                let (log_scale, mass) = hermite::fit(moments, variance, *tau, c);
                Fit { log_scale, denominator: sums[0] * mass, mean: mean + shift, variance }
            }
        }
    }
}

/// Σ_p c_p D_p, if it is near the same number by quadrature, which is positive. The numerators are
/// sums with these coefficients and carry about the same rounding errors as this sum does: so an
/// average of equal values is that value.
fn as_summed(quadrature: f64, c: &[f64], sums: &[f64]) -> f64 {
    let sum: f64 = c.iter().zip(sums).map(|(c, sum)| c * sum).sum();
    if !(quadrature > 0.0 && quadrature.is_finite()) {
        return f64::NAN;
    }
    sum.clamp(0.5 * quadrature, 2.0 * quadrature)
}

/// Writes D_p/D_0. Gives the answer at once where there is no far past, or no answer.
fn normalise(sums: &[f64], moments: &mut [f64], c: &mut [f64]) -> Option<Fit> {
    let total = sums[0];
    if total == 0.0 {
        c.fill(0.0);
        return Some(Fit {
            log_scale: f64::NEG_INFINITY,
            denominator: 0.0,
            mean: 0.0,
            variance: 0.0,
        });
    }
    // Times 0, every number that is finite is 0, and any other NaN.
    let mut trouble = 0.0;
    for (moment, sum) in moments.iter_mut().zip(sums) {
        *moment = sum / total;
        trouble += *moment * 0.0;
    }
    if trouble == 0.0 && total > 0.0 && total < f64::INFINITY {
        return None;
    }
    c.fill(f64::NAN);
    let nan = f64::NAN;
    Some(Fit { log_scale: nan, denominator: nan, mean: nan, variance: nan })
}

/// σ² from the first two moments, or 0 where it is no more than their rounding error.
fn spread(mean: f64, second: f64, noise: Noise) -> f64 {
    let variance = second - mean * mean;
    let Noise { relative, absolute, reach } = noise;
    let error = relative * second + absolute * reach * (reach + 2.0 * mean.abs());
    if variance < 0.0 || variance <= error { 0.0 } else { variance }
}

/// Σ_p a_p (x + shift)^p as a polynomial in x.
fn fixed(a: &[f64], sums: &[f64], noise: Noise, shift: f64, c: &mut [f64]) -> Fit {
    c.copy_from_slice(a);
    if shift != 0.0 {
        shift::polynomial(c, shift);
    }
    let mut denominator = 0.0;
    let mut nothing = true;
    for (c, sum) in c.iter().zip(sums) {
        denominator += c * sum;
        nothing &= *sum == 0.0;
    }
    // An order is held where its coefficient is not 0, or where it was given on top of those.
    let moment = |p: usize| match sums.get(p) {
        Some(sum) if p >= c.len() || c[p] != 0.0 => sum / sums[0],
        _ => f64::NAN,
    };
    let log_scale = if nothing { f64::NEG_INFINITY } else { 0.0 - shift };
    let (mean, variance) = if nothing {
        (0.0, 0.0)
    } else {
        let mean = moment(0) * moment(1);
        (mean + shift, spread(mean, moment(2), noise))
    };
    Fit { log_scale, denominator, mean, variance }
}
