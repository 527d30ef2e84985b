//! The logarithms of forget gates of a projection.

use candle_core::{Result, Tensor};

use super::{linear, log_sigmoid};
#[cfg(feature = "cuda")]
use crate::cuda::Gates;

/// log sigmoid(x·weightᵀ + bias): x `[.., in]`, weight `[heads, in]`, bias `[heads]`; the result is
/// `[.., heads]`, never above 0, and F32 on a GPU.
///
/// # Errors
/// Sizes or types that do not fit.
pub fn log_gates(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let [heads, inputs] = *weight.dims() else {
            let expected = "it must be [heads, in]";
            return Err(crate::error::shape(OP, "weight", weight.dims(), expected));
        };
        if x.dims().last() != Some(&inputs) || bias.dims() != [heads] {
            let expected = format!("weight is [{heads}, {inputs}], and bias {:?}", bias.dims());
            return Err(crate::error::shape(OP, "x", x.dims(), expected));
        }
        let x = x.to_dtype(candle_core::DType::BF16)?.contiguous()?;
        let gates = OnGpu(Gates::default());
        return x.apply_op3(&weight.contiguous()?, &bias.contiguous()?, gates);
    }
    log_sigmoid(&linear(x, weight)?.broadcast_add(bias)?)
}

#[cfg(feature = "cuda")]
const OP: &str = "log_gates";

/// All of it on a GPU.
#[cfg(feature = "cuda")]
struct OnGpu(Gates);

#[cfg(feature = "cuda")]
impl candle_core::CustomOp3 for OnGpu {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        _: &candle_core::CpuStorage,
        _: &candle_core::Layout,
        _: &candle_core::CpuStorage,
        _: &candle_core::Layout,
        _: &candle_core::CpuStorage,
        _: &candle_core::Layout,
    ) -> Result<(candle_core::CpuStorage, candle_core::Shape)> {
        candle_core::bail!("{OP}: an argument is not on the GPU")
    }

    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &candle_core::Layout,
        weight: &candle_core::CudaStorage,
        weight_layout: &candle_core::Layout,
        bias: &candle_core::CudaStorage,
        bias_layout: &candle_core::Layout,
    ) -> Result<(candle_core::CudaStorage, candle_core::Shape)> {
        self.0.forward((x, x_layout), (weight, weight_layout), (bias, bias_layout))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        self.0.backward(x, weight, bias, &dy.contiguous()?)
    }
}
