//! Ctrl-C, for work that has something to put away before it stops.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::failure::{Failure, Outcome};

/// A flag that Ctrl-C raises; a second one ends the process at once, as it would a killed one.
///
/// # Errors
/// When the system does not let it be caught.
pub fn flag() -> Outcome<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let raised = Arc::clone(&flag);
    let set = ctrlc::set_handler(move || {
        if raised.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(crate::INTERRUPTED));
        }
    });
    set.map_err(|error| Failure::new(format!("catching Ctrl-C: {error}")))?;
    Ok(flag)
}
