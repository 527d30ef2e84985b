//! Choosing a token from logits: settings, and random numbers whose state is two integers.

use serde::{Deserialize, Serialize};

use super::Error;

/// How tokens are chosen. Applied in this order: repetition penalty, top-k, temperature, top-p.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// Logits are divided by this; 0 takes the likeliest token, always.
    pub temperature: f32,
    /// Only the k likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability; 1 for all.
    pub top_p: f32,
    /// Logits of tokens among the last [`window`](Self::window) are divided by this where they are
    /// positive, multiplied where they are negative; 1 for none.
    pub repetition_penalty: f32,
    /// Last tokens that the penalty is for, at most [`MAX_WINDOW`].
    pub window: usize,
    /// Where random numbers begin.
    pub seed: u64,
}

/// Most tokens that a repetition penalty can look back on.
pub const MAX_WINDOW: usize = 4096;

impl Default for Sampling {
    /// Temperature 0.8, top-p 0.95, all else off, seed 0.
    fn default() -> Self {
        Sampling {
            temperature: 0.8,
            top_k: 0,
            top_p: 0.95,
            repetition_penalty: 1.0,
            window: 64,
            seed: 0,
        }
    }
}

impl Sampling {
    /// The likeliest token, always.
    pub fn greedy() -> Self {
        Sampling { temperature: 0.0, top_p: 1.0, ..Sampling::default() }
    }

    /// Refuses values that settings cannot have.
    ///
    /// # Errors
    /// [`Error::Sampling`], which names the setting.
    pub fn check(&self) -> Result<(), Error> {
        let wrong =
            |field, value: String, requires| Err(Error::Sampling { field, value, requires });
        let (t, p, r) = (self.temperature, self.top_p, self.repetition_penalty);
        if !(t >= 0.0 && t.is_finite()) {
            return wrong("temperature", t.to_string(), "it must be finite and at least 0");
        }
        if !(p > 0.0 && p <= 1.0) {
            return wrong("top-p", p.to_string(), "it must be above 0 and at most 1");
        }
        if !(r > 0.0 && r.is_finite()) {
            return wrong("repetition-penalty", r.to_string(), "it must be finite and above 0");
        }
        if self.window > MAX_WINDOW {
            let requires = "the window must be at most 4096 tokens";
            return wrong("repetition-window", self.window.to_string(), requires);
        }
        Ok(())
    }
}

/// SplitMix64 as a function of seed and count: number n is the same on every machine, and a
/// generator is saved as these two integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Random {
    pub seed: u64,
    /// Numbers drawn so far.
    pub drawn: u64,
}

