//! Rotary embedding of any base, with angles in f64.

/// cos and sin of some consecutive tokens.
#[derive(Clone, Debug)]
pub(crate) struct Rotary {
    frequencies: Vec<f64>,
    /// `[tokens][d/2]` pairs.
    angles: Vec<(f32, f32)>,
}

impl Rotary {
    /// For heads of `d` elements.
    pub(super) fn new(base: f64, d: usize) -> Self {
        let frequency = |i: usize| base.powf(-2.0 * i as f64 / d as f64);
        Rotary { frequencies: (0..d / 2).map(frequency).collect(), angles: vec![] }
    }

    /// For `tokens` tokens from `position` on.
    pub(super) fn set(&mut self, position: usize, tokens: usize) {
        self.angles.clear();
        for t in position..position + tokens {
            self.angles.extend(self.frequencies.iter().map(|frequency| {
                let (sin, cos) = (t as f64 * frequency).sin_cos();
                (cos as f32, sin as f32)
            }));
        }
    }

    /// Turns a head of token `t`: elements i and i + d/2 are a pair.
    pub(super) fn turn(&self, t: usize, head: &mut [f32]) {
        let half = self.frequencies.len();
        let (first, second) = head.split_at_mut(half);
        let angles = &self.angles[t * half..(t + 1) * half];
        for ((a, b), &(cos, sin)) in first.iter_mut().zip(second).zip(angles) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}
