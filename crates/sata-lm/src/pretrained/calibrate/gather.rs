//! Queries, keys and values of a text.

use std::sync::Arc;

use crate::pretrained::attention::{Qkv, Setting};
use crate::pretrained::error::PretrainedError;
use crate::pretrained::llama::{Llama, LlamaSession};

/// One layer's queries, keys and values of a text, and the residual stream that attention adds to.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    /// `[heads][tokens][d]`.
    pub queries: Vec<Vec<f32>>,
    /// `[kv_heads][tokens][d]`.
    pub keys: Vec<Vec<f32>>,
    /// `[kv_heads][tokens][d]`.
    pub values: Vec<Vec<f32>>,
    /// Mean square of an element of the residual stream.
    pub residual: f64,
}

impl Recorded {
    /// Adds tokens that follow.
    pub fn push(&mut self, qkv: &Qkv<'_>) {
        self.queries.resize(qkv.heads(), vec![]);
        self.keys.resize(qkv.kv_heads(), vec![]);
        self.values.resize(qkv.kv_heads(), vec![]);
        for (i, all) in self.queries.iter_mut().enumerate() {
            all.extend(qkv.queries(i));
        }
        for i in 0..qkv.kv_heads() {
            self.keys[i].extend(qkv.keys(i));
            self.values[i].extend(qkv.values(i));
        }
    }
}

/// Reads a text with softmax; `done` is told of tokens that are read. Takes
/// (heads + 2 kv_heads) · head_dim · 4 bytes a token and layer.
///
/// # Errors
/// Tokens that the model does not have.
pub fn record(
    model: &Arc<Llama>,
    tokens: &[u32],
    mut done: impl FnMut(usize),
) -> Result<Vec<Recorded>, PretrainedError> {
    let mut layers = vec![Recorded::default(); model.config().layers];
    let mut session = LlamaSession::new(model, &Setting::softmax())?;
    for part in tokens.chunks(LlamaSession::pass_tokens()) {
        let share = part.len() as f64 / tokens.len() as f64;
        session.observe(part, &mut |layer, qkv, residual| {
            let squares: f64 = residual.iter().map(|x| f64::from(x * x)).sum();
            layers[layer].push(qkv);
            layers[layer].residual += share * squares / residual.len() as f64;
        })?;
        done(part.len());
    }
    Ok(layers)
}
