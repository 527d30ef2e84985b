//! A model's weights.

use std::path::Path;

use super::config::LlamaConfig;
use crate::pretrained::error::PretrainedError;
use crate::pretrained::gguf::Gguf;
use crate::pretrained::safe::SafeTensorsFile;
use crate::pretrained::tensors::Source;

/// One layer. Matrices are `[out, in]`.
#[derive(Debug)]
pub(super) struct Layer {
    pub attention_norm: Vec<f32>,
    /// Queries, keys, values, head by head.
    pub qkv: Vec<f32>,
    pub out: Vec<f32>,
    pub mlp_norm: Vec<f32>,
    /// The half that SiLU is taken of, then the half it multiplies.
    pub up: Vec<f32>,
    pub down: Vec<f32>,
}

/// A Llama-type model: weights in f32, shared by sessions.
#[derive(Debug)]
pub struct Llama {
    pub(super) config: LlamaConfig,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Vec<f32>,
    /// `[vocab, width]`.
    pub(super) embed: Vec<f32>,
    /// The same for logits, where it is another.
    pub(super) head: Option<Vec<f32>>,
}

/// What tensors are called in a kind of file.
struct Names {
    embed: &'static str,
    norm: &'static str,
    head: &'static str,
    layer: &'static str,
    attention_norm: &'static str,
    q: &'static str,
    k: &'static str,
    v: &'static str,
    out: &'static str,
    mlp_norm: &'static str,
    gate: &'static str,
    up: &'static str,
    down: &'static str,
}

const GGUF_NAMES: Names = Names {
    embed: "token_embd.weight",
    norm: "output_norm.weight",
    head: "output.weight",
    layer: "blk.",
    attention_norm: "attn_norm.weight",
    q: "attn_q.weight",
    k: "attn_k.weight",
    v: "attn_v.weight",
    out: "attn_output.weight",
    mlp_norm: "ffn_norm.weight",
    gate: "ffn_gate.weight",
    up: "ffn_up.weight",
    down: "ffn_down.weight",
};

const SAFE_NAMES: Names = Names {
    embed: "model.embed_tokens.weight",
    norm: "model.norm.weight",
    head: "lm_head.weight",
    layer: "model.layers.",
    attention_norm: "input_layernorm.weight",
    q: "self_attn.q_proj.weight",
    k: "self_attn.k_proj.weight",
    v: "self_attn.v_proj.weight",
    out: "self_attn.o_proj.weight",
    mlp_norm: "post_attention_layernorm.weight",
    gate: "mlp.gate_proj.weight",
    up: "mlp.up_proj.weight",
    down: "mlp.down_proj.weight",
};

impl Llama {
    /// The model of a GGUF file.
    ///
    /// # Errors
    /// Metadata, types or tensors that are missing, not read or of other sizes.
    pub fn from_gguf(file: Gguf) -> Result<Self, PretrainedError> {
        let config = LlamaConfig::from_gguf(file.name(), file.metadata())?;
        if file.names().any(|name| name == "rope_freqs.weight") {
            return Err(PretrainedError::Unsupported {
                file: file.name().into(),
                what: "its rotary embedding (rope_freqs.weight)".into(),
                value: "scaled".into(),
                known: "plain".into(),
            });
        }
        Self::new(config, &Source::Gguf(file), &GGUF_NAMES)
    }

    /// The model of a folder with `config.json` and safetensors.
    ///
    /// # Errors
    /// As [`Llama::from_gguf`].
    pub fn from_safetensors(folder: &Path, config: LlamaConfig) -> Result<Self, PretrainedError> {
        Self::new(config, &Source::Safe(SafeTensorsFile::open(folder)?), &SAFE_NAMES)
    }

    fn new(config: LlamaConfig, source: &Source, names: &Names) -> Result<Self, PretrainedError> {
        const WHY: &str = "the model's configuration";
        let (width, d, mlp) = (config.width, config.head_dim, config.mlp);
        let inner = config.heads * d;
        let kv_inner = config.kv_heads * d;
        let read = |name: &str, shape: &[usize]| source.read(name, shape, WHY);
        let embed = read(names.embed, &[config.vocab, width])?;
        let mut layers = vec![];
        for i in 0..config.layers {
            let read =
                |name: &str, shape: &[usize]| read(&format!("{}{i}.{name}", names.layer), shape);
            let turned = |name: &str, rows: usize| {
                let rows = read(name, &[rows, width])?;
                Ok::<_, PretrainedError>(if config.permuted {
                    unpermute(&rows, d, width)
                } else {
                    rows
                })
            };
            let mut qkv = turned(names.q, inner)?;
            qkv.extend(turned(names.k, kv_inner)?);
            qkv.extend(read(names.v, &[kv_inner, width])?);
            let mut up = read(names.gate, &[mlp, width])?;
            up.extend(read(names.up, &[mlp, width])?);
            layers.push(Layer {
                attention_norm: read(names.attention_norm, &[width])?,
                qkv,
                out: read(names.out, &[width, inner])?,
                mlp_norm: read(names.mlp_norm, &[width])?,
                up,
                down: read(names.down, &[width, mlp])?,
            });
        }
        let norm = read(names.norm, &[width])?;
        let head = match source.has(names.head) {
            true => Some(read(names.head, &[config.vocab, width])?),
            false => None,
        };
        Ok(Llama { config, layers, norm, embed, head })
    }

    /// What it is.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The matrix that adds answers of a layer's heads to the residual stream, `[width, heads · d]`.
    pub fn output_matrix(&self, layer: usize) -> Option<&[f32]> {
        self.layers.get(layer).map(|layer| &layer.out[..])
    }

    /// Logits of the tokens that follow, `[tokens, vocab]`, of normed last hidden states
    /// `[tokens, width]`.
    pub fn logits(&self, hidden: &[f32], out: &mut Vec<f32>) {
        let config = &self.config;
        out.resize(hidden.len() / config.width * config.vocab, 0.0);
        let head = self.head.as_ref().unwrap_or(&self.embed);
        crate::pretrained::linear::times(hidden, head, config.width, out);
    }
}

/// Rows of heads in the order that pairs i with i + d/2, from the one that pairs 2i with 2i + 1.
fn unpermute(rows: &[f32], d: usize, width: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows.len());
    for head in rows.chunks_exact(d * width) {
        for half in 0..2 {
            for i in 0..d / 2 {
                out.extend_from_slice(&head[(2 * i + half) * width..][..width]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn rows_come_back_from_the_converters_order() {
        let rows: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let want = [0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0];
        assert_eq!(super::unpermute(&rows, 4, 2)[..8], want);
    }
}
