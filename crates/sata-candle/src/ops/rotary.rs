//! Rotary position embedding.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};

use crate::error;
use crate::float::{Float, vectorised};
use crate::storage::{by_type, check_float, each_rows, read, slice, tensor};

const OP: &str = "rotary";

/// Turns each of the first `heads` heads of x `[batch, tokens, n]`, `head_dim` elements each, by
/// its token's position; what follows in a row stays as it is.
///
/// With d = `head_dim`, elements i and i + d/2 (i < d/2) are turned by the angle
/// position · base^(−2i/d), as in LLaMA; the first token is at position `first`.
///
/// # Errors
/// Sizes that do not fit, an odd `head_dim`, or a base that is not positive and finite.
pub fn rotary(
    x: &Tensor,
    head_dim: usize,
    heads: usize,
    first: usize,
    base: f64,
) -> Result<Tensor> {
    check_float(OP, "x", x)?;
    let [_, tokens, width] = *x.dims() else {
        return Err(error::shape(OP, "x", x.dims(), "it must be [batch, tokens, n]"));
    };
    if head_dim == 0 || head_dim % 2 == 1 {
        return Err(error::value(OP, "head_dim", head_dim, "it must be even and at least 2"));
    }
    if heads.checked_mul(head_dim).is_none_or(|n| n > width) {
        let expected = format!("{heads} heads of {head_dim} elements are wider than that");
        return Err(error::shape(OP, "x", x.dims(), expected));
    }
    if !(base.is_finite() && base > 0.0) {
        return Err(error::value(OP, "base", base, "it must be positive and finite"));
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let turn = crate::cuda::Turn { head_dim, heads, tokens, width, first, base };
        return x.contiguous()?.apply_op1(OnGpu(turn));
    }
    let half = head_dim / 2;
    let turns: Vec<f64> = (0..half).map(|i| base.powf(-2.0 * i as f64 / head_dim as f64)).collect();
    let angles = (0..tokens).flat_map(|t| turns.iter().map(move |turn| (first + t) as f64 * turn));
    let (sin, cos) = angles.map(f64::sin_cos).unzip();
    x.contiguous()?.apply_op1(Rotary { half, heads, tokens, width, sin, cos })
}

/// The same on a GPU, which keeps its tables.
#[cfg(feature = "cuda")]
struct OnGpu(crate::cuda::Turn);

#[cfg(feature = "cuda")]
impl CustomOp1 for OnGpu {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        candle_core::bail!("{OP}: an argument is not on the GPU")
    }

    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.0.forward((x, layout))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        self.0.backward(&dy.contiguous()?).map(Some)
    }
}

struct Rotary {
    half: usize,
    heads: usize,
    tokens: usize,
    width: usize,
    /// `[tokens, half]`.
    sin: Vec<f64>,
    cos: Vec<f64>,
}

impl Rotary {
    /// Turns rows forwards (`sign` 1) or back (−1).
    fn turn<T: Float>(&self, x: &[T], sign: f64) -> Vec<T> {
        let cos: Vec<T> = self.cos.iter().map(|&c| T::of(c)).collect();
        let sin: Vec<T> = self.sin.iter().map(|&s| T::of(sign * s)).collect();
        let (half, width) = (self.half, self.width);
        let mut y = vec![T::default(); x.len()];
        each_rows(&mut y, width, |row, y| {
            let token = row % self.tokens;
            turn_rows(&x[row * width..][..y.len()], width, self.heads, half, token, &cos, &sin, y);
        });
        y
    }
}

impl CustomOp1 for Rotary {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        by_type!(OP, candle_core::backend::BackendStorage::dtype(x), T => {
            let y = self.turn(slice::<T>(OP, x, layout)?, 1.0);
            Ok((T::to_cpu_storage_owned(y), layout.shape().clone()))
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        by_type!(OP, x.dtype(), T => {
            let dx = read::<T, _>(OP, &dy, |dy| Ok(self.turn(dy, -1.0)))?;
            Ok(Some(tensor(dx, x)?))
        })
    }
}

vectorised! {
    fn turn_rows<T: Float>(
        x: &[T],
        width: usize,
        heads: usize,
        half: usize,
        first_token: usize,
        cos: &[T],
        sin: &[T],
        y: &mut [T],
    ) {
        let tokens = cos.len() / half;
        let turned = 2 * half * heads;
        let mut token = first_token;
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let cos = &cos[token * half..][..half];
            let sin = &sin[token * half..][..half];
            token = if token + 1 == tokens { 0 } else { token + 1 };
            let (x, x_rest) = x.split_at(turned);
            let (y, y_rest) = y.split_at_mut(turned);
            y_rest.copy_from_slice(x_rest);
            for (x, y) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)) {
                let (a, b) = x.split_at(half);
                let (ya, yb) = y.split_at_mut(half);
                for i in 0..half {
                    ya[i] = a[i] * cos[i] - b[i] * sin[i];
                    yb[i] = b[i] * cos[i] + a[i] * sin[i];
                }
            }
        }
    }
}
