//! The file of settings, TOML: tables `[model]`, `[tokenizer]` and `[train]`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::TrainError;
use super::optimizer::AdamW;
use super::schedule::Schedule;
use crate::config::default_eps;
use crate::{Attention, Config};

/// All settings of a training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// What is trained.
    pub model: ModelSettings,
    /// The tokenizer that is trained where none is given.
    #[serde(default)]
    pub tokenizer: TokenizerSettings,
    /// How.
    pub train: TrainSettings,
}

/// A [`Config`] without its vocabulary, which is the tokenizer's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSettings {
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

/// The tokenizer that is trained where none is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerSettings {
    /// Tokens: end of text, the 256 bytes, and merges of them. 257 means bytes alone.
    pub vocab: usize,
}

impl Default for TokenizerSettings {
    fn default() -> Self {
        TokenizerSettings { vocab: 4096 }
    }
}

/// Tokens of the smallest tokenizer: end of text, and the bytes.
pub const SMALLEST_VOCAB: usize = 257;

/// How a model is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSettings {
    /// Updates of the weights.
    pub steps: usize,
    /// Sequences of `context` tokens in a step.
    pub batch: usize,
    /// Sequences of `context` tokens that go through the model at once, on one thread; divides
    /// `batch`.
    pub micro_batch: usize,
    /// Tokens that a sequence predicts.
    pub context: usize,
    /// Lengths of sequences, taken in turn by the micro-batches; a micro-batch of shorter ones
    /// holds more of them, as many tokens in all. `context` alone when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lengths: Vec<usize>,
    /// The largest learning rate.
    pub learning_rate: f64,
    /// The learning rate of the last step.
    #[serde(default)]
    pub min_learning_rate: f64,
    /// Steps over which the learning rate rises.
    #[serde(default)]
    pub warmup: usize,
    /// Weight decay of everything but norms, biases and gates.
    #[serde(default = "default_weight_decay")]
    pub weight_decay: f64,
    /// Decay of AdamW's mean gradient.
    #[serde(default = "default_beta1")]
    pub beta1: f64,
    /// Decay of AdamW's mean squared gradient.
    #[serde(default = "default_beta2")]
    pub beta2: f64,
    /// The largest norm of a step's gradient; larger ones are scaled down to it.
    #[serde(default = "default_clip")]
    pub clip: f64,
    /// Decides the first weights and which sequences are seen when.
    #[serde(default)]
    pub seed: u64,
    /// Steps between evaluations of the held-out text; the last step always has one.
    #[serde(default = "default_evaluate_every")]
    pub evaluate_every: usize,
    /// Tokens of an evaluation, in sequences of `context` spread evenly over the held-out text.
    #[serde(default = "default_evaluate_tokens")]
    pub evaluate_tokens: usize,
    /// Steps between checkpoints; the last step always has one.
    #[serde(default = "default_checkpoint_every")]
    pub checkpoint_every: usize,
    /// What is held out.
    #[serde(default)]
    pub validation: Validation,
}

/// What is held out of training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a fraction between 0 and 1, or a list of paths")]
pub enum Validation {
    /// The last part of every file.
    Fraction(f64),
    /// Other files, or folders of `.txt` files.
    Paths(Vec<PathBuf>),
}

impl Default for Validation {
    fn default() -> Self {
        Validation::Fraction(0.05)
    }
}

fn default_weight_decay() -> f64 {
    0.1
}
fn default_beta1() -> f64 {
    0.9
}
fn default_beta2() -> f64 {
    0.95
}
fn default_clip() -> f64 {
    1.0
}
fn default_evaluate_every() -> usize {
    100
}
fn default_evaluate_tokens() -> usize {
    32_768
}
fn default_checkpoint_every() -> usize {
    500
}

impl ModelSettings {
    /// The model's config with a vocabulary.
    pub fn config(&self, vocab: usize) -> Config {
        let ModelSettings { layers, width, mlp, norm_eps, attention } = self.clone();
        Config { vocab, layers, width, mlp, norm_eps, attention }
    }
}

