//! Forward and backward calls on other libraries' tensors.

use half::{bf16, f16};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use sata::{Call, Element, Gradients, Plan, Real};

use crate::spec::{Inner, Spec};
use crate::state::{Kept, State};
use crate::tensor::{Handed, HandedMask, Raw, RawMask};
use crate::{errors, threads};

/// Types of numbers, as Python numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dtype {
    F32,
    F64,
    F16,
    BF16,
}

impl Dtype {
    fn of(code: u8) -> PyResult<Self> {
        match code {
            0 => Ok(Dtype::F32),
            1 => Ok(Dtype::F64),
            2 => Ok(Dtype::F16),
            3 => Ok(Dtype::BF16),
            _ => Err(PyTypeError::new_err(format!("{code} is no type of numbers"))),
        }
    }
}

/// What a call noticed about its denominators.
#[pyclass(frozen, get_all, module = "sata")]
#[derive(Debug)]
pub struct Diagnostics {
    /// Queries answered, over batch, heads and tokens.
    queries: u64,
    /// Queries whose denominator is zero or negative.
    non_positive: u64,
    /// Queries whose denominator is NaN or infinite.
    non_finite: u64,
    /// The first of those: sequence, query head, token of the call; or None.
    first: Option<(usize, usize, usize)>,
    /// Per query head, a `HeadDiagnostics`; empty where it was not asked for or is not known.
    heads: Vec<Py<HeadDiagnostics>>,
}

#[pymethods]
impl Diagnostics {
    /// Whether every denominator was positive and finite.
    #[getter]
    fn is_clean(&self) -> bool {
        self.non_positive == 0 && self.non_finite == 0
    }

    fn __str__(&self) -> String {
        sata::Diagnostics {
            queries: self.queries,
            non_positive: self.non_positive,
            non_finite: self.non_finite,
            first: self.first.map(|(a, b, c)| [a, b, c]),
            heads: vec![],
        }
        .to_string()
    }

    fn __repr__(&self) -> String {
        format!(
            "sata.Diagnostics(queries={}, non_positive={}, non_finite={}, heads={})",
            self.queries,
            self.non_positive,
            self.non_finite,
            self.heads.len()
        )
    }
}

/// What one query head's far logits are like, and what to expect of their series.
#[pyclass(frozen, get_all, module = "sata")]
#[derive(Debug)]
pub struct HeadDiagnostics {
    /// Queries answered.
    queries: u64,
    /// Queries whose denominator is zero or negative.
    non_positive: u64,
    /// Queries whose denominator is NaN or infinite.
    non_finite: u64,
    /// Queries that have a far past; the numbers below are over these.
    far: u64,
    /// Mean of the far logits.
    mean: f64,
    /// Deviation of a query's far logits, root mean square over queries.
    deviation: f64,
    /// The largest such deviation.
    max_deviation: f64,
    /// An estimate of the relative error of the far part, or None. It promises nothing.
    estimate: Option<f64>,
    /// A bound on |y - softmax| in multiples of the largest |v|, or None where there is none.
    bound: Option<f64>,
}

#[pymethods]
impl HeadDiagnostics {
    fn __repr__(&self) -> String {
        let or_none = |x: Option<f64>| x.map_or("None".into(), |x| format!("{x:.4}"));
        format!(
            "sata.HeadDiagnostics(mean={:.4}, deviation={:.4}, estimate={}, bound={})",
            self.mean,
            self.deviation,
            or_none(self.estimate),
            or_none(self.bound)
        )
    }
}

impl Diagnostics {
    fn of(py: Python<'_>, found: sata::Diagnostics) -> PyResult<Py<Self>> {
        let head = |head: sata::HeadDiagnostics| {
            Py::new(
                py,
                HeadDiagnostics {
                    queries: head.queries,
                    non_positive: head.non_positive,
                    non_finite: head.non_finite,
                    far: head.far,
                    mean: head.mean,
                    deviation: head.deviation,
                    max_deviation: head.max_deviation,
                    estimate: head.estimate,
                    bound: head.bound,
                },
            )
        };
        let heads: PyResult<Vec<_>> = found.heads.into_iter().map(head).collect();
        Py::new(
            py,
            Diagnostics {
                queries: found.queries,
                non_positive: found.non_positive,
                non_finite: found.non_finite,
                first: found.first.map(|[a, b, c]| (a, b, c)),
                heads: heads?,
            },
        )
    }
}

