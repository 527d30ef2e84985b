//! Rotary embedding, with angles in f64: right at any position.

use crate::ROTARY_BASE;

/// cos and sin of some consecutive tokens, `[tokens][d/2]` pairs.
#[derive(Clone, Debug, Default)]
pub(super) struct Rotary {
    angles: Vec<(f32, f32)>,
}

impl Rotary {
    /// For `tokens` tokens from `position` on and heads of `d`.
    pub(super) fn set(&mut self, position: u64, tokens: usize, d: usize) {
        self.angles.clear();
        for t in 0..tokens as u64 {
            for i in 0..d / 2 {
                let frequency = ROTARY_BASE.powf(-2.0 * i as f64 / d as f64);
                let (sin, cos) = ((position + t) as f64 * frequency).sin_cos();
                self.angles.push((cos as f32, sin as f32));
            }
        }
    }

    /// Turns the heads of token `t`: element i of a head and element i + d/2 are a pair.
    pub(super) fn turn(&self, t: usize, heads: &mut [f32], d: usize) {
        let half = d / 2;
        let angles = &self.angles[t * half..(t + 1) * half];
        for head in heads.chunks_exact_mut(d) {
            let (first, second) = head.split_at_mut(half);
            for ((a, b), &(cos, sin)) in first.iter_mut().zip(second).zip(angles) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_depend_on_the_distance_alone_at_ten_million_too() {
        let (d, q, k) = (16, [0.5f32; 16], [0.25f32; 16]);
        let product = |first: u64| {
            let mut rotary = Rotary::default();
            rotary.set(first, 8, d);
            let (mut q, mut k) = (q, k);
            rotary.turn(7, &mut q, d);
            rotary.turn(0, &mut k, d);
            q.iter().zip(&k).map(|(q, k)| q * k).sum::<f32>()
        };
        let near = product(0);
        assert!((near - 2.0).abs() > 0.1, "it turns: {near}");
        for far in [1_000, 10_000_000, 1 << 40] {
            // A position times a frequency of up to 1 is in f64, exact to 1e-4 at 2⁴⁰.
            assert!((product(far) - near).abs() < 1e-3, "{far}: {} {near}", product(far));
        }
    }
}
