//! Softmax and its logarithm over the last dimension.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use crate::float::{Float, largest, sum2, vectorised};
use crate::storage::{each_rows, last_dim, read, slice, tensor};

/// e^x / Σ e^x over the last dimension of x `[.., n]`. A row of nothing but −∞ has no softmax and
/// gives NaN.
///
/// # Errors
/// A type other than F32 and F64, or no elements in a row.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let width = last_dim("softmax", "x", x)?;
    x.contiguous()?.apply_op1(Softmax { width })
}

/// x − ln Σ e^x over the last dimension of x `[.., n]`.
///
/// # Errors
/// As for [`softmax`].
pub fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let width = last_dim("log_softmax", "x", x)?;
    x.contiguous()?.apply_op1(LogSoftmax { width })
}

struct Softmax {
    width: usize,
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        forward(self.name(), x, layout, self.width, softmax_rows::<f32>, softmax_rows::<f64>)
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        backward(self.name(), x, y, dy, self.width, softmax_back::<f32>, softmax_back::<f64>)
    }
}

struct LogSoftmax {
    width: usize,
}

impl CustomOp1 for LogSoftmax {
    fn name(&self) -> &'static str {
        "log_softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        forward(self.name(), x, layout, self.width, log_rows::<f32>, log_rows::<f64>)
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        backward(self.name(), x, y, dy, self.width, log_back::<f32>, log_back::<f64>)
    }
}

type Rows<T> = fn(&[T], usize, &mut [T]);
type RowsBack<T> = fn(&[T], &[T], usize, &mut [T]);

fn forward(
    op: &'static str,
    x: &CpuStorage,
    layout: &Layout,
    width: usize,
    f32s: Rows<f32>,
    f64s: Rows<f64>,
) -> Result<(CpuStorage, Shape)> {
    fn run<T: Float>(
        op: &'static str,
        x: &CpuStorage,
        layout: &Layout,
        width: usize,
        f: Rows<T>,
    ) -> Result<CpuStorage> {
        let x = slice::<T>(op, x, layout)?;
        let mut y = vec![T::default(); x.len()];
        each_rows(&mut y, width, |row, y| f(&x[row * width..][..y.len()], width, y));
        Ok(T::to_cpu_storage_owned(y))
    }
    let y = match x {
        CpuStorage::F32(_) => run(op, x, layout, width, f32s),
        _ => run(op, x, layout, width, f64s),
    }?;
    Ok((y, layout.shape().clone()))
}

fn backward(
    op: &'static str,
    x: &Tensor,
    y: &Tensor,
    dy: &Tensor,
    width: usize,
    f32s: RowsBack<f32>,
    f64s: RowsBack<f64>,
) -> Result<Option<Tensor>> {
    fn run<T: Float>(
        op: &'static str,
        y: &Tensor,
        dy: &Tensor,
        width: usize,
        f: RowsBack<T>,
    ) -> Result<Tensor> {
        let dx = read::<T, _>(op, y, |y| {
            read::<T, _>(op, dy, |dy| {
                let mut dx = vec![T::default(); y.len()];
                each_rows(&mut dx, width, |row, dx| {
                    let part = row * width..row * width + dx.len();
                    f(&y[part.clone()], &dy[part], width, dx);
                });
                Ok(dx)
            })
        })?;
        tensor(dx, y)
    }
    let dy = dy.contiguous()?;
    Ok(Some(match x.dtype() {
        candle_core::DType::F32 => run(op, y, &dy, width, f32s),
        _ => run(op, y, &dy, width, f64s),
    }?))
}

vectorised! {
    /// Softmax of each row.
    pub(crate) fn softmax_rows<T: Float>(x: &[T], width: usize, y: &mut [T]) {
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let most = largest(x);
            for (y, &x) in y.iter_mut().zip(x) {
                *y = (x - most).exp_of_negative();
            }
            let one = T::ONE / sum2(y, y, |a, _| a);
            for y in y {
                *y *= one;
            }
        }
    }
}

vectorised! {
    /// dx = y (dy − Σ y dy).
    fn softmax_back<T: Float>(y: &[T], dy: &[T], width: usize, dx: &mut [T]) {
        let rows = y.chunks_exact(width).zip(dy.chunks_exact(width));
        for ((y, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
            let mean = sum2(y, dy, |a, b| a * b);
            for ((dx, &y), &dy) in dx.iter_mut().zip(y).zip(dy) {
                *dx = y * (dy - mean);
            }
        }
    }
}

vectorised! {
    /// Log softmax of each row.
    fn log_rows<T: Float>(x: &[T], width: usize, y: &mut [T]) {
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let most = largest(x);
            let total = sum2(x, x, |x, _| (x - most).exp_of_negative()).log();
            for (y, &x) in y.iter_mut().zip(x) {
                *y = (x - most) - total;
            }
        }
    }
}

vectorised! {
    /// dx = dy − e^y Σ dy.
    fn log_back<T: Float>(y: &[T], dy: &[T], width: usize, dx: &mut [T]) {
        let rows = y.chunks_exact(width).zip(dy.chunks_exact(width));
        for ((y, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
            let all = sum2(dy, dy, |a, _| a);
            for ((dx, &y), &dy) in dx.iter_mut().zip(y).zip(dy) {
                *dx = dy - y.exp_of_negative() * all;
            }
        }
    }
}
