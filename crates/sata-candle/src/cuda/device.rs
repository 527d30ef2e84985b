//! One GPU as `sata-cuda` has it, on candle's stream.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::{CudaDevice, Result, Tensor};
use sata::Error as CallError;
use sata_cuda::{Device, Error, Pending, Plan};

use super::profile::Profile;
use super::{failed, ordinal};
use crate::kernels::Kernels;

/// Kernels, plans and tables of a GPU.
#[derive(Debug)]
pub(crate) struct Gpu {
    /// Held so that its stream stays.
    pub candle: CudaDevice,
    pub device: Device,
    pub kernels: Kernels,
    pub profile: Profile,
    plans: Mutex<HashMap<String, Arc<Plan>>>,
    tables: Mutex<HashMap<String, Tensor>>,
    pending: Mutex<Vec<Pending>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// That of a candle device, opened once.
pub(crate) fn gpu(device: &CudaDevice) -> Result<Arc<Gpu>> {
    static OPENED: OnceLock<Mutex<Vec<Arc<Gpu>>>> = OnceLock::new();
    let mut opened = lock(OPENED.get_or_init(Mutex::default));
    if let Some(gpu) = opened.iter().find(|gpu| gpu.candle.id() == device.id()) {
        return Ok(gpu.clone());
    }
    // Its own stream is not used; opening it also keeps freed memory in the device's pool.
    let own = Device::new(ordinal(device)).map_err(failed)?;
    let stream = device.cuda_stream().cu_stream();
    // SAFETY: a stream of the same primary context, which the candle device holds for ever here.
    let on_stream = unsafe { own.on_stream(stream.cast()) };
    let gpu = Arc::new(Gpu {
        candle: device.clone(),
        kernels: Kernels::new(&on_stream),
        device: on_stream,
        profile: Profile::default(),
        plans: Mutex::default(),
        tables: Mutex::default(),
        pending: Mutex::default(),
    });
    opened.push(gpu.clone());
    Ok(gpu)
}

impl Gpu {
    /// The plan of a spec, made once.
    pub fn plan(&self, spec: &sata::Spec) -> Result<Arc<Plan>> {
        let key = format!("{spec:?}");
        if let Some(plan) = lock(&self.plans).get(&key) {
            return Ok(plan.clone());
        }
        let plan = Arc::new(Plan::new(&self.device, spec).map_err(failed)?);
        lock(&self.plans).insert(key, plan.clone());
        Ok(plan)
    }

    /// A table that does not change.
    pub fn table(&self, key: String, make: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        if let Some(table) = lock(&self.tables).get(&key) {
            return Ok(table.clone());
        }
        let table = make()?;
        lock(&self.tables).insert(key, table.clone());
        Ok(table)
    }

    /// What a strict call will have to say.
    pub fn later(&self, pending: Pending) {
        lock(&self.pending).push(pending);
    }
}

/// Waits for the device, and reports denominators of strict attention since the last time that were
/// not positive and finite: on a GPU nobody waits for them where they happen. Of all of them a share of
/// `allowed` may be 0 or below: sums of bf16 leave a few such where all weights of a query nearly
/// vanish, as those of even powers can.
///
/// # Errors
/// A wrapped [`sata_cuda::Error`].
pub fn settle(device: &candle_core::Device, allowed: f64) -> Result<()> {
    let candle_core::Device::Cuda(device) = device else {
        return Ok(());
    };
    let pending = std::mem::take(&mut *lock(&gpu(device)?.pending));
    let (mut queries, mut unsound, mut first) = (0, 0, None);
    let mut outcome = Ok(());
    for pending in pending {
        match pending.wait() {
            Ok(noticed) => queries += noticed.queries,
            Err(Error::Call(CallError::Denominators(noticed))) if noticed.non_finite == 0 => {
                queries += noticed.queries;
                unsound += noticed.non_positive;
                first.get_or_insert(noticed);
            }
            Err(error) => outcome = outcome.and(Err(failed(error))),
        }
    }
    match first {
        Some(noticed) if unsound as f64 > allowed * queries as f64 => {
            outcome.and(Err(failed(Error::Call(CallError::Denominators(noticed)))))
        }
        _ => outcome,
    }
}
