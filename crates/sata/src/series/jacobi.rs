//! Gauss quadrature from moments.

use super::{Noise, shift};

/// More nodes than moments in f64 can tell apart.
pub(super) const MOST_NODES: usize = 16;
/// How far above its rounding error a pivot must stand.
const CLEARLY: f64 = 4.0;

/// The Jacobi matrix of standardised logits (mean 0, variance 1): the recurrence of their monic
/// orthogonal polynomials, π_{k+1}(z) = (z − α_k) π_k(z) − β_k π_{k−1}(z).
pub(super) struct Matrix {
    size: usize,
    /// α_0, α_1, …
    diagonal: [f64; MOST_NODES],
    /// β_1, β_2, … at their own index; β_0 is not one.
    beside: [f64; MOST_NODES],
}

/// Nodes, ascending, and their positive weights, which sum to 1.
pub(super) struct Quadrature {
    size: usize,
    nodes: [f64; MOST_NODES],
    weights: [f64; MOST_NODES],
}

impl Matrix {
    /// From E\[x^p\], an even number of them, at least 4. The matrix is as large as half their
    /// number, unless the logits turn out to have fewer distinct values, or the moments to be too
    /// inexact to say.
    pub(super) fn new(moments: &[f64], deviation: f64, noise: Noise) -> Self {
        let mut z = [0.0; 2 * MOST_NODES];
        let mut error = [0.0; 2 * MOST_NODES];
        standardise(moments, deviation, noise, &mut z, &mut error);

        let mut matrix = Matrix { size: 1, diagonal: [0.0; MOST_NODES], beside: [0.0; MOST_NODES] };
        let mut last_error = 0.0;
        // The coefficients of π_{k−1}, π_k and π_{k+1}.
        let (mut before, mut current) = ([0.0; MOST_NODES + 1], [0.0; MOST_NODES + 1]);
        let mut after = [0.0; MOST_NODES + 1];
        before[0] = 1.0;
        current[1] = 1.0;
        // E[π_{k−1}²], and E[z^k π_{k−1}] over it.
        let (mut norm_before, mut ratio_before) = (1.0, 0.0);
        for k in 1..moments.len() / 2 {
            let (mut norm, mut next) = (0.0, 0.0);
            for i in 0..=k {
                norm += current[i] * z[i + k];
                next += current[i] * z[i + k + 1];
            }
            // E[π_k²] is the least among monic polynomials, so to first order only the errors of
            // the moments themselves reach it, not those of π_k.
            let (mut norm_error, mut next_error, mut cross_error) = (0.0, 0.0, 0.0);
            for i in 0..=k {
                for j in 0..=k {
                    let product = (current[i] * current[j]).abs();
                    norm_error += product * error[i + j];
                    next_error += product * error[i + j + 1];
                    cross_error += (current[i] * before[j]).abs() * error[i + j];
                }
            }
            // Written so that NaN ends it too.
            if !(norm > CLEARLY * norm_error && next.is_finite()) {
                break;
            }
            let ratio = next / norm;
            let diagonal = ratio - ratio_before;
            let beside = norm / norm_before;
            // δα_k = δE[(z − α_k) π_k²]/E[π_k²] − 2 δE[π_k π_{k−1}]/E[π_{k−1}²], to first order.
            last_error =
                (next_error + diagonal.abs() * norm_error) / norm + 2.0 * cross_error / norm_before;
            matrix.diagonal[k] = diagonal;
            matrix.beside[k] = beside;
            matrix.size = k + 1;

            after[0] = -diagonal * current[0] - beside * before[0];
            for i in 1..=k + 1 {
                after[i] = current[i - 1] - diagonal * current[i] - beside * before[i];
            }
            (before, current, after) = (current, after, before);
            (norm_before, ratio_before) = (norm, ratio);
        }
        // The last α rests on the highest moment. Left to rounding errors it could put a node
        // anywhere, and e^x there would count.
        let last = matrix.size - 1;
        matrix.diagonal[last] = subdued(matrix.diagonal[last], last_error);
        matrix
    }

    /// How many nodes.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// α_0, α_1, …
    pub(super) fn diagonal(&self) -> &[f64] {
        &self.diagonal[..self.size]
    }

    /// Golub and Welsch: the nodes are the eigenvalues. One of Newton's steps on π_n makes up for
    /// what an eigenvalue near 0 of a large matrix loses; the weights are Christoffel's,
    /// 1/Σ_{k<n} π_k²/E\[π_k²\], which keep their digits however small they are.
    pub(super) fn quadrature(&self) -> Quadrature {
        let n = self.size;
        let mut nodes = self.diagonal;
        let mut offsets = [0.0; MOST_NODES];
        for k in 1..n {
            offsets[k - 1] = self.beside[k].sqrt();
        }
        eigenvalues(&mut nodes[..n], &mut offsets[..n]);
        nodes[..n].sort_unstable_by(f64::total_cmp);

        let mut weights = [0.0; MOST_NODES];
        let mut total = 0.0;
        for i in 0..n {
            let (value, slope, _) = self.last_polynomial(nodes[i]);
            let step = value / slope;
            if step.abs() < 1e-6 {
                nodes[i] -= step;
            }
            weights[i] = 1.0 / self.last_polynomial(nodes[i]).2;
            total += weights[i];
        }
        for weight in &mut weights[..n] {
            *weight /= total;
        }
        Quadrature { size: n, nodes, weights }
    }

