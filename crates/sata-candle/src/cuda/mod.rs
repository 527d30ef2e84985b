//! Tensors on NVIDIA GPUs: what operations do there.
//!
//! Weights, the residual stream, norms and losses are f32; products of matrices and attention take
//! bf16 and sum in f32, and so do what goes from one to the other and its gradients.

mod device;
mod gemm;
mod ops;
mod profile;
mod update;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Error, Layout, Result, Shape, Storage, Tensor};

pub use device::settle;
pub(crate) use device::{Gpu, gpu};
pub(crate) use ops::*;
pub use profile::{Share, profile, take_profile};
pub use update::{Moving, Optimizer};

/// Something of one type, contiguous on a GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub address: u64,
    pub elements: usize,
}

/// Where the elements of a contiguous storage are.
pub(crate) fn place(
    op: &'static str,
    storage: &CudaStorage,
    layout: &Layout,
    dtype: DType,
) -> Result<Place> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(crate::error::shape(op, "an argument", layout.dims(), "it must be contiguous"));
    };
    if storage.dtype() != dtype {
        let expected = format!("on a GPU it must be {dtype:?}");
        return Err(crate::error::dtype(op, "an argument", storage.dtype(), expected));
    }
    let base = match &storage.slice {
        CudaStorageSlice::F32(x) => address_of(x),
        CudaStorageSlice::BF16(x) => address_of(x),
        CudaStorageSlice::U32(x) => address_of(x),
        _ => {
            return Err(crate::error::dtype(op, "an argument", dtype, "it must be F32 or BF16"));
        }
    };
    let address = base + (start * dtype.size_in_bytes()) as u64;
    Ok(Place { address, elements: end - start })
}

/// The same of a tensor, which must stay until what uses it has been enqueued.
pub(crate) fn place_of(op: &'static str, tensor: &Tensor, dtype: DType) -> Result<Place> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => place(op, storage, layout, dtype),
        _ => Err(Error::Msg(format!("{op}: an argument is not on the GPU")).bt()),
    }
}

/// The GPU that a tensor is on.
pub(crate) fn device_of(op: &'static str, tensor: &Tensor) -> Result<CudaDevice> {
    match tensor.device() {
        candle_core::Device::Cuda(device) => Ok(device.clone()),
        _ => Err(Error::Msg(format!("{op}: an argument is not on the GPU")).bt()),
    }
}

/// Its address. All work is on one stream, so nothing else has to be waited for.
pub(crate) fn address_of<T>(slice: &CudaSlice<T>) -> u64 {
    slice.device_ptr(slice.stream()).0
}

/// Memory that holds nothing in particular yet.
pub(crate) fn room<T: DeviceRepr>(device: &CudaDevice, elements: usize) -> Result<CudaSlice<T>> {
    // SAFETY: plain numbers, which whoever asks for them writes before anybody reads them.
    unsafe { device.alloc::<T>(elements.max(1)) }
}

/// A tensor of it.
pub(crate) fn tensor<T: CudaDType>(
    slice: CudaSlice<T>,
    device: &CudaDevice,
    shape: impl Into<Shape>,
) -> Tensor {
    let storage = CudaStorage::wrap_cuda_slice(slice, device.clone());
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

pub(crate) fn ordinal(device: &CudaDevice) -> usize {
    match device.location() {
        candle_core::DeviceLocation::Cuda { gpu_id } => gpu_id,
        _ => 0,
    }
}

pub(crate) fn failed(error: sata_cuda::Error) -> Error {
    Error::wrap(error)
}
