//! Cross entropy of logits that are a projection, without ever holding them all.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType};

use super::cross_entropy::{logits_to_gradient, losses_of, read_targets};
use crate::error;
use crate::float::Float;
use crate::gemm::{Matrix, product};
use crate::storage::{by_type, check_type, each_rows, last_dim, slice};

const OP: &str = "projected_cross_entropy";

/// Logits that are held at once, about.
const LOGITS: usize = 1 << 20;

/// [`cross_entropy`](super::cross_entropy) of the logits hidden·weightᵀ: hidden `[.., width]`,
/// weight `[vocab, width]`, targets u32, one for each row of hidden; a scalar, in nats.
///
/// Rows are taken some at a time, so that memory does not grow with rows · vocab. Where hidden or
/// weight has a gradient it is made at once, in the forward pass, which has the logits at hand;
/// [`Tensor::detach`] them where only the number is wanted.
///
/// # Errors
/// Sizes or types that do not fit, or a target that is not below `vocab` (which on a GPU, where they
/// are best brought beforehand, makes the loss NaN).
pub fn projected_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
) -> Result<Tensor> {
    let width = last_dim(OP, "hidden", hidden)?;
    let vocab = match *weight.dims() {
        [vocab, inputs] if inputs == width && vocab > 0 => vocab,
        _ => {
            let expected = format!("hidden needs it to be [vocab, {width}]");
            return Err(error::shape(OP, "weight", weight.dims(), expected));
        }
    };
    check_type(OP, "weight", weight, hidden.dtype())?;
    let differentiable = hidden.track_op() || weight.track_op();
    #[cfg(feature = "cuda")]
    if hidden.device().is_cuda() {
        let op = OnGpu {
            targets: gpu_targets(targets, hidden)?,
            differentiable,
            head: Default::default(),
        };
        let hidden = hidden.to_dtype(candle_core::DType::BF16)?.contiguous()?;
        return hidden.apply_op2(&weight.contiguous()?, op);
    }
    let targets = read_targets(OP, targets, hidden, vocab)?;
    let op = Projected { targets, differentiable, gradients: OnceLock::new() };
    hidden.contiguous()?.apply_op2(&weight.contiguous()?, op)
}

/// Targets on hidden's GPU, in rows' order.
#[cfg(feature = "cuda")]
fn gpu_targets(targets: &Tensor, hidden: &Tensor) -> Result<Tensor> {
    let rows = hidden.elem_count() / last_dim(OP, "hidden", hidden)?;
    if targets.elem_count() != rows || rows == 0 {
        let expected = format!("there must be one for each of {rows} rows, and at least one");
        return Err(error::shape(OP, "targets", targets.dims(), expected));
    }
    if targets.dtype() != candle_core::DType::U32 {
        return Err(error::dtype(OP, "targets", targets.dtype(), "it must be U32"));
    }
    targets.contiguous()?.to_device(hidden.device())
}

/// The same on a GPU.
#[cfg(feature = "cuda")]
struct OnGpu {
    targets: Tensor,
    differentiable: bool,
    head: crate::cuda::Head,
}

#[cfg(feature = "cuda")]
impl CustomOp2 for OnGpu {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        candle_core::bail!("{OP}: an argument is not on the GPU")
    }

    fn cuda_fwd(
        &self,
        hidden: &candle_core::CudaStorage,
        hidden_layout: &Layout,
        weight: &candle_core::CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let (hidden, weight) = ((hidden, hidden_layout), (weight, weight_layout));
        self.head.forward(hidden, weight, &self.targets, self.differentiable)
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.head.backward(hidden, weight, dy)
    }
}

struct Projected {
    targets: Vec<u32>,
    differentiable: bool,
    /// Those of hidden and weight for a loss whose own gradient is 1.
    gradients: OnceLock<(CpuStorage, CpuStorage)>,
}

impl Projected {
    fn forward<T: Float>(&self, hidden: &[T], weight: &[T]) -> T {
        let rows = self.targets.len();
        let width = hidden.len() / rows;
        let vocab = weight.len() / width;
        let gain = T::of(1.0 / rows as f64);
        let weight = Matrix::new(weight, vocab, width);
        let at_once = (LOGITS / vocab).clamp(1, rows);
        let mut logits = vec![T::default(); at_once * vocab];
        let mut losses = vec![T::default(); rows];
        let (mut d_hidden, mut d_weight) = if self.differentiable {
            (vec![T::default(); hidden.len()], vec![T::default(); vocab * width])
        } else {
            (vec![], vec![])
        };
        for first in (0..rows).step_by(at_once) {
            let n = at_once.min(rows - first);
            let hidden = Matrix::new(&hidden[first * width..][..n * width], n, width);
            let logits = &mut logits[..n * vocab];
            let targets = &self.targets[first..first + n];
            product(hidden, weight.transposed(), logits, false);
            each_rows(&mut losses[first..first + n], 1, |row, losses| {
                let part = row * vocab..(row + losses.len()) * vocab;
                losses_of(&logits[part], vocab, &targets[row..], losses);
            });
            if self.differentiable {
                each_rows(logits, vocab, |row, logits| {
                    logits_to_gradient(logits, vocab, &targets[row..], gain);
                });
                let d_logits = Matrix::new(logits, n, vocab);
                product(d_logits, weight, &mut d_hidden[first * width..][..n * width], false);
                product(d_logits.transposed(), hidden, &mut d_weight, true);
            }
        }
        if self.differentiable {
            // Filled once: candle runs an operation's forward pass once.
            let _ = self
                .gradients
                .set((T::to_cpu_storage_owned(d_hidden), T::to_cpu_storage_owned(d_weight)));
        }
        let sum: f64 = losses.iter().map(|&x| WithDType::to_f64(x)).sum();
        T::of(sum / rows as f64)
    }
}

impl CustomOp2 for Projected {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_type!(OP, candle_core::backend::BackendStorage::dtype(hidden), T => {
            let hidden = slice::<T>(OP, hidden, hidden_layout)?;
            let mean = self.forward(hidden, slice::<T>(OP, weight, weight_layout)?);
            Ok((T::to_cpu_storage_owned(vec![mean]), Shape::from(())))
        })
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some((d_hidden, d_weight)) = self.gradients.get() else {
            return Ok((None, None));
        };
        let dy = dy.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?;
        by_type!(OP, hidden.dtype(), T => {
            let scaled = |gradient: &CpuStorage, like: &Tensor| {
                let gain = T::of(dy);
                let mut gradient = T::cpu_storage_as_slice(gradient)?.to_vec();
                each_rows(&mut gradient, 1, |_, part| part.iter_mut().for_each(|x| *x *= gain));
                crate::storage::tensor(gradient, like)
            };
            let d_hidden = hidden.track_op().then(|| scaled(d_hidden, hidden));
            let d_weight = weight.track_op().then(|| scaled(d_weight, weight));
            Ok((d_hidden.transpose()?, d_weight.transpose()?))
        })
    }
}
