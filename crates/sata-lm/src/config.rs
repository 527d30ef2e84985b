//! What a model is: `config.json`, and the `[model]` table of a training file.

use sata::{Decay, Near, Series, Spec};
use serde::{Deserialize, Serialize};

/// Sizes of a decoder-only transformer: pre-norm RMS norms, attention, SwiGLU, tied embeddings.
///
/// Weights (safetensors, `[out, in]` row-major): `embed.weight` `[vocab, width]`, and per layer i,
/// under `layers.{i}.`: `attn.norm.weight` `[width]`, `attn.qkv.weight`
/// `[(heads + 2·kv_heads)·head_dim, width]` (all queries, then keys, then values, head by head),
/// `attn.gate.weight` `[kv_heads, width]` and `attn.gate.bias` `[kv_heads]` with gates,
/// `attn.q_norm.weight` and `attn.k_norm.weight` `[head_dim]` with qk_norm, `attn.out.weight`
/// `[width, heads·head_dim]`, `mlp.norm.weight` `[width]`, `mlp.up.weight` `[2·mlp, width]` (first
/// the half that SiLU is taken of, then the half it multiplies), `mlp.down.weight` `[width, mlp]`;
/// last `norm.weight` `[width]`. Logits are `embed.weight` times the normed last hidden state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Number of layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Hidden size of the SwiGLU.
    pub mlp: usize,
    /// Added to the mean square in every RMS norm.
    #[serde(default = "default_eps")]
    pub norm_eps: f64,
    /// The attention of every layer.
    pub attention: Attention,
}

/// The attention of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; as many as query heads when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
    /// Elements of a query, key or value.
    pub head_dim: usize,
    /// What weighs the far past.
    pub kernel: Kernel,
    /// Blocks before a query's own that are exact, besides its own; none is exact when not given.
    /// Softmax is exact everywhere and takes neither this nor `sinks`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub near: Option<usize>,
    /// Tokens in a block.
    #[serde(default = "default_block")]
    pub block: usize,
    /// First tokens that stay exact for ever.
    #[serde(default)]
    pub sinks: usize,
    /// How position enters.
    pub position: Position,
    /// RMS norms of each query and key over their elements, with learnt scales.
    #[serde(default)]
    pub qk_norm: bool,
}

/// What weighs the far past.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Kernel {
    /// exp of everything; its KV cache grows.
    Softmax,
    /// The near blocks and sinks alone: nothing far has any weight.
    Window,
    /// `terms` terms of exp.
    Taylor {
        /// How many.
        terms: usize,
    },
    /// x^exponent + 10⁻³.
    Power {
        /// Even.
        exponent: usize,
    },
}

/// How position enters attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Position {
    /// Not at all.
    None,
    /// Rotary embedding of queries and keys, base 10,000.
    Rotary,
    /// ALiBi slopes, [`sata::alibi_slopes`] of the key/value heads.
    Slopes,
    /// Forget gates: log f = log sigmoid(w·x + b) per token and key/value head, the biases b from
    /// 0 … 6 evenly over the heads.
    Gates,
}

pub(crate) fn default_eps() -> f64 {
    1e-5
}

fn default_block() -> usize {
    sata::DEFAULT_BLOCK
}

/// The window kernel's weight of everything far: nothing beside exp of any logit in f32's range.
const NOTHING: f64 = 1e-30;
/// Tokens that are near in softmax attention: as many as a spec can say.
const EVERYTHING: usize = 1 << 30;