    /// π_n(z), π_n'(z) and Σ_{k<n} π_k(z)²/E\[π_k²\].
    fn last_polynomial(&self, z: f64) -> (f64, f64, f64) {
        let (mut before, mut value) = (0.0, 1.0);
        let (mut slope_before, mut slope) = (0.0, 0.0);
        let (mut norm, mut sum) = (1.0, 0.0);
        for k in 0..self.size {
            let (diagonal, beside) = (self.diagonal[k], self.beside[k]);
            if k > 0 {
                norm *= beside;
            }
            sum += value * value / norm;
            let next = (z - diagonal) * value - beside * before;
            let next_slope = value + (z - diagonal) * slope - beside * slope_before;
            (before, value) = (value, next);
            (slope_before, slope) = (slope, next_slope);
        }
        (value, slope, sum)
    }
}

impl Quadrature {
    /// Ascending.
    pub(super) fn nodes(&self) -> &[f64] {
        &self.nodes[..self.size]
    }

    /// Of each node.
    pub(super) fn weights(&self) -> &[f64] {
        &self.weights[..self.size]
    }
}

/// A number drawn towards 0 where its error could have made it: by a second-order amount where it
/// is far larger than its error.
pub(super) fn subdued(number: f64, error: f64) -> f64 {
    let sure = number * number;
    let unsure = 4.0 * error * error;
    if unsure > 0.0 { number * (sure / (sure + unsure)) } else { number }
}

/// E\[((x−μ)/σ)^p\], and what rounding may have changed in it.
fn standardise(m: &[f64], deviation: f64, noise: Noise, z: &mut [f64], error: &mut [f64]) {
    let inverse = 1.0 / deviation;
    let width = m[2].sqrt() * inverse;
    let mut power = 1.0;
    for p in 0..m.len() {
        z[p] = m[p] * power;
        power *= inverse;
    }
    for p in 0..m.len() {
        // E|x|^p of an odd p lies between what its neighbours say.
        error[p] = match p % 2 {
            0 => z[p].abs(),
            _ if p + 1 < m.len() => (z[p - 1] * z[p + 1]).abs().sqrt(),
            _ => z[p].abs().max(z[p - 1].abs() * width),
        };
    }
    let mut reach = noise.absolute;
    for error in &mut error[..m.len()] {
        *error = noise.relative * *error + reach;
        reach *= noise.reach * inverse;
    }
    let offset = m[1] * inverse;
    shift::moments(&mut z[..m.len()], -offset);
    shift::moments(&mut error[..m.len()], offset.abs());
    (z[1], z[2]) = (0.0, 1.0);
}

/// The eigenvalues of a symmetric tridiagonal matrix, in place of its diagonal: implicit QL with
/// Wilkinson's shift. `e[i]` lies between `d[i]` and `d[i + 1]`; it is used up.
fn eigenvalues(d: &mut [f64], e: &mut [f64]) {
    let n = d.len();
    for low in 0..n {
        // Three or so rounds are usual, and thirty unheard of.
        for _ in 0..60 {
            let mut high = low;
            while high + 1 < n {
                let scale = d[high].abs() + d[high + 1].abs();
                if e[high].abs() <= f64::EPSILON * scale {
                    break;
                }
                high += 1;
            }
            if high == low {
                break;
            }
            let half = (d[low + 1] - d[low]) / (2.0 * e[low]);
            let root = (half * half + 1.0).sqrt();
            let mut g = d[high] - d[low] + e[low] / (half + root.copysign(half));
            let (mut sine, mut cosine, mut p) = (1.0, 1.0, 0.0);
            let mut split = false;
            for i in (low..high).rev() {
                let f = sine * e[i];
                let b = cosine * e[i];
                let r = (f * f + g * g).sqrt();
                e[i + 1] = r;
                if r == 0.0 {
                    d[i + 1] -= p;
                    e[high] = 0.0;
                    split = true;
                    break;
                }
                sine = f / r;
                cosine = g / r;
                g = d[i + 1] - p;
                let r = (d[i] - g) * sine + 2.0 * cosine * b;
                p = sine * r;
                d[i + 1] = g + p;
                g = cosine * r - b;
            }
            if !split {
                d[low] -= p;
                e[low] = g;
                e[high] = 0.0;
            }
        }
    }
}
