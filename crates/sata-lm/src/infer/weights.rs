//! A model's weights: read, checked, and laid out for inference.

use std::fs;
use std::path::Path;

use half::f16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};

use super::Error;
use super::matrix::{Matrix, Type};
use super::matvec::{Kernels, kernels};
use crate::{Attention, Config, Kernel, Position, initial_weights, weight_shapes};

/// Name of the file that says what a model is.
pub const CONFIG_FILE: &str = "config.json";
/// Name of the file that holds its weights.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// A model ready for inference: immutable, shared by sessions through [`std::sync::Arc`].
#[derive(Debug)]
pub struct Weights {
    pub(super) config: Config,
    pub(super) kernels: &'static Kernels,
    /// One unless the attention is a mixture.
    pub(super) groups: Vec<Group>,
    pub(super) embed: Matrix,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Vec<f32>,
    digest: String,
    config_digest: String,
    source: String,
}

/// Heads of a layer that attend alike.
#[derive(Debug)]
pub(super) struct Group {
    /// None for softmax.
    pub plan: Option<sata::Plan>,
    /// Of the key/value heads, where there are slopes.
    pub slopes: Vec<f64>,
    /// The first query head and the first key/value head among the layer's.
    pub first: [usize; 2],
    /// Query heads and key/value heads.
    pub heads: [usize; 2],
}

impl Group {
    /// Those of an attention.
    fn all(attention: &Attention) -> Result<Vec<Self>, Error> {
        let mut first = [0, 0];
        let group = |part: &Attention| {
            let softmax = part.kernel == Kernel::Softmax;
            let plan = if softmax { None } else { Some(sata::Plan::new(&part.spec()?)?) };
            let slopes = match part.position {
                Position::Slopes => sata::alibi_slopes(part.kv_heads()),
                _ => vec![],
            };
            let group = Group { plan, slopes, first, heads: [part.heads, part.kv_heads()] };
            first = [first[0] + part.heads, first[1] + part.kv_heads()];
            Ok(group)
        };
        attention.parts().iter().map(group).collect()
    }
}

/// One layer's weights.
#[derive(Debug)]
pub(super) struct Layer {
    pub attn_norm: Vec<f32>,
    /// Queries, keys, values, and gates where there are any.
    pub qkv: Matrix,
    pub gate_bias: Vec<f32>,
    /// Both empty without qk_norm.
    pub q_norm: Vec<f32>,
    pub k_norm: Vec<f32>,
    pub out: Matrix,
    pub mlp_norm: Vec<f32>,
    pub up: Matrix,
    pub down: Matrix,
}

