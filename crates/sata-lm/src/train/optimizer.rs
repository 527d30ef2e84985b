//! AdamW over flat slices.

use rayon::prelude::*;

/// Elements that one thread takes at a time.
const PART: usize = 1 << 14;
/// Keeps the divisor from 0.
const EPSILON: f64 = 1e-8;

/// What every step has in common.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the mean gradient.
    pub beta1: f64,
    /// Decay of the mean squared gradient.
    pub beta2: f64,
    /// Share of a weight, times the rate, that a step takes away.
    pub weight_decay: f64,
}

/// Running means of a parameter's gradient and of its square.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// Of the gradient.
    pub first: Vec<f32>,
    /// Of its square.
    pub second: Vec<f32>,
}

impl Moments {
    /// Those of a parameter that has had no gradient yet.
    pub fn new(elements: usize) -> Self {
        Moments { first: vec![0.0; elements], second: vec![0.0; elements] }
    }
}

/// One step: m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g²,
/// w ← (1 − rate·decay)·w − rate · m/(1−β₁ᵗ) / (√(v/(1−β₂ᵗ)) + 10⁻⁸).
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// What the gradient is multiplied by first.
    scale: f32,
    beta1: f32,
    beta2: f32,
    /// 1 − rate·decay.
    keep: f32,
    /// rate / (1 − β₁ᵗ)
    rate: f32,
    /// 1 / √(1 − β₂ᵗ)
    root: f32,
}

impl AdamW {
    /// The step after `step` others, at a learning rate, of gradients times `scale`; `decays` says
    /// whether the parameter is drawn towards 0.
    pub fn update(&self, step: usize, rate: f64, scale: f64, decays: bool) -> Update {
        let t = i32::try_from(step + 1).unwrap_or(i32::MAX);
        let decay = if decays { self.weight_decay } else { 0.0 };
        Update {
            scale: scale as f32,
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            keep: (1.0 - rate * decay) as f32,
            rate: (rate / (1.0 - self.beta1.powi(t))) as f32,
            root: (1.0 / (1.0 - self.beta2.powi(t)).sqrt()) as f32,
        }
    }
}

impl Update {
    /// The same for a GPU, of gradients that are sums of `1 / each`, with the largest norm of their
    /// mean. The scale is not taken: the device makes its own.
    #[cfg(feature = "cuda")]
    pub(super) fn on_gpu(&self, each: f32, clip: f64) -> sata_candle::kernels::Step {
        let Update { beta1, beta2, keep, rate, root, .. } = *self;
        sata_candle::kernels::Step { each, clip: clip as f32, beta1, beta2, keep, rate, root }
    }

    /// Applies it to one parameter, on the threads of the current pool.
    pub fn apply(&self, weights: &mut [f32], gradient: &[f32], moments: &mut Moments) {
        weights
            .par_chunks_mut(PART)
            .zip(gradient.par_chunks(PART))
            .zip(moments.first.par_chunks_mut(PART))
            .zip(moments.second.par_chunks_mut(PART))
            .for_each(|(((weights, gradient), first), second)| {
                self.part(weights, gradient, first, second);
            });
    }

    fn part(&self, weights: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        let Update { scale, beta1, beta2, keep, rate, root } = *self;
        let (new1, new2, epsilon) = (1.0 - beta1, 1.0 - beta2, EPSILON as f32);
        for (((w, g), m), v) in weights.iter_mut().zip(gradient).zip(first).zip(second) {
            let g = scale * g;
            *m = beta1 * *m + new1 * g;
            *v = beta2 * *v + new2 * (g * g);
            *w = keep * *w - rate * *m / (v.sqrt() * root + epsilon);
        }
    }
}

