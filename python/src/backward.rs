//! Backward calls on other libraries' tensors.

use half::{bf16, f16};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use sata::{Gradients, Plan, Real};

use crate::arguments::{Arguments, Dtype, no_f64};
use crate::spec::{Inner, Spec};
use crate::tensor::{Handed, HandedMask, Raw};
use crate::{errors, threads};

/// Where the gradients of a call go.
#[derive(Debug)]
struct Wanted {
    dy: Raw,
    dq: Raw,
    dk: Raw,
    dv: Raw,
    d_log_gates: Option<Raw>,
    d_slopes: bool,
}

/// # Safety
/// As for [`run`], for all of `wanted` as well.
unsafe fn reverse<E: Real>(
    plan: &Plan,
    arguments: &Arguments,
    wanted: &Wanted,
    state: Option<&mut sata::State<E>>,
) -> PyResult<Option<Vec<f64>>> {
    // SAFETY: promised by the caller.
    let mask = unsafe { arguments.mask()? };
    // SAFETY: likewise.
    let (mut call, dy, mut gradients) = unsafe {
        (
            arguments.call::<E>(mask.as_deref())?,
            wanted.dy.view("dy")?,
            Gradients::new(
                wanted.dq.view_mut("dq")?,
                wanted.dk.view_mut("dk")?,
                wanted.dv.view_mut("dv")?,
            ),
        )
    };
    if let Some(state) = state {
        call = call.state(state);
    }
    if let Some(d_log_gates) = &wanted.d_log_gates {
        // SAFETY: promised by the caller.
        gradients = gradients.log_gates(unsafe { d_log_gates.view_mut("d_log_gates")? });
    }
    let mut d_slopes =
        wanted.d_slopes.then(|| vec![0.0; arguments.slopes.as_ref().map_or(0, Vec::len)]);
    if let Some(d_slopes) = &mut d_slopes {
        gradients = gradients.slopes(d_slopes);
    }
    plan.backward(call, dy, gradients).map_err(errors::of_call)?;
    Ok(d_slopes)
}

/// # Safety
/// As for [`run_on_device`], for all of `wanted` as well.
unsafe fn reverse_on_device<E: sata_cuda::Element>(
    spec: &Inner,
    place: (usize, usize),
    arguments: &Arguments,
    wanted: &Wanted,
) -> PyResult<Option<Vec<f64>>> {
    let plan = spec.device_plan(place)?;
    let device = plan.device();
    // SAFETY: promised by the caller.
    let (call, dy, mut gradients) = unsafe {
        (
            arguments.device_call::<E>(device)?,
            wanted.dy.device_view("dy", device)?,
            sata_cuda::Gradients::new(
                wanted.dq.device_view_mut("dq", device)?,
                wanted.dk.device_view_mut("dk", device)?,
                wanted.dv.device_view_mut("dv", device)?,
            ),
        )
    };
    if let Some(d_log_gates) = &wanted.d_log_gates {
        // SAFETY: promised by the caller.
        let view = unsafe { d_log_gates.device_view_mut("d_log_gates", device)? };
        gradients = gradients.log_gates(view);
    }
    let heads = arguments.slopes.as_ref().map_or(0, Vec::len);
    let d_slopes = wanted.d_slopes.then(|| sata_cuda::Buffer::<f64>::zeroed(device, heads));
    let mut d_slopes = d_slopes.transpose().map_err(errors::of_device)?;
    if let Some(d_slopes) = &mut d_slopes {
        gradients = gradients.slopes(d_slopes);
    }
    plan.backward(call, dy, gradients).map_err(errors::of_device)?;
    d_slopes.map(|d_slopes| d_slopes.to_vec().map_err(errors::of_device)).transpose()
}

/// The gradients of a forward call, written to `dq`, `dk`, `dv` and `d_log_gates`; gives those of
/// the slopes where they are wanted. On the CPU f32 and f64 only.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn backward(
    py: Python<'_>,
    spec: &Bound<'_, Spec>,
    dtype: u8,
    q: Handed,
    k: Handed,
    v: Handed,
    dy: Handed,
    dq: Handed,
    dk: Handed,
    dv: Handed,
    causal: bool,
    key_mask: Option<HandedMask>,
    packed: Option<(Vec<usize>, Vec<usize>)>,
    slopes: Option<Vec<f64>>,
    d_slopes: bool,
    log_gates: Option<Handed>,
    d_log_gates: Option<Handed>,
    device: Option<(usize, usize)>,
) -> PyResult<Option<Vec<f64>>> {
    let spec = &spec.get().inner;
    let dtype = Dtype::of(dtype)?;
    let arguments = Arguments::new(q, k, v, causal, key_mask, packed, slopes, log_gates)?;
    let wanted = Wanted {
        dy: Raw::new("dy", dy)?,
        dq: Raw::new("dq", dq)?,
        dk: Raw::new("dk", dk)?,
        dv: Raw::new("dv", dv)?,
        d_log_gates: d_log_gates.map(|gates| Raw::new("d_log_gates", gates)).transpose()?,
        d_slopes,
    };
    py.detach(|| {
        if let Some(place) = device {
            // SAFETY: as in `forward`.
            return unsafe {
                match dtype {
                    Dtype::F32 => reverse_on_device::<f32>(spec, place, &arguments, &wanted),
                    Dtype::F16 => reverse_on_device::<f16>(spec, place, &arguments, &wanted),
                    Dtype::BF16 => reverse_on_device::<bf16>(spec, place, &arguments, &wanted),
                    Dtype::F64 => Err(no_f64()),
                }
            };
        }
        let plan = spec.plan()?;
        let (arguments, wanted) = (&arguments, &wanted);
        threads::run(|| {
            // SAFETY: as in `forward`.
            unsafe {
                match dtype {
                    Dtype::F32 => reverse::<f32>(&plan, arguments, wanted, None),
                    Dtype::F64 => reverse::<f64>(&plan, arguments, wanted, None),
                    _ => {
                        Err(PyValueError::new_err("gradients on the CPU are of float32 or float64"))
                    }
                }
            }
        })
    })
}