impl Weights {
    /// Reads `config.json` and `model.safetensors` of a folder.
    ///
    /// # Errors
    /// [`Error::Io`] for files that are missing or cannot be read, else as
    /// [`Weights::from_bytes`].
    pub fn load(folder: impl AsRef<Path>) -> Result<Self, Error> {
        let folder = folder.as_ref();
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read(&path).map_err(|error| Error::io(&path, "reading it", error))
        };
        let config = read(CONFIG_FILE)?;
        let weights = read(WEIGHTS_FILE)?;
        Self::from_bytes(&config, &weights, &folder.display().to_string())
    }

    /// From the contents of the two files; `source` names the folder in errors.
    ///
    /// # Errors
    /// [`Error::File`], which names the file, the field or tensor, and the sizes, for a config that
    /// cannot be, a file that is cut short, tensors that are missing, too many, of another shape or
    /// type, or that hold a NaN or an infinity.
    pub fn from_bytes(config: &[u8], weights: &[u8], source: &str) -> Result<Self, Error> {
        let name = format!("{source}/{CONFIG_FILE}");
        let config: Config = serde_json::from_slice(config)
            .map_err(|error| Error::file(&name, format!("not a model's config: {error}")))?;
        config.check().map_err(|reason| Error::file(&name, reason))?;
        let name = format!("{source}/{WEIGHTS_FILE}");
        let file = SafeTensors::deserialize(weights).map_err(|error| {
            let size = weights.len();
            Error::file(&name, format!("cut short or not safetensors ({size} bytes): {error}"))
        })?;
        let tensors = Tensors { file: &file, name: &name };
        tensors.check(&config)?;
        let layers = (0..config.layers).map(|i| tensors.layer(&config, i));
        Ok(Weights {
            kernels: kernels()?,
            groups: Group::all(&config.attention)?,
            embed: tensors.matrix(&["embed.weight".into()], config.width),
            layers: layers.collect(),
            norm: tensors.vector("norm.weight"),
            digest: tensors.digest(),
            config_digest: config_digest(&config),
            source: source.to_string(),
            config,
        })
    }

    /// A model that has learnt nothing, f16, to measure sizes and speed with.
    ///
    /// # Errors
    /// [`Error::File`] for a config that cannot be.
    pub fn untrained(config: &Config, seed: u64) -> Result<Self, Error> {
        const NAME: &str = "untrained model";
        let wrong = |error: String| Error::file(NAME, error);
        let initial = initial_weights(config, seed).map_err(|e| wrong(e.to_string()))?;
        let mut data = vec![];
        for (name, x) in &initial {
            let numbers = x.flatten_all().and_then(|x| x.to_vec1::<f32>());
            let numbers = numbers.map_err(|e| wrong(e.to_string()))?;
            let halves = numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes());
            data.push((name, x.dims().to_vec(), halves.collect::<Vec<u8>>()));
        }
        let mut views = vec![];
        for (name, shape, data) in &data {
            let view = TensorView::new(Dtype::F16, shape.clone(), data);
            views.push((name, view.map_err(|e| wrong(e.to_string()))?));
        }
        let file = safetensors::serialize(views, None).map_err(|e| wrong(e.to_string()))?;
        let config = serde_json::to_vec(config).map_err(|e| wrong(e.to_string()))?;
        Self::from_bytes(&config, &file, NAME)
    }

    /// What the model is.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// SHA-256 of names, types, shapes and contents of all tensors, in the order of their names: 64
    /// hexadecimal digits that are the same however the file orders them.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// SHA-256 of the config as JSON.
    pub(super) fn config_digest(&self) -> &str {
        &self.config_digest
    }

    /// Where it came from, as errors name it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Name of the instruction set that matrix products use.
    pub fn level(&self) -> &'static str {
        self.kernels.name
    }

    /// Bytes of weights that one token reads: every matrix, the embedding as output head included.
    pub fn bytes_per_token(&self) -> usize {
        let layer = |l: &Layer| {
            let vectors = [&l.attn_norm, &l.gate_bias, &l.q_norm, &l.k_norm, &l.mlp_norm];
            let matrices = [&l.qkv, &l.out, &l.up, &l.down];
            matrices.iter().map(|m| m.bytes()).sum::<usize>()
                + vectors.iter().map(|v| size_of_val(&v[..])).sum::<usize>()
        };
        self.embed.bytes()
            + size_of_val(&self.norm[..])
            + self.layers.iter().map(layer).sum::<usize>()
    }

    /// Bytes of its past that a session reads for one token: of a model of constant cost the far
    /// sums and, on average, what waits in the open blocks and sinks; of softmax the KV cache.
    pub fn past_bytes_per_token(&self, position: u64) -> u64 {
        let (layers, d) = (self.config.layers as u64, self.config.attention.head_dim);
        let kept = |tokens: usize| (tokens * (2 * d + 1) * size_of::<f32>()) as u64;
        let parts = self.config.attention.parts();
        let bytes = self.groups.iter().zip(&parts).map(|(group, part)| {
            let Some(plan) = &group.plan else {
                return self.cache_bytes_of(part, position);
            };
            let orders = plan.spec().orders();
            let far = sata::cost::state_bytes(d, d, &orders, size_of::<f32>(), false);
            // From n blocks to n + 1, and as many near blocks again.
            let open = (2 * part.near.unwrap_or(0) + 1) * part.block / 2 + part.sinks;
            layers * part.kv_heads() as u64 * (far as u64 + kept(open))
        });
        bytes.sum()
    }

    /// Bytes that a KV cache of f32 holds after `tokens` tokens.
    pub fn cache_bytes(&self, tokens: u64) -> u64 {
        self.cache_bytes_of(&self.config.attention, tokens)
    }

    fn cache_bytes_of(&self, a: &Attention, tokens: u64) -> u64 {
        let each = self.config.layers * a.kv_heads() * 2 * a.head_dim * size_of::<f32>();
        tokens.saturating_mul(each as u64)
    }

    /// Refuses tokens that the vocabulary does not have.
    pub(super) fn check_tokens(&self, tokens: &[u32]) -> Result<(), Error> {
        let vocab = self.config.vocab;
        match tokens.iter().position(|&token| token as usize >= vocab) {
            Some(place) => Err(Error::Token { token: tokens[place], place, vocab }),
            None => Ok(()),
        }
    }
}

/// SHA-256 of a config as JSON.
fn config_digest(config: &Config) -> String {
    // Plain numbers and words always have a JSON.
    hex(Sha256::new().chain_update(serde_json::to_vec(config).unwrap_or_default()))
}

