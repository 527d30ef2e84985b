use crate::TokenizerError;
use crate::infer;

/// Why an evaluation stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// There is less text than a task reads.
    #[error("{task}: the text has {tokens} tokens, it needs at least {needed}")]
    Short {
        /// The task.
        task: &'static str,
        /// Tokens that there are.
        tokens: usize,
        /// Tokens that one pass reads.
        needed: usize,
    },
    /// A setting has a value that it cannot have.
    #[error("{setting} is {value}, it must be {requires}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// What was given.
        value: usize,
        /// What would be accepted.
        requires: String,
    },
    /// A vocabulary has too few tokens that are words.
    #[error("the tokenizer's {vocab} tokens hold {words} words, {needed} are needed")]
    Words {
        /// Size of the vocabulary.
        vocab: usize,
        /// Tokens that are words.
        words: usize,
        /// What a task draws.
        needed: usize,
    },
    /// A probability that is none.
    #[error("the model's log-probability of token {token}, number {place} of a text, is {value}")]
    NotFinite {
        /// The token.
        token: u32,
        /// Tokens before it.
        place: usize,
        /// What the model said.
        value: f32,
    },
    /// The model refused.
    #[error(transparent)]
    Model(#[from] infer::Error),
    /// The tokenizer refused.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}
