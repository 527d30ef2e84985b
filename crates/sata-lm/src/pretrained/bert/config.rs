//! What an encoder is, from `config.json` and what lies beside it.

use std::path::Path;

use serde_json::Value as Json;

use crate::pretrained::error::PretrainedError;

/// How the vectors of tokens become that of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The first token's.
    First,
}

/// Sizes of a BERT-type encoder.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct BertConfig {
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Number of layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Hidden size of the feed-forward part.
    pub mlp: usize,
    /// Heads.
    pub heads: usize,
    /// Most tokens of a text, whose positions have learnt vectors.
    pub positions: usize,
    /// Kinds of text that have learnt vectors.
    pub types: usize,
    /// Added to the variance in every norm.
    pub norm_eps: f64,
    /// How a text's vector is made.
    pub pooling: Pooling,
}

/// What sentence-transformers leave beside a model about its pooling.
const POOLING_FILE: &str = "1_Pooling/config.json";

impl BertConfig {
    /// Reads a `config.json`, and the pooling that lies beside it in `folder`.
    ///
    /// # Errors
    /// [`PretrainedError::Unsupported`] for other kinds, [`PretrainedError::File`] for what is missing.
    pub fn from_json(file: &str, json: &Json, folder: &Path) -> Result<Self, PretrainedError> {
        let unsupported = |what: &str, value: &Json, known: &str| PretrainedError::Unsupported {
            file: file.into(),
            what: what.into(),
            value: value.to_string(),
            known: known.into(),
        };
        let said = |key: &str| json.get(key).filter(|value| !value.is_null());
        for (key, known) in [("hidden_act", "gelu"), ("position_embedding_type", "absolute")] {
            if let Some(value) = said(key).filter(|value| value.as_str() != Some(known)) {
                return Err(unsupported(key, value, known));
            }
        }
        let size = |key: &str| match said(key).and_then(Json::as_u64) {
            Some(x) if x > 0 && x <= 1 << 28 => Ok(x as usize),
            _ => Err(PretrainedError::file(file, format!("{key} is not given, or no size"))),
        };
        let norm_eps = said("layer_norm_eps").and_then(Json::as_f64).unwrap_or(1e-12);
        let config = BertConfig {
            vocab: size("vocab_size")?,
            layers: size("num_hidden_layers")?,
            width: size("hidden_size")?,
            mlp: size("intermediate_size")?,
            heads: size("num_attention_heads")?,
            positions: size("max_position_embeddings")?,
            types: size("type_vocab_size")?,
            norm_eps,
            pooling: pooling(folder)?,
        };
        if !config.width.is_multiple_of(config.heads) {
            let (width, heads) = (config.width, config.heads);
            let reason = format!("hidden_size {width} is no multiple of {heads} heads");
            return Err(PretrainedError::file(file, reason));
        }
        if !(norm_eps > 0.0 && norm_eps.is_finite()) {
            return Err(PretrainedError::file(file, format!("layer_norm_eps is {norm_eps}")));
        }
        Ok(config)
    }

    /// Elements of a query, key or value.
    pub fn head_dim(&self) -> usize {
        self.width / self.heads
    }
}

fn pooling(folder: &Path) -> Result<Pooling, PretrainedError> {
    let path = folder.join(POOLING_FILE);
    let Ok(bytes) = std::fs::read(&path) else {
        return Ok(Pooling::Mean);
    };
    let name = path.display().to_string();
    let json: Json = serde_json::from_slice(&bytes)
        .map_err(|error| PretrainedError::file(&name, error.to_string()))?;
    let on = |key: &str| json.get(key).and_then(Json::as_bool) == Some(true);
    match (on("pooling_mode_mean_tokens"), on("pooling_mode_cls_token")) {
        (true, false) => Ok(Pooling::Mean),
        (false, true) => Ok(Pooling::First),
        _ => Err(PretrainedError::Unsupported {
            file: name,
            what: "pooling".into(),
            value: "neither or both of pooling_mode_mean_tokens and pooling_mode_cls_token".into(),
            known: "one of them".into(),
        }),
    }
}
