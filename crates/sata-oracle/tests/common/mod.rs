//! Random data and comparisons for the tests.
#![allow(dead_code, reason = "every test file uses its own part")]

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sata_oracle::{Decay, Problem, Series, Shape};

/// A generator with a fresh seed, printed so that a failure can be run again with `SATA_SEED`.
pub fn fresh_rng() -> StdRng {
    let seed = match std::env::var("SATA_SEED") {
        Ok(seed) => seed.parse().expect("SATA_SEED is a number"),
        Err(_) => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            now.as_nanos() as u64
        }
    };
    println!("SATA_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// N(0, 1), by Box and Muller.
pub fn normal(rng: &mut StdRng) -> f64 {
    let u: f64 = 1.0 - rng.random::<f64>();
    let angle = std::f64::consts::TAU * rng.random::<f64>();
    (-2.0 * u.ln()).sqrt() * angle.cos()
}

pub fn normals(rng: &mut StdRng, count: usize) -> Vec<f64> {
    (0..count).map(|_| normal(rng)).collect()
}

/// log f of forget gates between 0.5 and 1.
pub fn log_gates(rng: &mut StdRng, count: usize) -> Vec<f64> {
    (0..count).map(|_| (0.5 + 0.5 * rng.random::<f64>()).ln()).collect()
}

pub fn random_decays(rng: &mut StdRng, shape: Shape) -> Vec<Decay> {
    let slopes = (0..shape.kv_heads).map(|_| 0.02 + 0.3 * rng.random::<f64>()).collect();
    vec![
        Decay::None,
        Decay::Slopes(slopes),
        Decay::LogGates(log_gates(rng, shape.kv_heads * shape.keys)),
    ]
}

/// Random q, k, v of a shape.
pub struct Data {
    pub shape: Shape,
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
}

impl Data {
    pub fn new(rng: &mut StdRng, shape: Shape) -> Self {
        Data {
            shape,
            q: normals(rng, shape.query_heads * shape.queries * shape.d_key),
            k: normals(rng, shape.kv_heads * shape.keys * shape.d_key),
            v: normals(rng, shape.kv_heads * shape.keys * shape.d_value),
        }
    }

    pub fn problem(&self) -> Problem<'_> {
        Problem::new(self.shape, &self.q, &self.k, &self.v)
    }
}

/// Every series, with the terms it is tested at.
pub fn all_series() -> Vec<(Series, usize)> {
    let mut all = fixed_series();
    all.extend([
        (Series::Gauss, 2),
        (Series::Gauss, 4),
        (Series::Gauss, 6),
        (Series::hermite(), 1),
        (Series::hermite(), 3),
        (Series::Hermite { tau: 0.7 }, 5),
    ]);
    all
}

/// The series with one set of coefficients for all queries. Their denominators stay well above zero.
pub fn fixed_series() -> Vec<(Series, usize)> {
    vec![
        (Series::Taylor, 1),
        (Series::Taylor, 3),
        (Series::Taylor, 5),
        (Series::Fixed(vec![2.0, 0.4, 0.9]), 3),
        (Series::power(2), 0),
        (Series::Power { exponent: 4, floor: 0.1 }, 0),
    ]
}

/// Panics with the worst element unless |a − b| ≤ tolerance · (the root mean square of b) everywhere.
#[track_caller]
pub fn assert_close(name: &str, a: &[f64], b: &[f64], tolerance: f64) {
    assert_close_above(f64::MIN_POSITIVE, name, a, b, tolerance);
}

/// The same, with the root mean square of b taken to be at least `floor`.
#[track_caller]
pub fn assert_close_above(floor: f64, name: &str, a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len(), "{name}: lengths");
    let size = (b.iter().map(|x| x * x).sum::<f64>() / b.len() as f64).sqrt().max(floor);
    let mut worst = (0, 0.0);
    for i in 0..a.len() {
        let error = (a[i] - b[i]).abs() / size;
        assert!(error.is_finite(), "{name}: element {i} is {:e} and should be {:e}", a[i], b[i]);
        if error > worst.1 {
            worst = (i, error);
        }
    }
    let (i, error) = worst;
    assert!(
        error <= tolerance,
        "{name}: element {i} is {:e} and should be {:e}, error {error:e}",
        a[i],
        b[i]
    );
}
