//! GPUs, opened once each, with the streams of other libraries.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use pyo3::PyResult;
use pyo3::exceptions::PyValueError;
use sata_cuda::{Buffer, Device};

use crate::errors;

/// The number of a device that is the emulator on the CPU.
pub const EMULATED: usize = u32::MAX as usize;

/// Device `ordinal` with stream `stream` of its primary context.
pub fn device((ordinal, stream): (usize, usize)) -> PyResult<Device> {
    static OPENED: Mutex<Option<HashMap<usize, Device>>> = Mutex::new(None);
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let opened = opened.get_or_insert_default();
    let device = match opened.get(&ordinal) {
        Some(device) => device.clone(),
        None => {
            let device = open(ordinal)?;
            opened.insert(ordinal, device.clone());
            device
        }
    };
    if ordinal == EMULATED {
        return Ok(device);
    }
    // SAFETY: the caller's stream is one of the primary context, as its library makes them, and
    // lives as long as that library does.
    Ok(unsafe { device.on_stream(stream as *mut _) })
}

fn open(ordinal: usize) -> PyResult<Device> {
    if ordinal == EMULATED {
        #[cfg(feature = "emulator")]
        return Device::emulated().map_err(errors::of_device);
        #[cfg(not(feature = "emulator"))]
        return Err(PyValueError::new_err("this package was built without the emulator"));
    }
    // SAFETY: the default stream is there for ever.
    unsafe { Device::from_stream(ordinal, std::ptr::null_mut()) }.map_err(errors::of_device)
}

/// Slopes on a device, copied there once for as long as they stay the same.
#[derive(Debug, Default)]
pub struct Slopes(Option<(Vec<f64>, Buffer<f64>)>);

impl Slopes {
    pub fn get(&mut self, device: &Device, slopes: &[f64]) -> PyResult<&Buffer<f64>> {
        let same = self.0.as_ref().is_some_and(|(kept, buffer)| {
            kept == slopes && buffer.device().raw_stream() == device.raw_stream()
        });
        if !same {
            let buffer = Buffer::from_slice(device, slopes).map_err(errors::of_device)?;
            self.0 = Some((slopes.to_vec(), buffer));
        }
        match &self.0 {
            Some((_, buffer)) => Ok(buffer),
            None => Err(PyValueError::new_err("slopes are missing")),
        }
    }
}
