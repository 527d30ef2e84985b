//! e^x interpolated in value and slope at the Gauss nodes of the far logits.

use super::{Noise, exponential, jacobi, shift};

/// Below this variance e^x is a line through the mean to far less than f64 resolves.
const STRAIGHT: f64 = 1e-30;

/// `moments` are E\[x^p\] for p < P (no more than the nodes can use), the variance is theirs, or 0
/// where rounding leaves nothing of it. Returns the largest node, and E of the polynomial, which
/// is Σ_i λ_i e^{ξ_i − largest}: a sum of positive numbers, where Σ_p c_p E\[x^p\] would cancel.
pub(super) fn fit(moments: &[f64], variance: f64, noise: Noise, c: &mut [f64]) -> (f64, f64) {
    let mean = moments[1];
    let count = moments.len() / 2;
    let (used, log_scale, mass) = if count == 1 || variance <= STRAIGHT {
        c[0] = 1.0 - mean;
        c[1] = 1.0;
        (2, mean, 1.0)
    } else if count == 2 {
        let skewness = skewness(moments, variance, noise);
        let (log_scale, mass) = two_nodes(mean, variance.sqrt(), skewness, c);
        (4, log_scale, mass)
    } else {
        let deviation = variance.sqrt();
        let matrix = jacobi::Matrix::new(moments, deviation, noise);
        if matrix.size() == 2 {
            let (log_scale, mass) = two_nodes(mean, deviation, matrix.diagonal()[1], c);
            (4, log_scale, mass)
        } else {
            let (log_scale, mass) = many_nodes(mean, deviation, &matrix, c);
            (2 * matrix.size(), log_scale, mass)
        }
    };
    c[used..].fill(0.0);
    (log_scale, mass)
}

/// E\[(x−μ)³\]/σ³ of four moments.
fn skewness(moments: &[f64], variance: f64, noise: Noise) -> f64 {
    let (mean, second, third) = (moments[1], moments[2], moments[3]);
    let scale = 1.0 / (variance * variance.sqrt());
    let square = mean * mean;
    let skewness = (third - mean * (3.0 * variance + square)) * scale;

    // What the rounding of the moments may have made of it, E|x|³ being at least E[x²]^{3/2}.
    let root = second.sqrt();
    let magnitude = third.abs().max(second * root)
        + mean.abs() * (3.0 * second + mean.abs() * (3.0 * root + mean.abs()));
    let reach = noise.reach;
    let unsure = noise.relative * magnitude
        + noise.absolute * reach * (reach * reach + 3.0 * mean.abs() * (reach + mean.abs()));
    jacobi::subdued(skewness, unsure * scale)
}

/// The cubic through two nodes u = σ(γ ∓ √(γ²+4))/2 from the mean.
///
/// About their midpoint, with r half their distance and y measured from there, value and slope
/// agree with e^y at ±r for
///
/// ```text
/// (C − r²S/2) + (3S − C)/2 y + S/2 y² + K/2 y³      C = cosh r, S = sinh r / r, K = (C − S)/r²
/// ```
///
/// all of it times e^{−r} here, so that nothing overflows.
fn two_nodes(mean: f64, deviation: f64, skewness: f64, c: &mut [f64]) -> (f64, f64) {
    let root = (skewness * skewness + 4.0).sqrt();
    let half = 0.5 * deviation * root;
    let middle = mean + 0.5 * deviation * skewness;
    // The node on the side of the skewness has (√(γ²+4) − |γ|)/2√(γ²+4) of the weight.
    let light = 2.0 / (root * (root + skewness.abs()));
    let upper = if skewness > 0.0 { light } else { 1.0 - light };

    let square = half * half;
    let across = (-2.0 * half).exp();
    let cosh = 0.5 + 0.5 * across;
    let (sinh, bend) = if half < 1.0 {
        // Series, for here the closed forms cancel: S = Σ r^{2k}/(2k+1)!, K = Σ (2k+2) r^{2k}/(2k+3)!.
        let scale = (-half).exp();
        let mut s = S_SERIES[S_SERIES.len() - 1];
        let mut k = K_SERIES[K_SERIES.len() - 1];
        for i in (0..S_SERIES.len() - 1).rev() {
            s = s * square + S_SERIES[i];
            k = k * square + K_SERIES[i];
        }
        (s * scale, k * scale)
    } else {
        let sinh = (0.5 - 0.5 * across) / half;
        (sinh, (cosh - sinh) / square)
    };
    c[0] = cosh - 0.5 * square * sinh;
    c[1] = 0.5 * (3.0 * sinh - cosh);
    c[2] = 0.5 * sinh;
    c[3] = 0.5 * bend;
    shift::polynomial(&mut c[..4], -middle);
    (middle + half, (1.0 - upper) * across + upper)
}

/// 1/(2k+1)!
const S_SERIES: [f64; 9] = series(false);
/// (2k+2)/(2k+3)!
const K_SERIES: [f64; 9] = series(true);

const fn series(bend: bool) -> [f64; 9] {
    let mut coefficients = [0.0; 9];
    let (mut factorial, mut k) = (1.0, 0);
    while k < 9 {
        let next = factorial * ((2 * k + 2) * (2 * k + 3)) as f64;
        coefficients[k] = if bend { (2 * k + 2) as f64 / next } else { 1.0 / factorial };
        factorial = next;
        k += 1;
    }
    coefficients
}

/// Newton's divided differences, every node twice.
fn many_nodes(mean: f64, deviation: f64, matrix: &jacobi::Matrix, c: &mut [f64]) -> (f64, f64) {
    let rule = matrix.quadrature();
    let mut points = [0.0; 2 * jacobi::MOST_NODES];
    let points = &mut points[..2 * matrix.size()];
    for (pair, node) in points.chunks_exact_mut(2).zip(rule.nodes()) {
        pair.fill(deviation * node);
    }
    let largest = points[points.len() - 1];
    let mut mass = 0.0;
    for (pair, weight) in points.chunks_exact(2).zip(rule.weights()) {
        mass += weight * (pair[0] - largest).exp();
    }

    let c = &mut c[..points.len()];
    exponential::divided_differences(points, c);
    shift::newton(c, points);
    shift::polynomial(c, -mean);
    (mean + largest, mass)
}
