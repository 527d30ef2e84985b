//! An encoder's weights, and a text's vector.

use std::path::Path;

use super::config::{BertConfig, Pooling};
use crate::pretrained::attention::{Qkv, Setting, attend_whole};
use crate::pretrained::error::PretrainedError;
use crate::pretrained::linear::{add_times, layer_norm, times};
use crate::pretrained::safe::SafeTensorsFile;
use crate::pretrained::tensors::Source;

/// A matrix `[out, in]` and what is added.
#[derive(Debug)]
struct Affine {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Affine {
    /// Rows of `columns` elements, with what is added.
    fn apply(&self, x: &[f32], columns: usize) -> Vec<f32> {
        let tokens = x.len() / columns;
        let mut out = self.bias.repeat(tokens);
        add_times(x, &self.weight, columns, &mut out);
        out
    }
}

#[derive(Debug)]
struct Layer {
    /// Queries, keys, values, head by head.
    qkv: Affine,
    out: Affine,
    /// Weight and bias.
    attention_norm: [Vec<f32>; 2],
    up: Affine,
    down: Affine,
    norm: [Vec<f32>; 2],
}

/// A BERT-type encoder.
#[derive(Debug)]
pub struct Bert {
    config: BertConfig,
    words: Vec<f32>,
    positions: Vec<f32>,
    types: Vec<f32>,
    norm: [Vec<f32>; 2],
    layers: Vec<Layer>,
}

impl Bert {
    /// The encoder of a folder with `config.json` and safetensors.
    ///
    /// # Errors
    /// Tensors that are missing, not read or of other sizes.
    pub fn from_safetensors(folder: &Path, config: BertConfig) -> Result<Self, PretrainedError> {
        const WHY: &str = "config.json";
        let source = Source::Safe(SafeTensorsFile::open(folder)?);
        // Models that carry a head besides keep the encoder under this name.
        let prefix =
            if source.has("bert.embeddings.word_embeddings.weight") { "bert." } else { "" };
        let (width, mlp) = (config.width, config.mlp);
        let read =
            |name: &str, shape: &[usize]| source.read(&format!("{prefix}{name}"), shape, WHY);
        let affine = |name: &str, rows: usize, columns: usize| {
            Ok::<_, PretrainedError>(Affine {
                weight: read(&format!("{name}.weight"), &[rows, columns])?,
                bias: read(&format!("{name}.bias"), &[rows])?,
            })
        };
        let norm = |name: &str| {
            let weight = read(&format!("{name}.weight"), &[width])?;
            Ok::<_, PretrainedError>([weight, read(&format!("{name}.bias"), &[width])?])
        };
        let mut layers = vec![];
        for i in 0..config.layers {
            let of = |name: &str| format!("encoder.layer.{i}.{name}");
            let mut qkv = affine(&of("attention.self.query"), width, width)?;
            for part in ["key", "value"] {
                let part = affine(&of(&format!("attention.self.{part}")), width, width)?;
                qkv.weight.extend(part.weight);
                qkv.bias.extend(part.bias);
            }
            layers.push(Layer {
                qkv,
                out: affine(&of("attention.output.dense"), width, width)?,
                attention_norm: norm(&of("attention.output.LayerNorm"))?,
                up: affine(&of("intermediate.dense"), mlp, width)?,
                down: affine(&of("output.dense"), width, mlp)?,
                norm: norm(&of("output.LayerNorm"))?,
            });
        }
        Ok(Bert {
            words: read("embeddings.word_embeddings.weight", &[config.vocab, width])?,
            positions: read("embeddings.position_embeddings.weight", &[config.positions, width])?,
            types: read("embeddings.token_type_embeddings.weight", &[config.types, width])?,
            norm: norm("embeddings.LayerNorm")?,
            layers,
            config,
        })
    }

