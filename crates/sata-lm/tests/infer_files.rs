//! Models that are refused, with the file, the tensor and the sizes.

mod common;

use common::{config, file, random, rng, tensors};
use rand::Rng;
use safetensors::Dtype;
use sata_lm::infer::Weights;
use sata_lm::{Config, Kernel, Position};

fn taylor() -> Config {
    config(Kernel::Taylor { terms: 3 }, Position::Gates)
}

fn load(config: &Config, weights: &[u8]) -> Result<Weights, String> {
    let json = serde_json::to_vec(config).unwrap();
    Weights::from_bytes(&json, weights, "here").map_err(|error| error.to_string())
}

fn refused(config: &Config, weights: &[u8], words: &[&str]) {
    let said = load(config, weights).unwrap_err();
    for word in words {
        assert!(said.contains(word), "no '{word}' in: {said}");
    }
}

#[test]
fn missing_files() {
    let folder = tempfile::tempdir().unwrap();
    let said = Weights::load(folder.path()).unwrap_err().to_string();
    assert!(said.contains("config.json: reading it"), "{said}");
    let json = serde_json::to_vec(&taylor()).unwrap();
    std::fs::write(folder.path().join("config.json"), &json).unwrap();
    let said = Weights::load(folder.path()).unwrap_err().to_string();
    assert!(said.contains("model.safetensors: reading it"), "{said}");
    let tensors = tensors(&taylor(), Dtype::F16, &mut rng());
    let bytes = file(&tensors, Dtype::F16);
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    assert_eq!(Weights::load(folder.path()).unwrap().config(), &taylor());
}

#[test]
fn truncated_anywhere() {
    let mut rng = rng();
    let whole = file(&tensors(&taylor(), Dtype::F16, &mut rng), Dtype::F16);
    for _ in 0..50 {
        let cut = rng.random_range(0..whole.len());
        refused(&taylor(), &whole[..cut], &["here/model.safetensors", "cut short", "bytes"]);
    }
}

#[test]
fn what_does_not_fit() {
    let mut rng = rng();
    let good = tensors(&taylor(), Dtype::F32, &mut rng);
    let wide = Config { width: 25, ..taylor() };
    let bytes = file(&good, Dtype::F32);
    refused(&wide, &bytes, &["embed.weight", "[37, 24]", "[37, 25]"]);
    let short = Config { layers: 1, ..taylor() };
    refused(&short, &bytes, &["layers.1.", "none of the"]);
    let long = Config { layers: 3, ..taylor() };
    refused(&long, &bytes, &["no tensor layers.2.attn.gate.bias", "[2]"]);
    let mut slopes = taylor();
    slopes.attention.position = Position::Slopes;
    refused(&slopes, &bytes, &["attn.gate", "none of the"]);
    let wrong = Config { layers: 0, ..taylor() };
    refused(&wrong, &bytes, &["here/config.json", "layers is 0"]);
    let said = Weights::from_bytes(b"{\"vocab\": 3", &bytes, "here").unwrap_err().to_string();
    assert!(said.contains("here/config.json"), "{said}");
    refused(&taylor(), &file(&good, Dtype::F64), &["embed.weight", "F64", "F16, BF16 or F32"]);
}

#[test]
fn numbers_that_are_none() {
    let mut rng = rng();
    for (x, word) in [(f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
        for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
            let mut tensors = tensors(&taylor(), dtype, &mut rng);
            let which = rng.random_range(0..tensors.len());
            let (name, shape, numbers) = &mut tensors[which];
            let at = rng.random_range(0..numbers.len());
            numbers[at] = x;
            let place = match shape[..] {
                [_, columns] => format!("[{}, {}]", at / columns, at % columns),
                _ => format!("[{at}]"),
            };
            let name = name.clone();
            refused(&taylor(), &file(&tensors, dtype), &[&name, word, &place]);
        }
    }
}

#[test]
fn a_digest_tells_models_apart() {
    let mut rng = rng();
    let mut tensors = tensors(&taylor(), Dtype::F16, &mut rng);
    let one = load(&taylor(), &file(&tensors, Dtype::F16)).unwrap();
    assert_eq!(one.digest().len(), 64);
    tensors.reverse();
    let same = load(&taylor(), &file(&tensors, Dtype::F16)).unwrap();
    assert_eq!(same.digest(), one.digest());
    assert_ne!(random(&taylor(), &mut rng).digest(), one.digest());
}
