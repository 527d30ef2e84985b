//! Attention at constant cost per token over candle tensors: a differentiable operation, and
//! layers on it.
//!
//! [`attention`] and [`attention_packed`] are the operation, [`attention_groups`] a mixture of it
//! over groups of heads; [`TaylorAttention`] is the layer with its projections. Beside them stands what a transformer needs around it, each as one node of
//! candle's graph with a gradient of its own (candle's own fused norms and softmax have none).
//! All work on F32 and F64 tensors of the CPU, on rayon's current pool. With the feature `cuda` they
//! also work on NVIDIA GPUs: weights, residuals, norms and losses in F32, products of matrices and
//! attention in BF16, by kernels of this crate and of `sata-cuda`, on candle's memory and stream.

#![deny(missing_docs)]

mod attention;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
mod float;
mod gemm;
pub mod kernels;
mod layers;
mod ops;
mod storage;

pub use attention::{HeadGroup, Options, attention, attention_groups, attention_packed};
pub use error::Error;
pub use layers::{Linear, RmsNorm, TaylorAttention, TaylorAttentionOptions};
pub use ops::*;
