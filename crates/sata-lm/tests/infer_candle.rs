//! The session and the training graph are the same model.

mod common;

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use common::{all_kinds, config, rng, tensors, text, weights};
use rand::Rng;
use safetensors::Dtype;
use sata_lm::infer::{Sampling, Session};
use sata_lm::{Model, initial_weights};

/// √(Σ(got−want)² / Σwant²).
fn error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let off: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
    (off / want.iter().map(|&w| square(w)).sum::<f64>()).sqrt()
}

#[test]
fn logits_are_those_of_the_training_graph() {
    let mut rng = rng();
    for (kernel, position) in all_kinds() {
        let config = config(kernel.clone(), position);
        let tensors = tensors(&config, Dtype::F32, &mut rng);
        let weights = weights(&config, &tensors, Dtype::F32);
        let held = tensors.iter().map(|(name, shape, x)| {
            let x: Vec<f32> = x.iter().map(|&x| x as f32).collect();
            (name.clone(), Tensor::from_vec(x, shape.clone(), &Device::Cpu).unwrap())
        });
        let model = Model::from_tensors(&config, held.collect()).unwrap();
        let tokens = text(&config, 50, &mut rng);
        let batch = Tensor::from_vec(tokens.clone(), (1, 50), &Device::Cpu).unwrap();
        let want: Vec<Vec<f32>> =
            model.forward(&batch).unwrap().squeeze(0).unwrap().to_vec2().unwrap();
        let mut session = Session::new(&weights, Sampling::greedy()).unwrap();
        let cut = rng.random_range(1..50);
        session.feed(&tokens[..cut]).unwrap();
        for t in cut..50 {
            // Both are f32, with sums in different orders; a polynomial's denominator may be small.
            let off = error(session.logits(), &want[t - 1]);
            assert!(off < 4e-4, "{kernel:?} {position:?}, after {t} tokens: {off}");
            session.feed(&tokens[t..t + 1]).unwrap();
        }
    }
}

#[test]
fn initial_weights_load() {
    for (kernel, position) in all_kinds() {
        let config = config(kernel, position);
        let initial: BTreeMap<_, _> = initial_weights(&config, 7).unwrap();
        let tensors: Vec<common::Tensor> = initial
            .iter()
            .map(|(name, x)| {
                let numbers: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
                let numbers = numbers.iter().map(|&x| f64::from(x)).collect();
                (name.clone(), x.dims().to_vec(), numbers)
            })
            .collect();
        let weights = weights(&config, &tensors, Dtype::F16);
        let mut session = Session::new(&weights, Sampling::greedy()).unwrap();
        session.feed(&[0, 1, 2]).unwrap();
        // Barely more than nothing learnt: all tokens are about as likely.
        let scores = session.score(&[3, 4]).unwrap();
        assert!(scores.iter().all(|s| (s + (config.vocab as f32).ln()).abs() < 1.0), "{scores:?}");
    }
}
