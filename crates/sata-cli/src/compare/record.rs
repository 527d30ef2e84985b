//! What a folder remembers of its training.

use std::path::Path;

use sata_lm::train::Point;
use serde::Deserialize;

use crate::failure::{Failure, Outcome};

/// The part of `training.json` that is compared.
#[derive(Debug, Deserialize)]
pub struct Record {
    /// Its settings.
    pub settings: Settings,
    /// Weights.
    pub parameters: usize,
    /// Tokens of a step.
    pub tokens_per_step: usize,
    /// The held-out text.
    pub validation: Amount,
    /// Seconds spent.
    pub seconds: f64,
    /// Every step.
    pub curve: Vec<Point>,
}

/// Settings that are told.
#[derive(Debug, Deserialize)]
pub struct Settings {
    /// Of the training.
    pub train: Train,
}

/// Settings of the training that are told.
#[derive(Debug, Deserialize)]
pub struct Train {
    /// Where random numbers began.
    pub seed: u64,
    /// Steps before the learning rate is at its highest.
    pub warmup: usize,
}

/// A text.
#[derive(Debug, Deserialize)]
pub struct Amount {
    /// Bits per byte for each nat per token.
    pub bits_per_byte: f64,
}

impl Record {
    /// That of a folder.
    ///
    /// # Errors
    /// Names the file that is missing or damaged.
    pub fn load(folder: &Path) -> Outcome<Self> {
        let path = folder.join("training.json");
        let refused = |reason: String| {
            Failure::new(format!("{}: {reason}", path.display()))
                .hint("sata train leaves it in the folder that it makes")
        };
        let bytes = std::fs::read(&path).map_err(|error| refused(error.to_string()))?;
        serde_json::from_slice(&bytes).map_err(|error| refused(error.to_string()))
    }

    /// Bits per byte of the held-out text by step.
    pub fn held_out(&self) -> impl Iterator<Item = (f64, f64)> + '_ {
        let per_nat = self.validation.bits_per_byte;
        self.curve
            .iter()
            .filter_map(move |point| Some((point.step as f64, point.validation? * per_nat)))
    }

    /// Median and largest norm of the gradients after the warm-up.
    pub fn gradient_norms(&self) -> Option<[f64; 2]> {
        let warmup = self.settings.train.warmup;
        let mut norms: Vec<f64> =
            self.curve.iter().filter(|p| p.step > warmup).map(|p| p.gradient_norm).collect();
        norms.sort_by(f64::total_cmp);
        Some([*norms.get(norms.len() / 2)?, *norms.last()?])
    }

    /// Tokens trained on per second.
    pub fn tokens_per_second(&self) -> f64 {
        (self.curve.len() * self.tokens_per_step) as f64 / self.seconds
    }
}
