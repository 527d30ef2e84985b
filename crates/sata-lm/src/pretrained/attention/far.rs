//! Sums over far tokens: orders 0 and 1 of all directions of a key, 2 and 3 of the important ones.
//!
//! A key less its mean is turned, y = M(k − c), a query p = M⁻ᵀq, so that its logit is p·y and a
//! constant. With u the part of p·y in the first r directions and w the rest,
//!
//! ```text
//! e^{u+w} ≈ e^{w̄} cosh σ (G(u) + Ḡ tanh σ / σ (w − w̄))
//! ```
//!
//! where G is the cubic through e^u in value and slope at the two Gauss nodes of u's exact moments, Ḡ
//! its mean, a sum of positive numbers, and w̄ and σ² are the exact mean and variance of w: the line goes
//! through e^w at w̄ ± σ. u and w are taken to be independent, as the calibration made them. A normal w would weigh e^{σ²/2}, which few tokens with a large σ do not.

use std::sync::Arc;

use super::setting::Calibration;
use crate::pretrained::linear::{add_product, dot, times};

/// Sums of one key/value head.
#[derive(Clone, Debug)]
pub(super) struct FarSums {
    calibration: Arc<Calibration>,
    d: usize,
    rotated: usize,
    count: f64,
    /// Of y yᵀ of the directions that are not rotated, `[d − r][d − r]`.
    squares: Sum,
    /// Of features, `[features]`: 1, y, orders 2 and 3 of the first r.
    moments: Sum,
    /// Of features with values, `[features][d]`.
    values: Sum,
}

/// A sum in f32 and what rounding has left out of it.
#[derive(Clone, Debug)]
struct Sum {
    sum: Vec<f32>,
    rest: Vec<f32>,
}

impl Sum {
    fn new(len: usize) -> Self {
        Sum { sum: vec![0.0; len], rest: vec![0.0; len] }
    }

    /// Neumaier's addition.
    fn add(&mut self, more: &[f32]) {
        for ((sum, rest), &x) in self.sum.iter_mut().zip(&mut self.rest).zip(more) {
            let total = *sum + x;
            *rest += if sum.abs() >= x.abs() { (*sum - total) + x } else { (x - total) + *sum };
            *sum = total;
        }
    }

    /// The numbers to compute with.
    fn all(&self) -> Vec<f32> {
        self.sum.iter().zip(&self.rest).map(|(sum, rest)| sum + rest).collect()
    }

    fn bytes(&self) -> usize {
        8 * self.sum.len()
    }
}

/// What far tokens add to queries: weights relative to e^level.
pub(super) struct FarPart {
    /// `[rows][d]`.
    pub numerators: Vec<f32>,
    pub denominators: Vec<f32>,
    pub levels: Vec<f32>,
}

/// Monomials of orders 2 and 3 of the first elements of each row, appended to it.
fn features(rows: &[f32], d: usize, rotated: usize, weighted: bool) -> Vec<f32> {
    let count = feature_count(d, rotated);
    let mut out = Vec::with_capacity(rows.len() / d * count);
    for row in rows.chunks_exact(d) {
        out.push(1.0);
        out.extend_from_slice(row);
        let u = &row[..rotated];
        for i in 0..rotated {
            for j in i..rotated {
                let times = if weighted && i != j { 2.0 } else { 1.0 };
                out.push(times * u[i] * u[j]);
            }
        }
        for i in 0..rotated {
            for j in i..rotated {
                let pair = u[i] * u[j];
                for (k, &third) in u.iter().enumerate().skip(j) {
                    let times = match (i == j, j == k) {
                        _ if !weighted => 1.0,
                        (true, true) => 1.0,
                        (false, false) => 6.0,
                        _ => 3.0,
                    };
                    out.push(times * pair * third);
                }
            }
        }
    }
    out
}

fn squares_of(rotated: usize) -> usize {
    rotated * (rotated + 1) / 2
}

/// Features of all orders.
pub(super) fn feature_count(d: usize, rotated: usize) -> usize {
    1 + d + squares_of(rotated) + squares_of(rotated) * (rotated + 2) / 3
}

