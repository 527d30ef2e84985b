//! What can be wrong with a model that somebody else made, one sentence each.

use std::path::{Path, PathBuf};

/// Everything that reading or running such a model refuses.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PretrainedError {
    /// The operating system refused a file operation.
    #[error("{}: {doing}: {source}", path.display())]
    Io {
        /// The file or folder.
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
        /// What is wrong with it.
        reason: String,
    },
    /// The model needs a tensor that its file does not have.
    #[error("{file}: there is no tensor {name}{like}")]
    Missing {
        /// The file.
        file: String,
        /// The tensor.
        name: String,
        /// Some that it has, as words.
        like: String,
    },
    /// A tensor has other sizes than the model's configuration says.
    #[error("{file}: tensor {name} has shape {shape:?}, but {expected}")]
    Shape {
        /// The file.
        file: String,
        /// The tensor.
        name: String,
        /// Its sizes, rows first.
        shape: Vec<usize>,
        /// What would fit, and why.
        expected: String,
    },
    /// A tensor is stored in a way that is not read.
    #[error("{file}: tensor {name} is stored as {kind}, which is not read (only {known})")]
    Kind {
        /// The file.
        file: String,
        /// The tensor.
        name: String,
        /// The name or number of the type.
        kind: String,
        /// What is read.
        known: &'static str,
    },
    /// A tensor lies outside its file.
    #[error("{file}: tensor {name} needs bytes {from} to {to}, but the file has {size}")]
    Outside {
        /// The file.
        file: String,
        /// The tensor.
        name: String,
        /// Its first byte.
        from: u64,
        /// The byte after its last.
        to: u64,
        /// Bytes of the file.
        size: u64,
    },
    /// A weight is not finite.
    #[error("{file}: tensor {name} has {value} at element {at}")]
    NotFinite {
        /// The file.
        file: String,
        /// The tensor.
        name: String,
        /// Its place, row-major.
        at: usize,
        /// The number.
        value: f32,
    },
    /// A model of a kind that is not run.
    #[error("{file}: {what} is {value}, which is not run (only {known})")]
    Unsupported {
        /// The file.
        file: String,
        /// Which property.
        what: String,
        /// Its value.
        value: String,
        /// What is run.
        known: String,
    },
    /// A setting of attention that does not fit the model, or that cannot be.
    #[error("attention setting: {0}")]
    Setting(String),
    /// Tokens or text that the model cannot take.
    #[error("{0}")]
    Input(String),
    /// Attention refused.
    #[error("attention: {0}")]
    Attention(#[from] sata::Error),
}

impl PretrainedError {
    pub(crate) fn file(file: &str, reason: impl Into<String>) -> Self {
        PretrainedError::File { file: file.into(), reason: reason.into() }
    }

    pub(crate) fn io(path: &Path, doing: &'static str, source: std::io::Error) -> Self {
        PretrainedError::Io { path: path.into(), doing, source }
    }
}
