//! The logarithm of a forget gate.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};

use crate::float::Float;
use crate::storage::{by_type, check_float, each_rows, read, slice, tensor};

const OP: &str = "log_sigmoid";

/// −ln(1 + e^−x), element by element; never above 0.
///
/// # Errors
/// A type other than F32 and F64.
pub fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    check_float(OP, "x", x)?;
    x.contiguous()?.apply_op1(LogSigmoid)
}

struct LogSigmoid;

impl CustomOp1 for LogSigmoid {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        by_type!(OP, candle_core::backend::BackendStorage::dtype(x), T => {
            let x = slice::<T>(OP, x, layout)?;
            let mut y = vec![T::default(); x.len()];
            each_rows(&mut y, 1, |first, y| {
                for (y, &x) in y.iter_mut().zip(&x[first..]) {
                    // Written so that NaN stays NaN.
                    let least = if x > T::of(0.0) { T::of(0.0) } else { x };
                    *y = least - x.minus_abs().exp_of_negative().log_1p();
                }
            });
            Ok((T::to_cpu_storage_owned(y), layout.shape().clone()))
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        by_type!(OP, x.dtype(), T => {
            let dx = read::<T, _>(OP, x, |x| read::<T, _>(OP, &dy, |dy| {
                let mut dx = vec![T::default(); x.len()];
                each_rows(&mut dx, 1, |first, dx| {
                    for ((dx, &x), &dy) in dx.iter_mut().zip(&x[first..]).zip(&dy[first..]) {
                        *dx = dy * (-x).sigmoid();
                    }
                });
                Ok(dx)
            }))?;
            Ok(Some(tensor(dx, x)?))
        })
    }
}
