//! Cross entropy of logits.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, WithDType};

use crate::error;
use crate::float::{Float, largest, sum2, vectorised};
use crate::storage::{by_type, each_rows, last_dim, read, slice, tensor};

const OP: &str = "cross_entropy";

/// The mean over all rows of −ln softmax(logits)\[target\], in nats: logits `[.., vocab]`, targets
/// u32 of as many elements as logits has rows; a scalar.
///
/// # Errors
/// Sizes or types that do not fit, no rows, or a target that is not below `vocab`.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let vocab = last_dim(OP, "logits", logits)?;
    let targets = read_targets(OP, targets, logits, vocab)?;
    logits.contiguous()?.apply_op1(CrossEntropy { targets, vocab })
}

/// The targets, checked: one for each row of x, each below `vocab`.
pub(crate) fn read_targets(
    op: &'static str,
    targets: &Tensor,
    x: &Tensor,
    vocab: usize,
) -> Result<Vec<u32>> {
    let rows = x.elem_count() / last_dim(op, "x", x)?;
    if targets.elem_count() != rows || rows == 0 {
        let expected = format!("there must be one for each of {rows} rows, and at least one");
        return Err(error::shape(op, "targets", targets.dims(), expected));
    }
    read_indices(op, "targets", targets, vocab)
}

/// Whole numbers below `limit`.
pub(crate) fn read_indices(
    op: &'static str,
    argument: &'static str,
    indices: &Tensor,
    limit: usize,
) -> Result<Vec<u32>> {
    if indices.dtype() != DType::U32 {
        return Err(error::dtype(op, argument, indices.dtype(), "it must be U32"));
    }
    let indices = indices.flatten_all()?.to_vec1::<u32>()?;
    match indices.iter().position(|&i| i as usize >= limit) {
        Some(at) => {
            let got = format!("{} at {at}", indices[at]);
            Err(error::value(op, argument, got, format!("each must be below {limit}")))
        }
        None => Ok(indices),
    }
}

struct CrossEntropy {
    targets: Vec<u32>,
    vocab: usize,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        by_type!(OP, candle_core::backend::BackendStorage::dtype(logits), T => {
            let logits = slice::<T>(OP, logits, layout)?;
            let mut losses = vec![T::default(); self.targets.len()];
            each_rows(&mut losses, 1, |row, losses| {
                let part = row * self.vocab..(row + losses.len()) * self.vocab;
                losses_of(&logits[part], self.vocab, &self.targets[row..], losses);
            });
            let sum: f64 = losses.iter().map(|&x| WithDType::to_f64(x)).sum();
            let mean = T::of(sum / self.targets.len() as f64);
            Ok((T::to_cpu_storage_owned(vec![mean]), Shape::from(())))
        })
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        by_type!(OP, logits.dtype(), T => {
            let dx = read::<T, _>(OP, logits, |logits| {
                let mut dx = logits.to_vec();
                let gain = T::of(dy / self.targets.len() as f64);
                each_rows(&mut dx, self.vocab, |row, dx| {
                    logits_to_gradient(dx, self.vocab, &self.targets[row..], gain);
                });
                Ok(dx)
            })?;
            Ok(Some(tensor(dx, logits)?))
        })
    }
}

vectorised! {
    /// −ln softmax(row)[target] of each row.
    pub(crate) fn losses_of<T: Float>(
        logits: &[T],
        vocab: usize,
        targets: &[u32],
        losses: &mut [T],
    ) {
        let rows = logits.chunks_exact(vocab).zip(targets);
        for ((row, &target), loss) in rows.zip(losses) {
            let most = largest(row);
            let sum = sum2(row, row, |x, _| (x - most).exp_of_negative());
            *loss = sum.log() - (row[target as usize] - most);
        }
    }
}

vectorised! {
    /// Logits become gain · (softmax − [target]), row by row.
    pub(crate) fn logits_to_gradient<T: Float>(
        logits: &mut [T],
        vocab: usize,
        targets: &[u32],
        gain: T,
    ) {
        for (row, &target) in logits.chunks_exact_mut(vocab).zip(targets) {
            let most = largest(row);
            for x in row.iter_mut() {
                *x = (*x - most).exp_of_negative();
            }
            let one = gain / sum2(row, row, |x, _| x);
            for x in row.iter_mut() {
                *x *= one;
            }
            row[target as usize] -= gain;
        }
    }
}
