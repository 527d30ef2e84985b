//! Which threads work: rayon's own pool, unless Python asked for another number of them, or the
//! process is a fork of one whose threads it does not have.

use std::sync::{Arc, PoisonError, RwLock};

use pyo3::PyResult;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use rayon::{ThreadPool, ThreadPoolBuilder};

static POOL: RwLock<Option<Arc<ThreadPool>>> = RwLock::new(None);

/// Most threads that can be asked for.
const MOST: usize = 1024;

/// Runs `work` where its parallel parts run on the threads that were asked for.
pub fn run<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let pool = POOL.read().unwrap_or_else(PoisonError::into_inner).clone();
    match pool {
        Some(pool) => pool.install(work),
        None => work(),
    }
}

/// How many threads there are.
pub fn count() -> usize {
    run(rayon::current_num_threads)
}

/// From now on `count` threads.
pub fn set(count: usize) -> PyResult<()> {
    if count == 0 || count > MOST {
        let text = format!("threads is {count}, but it must be 1 to {MOST}");
        return Err(PyValueError::new_err(text));
    }
    let pool = ThreadPoolBuilder::new().num_threads(count).build();
    let pool = pool.map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
    replace(Some(Arc::new(pool)));
    Ok(())
}

/// In a process that was forked: threads of its own.
pub fn after_fork() -> PyResult<()> {
    // The parent's pool is only counted here: its threads are not in this process.
    let count = match &*POOL.read().unwrap_or_else(PoisonError::into_inner) {
        Some(pool) => pool.current_num_threads(),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let pool = ThreadPoolBuilder::new().num_threads(count).build();
    let pool = pool.map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
    replace(Some(Arc::new(pool)));
    Ok(())
}

fn replace(pool: Option<Arc<ThreadPool>>) {
    let before = {
        let mut place = POOL.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *place, pool)
    };
    // Dropping a pool tells its threads to end, which those of a fork's parent would not hear.
    std::mem::forget(before);
}
