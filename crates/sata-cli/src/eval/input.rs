//! What is measured, and on what.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sata_lm::infer::Weights;
use sata_lm::{END_OF_TEXT, SHIPPED, Tokenizer};

use crate::failure::{Failure, Outcome};
use crate::model::Model;
use crate::texts::read_texts;

/// What training left beside a model.
const TRAINING_FILE: &str = "training.json";

/// A model and a text.
pub struct Input {
    /// The model.
    pub weights: Arc<Weights>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Tokens of a sequence in its training.
    pub context: usize,
    /// All texts, the end of a text between two.
    pub tokens: Vec<u32>,
    /// Their bytes.
    pub bytes: usize,
    /// Bytes of every token; none of the end of a text, which no text holds.
    pub sizes: Vec<usize>,
}

impl Input {
    /// Reads a model, the program's own if no folder is named, and texts. Without a `context` the
    /// folder's record of its training says it.
    ///
    /// # Errors
    /// Files that are missing, damaged or do not fit each other.
    pub fn load(model: Option<&Path>, context: Option<usize>, texts: &[PathBuf]) -> Outcome<Self> {
        let Model { weights, tokenizer } = Model::load(model)?;
        let context = match (context, model) {
            (Some(context), _) => context,
            (None, Some(folder)) => trained_context(folder)?,
            (None, None) => SHIPPED.context,
        };
        let texts = read_texts(texts)?;
        let mut tokens = vec![];
        for text in &texts {
            if !tokens.is_empty() {
                tokens.push(END_OF_TEXT);
            }
            tokens.extend(tokenizer.encode(text)?);
        }
        let mut sizes = vec![0; tokenizer.vocab()];
        for (id, size) in sizes.iter_mut().enumerate() {
            if id != END_OF_TEXT as usize {
                *size = tokenizer.token_bytes(id as u32)?.len();
            }
        }
        let bytes = texts.iter().map(String::len).sum();
        Ok(Input { weights, tokenizer, context, tokens, bytes, sizes })
    }
}

fn no_context(what: &str) -> Failure {
    Failure::new(format!("--context is needed: {what} does not say how long its sequences were"))
}

/// The longest training length that a folder's record of its training has.
fn trained_context(folder: &Path) -> Outcome<usize> {
    let path = folder.join(TRAINING_FILE);
    let missing = || no_context(&path.display().to_string());
    let bytes = std::fs::read(&path).map_err(|_| missing())?;
    let record: serde_json::Value = serde_json::from_slice(&bytes)
        .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
    let train = record.pointer("/settings/train").ok_or_else(missing)?;
    let lengths = train.get("lengths").and_then(|lengths| lengths.as_array()).into_iter().flatten();
    let longest = lengths.chain(train.get("context")).filter_map(|length| length.as_u64()).max();
    longest.map(|length| length as usize).ok_or_else(missing)
}
