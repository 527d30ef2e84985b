use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::{Init, Module, VarBuilder};
use sata::{Decay, Plan, alibi_slopes};

use super::Linear;
use crate::{HeadGroup, Options, Watch, attention_groups, error, head_norm, log_gates, rotary};

/// Sizes and kinds of a [`TaylorAttention`], besides its plan.
#[derive(Clone, Debug)]
pub struct TaylorAttentionOptions {
    /// Width of what comes in and goes out.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads, of which `heads` is a multiple.
    pub kv_heads: usize,
    /// RMS norms of each query and key, with learnt scales and this eps.
    pub qk_norm: Option<f64>,
    /// Rotary embedding of queries and keys, with this base.
    pub rotary: Option<f64>,
}

/// Causal self-attention with its projections; the plan's spec says which, and what fades. Of a
/// mixture groups of heads have a plan each, and all else is shared.
///
/// Weights: `qkv.weight` `[(heads + kv_heads)·d_key + kv_heads·d_value, width]` (all queries, then
/// keys, then values, head by head), `out.weight` `[width, heads·d_value]`; with forget gates
/// `gate.weight` `[kv_heads, width]` and `gate.bias` `[kv_heads]`; with q/k norms `q_norm.weight`
/// and `k_norm.weight` `[d_key]`. With slopes they are [`alibi_slopes`] of each group's
/// key/value heads, not learnt.
#[derive(Clone, Debug)]
pub struct TaylorAttention {
    groups: Vec<HeadGroup>,
    options: TaylorAttentionOptions,
    qkv: Linear,
    out: Linear,
    norms: Option<(Tensor, Tensor, f64)>,
    gate: Option<(Linear, Tensor)>,
    slopes: Option<Arc<[f64]>>,
    watch: Option<(Watch, String)>,
}

impl TaylorAttention {
    /// The layer whose weights are in `vb`.
    ///
    /// # Errors
    /// Weights that are missing or have other shapes.
    pub fn new(plan: &Arc<Plan>, options: TaylorAttentionOptions, vb: VarBuilder) -> Result<Self> {
        let TaylorAttentionOptions { heads, kv_heads, .. } = options;
        Self::mixture(&[HeadGroup { plan: plan.clone(), heads, kv_heads }], options, vb)
    }

    /// The layer of a mixture: its heads are those of the groups, one group after the other.
    ///
    /// # Errors
    /// Groups that have other heads in all than the options, or differ in d_key, d_value or decay;
    /// weights that are missing or have other shapes.
    pub fn mixture(
        groups: &[HeadGroup],
        options: TaylorAttentionOptions,
        vb: VarBuilder,
    ) -> Result<Self> {
        let TaylorAttentionOptions { width, heads, kv_heads, qk_norm, .. } = options;
        let shared = |group: &HeadGroup| {
            let spec = group.plan.spec();
            (spec.d_key(), spec.d_value(), spec.decay())
        };
        let wrong = |got: String, expected| error::value("attention", "groups", got, expected);
        let Some((d_key, d_value, decay)) = groups.first().map(shared) else {
            return Err(wrong("empty".into(), "there must be at least one".into()));
        };
        let all = [|group: &HeadGroup| group.heads, |group: &HeadGroup| group.kv_heads]
            .map(|of| groups.iter().map(of).fold(0, usize::saturating_add));
        if all != [heads, kv_heads] {
            let expected = format!("the layer has {:?}", [heads, kv_heads]);
            return Err(wrong(format!("of {all:?} heads and key/value heads"), expected));
        }
        if let Some(i) = groups.iter().position(|group| shared(group) != (d_key, d_value, decay)) {
            let expected = format!("the first has {:?}", (d_key, d_value, decay));
            let got = format!("{:?} in group {i} (d_key, d_value, decay)", shared(&groups[i]));
            return Err(wrong(got, expected));
        }
        let keys = heads.saturating_add(kv_heads).saturating_mul(d_key);
        let packed = keys.saturating_add(kv_heads.saturating_mul(d_value));
        let one = Init::Const(1.0);
        let norms = match qk_norm {
            Some(eps) => Some((
                vb.pp("q_norm").get_with_hints(d_key, "weight", one)?,
                vb.pp("k_norm").get_with_hints(d_key, "weight", one)?,
                eps,
            )),
            None => None,
        };
        let gate = match decay {
            Decay::Gates => Some((
                Linear::new(width, kv_heads, vb.pp("gate"))?,
                vb.pp("gate").get_with_hints(kv_heads, "bias", Init::Const(3.0))?,
            )),
            _ => None,
        };
        let slopes = match decay {
            Decay::Slopes => {
                Some(groups.iter().flat_map(|group| alibi_slopes(group.kv_heads)).collect())
            }
            _ => None,
        };
        Ok(TaylorAttention {
            groups: groups.to_vec(),
            qkv: Linear::new(width, packed, vb.pp("qkv"))?,
            out: Linear::new(heads.saturating_mul(d_value), width, vb.pp("out"))?,
            norms,
            gate,
            slopes,
            options,
            watch: None,
        })
    }

    /// The same, whose queries, keys, values, logarithms of gates and outputs `watch` sees as `q`,
    /// `k`, `v`, `gates` and `y` of `name`.
    pub fn watched(self, watch: &Watch, name: &str) -> Self {
        TaylorAttention { watch: Some((watch.clone(), name.into())), ..self }
    }

    /// What its heads compute, and how: one group unless it is a mixture.
    pub fn groups(&self) -> &[HeadGroup] {
        &self.groups
    }

    /// residual + the layer of x: both `[batch, tokens, width]`.
    ///
    /// # Errors
    /// Sizes or types that do not fit, wrapped [`sata::Error`]s.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.out.forward_add(&self.heads(x)?, residual)
    }

    /// The heads' outputs, `[batch, tokens, heads·d_value]`.
    fn heads(&self, x: &Tensor) -> Result<Tensor> {
        let TaylorAttentionOptions { heads, kv_heads, .. } = self.options;
        let mut qkv = self.qkv.forward(x)?;
        if let Some((q, k, eps)) = &self.norms {
            qkv = head_norm(&qkv, q, k, heads, kv_heads, *eps)?;
        }
        if let Some(base) = self.options.rotary {
            qkv = rotary(&qkv, self.groups[0].plan.spec().d_key(), heads + kv_heads, 0, base)?;
        }
        if let Some((watch, name)) = &self.watch {
            let spec = self.groups[0].plan.spec();
            let parts = [
                ("q", heads * spec.d_key()),
                ("k", kv_heads * spec.d_key()),
                ("v", kv_heads * spec.d_value()),
            ];
            let parts = parts.map(|(part, columns)| (format!("{name}.{part}"), columns));
            qkv = watch.see_parts(parts.into(), &qkv)?;
        }
        let see = |x: Tensor, what: &str| match &self.watch {
            Some((watch, name)) => watch.see(&format!("{name}.{what}"), &x),
            None => Ok(x),
        };
        let mut options = Options::causal();
        if let Some((weight, bias)) = &self.gate {
            let gates = log_gates(x, weight.weight(), bias)?;
            options = options.log_gates(&see(gates, "gates")?);
        }
        if let Some(slopes) = &self.slopes {
            options = options.constant_slopes(slopes.clone());
        }
        see(attention_groups(&self.groups, &qkv, &options)?, "y")
    }
}

impl Module for TaylorAttention {
    /// x `[batch, tokens, width]` to the same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.out.forward(&self.heads(x)?)
    }
}
