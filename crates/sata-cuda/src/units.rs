//! Kernels that have been loaded, by unit.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::{Device, Error, Kernel, Unit};

/// The kernels of one device that calls have used.
#[derive(Debug)]
pub(crate) struct Units {
    device: Device,
    loaded: Mutex<HashMap<(String, &'static str), Kernel>>,
}

impl Units {
    pub(crate) fn new(device: &Device) -> Self {
        Units { device: device.clone(), loaded: Mutex::default() }
    }

    /// A kernel of a unit, loaded at its first use.
    pub(crate) fn kernel(&self, name: &'static str, unit: &Unit) -> Result<Kernel, Error> {
        let key = (unit.title(), name);
        let loaded = || self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = loaded().get(&key) {
            return Ok(kernel.clone());
        }
        // Compiled outside the lock: others go on meanwhile.
        let kernel = self.device.kernel(unit, name)?;
        Ok(loaded().entry(key).or_insert(kernel).clone())
    }
}
