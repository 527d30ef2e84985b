//! Fresh random tensors, and gradients held to finite differences.
#![allow(dead_code)]

use std::hash::{BuildHasher, Hasher, RandomState};

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

/// A generator whose seed is printed, or taken from `SATA_TEST_SEED`.
pub fn rng() -> StdRng {
    let seed = match std::env::var("SATA_TEST_SEED") {
        Ok(seed) => seed.parse().expect("SATA_TEST_SEED is a number"),
        Err(_) => RandomState::new().build_hasher().finish(),
    };
    println!("SATA_TEST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Numbers drawn from N(0, 1), F64.
pub fn normal(rng: &mut StdRng, shape: &[usize]) -> Tensor {
    let n: usize = shape.iter().product();
    let data: Vec<f64> = (0..n).map(|_| rng.sample(StandardNormal)).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

pub fn f64s(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// ‖got − want‖ / ‖want‖; infinite where it is not a number.
pub fn relative(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let error: f64 = got.iter().zip(want).map(|(g, w)| (g - w) * (g - w)).sum();
    let norm: f64 = want.iter().map(|w| w * w).sum();
    let relative = if error == 0.0 { 0.0 } else { (error / norm).sqrt() };
    if relative.is_nan() { f64::INFINITY } else { relative }
}

#[track_caller]
pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let error = relative(&f64s(got), &f64s(want));
    assert!(error <= tolerance, "{what}: relative error {error:e} > {tolerance:e}");
}

/// Fails unless all elements agree to `tolerance` times the largest there is, or 1 if that is more:
/// where all are small, the rounding of what they came from is not.
#[track_caller]
pub fn near(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let (got, want) = (f64s(got), f64s(want));
    let most = want.iter().fold(1.0f64, |most, x| most.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        assert!((g - w).abs() <= tolerance * most, "{what}: {g} at {i}, not {w}");
    }
}

pub type Function<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Σ weights · f(inputs), and its gradients.
pub fn gradients(inputs: &[Tensor], weights: Option<&Tensor>, f: Function) -> (f64, Vec<Tensor>) {
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|x| x.as_tensor().clone()).collect();
    let y = f(&tensors).unwrap();
    let loss = match weights {
        Some(weights) => (y * weights).unwrap().sum_all().unwrap(),
        None => y.sum_all().unwrap(),
    };
    let store = loss.backward().unwrap();
    let gradient = |x: &Var| store.get(x).expect("a gradient for every input").clone();
    (f64s(&loss)[0], vars.iter().map(gradient).collect())
}

/// The gradient of Σ weights · f by differences over five points with this step.
pub fn differences(
    inputs: &[Tensor],
    weights: Option<&Tensor>,
    f: Function,
    step: f64,
) -> Vec<Tensor> {
    let value = |inputs: &[Tensor]| {
        let y = f(inputs).unwrap();
        let y = weights.map_or(y.clone(), |w| (y * w).unwrap());
        f64s(&y).iter().sum::<f64>()
    };
    let mut all = vec![];
    for (i, x) in inputs.iter().enumerate() {
        let numbers = f64s(x);
        let slope = |at: usize| {
            let moved = |by: f64| {
                let mut numbers = numbers.clone();
                numbers[at] += by * step;
                let mut inputs = inputs.to_vec();
                inputs[i] = Tensor::from_vec(numbers, x.shape(), &Device::Cpu).unwrap();
                value(&inputs)
            };
            (8.0 * (moved(1.0) - moved(-1.0)) - (moved(2.0) - moved(-2.0))) / (12.0 * step)
        };
        let slopes: Vec<f64> = (0..numbers.len()).map(slope).collect();
        all.push(Tensor::from_vec(slopes, x.shape(), &Device::Cpu).unwrap());
    }
    all
}

/// Holds the gradient of `f` to finite differences in F64, and to the gradient of `composed` where
/// there is one; and the F32 results to the F64 ones.
#[track_caller]
pub fn check(
    what: &str,
    rng: &mut StdRng,
    inputs: &[Tensor],
    f: Function,
    composed: Option<Function>,
) {
    let y = f(inputs).unwrap();
    let weights = normal(rng, y.dims());
    let (_, got) = gradients(inputs, Some(&weights), f);
    let want = differences(inputs, Some(&weights), f, 1e-3);
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        near(&format!("{what}, gradient {i} by differences"), got, want, 1e-8);
    }
    if let Some(composed) = composed {
        near(what, &y, &composed(inputs).unwrap(), 1e-12);
        let (_, want) = gradients(inputs, Some(&weights), composed);
        for (got, want) in got.iter().zip(&want) {
            near(&format!("{what}, gradient of the composed"), got, want, 1e-10);
        }
    }
    let singles: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(DType::F32).unwrap()).collect();
    let rounded: Vec<Tensor> = singles.iter().map(|x| x.to_dtype(DType::F64).unwrap()).collect();
    let single_weights = weights.to_dtype(DType::F32).unwrap();
    let weights = single_weights.to_dtype(DType::F64).unwrap();
    let (y32, y64) = (f(&singles).unwrap(), f(&rounded).unwrap());
    assert_eq!(y32.dtype(), DType::F32);
    near(&format!("{what} in F32"), &y32, &y64, 2e-5);
    let (_, g32) = gradients(&singles, Some(&single_weights), f);
    let (_, g64) = gradients(&rounded, Some(&weights), f);
    for (g32, g64) in g32.iter().zip(&g64) {
        near(&format!("{what}, gradient in F32"), g32, g64, 2e-5);
    }
}
