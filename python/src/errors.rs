//! Errors as Python's exceptions.

use pyo3::PyErr;
use pyo3::exceptions::{PyNotImplementedError, PyOSError, PyRuntimeError, PyValueError};
use sata_cuda::Error as CudaError;

/// What is wrong with a call is a `ValueError`, what is not supported a `NotImplementedError`, what
/// the system refuses an `OSError`, and the rest a `RuntimeError`.
pub fn of_call(error: sata::Error) -> PyErr {
    let text = error.to_string();
    match error {
        sata::Error::Unsupported { .. } => PyNotImplementedError::new_err(text),
        sata::Error::Io { source, path, .. } => match source.raw_os_error() {
            // With a number, Python makes it the fitting kind, such as `FileNotFoundError`.
            Some(code) => PyOSError::new_err((code, source.to_string(), path.into_os_string())),
            None => PyOSError::new_err(text),
        },
        sata::Error::Denominators(_) | sata::Error::Level { .. } => PyRuntimeError::new_err(text),
        _ => PyValueError::new_err(text),
    }
}

/// The same for what devices report.
pub fn of_device(error: CudaError) -> PyErr {
    let text = error.to_string();
    match error {
        CudaError::Call(error) => of_call(error),
        CudaError::Unsupported { .. } => PyNotImplementedError::new_err(text),
        CudaError::Argument { .. } => PyValueError::new_err(text),
        CudaError::Io { .. } => PyOSError::new_err(text),
        _ => PyRuntimeError::new_err(text),
    }
}
