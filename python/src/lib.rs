//! The compiled half of the Python package `sata`: calls on tensors of other libraries, by address.
//!
//! Its functions take what the Python half has checked and holds; nobody else should call them.

mod arguments;
mod backward;
mod call;
mod cuda;
mod diagnostics;
mod errors;
mod spec;
mod state;
mod tensor;
mod threads;

use pyo3::prelude::*;

/// The usual ALiBi slopes of so many heads, as a list.
#[pyfunction]
fn alibi_slopes(heads: usize) -> Vec<f64> {
    sata::alibi_slopes(heads)
}

/// How many GPUs the driver has; a RuntimeError where there is no driver.
#[pyfunction]
fn cuda_device_count() -> PyResult<usize> {
    sata_cuda::Device::count().map_err(errors::of_device)
}

/// The kernels' instruction set on this machine.
#[pyfunction]
fn simd_level() -> PyResult<String> {
    Ok(sata::Level::detect().map_err(errors::of_call)?.to_string())
}

/// How many threads calls on the CPU are spread over.
#[pyfunction]
fn get_num_threads(py: Python<'_>) -> usize {
    py.detach(threads::count)
}

/// Spreads calls on the CPU over so many threads from now on.
#[pyfunction]
fn set_num_threads(py: Python<'_>, threads: usize) -> PyResult<()> {
    py.detach(|| threads::set(threads))
}

/// For a process that was forked.
#[pyfunction]
fn after_fork() -> PyResult<()> {
    threads::after_fork()
}

/// The compiled half of the package `sata`.
#[pymodule(gil_used = false)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<spec::Spec>()?;
    module.add_class::<state::State>()?;
    module.add_class::<diagnostics::Diagnostics>()?;
    module.add_class::<diagnostics::HeadDiagnostics>()?;
    module.add_function(wrap_pyfunction!(call::forward, module)?)?;
    module.add_function(wrap_pyfunction!(backward::backward, module)?)?;
    module.add_function(wrap_pyfunction!(call::softmax, module)?)?;
    module.add_function(wrap_pyfunction!(call::kernel_seconds, module)?)?;
    module.add_function(wrap_pyfunction!(alibi_slopes, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_device_count, module)?)?;
    module.add_function(wrap_pyfunction!(simd_level, module)?)?;
    module.add_function(wrap_pyfunction!(get_num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(set_num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(after_fork, module)?)?;
    module.add("EMULATED", cuda::EMULATED)?;
    module.add("HAS_EMULATOR", cfg!(feature = "emulator"))?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    Ok(())
}
