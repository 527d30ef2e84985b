//! The training graph: a decoder-only transformer over candle tensors.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::{Module, VarBuilder};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use sata::Plan;
use sata_candle::{
    HeadGroup, Linear, RmsNorm, TaylorAttention, TaylorAttentionOptions, Watch, embedding, linear,
    projected_cross_entropy, swiglu,
};

use crate::config::{Attention, Config, Position};

/// Base of the rotary embedding.
pub const ROTARY_BASE: f64 = 10_000.0;

/// Deviation of initial weights.
const DEVIATION: f64 = 0.02;
/// The highest initial bias of a forget gate; heads are spread evenly from 0 to it.
const HIGHEST_BIAS: f64 = 6.0;

/// A model over candle tensors, whose outputs are differentiable in its weights.
#[derive(Clone, Debug)]
pub struct Model {
    config: Config,
    embed: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    watch: Option<Watch>,
}

#[derive(Clone, Debug)]
struct Layer {
    attention_norm: RmsNorm,
    attention: TaylorAttention,
    mlp_norm: RmsNorm,
    up: Linear,
    down: Linear,
}

impl Model {
    /// The model of this config whose weights are in `vb`, named as [`Config`] says, F32 or F64.
    ///
    /// # Errors
    /// A config that cannot be a model; weights that are missing or have other shapes.
    pub fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        config.check().map_err(Error::msg)?;
        let (width, a) = (config.width, &config.attention);
        let group = |part: &Attention| -> Result<HeadGroup> {
            let spec = part.spec().map_err(Error::wrap)?;
            let plan = Arc::new(Plan::new(&spec).map_err(Error::wrap)?);
            Ok(HeadGroup { plan, heads: part.heads, kv_heads: part.kv_heads() })
        };
        let groups = a.parts().iter().map(group).collect::<Result<Vec<_>>>()?;
        let options = TaylorAttentionOptions {
            width,
            heads: a.heads,
            kv_heads: a.kv_heads(),
            qk_norm: a.qk_norm.then_some(config.norm_eps),
            rotary: (a.position == Position::Rotary).then_some(ROTARY_BASE),
        };
        let norm = |vb| RmsNorm::new(width, config.norm_eps, vb);
        let layer = |i: usize| {
            let vb = vb.pp("layers").pp(i);
            let (attn, mlp) = (vb.pp("attn"), vb.pp("mlp"));
            Ok(Layer {
                attention_norm: norm(attn.pp("norm"))?,
                attention: TaylorAttention::mixture(&groups, options.clone(), attn)?,
                mlp_norm: norm(mlp.pp("norm"))?,
                up: Linear::new(width, 2 * config.mlp, mlp.pp("up"))?,
                down: Linear::new(config.mlp, width, mlp.pp("down"))?,
            })
        };
        Ok(Model {
            embed: vb.pp("embed").get((config.vocab, width), "weight")?,
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            norm: norm(vb.pp("norm"))?,
            config: config.clone(),
            watch: None,
        })
    }

    /// The same, with each layer's tensors and the gradients that come back to them under a watch.
    /// It computes the same numbers, slowly.
    pub fn watched(self) -> Self {
        let watch = Watch::default();
        let layers = self.layers.into_iter().enumerate().map(|(i, layer)| {
            let attention = layer.attention.watched(&watch, &format!("layers.{i}.attn"));
            Layer { attention, ..layer }
        });
        Model { layers: layers.collect(), watch: Some(watch), ..self }
    }

    /// What the watch has found, if there is one.
    pub fn watch(&self) -> Option<&Watch> {
        self.watch.as_ref()
    }

    fn see(&self, x: Tensor, name: &str) -> Result<Tensor> {
        match &self.watch {
            Some(watch) => watch.see(name, &x),
            None => Ok(x),
        }
    }

    /// The model whose weights are these variables: gradients come back under them.
    ///
    /// # Errors
    /// As for [`Model::new`], and a variable that the config has no place for.
    pub fn from_vars(config: &Config, vars: &BTreeMap<String, Var>) -> Result<Self> {
        let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone()));
        Self::from_tensors(config, tensors.collect())
    }

    /// The model whose weights are these tensors, all of one type and on one device. It has gradients only where
    /// they are variables.
    ///
    /// # Errors
    /// As for [`Model::from_vars`].
    pub fn from_tensors(config: &Config, tensors: BTreeMap<String, Tensor>) -> Result<Self> {
        config.check().map_err(Error::msg)?;
        let shapes = weight_shapes(config);
        if let Some(name) = tensors.keys().find(|&name| !shapes.contains_key(name)) {
            return Err(Error::Msg(format!("the config has no place for the weight {name}")));
        }
        let dtype = tensors.get("embed.weight").map_or(DType::F32, Tensor::dtype);
        if let Some((name, x)) = tensors.iter().find(|(_, x)| x.dtype() != dtype) {
            let got = x.dtype();
            return Err(Error::Msg(format!("{name} is {got:?}, but embed.weight is {dtype:?}")));
        }
        let device = tensors.get("embed.weight").map_or(&Device::Cpu, Tensor::device).clone();
        let tensors: HashMap<String, Tensor> = tensors.into_iter().collect();
        Self::new(config, VarBuilder::from_tensors(tensors, dtype, &device))
    }

    /// What it is.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The normed last hidden states, `[batch, tokens, width]`, of tokens u32 `[batch, tokens]`.
    ///
    /// # Errors
    /// Tokens of another shape or type, none, or not below the vocabulary's size; numbers that are
    /// not finite.
    pub fn hidden(&self, tokens: &Tensor) -> Result<Tensor> {
        match *tokens.dims() {
            [batch, length] if batch > 0 && length > 0 => (),
            _ => {
                let got = tokens.dims();
                let error = format!("tokens have shape {got:?}, but need [batch, tokens], not 0");
                return Err(Error::Msg(error).bt());
            }
        }
        let mut x = self.see(embedding(&self.embed, tokens)?, "embed")?;
        for (i, layer) in self.layers.iter().enumerate() {
            let see = |x, name| self.see(x, &format!("layers.{i}.{name}"));
            x = layer.attention.forward_add(&layer.attention_norm.forward(&x)?, &x)?;
            x = see(x, "attn")?;
            let up = see(layer.up.forward(&layer.mlp_norm.forward(&x)?)?, "mlp.up")?;
            x = layer.down.forward_add(&see(swiglu(&up)?, "mlp.inner")?, &x)?;
            x = see(x, "mlp")?;
        }
        self.see(self.norm.forward(&x)?, "norm")
    }

    /// Logits of the next token, `[batch, tokens, vocab]`, after each of tokens u32
    /// `[batch, tokens]`.
    ///
    /// # Errors
    /// As for [`Model::hidden`].
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        linear(&self.hidden(tokens)?, &self.embed)
    }

    /// Mean cross entropy in nats per token of guessing each of tokens u32 `[batch, length + 1]`
    /// but the first from those before it: a scalar.
    ///
    /// # Errors
    /// As for [`Model::hidden`], and fewer than two tokens.
    pub fn loss(&self, tokens: &Tensor) -> Result<Tensor> {
        let length = match *tokens.dims() {
            [batch, all] if batch > 0 && all > 1 => all - 1,
            _ => {
                let got = tokens.dims();
                let error = format!("tokens have shape {got:?}, but need [batch, at least 2]");
                return Err(Error::Msg(error).bt());
            }
        };
        let mut targets = tokens.narrow(1, 1, length)?;
        if self.embed.device().is_cuda() {
            // Now, while nothing is under way that a copy would wait for.
            targets = targets.contiguous()?.to_device(self.embed.device())?;
        }
        let hidden = self.hidden(&tokens.narrow(1, 0, length)?)?;
        self.see(projected_cross_entropy(&hidden, &self.embed, &targets)?, "loss")
    }
}

