//! Rotary embedding of any base, with angles in f64; and how far back a key may seem to lie.

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
        Rotary { frequencies: frequencies(base, d), angles: vec![] }
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

fn frequencies(base: f64, d: usize) -> Vec<f64> {
    (0..d / 2).map(|i| base.powf(-2.0 * i as f64 / d as f64)).collect()
}

/// How far back a key may seem to lie. A model has met no distance beyond its context, so what is
/// remembered from further back is turned along with the text and stays at that distance.
#[derive(Clone, Debug)]
pub(crate) struct Reach {
    frequencies: Vec<f64>,
    tokens: usize,
}

impl Reach {
    /// Heads of `d` elements, at most so many tokens.
    pub(super) fn new(base: f64, d: usize, tokens: usize) -> Self {
        Reach { frequencies: frequencies(base, d), tokens }
    }

    /// A block of tokens begins: keys `[n][d]` lie `block` further `back` from its first than from the
    /// last one's, and no further from its last than may be.
    pub(super) fn age(&self, keys: &mut [f32], back: &mut [f32], block: usize) {
        let (half, most) = (self.frequencies.len(), self.tokens.saturating_sub(block) as f32);
        let mut last = 0.0;
        let mut angles = vec![(0.0, 1.0); half];
        for (key, back) in keys.chunks_exact_mut(2 * half).zip(back) {
            *back += block as f32;
            if *back <= most {
                continue;
            }
            let by = f64::from(*back - most);
            *back = most;
            if by != last {
                last = by;
                angles = self.frequencies.iter().map(|f| (by * f).sin_cos()).collect();
            }
            let (first, second) = key.split_at_mut(half);
            for ((a, b), &(sin, cos)) in first.iter_mut().zip(second).zip(&angles) {
                let (x, y) = (f64::from(*a), f64::from(*b));
                (*a, *b) = ((x * cos - y * sin) as f32, (y * cos + x * sin) as f32);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_stay_where_they_can_be_seen() {
        let (base, d, block) = (100.0, 6, 4);
        let reach = Reach::new(base, d, 20);
        let plain: Vec<f32> = (0..d).map(|i| i as f32 - 2.5).collect();
        let turned = |position: usize| {
            let mut rotary = Rotary::new(base, d);
            rotary.set(position, 1);
            let mut key = plain.clone();
            rotary.turn(0, &mut key);
            key
        };
        // A key of token 2, seen from the blocks that begin at 4, 8, ...
        let (mut key, mut back) = (turned(2), [-2.0]);
        for begins in (block..200).step_by(block) {
            reach.age(&mut key, &mut back, block);
            let seems = 2.max((begins + block).saturating_sub(20));
            assert_eq!(back[0], begins as f32 - seems as f32);
            let want = turned(seems);
            assert!(key.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-5), "{begins}");
        }
    }
}
