//! What a call is given, and the views that the libraries take of it.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use sata::{Call, Element};

use crate::tensor::{Handed, HandedMask, Raw, RawMask};

/// Types of numbers, as Python numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    F64,
    F16,
    BF16,
}

impl Dtype {
    pub fn of(code: u8) -> PyResult<Self> {
        match code {
            0 => Ok(Dtype::F32),
            1 => Ok(Dtype::F64),
            2 => Ok(Dtype::F16),
            3 => Ok(Dtype::BF16),
            _ => Err(PyTypeError::new_err(format!("{code} is no type of numbers"))),
        }
    }
}

/// A call's arguments beside its spec, state and outputs.
#[derive(Debug)]
pub struct Arguments {
    pub q: Raw,
    pub k: Raw,
    pub v: Raw,
    pub causal: bool,
    pub mask: Option<RawMask<'static>>,
    pub packed: Option<(Vec<usize>, Vec<usize>)>,
    pub slopes: Option<Vec<f64>>,
    pub log_gates: Option<Raw>,
}

impl Arguments {
    #[allow(clippy::too_many_arguments)]
    pub fn new(
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
    pub unsafe fn mask(&self) -> PyResult<Option<Vec<bool>>> {
        // SAFETY: promised by the caller.
        self.mask.map(|mask| unsafe { mask.to_vec() }).transpose()
    }

    /// A call for the CPU.
    ///
    /// # Safety
    /// All tensors are there, of type `E` (gates of f32), for as long as the call is used, and
    /// nothing writes to them meanwhile.
    pub unsafe fn call<'a, E: Element>(
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
    pub unsafe fn device_call<'a, E: sata_cuda::Element>(
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

impl Arguments {
    /// Whether it is one token of each of a state's sequences.
    pub fn is_step(&self, sequences: usize) -> bool {
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

/// What is said of float64 on a GPU.
pub fn no_f64() -> PyErr {
    let text =
        "q is float64, but GPUs take float32, float16 and bfloat16 (use the CPU for float64)";
    PyTypeError::new_err(text)
}