/// A call's arguments beside its spec, state and outputs.
#[derive(Debug)]
struct Arguments {
    q: Raw,
    k: Raw,
    v: Raw,
    causal: bool,
    mask: Option<RawMask<'static>>,
    packed: Option<(Vec<usize>, Vec<usize>)>,
    slopes: Option<Vec<f64>>,
    log_gates: Option<Raw>,
}

impl Arguments {
    #[allow(clippy::too_many_arguments)]
    fn new(
        q: Handed,
        k: Handed,
        v: Handed,
        causal: bool,
        mask: Option<HandedMask>,
        packed: Option<(Vec<usize>, Vec<usize>)>,
        slopes: Option<Vec<f64>>,
        log_gates: Option<Handed>,
    ) -> PyResult<Self> {
        Ok(Arguments {
            q: Raw::new("q", q)?,
            k: Raw::new("k", k)?,
            v: Raw::new("v", v)?,
            causal,
            mask: mask.map(RawMask::new).transpose()?,
            packed,
            slopes,
            log_gates: log_gates.map(|gates| Raw::new("log_gates", gates)).transpose()?,
        })
    }

    /// The mask, copied.
    ///
    /// # Safety
    /// As for [`RawMask::to_vec`].
    unsafe fn mask(&self) -> PyResult<Option<Vec<bool>>> {
        // SAFETY: promised by the caller.
        self.mask.map(|mask| unsafe { mask.to_vec() }).transpose()
    }

    /// A call for the CPU.
    ///
    /// # Safety
    /// All tensors are there, of type `E` (gates of f32), for as long as the call is used, and
    /// nothing writes to them meanwhile.
    unsafe fn call<'a, E: Element>(
        &'a self,
        mask: Option<&'a [bool]>,
    ) -> PyResult<Call<'a, 'a, E>> {
        // SAFETY: promised by the caller.
        let (q, k, v) = unsafe { (self.q.view("q")?, self.k.view("k")?, self.v.view("v")?) };
        let mut call = if self.causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
        if let Some(mask) = mask {
            call = call.key_mask(mask);
        }
        if let Some((cu_queries, cu_keys)) = &self.packed {
            call = call.packed(cu_queries, cu_keys);
        }
        if let Some(slopes) = &self.slopes {
            call = call.slopes(slopes);
        }
        if let Some(log_gates) = &self.log_gates {
            // SAFETY: promised by the caller.
            call = call.log_gates(unsafe { log_gates.view("log_gates")? });
        }
        Ok(call)
    }

    /// A call for a GPU.
    ///
    /// # Safety
    /// As for [`Raw::device_view`], of type `E` (gates of f32).
    unsafe fn device_call<'a, E: sata_cuda::Element>(
        &'a self,
        device: &'a sata_cuda::Device,
    ) -> PyResult<sata_cuda::Call<'a, 'a, E>> {
        // SAFETY: promised by the caller.
        let (q, k, v) = unsafe {
            (
                self.q.device_view("q", device)?,
                self.k.device_view("k", device)?,
                self.v.device_view("v", device)?,
            )
        };
        let mut call = if self.causal {
            sata_cuda::Call::causal(q, k, v)
        } else {
            sata_cuda::Call::full(q, k, v)
        };
        if let Some(mask) = self.mask {
            // SAFETY: promised by the caller.
            call = call.key_mask(unsafe { mask.device_view(device)? });
        }
        if let Some((cu_queries, cu_keys)) = &self.packed {
            call = call.packed(cu_queries, cu_keys);
        }
        if let Some(slopes) = &self.slopes {
            call = call.slopes(slopes);
        }
        if let Some(log_gates) = &self.log_gates {
            // SAFETY: promised by the caller.
            call = call.log_gates(unsafe { log_gates.device_view("log_gates", device)? });
        }
        Ok(call)
    }
}

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

impl Arguments {
    /// Whether it is one token of each of a state's sequences.
    fn is_step(&self, sequences: usize) -> bool {
        let (q, k) = (self.q.shape(), self.k.shape());
        self.causal
            && self.mask.is_none()
            && self.packed.is_none()
            && q[2] == 1
            && k[2] == 1
            && q[0] == sequences
            && k[0] == sequences
    }
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

fn no_f64() -> PyErr {
    let text =
        "q is float64, but GPUs take float32, float16 and bfloat16 (use the CPU for float64)";
    PyTypeError::new_err(text)
}

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
