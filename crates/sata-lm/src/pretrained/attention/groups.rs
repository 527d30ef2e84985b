//! Groups of tokens with similar keys, one mean key and value each.

use super::setting::Calibration;
use crate::pretrained::linear::{dot, times};

/// Groups of one key/value head.
#[derive(Clone, Debug, Default)]
pub(super) struct Groups {
    /// Tokens of each.
    pub counts: Vec<f32>,
    /// What merging it costs, a sum over its tokens.
    weights: Vec<f32>,
    /// How far back, see [`Reach::age`](crate::pretrained::rotary::Reach::age).
    pub back: Vec<f32>,
    /// Mean keys, `[groups][d]`.
    pub keys: Vec<f32>,
    /// Mean values, `[groups][d]`.
    pub values: Vec<f32>,
}

/// A pair's cost that is never least.
const NEVER: f32 = f32::INFINITY;

impl Groups {
    /// How many.
    pub(super) fn len(&self) -> usize {
        self.counts.len()
    }

    /// Takes tokens in, each alone, and merges until there are at most `most`.
    pub(super) fn fold(
        &mut self,
        [keys, values, back]: [&[f32]; 3],
        most: usize,
        d: usize,
        calibration: Option<&Calibration>,
    ) {
        self.keys.extend_from_slice(keys);
        self.values.extend_from_slice(values);
        self.back.extend_from_slice(back);
        self.counts.resize(self.keys.len() / d, 1.0);
        for key in keys.chunks_exact(d) {
            self.weights.push(importance(key, calibration));
        }
        self.merge_to(most.max(1), d, calibration);
    }

    /// Ward's method: the pair whose merging adds least to Σ weight · (expected squared difference of
    /// logits from the group's mean) is merged first.
    fn merge_to(&mut self, most: usize, d: usize, calibration: Option<&Calibration>) {
        let count = self.len();
        if count <= most {
            return;
        }
        let mut places = match calibration {
            // Keys come centred, which changes no difference but keeps digits.
            Some(calibration) => {
                let centred = calibration.centred(&self.keys);
                let mut places = vec![0.0; centred.len()];
                times(&centred, &transposed(&calibration.metric, d), d, &mut places);
                places
            }
            None => self.keys.clone(),
        };
        let mut costs = Costs::new(&places, &self.weights, d);
        for _ in most..count {
            let (i, j) = costs.least();
            let (a, b) = (self.counts[i], self.counts[j]);
            for means in [&mut self.keys, &mut self.values, &mut places] {
                for c in 0..d {
                    let mean = (a * means[i * d + c] + b * means[j * d + c]) / (a + b);
                    means[i * d + c] = mean;
                }
            }
            self.back[i] = (a * self.back[i] + b * self.back[j]) / (a + b);
            self.counts[i] = a + b;
            self.weights[i] += self.weights[j];
            costs.merged([i, j], &places, &self.weights, d);
        }
        self.keep(&costs.gone, d);
    }

    fn keep(&mut self, gone: &[bool], d: usize) {
        let mut to = 0;
        for (from, gone) in gone.iter().enumerate() {
            if *gone {
                continue;
            }
            self.counts[to] = self.counts[from];
            self.weights[to] = self.weights[from];
            self.back[to] = self.back[from];
            self.keys.copy_within(from * d..(from + 1) * d, to * d);
            self.values.copy_within(from * d..(from + 1) * d, to * d);
            to += 1;
        }
        self.counts.truncate(to);
        self.weights.truncate(to);
        self.back.truncate(to);
        self.keys.truncate(to * d);
        self.values.truncate(to * d);
    }
}

/// How much attention a key is likely to get: e to half of its mean logit over queries.
fn importance(key: &[f32], calibration: Option<&Calibration>) -> f32 {
    const STEEPNESS: f32 = 0.5;
    const MOST: f32 = 9.0;
    let Some(calibration) = calibration else {
        return 1.0;
    };
    let logit = dot(key, &calibration.query) - dot(&calibration.centre, &calibration.query);
    (STEEPNESS * logit).clamp(-MOST, MOST).exp()
}

/// Lᵀ of L, both row-major.
fn transposed(matrix: &[f32], d: usize) -> Vec<f32> {
    (0..d * d).map(|i| matrix[i % d * d + i / d]).collect()
}

/// What merging each pair would cost, and each group's cheapest partner.
struct Costs {
    count: usize,
    /// `[count][count]`.
    pairs: Vec<f32>,
    partner: Vec<usize>,
    least: Vec<f32>,
    gone: Vec<bool>,
}

fn cost(square: f32, a: f32, b: f32) -> f32 {
    square.max(0.0) * (a * b / (a + b))
}

