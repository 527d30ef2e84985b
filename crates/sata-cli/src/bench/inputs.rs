//! Random inputs: never zeros, which can run faster than data.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use sata::{Element, Real};

/// Generator of a fixed seed: timings do not depend on it.
pub fn rng() -> SmallRng {
    SmallRng::seed_from_u64(0x5a7a)
}

/// `n` numbers drawn from N(0, 1).
pub fn normal<E: Element>(rng: &mut SmallRng, n: usize) -> Vec<E> {
    (0..n).map(|_| E::from_compute(E::Compute::from_f64(rng.sample(StandardNormal)))).collect()
}