    /// What it is.
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// The vector of a text's tokens, of length 1, under an attention setting.
    ///
    /// # Errors
    /// No tokens, more than it has positions for, or some it does not have; what attention refuses.
    pub fn embed(&self, tokens: &[u32], setting: &Setting) -> Result<Vec<f32>, PretrainedError> {
        let hidden = self.hidden(tokens, setting, &mut |_, _| {})?;
        let width = self.config.width;
        let mut out = match self.config.pooling {
            Pooling::First => hidden[..width].to_vec(),
            Pooling::Mean => {
                let mut out = vec![0.0; width];
                for row in hidden.chunks_exact(width) {
                    out.iter_mut().zip(row).for_each(|(out, x)| *out += x);
                }
                out
            }
        };
        let length = out.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
        out.iter_mut().for_each(|x| *x /= length);
        Ok(out)
    }

    /// Last hidden states, `[tokens, width]`, showing every layer's queries, keys and values.
    ///
    /// # Errors
    /// As [`Self::embed`].
    pub fn hidden(
        &self,
        tokens: &[u32],
        setting: &Setting,
        observer: &mut dyn FnMut(usize, &Qkv<'_>),
    ) -> Result<Vec<f32>, PretrainedError> {
        let config = &self.config;
        let (width, epsilon) = (config.width, config.norm_eps as f32);
        if tokens.is_empty() || tokens.len() > config.positions {
            return Err(PretrainedError::Input(format!(
                "{} tokens, but the encoder takes 1 to {}",
                tokens.len(),
                config.positions
            )));
        }
        setting.check_sizes([config.layers, config.heads, config.head_dim()])?;
        let mut x = Vec::with_capacity(tokens.len() * width);
        for (t, &token) in tokens.iter().enumerate() {
            let Some(word) = self.words.chunks_exact(width).nth(token as usize) else {
                let vocab = config.vocab;
                return Err(PretrainedError::Input(format!(
                    "token {token} at place {t} is not in the vocabulary of {vocab} tokens"
                )));
            };
            let position = &self.positions[t * width..][..width];
            let parts = word.iter().zip(position).zip(&self.types[..width]);
            x.extend(parts.map(|((word, position), kind)| word + position + kind));
        }
        layer_norm(&mut x, &self.norm[0], &self.norm[1], epsilon);
        let heads = [config.heads, config.heads, config.head_dim()];
        for (i, layer) in self.layers.iter().enumerate() {
            let qkv = Qkv::new(layer.qkv.apply(&x, width), heads);
            observer(i, &qkv);
            let answers = attend_whole(setting, i, &qkv)?;
            let mut y = layer.out.apply(&answers, width);
            y.iter_mut().zip(&x).for_each(|(y, x)| *y += x);
            layer_norm(&mut y, &layer.attention_norm[0], &layer.attention_norm[1], epsilon);
            let mut inner = layer.up.apply(&y, width);
            inner.iter_mut().for_each(|x| *x = gelu(*x));
            x = layer.down.bias.repeat(tokens.len());
            let mut down = vec![0.0; x.len()];
            times(&inner, &layer.down.weight, config.mlp, &mut down);
            for ((x, down), y) in x.iter_mut().zip(down).zip(&y) {
                *x += down + y;
            }
            layer_norm(&mut x, &layer.norm[0], &layer.norm[1], epsilon);
        }
        Ok(x)
    }
}

/// x Φ(x), with the normal distribution's own Φ.
fn gelu(x: f32) -> f32 {
    let x = f64::from(x);
    (0.5 * x * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2)) as f32
}

#[cfg(test)]
mod tests {
    #[test]
    fn gelu_of_some_numbers() {
        // From tables of Φ.
        for (x, want) in [(0.0, 0.0), (1.0, 0.841_344_7), (-1.0, -0.158_655_3), (3.0, 2.995_95)] {
            assert!((super::gelu(x) - want).abs() < 1e-5, "{x}: {}", super::gelu(x));
        }
    }
}
