//! A model and its tokenizer: from a folder, or those that come with the program.

use std::path::Path;
use std::sync::Arc;

use sata_lm::infer::Weights;
use sata_lm::{SHIPPED, Tokenizer};

use crate::failure::{Failure, Outcome};

/// A model's tokenizer, in its folder.
const TOKENIZER_FILE: &str = "tokenizer.json";

/// A model that can read and write text.
pub struct Model {
    /// The model itself.
    pub weights: Arc<Weights>,
    /// What its tokens are.
    pub tokenizer: Tokenizer,
}

impl Model {
    /// The model in the folder that `--model` names; the one that comes with the program without.
    ///
    /// # Errors
    /// Files that are missing, damaged or do not fit each other.
    pub fn load(folder: Option<&Path>) -> Outcome<Self> {
        match folder {
            Some(folder) => Self::in_folder(folder).map_err(|error| error.context("--model")),
            None => Self::shipped(),
        }
    }

    fn in_folder(folder: &Path) -> Outcome<Self> {
        // The smaller file first: a wrong folder is known at once.
        let tokenizer = Tokenizer::load(folder.join(TOKENIZER_FILE))?;
        Self::new(Weights::load(folder)?, tokenizer)
    }

    fn shipped() -> Outcome<Self> {
        let weights = Weights::from_bytes(SHIPPED.config, SHIPPED.weights, SHIPPED.name)?;
        Self::new(weights, Tokenizer::from_bytes(SHIPPED.tokenizer)?)
    }

    fn new(weights: Weights, tokenizer: Tokenizer) -> Outcome<Self> {
        if weights.config().vocab != tokenizer.vocab() {
            return Err(Failure::new(format!(
                "{}: the model has {} tokens, its tokenizer {}",
                weights.source(),
                weights.config().vocab,
                tokenizer.vocab()
            )));
        }
        Ok(Model { weights: Arc::new(weights), tokenizer })
    }
}
