//! The same on a GPU, by `sata-cuda`, on candle's own memory and stream.

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Tensor};
use half::bf16;
use sata::Decay;
use sata_cuda::{Call, Device, Error, Gradients, View, ViewMut};

use super::{OP, Op, Sizes};
use crate::cuda::{Place, address_of, device_of, failed, gpu, place, place_of, room, tensor};

/// Where queries, keys and values begin, in elements, and their strides.
struct Parts {
    starts: [usize; 3],
    strides: [[usize; 3]; 3],
}

impl Op {
    fn parts(&self) -> Parts {
        let s = self.sizes;
        if self.packed {
            let (queries, keys) = (s.heads * s.d_key, s.kv_heads * s.d_key);
            let token = queries + keys + s.kv_heads * s.d_value;
            let strides = |d: usize| [token * s.keys, d, token];
            return Parts {
                starts: [0, queries, queries + keys],
                strides: [strides(s.d_key), strides(s.d_key), strides(s.d_value)],
            };
        }
        let size = |shape: [usize; 4]| shape.iter().product::<usize>();
        let strides = |[_, heads, tokens, d]: [usize; 4]| [heads * tokens * d, tokens * d, d];
        Parts {
            starts: [0, size(s.q()), size(s.q()) + size(s.k())],
            strides: [strides(s.q()), strides(s.k()), strides(s.v())],
        }
    }

    /// The call over memory that `x` and `gates` name.
    fn device_call<'a>(
        &'a self,
        device: &'a Device,
        x: Place,
        gates: Option<Place>,
        slopes: Option<&'a [f64]>,
    ) -> std::result::Result<Call<'a, 'static, bf16>, Error> {
        let s = self.sizes;
        let parts = self.parts();
        let view = |i: usize, shape: [usize; 4]| {
            let start = parts.starts[i].min(x.elements);
            let address = x.address + (2 * start) as u64;
            // SAFETY: so many elements are left of a tensor that is held until the work is enqueued,
            // on the stream that also frees it.
            unsafe { View::from_raw(device, address, x.elements - start, shape, parts.strides[i]) }
        };
        let (q, k, v) = (view(0, s.q())?, view(1, s.k())?, view(2, s.v())?);
        let mut call =
            if self.options.causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
        if let Some([cu_queries, cu_keys]) = &self.options.packed {
            call = call.packed(cu_queries, cu_keys);
        }
        if let Some(gates) = gates {
            // SAFETY: as above.
            let view = unsafe {
                let (shape, strides) = (s.gates(), s.gate_strides());
                View::from_raw(device, gates.address, gates.elements, shape, strides)?
            };
            call = call.log_gates(view);
        }
        Ok(match slopes {
            Some(slopes) => call.slopes(slopes),
            None => call,
        })
    }

    /// Gates' memory and slopes' numbers.
    fn device_fade(&self, decay: Option<Place>) -> Result<(Option<Place>, Option<&[f64]>)> {
        if self.options.key_mask.is_some() {
            return Err(candle_core::Error::Msg(format!("{OP}: no key mask on a GPU")).bt());
        }
        match (self.decay, decay) {
            (Some(Decay::Gates), Some(_)) => Ok((decay, None)),
            (Some(_), Some(_)) => {
                let what = format!("{OP}: on a GPU slopes are constant (Options::constant_slopes)");
                Err(candle_core::Error::Msg(what).bt())
            }
            (_, None) => Ok((None, self.options.constant.as_deref())),
            (None, Some(_)) => Ok((None, None)),
        }
    }

    pub(super) fn device_forward(
        &self,
        x: (&CudaStorage, &Layout),
        decay: Option<(&CudaStorage, &Layout)>,
    ) -> Result<(CudaStorage, Shape)> {
        let candle: &CudaDevice = x.0.device();
        let gpu = gpu(candle)?;
        let at = place(OP, x.0, x.1, DType::BF16)?;
        let decay = match decay {
            Some((storage, layout)) => Some(place(OP, storage, layout, DType::F32)?),
            None => None,
        };
        let (gates, slopes) = self.device_fade(decay)?;
        let s: Sizes = self.sizes;
        let elements = s.y().iter().product();
        let y = room::<bf16>(candle, elements)?;
        let plan = gpu.plan(self.plan.spec())?;
        let _time = gpu.profile.time(&gpu.device, "attention")?;
        let pending = {
            let device = plan.device();
            let call = self.device_call(device, at, gates, slopes).map_err(failed)?;
            let call = call.strict(self.options.strict);
            // SAFETY: our own memory, which work on this stream alone uses.
            let out = unsafe {
                ViewMut::from_raw(device, address_of(&y), elements, s.y(), self.y_strides())
            };
            plan.enqueue(call, out.map_err(failed)?).map_err(failed)?
        };
        if self.options.strict {
            gpu.later(pending);
        }
        let storage = CudaStorage::wrap_cuda_slice(y, candle.clone());
        Ok((storage, self.shape()))
    }

    pub(super) fn device_backward(
        &self,
        x: &Tensor,
        decay: Option<&Tensor>,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let candle = device_of(OP, x)?;
        let gpu = gpu(&candle)?;
        let (at, dy) = (place_of(OP, x, DType::BF16)?, place_of(OP, dy, DType::BF16)?);
        let place = decay.map(|decay| place_of(OP, decay, DType::F32)).transpose()?;
        let (gates, slopes) = self.device_fade(place)?;
        let s = self.sizes;
        let dx = room::<bf16>(&candle, at.elements)?;
        let d_gates = match gates {
            Some(gates) => Some(room::<f32>(&candle, gates.elements)?),
            None => None,
        };
        let plan = gpu.plan(self.plan.spec())?;
        let _time = gpu.profile.time(&gpu.device, "attention, backward")?;
        let device = plan.device();
        let run = || -> std::result::Result<(), Error> {
            let call = self.device_call(device, at, gates, slopes)?;
            let parts = self.parts();
            let base = address_of(&dx);
            let view = |i: usize, shape: [usize; 4]| {
                let address = base + (2 * parts.starts[i]) as u64;
                let left = at.elements - parts.starts[i].min(at.elements);
                // SAFETY: our own memory; the three parts share no element.
                unsafe { ViewMut::from_raw(device, address, left, shape, parts.strides[i]) }
            };
            let mut gradients = Gradients::new(view(0, s.q())?, view(1, s.k())?, view(2, s.v())?);
            if let Some(d_gates) = &d_gates {
                let (len, shape, strides) =
                    (s.gates().iter().product(), s.gates(), s.gate_strides());
                // SAFETY: our own memory.
                let view =
                    unsafe { ViewMut::from_raw(device, address_of(d_gates), len, shape, strides)? };
                gradients = gradients.log_gates(view);
            }
            // SAFETY: a tensor that is held until the work is enqueued.
            let dy = unsafe {
                View::from_raw(device, dy.address, dy.elements, s.y(), self.y_strides())?
            };
            plan.backward(call, dy, gradients)
        };
        run().map_err(failed)?;
        let d_gates =
            d_gates.zip(decay).map(|(d_gates, decay)| tensor(d_gates, &candle, decay.shape()));
        Ok((Some(tensor(dx, &candle, x.shape())), d_gates))
    }
}
