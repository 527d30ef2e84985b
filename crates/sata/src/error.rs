//! What can be wrong with a call, one sentence each, with the argument and the numbers.

use std::path::PathBuf;

use crate::diagnostics::Diagnostics;

/// Everything that this library refuses.
///
/// Each variant names the argument at fault and the sizes that did not fit. All input is checked
/// before any work, so that outputs and states are as they were when one of these comes back; the
/// one exception is [`Error::Denominators`], which a strict call reports after the fact.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field of a [`Spec`](crate::Spec) has a value it cannot have.
    #[error("{field} is {value}, but {requires}")]
    Spec {
        /// The field of the spec.
        field: &'static str,
        /// What was given.
        value: String,
        /// What would be accepted.
        requires: String,
    },
    /// The feature basis, or the state made of it, is larger than this machine can hold.
    #[error(
        "d_key = {d_key} with orders {orders:?} has D = {features} features; {what} needs \
         {bytes} bytes and {limit} are available: use fewer terms or smaller heads"
    )]
    TooLarge {
        /// Size of a key.
        d_key: usize,
        /// The orders that the series names.
        orders: Vec<usize>,
        /// Number of features over all orders.
        features: u128,
        /// What was to be allocated.
        what: &'static str,
        /// Its size.
        bytes: u128,
        /// What is there.
        limit: u128,
    },
    /// An argument's shape or length does not fit the others.
    #[error("{argument} has shape {got:?}, but {expected}")]
    Shape {
        /// The argument at fault.
        argument: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// What would fit.
        expected: String,
    },
    /// A view reaches beyond its slice, or its last dimension is not contiguous.
    #[error(
        "{argument}: shape {shape:?} with strides {strides:?} needs {needs} elements, but the \
         slice has {len}"
    )]
    View {
        /// The argument at fault.
        argument: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides, in elements.
        strides: Vec<usize>,
        /// Elements the view would touch, or `usize::MAX` when that overflows.
        needs: usize,
        /// Elements in the slice.
        len: usize,
    },
    /// An input holds a NaN or an infinity.
    #[error("{argument} holds {value} at {index:?} [batch, head, token, channel]")]
    NonFinite {
        /// The argument at fault.
        argument: &'static str,
        /// Where, in the order batch, head, token, channel.
        index: [usize; 4],
        /// The value found.
        value: f64,
    },
    /// This build cannot do what the spec asks.
    #[error("{what} is not supported by {by}")]
    Unsupported {
        /// The feature asked for.
        what: String,
        /// What refuses it.
        by: &'static str,
    },
    /// A state does not fit the call.
    #[error("the state has {field} = {state}, but the call has {call}")]
    State {
        /// What differs.
        field: &'static str,
        /// The state's value.
        state: String,
        /// The call's value.
        call: String,
    },
    /// Numbers that a state was to be made of hold what no state holds.
    #[error("the state's {part}: {reason}")]
    Part {
        /// Which of them.
        part: &'static str,
        /// What was found.
        reason: String,
    },
    /// A file is not what it should be.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
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
    /// A strict call met denominators that are not positive and finite. The call has been carried
    /// out all the same: outputs and state are what the call without `strict` would have left.
    #[error("strict: {0}")]
    Denominators(Diagnostics),
    /// The instruction set asked for is unknown or not on this machine.
    #[error("SIMD level '{asked}' is not available here; this machine has {available}")]
    Level {
        /// What was asked for.
        asked: String,
        /// What the machine has.
        available: String,
    },
}

impl Error {
    pub(crate) fn shape(
        argument: &'static str,
        got: &[usize],
        expected: impl Into<String>,
    ) -> Self {
        Error::Shape { argument, got: got.to_vec(), expected: expected.into() }
    }

    pub(crate) fn file(path: &std::path::Path, reason: impl Into<String>) -> Self {
        Error::File { path: path.to_path_buf(), reason: reason.into() }
    }

    pub(crate) fn io(path: &std::path::Path, doing: &'static str, source: std::io::Error) -> Self {
        Error::Io { path: path.to_path_buf(), doing, source }
    }
}