impl Random {
    /// The next number, from [0, 1).
    pub(super) fn draw(&mut self) -> f64 {
        self.drawn = self.drawn.wrapping_add(1);
        let mut z = self.seed.wrapping_add(self.drawn.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Chooses tokens from logits that somebody else made.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: Random,
    choice: Choice,
}

impl Sampler {
    /// Random numbers begin at the settings' seed.
    ///
    /// # Errors
    /// A value that a setting cannot have.
    pub fn new(sampling: Sampling) -> Result<Self, Error> {
        sampling.check()?;
        let random = Random { seed: sampling.seed, drawn: 0 };
        Ok(Sampler { sampling, random, choice: Choice::default() })
    }

    /// A token for finite logits after `text`.
    pub fn choose(&mut self, logits: &[f32], text: &[u32]) -> u32 {
        let from = text.len().saturating_sub(self.sampling.window);
        let recent = text[from..].iter().copied();
        let exp = |x: &mut [f32]| x.iter_mut().for_each(|x| *x = x.exp());
        self.choice.choose(&self.sampling, &mut self.random, logits, recent, exp)
    }
}

/// The logit of a token that is left out, and a weight that is none beside the highest, which is 1.
const GONE: f32 = f32::NEG_INFINITY;
const NOTHING: f32 = 1e-35;

/// Tokens whose weights are summed at a time when one is drawn.
const PART: usize = 128;
/// How often a token is drawn before the likeliest is taken. A share of at least p of the attempts
/// succeeds, and of at least the likeliest token's own weight.
const ATTEMPTS: usize = 10_000;

/// Working memory of a choice.
#[derive(Clone, Debug, Default)]
pub(super) struct Choice {
    /// Logits with the penalty, then weights.
    logits: Vec<f32>,
    /// Candidates: weight and token.
    kept: Vec<(f32, u32)>,
}

impl Choice {
    /// A token for these finite logits. `recent` are the last tokens, oldest first.
    pub(super) fn choose(
        &mut self,
        sampling: &Sampling,
        random: &mut Random,
        logits: &[f32],
        recent: impl Iterator<Item = u32>,
        exp: impl Fn(&mut [f32]),
    ) -> u32 {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        if sampling.repetition_penalty != 1.0 {
            for token in recent {
                // From the untouched logit, so that a token that came twice is penalised once.
                let x = logits[token as usize];
                let by = sampling.repetition_penalty;
                let x = if x > 0.0 { x / by } else { x * by };
                self.logits[token as usize] = x.clamp(f32::MIN, f32::MAX);
            }
        }
        let (best, top) = highest(&self.logits);
        if sampling.temperature == 0.0 || sampling.top_k == 1 {
            return best;
        }
        let by = (1.0 / sampling.temperature).min(1e30);
        if sampling.top_k > 0 && sampling.top_k < logits.len() {
            self.kept.clear();
            self.kept.extend(self.logits.iter().copied().zip(0..));
            // Equal logits at the edge: the first tokens stay.
            self.kept.select_nth_unstable_by(sampling.top_k, heavier);
            self.kept[sampling.top_k..].iter().for_each(|&(_, token)| {
                self.logits[token as usize] = GONE;
            });
        }
        self.logits.iter_mut().for_each(|x| *x = if *x == GONE { GONE } else { (*x - top) * by });
        exp(&mut self.logits);
        // In the parts in which one is drawn.
        let total: f64 = self.logits.chunks(PART).map(|part| sum(part, |w| w)).sum();
        let enough = f64::from(sampling.top_p) * total;
        // A token among all, until it is one of those that make up p: the fewest likeliest. All of
        // them together are a share of at least p, so that this takes few attempts.
        for _ in 0..ATTEMPTS {
            let token = self.draw(total, best, random);
            if sampling.top_p == 1.0 {
                return token;
            }
            let w = self.logits[token as usize];
            let heavier = sum(&self.logits, |x| if x > w { x } else { 0.0 });
            if heavier < enough {
                // Of equal ones the first.
                let alike = self.logits[..token as usize].iter().filter(|&&x| x == w).count();
                if heavier + alike as f64 * f64::from(w) < enough {
                    return token;
                }
            }
        }
        best
    }

    /// A token by the weights, whose sum is `total`; `best` where rounding leaves none.
    fn draw(&self, total: f64, best: u32, random: &mut Random) -> u32 {
        let mut left = random.draw() * total;
        for (part, weights) in self.logits.chunks(PART).enumerate() {
            let all = sum(weights, |w| w);
            if left >= all {
                left -= all;
                continue;
            }
            for (i, &w) in weights.iter().enumerate().filter(|(_, w)| **w > NOTHING) {
                left -= f64::from(w);
                if left < 0.0 {
                    return (part * PART + i) as u32;
                }
            }
        }
        best
    }
}

/// Σ f(w), in sums side by side so that it vectorises.
fn sum(weights: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let (parts, rest) = weights.as_chunks::<16>();
    let mut lanes = [0f32; 16];
    for part in parts {
        for (lane, &w) in lanes.iter_mut().zip(part) {
            *lane += f(w);
        }
    }
    lanes.iter().chain(&[rest.iter().map(|&w| f(w)).sum::<f32>()]).map(|&w| f64::from(w)).sum()
}

/// Descending by weight, ascending by token: one order, whatever the sort.
fn heavier(a: &(f32, u32), b: &(f32, u32)) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// The first of the highest.
fn highest(x: &[f32]) -> (u32, f32) {
    let top = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (x.iter().position(|&x| x == top).unwrap_or(0) as u32, top)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits with some ties, and the seed that made them.
    fn logits(seed: u64, n: usize) -> Vec<f32> {
        let mut random = Random { seed, drawn: 0 };
        (0..n).map(|_| ((random.draw() * 16.0 - 8.0) * 8.0).round() as f32 / 8.0).collect()
    }

    /// What each token's probability is, by sorting everything.
    fn expected(s: &Sampling, logits: &[f32], recent: &[u32]) -> Vec<f64> {
        let mut x: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
        for (token, x) in x.iter_mut().enumerate() {
            if recent.contains(&(token as u32)) {
                let by = f64::from(s.repetition_penalty);
                *x = if *x > 0.0 { *x / by } else { *x * by };
            }
        }
        let mut order: Vec<usize> = (0..x.len()).collect();
        order.sort_by(|&a, &b| x[b].total_cmp(&x[a]).then(a.cmp(&b)));
        if s.top_k > 0 {
            order.truncate(s.top_k);
        }
        let weight = |token: usize| (x[token] / f64::from(s.temperature)).exp();
        let total: f64 = order.iter().map(|&token| weight(token)).sum();
        let mut kept = vec![];
        let mut sum = 0.0;
        for token in order {
            kept.push(token);
            sum += weight(token);
            if sum >= f64::from(s.top_p) * total * (1.0 - 1e-9) {
                break;
            }
        }
        let mut all = vec![0.0; x.len()];
        kept.iter().for_each(|&token| all[token] = weight(token) / sum);
        all
    }

    #[test]
    fn frequencies_are_the_probabilities() {
        const DRAWS: usize = 20_000;
        for (i, (temperature, top_k, top_p, repetition_penalty)) in [
            (1.0, 0, 1.0, 1.0),
            (2.0, 0, 1.0, 1.5),
            (2.0, 7, 1.0, 1.0),
            (3.0, 0, 0.9, 1.0),
            (4.0, 0, 0.999, 1.3),
            (3.0, 20, 0.8, 1.2),
            (0.5, 3, 0.5, 1.0),
        ]
        .into_iter()
        .enumerate()
        {
            let s = Sampling { temperature, top_k, top_p, repetition_penalty, window: 64, seed: 9 };
            let (logits, recent) = (logits(i as u64, 300), [5, 9, 9, 200]);
            let want = expected(&s, &logits, &recent);
            let (mut choice, mut random) = (Choice::default(), Random { seed: 9, drawn: 0 });
            let mut counts = vec![0usize; 300];
            for _ in 0..DRAWS {
                let exp = |x: &mut [f32]| x.iter_mut().for_each(|x| *x = x.exp());
                let recent = recent.iter().copied();
                let token = choice.choose(&s, &mut random, &logits, recent, exp);
                counts[token as usize] += 1;
            }
            for (token, (&p, &count)) in want.iter().zip(&counts).enumerate() {
                // Six deviations and a few for rare ones, of numbers that are the same in every run.
                let off = (count as f64 - p * DRAWS as f64).abs();
                let deviation = (p * (1.0 - p) * DRAWS as f64).sqrt();
                assert!(off <= 6.0 * deviation + 3.0, "{s:?}: {token}: {count} of {p}");
                assert!(p > 0.0 || count == 0, "{s:?}: {token} is left out");
            }
            assert!(random.drawn >= DRAWS as u64);
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_highest() {
        let (mut choice, mut random) = (Choice::default(), Random { seed: 9, drawn: 0 });
        let logits = [1.0, 3.0, -2.0, 3.0];
        let mut choose =
            |s: &Sampling| choice.choose(s, &mut random, &logits, [1].into_iter(), |_| {});
        assert_eq!(choose(&Sampling::greedy()), 1);
        let penalised = Sampling { repetition_penalty: 1.1, ..Sampling::greedy() };
        assert_eq!(choose(&penalised), 3);
        assert_eq!(random.drawn, 0);
    }

    #[test]
    fn temperatures_near_nothing_are_greedy() {
        let s = Sampling { temperature: 1e-40, ..Sampling::default() };
        let (mut choice, mut random) = (Choice::default(), Random { seed: 9, drawn: 0 });
        for seed in 0..50 {
            let mut logits = logits(seed, 40);
            logits[17] = 9.0;
            let exp = |x: &mut [f32]| x.iter_mut().for_each(|x| *x = x.exp());
            let token = choice.choose(&s, &mut random, &logits, [].into_iter(), exp);
            assert_eq!(token, 17, "seed {seed}");
        }
    }

    #[test]
    fn random_numbers_are_those_of_splitmix64() {
        // The first outputs for seed 1234567, as published with the algorithm.
        let mut random = Random { seed: 1_234_567, drawn: 0 };
        for want in [6_457_827_717_110_365_317u64, 3_203_168_211_198_807_973] {
            assert_eq!(random.draw(), (want >> 11) as f64 / (1u64 << 53) as f64);
        }
    }
}
