//! A model on a GPU against the same on the CPU: loss and the gradient of every weight. Passes
//! without looking where there is no GPU.
#![cfg(feature = "cuda")]

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use sata_lm::{Attention, Config, Kernel, Model, Position, initial_weights};

/// Relative RMS that bf16 in products and attention leaves in a gradient. Products round to 2⁻⁹ a
/// few times in a row; biases' gradients are sums over all tokens that nearly cancel.
const BOUND: f64 = 0.05;
const BOUND_OF_SUMS: f64 = 0.5;

fn config(attention: Attention) -> Config {
    Config { vocab: 300, layers: 2, width: 64, mlp: 96, norm_eps: 1e-5, attention }
}

fn vars(weights: &BTreeMap<String, Tensor>, device: &Device) -> BTreeMap<String, Var> {
    let var = |(name, weight): (&String, &Tensor)| {
        (name.clone(), Var::from_tensor(&weight.to_device(device).unwrap()).unwrap())
    };
    weights.iter().map(var).collect()
}

fn numbers(x: &Tensor) -> Vec<f32> {
    x.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_weight_has_the_gradient_that_the_cpu_finds() {
    let Ok(gpu) = Device::new_cuda(0) else {
        println!("no GPU");
        return;
    };
    let base = Attention {
        heads: 4,
        kv_heads: None,
        head_dim: 16,
        kernel: Kernel::Softmax,
        near: None,
        block: 64,
        sinks: 0,
        position: Position::Gates,
        qk_norm: true,
    };
    for words in [
        "softmax+rotary",
        "softmax+gates",
        "taylor:3+near:1+gates",
        "taylor:5+near:1+gates",
        "taylor:3+near:1+slopes",
        "power:2+near:0+block:16+gates",
        "power:4+near:1+gates",
        "window+near:1+gates",
        "taylor:3+power:4+near:1+gates",
        "taylor:3+power:2,near:0+near:1+block:16+gates",
        "window+power:4+near:1+slopes",
    ] {
        for (heads, head_dim) in [(4, 16), (2, 32), (8, 8)] {
            let base = Attention { heads, head_dim, ..base.clone() };
            let attention = base.in_words(words).unwrap();
            let config = config(attention);
            let mut weights = initial_weights(&config, 3).unwrap();
            for (name, weight) in &mut weights {
                // Gates that depend on the text, and weights that are not tiny.
                if name.ends_with("gate.weight") {
                    *weight = weight.randn_like(0.0, 0.2).unwrap();
                } else if weight.dims().len() == 2 {
                    *weight = (&*weight * 3.0).unwrap();
                }
            }
            let ids: Vec<u32> = (0..2 * 301u32).map(|i| i * i % 289).collect();
            let tokens = Tensor::from_vec(ids, (2, 301), &Device::Cpu).unwrap();
            let run = |device: &Device| {
                let vars = vars(&weights, device);
                let loss = Model::from_vars(&config, &vars).unwrap().loss(&tokens).unwrap();
                let gradients = loss.backward().unwrap();
                let of = |(name, var): (&String, &Var)| {
                    let gradient = gradients.get(var);
                    (name.clone(), numbers(gradient.unwrap_or_else(|| panic!("{words}: {name}"))))
                };
                (numbers(&loss)[0], vars.iter().map(of).collect::<BTreeMap<_, _>>())
            };
            let (want, wants) = run(&Device::Cpu);
            let (loss, gradients) = run(&gpu);
            assert!((loss - want).abs() < 2e-3 * want, "{words}: {loss} {want}");
            for (name, want) in &wants {
                let got = &gradients[name];
                let square = |x: f32| f64::from(x) * f64::from(x);
                let off: f64 = got.iter().zip(want).map(|(a, b)| square(a - b)).sum();
                let all: f64 = want.iter().map(|&x| square(x)).sum();
                let error = (off / all).sqrt();
                let sums = name.ends_with("bias");
                let bound = if sums { BOUND_OF_SUMS } else { BOUND };
                println!("{words} {heads}x{head_dim} {name}: {error:.4}");
                assert!(error < bound, "{words} {heads}x{head_dim} {name}: {error:.4}");
            }
            // The same at every run.
            assert_eq!(run(&gpu), (loss, gradients));
        }
    }
}
