//! Root-mean-square norms of the queries and keys of a packed projection.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, WithDType};

use super::rms_norm::{check_eps, check_weight, norm_rows, norm_rows_back};
use crate::error;
use crate::float::Float;
use crate::storage::{by_type, each_rows, each_rows_summing, last_dim, read, slice, tensor};

const OP: &str = "head_norm";

/// [`rms_norm`](super::rms_norm) of each query and key in a packed projection qkv
/// `[.., heads·d + kv_heads·d + …]` (queries, keys, then values, head by head), queries with
/// `q_weight` `[d]` and keys with `k_weight` `[d]`. Values stay as they are.
///
/// # Errors
/// Sizes or types that do not fit; eps that is negative or not finite.
pub fn head_norm(
    qkv: &Tensor,
    q_weight: &Tensor,
    k_weight: &Tensor,
    heads: usize,
    kv_heads: usize,
    eps: f64,
) -> Result<Tensor> {
    let width = last_dim(OP, "qkv", qkv)?;
    let d = last_dim(OP, "q_weight", q_weight)?;
    check_weight(OP, "q_weight", q_weight, d, qkv)?;
    check_weight(OP, "k_weight", k_weight, d, qkv)?;
    check_eps(OP, eps)?;
    let normed = heads.checked_add(kv_heads).and_then(|n| n.checked_mul(d));
    if normed.is_none_or(|n| n > width) {
        let expected =
            format!("{heads} queries and {kv_heads} keys of {d} elements are wider than that");
        return Err(error::shape(OP, "qkv", qkv.dims(), expected));
    }
    let op = HeadNorm { heads, kv_heads, width, eps };
    qkv.contiguous()?.apply_op3(&q_weight.contiguous()?, &k_weight.contiguous()?, op)
}

struct HeadNorm {
    heads: usize,
    kv_heads: usize,
    width: usize,
    eps: f64,
}

#[cfg(feature = "cuda")]
impl HeadNorm {
    fn on_gpu(&self) -> crate::cuda::Heads {
        let HeadNorm { heads, kv_heads, width, eps } = *self;
        crate::cuda::Heads { heads, kv_heads, width, eps }
    }
}

impl CustomOp3 for HeadNorm {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        q_weight: &CpuStorage,
        q_layout: &Layout,
        k_weight: &CpuStorage,
        k_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_type!(OP, candle_core::backend::BackendStorage::dtype(x), T => {
            let x = slice::<T>(OP, x, x_layout)?;
            let q_weight = slice::<T>(OP, q_weight, q_layout)?;
            let k_weight = slice::<T>(OP, k_weight, k_layout)?;
            let (d, eps, width) = (q_weight.len(), T::of(self.eps), self.width);
            let (q, k) = (self.heads * d, (self.heads + self.kv_heads) * d);
            let mut y = vec![T::default(); x.len()];
            each_rows(&mut y, width, |row, y| {
                let x = &x[row * width..][..y.len()];
                for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
                    norm_rows(&x[..q], q_weight, eps, &mut y[..q]);
                    norm_rows(&x[q..k], k_weight, eps, &mut y[q..k]);
                    y[k..].copy_from_slice(&x[k..]);
                }
            });
            Ok((T::to_cpu_storage_owned(y), x_layout.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
        q_weight: &candle_core::CudaStorage,
        q_layout: &Layout,
        k_weight: &candle_core::CudaStorage,
        k_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let (q, k) = ((q_weight, q_layout), (k_weight, k_layout));
        crate::cuda::head_norm((x, x_layout), q, k, self.on_gpu())
    }

    fn bwd(
        &self,
        x: &Tensor,
        q_weight: &Tensor,
        k_weight: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return crate::cuda::head_norm_back(x, q_weight, k_weight, self.on_gpu(), &dy);
        }
        by_type!(OP, x.dtype(), T => {
            let (dx, mut dq) = read::<T, _>(OP, x, |x| read::<T, _>(OP, &dy, |dy| {
                read::<T, _>(OP, q_weight, |qw| read::<T, _>(OP, k_weight, |kw| {
                    let (d, eps, width) = (qw.len(), T::of(self.eps), self.width);
                    let (q, k) = (self.heads * d, (self.heads + self.kv_heads) * d);
                    let mut dx = vec![T::default(); x.len()];
                    let dw = each_rows_summing(&mut dx, width, 2 * d, |row, dx, dw| {
                        let (dqw, dkw) = dw.split_at_mut(d);
                        let part = row * width..row * width + dx.len();
                        let rows = x[part.clone()].chunks_exact(width);
                        let rows = rows.zip(dy[part].chunks_exact(width));
                        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
                            norm_rows_back(&x[..q], qw, eps, &dy[..q], &mut dx[..q], dqw);
                            norm_rows_back(&x[q..k], kw, eps, &dy[q..k], &mut dx[q..k], dkw);
                            dx[k..].copy_from_slice(&dy[k..]);
                        }
                    });
                    Ok((dx, dw))
                }))
            }))?;
            let dk = dq.split_off(dq.len() / 2);
            Ok((Some(tensor(dx, x)?), Some(tensor(dq, q_weight)?), Some(tensor(dk, k_weight)?)))
        })
    }
}
