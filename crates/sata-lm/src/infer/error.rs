//! What can be wrong with a model, a session or a request, one sentence each.

use std::path::{Path, PathBuf};

/// Everything that inference refuses. Files and bytes are checked before anything is made of them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("{}: {doing}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The system's word.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{file}: {reason}")]
    File {
        /// Its name.
        file: String,
        /// What is wrong with it: the field or the tensor, and the sizes.
        reason: String,
    },
    /// A token that the vocabulary does not have.
    #[error("token {token} at place {place} is not in the vocabulary of {vocab} tokens")]
    Token {
        /// The token.
        token: u32,
        /// Its place among those given.
        place: usize,
        /// The size of the vocabulary.
        vocab: usize,
    },
    /// A call that needs tokens was given none, or was made before any.
    #[error("{argument} is empty, it needs at least one token")]
    Empty {
        /// The argument.
        argument: &'static str,
    },
    /// A sampler setting has a value it cannot have.
    #[error("{field} is {value}, but {requires}")]
    Sampling {
        /// The setting.
        field: &'static str,
        /// What was given.
        value: String,
        /// What would be accepted.
        requires: &'static str,
    },
    /// The model's numbers are no numbers any more.
    #[error("the logit of token {token} is {value} at position {position}")]
    NotFinite {
        /// The first such token.
        token: usize,
        /// Its logit.
        value: f32,
        /// Tokens that the session has seen.
        position: u64,
    },
    /// Attention refused.
    #[error("attention: {0}")]
    Attention(#[from] sata::Error),
}

impl Error {
    pub(super) fn file(file: &str, reason: impl Into<String>) -> Self {
        Error::File { file: file.to_string(), reason: reason.into() }
    }

    pub(super) fn io(path: &Path, doing: &'static str, source: std::io::Error) -> Self {
        Error::Io { path: path.to_path_buf(), doing, source }
    }
}
