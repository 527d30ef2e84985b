//! Root-mean-square norm.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType};

use crate::error;
use crate::float::{Float, sum2, vectorised};
use crate::storage::{
    by_type, check_type, each_rows, each_rows_summing, last_dim, read, slice, tensor,
};

const OP: &str = "rms_norm";

/// x / √(mean x² + eps) · weight over the last dimension: x `[.., n]`, weight `[n]`.
///
/// # Errors
/// Sizes or types that do not fit; eps that is negative or not finite.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let n = last_dim(OP, "x", x)?;
    check_weight(OP, "weight", weight, n, x)?;
    check_eps(OP, eps)?;
    x.contiguous()?.apply_op2(&weight.contiguous()?, RmsNorm { eps })
}

pub(crate) fn check_weight(
    op: &'static str,
    argument: &'static str,
    weight: &Tensor,
    n: usize,
    x: &Tensor,
) -> Result<()> {
    if weight.dims() != [n] {
        return Err(error::shape(op, argument, weight.dims(), format!("it must be [{n}]")));
    }
    check_type(op, argument, weight, x.dtype())
}

pub(crate) fn check_eps(op: &'static str, eps: f64) -> Result<()> {
    if eps.is_finite() && eps >= 0.0 {
        return Ok(());
    }
    Err(error::value(op, "eps", eps, "it must be finite and at least 0"))
}

struct RmsNorm {
    eps: f64,
}

impl CustomOp2 for RmsNorm {
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
        by_type!(OP, candle_core::backend::BackendStorage::dtype(x), T => {
            let x = slice::<T>(OP, x, x_layout)?;
            let weight = slice::<T>(OP, weight, weight_layout)?;
            let n = weight.len();
            let mut y = vec![T::default(); x.len()];
            each_rows(&mut y, n, |row, y| {
                norm_rows(&x[row * n..][..y.len()], weight, T::of(self.eps), y);
            });
            Ok((T::to_cpu_storage_owned(y), x_layout.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
        weight: &candle_core::CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        crate::cuda::rms_norm((x, x_layout), (weight, weight_layout), self.eps)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return crate::cuda::rms_norm_back(x, weight, self.eps, &dy);
        }
        by_type!(OP, x.dtype(), T => {
            let (dx, dw) = read::<T, _>(OP, x, |x| read::<T, _>(OP, weight, |weight| {
                read::<T, _>(OP, &dy, |dy| {
                    let n = weight.len();
                    let mut dx = vec![T::default(); x.len()];
                    let dw = each_rows_summing(&mut dx, n, n, |row, dx, dw| {
                        let part = row * n..row * n + dx.len();
                        let (x, dy) = (&x[part.clone()], &dy[part]);
                        norm_rows_back(x, weight, T::of(self.eps), dy, dx, dw);
                    });
                    Ok((dx, dw))
                })
            }))?;
            Ok((Some(tensor(dx, x)?), Some(tensor(dw, weight)?)))
        })
    }
}

vectorised! {
    /// Norms of rows as long as the weight.
    pub(crate) fn norm_rows<T: Float>(x: &[T], weight: &[T], eps: T, y: &mut [T]) {
        let n = weight.len();
        let each = T::ONE / T::of(n as f64);
        for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
            let r = T::ONE / (sum2(x, x, |a, b| a * b) * each + eps).root();
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * r * w;
            }
        }
    }
}

vectorised! {
    /// Their gradient: dx is written, dw added to.
    pub(crate) fn norm_rows_back<T: Float>(
        x: &[T],
        weight: &[T],
        eps: T,
        dy: &[T],
        dx: &mut [T],
        dw: &mut [T],
    ) {
        let n = weight.len();
        let each = T::ONE / T::of(n as f64);
        let rows = x.chunks_exact(n).zip(dy.chunks_exact(n)).zip(dx.chunks_exact_mut(n));
        for ((x, dy), dx) in rows {
            let r = T::ONE / (sum2(x, x, |a, b| a * b) * each + eps).root();
            for ((dx, &dy), &w) in dx.iter_mut().zip(dy).zip(weight) {
                *dx = dy * w;
            }
            let back = sum2(dx, x, |a, b| a * b) * each * r * r * r;
            for (((dx, &x), &dy), dw) in dx.iter_mut().zip(x).zip(dy).zip(dw.iter_mut()) {
                *dx = *dx * r - x * back;
                *dw += dy * x * r;
            }
        }
    }
}
