//! Rows of a table.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};

use super::cross_entropy::read_indices;
use crate::error;
use crate::storage::{by_type, check_float, read, slice, tensor};

const OP: &str = "embedding";

/// The rows of weight `[vocab, width]` that tokens `[..]` (u32) name: `[.., width]`. The tokens are
/// best on the CPU, wherever the weight is.
///
/// # Errors
/// Sizes or types that do not fit, or a token that is not below `vocab`.
pub fn embedding(weight: &Tensor, tokens: &Tensor) -> Result<Tensor> {
    check_float(OP, "weight", weight)?;
    let [vocab, width] = *weight.dims() else {
        return Err(error::shape(OP, "weight", weight.dims(), "it must be [vocab, width]"));
    };
    let mut shape = tokens.dims().to_vec();
    shape.push(width);
    let tokens = read_indices(OP, "tokens", tokens, vocab)?;
    let op = Embedding {
        tokens,
        width,
        shape,
        #[cfg(feature = "cuda")]
        lookup: Default::default(),
    };
    weight.contiguous()?.apply_op1(op)
}

struct Embedding {
    tokens: Vec<u32>,
    width: usize,
    shape: Vec<usize>,
    #[cfg(feature = "cuda")]
    lookup: crate::cuda::Lookup,
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, weight: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        by_type!(OP, candle_core::backend::BackendStorage::dtype(weight), T => {
            let weight = slice::<T>(OP, weight, layout)?;
            let mut y = Vec::with_capacity(self.tokens.len() * self.width);
            for &token in &self.tokens {
                y.extend_from_slice(&weight[token as usize * self.width..][..self.width]);
            }
            Ok((T::to_cpu_storage_owned(y), self.shape.clone().into()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        weight: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.lookup.forward((weight, layout), &self.tokens, &self.shape)
    }

    fn bwd(&self, weight: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return self.lookup.backward(weight, &dy);
        }
        by_type!(OP, weight.dtype(), T => {
            let dw = read::<T, _>(OP, &dy, |dy| {
                let mut dw = vec![T::default(); weight.elem_count()];
                for (dy, &token) in dy.chunks_exact(self.width.max(1)).zip(&self.tokens) {
                    let row = &mut dw[token as usize * self.width..][..self.width];
                    row.iter_mut().zip(dy).for_each(|(sum, &x)| *sum += x);
                }
                Ok(dw)
            })?;
            Ok(Some(tensor(dw, weight)?))
        })
    }
}
