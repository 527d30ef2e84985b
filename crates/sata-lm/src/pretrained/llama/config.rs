//! What a model is, from GGUF metadata or from `config.json`.

use serde_json::Value as Json;

use crate::pretrained::error::PretrainedError;
use crate::pretrained::gguf::{Metadata, Value};

/// Sizes of a Llama-type model.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct LlamaConfig {
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Number of layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Hidden size of the SwiGLU.
    pub mlp: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a query, key or value.
    pub head_dim: usize,
    /// Added to the mean square in every norm.
    pub norm_eps: f64,
    /// Base of the rotary embedding's frequencies.
    pub rope_base: f64,
    /// Tokens of a context that it was trained on.
    pub context: usize,
    /// Whether the rows of q and k are permuted, as llama.cpp's converter leaves them: elements 2i and
    /// 2i + 1 of a head are a pair of the rotary embedding, instead of i and i + d/2.
    #[serde(skip)]
    pub permuted: bool,
}

/// The largest size of anything.
const LARGEST: usize = 1 << 28;

impl LlamaConfig {
    /// Reads a GGUF file's metadata.
    ///
    /// # Errors
    /// [`PretrainedError::Unsupported`] for other kinds of models, [`PretrainedError::File`] for what
    /// is missing or cannot be.
    pub fn from_gguf(file: &str, metadata: &Metadata) -> Result<Self, PretrainedError> {
        let unsupported = |what: &str, value: String, known: &str| PretrainedError::Unsupported {
            file: file.into(),
            what: what.into(),
            value,
            known: known.into(),
        };
        let architecture = metadata.get("general.architecture").and_then(Value::as_text);
        if architecture != Some("llama") {
            let value = architecture.unwrap_or("not said").to_string();
            return Err(unsupported("general.architecture", value, "llama"));
        }
        let get = |key: &str| metadata.get(&format!("llama.{key}"));
        let size = |key: &str, default: Option<usize>| match get(key) {
            Some(value) => match value.as_u64().and_then(|x| usize::try_from(x).ok()) {
                Some(x) if x > 0 && x <= LARGEST => Ok(x),
                _ => Err(PretrainedError::file(file, format!("llama.{key} is {value}, no size"))),
            },
            None => default.ok_or_else(|| {
                PretrainedError::file(file, format!("its metadata has no llama.{key}"))
            }),
        };
        let number = |key: &str, default: f64| match get(key) {
            Some(value) => match value.as_f64().filter(|x| x.is_finite() && *x > 0.0) {
                Some(x) => Ok(x),
                None => Err(PretrainedError::file(file, format!("llama.{key} is {value}"))),
            },
            None => Ok(default),
        };
        if let Some(kind) = get("rope.scaling.type").and_then(Value::as_text)
            && kind != "none"
        {
            return Err(unsupported("llama.rope.scaling.type", kind.into(), "none"));
        }
        let heads = size("attention.head_count", None)?;
        let width = size("embedding_length", None)?;
        let head_dim = size("attention.key_length", Some(width / heads))?;
        let rotated = size("rope.dimension_count", Some(head_dim))?;
        if rotated != head_dim {
            let value = format!("{rotated} of {head_dim}");
            return Err(unsupported("llama.rope.dimension_count", value, "whole heads"));
        }
        let tokens = metadata.get("tokenizer.ggml.tokens").and_then(Value::as_array);
        let config = LlamaConfig {
            vocab: size("vocab_size", tokens.map(<[Value]>::len))?,
            layers: size("block_count", None)?,
            width,
            mlp: size("feed_forward_length", None)?,
            heads,
            kv_heads: size("attention.head_count_kv", Some(heads))?,
            head_dim,
            norm_eps: number("attention.layer_norm_rms_epsilon", 1e-5)?,
            rope_base: number("rope.freq_base", 10_000.0)?,
            context: size("context_length", Some(2048))?,
            permuted: true,
        };
        config.check(file)?;
        Ok(config)
    }

    /// Reads a `config.json`.
    ///
    /// # Errors
    /// As [`LlamaConfig::from_gguf`].
    pub fn from_json(file: &str, json: &Json) -> Result<Self, PretrainedError> {
        let unsupported = |what: &str, value: &Json, known: &str| PretrainedError::Unsupported {
            file: file.into(),
            what: what.into(),
            value: value.to_string(),
            known: known.into(),
        };
        let said = |key: &str| json.get(key).filter(|value| !value.is_null());
        for (key, known) in [("rope_scaling", "none"), ("sliding_window", "none")] {
            if let Some(value) = said(key) {
                return Err(unsupported(key, value, known));
            }
        }
        for key in ["attention_bias", "mlp_bias"] {
            if let Some(value) = said(key).filter(|value| value.as_bool() != Some(false)) {
                return Err(unsupported(key, value, "false"));
            }
        }
        if let Some(value) = said("hidden_act").filter(|value| value.as_str() != Some("silu")) {
            return Err(unsupported("hidden_act", value, "silu"));
        }
        let size = |key: &str, default: Option<usize>| match said(key) {
            Some(value) => match value.as_u64().and_then(|x| usize::try_from(x).ok()) {
                Some(x) if x > 0 && x <= LARGEST => Ok(x),
                _ => Err(PretrainedError::file(file, format!("{key} is {value}, no size"))),
            },
            None => {
                default.ok_or_else(|| PretrainedError::file(file, format!("{key} is not given")))
            }
        };
        let number = |key: &str, default: f64| match said(key) {
            Some(value) => match value.as_f64().filter(|x| x.is_finite() && *x > 0.0) {
                Some(x) => Ok(x),
                None => Err(PretrainedError::file(file, format!("{key} is {value}"))),
            },
            None => Ok(default),
        };
        let heads = size("num_attention_heads", None)?;
        let width = size("hidden_size", None)?;
        let config = LlamaConfig {
            vocab: size("vocab_size", None)?,
            layers: size("num_hidden_layers", None)?,
            width,
            mlp: size("intermediate_size", None)?,
            heads,
            kv_heads: size("num_key_value_heads", Some(heads))?,
            head_dim: size("head_dim", Some(width / heads))?,
            norm_eps: number("rms_norm_eps", 1e-6)?,
            rope_base: number("rope_theta", 10_000.0)?,
            context: size("max_position_embeddings", Some(2048))?,
            permuted: false,
        };
        config.check(file)?;
        Ok(config)
    }

    fn check(&self, file: &str) -> Result<(), PretrainedError> {
        let no = |reason: String| Err(PretrainedError::file(file, reason));
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv) = (self.heads, self.kv_heads);
            return no(format!("{heads} query heads are no multiple of {kv} key/value heads"));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            let d = self.head_dim;
            return no(format!("heads of {d} elements, but rotary embedding needs pairs"));
        }
        Ok(())
    }

    /// Bytes of softmax's KV cache for so many tokens, with elements of `width` bytes.
    pub fn cache_bytes(&self, tokens: usize, width: usize) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * tokens * width
    }
}
