//! Linear maps, and a residual added in the same product.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, WithDType};

use crate::error;
use crate::gemm::{Matrix, product};
use crate::storage::{by_type, check_type, last_dim, read, slice};

const OP: &str = "linear";

/// x·weightᵀ: x `[.., in]`, weight `[out, in]`; the result is `[.., out]`.
///
/// # Errors
/// Sizes or types that do not fit.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    check(x, weight)?;
    factor(x)?.apply_op2(&weight.contiguous()?, Linear::default())
}

/// residual + x·weightᵀ: residual `[.., out]`.
///
/// # Errors
/// Sizes or types that do not fit.
pub fn linear_add(x: &Tensor, weight: &Tensor, residual: &Tensor) -> Result<Tensor> {
    let shape = check(x, weight)?;
    if residual.dims() != shape {
        let expected = format!("the product has {shape:?}");
        return Err(error::shape(OP, "residual", residual.dims(), expected));
    }
    check_type(OP, "residual", residual, x.dtype())?;
    factor(x)?.apply_op3(&weight.contiguous()?, &residual.contiguous()?, Linear::default())
}

/// Contiguous, and bf16 on a GPU.
fn factor(x: &Tensor) -> Result<Tensor> {
    match x.device().is_cuda() {
        true => x.to_dtype(candle_core::DType::BF16)?.contiguous(),
        false => x.contiguous(),
    }
}

/// The shape of the product.
fn check(x: &Tensor, weight: &Tensor) -> Result<Vec<usize>> {
    let inputs = last_dim(OP, "x", x)?;
    let [out, with] = *weight.dims() else {
        return Err(error::shape(OP, "weight", weight.dims(), "it must be [out, in]"));
    };
    if with != inputs || out == 0 {
        let expected = format!("x has {inputs} inputs, and there must be an output");
        return Err(error::shape(OP, "weight", weight.dims(), expected));
    }
    check_type(OP, "weight", weight, x.dtype())?;
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(out);
    Ok(shape)
}

#[derive(Default)]
struct Linear {
    #[cfg(feature = "cuda")]
    map: crate::cuda::Map,
}

impl Linear {
    fn forward(
        x: (&CpuStorage, &Layout),
        weight: (&CpuStorage, &Layout),
        residual: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let mut shape = x.1.dims().to_vec();
        let (out, inputs) = weight.1.shape().dims2()?;
        shape.pop();
        shape.push(out);
        let y = by_type!(OP, candle_core::backend::BackendStorage::dtype(x.0), T => {
            let x = slice::<T>(OP, x.0, x.1)?;
            let weight = slice::<T>(OP, weight.0, weight.1)?;
            let rows = x.len() / inputs;
            let mut y = match residual {
                Some((storage, layout)) => slice::<T>(OP, storage, layout)?.to_vec(),
                None => vec![T::default(); rows * out],
            };
            let (x, weight) = (Matrix::new(x, rows, inputs), Matrix::new(weight, out, inputs));
            product(x, weight.transposed(), &mut y, residual.is_some());
            candle_core::Result::Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, shape.into()))
    }

    /// The gradients of x and weight, each where it is wanted.
    fn backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return self.map.backward(x, weight, dy);
        }
        let (out, inputs) = weight.dims2()?;
        let rows = x.elem_count() / inputs;
        by_type!(OP, x.dtype(), T => read::<T, _>(OP, dy, |dy| {
            let dy = Matrix::new(dy, rows, out);
            let dx = x.track_op().then(|| read::<T, _>(OP, weight, |weight| {
                let mut dx = vec![T::default(); rows * inputs];
                product(dy, Matrix::new(weight, out, inputs), &mut dx, false);
                crate::storage::tensor(dx, x)
            }));
            let dw = weight.track_op().then(|| read::<T, _>(OP, x, |x| {
                let mut dw = vec![T::default(); out * inputs];
                product(dy.transposed(), Matrix::new(x, rows, inputs), &mut dw, false);
                crate::storage::tensor(dw, weight)
            }));
            Ok((dx.transpose()?, dw.transpose()?))
        }))
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Self::forward((x, x_layout), (weight, weight_layout), None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
        weight: &candle_core::CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.map.forward((x, x_layout), (weight, weight_layout), None, false)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.backward(x, weight, &dy.contiguous()?)
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let residual = Some((residual, residual_layout));
        Self::forward((x, x_layout), (weight, weight_layout), residual)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
        weight: &candle_core::CudaStorage,
        weight_layout: &Layout,
        residual: &candle_core::CudaStorage,
        residual_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let residual = Some((residual, residual_layout));
        self.map.forward((x, x_layout), (weight, weight_layout), residual, false)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        residual: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (dx, dw) = self.backward(x, weight, &dy)?;
        Ok((dx, dw, residual.track_op().then_some(dy)))
    }
}
