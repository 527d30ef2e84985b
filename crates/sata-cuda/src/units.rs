//! Kernels that have been loaded, by unit.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::{Device, Error, Kernel, Unit};

/// Blocks of a launch in y and z at most.
pub(crate) const MOST_BLOCKS: usize = 65_535;

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

/// Blocks of a launch, or an error where there would be too many.
pub(crate) fn grid(blocks: [usize; 3]) -> Result<[u32; 3], Error> {
    let [x, y, z] = blocks;
    if x > i32::MAX as usize || y > MOST_BLOCKS || z > MOST_BLOCKS {
        let what = format!("a call of {x} × {y} × {z} blocks");
        return Err(Error::Unsupported { what });
    }
    Ok([x as u32, y as u32, z as u32])
}
