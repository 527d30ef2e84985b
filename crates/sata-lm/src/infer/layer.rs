//! The transformer: tokens in, hidden states out.

use super::Error;
use super::attention::{Past, Rows, Troubles};
use super::rotary::Rotary;
use super::weights::{Layer, Weights};
use crate::Position;

/// Working memory of a pass over some tokens, one row each.
#[derive(Clone, Debug)]
pub(super) struct Work {
    /// Tokens that there is room for.
    tokens: usize,
    /// The residual stream, `[tokens][width]`.
    x: Vec<f32>,
    /// Its norm; at the end the normed last hidden states.
    normed: Vec<f32>,
    /// `[tokens][qkv.padded]`.
    qkv: Vec<f32>,
    /// What heads answered, `[tokens][heads · head_dim]`.
    answers: Vec<f32>,
    /// `[tokens][up.padded]`.
    up: Vec<f32>,
    /// What is added to the residual stream, `[tokens][padded width]`.
    added: Vec<f32>,
    rotary: Rotary,
    /// For a KV cache's weights.
    scratch: Vec<f32>,
}

/// `rows` of `stride` elements, `tokens` of them, the last with room for `used` of each alone.
fn row(x: &mut [f32], stride: usize, t: usize) -> &mut [f32] {
    &mut x[t * stride..(t + 1) * stride]
}

impl Work {
    /// For passes of up to `tokens` tokens.
    pub(super) fn new(weights: &Weights, tokens: usize) -> Self {
        let (config, a) = (&weights.config, &weights.config.attention);
        let layer = weights.layers.first();
        let zeros = |each: usize| vec![0.0; tokens * each];
        let width_padded = layer.map_or(0, |l| l.down.padded());
        Work {
            tokens,
            x: zeros(config.width),
            normed: zeros(config.width),
            qkv: zeros(layer.map_or(0, |l| l.qkv.padded())),
            answers: zeros(a.heads * a.head_dim),
            up: zeros(layer.map_or(0, |l| l.up.padded())),
            added: zeros(width_padded),
            rotary: Rotary::default(),
            scratch: vec![],
        }
    }

    /// Tokens of a pass, at most.
    pub(super) fn room(&self) -> usize {
        self.tokens
    }

    /// Takes tokens that follow `position` others into `pasts`; then [`Self::hidden`] has them.
    pub(super) fn pass(
        &mut self,
        weights: &Weights,
        pasts: &mut [Past],
        position: u64,
        tokens: &[u32],
    ) -> Result<Troubles, Error> {
        let config = &weights.config;
        let width = config.width;
        for (t, &token) in tokens.iter().enumerate() {
            weights.embed.row(token as usize, row(&mut self.x, width, t));
        }
        if config.attention.position == Position::Rotary {
            self.rotary.set(position, tokens.len(), config.attention.head_dim);
        }
        let mut troubles = Troubles::default();
        for (layer, past) in weights.layers.iter().zip(pasts) {
            troubles.0 += self.attention(weights, layer, past, tokens.len())?.0;
            self.mlp(weights, layer, tokens.len());
        }
        self.norm(weights, &weights.norm, tokens.len());
        Ok(troubles)
    }

    /// The normed last hidden states of the last pass, `[tokens][width]`.
    pub(super) fn hidden(&self) -> &[f32] {
        &self.normed
    }

    fn norm(&mut self, weights: &Weights, norm: &[f32], tokens: usize) {
        let width = weights.config.width;
        let rows = self.x.chunks_exact(width).zip(self.normed.chunks_exact_mut(width));
        for (x, out) in rows.take(tokens) {
            // SAFETY: kernels are only handed out for instructions that are there.
            unsafe { (weights.kernels.norm)(x, norm, weights.config.norm_eps, out) };
        }
    }

    /// Adds `added` to the residual stream.
    fn add(&mut self, width: usize, stride: usize, tokens: usize) {
        let rows = self.x.chunks_exact_mut(width).zip(self.added.chunks_exact(stride));
        for (x, added) in rows.take(tokens) {
            x.iter_mut().zip(added).for_each(|(x, y)| *x += y);
        }
    }

    fn attention(
        &mut self,
        weights: &Weights,
        layer: &Layer,
        past: &mut Past,
        tokens: usize,
    ) -> Result<Troubles, Error> {
        let (config, a, kernels) = (&weights.config, &weights.config.attention, weights.kernels);
        let (width, d) = (config.width, a.head_dim);
        let (queries, keys) = (a.heads * d, a.kv_heads() * d);
        self.norm(weights, &layer.attn_norm, tokens);
        let stride = layer.qkv.padded();
        layer.qkv.times(kernels, tokens, (&self.normed, width), (&mut self.qkv, stride));
        for t in 0..tokens {
            let row = row(&mut self.qkv, stride, t);
            let (q, rest) = row.split_at_mut(queries);
            let (k, rest) = rest.split_at_mut(keys);
            if a.qk_norm {
                // SAFETY: as in `norm`.
                unsafe {
                    (kernels.norm_rows)(q, &layer.q_norm, config.norm_eps);
                    (kernels.norm_rows)(k, &layer.k_norm, config.norm_eps);
                }
            }
            if a.position == Position::Rotary {
                self.rotary.turn(t, q, d);
                self.rotary.turn(t, k, d);
            }
            for (gate, bias) in rest[keys..].iter_mut().zip(&layer.gate_bias) {
                *gate = log_sigmoid(*gate + bias);
            }
        }
        let rows = Rows { rows: &mut self.qkv, stride, tokens };
        let troubles = past.attend(weights, rows, &mut self.answers, &mut self.scratch)?;
        let stride = layer.out.padded();
        layer.out.times(kernels, tokens, (&self.answers, queries), (&mut self.added, stride));
        self.add(width, stride, tokens);
        Ok(troubles)
    }

    fn mlp(&mut self, weights: &Weights, layer: &Layer, tokens: usize) {
        let (config, kernels) = (&weights.config, weights.kernels);
        let (width, mlp) = (config.width, config.mlp);
        self.norm(weights, &layer.mlp_norm, tokens);
        let stride = layer.up.padded();
        layer.up.times(kernels, tokens, (&self.normed, width), (&mut self.up, stride));
        for t in 0..tokens {
            let (gate, up) = row(&mut self.up, stride, t).split_at_mut(mlp);
            // SAFETY: as in `norm`.
            unsafe { (kernels.gated)(gate, up) };
        }
        let to = layer.down.padded();
        layer.down.times(kernels, tokens, (&self.up, stride), (&mut self.added, to));
        self.add(width, to, tokens);
    }
}

/// ln(1 / (1 + e^−x)), at most 0.
fn log_sigmoid(x: f32) -> f32 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}