/// Σx² in f64, in an order that does not depend on the number of threads.
pub fn squares(x: &[f32]) -> f64 {
    let parts: Vec<f64> = x
        .par_chunks(PART)
        .map(|part| {
            // Several sums side by side, so that they need not wait for each other.
            let mut sums = [0.0f64; 8];
            let (whole, rest) = part.as_chunks::<8>();
            for eight in whole {
                for (sum, x) in sums.iter_mut().zip(eight) {
                    *sum += f64::from(*x) * f64::from(*x);
                }
            }
            for (sum, x) in sums.iter_mut().zip(rest) {
                *sum += f64::from(*x) * f64::from(*x);
            }
            sums.iter().sum()
        })
        .collect();
    parts.iter().sum()
}

/// Whether weight decay acts on a parameter: not on norms' scales, biases and gates.
pub fn decays(name: &str) -> bool {
    !(name.ends_with("norm.weight") || name.ends_with(".bias") || name.contains(".gate."))
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use rand_distr::StandardNormal;

    use super::*;
    use crate::train::tests::seed;

    #[test]
    fn follows_the_formulas_in_f64() {
        let mut rng = StdRng::seed_from_u64(seed());
        // More than one part.
        let n = PART + 77;
        for decays in [true, false] {
            let adam = AdamW { beta1: 0.9, beta2: 0.95, weight_decay: 0.1 };
            let (rate, scale, steps) = (1e-2, 0.5, 40);
            let mut weights: Vec<f32> = (0..n).map(|_| rng.sample(StandardNormal)).collect();
            let mut moments = Moments::new(n);
            let mut w: Vec<f64> = weights.iter().map(|&w| w.into()).collect();
            let (mut m, mut v) = (vec![0.0f64; n], vec![0.0f64; n]);
            for step in 0..steps {
                let gradient: Vec<f32> = (0..n).map(|_| rng.sample(StandardNormal)).collect();
                adam.update(step, rate, scale, decays).apply(&mut weights, &gradient, &mut moments);
                for i in 0..n {
                    let g = scale * f64::from(gradient[i]);
                    m[i] = 0.9 * m[i] + (1.0 - 0.9) * g;
                    v[i] = 0.95 * v[i] + (1.0 - 0.95) * g * g;
                    let mean = m[i] / (1.0 - 0.9f64.powi(step as i32 + 1));
                    let square = v[i] / (1.0 - 0.95f64.powi(step as i32 + 1));
                    let decay = if decays { rate * 0.1 * w[i] } else { 0.0 };
                    w[i] -= decay + rate * mean / (square.sqrt() + 1e-8);
                }
            }
            // A step rounds the weight, |w| < 8, twice, and the mean, which the root exceeds by at
            // least 1/√steps, a few times.
            let bound = steps as f64 * (2.0 * 8.0 * 2f64.powi(-24) + rate * 100.0 * 2f64.powi(-24));
            for (got, want) in weights.iter().zip(&w) {
                assert!((f64::from(*got) - want).abs() <= bound, "{got} {want} {bound:e}");
            }
        }
    }

    #[test]
    fn sums_squares_alike_on_any_threads() {
        let mut rng = StdRng::seed_from_u64(seed());
        let x: Vec<f32> = (0..3 * PART + 5).map(|_| rng.sample(StandardNormal)).collect();
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| squares(&x))
        };
        assert_eq!(on(1).to_bits(), on(3).to_bits());
        let want: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        assert!((on(1) - want).abs() <= 1e-10 * want);
    }

    #[test]
    fn norms_biases_and_gates_do_not_decay() {
        for name in ["norm.weight", "layers.0.attn.norm.weight", "layers.1.attn.q_norm.weight"] {
            assert!(!decays(name), "{name}");
        }
        for name in ["layers.0.attn.gate.weight", "layers.0.attn.gate.bias"] {
            assert!(!decays(name), "{name}");
        }
        for name in ["embed.weight", "layers.0.attn.qkv.weight", "layers.0.mlp.down.weight"] {
            assert!(decays(name), "{name}");
        }
    }
}
