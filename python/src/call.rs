//! Forward calls on other libraries' tensors.

use half::{bf16, f16};
use pyo3::prelude::*;
use sata::{Element, Plan};

use crate::arguments::{Arguments, Dtype, no_f64};
use crate::diagnostics::Diagnostics;
use crate::spec::{Inner, Spec};
use crate::state::{Kept, State};
use crate::tensor::{Handed, HandedMask, Raw};
use crate::{errors, threads};

/// # Safety
/// As for [`Arguments::call`], and for `out` as for [`Raw::view_mut`].
unsafe fn run<E: Element>(
    plan: &Plan,
    arguments: &Arguments,
    out: Raw,
    state: Option<&mut sata::State<E::Compute>>,
    diagnose: bool,
) -> PyResult<sata::Diagnostics> {
    // SAFETY: promised by the caller.
    let mask = unsafe { arguments.mask()? };
    // SAFETY: likewise.
    let (mut call, out) = unsafe { (arguments.call::<E>(mask.as_deref())?, out.view_mut("out")?) };
    if let Some(state) = state {
        call = call.state(state);
    }
    // What is known per head needs three orders of the spec.
    let orders = plan.spec().orders();
    let diagnose = diagnose && (0..3).all(|p| orders.contains(&p));
    plan.run(call.diagnose(diagnose), out).map_err(errors::of_call)
}

/// # Safety
/// As for [`Arguments::device_call`], and for `out` as for [`Raw::device_view_mut`].
unsafe fn run_on_device<E: sata_cuda::Element>(
    spec: &Inner,
    place: (usize, usize),
    arguments: &Arguments,
    out: Raw,
    state: Option<&mut Kept>,
    diagnose: bool,
) -> PyResult<Option<sata::Diagnostics>> {
    let plan = spec.device_plan(place)?;
    let device = plan.device();
    // SAFETY: promised by the caller.
    let out = unsafe { out.device_view_mut::<E>("out", device)? };
    // SAFETY: promised by the caller.
    let call = unsafe { arguments.device_call::<E>(device)? };
    let pending = match state {
        None => plan.enqueue(call, out),
        Some(Kept::Device(on)) if on.place.0 == place.0 => {
            if arguments.is_step(on.state.sequences()) && !diagnose {
                // SAFETY: promised by the caller.
                return unsafe { step::<E>(&plan, arguments, on, out) }.map(|()| None);
            }
            plan.enqueue(call.state(&mut on.state), out)
        }
        Some(Kept::Device(on)) => {
            let text =
                format!("state is on cuda:{}, but the call is on cuda:{}", on.place.0, place.0);
            return Err(pyo3::exceptions::PyRuntimeError::new_err(text));
        }
        Some(other) => return Err(other.other("on a GPU")),
    }
    .map_err(errors::of_device)?;
    if diagnose { pending.wait().map(Some).map_err(errors::of_device) } else { Ok(None) }
}
/// # Safety
/// As for [`Arguments::device_call`].
unsafe fn step<E: sata_cuda::Element>(
    plan: &sata_cuda::Plan,
    arguments: &Arguments,
    on: &mut crate::state::OnDevice,
    out: sata_cuda::ViewMut<'_, E>,
) -> PyResult<()> {
    let device = plan.device();
    // SAFETY: promised by the caller.
    let (q, k, v) = unsafe {
        (
            arguments.q.device_view::<E>("q", device)?,
            arguments.k.device_view::<E>("k", device)?,
            arguments.v.device_view::<E>("v", device)?,
        )
    };
    let mut step = sata_cuda::Step::new(q, k, v);
    if let Some(slopes) = &arguments.slopes {
        step = step.slopes(on.slopes.get(device, slopes)?);
    }
    if let Some(log_gates) = &arguments.log_gates {
        // SAFETY: promised by the caller.
        step = step.log_gates(unsafe { log_gates.device_view("log_gates", device)? });
    }
    plan.step(&mut on.state, &step, out).map_err(errors::of_device)
}

