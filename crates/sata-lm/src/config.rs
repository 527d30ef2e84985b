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
    /// Several, each for some of the heads.
    Mixture {
        /// The first heads, the next ones, and so on: all heads of the layer together.
        groups: Vec<HeadGroup>,
    },
}

/// Some heads of a mixture, which are as a layer of so many heads would be: slopes, and the biases
/// that gates begin with, are spread over them alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadGroup {
    /// Query heads. Their key/value heads are as many fewer as the layer's.
    pub heads: usize,
    /// What weighs their far past: no mixture.
    pub kernel: Kernel,
    /// As [`Attention::near`], which the layer does not give then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub near: Option<usize>,
    /// As [`Attention::sinks`], which the layer does not give then.
    #[serde(default)]
    pub sinks: usize,
}

/// How position enters attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Position {
    /// Not at all.
    None,
    /// Rotary embedding of queries and keys, base 10,000.
    Rotary,
    /// ALiBi slopes, [`sata::alibi_slopes`] of the key/value heads (of a mixture: of each group's).
    Slopes,
    /// Forget gates: log f = log sigmoid(w·x + b) per token and key/value head, the biases b from
    /// 0 … 6 evenly over the heads (of a mixture: over each group's).
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
        self.parts().iter().all(|part| part.kernel != Kernel::Softmax)
    }

    /// Its groups of heads, one after the other, each as the attention that it is by itself: one of
    /// all heads unless it is a mixture. This is what all that computes goes by.
    pub fn parts(&self) -> Vec<Attention> {
        let Kernel::Mixture { groups } = &self.kernel else {
            return vec![self.clone()];
        };
        let shared = self.sharing();
        let part = |group: &HeadGroup| {
            let HeadGroup { heads, kernel, near, sinks } = group.clone();
            let kv_heads = self.kv_heads.map(|_| heads / shared);
            Attention { heads, kv_heads, kernel, near, sinks, ..self.clone() }
        };
        groups.iter().map(part).collect()
    }

    /// Query heads that share a key/value head.
    fn sharing(&self) -> usize {
        self.heads.checked_div(self.kv_heads()).unwrap_or(1).max(1)
    }

    /// Bytes of the far sums of all heads of a layer and of the raw tokens that are kept, f32; none
    /// where a KV cache grows.
    ///
    /// # Errors
    /// As for [`Attention::spec`].
    pub fn state_bytes(&self) -> Result<Option<u128>, sata::Error> {
        if !self.is_constant_cost() {
            return Ok(None);
        }
        let d = self.head_dim;
        let mut bytes = 0;
        for part in self.parts() {
            let far = sata::cost::state_elements(d, d, &part.spec()?.orders());
            let kept = (part.near.unwrap_or(0) as u128 + 1) * part.block as u128;
            let kept = kept + part.sinks as u128;
            let elements = far + sata::cost::cache_elements(d, d, kept);
            bytes += 4 * elements * part.kv_heads() as u128;
        }
        Ok(Some(bytes))
    }

    /// The operation in the words of `sata`; softmax is a spec to which everything is near, which
    /// serves whole sequences (training) but not a state.
    ///
    /// # Errors
    /// [`sata::Error`] for sizes or numbers that no spec can have, and for a mixture, each of whose
    /// [`parts`](Attention::parts) has its own.
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
            Kernel::Mixture { .. } => {
                return Err(sata::Error::Unsupported {
                    what: "a mixture of heads".into(),
                    by: "one spec",
                });
            }
        };
        let decay = match self.position {
            Position::None | Position::Rotary => Decay::None,
            Position::Slopes => Decay::Slopes,
            Position::Gates => Decay::Gates,
        };
        builder.block(self.block).decay(decay).build()
    }

    /// Refuses groups of heads that are not the layer's heads.
    fn check_groups(&self, groups: &[HeadGroup]) -> Result<(), String> {
        if self.near.is_some() || self.sinks > 0 {
            let reason = "attention.kernel is mixture, whose groups have near and sinks of their \
                          own: attention takes none";
            return Err(reason.into());
        }
        let shared = self.sharing();
        for (i, group) in groups.iter().enumerate() {
            let (name, heads) = (group_name(i), group.heads);
            if matches!(group.kernel, Kernel::Mixture { .. }) {
                return Err(format!("{name}.kernel is mixture, which a group cannot be"));
            }
            if heads == 0 || heads > self.heads {
                let all = self.heads;
                return Err(format!("{name}.heads is {heads}, it must be from 1 to {all}"));
            }
            if !heads.is_multiple_of(shared) {
                return Err(format!(
                    "{name}.heads is {heads}, not a multiple of the {shared} heads that share a \
                     key/value head"
                ));
            }
        }
        let all: u128 = groups.iter().map(|group| group.heads as u128).sum();
        if all != self.heads as u128 {
            let each: Vec<String> = groups.iter().map(|group| group.heads.to_string()).collect();
            return Err(format!(
                "attention.kernel.groups have {} heads, {all} in all, but attention.heads is {}",
                if each.is_empty() { "no".into() } else { each.join(" + ") },
                self.heads
            ));
        }
        Ok(())
    }

    /// Refuses a kernel that does not go with the rest; `name` is that of these heads.
    fn check_kernel(&self, name: &str) -> Result<(), String> {
        match self.kernel {
            Kernel::Softmax if self.near.is_some() || self.sinks > 0 => {
                return Err(format!("{name}.kernel is softmax, which takes no near or sinks"));
            }
            Kernel::Window if self.near.is_none() => {
                return Err(format!("{name}.kernel is window, which needs {name}.near"));
            }
            _ => {}
        }
        self.spec().map(drop).map_err(|e| format!("{name}: {e}"))
    }
}

