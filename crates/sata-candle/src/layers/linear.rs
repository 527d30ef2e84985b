use candle_core::{Result, Tensor};
use candle_nn::{Init, Module, VarBuilder};

use crate::{linear, linear_add};

/// A linear map without bias; weight `[out, in]`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
}

impl Linear {
    /// The map whose weight is `weight` in `vb`; a new weight is drawn from N(0, 0.02²).
    ///
    /// # Errors
    /// The weight is missing or has another shape.
    pub fn new(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: 0.02 };
        Ok(Linear { weight: vb.get_with_hints((outputs, inputs), "weight", init)? })
    }

    /// residual + the map of x, in one product: x `[.., in]`, residual `[.., out]`.
    ///
    /// # Errors
    /// Sizes or types that do not fit.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        linear_add(x, &self.weight, residual)
    }

    /// `[out, in]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

impl Module for Linear {
    /// x `[.., in]` to `[.., out]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight)
    }
}
