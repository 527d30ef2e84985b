//! Fresh random inputs, the oracle's answer to them, and a comparison that names the worst.
#![allow(dead_code)]

pub mod calls;
pub mod case;
pub mod check;
mod fade;
pub mod gradients;
pub mod packed;
pub mod settings;
pub mod states;
pub mod truth;

pub use fade::Fade;

use std::hash::{BuildHasher, Hasher, RandomState};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use sata::{Element, Real, Series, View};
use sata_oracle as oracle;

/// A generator whose seed is printed, or taken from `SATA_TEST_SEED`.
pub fn rng() -> StdRng {
    let seed = match std::env::var("SATA_TEST_SEED") {
        Ok(seed) => seed.parse().expect("SATA_TEST_SEED is a number"),
        Err(_) => RandomState::new().build_hasher().finish(),
    };
    println!("SATA_TEST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// `n` numbers drawn from N(0, 1), rounded to `E`.
pub fn normal<E: Element>(rng: &mut StdRng, n: usize) -> Vec<E> {
    (0..n)
        .map(|_| {
            let x: f64 = rng.sample(StandardNormal);
            E::from_compute(E::Compute::from_f64(x))
        })
        .collect()
}

pub fn f64s<E: Element>(x: &[E]) -> Vec<f64> {
    x.iter().map(|x| x.to_compute().to_f64()).collect()
}

/// Sizes of one random problem.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub batch: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub queries: usize,
    pub keys: usize,
    pub d_key: usize,
    pub d_value: usize,
}

impl Sizes {
    pub fn self_attention(tokens: usize, d_key: usize, d_value: usize) -> Self {
        Sizes { batch: 1, kv_heads: 1, group: 1, queries: tokens, keys: tokens, d_key, d_value }
    }
    pub fn q(&self) -> [usize; 4] {
        [self.batch, self.kv_heads * self.group, self.queries, self.d_key]
    }
    pub fn k(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.keys, self.d_key]
    }
    pub fn v(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.keys, self.d_value]
    }
    pub fn y(&self) -> [usize; 4] {
        [self.batch, self.kv_heads * self.group, self.queries, self.d_value]
    }
}

/// Random q, k, v of some sizes.
#[derive(Clone)]
pub struct Inputs<E> {
    pub sizes: Sizes,
    pub q: Vec<E>,
    pub k: Vec<E>,
    pub v: Vec<E>,
    pub mask: Option<Vec<bool>>,
}

impl<E: Element> Inputs<E> {
    pub fn new(rng: &mut StdRng, sizes: Sizes) -> Self {
        let count = |shape: [usize; 4]| shape.iter().product();
        Inputs {
            sizes,
            q: normal(rng, count(sizes.q())),
            k: normal(rng, count(sizes.k())),
            v: normal(rng, count(sizes.v())),
            mask: None,
        }
    }

    /// Hides about a third of the keys, never the first.
    pub fn masked(mut self, rng: &mut StdRng) -> Self {
        let n = self.sizes.batch * self.sizes.keys;
        let keys = self.sizes.keys;
        self.mask = Some((0..n).map(|i| i % keys == 0 || rng.random_bool(0.67)).collect());
        self
    }

    /// Keys times `gain`, and so the logits.
    pub fn gain(mut self, gain: f64) -> Self {
        for k in &mut self.k {
            *k = E::from_compute(E::Compute::from_f64(k.to_compute().to_f64() * gain));
        }
        self
    }

    /// Queries and keys with so much in common that logits, at the usual scale, are about `logits`;
    /// with 0 they are of either sign and as large as 100.
    pub fn logits(self, logits: f64) -> Self {
        let d = self.sizes.d_key as f64;
        let (common, own) = if logits == 0.0 { (0.0, 1.0) } else { (1.0, 0.2) };
        let gain = if logits == 0.0 { 30.0 } else { logits / d.sqrt() };
        let turn =
            |x: &E| E::from_compute(E::Compute::from_f64(common + own * x.to_compute().to_f64()));
        Inputs {
            q: self.q.iter().map(turn).collect(),
            k: self.k.iter().map(turn).collect(),
            ..self
        }
        .gain(gain)
    }

    /// The same numbers in another type.
    pub fn to<F: Element>(&self) -> Inputs<F> {
        let cast = |x: &[E]| -> Vec<F> {
            x.iter()
                .map(|x| F::from_compute(F::Compute::from_f64(x.to_compute().to_f64())))
                .collect()
        };
        Inputs {
            sizes: self.sizes,
            q: cast(&self.q),
            k: cast(&self.k),
            v: cast(&self.v),
            mask: self.mask.clone(),
        }
    }

