//! Logits and scores against the model in f64, for every kernel and position.

mod common;

use common::{all_kinds, config, reference, rng, tensors, text, weights};
use rand::Rng;
use safetensors::Dtype;
use sata_lm::infer::{Sampling, Session};

/// √(Σ(got−want)² / Σwant²).
fn error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let off: f64 = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum();
    (off / want.iter().map(|w| w * w).sum::<f64>()).sqrt()
}

/// f32 rounding through two layers. A power kernel divides by its smallest weight, and Taylor's
/// three terms by no less than a half.
const TOLERANCE: f64 = 2e-4;

#[test]
fn prompt_and_steps_are_the_model() {
    let mut rng = rng();
    for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
        for (kernel, position) in all_kinds() {
            let config = config(kernel.clone(), position);
            let tensors = tensors(&config, dtype, &mut rng);
            let tokens = text(&config, 40, &mut rng);
            let want = reference::logits(&config, &tensors, &tokens);
            let mut session =
                Session::new(&weights(&config, &tensors, dtype), Sampling::greedy()).unwrap();
            let cut = rng.random_range(1..39);
            let what = format!("{dtype:?} {kernel:?} {position:?}, cut at {cut}");
            let after = session.feed(&tokens[..cut]).unwrap();
            assert!(error(after, &want[cut - 1]) < TOLERANCE, "{what}: prompt");
            for t in cut..40 {
                let after = session.feed(&tokens[t..t + 1]).unwrap();
                let off = error(after, &want[t]);
                assert!(off < TOLERANCE, "{what}: step {t}: {off}");
            }
            assert_eq!(session.position(), 40);
        }
    }
}

#[test]
fn scores_are_log_probabilities() {
    let mut rng = rng();
    for (kernel, position) in all_kinds() {
        let config = config(kernel.clone(), position);
        let tensors = tensors(&config, Dtype::F16, &mut rng);
        // Beyond one pass.
        let tokens = text(&config, 300, &mut rng);
        let want = reference::logits(&config, &tensors, &tokens);
        let want: Vec<f64> = want
            .iter()
            .zip(&tokens[1..])
            .map(|(logits, &next)| {
                let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = logits.iter().map(|x| (x - top).exp()).sum();
                logits[next as usize] - top - sum.ln()
            })
            .collect();
        let weights = weights(&config, &tensors, Dtype::F16);
        let mut session = Session::new(&weights, Sampling::greedy()).unwrap();
        let mut got = session.score(&tokens[..1]).unwrap();
        assert!(got.is_empty(), "nothing comes before the first");
        for part in [1..70, 70..71, 71..300] {
            got.extend(session.score(&tokens[part]).unwrap());
        }
        let off = error(&got, &want);
        assert!(off < TOLERANCE, "{kernel:?} {position:?}: {off}");
    }
}

#[test]
fn unusual_sizes() {
    let mut rng = rng();
    for round in 0..12 {
        // Mixtures, the last of them, have their own numbers of heads.
        let (kernel, position) = all_kinds().swap_remove(rng.random_range(0..16));
        let mut config = config(kernel, position);
        config.vocab = rng.random_range(1..200);
        config.width = rng.random_range(1..70);
        config.mlp = rng.random_range(1..90);
        config.attention.kv_heads = None;
        config.attention.heads = rng.random_range(1..4);
        config.attention.head_dim = 2 * rng.random_range(1..12);
        config.attention.qk_norm = rng.random();
        let tensors = tensors(&config, Dtype::F32, &mut rng);
        let tokens = text(&config, 12, &mut rng);
        let want = reference::logits(&config, &tensors, &tokens);
        let weights = weights(&config, &tensors, Dtype::F32);
        let mut session = Session::new(&weights, Sampling::greedy()).unwrap();
        for (t, want) in want.iter().enumerate() {
            let off = error(session.feed(&tokens[t..t + 1]).unwrap(), want);
            assert!(off < 1e-3, "round {round}: {config:?}: {off}");
        }
    }
}
