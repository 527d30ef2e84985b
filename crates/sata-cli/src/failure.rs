//! Why a command stopped: a sentence that names the argument and the sizes, and a hint.

use std::fmt;
use std::path::Path;

/// Why a command stopped.
#[derive(Debug)]
pub enum Failure {
    /// Something to tell the user.
    Said {
        /// What is wrong, with the argument and the numbers.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// Whoever read the output has gone; there is nobody to tell.
    BrokenPipe,
    /// A check that did not pass, which has been told in full.
    Failed(String),
    /// Ctrl-C, after which everything was put away: what was done.
    Interrupted(String),
}

/// What commands return.
pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// A failure with this message.
    pub fn new(message: impl Into<String>) -> Self {
        Failure::Said { message: message.into(), hint: None }
    }

    /// The same with a hint, unless it has one.
    pub fn hint(self, hint: impl Into<String>) -> Self {
        match self {
            Failure::Said { message, hint: None } => {
                Failure::Said { message, hint: Some(hint.into()) }
            }
            other => other,
        }
    }

    /// The same with words in front.
    pub fn context(self, context: impl fmt::Display) -> Self {
        match self {
            Failure::Said { message, hint } => {
                Failure::Said { message: format!("{context}: {message}"), hint }
            }
            other => other,
        }
    }

    /// A file operation that the system refused.
    pub fn io(path: &Path, doing: &str, error: &std::io::Error) -> Self {
        Failure::new(format!("{}: {doing}: {error}", path.display()))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Said { message, hint: None } => write!(f, "{message}"),
            Failure::Said { message, hint: Some(hint) } => write!(f, "{message}\n  hint: {hint}"),
            Failure::Interrupted(done) | Failure::Failed(done) => write!(f, "{done}"),
            Failure::BrokenPipe => write!(f, "the output was closed"),
        }
    }
}

impl From<sata::Error> for Failure {
    fn from(error: sata::Error) -> Self {
        let hint = match &error {
            sata::Error::NonFinite { .. } => {
                "attention over NaN or infinity is NaN everywhere: clean the input first"
            }
            sata::Error::State { .. } => {
                "a state continues only with the heads, sizes, series, scale, near blocks, sinks and \
                 decay that it was made with"
            }
            sata::Error::Denominators(_) => {
                "hermite, and taylor with an even number of terms, have negative weights: use gauss, \
                 an odd number of Taylor terms, smaller logits, or leave --strict away to get the \
                 outputs and a count"
            }
            _ => return Failure::new(error.to_string()),
        };
        Failure::new(error.to_string()).hint(hint)
    }
}

impl From<sata_cuda::Error> for Failure {
    fn from(error: sata_cuda::Error) -> Self {
        let hint = match error {
            sata_cuda::Error::Call(error) => return Failure::from(error),
            sata_cuda::Error::NoDriver { .. } => {
                "this command needs an NVIDIA GPU of compute capability 8.0 or later and its driver"
            }
            sata_cuda::Error::OutOfMemory { .. } => "give it fewer heads, or a GPU of its own",
            _ => return Failure::new(error.to_string()),
        };
        Failure::new(error.to_string()).hint(hint)
    }
}

impl From<sata_lm::TokenizerError> for Failure {
    fn from(error: sata_lm::TokenizerError) -> Self {
        Failure::new(error.to_string())
    }
}

impl From<sata_lm::train::TrainError> for Failure {
    fn from(error: sata_lm::train::TrainError) -> Self {
        Failure::new(error.to_string())
    }
}

impl From<sata_lm::infer::Error> for Failure {
    fn from(error: sata_lm::infer::Error) -> Self {
        match error {
            sata_lm::infer::Error::Attention(error) => Failure::from(error),
            error => Failure::new(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_goes_in_front_and_the_first_hint_stays() {
        let failure = Failure::new("too short").hint("first").hint("second").context("q");
        assert_eq!(failure.to_string(), "q: too short\n  hint: first");
    }
}
