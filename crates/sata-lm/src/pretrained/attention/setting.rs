//! What the attention of a whole model is.

use std::sync::Arc;

use sata::Spec;
use serde::{Deserialize, Serialize};

use crate::pretrained::error::PretrainedError;

/// The attention of every key/value head of every layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// The same for all heads, or one each.
    pub heads: Heads,
    /// What a text said about each key/value head, `[layers][kv_heads]`; empty if none was read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub calibration: Vec<Vec<Arc<Calibration>>>,
}

/// Which heads have which setting.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Heads {
    /// All the same.
    All(HeadSetting),
    /// `[layers][kv_heads]`.
    Each(Vec<Vec<HeadSetting>>),
}

/// The attention of one key/value head and the query heads that read it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum HeadSetting {
    /// exp of everything; its KV cache grows.
    Softmax,
    /// An operation of `sata`, at constant cost per token. The centre of the calibration, if there is
    /// one, is taken off keys. That does not change softmax, so it is done for series of exp only; those
    /// whose coefficients are each query's give the same answers with it, to rounding.
    Spec {
        /// The operation.
        spec: Spec,
    },
    /// Exact tokens, and groups or sums for the rest.
    Memory(MemorySetting),
}

/// What is exact, and what stands for the rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemorySetting {
    /// Blocks before a query's own that are exact, besides its own.
    pub near: usize,
    /// Tokens in a block.
    pub block: usize,
    /// First tokens that stay exact for ever.
    pub sinks: usize,
    /// Tokens no longer near that stay exact: those whose keys are largest, measured by the expected
    /// square of their logits if a calibration says how queries lie, and by their norm if none does.
    #[serde(default)]
    pub kept: usize,
    /// What stands for all others.
    pub far: Far,
}

/// What stands for the tokens that are not exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Far {
    /// Nothing.
    Nothing,
    /// At most so many groups of tokens with similar keys. A group of n weighs n e^x at the logit x of
    /// its mean key, and gives its mean value: the order 0 of as many series, each about a mean of its
    /// own. Tokens that are no longer near come in alone, and the two groups whose merging changes
    /// logits least become one.
    Groups(usize),
    /// Sums of orders 0 and 1 of keys, and of orders 2 and 3 of their `rotated` most important
    /// directions: `Gauss` with four terms there, a line in all others, through e^x one deviation to
    /// both sides of the mean. Needs a calibration, which says the directions.
    Mixed {
        /// How many directions.
        rotated: usize,
    },
}

/// What a text said about one key/value head: how its keys and the queries that read it lie.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Mean key, `[d]`.
    pub centre: Vec<f32>,
    /// Mean query with the scale, `[d]`.
    pub query: Vec<f32>,
    /// Cholesky factor L of the queries' second moments with the scale, E\[q qᵀ\] = L Lᵀ, `[d][d]`:
    /// |Lᵀ δ|² is the expected square of the logit of δ.
    pub metric: Vec<f32>,
    /// M, `[d][d]`, most important direction first: rows by which keys less their mean become
    /// independent of each other with variance 1, while M⁻ᵀ makes queries independent too. Empty if
    /// no head sums few directions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<f32>,
    /// M⁻ᵀ, `[d][d]`: (M⁻ᵀ q)·(M k) = q·k. Empty with `keys`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queries: Vec<f32>,
}

impl Setting {
    /// The same for all heads.
    pub fn all(head: HeadSetting) -> Self {
        Setting { heads: Heads::All(head), calibration: vec![] }
    }

    /// Plain softmax.
    pub fn softmax() -> Self {
        Self::all(HeadSetting::Softmax)
    }

    /// The setting of a head; softmax where none is said.
    pub fn head(&self, layer: usize, kv_head: usize) -> &HeadSetting {
        match &self.heads {
            Heads::All(head) => head,
            Heads::Each(all) => {
                all.get(layer).and_then(|heads| heads.get(kv_head)).unwrap_or(&HeadSetting::Softmax)
            }
        }
    }

    /// What is known of a head.
    pub fn calibration(&self, layer: usize, kv_head: usize) -> Option<&Arc<Calibration>> {
        self.calibration.get(layer)?.get(kv_head)
    }

