//! Sizes, and fresh random numbers of these sizes.

use rand::Rng;
use rand::rngs::StdRng;
use rand_distr::StandardNormal;
use sata::{Decay, Spec};
use sata_cuda::Element;

/// Sizes of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub batch: usize,
    pub kv_heads: usize,
    /// Query heads per key/value head.
    pub group: usize,
    pub queries: usize,
    pub keys: usize,
    pub d_key: usize,
    pub d_value: usize,
}

impl Sizes {
    /// One head of one sequence.
    pub fn new(tokens: usize, d_key: usize, d_value: usize) -> Self {
        Sizes { batch: 1, kv_heads: 1, group: 1, queries: tokens, keys: tokens, d_key, d_value }
    }
    pub fn query_heads(&self) -> usize {
        self.kv_heads * self.group
    }
    pub fn q(&self) -> [usize; 4] {
        [self.batch, self.query_heads(), self.queries, self.d_key]
    }
    pub fn k(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.keys, self.d_key]
    }
    pub fn v(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.keys, self.d_value]
    }
    pub fn y(&self) -> [usize; 4] {
        [self.batch, self.query_heads(), self.queries, self.d_value]
    }
    pub fn gates(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.keys, 1]
    }
    /// Queries of all sequences and heads.
    pub fn rows(&self) -> usize {
        self.batch * self.query_heads() * self.queries
    }
}

/// How many elements a tensor has.
pub fn len(shape: [usize; 4]) -> usize {
    shape.iter().product()
}

/// What a call is given.
#[derive(Clone, Debug)]
pub struct Inputs<E> {
    pub sizes: Sizes,
    pub q: Vec<E>,
    pub k: Vec<E>,
    pub v: Vec<E>,
    /// `[batch · keys]`.
    pub mask: Option<Vec<bool>>,
    /// `[kv_heads]`.
    pub slopes: Option<Vec<f64>>,
    /// `[batch, kv_heads, keys]`.
    pub gates: Option<Vec<f32>>,
}

/// `n` numbers drawn from N(0, 1), times `gain`, rounded to `E`.
pub fn normal<E: Element>(rng: &mut StdRng, n: usize, gain: f32) -> Vec<E> {
    (0..n).map(|_| E::from_compute(gain * rng.sample::<f32, _>(StandardNormal))).collect()
}

/// The same numbers in f64.
pub fn wide<E: Element>(x: &[E]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_compute())).collect()
}

impl<E: Element> Inputs<E> {
    /// Draws all that a spec needs; keys, and so logits, times `gain`.
    pub fn new(rng: &mut StdRng, spec: &Spec, sizes: Sizes, gain: f32, masked: bool) -> Self {
        let q = normal(rng, len(sizes.q()), 1.0);
        let k = normal(rng, len(sizes.k()), gain);
        let v = normal(rng, len(sizes.v()), 1.0);
        // About a third is hidden, a whole stretch of the first sequence among it.
        let hidden = |rng: &mut StdRng, i: usize| {
            rng.random_bool(0.3)
                || (i < sizes.keys && (sizes.keys / 3..sizes.keys / 2).contains(&i))
        };
        let mask = masked.then(|| (0..sizes.batch * sizes.keys).map(|i| !hidden(rng, i)).collect());
        let (mut slopes, mut gates) = (None, None);
        match spec.decay() {
            Decay::None => (),
            Decay::Slopes => {
                let slope = |head| match head % 4 {
                    3 => 0.0,
                    _ => rng.random_range(-8f64..0.0).exp2(),
                };
                slopes = Some((0..sizes.kv_heads).map(slope).collect());
            }
            Decay::Gates => {
                // They mostly keep; some keep all, and a few forget all but one part in thousands.
                let log_gate = |_| match rng.random_range(0..40) {
                    0 => -8.0,
                    1..=4 => 0.0,
                    _ => -0.1 * rng.sample::<f32, _>(StandardNormal).powi(2),
                };
                gates = Some((0..len(sizes.gates())).map(log_gate).collect());
            }
        }
        Inputs { sizes, q, k, v, mask, slopes, gates }
    }
}
