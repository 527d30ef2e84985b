//! The training graph: shapes, gradients of every weight, and what it refuses.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use candle_core::{DType, Device, Tensor, Var};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use sata_lm::{
    Attention, Config, HeadGroup, Kernel, Model, Position, initial_weights, weight_shapes,
};

/// A generator whose seed is printed, or taken from `SATA_TEST_SEED`.
fn rng() -> StdRng {
    let seed = match std::env::var("SATA_TEST_SEED") {
        Ok(seed) => seed.parse().expect("SATA_TEST_SEED is a number"),
        Err(_) => RandomState::new().build_hasher().finish(),
    };
    println!("SATA_TEST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

const VOCAB: usize = 11;

/// Half the heads like this, half like that.
fn mixture() -> Kernel {
    let half = |kernel, near, sinks| HeadGroup { heads: 2, kernel, near: Some(near), sinks };
    let groups =
        vec![half(Kernel::Taylor { terms: 3 }, 1, 1), half(Kernel::Power { exponent: 2 }, 0, 0)];
    Kernel::Mixture { groups }
}

fn config(kernel: Kernel, position: Position, qk_norm: bool) -> Config {
    // What says itself what is near, or has no need to.
    let all = matches!(kernel, Kernel::Softmax | Kernel::Mixture { .. });
    let attention = Attention {
        heads: 4,
        kv_heads: Some(2),
        head_dim: 4,
        near: (!all).then_some(1),
        sinks: usize::from(!all),
        kernel,
        block: 3,
        position,
        qk_norm,
    };
    Config { vocab: VOCAB, layers: 2, width: 12, mlp: 10, norm_eps: 1e-5, attention }
}

/// Every kernel with every position, with and without norms of queries and keys.
fn configs() -> Vec<Config> {
    let kernels = [
        Kernel::Softmax,
        Kernel::Window,
        Kernel::Taylor { terms: 3 },
        Kernel::Power { exponent: 2 },
        mixture(),
    ];
    let positions = [Position::None, Position::Rotary, Position::Slopes, Position::Gates];
    let mut all = vec![];
    for kernel in kernels {
        for position in positions {
            for qk_norm in [false, true] {
                all.push(config(kernel.clone(), position, qk_norm));
            }
        }
    }
    all
}

/// Weights far from their initial values, so that no gradient is small by design.
fn weights(config: &Config, rng: &mut StdRng, dtype: DType) -> BTreeMap<String, Tensor> {
    let mut weights = BTreeMap::new();
    for (name, shape) in weight_shapes(config) {
        let n: usize = shape.iter().product();
        let norm = name.ends_with("norm.weight");
        let draw = |_| {
            let x: f64 = rng.sample(StandardNormal);
            if norm { 1.0 + 0.2 * x } else { 0.35 * x }
        };
        let data: Vec<f64> = (0..n).map(draw).collect();
        let tensor = Tensor::from_vec(data, shape, &Device::Cpu).unwrap();
        weights.insert(name, tensor.to_dtype(dtype).unwrap());
    }
    weights
}

fn tokens(rng: &mut StdRng, batch: usize, length: usize) -> Tensor {
    let data: Vec<u32> = (0..batch * length).map(|_| rng.random_range(0..VOCAB as u32)).collect();
    Tensor::from_vec(data, (batch, length), &Device::Cpu).unwrap()
}

fn scalar(x: &Tensor) -> f64 {
    x.to_dtype(DType::F64).unwrap().to_scalar().unwrap()
}

#[test]
fn the_loss_is_the_cross_entropy_of_the_logits() {
    let mut rng = rng();
    for config in configs() {
        let model = Model::from_tensors(&config, weights(&config, &mut rng, DType::F64)).unwrap();
        let tokens = tokens(&mut rng, 2, 14);
        let inputs = tokens.narrow(1, 0, 13).unwrap();
        let logits = model.forward(&inputs).unwrap();
        assert_eq!(logits.dims(), [2, 13, VOCAB]);
        assert_eq!(model.hidden(&inputs).unwrap().dims(), [2, 13, 12]);
        let logits = logits.flatten_to(1).unwrap();
        let targets = tokens.narrow(1, 1, 13).unwrap().flatten_all().unwrap();
        let want = scalar(&candle_nn::loss::cross_entropy(&logits, &targets).unwrap());
        let got = scalar(&model.loss(&tokens).unwrap());
        assert!((got - want).abs() < 1e-12 * want, "{config:?}: {got} {want}");
    }
}

#[test]
fn later_tokens_change_nothing_before_them() {
    let mut rng = rng();
    for config in configs() {
        let model = Model::from_tensors(&config, weights(&config, &mut rng, DType::F64)).unwrap();
        let long = tokens(&mut rng, 1, 12);
        let all = model.forward(&long).unwrap().narrow(1, 0, 7).unwrap();
        let short = model.forward(&long.narrow(1, 0, 7).unwrap()).unwrap();
        let apart = scalar(&(all - short).unwrap().abs().unwrap().max_all().unwrap());
        assert!(apart < 1e-10, "{config:?}: {apart:e}");
    }
}

fn vars(weights: &BTreeMap<String, Tensor>) -> BTreeMap<String, Var> {
    weights.iter().map(|(name, x)| (name.clone(), Var::from_tensor(x).unwrap())).collect()
}

#[test]
fn every_variable_has_a_gradient() {
    let mut rng = rng();
    for config in configs() {
        for dtype in [DType::F32, DType::F64] {
            let vars = vars(&weights(&config, &mut rng, dtype));
            let model = Model::from_vars(&config, &vars).unwrap();
            let gradients = model.loss(&tokens(&mut rng, 2, 14)).unwrap().backward().unwrap();
            for (name, var) in &vars {
                let gradient = gradients.get(var).unwrap_or_else(|| panic!("{config:?}: {name}"));
                assert_eq!(gradient.dims(), var.dims());
                assert_eq!(gradient.dtype(), dtype);
                let norm = scalar(&gradient.sqr().unwrap().sum_all().unwrap());
                assert!(norm > 0.0 && norm.is_finite(), "{config:?}: {name} has {norm}");
            }
        }
    }
}

#[test]
fn initial_weights_have_gradients_too() {
    let mut rng = rng();
    for config in configs() {
        let vars = vars(&initial_weights(&config, 1).unwrap());
        let model = Model::from_vars(&config, &vars).unwrap();
        let gradients = model.loss(&tokens(&mut rng, 2, 14)).unwrap().backward().unwrap();
        for (name, var) in &vars {
            let gradient = gradients.get(var).unwrap_or_else(|| panic!("{config:?}: {name}"));
            let norm = scalar(&gradient.sqr().unwrap().sum_all().unwrap());
            assert!(norm > 0.0 && norm.is_finite(), "{config:?}: {name} has {norm}");
        }
    }
}

/// The slope of the loss along random directions through each weight, against differences over
/// five points.
#[test]
fn the_whole_gradient_agrees_with_differences() {
    let mut rng = rng();
    for config in configs() {
        let weights = weights(&config, &mut rng, DType::F64);
        let tokens = tokens(&mut rng, 2, 14);
        let vars = vars(&weights);
        let loss = Model::from_vars(&config, &vars).unwrap().loss(&tokens).unwrap();
        let gradients = loss.backward().unwrap();
        // Gates are rounded to f32, which longer steps drown.
        let gates = config.attention.position == Position::Gates;
        let (step, tolerance) = if gates { (4e-3, 3e-3) } else { (1e-4, 1e-6) };
        for (name, weight) in &weights {
            let n = weight.elem_count();
            let direction: Vec<f64> = (0..n).map(|_| rng.sample(StandardNormal)).collect();
            let direction = Tensor::from_vec(direction, weight.shape(), &Device::Cpu).unwrap();
            let norm = scalar(&direction.sqr().unwrap().sum_all().unwrap()).sqrt();
            let direction = (direction / norm).unwrap();
            let loss = |by: f64| {
                let mut weights = weights.clone();
                let moved = (weight + (&direction * (by * step)).unwrap()).unwrap();
                weights.insert(name.clone(), moved);
                let model = Model::from_tensors(&config, weights).unwrap();
                scalar(&model.loss(&tokens).unwrap())
            };
            let want = (8.0 * (loss(1.0) - loss(-1.0)) - (loss(2.0) - loss(-2.0))) / (12.0 * step);
            let gradient = gradients.get(&vars[name]).unwrap();
            let got = scalar(&(gradient * &direction).unwrap().sum_all().unwrap());
            let norm = scalar(&gradient.sqr().unwrap().sum_all().unwrap()).sqrt();
            assert!(
                (got - want).abs() <= tolerance * norm.max(0.1),
                "{config:?}, {name}: {got}, by differences {want}, norm {norm}"
            );
        }
    }
}

#[test]
fn initial_weights_are_what_they_say() {
    let mut config = config(Kernel::Taylor { terms: 3 }, Position::Gates, true);
    (config.width, config.mlp, config.vocab) = (64, 96, 300);
    config.attention.head_dim = 16;
    let weights = initial_weights(&config, 7).unwrap();
    let shapes: BTreeMap<String, Vec<usize>> =
        weights.iter().map(|(name, x)| (name.clone(), x.dims().to_vec())).collect();
    assert_eq!(shapes, weight_shapes(&config));
    let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (name, x) in &weights {
        let x = numbers(x);
        if name.ends_with("norm.weight") {
            assert!(x.iter().all(|&x| x == 1.0), "{name}");
        } else if name.ends_with("gate.weight") {
            assert!(x.iter().all(|&x| x == 0.0), "{name}");
        } else if name.ends_with("gate.bias") {
            assert_eq!(x, [0.0, 6.0], "{name}");
        } else {
            let into = name.ends_with("out.weight") || name.ends_with("down.weight");
            let want = if into { 0.01 } else { 0.02 };
            let square = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
            assert!((square.sqrt() / want - 1.0).abs() < 0.08, "{name}: {}", square.sqrt());
        }
    }
    let again = initial_weights(&config, 7).unwrap();
    let other = initial_weights(&config, 8).unwrap();
    assert!(weights.iter().all(|(name, x)| numbers(x) == numbers(&again[name])));
    assert_ne!(numbers(&weights["embed.weight"]), numbers(&other["embed.weight"]));
    config.attention.position = Position::Slopes;
    config.attention.qk_norm = false;
    let slopes = initial_weights(&config, 7).unwrap();
    assert!(slopes.iter().all(|(name, x)| numbers(x) == numbers(&weights[name])));
    (config.attention.heads, config.attention.kv_heads) = (1, None);
    config.attention.position = Position::Gates;
    let one = initial_weights(&config, 7).unwrap();
    assert_eq!(numbers(&one["layers.1.attn.gate.bias"]), [3.0]);
    // Of a mixture each group's gates begin as those of a layer of so many heads; all else is as
    // without.
    (config.attention.heads, config.attention.qk_norm) = (4, true);
    (config.attention.near, config.attention.sinks) = (None, 0);
    config.attention.kernel = mixture();
    let mixed = initial_weights(&config, 7).unwrap();
    assert_eq!(numbers(&mixed["layers.1.attn.gate.bias"]), [0.0, 6.0, 0.0, 6.0]);
    let group = |kernel, heads| HeadGroup { heads, kernel, near: Some(1), sinks: 0 };
    let groups = vec![group(Kernel::Window, 3), group(Kernel::Power { exponent: 4 }, 1)];
    config.attention.kernel = Kernel::Mixture { groups };
    let uneven = initial_weights(&config, 7).unwrap();
    assert_eq!(numbers(&uneven["layers.0.attn.gate.bias"]), [0.0, 3.0, 6.0, 3.0]);
    assert_eq!(uneven.len(), mixed.len());
    config.attention = config.attention.in_words("taylor:3+near:1").unwrap();
    let single = initial_weights(&config, 7).unwrap();
    for (name, x) in single.iter().filter(|(name, _)| !name.ends_with("gate.bias")) {
        assert_eq!(numbers(x), numbers(&mixed[name]), "{name}");
    }
}

#[test]
fn wrong_input_is_named() {
    let mut rng = rng();
    let config = config(Kernel::Taylor { terms: 3 }, Position::Gates, true);
    let weights = weights(&config, &mut rng, DType::F32);
    let model = Model::from_tensors(&config, weights.clone()).unwrap();
    let says = |error: candle_core::Error, words: &[&str]| {
        let error = error.to_string();
        for word in words {
            assert!(error.contains(word), "'{error}' does not say '{word}'");
        }
    };
    let u32s = |x: &[u32]| Tensor::new(x, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    says(model.forward(&u32s(&[1, 11])).unwrap_err(), &["tokens is 11 at 1", "below 11"]);
    says(model.loss(&u32s(&[1])).unwrap_err(), &["[1, 1]", "at least 2"]);
    let flat = Tensor::new(&[1u32, 2], &Device::Cpu).unwrap();
    says(model.forward(&flat).unwrap_err(), &["[2]", "[batch, tokens]"]);
    let none = Tensor::zeros((1, 0), DType::U32, &Device::Cpu).unwrap();
    says(model.forward(&none).unwrap_err(), &["[1, 0]"]);
    let signed = Tensor::new(&[[1i64, 2]], &Device::Cpu).unwrap();
    says(model.forward(&signed).unwrap_err(), &["tokens is I64", "U32"]);

    let with = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let mut weights = weights.clone();
        change(&mut weights);
        Model::from_tensors(&config, weights).unwrap_err()
    };
    says(with(&|w| drop(w.remove("layers.1.mlp.up.weight"))), &["layers.1.mlp.up.weight"]);
    let wrong = Tensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap();
    says(
        with(&|w| drop(w.insert("norm.weight".into(), wrong.clone()))),
        &["norm.weight", "[3, 4]"],
    );
    says(with(&|w| drop(w.insert("head.weight".into(), wrong.clone()))), &["head.weight"]);
    let double = weights["norm.weight"].to_dtype(DType::F64).unwrap();
    says(with(&|w| drop(w.insert("norm.weight".into(), double.clone()))), &["norm.weight is F64"]);
    let mut bad = config.clone();
    bad.attention.kv_heads = Some(3);
    says(Model::from_tensors(&bad, weights.clone()).unwrap_err(), &["kv_heads, 3"]);
    says(initial_weights(&bad, 0).unwrap_err(), &["kv_heads, 3"]);
}

/// A mixture of one kernel with itself is that kernel, but for the slopes that its halves have.
#[test]
fn a_mixture_of_equals_is_no_mixture() {
    let mut rng = rng();
    for position in [Position::None, Position::Rotary, Position::Gates] {
        let single = config(Kernel::Taylor { terms: 3 }, position, true);
        let words = single.attention.in_words("taylor:3+taylor:3").unwrap();
        let mixed = Config { attention: words, ..single.clone() };
        assert!(matches!(&mixed.attention.kernel, Kernel::Mixture { groups } if groups.len() == 2));
        let weights = weights(&single, &mut rng, DType::F64);
        let tokens = tokens(&mut rng, 2, 14);
        let logits = |config: &Config| {
            Model::from_tensors(config, weights.clone()).unwrap().forward(&tokens).unwrap()
        };
        let apart = (logits(&single) - logits(&mixed)).unwrap().abs().unwrap();
        assert_eq!(scalar(&apart.max_all().unwrap()), 0.0, "{position:?}");
    }
}
