//! What the operations refuse.

use candle_core::DType;

/// What is wrong with an operation's arguments. It comes wrapped in [`candle_core::Error`], and is
/// found before any work is done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A shape that does not fit the other arguments.
    #[error("{op}: {argument} has shape {got:?}, but {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// What would fit.
        expected: String,
    },
    /// A type of element that the operation does not take.
    #[error("{op}: {argument} is {got:?}, but {expected}")]
    Type {
        /// The operation.
        op: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// Its type.
        got: DType,
        /// What would fit.
        expected: String,
    },
    /// A number that the operation cannot work with.
    #[error("{op}: {argument} is {got}, but {expected}")]
    Value {
        /// The operation.
        op: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// What it is.
        got: String,
        /// What would fit.
        expected: String,
    },
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        candle_core::Error::wrap(error)
    }
}

pub(crate) fn shape(
    op: &'static str,
    argument: &'static str,
    got: &[usize],
    expected: impl Into<String>,
) -> candle_core::Error {
    Error::Shape { op, argument, got: got.to_vec(), expected: expected.into() }.into()
}

pub(crate) fn dtype(
    op: &'static str,
    argument: &'static str,
    got: DType,
    expected: impl Into<String>,
) -> candle_core::Error {
    Error::Type { op, argument, got, expected: expected.into() }.into()
}

pub(crate) fn value(
    op: &'static str,
    argument: &'static str,
    got: impl ToString,
    expected: impl Into<String>,
) -> candle_core::Error {
    Error::Value { op, argument, got: got.to_string(), expected: expected.into() }.into()
}
