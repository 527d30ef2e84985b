//! Why training cannot begin, or stopped.

use std::path::{Path, PathBuf};

/// Why training cannot begin, or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A file or folder that cannot be what it should be.
    #[error("{}: {reason}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it, with field and value where it has fields.
        reason: String,
    },
    /// Something could not be written; what was there before is still there.
    #[error("{}: {doing}: {source}", path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// During what.
        doing: &'static str,
        /// What the system says.
        source: std::io::Error,
    },
    /// Texts, settings and model do not fit together.
    #[error("{0}")]
    Unfit(String),
    /// A loss or gradient that is not finite; the weights are those before the step. Of a watched
    /// model it may be a number that neither depends on.
    #[error("step {step}: {what} is {value}")]
    NonFinite {
        /// Steps done before.
        step: usize,
        /// What is not finite: the loss, or the gradient of a named parameter; of a watched model the
        /// first tensor that was, or the gradient of one, with a place in it.
        what: String,
        /// NaN or an infinity.
        value: f64,
    },
    /// What the model or its tensors refuse.
    #[error("the model: {0}")]
    Model(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl TrainError {
    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        TrainError::File { path: path.into(), reason: reason.into() }
    }

    pub(crate) fn write(path: &Path, doing: &'static str, source: std::io::Error) -> Self {
        TrainError::Write { path: path.into(), doing, source }
    }

    pub(crate) fn unfit(reason: impl Into<String>) -> Self {
        TrainError::Unfit(reason.into())
    }
}

impl From<candle_core::Error> for TrainError {
    fn from(error: candle_core::Error) -> Self {
        TrainError::Model(Box::new(error))
    }
}
