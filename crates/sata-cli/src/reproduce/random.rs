//! Random inputs.

use half::f16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

/// Queries, keys and values of one head, `[tokens, d]` each, drawn from N(0, 1) and rounded to
/// f16, which f32 and f64 hold exactly.
pub struct Sample {
    /// Queries, keys, values.
    pub qkv: [Vec<f32>; 3],
}

impl Sample {
    /// Draws `tokens` tokens of size `d`.
    pub fn new(seed: u64, d: usize, tokens: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_add(d as u64));
        let mut draw = || {
            let normal = (0..d * tokens).map(|_| rng.sample::<f32, _>(StandardNormal));
            normal.map(|x| f16::from_f32(x).to_f32()).collect()
        };
        Sample { qkv: [draw(), draw(), draw()] }
    }

    /// The same numbers in f64.
    pub fn to_f64(&self) -> [Vec<f64>; 3] {
        let wide = |x: &Vec<f32>| x.iter().map(|&x| f64::from(x)).collect();
        [wide(&self.qkv[0]), wide(&self.qkv[1]), wide(&self.qkv[2])]
    }
}

/// `count` positions spread evenly over `range`, one drawn from each of as many strata.
pub fn stratified(seed: u64, range: std::ops::Range<usize>, count: usize) -> Vec<usize> {
    let mut rng = StdRng::seed_from_u64(seed);
    let width = range.len() as f64 / count.max(1) as f64;
    if width <= 1.0 {
        return range.collect();
    }
    (0..count)
        .map(|i| {
            let at = (i as f64 + rng.random::<f64>()) * width;
            range.start + (at as usize).min(range.len() - 1)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strata_ascend_and_stay_inside() {
        let positions = stratified(1, 100..1100, 64);
        assert_eq!(positions.len(), 64);
        assert!(positions.is_sorted() && positions[0] >= 100 && positions[63] < 1100);
        assert_eq!(stratified(1, 5..8, 10), [5, 6, 7]);
    }

    #[test]
    fn draws_are_repeatable_and_exact_in_f16() {
        let (a, b) = (Sample::new(7, 4, 50), Sample::new(7, 4, 50));
        assert_eq!(a.qkv, b.qkv);
        assert!(a.qkv[0].iter().all(|&x| f16::from_f32(x).to_f32() == x));
        assert_ne!(a.qkv[0], Sample::new(8, 4, 50).qkv[0]);
    }
}
