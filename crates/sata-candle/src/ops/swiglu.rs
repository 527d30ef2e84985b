//! The gated activation of a SwiGLU.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};

use crate::error;
use crate::float::{Float, vectorised};
use crate::storage::{by_type, each_rows, last_dim, read, slice, tensor};

const OP: &str = "swiglu";

/// silu(a)·b for x `[.., 2·m]` whose rows hold a and then b; the result is `[.., m]`, and
/// silu(a) = a / (1 + e^−a).
///
/// # Errors
/// An odd last dimension, or a type other than F32 and F64.
pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    let width = last_dim(OP, "x", x)?;
    if width % 2 == 1 {
        return Err(error::shape(OP, "x", x.dims(), "its last dimension must be even"));
    }
    x.contiguous()?.apply_op1(Swiglu { m: width / 2 })
}

struct Swiglu {
    m: usize,
}

impl CustomOp1 for Swiglu {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        by_type!(OP, candle_core::backend::BackendStorage::dtype(x), T => {
            let x = slice::<T>(OP, x, layout)?;
            let m = self.m;
            let mut y = vec![T::default(); x.len() / 2];
            each_rows(&mut y, m, |row, y| swiglu_rows(&x[2 * row * m..][..2 * y.len()], m, y));
            let mut shape = layout.dims().to_vec();
            shape.pop();
            shape.push(m);
            Ok((T::to_cpu_storage_owned(y), shape.into()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        crate::cuda::swiglu((x, layout), self.m)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return crate::cuda::swiglu_back(x, self.m, &dy).map(Some);
        }
        by_type!(OP, x.dtype(), T => {
            let dx = read::<T, _>(OP, x, |x| read::<T, _>(OP, &dy, |dy| {
                let m = self.m;
                let mut dx = vec![T::default(); x.len()];
                each_rows(&mut dx, 2 * m, |row, dx| {
                    let x = &x[2 * row * m..][..dx.len()];
                    swiglu_back(x, m, &dy[row * m..][..dx.len() / 2], dx);
                });
                Ok(dx)
            }))?;
            Ok(Some(tensor(dx, x)?))
        })
    }
}

vectorised! {
    fn swiglu_rows<T: Float>(x: &[T], m: usize, y: &mut [T]) {
        for (x, y) in x.chunks_exact(2 * m).zip(y.chunks_exact_mut(m)) {
            let (a, b) = x.split_at(m);
            for ((y, &a), &b) in y.iter_mut().zip(a).zip(b) {
                *y = a * a.sigmoid() * b;
            }
        }
    }
}

vectorised! {
    fn swiglu_back<T: Float>(x: &[T], m: usize, dy: &[T], dx: &mut [T]) {
        let rows = x.chunks_exact(2 * m).zip(dy.chunks_exact(m));
        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(2 * m)) {
            let (a, b) = x.split_at(m);
            let (da, db) = dx.split_at_mut(m);
            let inputs = a.iter().zip(b).zip(dy);
            for (((&a, &b), &dy), (da, db)) in inputs.zip(da.iter_mut().zip(db)) {
                let s = a.sigmoid();
                *db = dy * a * s;
                *da = dy * b * s * (T::ONE + a * (T::ONE - s));
            }
        }
    }
}