impl Model {
    /// Mean cross entropy in nats of `count` answers: of guessing the tokens at `first` + 1,
    /// `first` + 3, … of u32 `[batch, first + 2·count]` from those up to just before.
    ///
    /// # Errors
    /// As for [`Model::hidden`], and tokens that are not so many.
    pub fn loss_of_answers(&self, tokens: &Tensor, first: usize, count: usize) -> Result<Tensor> {
        let mut targets = every_other(tokens, first, count, 1)?;
        if self.embed.device().is_cuda() {
            targets = targets.to_device(self.embed.device())?;
        }
        let hidden = every_other(&self.hidden(tokens)?, first, count, 0)?;
        self.see(projected_cross_entropy(&hidden, &self.embed, &targets)?, "loss")
    }

    /// The likeliest tokens in the places of those answers, row by row.
    ///
    /// # Errors
    /// As for [`Model::loss_of_answers`].
    pub fn answers(&self, tokens: &Tensor, first: usize, count: usize) -> Result<Vec<u32>> {
        let hidden = every_other(&self.hidden(tokens)?.detach(), first, count, 0)?;
        let logits = linear(&hidden, &self.embed.detach())?.to_dtype(DType::F32)?;
        logits.argmax(candle_core::D::Minus1)?.flatten_all()?.to_vec1()
    }
}