impl Settings {
    /// Reads a file of settings.
    ///
    /// # Errors
    /// Names the file, the field and its value.
    pub fn load(path: &Path) -> Result<Self, TrainError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| TrainError::file(path, error.to_string()))?;
        let settings: Settings = toml::from_str(&text)
            .map_err(|error| TrainError::file(path, error.to_string().trim_end()))?;
        settings.check().map_err(|reason| TrainError::file(path, reason))?;
        Ok(settings)
    }

    /// Refuses what cannot be trained: names the field and its value.
    ///
    /// # Errors
    /// One sentence.
    pub fn check(&self) -> Result<(), String> {
        let vocab = self.tokenizer.vocab;
        if vocab < SMALLEST_VOCAB {
            return Err(format!(
                "tokenizer.vocab is {vocab}, it must be at least {SMALLEST_VOCAB}: end of text and \
                 the bytes"
            ));
        }
        self.model.config(vocab).check().map_err(|reason| format!("model.{reason}"))?;
        self.train.check().map_err(|reason| format!("train.{reason}"))
    }

    /// Names the first setting that differs from another's and both values. How often a checkpoint
    /// is written changes nothing of the curve, and may differ.
    pub fn difference(&self, other: &Settings) -> Option<(String, String, String)> {
        let value = |settings: &Settings| {
            let mut settings = settings.clone();
            settings.train.checkpoint_every = 0;
            serde_json::to_value(settings).unwrap_or_default()
        };
        difference("", &value(self), &value(other))
    }
}

fn difference(
    name: &str,
    one: &serde_json::Value,
    other: &serde_json::Value,
) -> Option<(String, String, String)> {
    use serde_json::Value;
    match (one, other) {
        (Value::Object(a), Value::Object(b)) => {
            let names: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            names.into_iter().find_map(|field| {
                let get = |of: &serde_json::Map<String, Value>| {
                    of.get(field).cloned().unwrap_or(Value::Null)
                };
                let dot = if name.is_empty() { "" } else { "." };
                difference(&format!("{name}{dot}{field}"), &get(a), &get(b))
            })
        }
        _ if one == other => None,
        _ => {
            let say = |value: &Value| match value {
                Value::Null => "not given".into(),
                value => value.to_string(),
            };
            Some((name.into(), say(one), say(other)))
        }
    }
}

impl TrainSettings {
    /// Lengths of sequences.
    pub fn lengths(&self) -> Vec<usize> {
        if self.lengths.is_empty() { vec![self.context] } else { self.lengths.clone() }
    }