/// A digest as hexadecimal digits.
pub(super) fn hex(digest: Sha256) -> String {
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Tensors of a file.
struct Tensors<'a> {
    file: &'a SafeTensors<'a>,
    name: &'a str,
}

impl Tensors<'_> {
    /// Refuses all that does not fit the config, and numbers that are none.
    fn check(&self, config: &Config) -> Result<(), Error> {
        let wrong = |reason: String| Err(Error::file(self.name, reason));
        let expected = weight_shapes(config);
        for (name, shape) in &expected {
            let Ok(tensor) = self.file.tensor(name) else {
                return wrong(format!("no tensor {name}, which the config gives shape {shape:?}"));
            };
            if tensor.shape() != shape {
                let got = tensor.shape();
                return wrong(format!("{name} has shape {got:?}, the config gives it {shape:?}"));
            }
            let Some(kind) = kind(tensor.dtype()) else {
                let got = tensor.dtype();
                return wrong(format!("{name} is {got:?}, it must be F16, BF16 or F32"));
            };
            let mut numbers = tensor.data().chunks_exact(kind.bytes()).map(|b| kind.read(b));
            if let Some(at) = numbers.position(|x| !x.is_finite()) {
                let x = kind.read(&tensor.data()[at * kind.bytes()..][..kind.bytes()]);
                let last = shape.last().copied().unwrap_or(1).max(1);
                let place = if shape.len() > 1 { vec![at / last, at % last] } else { vec![at] };
                return wrong(format!("{name} holds {x} at {place:?}"));
            }
        }
        let mut names = self.file.names();
        names.sort_unstable();
        match names.into_iter().find(|name| !expected.contains_key(*name)) {
            Some(name) => wrong(format!(
                "tensor {name} is none of the {} that the config has",
                expected.len()
            )),
            None => Ok(()),
        }
    }

    /// A tensor that has been checked.
    fn bytes(&self, name: &str) -> (Type, &[u8]) {
        match self.file.tensor(name) {
            Ok(tensor) => (kind(tensor.dtype()).unwrap_or(Type::F32), tensor.data()),
            Err(_) => (Type::F32, &[]),
        }
    }

    fn vector(&self, name: &str) -> Vec<f32> {
        let (kind, bytes) = self.bytes(name);
        bytes.chunks_exact(kind.bytes()).map(|bytes| kind.read(bytes)).collect()
    }

    /// Some tensors one below another.
    fn matrix(&self, names: &[String], columns: usize) -> Matrix {
        let parts: Vec<_> = names.iter().map(|name| self.bytes(name)).collect();
        Matrix::new(&parts, columns)
    }

    fn layer(&self, config: &Config, i: usize) -> Layer {
        let a = &config.attention;
        let named = |name: &str| format!("layers.{i}.{name}");
        let vector = |name: &str| self.vector(&named(name));
        let matrix = |name: &str, columns| self.matrix(&[named(name)], columns);
        let gates = a.position == Position::Gates;
        let mut qkv = vec![named("attn.qkv.weight")];
        if gates {
            qkv.push(named("attn.gate.weight"));
        }
        let only = |there: bool, name: &str| if there { vector(name) } else { vec![] };
        Layer {
            attn_norm: vector("attn.norm.weight"),
            qkv: self.matrix(&qkv, config.width),
            gate_bias: only(gates, "attn.gate.bias"),
            q_norm: only(a.qk_norm, "attn.q_norm.weight"),
            k_norm: only(a.qk_norm, "attn.k_norm.weight"),
            out: matrix("attn.out.weight", a.heads * a.head_dim),
            mlp_norm: vector("mlp.norm.weight"),
            up: matrix("mlp.up.weight", config.width),
            down: matrix("mlp.down.weight", config.mlp),
        }
    }

    fn digest(&self) -> String {
        let mut names = self.file.names();
        names.sort_unstable();
        let mut digest = Sha256::new();
        for name in names {
            if let Ok(tensor) = self.file.tensor(name) {
                let (kind, shape) = (tensor.dtype(), tensor.shape());
                digest.update(format!("{name} {kind:?} {shape:?}\n"));
                digest.update(tensor.data());
            }
        }
        hex(digest)
    }
}

fn kind(dtype: Dtype) -> Option<Type> {
    match dtype {
        Dtype::F16 => Some(Type::F16),
        Dtype::BF16 => Some(Type::Bf16),
        Dtype::F32 => Some(Type::F32),
        _ => None,
    }
}
