use candle_core::{Result, Tensor};
use candle_nn::{Init, Module, VarBuilder};

use crate::rms_norm;

/// Root-mean-square norm over the last dimension, with a learnt scale.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// The norm of `size` elements whose scale is `weight` in `vb`; a new scale is 1.
    ///
    /// # Errors
    /// The weight is missing or has another shape.
    pub fn new(size: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Ok(RmsNorm { weight: vb.get_with_hints(size, "weight", Init::Const(1.0))?, eps })
    }

    /// `[size]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, &self.weight, self.eps)
    }
}
