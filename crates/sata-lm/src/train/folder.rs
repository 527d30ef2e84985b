//! The folder that training writes into, which is also the model's: checkpoint, config, weights,
//! tokenizer, record.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use half::f16;
use safetensors::{Dtype, View};
use serde::Serialize;

use super::checkpoint::{self, Checkpoint, Identity};
use super::error::TrainError;
use super::step::{Objective, with_numbers};
use super::trainer::{Point, Trainer};
use crate::Config;

const CHECKPOINT: &str = "checkpoint.safetensors";
const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";
const RECORD: &str = "training.json";
const LOCK: &str = ".training";

/// A folder that one training has to itself.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    /// Held while training runs; the system lets go of it however the process ends.
    _lock: File,
}

/// What `training.json` says.
#[derive(Clone, Debug, Serialize)]
pub struct Record<'a> {
    /// Which training.
    #[serde(flatten)]
    pub identity: &'a Identity,
    /// The model.
    pub model: &'a Config,
    /// Weights.
    pub parameters: usize,
    /// Tokens of a step.
    pub tokens_per_step: usize,
    /// Tokens and bytes of the text.
    pub train: Amount,
    /// Tokens and bytes of the held-out text.
    pub validation: Amount,
    /// Seconds spent, interrupted runs included.
    pub seconds: f64,
    /// One point for every step done.
    pub curve: &'a [Point],
}

/// How much text.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Amount {
    /// Tokens.
    pub tokens: usize,
    /// Bytes.
    pub bytes: u64,
    /// Bits per byte for each nat per token.
    pub bits_per_byte: f64,
}

impl From<&super::data::Tokens> for Amount {
    fn from(tokens: &super::data::Tokens) -> Self {
        let bits_per_byte = tokens.bits_per_byte();
        Amount { tokens: tokens.ids.len(), bytes: tokens.bytes, bits_per_byte }
    }
}

impl Folder {
    /// Refuses a folder that a new training would destroy something in.
    ///
    /// # Errors
    /// A folder that holds a model or a checkpoint, or a path that is no folder.
    pub fn check_vacant(path: &Path) -> Result<(), TrainError> {
        if path.exists() && !path.is_dir() {
            return Err(TrainError::file(path, "it is not a folder"));
        }
        for name in [CHECKPOINT, WEIGHTS] {
            if path.join(name).exists() {
                return Err(TrainError::file(
                    path,
                    format!("the folder holds {name} already, which a new training would replace"),
                ));
            }
        }
        Ok(())
    }

    /// Takes a folder for a new training, made where it is not there.
    ///
    /// # Errors
    /// As for [`Folder::check_vacant`], a folder that another training writes into, or one that
    /// cannot be made.
    pub fn begin(path: &Path) -> Result<Self, TrainError> {
        Self::check_vacant(path)?;
        std::fs::create_dir_all(path)
            .map_err(|error| TrainError::write(path, "making the folder", error))?;
        Self::lock(path)
    }

    /// Takes a folder in which a training stopped.
    ///
    /// # Errors
    /// A folder without checkpoint, or that another training writes into.
    pub fn resume(path: &Path) -> Result<Self, TrainError> {
        if !path.join(CHECKPOINT).exists() {
            return Err(TrainError::file(
                path,
                format!("the folder holds no {CHECKPOINT}: there is nothing to resume"),
            ));
        }
        Self::lock(path)
    }

    fn lock(path: &Path) -> Result<Self, TrainError> {
        let at = path.join(LOCK);
        let lock = File::create(&at).map_err(|error| TrainError::write(&at, "writing", error))?;
        match lock.try_lock() {
            Ok(()) => Ok(Folder { path: path.into(), _lock: lock }),
            Err(TryLockError::WouldBlock) => {
                Err(TrainError::file(path, "another training writes into the folder"))
            }
            // File systems without locks: nothing to hold.
            Err(TryLockError::Error(_)) => Ok(Folder { path: path.into(), _lock: lock }),
        }
    }

    /// Where the tokenizer lies.
    pub fn tokenizer(&self) -> PathBuf {
        self.path.join(TOKENIZER)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the checkpoint.
    ///
    /// # Errors
    /// As for [`Checkpoint::load`].
    pub fn checkpoint(&self) -> Result<Checkpoint, TrainError> {
        Checkpoint::load(&self.path.join(CHECKPOINT))
    }

    /// Steps done at the checkpoint in a folder, where there is a good one.
    pub fn last_step(path: &Path) -> Option<usize> {
        let checkpoint = Checkpoint::load(&path.join(CHECKPOINT)).ok()?;
        Some(checkpoint.header.curve.len())
    }

    /// Writes a file aside and puts it in place; on an error what was there is still there.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), TrainError> {
        let target = self.path.join(name);
        // Always the same name, so that what a killed process left is written over.
        let aside = self.path.join(format!("{name}.partial"));
        let written = File::create(&aside).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
        let placed = written.and_then(|()| std::fs::rename(&aside, &target));
        if let Err(error) = placed {
            let _ = std::fs::remove_file(&aside);
            return Err(TrainError::write(&target, "writing", error));
        }
        // The rename reaches the disk with the folder; not every system lets it be opened.
        if let Ok(folder) = File::open(&self.path) {
            let _ = folder.sync_all();
        }
        Ok(())
    }

    /// Writes the checkpoint, and then the model as it is now: `config.json`, `model.safetensors`
    /// in f16, and the record `training.json`. The tokenizer is there since training began.
    ///
    /// # Errors
    /// A weight that is not finite or beyond f16, and what the system says; files that were not
    /// yet replaced are those of the checkpoint before.
    pub fn save<M: Objective>(
        &self,
        trainer: &Trainer<M>,
        identity: &Identity,
        config: &Config,
    ) -> Result<(), TrainError> {
        let (curve, seconds) = (trainer.curve(), trainer.seconds());
        self.write(CHECKPOINT, &checkpoint::bytes(trainer, curve, seconds, identity)?)?;
        let record = Record {
            identity,
            model: config,
            parameters: trainer.parameters_count(),
            tokens_per_step: trainer.settings().tokens_per_step(),
            train: (&trainer.corpus().train).into(),
            validation: (&trainer.corpus().validation).into(),
            seconds,
            curve,
        };
        self.write(CONFIG, &json(config)?)?;
        self.write(WEIGHTS, &halves(trainer)?)?;
        self.write(RECORD, &json(&record)?)
    }
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, TrainError> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| TrainError::unfit(format!("JSON: {error}")))?;
    Ok((text + "\n").into_bytes())
}

/// Weights as f16.
struct Half {
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for Half {
    fn dtype(&self) -> Dtype {
        Dtype::F16
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// The bytes of `model.safetensors`.
fn halves<M: Objective>(trainer: &Trainer<M>) -> Result<Vec<u8>, TrainError> {
    let mut all = BTreeMap::new();
    for parameter in trainer.parameters() {
        let halves: Vec<f16> = with_numbers(&parameter.var, |weights| {
            weights.iter().map(|&w| f16::from_f32(w)).collect()
        })?;
        if halves.iter().any(|half| !half.is_finite()) {
            return Err(TrainError::unfit(format!(
                "a weight of {} is beyond ±65504, the range of f16; the checkpoint holds it",
                parameter.name
            )));
        }
        let bytes = halves.iter().flat_map(|half| half.to_le_bytes()).collect();
        all.insert(parameter.name.as_str(), Half { shape: parameter.var.dims().to_vec(), bytes });
    }
    safetensors::serialize(all, None)
        .map_err(|error| TrainError::unfit(format!("the weights: {error}")))
}