/// Computes a call into `out`. Gives what was noticed where it was asked for, and on the CPU where
/// a denominator is not positive and finite; None otherwise.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn forward(
    py: Python<'_>,
    spec: &Bound<'_, Spec>,
    dtype: u8,
    q: Handed,
    k: Handed,
    v: Handed,
    out: Handed,
    causal: bool,
    key_mask: Option<HandedMask>,
    packed: Option<(Vec<usize>, Vec<usize>)>,
    slopes: Option<Vec<f64>>,
    log_gates: Option<Handed>,
    state: Option<&Bound<'_, State>>,
    diagnose: bool,
    device: Option<(usize, usize)>,
) -> PyResult<Option<Py<Diagnostics>>> {
    let spec = &spec.get().inner;
    let state = state.map(Bound::get);
    let dtype = Dtype::of(dtype)?;
    let arguments = Arguments::new(q, k, v, causal, key_mask, packed, slopes, log_gates)?;
    let out = Raw::new("out", out)?;
    let found = py.detach(|| -> PyResult<Option<sata::Diagnostics>> {
        let mut kept = state.map(State::lock);
        let kept = kept.as_deref_mut();
        if let Some(place) = device {
            // SAFETY: the package's Python half hands over tensors that it holds, of this type and
            // on this device; the stream is the current one, in whose order their memory is freed.
            return unsafe {
                match dtype {
                    Dtype::F32 => {
                        run_on_device::<f32>(spec, place, &arguments, out, kept, diagnose)
                    }
                    Dtype::F16 => {
                        run_on_device::<f16>(spec, place, &arguments, out, kept, diagnose)
                    }
                    Dtype::BF16 => {
                        run_on_device::<bf16>(spec, place, &arguments, out, kept, diagnose)
                    }
                    Dtype::F64 => Err(no_f64()),
                }
            };
        }
        let plan = spec.plan()?;
        let arguments = &arguments;
        threads::run(|| {
            // SAFETY: the package's Python half hands over tensors that it holds, of this type and
            // in this process's memory; `out` is its own.
            let found = unsafe {
                match (dtype, kept) {
                    (Dtype::F32, None) => run::<f32>(&plan, arguments, out, None, diagnose),
                    (Dtype::F16, None) => run::<f16>(&plan, arguments, out, None, diagnose),
                    (Dtype::BF16, None) => run::<bf16>(&plan, arguments, out, None, diagnose),
                    (Dtype::F64, None) => run::<f64>(&plan, arguments, out, None, diagnose),
                    (Dtype::F64, Some(Kept::F64(state))) => {
                        run::<f64>(&plan, arguments, out, Some(state), diagnose)
                    }
                    (Dtype::F32, Some(Kept::F32(state))) => {
                        run::<f32>(&plan, arguments, out, Some(state), diagnose)
                    }
                    (Dtype::F16, Some(Kept::F32(state))) => {
                        run::<f16>(&plan, arguments, out, Some(state), diagnose)
                    }
                    (Dtype::BF16, Some(Kept::F32(state))) => {
                        run::<bf16>(&plan, arguments, out, Some(state), diagnose)
                    }
                    (Dtype::F64, Some(other)) => return Err(other.other("of float64 on the CPU")),
                    (_, Some(other)) => {
                        return Err(other.other("of float32, float16 or bfloat16 on the CPU"));
                    }
                }
            };
            found.map(Some)
        })
    })?;
    match found.filter(|found| diagnose || !found.is_clean()) {
        Some(found) => Diagnostics::of(py, found).map(Some),
        None => Ok(None),
    }
}

/// Softmax attention on the CPU, exact, of f32 or f64: what approximations are measured against.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn softmax(
    py: Python<'_>,
    dtype: u8,
    q: Handed,
    k: Handed,
    v: Handed,
    out: Handed,
    scale: f64,
    causal: bool,
) -> PyResult<()> {
    let dtype = Dtype::of(dtype)?;
    let (q, k, v) = (Raw::new("q", q)?, Raw::new("k", k)?, Raw::new("v", v)?);
    let out = Raw::new("out", out)?;
    /// # Safety
    /// As for [`run`].
    unsafe fn exact<E: Element>(
        [q, k, v, out]: [Raw; 4],
        scale: f64,
        causal: bool,
    ) -> PyResult<()> {
        // SAFETY: promised by the caller.
        let (q, k, v, out) =
            unsafe { (q.view::<E>("q")?, k.view("k")?, v.view("v")?, out.view_mut("out")?) };
        sata::conventional::attention(q, k, v, scale, causal, 0, out).map_err(errors::of_call)
    }
    py.detach(|| {
        threads::run(|| {
            // SAFETY: as in `forward`.
            unsafe {
                match dtype {
                    Dtype::F32 => exact::<f32>([q, k, v, out], scale, causal),
                    Dtype::F64 => exact::<f64>([q, k, v, out], scale, causal),
                    Dtype::F16 => exact::<f16>([q, k, v, out], scale, causal),
                    Dtype::BF16 => exact::<bf16>([q, k, v, out], scale, causal),
                }
            }
        })
    })
}

/// Seconds that a forward call takes by itself, without Python and without gradients: the least mean
/// of `rounds` rounds of `calls` calls. On a GPU a round ends when the device has done its work.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn kernel_seconds(
    py: Python<'_>,
    spec: &Bound<'_, Spec>,
    dtype: u8,
    q: Handed,
    k: Handed,
    v: Handed,
    out: Handed,
    causal: bool,
    rounds: usize,
    calls: usize,
    device: Option<(usize, usize)>,
) -> PyResult<f64> {
    let spec = &spec.get().inner;
    let dtype = Dtype::of(dtype)?;
    let arguments = Arguments::new(q, k, v, causal, None, None, None, None)?;
    let out = Raw::new("out", out)?;
    py.detach(|| {
        let plan = spec.plan()?;
        let arguments = &arguments;
        let once = || {
            // SAFETY: as in `forward`.
            unsafe {
                match (device, dtype) {
                    (None, Dtype::F32) => run::<f32>(&plan, arguments, out, None, false).map(drop),
                    (None, Dtype::F64) => run::<f64>(&plan, arguments, out, None, false).map(drop),
                    (None, Dtype::F16) => run::<f16>(&plan, arguments, out, None, false).map(drop),
                    (None, Dtype::BF16) => {
                        run::<bf16>(&plan, arguments, out, None, false).map(drop)
                    }
                    (Some(place), Dtype::F32) => {
                        run_on_device::<f32>(spec, place, arguments, out, None, false).map(drop)
                    }
                    (Some(place), Dtype::F16) => {
                        run_on_device::<f16>(spec, place, arguments, out, None, false).map(drop)
                    }
                    (Some(place), Dtype::BF16) => {
                        run_on_device::<bf16>(spec, place, arguments, out, None, false).map(drop)
                    }
                    (Some(_), Dtype::F64) => Err(no_f64()),
                }
            }
        };
        let on_device = device.map(crate::cuda::device).transpose()?;
        let wait = || match &on_device {
            Some(device) => device.synchronize().map_err(errors::of_device),
            None => Ok(()),
        };
        once()?;
        wait()?;
        let mut least = f64::INFINITY;
        for _ in 0..rounds {
            let start = std::time::Instant::now();
            for _ in 0..calls {
                once()?;
            }
            wait()?;
            least = least.min(start.elapsed().as_secs_f64() / calls.max(1) as f64);
        }
        Ok(least)
    })
}