fn group_name(i: usize) -> String {
    format!("attention.kernel.groups[{i}]")
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
        let Kernel::Mixture { groups } = &a.kernel else {
            return a.check_kernel("attention");
        };
        a.check_groups(groups)?;
        let mut parts = a.parts().into_iter().enumerate();
        parts.try_for_each(|(i, part)| part.check_kernel(&group_name(i)))
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

    /// Kernels in turn, so many heads each.
    fn mixture(heads: &[usize]) -> Kernel {
        let kernels = [Kernel::Taylor { terms: 3 }, Kernel::Power { exponent: 4 }, Kernel::Window];
        let group = |(&heads, kernel): (&usize, &Kernel)| {
            let (kernel, near) = (kernel.clone(), Some(1));
            HeadGroup { heads, kernel, near, sinks: 0 }
        };
        Kernel::Mixture { groups: heads.iter().zip(&kernels).map(group).collect() }
    }

    #[test]
    fn comes_back_from_json() {
        for (kernel, near) in [
            (Kernel::Softmax, None),
            (Kernel::Window, Some(1)),
            (Kernel::Taylor { terms: 5 }, Some(1)),
            (Kernel::Power { exponent: 4 }, None),
            (mixture(&[1, 3]), None),
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

    #[test]
    fn a_file_from_before_means_the_same() {
        // Every field of it, and no other: the digest that sessions keep of it stays.
        let file = include_bytes!("../tests/data/config-before-mixtures.json");
        let config: Config = serde_json::from_slice(file).unwrap();
        let plain = |bytes: &[u8]| -> serde_json::Value { serde_json::from_slice(bytes).unwrap() };
        assert_eq!(plain(file), plain(&serde_json::to_vec(&config).unwrap()));
        assert_eq!(config.attention.parts(), std::slice::from_ref(&config.attention));
        assert_eq!(config.attention.kernel, Kernel::Taylor { terms: 3 });
    }

    #[test]
    fn a_mixture_is_written_as_a_list_of_groups() {
        let text = "
            heads = 8
            kv_heads = 4
            head_dim = 16
            position = \"gates\"
            [kernel]
            kind = \"mixture\"
            groups = [
              { heads = 6, kernel = { kind = \"taylor\", terms = 3 }, near = 1, sinks = 2 },
              { heads = 2, kernel = { kind = \"power\", exponent = 4 } },
            ]";
        let attention: Attention = toml::from_str(text).unwrap();
        let parts = attention.parts();
        let heads: Vec<_> = parts.iter().map(|part| (part.heads, part.kv_heads())).collect();
        assert_eq!(heads, [(6, 3), (2, 1)]);
        assert_eq!((parts[0].near, parts[0].sinks), (Some(1), 2));
        assert_eq!((parts[1].near, parts[1].sinks), (None, 0));
        assert!(parts.iter().all(|part| part.position == Position::Gates && part.block == 64));
        let of = |attention: &Attention| attention.state_bytes().unwrap().unwrap();
        assert_eq!(of(&attention), of(&parts[0]) + of(&parts[1]));
        // Orders 0 to 2, two blocks and two sinks; orders 0 and 4, one block.
        assert_eq!(of(&parts[0]), 3 * 4 * (17 * (1 + 16 + 136) + 32 * (128 + 2)));
        assert_eq!(of(&parts[1]), 4 * (17 * (1 + 3876) + 32 * 64));
        let wrong = text.replace("near = 1", "far = 1");
        assert!(toml::from_str::<Attention>(&wrong).unwrap_err().to_string().contains("far"));
    }

    #[test]
    fn groups_that_are_not_the_layers_heads_are_named() {
        tiny(mixture(&[1, 2, 1]), None).check().unwrap();
        assert!(tiny(mixture(&[2, 2]), None).attention.is_constant_cost());
        let said = |change: &dyn Fn(&mut Attention)| {
            let mut config = tiny(mixture(&[2, 2]), None);
            change(&mut config.attention);
            config.check().unwrap_err()
        };
        let groups = |change: &dyn Fn(&mut Vec<HeadGroup>)| {
            said(&|a| {
                let Kernel::Mixture { groups } = &mut a.kernel else { unreachable!() };
                change(groups);
            })
        };
        for (said, words) in [
            (said(&|a| a.kernel = mixture(&[2, 1])), "have 2 + 1 heads, 3 in all"),
            (said(&|a| a.kernel = mixture(&[2, 1])), "attention.heads is 4"),
            (said(&|a| a.kernel = mixture(&[2, 3])), "2 + 3 heads, 5 in all"),
            (said(&|a| a.kernel = mixture(&[])), "groups have no heads"),
            (said(&|a| a.kernel = mixture(&[4, 0])), "groups[1].heads is 0"),
            (said(&|a| a.kernel = mixture(&[5])), "groups[0].heads is 5, it must be from 1 to 4"),
            (said(&|a| a.near = Some(1)), "attention takes none"),
            (said(&|a| a.sinks = 1), "attention takes none"),
            (
                said(&|a| (a.kv_heads, a.kernel) = (Some(2), mixture(&[3, 1]))),
                "groups[0].heads is 3, not a multiple of the 2 heads",
            ),
            (groups(&|g| g[1].kernel = mixture(&[2])), "groups[1].kernel is mixture"),
            (
                groups(&|g| g[1].kernel = Kernel::Softmax),
                "groups[1].kernel is softmax, which takes no near",
            ),
            (
                groups(&|g| (g[0].kernel, g[0].near) = (Kernel::Window, None)),
                "groups[0].kernel is window, which needs attention.kernel.groups[0].near",
            ),
            (groups(&|g| g[1].kernel = Kernel::Power { exponent: 3 }), "groups[1]: "),
        ] {
            assert!(said.contains(words), "{said}");
        }
    }
}
