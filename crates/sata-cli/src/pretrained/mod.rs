//! Models that already exist: `--attention`, and the commands over them.

pub mod calibrate;
mod encoder;
pub mod eval;
pub mod generate;
pub mod passages;
mod report;
mod spec;

use std::path::Path;

use sata_lm::pretrained::{Kind, Pretrained, PretrainedError};

use crate::failure::{Failure, Outcome};

impl From<PretrainedError> for Failure {
    fn from(error: PretrainedError) -> Self {
        match error {
            PretrainedError::Attention(error) => Failure::from(error),
            error => Failure::new(error.to_string()),
        }
    }
}

/// Whether `--model` names a model that this program did not train.
pub fn is_at(model: Option<&Path>) -> bool {
    model.is_some_and(Pretrained::is_at)
}

/// Reads a model.
///
/// # Errors
/// What is missing, damaged or not read.
pub fn load(path: &Path) -> Outcome<Pretrained> {
    Pretrained::load(path).map_err(|error| Failure::from(error).context("--model"))
}

/// Layers, key/value heads, and elements of a head.
pub fn sizes(model: &Kind) -> [usize; 3] {
    match model {
        Kind::Llama(model) => {
            let config = model.config();
            [config.layers, config.kv_heads, config.head_dim]
        }
        Kind::Bert(model) => {
            let config = model.config();
            [config.layers, config.heads, config.head_dim()]
        }
    }
}
