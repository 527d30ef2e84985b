//! Tensors as slices and back, and rows shared out to threads.

use candle_core::{CpuStorage, DType, Device, Layout, Result, Storage, Tensor};
use rayon::prelude::*;

use crate::error;
use crate::float::Float;

/// The elements of a contiguous tensor on the CPU.
pub(crate) fn slice<'a, T: Float>(
    op: &'static str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        let expected = "it must be contiguous";
        return Err(error::shape(op, "an argument", layout.dims(), expected));
    };
    Ok(&T::cpu_storage_as_slice(storage)?[start..end])
}

/// Calls `f` on the elements of a contiguous tensor.
pub(crate) fn read<T: Float, R>(
    op: &'static str,
    tensor: &Tensor,
    f: impl FnOnce(&[T]) -> Result<R>,
) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(slice(op, storage, layout)?),
        _ => Err(not_on_cpu(op)),
    }
}

fn not_on_cpu(op: &'static str) -> candle_core::Error {
    candle_core::Error::Msg(format!("{op} works on tensors of the CPU")).bt()
}

/// A tensor of these elements.
pub(crate) fn tensor<T: Float>(data: Vec<T>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(data, like.shape(), &Device::Cpu)
}

/// Calls generic code with `$t` the type of a tensor's elements.
macro_rules! by_type {
    ($op:expr, $dtype:expr, $t:ident => $code:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $t = f32;
                $code
            }
            candle_core::DType::F64 => {
                type $t = f64;
                $code
            }
            other => Err(crate::error::dtype($op, "an argument", other, "it must be F32 or F64")),
        }
    };
}
pub(crate) use by_type;

/// Refuses arguments of unlike types.
pub(crate) fn check_type(
    op: &'static str,
    argument: &'static str,
    x: &Tensor,
    dtype: DType,
) -> Result<()> {
    // On a GPU each operation has the types that it works in.
    if x.dtype() != dtype && !x.device().is_cuda() {
        return Err(error::dtype(op, argument, x.dtype(), format!("the others are {dtype:?}")));
    }
    Ok(())
}

/// Refuses what is neither F32 nor F64, or not on the CPU (or, where there are GPUs, on one).
pub(crate) fn check_float(op: &'static str, argument: &'static str, x: &Tensor) -> Result<()> {
    if cfg!(feature = "cuda") && x.device().is_cuda() {
        return Ok(());
    }
    if !matches!(x.dtype(), DType::F32 | DType::F64) {
        return Err(error::dtype(op, argument, x.dtype(), "it must be F32 or F64"));
    }
    if !x.device().is_cpu() {
        return Err(not_on_cpu(op));
    }
    Ok(())
}

/// The size of the last dimension, at least 1, of an F32 or F64 tensor.
pub(crate) fn last_dim(op: &'static str, argument: &'static str, x: &Tensor) -> Result<usize> {
    check_float(op, argument, x)?;
    match x.dims().last() {
        Some(&n) if n > 0 => Ok(n),
        _ => Err(error::shape(op, argument, x.dims(), "its last dimension must be at least 1")),
    }
}

/// Elements that are worth a thread's while.
const WORTH: usize = 1 << 14;

/// Calls `f(first row, rows)` on blocks of `out`'s rows, on several threads where that pays.
pub(crate) fn each_rows<T: Float>(out: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if rayon::current_num_threads() == 1 || out.len() < 2 * WORTH || width == 0 {
        return f(0, out);
    }
    let rows = WORTH.div_ceil(width);
    let blocks = out.par_chunks_mut(rows * width).enumerate();
    blocks.for_each(|(i, block)| f(i * rows, block));
}

/// The same, where every block also has a part of one sum over all rows, `[sums]` long. Blocks and
/// their order do not depend on threads, so neither does the sum.
pub(crate) fn each_rows_summing<T: Float>(
    out: &mut [T],
    width: usize,
    sums: usize,
    f: impl Fn(usize, &mut [T], &mut [T]) + Sync,
) -> Vec<T> {
    let rows = WORTH.div_ceil(width.max(1));
    let mut total = vec![T::ZERO; sums];
    let one = |(i, block): (usize, &mut [T])| {
        let mut sum = vec![T::ZERO; sums];
        f(i * rows, block, &mut sum);
        sum
    };
    let chunk = (rows * width).max(1);
    let parts: Vec<Vec<T>> = if rayon::current_num_threads() == 1 || out.len() < 2 * WORTH {
        out.chunks_mut(chunk).enumerate().map(one).collect()
    } else {
        out.par_chunks_mut(chunk).enumerate().map(one).collect()
    };
    for part in parts {
        for (total, part) in total.iter_mut().zip(part) {
            *total += part;
        }
    }
    total
}
