//! The same on a GPU, by `sata-cuda`, on candle's own memory and stream.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Tensor};
use half::bf16;
use sata::Decay;
use sata_cuda::{Call, Device, Error, Gradients, Plan, View, ViewMut};

use super::{OP, Op, Part};
use crate::cuda::{Gpu, Place, address_of, device_of, failed, gpu, place, place_of, room, tensor};

/// Where a part's queries, keys and values begin, in elements, and their strides.
struct Places {
    starts: [usize; 3],
    strides: [[usize; 3]; 3],
}

/// What of it follows its first elements, of so many bytes each.
fn after(place: Place, first: usize, bytes: usize) -> Place {
    let first = first.min(place.elements);
    Place { address: place.address + (first * bytes) as u64, elements: place.elements - first }
}

impl Op {
    fn places(&self, part: &Part) -> Places {
        let s = self.sizes;
        if self.packed {
            let (starts, token) = self.row(part);
            let strides = |d: usize| [token * s.keys, d, token];
            return Places {
                starts,
                strides: [strides(s.d_key), strides(s.d_key), strides(s.d_value)],
            };
        }
        let size = |shape: [usize; 4]| shape.iter().product::<usize>();
        let strides = |[_, heads, tokens, d]: [usize; 4]| [heads * tokens * d, tokens * d, d];
        Places {
            starts: [0, size(s.q()), size(s.q()) + size(s.k())],
            strides: [strides(s.q()), strides(s.k()), strides(s.v())],
        }
    }

    /// The call over memory that `x` and `gates` name.
    fn device_call<'a>(
        &'a self,
        part: &'a Part,
        device: &'a Device,
        x: Place,
        gates: Option<Place>,
        slopes: Option<&'a [f64]>,
    ) -> std::result::Result<Call<'a, 'static, bf16>, Error> {
        let s = part.sizes;
        let places = self.places(part);
        let view = |i: usize, shape: [usize; 4]| {
            let x = after(x, places.starts[i], 2);
            // SAFETY: so many elements are left of a tensor that is held until the work is enqueued,
            // on the stream that also frees it.
            unsafe { View::from_raw(device, x.address, x.elements, shape, places.strides[i]) }
        };
        let (q, k, v) = (view(0, s.q())?, view(1, s.k())?, view(2, s.v())?);
        let mut call =
            if self.options.causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
        if let Some([cu_queries, cu_keys]) = &self.options.packed {
            call = call.packed(cu_queries, cu_keys);
        }
        if let Some(gates) = gates {
            let gates = after(gates, part.kv, 4);
            // SAFETY: as above.
            let view = unsafe {
                let (shape, strides) = (s.gates(), self.sizes.gate_strides());
                View::from_raw(device, gates.address, gates.elements, shape, strides)?
            };
            call = call.log_gates(view);
        }
        Ok(match slopes {
            Some(slopes) => call.slopes(part.slopes(slopes)),
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

    fn device_plans(&self, gpu: &Gpu) -> Result<Vec<Arc<Plan>>> {
        self.parts.iter().map(|part| gpu.plan(part.plan.spec())).collect()
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
        let y = room::<bf16>(candle, self.sizes.y().iter().product())?;
        let whole = Place { address: address_of(&y), elements: self.sizes.y().iter().product() };
        let plans = self.device_plans(&gpu)?;
        let _time = gpu.profile.time(&gpu.device, "attention")?;
        for (part, plan) in self.parts.iter().zip(&plans) {
            let device = plan.device();
            let call = self.device_call(part, device, at, gates, slopes).map_err(failed)?;
            let call = call.strict(self.options.strict);
            let out = after(whole, part.query * self.sizes.d_value, 2);
            let (shape, strides) = (part.sizes.y(), self.y_strides());
            // SAFETY: our own memory, which work on this stream alone uses; parts share no element.
            let out =
                unsafe { ViewMut::from_raw(device, out.address, out.elements, shape, strides) };
            let pending = plan.enqueue(call, out.map_err(failed)?).map_err(failed)?;
            if self.options.strict {
                gpu.later(pending);
            }
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
        let dx = room::<bf16>(&candle, at.elements)?;
        let d_gates = match gates {
            Some(gates) => Some(room::<f32>(&candle, gates.elements)?),
            None => None,
        };
        let plans = self.device_plans(&gpu)?;
        let _time = gpu.profile.time(&gpu.device, "attention, backward")?;
        let run = |part: &Part, plan: &Plan| -> std::result::Result<(), Error> {
            let (device, s) = (plan.device(), part.sizes);
            let call = self.device_call(part, device, at, gates, slopes)?;
            let places = self.places(part);
            let whole = Place { address: address_of(&dx), elements: at.elements };
            let view = |i: usize, shape: [usize; 4]| {
                let Place { address, elements } = after(whole, places.starts[i], 2);
                // SAFETY: our own memory; what belongs to queries, keys and values of the parts
                // shares no element.
                unsafe { ViewMut::from_raw(device, address, elements, shape, places.strides[i]) }
            };
            let mut gradients = Gradients::new(view(0, s.q())?, view(1, s.k())?, view(2, s.v())?);
            if let Some(d_gates) = &d_gates {
                let elements = self.sizes.gates().iter().product();
                let whole = Place { address: address_of(d_gates), elements };
                let Place { address, elements } = after(whole, part.kv, 4);
                let (shape, strides) = (s.gates(), self.sizes.gate_strides());
                // SAFETY: our own memory, in which parts share no element.
                let view = unsafe { ViewMut::from_raw(device, address, elements, shape, strides)? };
                gradients = gradients.log_gates(view);
            }
            let Place { address, elements } = after(dy, part.query * s.d_value, 2);
            // SAFETY: a tensor that is held until the work is enqueued.
            let dy = unsafe { View::from_raw(device, address, elements, s.y(), self.y_strides())? };
            plan.backward(call, dy, gradients)
        };
        for (part, plan) in self.parts.iter().zip(&plans) {
            run(part, plan).map_err(failed)?;
        }
        let d_gates =
            d_gates.zip(decay).map(|(d_gates, decay)| tensor(d_gates, &candle, decay.shape()));
        Ok((Some(tensor(dx, &candle, x.shape())), d_gates))
    }
}