    /// Refuses a setting for another number of layers or heads, or heads of other sizes.
    ///
    /// # Errors
    /// [`PretrainedError::Setting`] with both sizes.
    pub fn check_sizes(&self, [layers, kv_heads, d]: [usize; 3]) -> Result<(), PretrainedError> {
        let no = |what: &str, found: [usize; 2]| {
            Err(PretrainedError::Setting(format!(
                "{what} is for {} layers with {} key/value heads, but the model has {layers} with \
                 {kv_heads}",
                found[0], found[1]
            )))
        };
        if let Heads::Each(all) = &self.heads
            && (all.len() != layers || all.iter().any(|heads| heads.len() != kv_heads))
        {
            return no("it", [all.len(), all.first().map_or(0, Vec::len)]);
        }
        let all = &self.calibration;
        if !all.is_empty() && (all.len() != layers || all.iter().any(|h| h.len() != kv_heads)) {
            return no("its calibration", [all.len(), all[0].len()]);
        }
        for (layer, heads) in all.iter().enumerate() {
            for (head, calibration) in heads.iter().enumerate() {
                calibration.check(d).map_err(|reason| {
                    PretrainedError::Setting(format!(
                        "calibration of layer {layer}, key/value head {head}: {reason}"
                    ))
                })?;
            }
        }
        for layer in 0..layers {
            for head in 0..kv_heads {
                let known =
                    self.calibration(layer, head).is_some_and(|known| !known.keys.is_empty());
                self.head(layer, head).check(d, known).map_err(|reason| {
                    PretrainedError::Setting(format!(
                        "layer {layer}, key/value head {head}: {reason}"
                    ))
                })?;
            }
        }
        Ok(())
    }
}

/// Most tokens of anything that a memory keeps one by one.
const MOST: usize = 1 << 24;

impl HeadSetting {
    fn check(&self, d: usize, turned: bool) -> Result<(), String> {
        match self {
            HeadSetting::Softmax => Ok(()),
            HeadSetting::Spec { spec } => {
                if [spec.d_key(), spec.d_value()] != [d, d] {
                    let (key, value) = (spec.d_key(), spec.d_value());
                    return Err(format!(
                        "its spec is for keys of {key} and values of {value}, the head has {d}"
                    ));
                }
                if spec.decay() != sata::Decay::None {
                    return Err("its spec has a decay, which the model does not give".into());
                }
                Ok(())
            }
            HeadSetting::Memory(memory) => {
                let MemorySetting { near, block, sinks, kept, far } = memory;
                if *block == 0 {
                    return Err("block is 0, it must be at least 1".into());
                }
                let near = near.saturating_add(1).saturating_mul(*block);
                let far = match far {
                    Far::Nothing => 0,
                    Far::Groups(0) => return Err("groups is 0, it must be at least 1".into()),
                    Far::Groups(groups) => *groups,
                    Far::Mixed { rotated } => {
                        if *rotated == 0 || *rotated > d {
                            return Err(format!("rotated is {rotated}, it must be 1 to {d}"));
                        }
                        if !turned {
                            let why = "a calibration, which says the directions";
                            return Err(format!("sums of few directions need {why}"));
                        }
                        0
                    }
                };
                for (name, value) in
                    [("near blocks", near), ("sinks", *sinks), ("kept", *kept), ("groups", far)]
                {
                    if value > MOST {
                        return Err(format!("{name}: {value} tokens, more than {MOST}"));
                    }
                }
                Ok(())
            }
        }
    }
}

/// Whether a spec's weights stand for exp, so that a constant may be taken off keys: all orders below
/// its last are there.
pub(super) fn of_exp(spec: &Spec) -> bool {
    spec.orders().iter().enumerate().all(|(i, &order)| i == order)
}

impl Calibration {
    /// Keys `[tokens][d]` less the centre.
    pub(super) fn centred(&self, keys: &[f32]) -> Vec<f32> {
        let key = |key: &[f32]| -> Vec<f32> {
            key.iter().zip(&self.centre).map(|(k, c)| k - c).collect()
        };
        keys.chunks_exact(self.centre.len()).flat_map(key).collect()
    }

    fn check(&self, d: usize) -> Result<(), String> {
        let turns = if self.keys.is_empty() && self.queries.is_empty() { 0 } else { d * d };
        for (name, numbers, len) in [
            ("centre", &self.centre, d),
            ("query", &self.query, d),
            ("metric", &self.metric, d * d),
            ("keys", &self.keys, turns),
            ("queries", &self.queries, turns),
        ] {
            if numbers.len() != len {
                let found = numbers.len();
                return Err(format!("{name} has {found} numbers, heads of {d} need {len}"));
            }
            if let Some(x) = numbers.iter().find(|x| !x.is_finite()) {
                return Err(format!("{name} holds {x}"));
            }
        }
        Ok(())
    }
}