    /// The longest sequence that is trained on or evaluated.
    pub fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0).max(self.context)
    }

    /// Tokens of a step.
    pub fn tokens_per_step(&self) -> usize {
        self.batch * self.context
    }

    /// Micro-batches of a step.
    pub fn micro_batches(&self) -> usize {
        self.batch / self.micro_batch
    }

    /// The learning rates.
    pub fn schedule(&self) -> Schedule {
        let (peak, floor) = (self.learning_rate, self.min_learning_rate);
        Schedule { peak, floor, warmup: self.warmup, steps: self.steps }
    }

    /// The optimizer.
    pub fn optimizer(&self) -> AdamW {
        AdamW { beta1: self.beta1, beta2: self.beta2, weight_decay: self.weight_decay }
    }

    /// Refuses what cannot be done: names the field and its value.
    ///
    /// # Errors
    /// One sentence.
    pub fn check(&self) -> Result<(), String> {
        let mut counts = vec![
            ("steps", self.steps),
            ("batch", self.batch),
            ("micro_batch", self.micro_batch),
            ("context", self.context),
            ("evaluate_every", self.evaluate_every),
            ("evaluate_tokens", self.evaluate_tokens),
            ("checkpoint_every", self.checkpoint_every),
        ];
        counts.extend(self.lengths.iter().map(|&length| ("lengths", length)));
        for (field, value) in counts {
            if value == 0 {
                return Err(format!("{field} is 0, it must be at least 1"));
            }
            if value > 1 << 30 {
                return Err(format!("{field} is {value}, more than {}", 1 << 30));
            }
        }
        if !self.batch.is_multiple_of(self.micro_batch) {
            return Err(format!(
                "batch is {}, not a multiple of train.micro_batch, {}",
                self.batch, self.micro_batch
            ));
        }
        let tokens = self.micro_batch * self.context;
        if let Some(length) = self.lengths().into_iter().find(|l| !tokens.is_multiple_of(*l)) {
            return Err(format!(
                "lengths has {length}, which does not divide the {tokens} tokens of a micro-batch, \
                 train.micro_batch times train.context"
            ));
        }
        for (field, value, good, must) in [
            ("learning_rate", self.learning_rate, self.learning_rate > 0.0, "positive"),
            (
                "min_learning_rate",
                self.min_learning_rate,
                (0.0..=self.learning_rate).contains(&self.min_learning_rate),
                "between 0 and train.learning_rate",
            ),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0.0, "at least 0"),
            ("beta1", self.beta1, (0.0..1.0).contains(&self.beta1), "at least 0 and below 1"),
            ("beta2", self.beta2, (0.0..1.0).contains(&self.beta2), "at least 0 and below 1"),
            ("clip", self.clip, self.clip > 0.0, "positive"),
        ] {
            if !good || !value.is_finite() {
                return Err(format!("{field} is {value}, it must be {must}"));
            }
        }
        if self.warmup >= self.steps && self.warmup > 0 {
            return Err(format!(
                "warmup is {}, it must be below train.steps, {}",
                self.warmup, self.steps
            ));
        }
        match &self.validation {
            Validation::Fraction(f) if !(*f > 0.0 && *f < 1.0) => {
                Err(format!("validation is {f}, it must be between 0 and 1, or a list of paths"))
            }
            Validation::Paths(paths) if paths.is_empty() => {
                Err("validation is an empty list, it must name files or folders".into())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
        [model]
        layers = 2
        width = 32
        mlp = 64
        [model.attention]
        heads = 2
        head_dim = 16
        kernel = { kind = \"taylor\", terms = 3 }
        near = 1
        position = \"gates\"
        [train]
        steps = 10
        batch = 4
        micro_batch = 2
        context = 64
        learning_rate = 1e-3
    ";

    fn load(text: &str) -> Result<Settings, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.toml");
        std::fs::write(&path, text).unwrap();
        Settings::load(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_fill_what_is_left_away() {
        let settings = load(GOOD).unwrap();
        assert_eq!(settings.tokenizer.vocab, 4096);
        assert_eq!(settings.train.lengths(), [64]);
        assert_eq!(settings.train.validation, Validation::Fraction(0.05));
        assert_eq!(settings.model.config(300).vocab, 300);
        let paths = load(&format!("{GOOD}\nvalidation = [\"a\", \"b\"]")).unwrap();
        assert_eq!(paths.train.validation, Validation::Paths(vec!["a".into(), "b".into()]));
        // What is stored in a checkpoint comes back.
        let json = serde_json::to_string(&paths).unwrap();
        assert_eq!(serde_json::from_str::<Settings>(&json).unwrap(), paths);
    }

    #[test]
    fn wrong_settings_are_named() {
        for (from, to, words) in [
            ("layers = 2", "layers = 0", "model.layers is 0"),
            ("layers = 2", "layers = 2\nhidden = 7", "hidden"),
            ("terms = 3", "terms = 0", "terms"),
            ("terms = 3", "terms = 3, size = 2", "size"),
            ("batch = 4", "batch = 5", "train.batch is 5"),
            ("context = 64", "context = 64\nlengths = [64, 48]", "train.lengths has 48"),
            ("context = 64", "context = 64\nvalidation = 1.5", "train.validation is 1.5"),
            ("context = 64", "context = 64\nvalidation = \"x\"", "list of paths"),
            ("context = 64", "context = 64\nwarmup = 10", "train.warmup is 10"),
            ("context = 64", "context = 64\nbeta2 = 1.0", "train.beta2 is 1"),
            ("1e-3", "nan", "train.learning_rate is NaN"),
            ("1e-3", "-1", "train.learning_rate is -1"),
            ("steps = 10", "", "steps"),
            ("steps = 10", "steps = \"ten\"", "ten"),
            ("[train]", "[tokenizer]\nvocab = 100\n[train]", "tokenizer.vocab is 100"),
        ] {
            assert!(GOOD.contains(from));
            let said = load(&GOOD.replace(from, to)).unwrap_err();
            assert!(said.contains(words) && said.contains("a.toml"), "{to}: {said}");
        }
        let missing = Settings::load(Path::new("nowhere.toml")).unwrap_err().to_string();
        assert!(missing.contains("nowhere.toml"), "{missing}");
    }

    #[test]
    fn differences_are_named_with_both_values() {
        let one = load(GOOD).unwrap();
        let mut other = one.clone();
        other.train.checkpoint_every = 7;
        assert_eq!(one.difference(&other), None);
        other.model.attention.near = None;
        let (name, was, is) = one.difference(&other).unwrap();
        assert_eq!((&*name, &*was, &*is), ("model.attention.near", "1", "not given"));
    }
}