impl Attention {
    /// Key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads.unwrap_or(self.heads)
    }

    /// Whether a decoding step costs the same at any position.
    pub fn is_constant_cost(&self) -> bool {
        self.kernel != Kernel::Softmax
    }

    /// The operation in the words of `sata`; softmax is a spec to which everything is near, which
    /// serves whole sequences (training) but not a state.
    ///
    /// # Errors
    /// [`sata::Error`] for sizes or numbers that no spec can have.
    pub fn spec(&self) -> Result<Spec, sata::Error> {
        let builder = Spec::new(self.head_dim, self.head_dim);
        let near = self.near.map_or(Near::None, Near::Blocks);
        let builder = match &self.kernel {
            Kernel::Softmax => {
                let everything = Near::Blocks(EVERYTHING / self.block.max(1));
                builder.series(Series::Taylor).terms(1).near(everything)
            }
            Kernel::Window => {
                let series = Series::Fixed { coefficients: vec![NOTHING] };
                builder.series(series).near(near).sinks(self.sinks)
            }
            Kernel::Taylor { terms } => {
                builder.series(Series::Taylor).terms(*terms).near(near).sinks(self.sinks)
            }
            Kernel::Power { exponent } => {
                builder.series(Series::power(*exponent)).near(near).sinks(self.sinks)
            }
        };
        let decay = match self.position {
            Position::None | Position::Rotary => Decay::None,
            Position::Slopes => Decay::Slopes,
            Position::Gates => Decay::Gates,
        };
        builder.block(self.block).decay(decay).build()
    }
}

impl Config {
    /// Refuses what cannot be a model: names the field and its value.
    ///
    /// # Errors
    /// One sentence.
    pub fn check(&self) -> Result<(), String> {
        let a = &self.attention;
        for (field, value) in [
            ("vocab", self.vocab),
            ("layers", self.layers),
            ("width", self.width),
            ("mlp", self.mlp),
            ("attention.heads", a.heads),
            ("attention.kv_heads", a.kv_heads()),
            ("attention.head_dim", a.head_dim),
            ("attention.block", a.block),
        ] {
            if value == 0 {
                return Err(format!("{field} is 0, it must be at least 1"));
            }
            if value > 1 << 24 {
                return Err(format!("{field} is {value}, more than {}", 1 << 24));
            }
        }
        if !(self.norm_eps > 0.0 && self.norm_eps.is_finite()) {
            return Err(format!("norm_eps is {}, it must be positive", self.norm_eps));
        }
        if !a.heads.is_multiple_of(a.kv_heads()) {
            return Err(format!(
                "attention.heads is {}, not a multiple of attention.kv_heads, {}",
                a.heads,
                a.kv_heads()
            ));
        }
        if a.position == Position::Rotary && !a.head_dim.is_multiple_of(2) {
            let d = a.head_dim;
            return Err(format!("attention.head_dim is {d}, rotary embedding needs it even"));
        }
        match a.kernel {
            Kernel::Softmax if a.near.is_some() || a.sinks > 0 => {
                return Err("attention.kernel is softmax, which takes no near or sinks".into());
            }
            Kernel::Window if a.near.is_none() => {
                return Err("attention.kernel is window, which needs attention.near".into());
            }
            _ => {}
        }
        a.spec().map(drop).map_err(|e| format!("attention: {e}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny(kernel: Kernel, near: Option<usize>) -> Config {
        let attention = Attention {
            heads: 4,
            kv_heads: None,
            head_dim: 16,
            kernel,
            near,
            block: 64,
            sinks: 0,
            position: Position::Gates,
            qk_norm: true,
        };
        Config { vocab: 256, layers: 2, width: 64, mlp: 128, norm_eps: 1e-5, attention }
    }

    #[test]
    fn comes_back_from_json() {
        for (kernel, near) in [
            (Kernel::Softmax, None),
            (Kernel::Window, Some(1)),
            (Kernel::Taylor { terms: 5 }, Some(1)),
            (Kernel::Power { exponent: 4 }, None),
        ] {
            let config = tiny(kernel, near);
            config.check().unwrap();
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<Config>(&json).unwrap(), config, "{json}");
        }
    }

    #[test]
    fn names_the_field_that_is_wrong() {
        let softmax = tiny(Kernel::Softmax, Some(1)).check().unwrap_err();
        assert!(softmax.contains("near"), "{softmax}");
        let window = tiny(Kernel::Window, None).check().unwrap_err();
        assert!(window.contains("attention.near"), "{window}");
        let mut config = tiny(Kernel::Taylor { terms: 3 }, None);
        config.attention.kv_heads = Some(3);
        let heads = config.check().unwrap_err();
        assert!(heads.contains("kv_heads, 3"), "{heads}");
        config.attention.kv_heads = None;
        config.attention.kernel = Kernel::Taylor { terms: 0 };
        assert!(config.check().unwrap_err().contains("terms"));
    }
}
