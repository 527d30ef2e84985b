//! A text in the making: what a model remembers of it, and the hidden states of what comes.

use std::sync::Arc;

use super::weights::{Layer, Llama};
use crate::pretrained::attention::{LayerPast, Qkv, Setting};
use crate::pretrained::error::PretrainedError;
use crate::pretrained::linear::{add_times, rms_norm, times};
use crate::pretrained::rotary::{Reach, Rotary};

/// Tokens that go through the layers at once.
const PASS: usize = 512;

/// Sees, for every layer, queries, keys and values as they are made, rotary embedding applied, and the
/// residual stream that attention adds to.
pub type Observer<'o> = &'o mut dyn FnMut(usize, &Qkv<'_>, &[f32]);

/// A model reading one text under an attention setting.
#[derive(Clone, Debug)]
pub struct LlamaSession {
    model: Arc<Llama>,
    pasts: Vec<LayerPast>,
    rotary: Rotary,
    position: usize,
}

impl LlamaSession {
    /// An empty text.
    ///
    /// # Errors
    /// A setting that does not fit the model.
    pub fn new(model: &Arc<Llama>, setting: &Setting) -> Result<Self, PretrainedError> {
        let config = model.config();
        setting.check_sizes([config.layers, config.kv_heads, config.head_dim])?;
        let sizes = [config.heads, config.kv_heads, config.head_dim];
        let reach = Arc::new(Reach::new(config.rope_base, config.head_dim, config.context));
        let pasts = (0..config.layers).map(|layer| LayerPast::new(setting, layer, sizes, &reach));
        Ok(LlamaSession {
            pasts: pasts.collect::<Result<_, _>>()?,
            rotary: Rotary::new(config.rope_base, config.head_dim),
            position: 0,
            model: model.clone(),
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Llama> {
        &self.model
    }

    /// Tokens read.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes of all that it remembers, as held in memory.
    pub fn bytes(&self) -> usize {
        self.pasts.iter().map(LayerPast::bytes).sum()
    }

    /// Reads tokens; gives their normed last hidden states, `[tokens, width]`.
    ///
    /// # Errors
    /// [`PretrainedError::Input`] for a token that the vocabulary does not have, and what attention
    /// refuses.
    pub fn read(&mut self, tokens: &[u32]) -> Result<Vec<f32>, PretrainedError> {
        self.observe(tokens, &mut |_, _, _| {})
    }

    /// The same, showing every layer's queries, keys and values, [`Self::pass_tokens`] tokens at once.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn observe(
        &mut self,
        tokens: &[u32],
        observer: Observer<'_>,
    ) -> Result<Vec<f32>, PretrainedError> {
        let config = self.model.config();
        if let Some((place, token)) =
            tokens.iter().enumerate().find(|(_, token)| **token as usize >= config.vocab)
        {
            let vocab = config.vocab;
            return Err(PretrainedError::Input(format!(
                "token {token} at place {place} is not in the vocabulary of {vocab} tokens"
            )));
        }
        let mut hidden = Vec::with_capacity(tokens.len() * config.width);
        for part in tokens.chunks(PASS) {
            self.pass(part, &mut hidden, observer)?;
        }
        Ok(hidden)
    }

    /// Tokens that go through the layers at once, at most.
    pub fn pass_tokens() -> usize {
        PASS
    }

    fn pass(
        &mut self,
        tokens: &[u32],
        hidden: &mut Vec<f32>,
        observer: Observer<'_>,
    ) -> Result<(), PretrainedError> {
        let model = self.model.clone();
        let config = &model.config;
        let (width, epsilon) = (config.width, config.norm_eps as f32);
        self.rotary.set(self.position, tokens.len());
        let mut x = Vec::with_capacity(tokens.len() * width);
        for &token in tokens {
            x.extend_from_slice(&model.embed[token as usize * width..][..width]);
        }
        let mut normed = vec![0.0; x.len()];
        for (i, (layer, past)) in model.layers.iter().zip(&mut self.pasts).enumerate() {
            rms_norm(&x, &layer.attention_norm, epsilon, &mut normed);
            let mut qkv =
                vec![0.0; tokens.len() * (config.heads + 2 * config.kv_heads) * config.head_dim];
            times(&normed, &layer.qkv, width, &mut qkv);
            let heads = [config.heads, config.kv_heads, config.head_dim];
            let qkv = Qkv::turned(qkv, heads, &self.rotary);
            observer(i, &qkv, &x);
            let answers = past.attend(&qkv)?;
            add_times(&answers, &layer.out, config.heads * config.head_dim, &mut x);
            rms_norm(&x, &layer.mlp_norm, epsilon, &mut normed);
            feed_forward(layer, &normed, config.mlp, &mut x);
        }
        rms_norm(&x, &model.norm, epsilon, &mut normed);
        self.position += tokens.len();
        hidden.extend_from_slice(&normed);
        Ok(())
    }
}

fn feed_forward(layer: &Layer, normed: &[f32], mlp: usize, x: &mut [f32]) {
    let width = layer.mlp_norm.len();
    let tokens = normed.len() / width;
    let mut up = vec![0.0; tokens * 2 * mlp];
    times(normed, &layer.up, width, &mut up);
    let mut inner = Vec::with_capacity(tokens * mlp);
    for row in up.chunks_exact(2 * mlp) {
        let (gate, value) = row.split_at(mlp);
        inner.extend(gate.iter().zip(value).map(|(g, v)| g / (1.0 + (-g).exp()) * v));
    }
    add_times(&inner, &layer.down, mlp, x);
}
