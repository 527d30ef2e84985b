//! Small random models, and what they ought to answer, in f64.
#![allow(dead_code, reason = "each test file uses its own part")]

pub mod reference;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use sata_lm::infer::Weights;
use sata_lm::{Attention, Config, HeadGroup, Kernel, Position};

/// A generator whose seed is printed, or taken from `SATA_TEST_SEED`.
pub fn rng() -> StdRng {
    let seed = match std::env::var("SATA_TEST_SEED") {
        Ok(seed) => seed.parse().expect("SATA_TEST_SEED is a number"),
        Err(_) => RandomState::new().build_hasher().finish(),
    };
    println!("SATA_TEST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Every kernel with every position.
pub fn all_kinds() -> Vec<(Kernel, Position)> {
    let kernels = [
        Kernel::Softmax,
        Kernel::Window,
        Kernel::Taylor { terms: 3 },
        Kernel::Power { exponent: 2 },
        mixture(),
        half_softmax(),
    ];
    let positions = [Position::None, Position::Rotary, Position::Slopes, Position::Gates];
    kernels.iter().flat_map(|k| positions.map(|p| (k.clone(), p))).collect()
}

fn half(kernel: Kernel, near: Option<usize>, sinks: usize) -> HeadGroup {
    HeadGroup { heads: 2, kernel, near, sinks }
}

/// Two groups of two heads that differ in everything a group can differ in.
pub fn mixture() -> Kernel {
    let groups = vec![
        half(Kernel::Power { exponent: 4 }, Some(0), 0),
        half(Kernel::Taylor { terms: 3 }, Some(2), 3),
    ];
    Kernel::Mixture { groups }
}

/// Two groups of which one grows.
pub fn half_softmax() -> Kernel {
    let groups = vec![half(Kernel::Window, Some(1), 1), half(Kernel::Softmax, None, 0)];
    Kernel::Mixture { groups }
}

/// A small config of odd sizes.
pub fn config(kernel: Kernel, position: Position) -> Config {
    // What says itself what is near.
    let softmax = matches!(kernel, Kernel::Softmax | Kernel::Mixture { .. });
    let attention = Attention {
        heads: 4,
        kv_heads: Some(2),
        head_dim: 8,
        near: if softmax { None } else { Some(1) },
        block: 4,
        sinks: if softmax { 0 } else { 2 },
        kernel,
        position,
        qk_norm: true,
    };
    Config { vocab: 37, layers: 2, width: 24, mlp: 40, norm_eps: 1e-5, attention }
}

/// A tensor: name, shape, numbers.
pub type Tensor = (String, Vec<usize>, Vec<f64>);

/// Random weights of a config, as its documentation names them, rounded to `dtype`.
pub fn tensors(config: &Config, dtype: Dtype, rng: &mut StdRng) -> Vec<Tensor> {
    let a = &config.attention;
    let (w, m, kv, d) = (config.width, config.mlp, a.kv_heads(), a.head_dim);
    let mut all: Vec<Tensor> = vec![];
    let mut add = |name: String, shape: &[usize], mean: f64, deviation: f64| {
        let n = shape.iter().product();
        let numbers = (0..n).map(|_| {
            let x: f64 = rng.sample(StandardNormal);
            round(dtype, mean + deviation * x)
        });
        all.push((name, shape.to_vec(), numbers.collect()));
    };
    let by = |n: usize| 1.0 / (n as f64).sqrt();
    add("embed.weight".into(), &[config.vocab, w], 0.0, by(w));
    for i in 0..config.layers {
        let name = |what: &str| format!("layers.{i}.{what}");
        add(name("attn.norm.weight"), &[w], 1.0, 0.1);
        add(name("attn.qkv.weight"), &[(a.heads + 2 * kv) * d, w], 0.0, by(w));
        if a.position == Position::Gates {
            add(name("attn.gate.weight"), &[kv, w], 0.0, by(w));
            add(name("attn.gate.bias"), &[kv], 3.0, 1.0);
        }
        if a.qk_norm {
            add(name("attn.q_norm.weight"), &[d], 1.0, 0.1);
            add(name("attn.k_norm.weight"), &[d], 1.0, 0.1);
        }
        add(name("attn.out.weight"), &[w, a.heads * d], 0.0, by(w));
        add(name("mlp.norm.weight"), &[w], 1.0, 0.1);
        add(name("mlp.up.weight"), &[2 * m, w], 0.0, by(w));
        add(name("mlp.down.weight"), &[w, m], 0.0, by(m));
    }
    add("norm.weight".into(), &[w], 1.0, 0.1);
    all
}

fn round(dtype: Dtype, x: f64) -> f64 {
    match dtype {
        Dtype::F16 => half::f16::from_f64(x).to_f64(),
        Dtype::BF16 => half::bf16::from_f64(x).to_f64(),
        _ => f64::from(x as f32),
    }
}

fn bytes(dtype: Dtype, numbers: &[f64]) -> Vec<u8> {
    let one = |&x: &f64| match dtype {
        Dtype::F16 => half::f16::from_f64(x).to_le_bytes().to_vec(),
        Dtype::BF16 => half::bf16::from_f64(x).to_le_bytes().to_vec(),
        Dtype::F64 => x.to_le_bytes().to_vec(),
        _ => (x as f32).to_le_bytes().to_vec(),
    };
    numbers.iter().flat_map(one).collect()
}

/// Tensors as a safetensors file.
pub fn file(tensors: &[Tensor], dtype: Dtype) -> Vec<u8> {
    let data: Vec<Vec<u8>> = tensors.iter().map(|(_, _, x)| bytes(dtype, x)).collect();
    let views = tensors.iter().zip(&data).map(|((name, shape, _), data)| {
        (name.clone(), TensorView::new(dtype, shape.clone(), data).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// A model of such tensors.
pub fn weights(config: &Config, tensors: &[Tensor], dtype: Dtype) -> Arc<Weights> {
    let json = serde_json::to_vec(config).unwrap();
    Arc::new(Weights::from_bytes(&json, &file(tensors, dtype), "model").unwrap())
}

/// A random model.
pub fn random(config: &Config, rng: &mut StdRng) -> Arc<Weights> {
    let tensors = tensors(config, Dtype::F16, rng);
    weights(config, &tensors, Dtype::F16)
}

/// Random tokens.
pub fn text(config: &Config, n: usize, rng: &mut StdRng) -> Vec<u32> {
    (0..n).map(|_| rng.random_range(0..config.vocab as u32)).collect()
}
