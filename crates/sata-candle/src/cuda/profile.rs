//! Where the time of a GPU goes, operation by operation.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Result;
use sata_cuda::{Device, Moment};

use super::{failed, gpu};

/// Whether anything is timed.
static ON: AtomicBool = AtomicBool::new(false);

type Times = Arc<Mutex<Vec<(&'static str, Moment, Moment)>>>;

/// The times of a device.
#[derive(Debug, Default)]
pub(crate) struct Profile(Times);

/// Something under way.
pub(crate) struct Timed(Option<(Times, Device, &'static str, Moment)>);

impl Profile {
    /// Times what is enqueued until the result is dropped, if anything is timed.
    pub fn time(&self, device: &Device, name: &'static str) -> Result<Timed> {
        if !ON.load(Ordering::Relaxed) {
            return Ok(Timed(None));
        }
        let begin = device.record().map_err(failed)?;
        Ok(Timed(Some((self.0.clone(), device.clone(), name, begin))))
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        if let Some((times, device, name, begin)) = self.0.take()
            && let Ok(end) = device.record()
        {
            times.lock().unwrap_or_else(PoisonError::into_inner).push((name, begin, end));
        }
    }
}

/// What an operation took.
#[derive(Clone, Debug, PartialEq)]
pub struct Share {
    /// Which.
    pub name: &'static str,
    /// How often.
    pub calls: usize,
    /// Seconds of the device.
    pub seconds: f64,
}

/// Times operations on GPUs from now on, or no longer.
pub fn profile(on: bool) {
    ON.store(on, Ordering::Relaxed);
}

/// What operations took since the last time; waits for the device.
///
/// # Errors
/// What the device reports.
pub fn take_profile(device: &candle_core::Device) -> Result<Vec<Share>> {
    let candle_core::Device::Cuda(device) = device else {
        return Ok(vec![]);
    };
    let gpu = gpu(device)?;
    let times = std::mem::take(&mut *gpu.profile.0.lock().unwrap_or_else(PoisonError::into_inner));
    let mut sums = BTreeMap::<&'static str, (usize, f64)>::new();
    for (name, begin, end) in times {
        let sum = sums.entry(name).or_default();
        sum.0 += 1;
        sum.1 += end.since(&begin).map_err(failed)?;
    }
    let share = |(name, (calls, seconds))| Share { name, calls, seconds };
    Ok(sums.into_iter().map(share).collect())
}