/// `count` of every two places from `first` on of `[batch, first + 2·count, ..]`: the first or the
/// second of each.
fn every_other(x: &Tensor, first: usize, count: usize, which: usize) -> Result<Tensor> {
    let pairs = x.narrow(1, first, 2 * count)?.contiguous()?;
    let mut shape = x.dims().to_vec();
    shape.splice(1..2, [count, 2]);
    pairs.reshape(shape)?.narrow(2, which, 1)?.squeeze(2)?.contiguous()
}

/// Name and shape of every weight of a model, as [`Config`] describes them.
pub fn weight_shapes(config: &Config) -> BTreeMap<String, Vec<usize>> {
    let (width, mlp, a) = (config.width, config.mlp, &config.attention);
    let (heads, kv_heads, d) = (a.heads, a.kv_heads(), a.head_dim);
    let mut shapes = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| drop(shapes.insert(name, shape.to_vec()));
    add("embed.weight".into(), &[config.vocab, width]);
    for i in 0..config.layers {
        let mut add = |name: &str, shape: &[usize]| add(format!("layers.{i}.{name}.weight"), shape);
        add("attn.norm", &[width]);
        add("attn.qkv", &[(heads + 2 * kv_heads) * d, width]);
        add("attn.out", &[width, heads * d]);
        if a.position == Position::Gates {
            add("attn.gate", &[kv_heads, width]);
        }
        if a.qk_norm {
            add("attn.q_norm", &[d]);
            add("attn.k_norm", &[d]);
        }
        add("mlp.norm", &[width]);
        add("mlp.up", &[2 * mlp, width]);
        add("mlp.down", &[width, mlp]);
    }
    for i in 0..config.layers {
        if a.position == Position::Gates {
            add(format!("layers.{i}.attn.gate.bias"), &[kv_heads]);
        }
    }
    add("norm.weight".into(), &[width]);
    shapes
}

/// Weights to start training from, F32: N(0, 0.02²), that of `attn.out` and `mlp.down` divided by
/// √(2·layers); norms 1; gate weights 0 and gate biases from 0 to 6 evenly over the heads (3 for
/// one head), over each group's heads in a mixture. The same seed gives the same weights, and the
/// drawn ones do not depend on the attention's kernel, position or norms.
///
/// # Errors
/// A config that cannot be a model.
pub fn initial_weights(config: &Config, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    config.check().map_err(Error::msg)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let into_residual = DEVIATION / (2.0 * config.layers as f64).sqrt();
    let mut weights = BTreeMap::new();
    for (name, shape) in weight_shapes(config) {
        let n = shape.iter().product();
        let weight: Vec<f32> = if name.ends_with("norm.weight") {
            vec![1.0; n]
        } else if name.ends_with("gate.weight") {
            vec![0.0; n]
        } else if name.ends_with("gate.bias") {
            let bias = |head: usize, n: usize| match n {
                1 => HIGHEST_BIAS / 2.0,
                _ => HIGHEST_BIAS * head as f64 / (n - 1) as f64,
            };
            let parts = config.attention.parts();
            let heads = parts.iter().map(Attention::kv_heads);
            heads.flat_map(|n| (0..n).map(move |head| bias(head, n) as f32)).collect()
        } else {
            let into = name.ends_with("attn.out.weight") || name.ends_with("mlp.down.weight");
            let deviation = if into { into_residual } else { DEVIATION };
            let draw = |_| (deviation * rng.sample::<f64, _>(StandardNormal)) as f32;
            (0..n).map(draw).collect()
        };
        weights.insert(name, Tensor::from_vec(weight, shape, &Device::Cpu)?);
    }
    Ok(weights)
}