impl FarSums {
    pub(super) fn new(calibration: &Arc<Calibration>, d: usize, rotated: usize) -> Self {
        let features = feature_count(d, rotated);
        FarSums {
            calibration: calibration.clone(),
            d,
            rotated,
            count: 0.0,
            squares: Sum::new((d - rotated) * (d - rotated)),
            moments: Sum::new(features),
            values: Sum::new(features * d),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.squares.bytes() + self.moments.bytes() + self.values.bytes() + 8
    }

    /// Adds tokens.
    pub(super) fn fold(&mut self, keys: &[f32], values: &[f32]) {
        let (d, r) = (self.d, self.rotated);
        let tokens = keys.len() / d;
        let centred = self.calibration.centred(keys);
        let mut turned = vec![0.0; centred.len()];
        times(&centred, &self.calibration.keys, d, &mut turned);
        let features = features(&turned, d, r, false);
        let count = feature_count(d, r);
        // Features and values by tokens in one row each, so that sums are products.
        let by_feature = columns(&features, count);
        let by_value = columns(values, d);
        let mut sums = vec![0.0; count * d];
        times(&by_feature, &by_value, tokens, &mut sums);
        self.values.add(&sums);
        let mut moments = vec![0.0; count];
        for row in features.chunks_exact(count) {
            moments.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
        self.moments.add(&moments);
        let rest: Vec<f32> =
            turned.chunks_exact(d).flat_map(|row| row[r..].iter().copied()).collect();
        let by_direction = columns(&rest, d - r);
        let mut squares = vec![0.0; (d - r) * (d - r)];
        if d > r {
            times(&by_direction, &by_direction, tokens, &mut squares);
        }
        self.squares.add(&squares);
        self.count += tokens as f64;
    }

    /// What queries, with the scale, get of them; `None` of none.
    pub(super) fn read(&self, queries: &[f32]) -> Option<FarPart> {
        if self.count == 0.0 {
            return None;
        }
        let (d, r, n) = (self.d, self.rotated, self.count);
        let rows = queries.len() / d;
        let mut turned = vec![0.0; queries.len()];
        times(queries, &self.calibration.queries, d, &mut turned);
        let moments = self.moments.all();
        let squares = self.squares.all();
        let mut features = features(&turned, d, r, true);
        let count = feature_count(d, r);
        let second = 1 + d..1 + d + squares_of(r);
        let third = second.end..count;
        let (mut denominators, mut levels) = (vec![], vec![]);
        for ((query, p), row) in queries
            .chunks_exact(d)
            .zip(turned.chunks_exact(d))
            .zip(features.chunks_exact_mut(count))
        {
            let mean = |range: std::ops::Range<usize>| {
                f64::from(dot(&row[range.clone()], &moments[range])) / n
            };
            let cubic = Cubic::new([mean(1..1 + r), mean(second.clone()), mean(third.clone())]);
            let w_mean = mean(1 + r..1 + d);
            let mut w_square = 0.0;
            for (x, row) in p[r..].iter().zip(squares.chunks_exact((d - r).max(1))) {
                w_square += f64::from(x * dot(&p[r..], row));
            }
            let w_variance = (w_square / n - w_mean * w_mean).max(0.0);
            let constant = f64::from(dot(query, &self.calibration.centre));
            let deviation = w_variance.sqrt();
            // ln cosh σ, and tanh σ / σ.
            let rise = deviation + (0.5 + 0.5 * (-2.0 * deviation).exp()).ln();
            let slope = if deviation < 1e-4 { 1.0 } else { deviation.tanh() / deviation };
            levels.push((cubic.level + constant + w_mean + rise) as f32);
            denominators.push((n * cubic.mean) as f32);
            // The coefficients, and the mean of w, go into the features.
            row[0] = (cubic.coefficients[0] - cubic.mean * slope * w_mean) as f32;
            let scales = [
                (1..1 + r, cubic.coefficients[1]),
                (1 + r..1 + d, cubic.mean * slope),
                (second.clone(), cubic.coefficients[2]),
                (third.clone(), cubic.coefficients[3]),
            ];
            for (range, scale) in scales {
                row[range].iter_mut().for_each(|x| *x *= scale as f32);
            }
        }
        let mut numerators = vec![0.0; rows * d];
        add_product(&features, &self.values.all(), d, &mut numerators);
        Some(FarPart { numerators, denominators, levels })
    }
}

/// Columns of rows of `width`.
fn columns(rows: &[f32], width: usize) -> Vec<f32> {
    let count = rows.len() / width.max(1);
    let mut out = vec![0.0; rows.len()];
    for (t, row) in rows.chunks_exact(width.max(1)).enumerate() {
        for (c, x) in row.iter().enumerate() {
            out[c * count + t] = *x;
        }
    }
    out
}

/// e^{x − level} in value and slope at the two Gauss nodes of three moments.
struct Cubic {
    /// By order.
    coefficients: [f64; 4],
    /// E of the cubic.
    mean: f64,
    /// The larger node.
    level: f64,
}

impl Cubic {
    fn new([first, second, third]: [f64; 3]) -> Self {
        let variance = second - first * first;
        // Less than rounding leaves of it: a line through the mean.
        if variance.is_nan() || variance <= 1e-6 * (second + 1e-6) {
            let coefficients = [1.0 - first, 1.0, 0.0, 0.0];
            return Cubic { coefficients, mean: 1.0, level: first };
        }
        let deviation = variance.sqrt();
        let skewness = third - first * (3.0 * variance + first * first);
        let skewness = (skewness / (variance * deviation)).clamp(-30.0, 30.0);
        let root = (skewness * skewness + 4.0).sqrt();
        let half = 0.5 * deviation * root;
        let middle = first + 0.5 * deviation * skewness;
        let light = 2.0 / (root * (root + skewness.abs()));
        let upper = if skewness > 0.0 { light } else { 1.0 - light };
        // About the middle, with S = sinh r / r and K = (cosh r − S)/r², all times e^{−r}.
        let across = (-2.0 * half).exp();
        let cosh = 0.5 + 0.5 * across;
        let square = half * half;
        let (sinh, bend) = if half < 0.5 {
            let scale = (-half).exp();
            let s = 1.0 + square / 6.0 * (1.0 + square / 20.0 * (1.0 + square / 42.0));
            let k = 1.0 / 3.0 + square / 30.0 + square * square / 840.0 + square.powi(3) / 45_360.0;
            (s * scale, k * scale)
        } else {
            let sinh = (0.5 - 0.5 * across) / half;
            (sinh, (cosh - sinh) / square)
        };
        let about = [cosh - 0.5 * square * sinh, 0.5 * (3.0 * sinh - cosh), 0.5 * sinh, 0.5 * bend];
        let m = -middle;
        let [a, b, c, e] = about;
        let coefficients =
            [a + m * (b + m * (c + m * e)), b + m * (2.0 * c + 3.0 * m * e), c + 3.0 * m * e, e];
        Cubic { coefficients, mean: (1.0 - upper) * across + upper, level: middle + half }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cubic_is_exact_for_two_logits() {
        for (a, b, part) in [(-1.0, 2.0, 0.25), (0.3, 0.31, 0.5), (-9.0, 5.0, 0.01)] {
            let moment = |p: i32| part * f64::powi(a, p) + (1.0 - part) * f64::powi(b, p);
            let cubic = Cubic::new([moment(1), moment(2), moment(3)]);
            let at = |x: f64| cubic.coefficients.iter().rev().fold(0.0, |sum, c| sum * x + c);
            for x in [a, b] {
                let want = (x - cubic.level).exp();
                assert!((at(x) - want).abs() < 1e-6 * (1.0 + want), "{x}: {} {want}", at(x));
            }
            let want = part * (a - cubic.level).exp() + (1.0 - part) * (b - cubic.level).exp();
            assert!((cubic.mean - want).abs() < 1e-6);
        }
    }

    #[test]
    fn few_small_logits_are_weighed_as_by_exp() {
        let (d, r) = (6, 3);
        let unit: Vec<f32> = (0..d * d).map(|i| if i % (d + 1) == 0 { 1.0 } else { 0.0 }).collect();
        let calibration = Arc::new(Calibration {
            centre: vec![0.5; d],
            query: vec![0.0; d],
            metric: unit.clone(),
            keys: unit.clone(),
            queries: unit,
        });
        let number = |i: usize| ((i * 7919 % 1009) as f32 / 1009.0) - 0.5;
        let (n, mut sums) = (100, FarSums::new(&calibration, d, r));
        let keys: Vec<f32> = (0..n * d).map(number).collect();
        let values: Vec<f32> = (0..n * d).map(|i| number(i * 31 + 5)).collect();
        sums.fold(&keys[..40 * d], &values[..40 * d]);
        sums.fold(&keys[40 * d..], &values[40 * d..]);
        let query: Vec<f32> = (0..d).map(|i| number(i + 77)).collect();
        let part = sums.read(&query).unwrap();
        let weights: Vec<f64> =
            keys.chunks(d).map(|key| f64::from(dot(key, &query)).exp()).collect();
        let total: f64 = weights.iter().sum();
        let got = f64::from(part.denominators[0]) * f64::from(part.levels[0]).exp();
        // u and w are taken to be independent, which those of 100 tokens are not quite.
        assert!((got / total - 1.0).abs() < 0.03, "{got} {total}");
        for c in 0..d {
            let want: f64 =
                weights.iter().zip(values.chunks(d)).map(|(w, v)| w * f64::from(v[c])).sum::<f64>()
                    / total;
            let got = f64::from(part.numerators[c] / part.denominators[0]);
            assert!((got - want).abs() < 0.02, "{got} {want}");
        }
    }
}