impl Costs {
    fn new(places: &[f32], weights: &[f32], d: usize) -> Self {
        let count = weights.len();
        let mut pairs = vec![0.0; count * count];
        times(places, places, d, &mut pairs);
        let squares: Vec<f32> = (0..count).map(|i| pairs[i * count + i]).collect();
        for (i, row) in pairs.chunks_exact_mut(count).enumerate() {
            for (j, pair) in row.iter_mut().enumerate() {
                *pair = cost(squares[i] + squares[j] - 2.0 * *pair, weights[i], weights[j]);
            }
            row[i] = NEVER;
        }
        let mut costs = Costs {
            count,
            pairs,
            partner: vec![0; count],
            least: vec![NEVER; count],
            gone: vec![false; count],
        };
        (0..count).for_each(|i| costs.look(i));
        costs
    }

    /// Finds a group's cheapest partner anew.
    fn look(&mut self, i: usize) {
        let row = &self.pairs[i * self.count..(i + 1) * self.count];
        let (mut at, mut least) = (0, NEVER);
        for (j, &pair) in row.iter().enumerate() {
            if pair < least {
                (at, least) = (j, pair);
            }
        }
        (self.partner[i], self.least[i]) = (at, least);
    }

    /// The cheapest pair.
    fn least(&self) -> (usize, usize) {
        let (mut at, mut least) = (usize::MAX, NEVER);
        for (i, &cost) in self.least.iter().enumerate() {
            if cost < least {
                (at, least) = (i, cost);
            }
        }
        if at == usize::MAX {
            // No number is less than any other: keys are not finite. Any pair does.
            let mut left = (0..self.count).filter(|&i| !self.gone[i]);
            let first = left.next().unwrap_or(0);
            return (first, left.next().unwrap_or(first));
        }
        (at, self.partner[at])
    }

    /// Group `j` has become part of group `i`.
    fn merged(&mut self, [i, j]: [usize; 2], places: &[f32], weights: &[f32], d: usize) {
        let count = self.count;
        self.gone[j] = true;
        self.least[j] = NEVER;
        self.pairs[j * count..(j + 1) * count].fill(NEVER);
        let own = &places[i * d..(i + 1) * d];
        for other in 0..count {
            self.pairs[other * count + j] = NEVER;
            if self.gone[other] || other == i {
                continue;
            }
            let place = &places[other * d..(other + 1) * d];
            let square: f32 = own.iter().zip(place).map(|(a, b)| (a - b) * (a - b)).sum();
            let pair = cost(square, weights[i], weights[other]);
            self.pairs[i * count + other] = pair;
            self.pairs[other * count + i] = pair;
            if pair < self.least[other] {
                (self.partner[other], self.least[other]) = (i, pair);
            } else if self.partner[other] == i || self.partner[other] == j {
                self.look(other);
            }
        }
        self.look(i);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_keys_merge_and_far_ones_stay() {
        let mut groups = Groups::default();
        let keys = [0.0, 0.0, 5.0, 5.0, 0.1, 0.0, -7.0, 3.0, 5.0, 5.2];
        let values = [1.0, 0.0, 2.0, 0.0, 3.0, 0.0, 9.0, 0.0, 4.0, 1.0];
        groups.fold([&keys, &values, &[0.0; 5]], 3, 2, None);
        assert_eq!(groups.counts, [2.0, 2.0, 1.0]);
        assert_eq!(groups.values, [2.0, 0.0, 3.0, 0.5, 9.0, 0.0]);
        assert!((groups.keys[0] - 0.05).abs() < 1e-6 && (groups.keys[3] - 5.1).abs() < 1e-6);
    }

    #[test]
    fn counts_and_sums_are_kept_whatever_is_merged() {
        let mut groups = Groups::default();
        let number = |i: usize| ((i * 7919 % 1009) as f32 / 1009.0) - 0.5;
        let (d, mut sum) = (3, vec![0.0f64; 3]);
        for block in 0..20 {
            let keys: Vec<f32> = (0..8 * d).map(|i| number(block * 100 + i)).collect();
            let values: Vec<f32> = keys.iter().map(|k| k * 2.0 + 1.0).collect();
            for value in values.chunks_exact(d) {
                sum.iter_mut().zip(value).for_each(|(sum, v)| *sum += f64::from(*v));
            }
            groups.fold([&keys, &values, &[block as f32; 8]], 10, d, None);
            assert!(groups.len() <= 10);
        }
        assert_eq!(groups.counts.iter().sum::<f32>(), 160.0);
        for (c, sum) in sum.iter().enumerate() {
            let total: f64 = (0..groups.len())
                .map(|g| f64::from(groups.counts[g]) * f64::from(groups.values[g * d + c]))
                .sum();
            assert!((total - sum).abs() < 1e-3);
        }
    }
}