    pub fn q(&self) -> View<'_, E> {
        View::new(&self.q, self.sizes.q()).unwrap()
    }
    pub fn k(&self) -> View<'_, E> {
        View::new(&self.k, self.sizes.k()).unwrap()
    }
    pub fn v(&self) -> View<'_, E> {
        View::new(&self.v, self.sizes.v()).unwrap()
    }

    /// The oracle's outputs, [batch, query_heads, queries, d_value].
    pub fn oracle(&self, terms: usize, series: &Series, causal: bool) -> Vec<f64> {
        let s = self.sizes;
        let (q, k, v) = (f64s(&self.q), f64s(&self.k), f64s(&self.v));
        let shape = oracle::Shape {
            query_heads: s.kv_heads * s.group,
            kv_heads: s.kv_heads,
            queries: s.queries,
            keys: s.keys,
            d_key: s.d_key,
            d_value: s.d_value,
        };
        let mut y = vec![];
        for b in 0..s.batch {
            let part = |x: &[f64], shape: [usize; 4]| {
                let n: usize = shape[1..].iter().product();
                x[b * n..(b + 1) * n].to_vec()
            };
            let (q, k, v) = (part(&q, s.q()), part(&k, s.k()), part(&v, s.v()));
            let mut problem = oracle::Problem::new(shape, &q, &k, &v);
            problem.terms = terms;
            problem.causal = causal;
            problem.series = match series {
                Series::Taylor => oracle::Series::Taylor,
                Series::Fixed { coefficients } => oracle::Series::Fixed(coefficients.clone()),
                Series::Power { exponent, floor } => {
                    oracle::Series::Power { exponent: *exponent, floor: *floor }
                }
                other => panic!("{other:?} is not compared here"),
            };
            problem.key_mask = self.mask.as_ref().map(|m| &m[b * s.keys..(b + 1) * s.keys]);
            y.extend(oracle::attention(&problem).y);
        }
        y
    }

    /// What rounding of the compute type may do to the outputs, relative RMS, to first order: each
    /// weight is off by a few units of the sum of its terms' magnitudes, each output by the sum of
    /// that over the keys, over the denominator.
    pub fn rounding(&self, terms: usize, series: &Series, causal: bool) -> f64 {
        let s = self.sizes;
        let unit = if size_of::<E::Compute>() == 8 { f64::EPSILON } else { f32::EPSILON.into() };
        let coefficients: Vec<f64> = match series {
            Series::Taylor => (0..terms)
                .scan(1.0, |a, p| {
                    *a /= p.max(1) as f64;
                    Some(*a)
                })
                .collect(),
            Series::Fixed { coefficients } => coefficients.clone(),
            Series::Power { exponent, floor } => {
                let mut a = vec![0.0; exponent + 1];
                (a[0], a[*exponent]) = (*floor, 1.0);
                a
            }
            other => panic!("{other:?} is not compared here"),
        };
        let (q, k, v) = (f64s(&self.q), f64s(&self.k), f64s(&self.v));
        let want = self.oracle(terms, series, causal);
        let scale = 1.0 / (s.d_key as f64).sqrt();
        let mut error = 0.0;
        let heads = s.kv_heads * s.group;
        for (row, y) in want.chunks(s.d_value).enumerate() {
            let (head, t) = (row / s.queries, row % s.queries);
            let kv = head / heads * s.kv_heads + head % heads / s.group;
            let q = &q[row * s.d_key..][..s.d_key];
            let (mut den, mut off) = (0.0, vec![0.0; s.d_value]);
            for key in 0..if causal { t + 1 } else { s.keys } {
                let batch = head / heads;
                if self.mask.as_ref().is_some_and(|mask| !mask[batch * s.keys + key]) {
                    continue;
                }
                let k = &k[(kv * s.keys + key) * s.d_key..][..s.d_key];
                let v = &v[(kv * s.keys + key) * s.d_value..][..s.d_value];
                let products = q.iter().zip(k).map(|(q, k)| scale * q * k);
                let (mut x, mut large) = (0.0, 0.0);
                for product in products {
                    x += product;
                    large += product.abs();
                }
                let (mut weight, mut units) = (0.0, 0.0);
                for (p, a) in coefficients.iter().enumerate() {
                    weight += a * x.powi(p as i32);
                    units += (p + 2) as f64 * (a * large.powi(p as i32)).abs();
                }
                den += weight;
                for ((off, v), y) in off.iter_mut().zip(v).zip(y) {
                    *off += units * (v - y).abs();
                }
            }
            error += off.iter().map(|off| (unit * off / den).powi(2)).sum::<f64>();
        }
        (error / want.iter().map(|y| y * y).sum::<f64>()).sqrt()
    }
}

/// ‖got − want‖ / ‖want‖; infinite where `got` holds a NaN.
pub fn relative_rms(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let (mut error, mut norm) = (0.0, 0.0);
    for (g, w) in got.iter().zip(want) {
        error += (g - w) * (g - w);
        norm += w * w;
    }
    if error.is_nan() { f64::INFINITY } else { (error / norm).sqrt() }
}

/// Fails unless the relative RMS error is at most `tolerance`; names the worst element.
#[track_caller]
pub fn assert_close<E: Element>(what: &str, got: &[E], want: &[f64], tolerance: f64) {
    let got = f64s(got);
    let error = relative_rms(&got, want);
    if error > tolerance {
        let worst = (0..got.len())
            .max_by(|&a, &b| {
                let e = |i: usize| (got[i] - want[i]).abs();
                e(a).total_cmp(&e(b))
            })
            .unwrap_or(0);
        panic!(
            "{what}: relative RMS error {error:e} > {tolerance:e}; worst at {worst}: got {}, want {}",
            got[worst], want[worst]
        );
    }
}

/// The bound on the implementation error of a compute type against the oracle.
pub fn tolerance<E: Element>() -> f64 {
    if size_of::<E::Compute>() == 8 { 1e-12 } else { 1e-5 }
}
