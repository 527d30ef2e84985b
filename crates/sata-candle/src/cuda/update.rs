//! AdamW steps of all parameters at once.

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, DType, Device, Error, Result, Tensor};

use super::{address_of, failed, gpu, place_of, room};
use crate::kernels::{Kernels, Parameter, Step};

const OP: &str = "adamw";

/// A parameter under way: contiguous f32 tensors of one GPU. The first two moments and the weights
/// are changed in place.
#[derive(Clone, Copy, Debug)]
pub struct Moving<'a> {
    /// What is trained.
    pub weights: &'a Tensor,
    /// The loss's gradient by it.
    pub gradient: &'a Tensor,
    /// The gradient's running mean.
    pub first: &'a Tensor,
    /// Its square's running mean.
    pub second: &'a Tensor,
    /// Whether it is drawn towards 0.
    pub decays: bool,
}

/// What steps of one model need on its GPU.
#[derive(Debug)]
pub struct Optimizer {
    device: CudaDevice,
    norm: CudaSlice<f64>,
}

fn address(tensor: &Tensor, elements: usize) -> Result<u64> {
    let place = place_of(OP, tensor, DType::F32)?;
    if place.elements != elements {
        let what = format!("{OP}: {} elements for {elements} weights", place.elements);
        return Err(Error::Msg(what).bt());
    }
    Ok(place.address)
}

impl Optimizer {
    /// For a GPU.
    ///
    /// # Errors
    /// Another device, or what it reports.
    pub fn new(device: &Device) -> Result<Self> {
        let Device::Cuda(device) = device else {
            return Err(Error::Msg(format!("{OP}: {device:?} is no GPU")).bt());
        };
        Ok(Optimizer { device: device.clone(), norm: room::<f64>(device, 1)? })
    }

    /// A step. Where the gradients' norm is not finite nothing changes.
    ///
    /// # Errors
    /// Tensors that do not fit, or what the device reports.
    pub fn update(&mut self, parameters: &[Moving<'_>], step: &Step) -> Result<()> {
        let parameters = parameters
            .iter()
            .map(|p| {
                let elements = p.weights.elem_count();
                Ok(Parameter {
                    weights: address(p.weights, elements)?,
                    gradient: address(p.gradient, elements)?,
                    first: address(p.first, elements)?,
                    second: address(p.second, elements)?,
                    elements,
                    decays: p.decays,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let gpu = gpu(&self.device)?;
        let sums = room::<f64>(&self.device, Kernels::update_blocks(&parameters))?;
        let _time = gpu.profile.time(&gpu.device, "adamw")?;
        let (sums, norm) = (address_of(&sums), address_of(&self.norm));
        // SAFETY: as large as they say.
        unsafe { gpu.kernels.update(&parameters, step, sums, norm) }.map_err(failed)
    }

    /// Adds gradients to sums, in place.
    ///
    /// # Errors
    /// As for [`Optimizer::update`].
    pub fn add(&self, sums: &[Tensor], gradients: &[Tensor]) -> Result<()> {
        let parameters = sums
            .iter()
            .zip(gradients)
            .map(|(sum, gradient)| {
                let elements = sum.elem_count();
                let (first, gradient) = (address(sum, elements)?, address(gradient, elements)?);
                Ok(Parameter { first, gradient, elements, ..Parameter::default() })
            })
            .collect::<Result<Vec<_>>>()?;
        let gpu = gpu(&self.device)?;
        // SAFETY: as large as they say.
        unsafe { gpu.kernels.add(&parameters) }.map_err(failed)
    }

    /// The norm of the last step's mean gradient; waits for the device.
    ///
    /// # Errors
    /// What the device reports.
    pub fn norm(&self) -> Result<f64> {
        let mut norm = [0.0];
        self.device.memcpy_dtoh(&self.norm, &mut norm)?;
        Ok(norm[0])
    }
}
