//! Checkpoints: everything that training needs to go on, in one file.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::data::{Mark, hex};
use super::error::TrainError;
use super::optimizer::Moments;
use super::settings::Settings;
use super::step::{Objective, with_numbers};
use super::trainer::{Point, Trainer};

/// Version of the file.
const VERSION: u32 = 1;
/// The metadata field that holds the header.
const HEADER: &str = "sata_training";
/// The metadata field that holds the digest of header and tensors.
const DIGEST: &str = "sha256";

/// What must be the same for a training to go on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// All settings, with what the command line changed of them.
    pub settings: Settings,
    /// The texts, held-out ones after the others.
    pub texts: Vec<Mark>,
    /// SHA-256 of the tokenizer's file, in hexadecimal.
    pub tokenizer: String,
}

/// What a checkpoint says beside its tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    version: u32,
    /// Of what training it is.
    pub identity: Identity,
    /// Time spent so far.
    pub seconds: f64,
    /// One point for every step done.
    pub curve: Vec<Point>,
}

/// A checkpoint in memory.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// What it says beside its tensors.
    pub header: Header,
    /// f32 weights.
    pub weights: BTreeMap<String, Tensor>,
    /// The optimizer's moments.
    pub moments: BTreeMap<String, Moments>,
}

impl Identity {
    /// Refuses another training: names what differs, from stored to now.
    ///
    /// # Errors
    /// One sentence.
    pub fn check(&self, now: &Identity) -> Result<(), String> {
        if let Some((name, was, is)) = self.settings.difference(&now.settings) {
            return Err(format!("{name} was {was} when training began and is {is} now"));
        }
        for (i, (was, is)) in self.texts.iter().zip(&now.texts).enumerate() {
            if was != is {
                return Err(format!(
                    "text {} was {} of {} bytes when training began and is {} of {} bytes now{}",
                    i + 1,
                    was.name,
                    was.bytes,
                    is.name,
                    is.bytes,
                    if was.bytes == is.bytes { " with other contents" } else { "" }
                ));
            }
        }
        if self.texts.len() != now.texts.len() {
            let (was, is) = (self.texts.len(), now.texts.len());
            return Err(format!("there were {was} texts when training began and are {is} now"));
        }
        if self.tokenizer != now.tokenizer {
            return Err("the tokenizer is not the one that training began with".into());
        }
        Ok(())
    }
}

/// Numbers under a name.
struct Piece<'a> {
    shape: Vec<usize>,
    numbers: Numbers<'a>,
}

enum Numbers<'a> {
    Slice(Cow<'a, [f32]>),
    Tensor(&'a Tensor),
}

fn little_endian(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

impl Piece<'_> {
    fn bytes(&self) -> Vec<u8> {
        match &self.numbers {
            Numbers::Slice(numbers) => little_endian(numbers),
            // Parameters are contiguous f32: they were made so.
            Numbers::Tensor(tensor) => with_numbers(tensor, little_endian).unwrap_or_default(),
        }
    }
}

impl View for &Piece<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.bytes())
    }
    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * size_of::<f32>()
    }
}

/// The bytes of a checkpoint of a training.
///
/// # Errors
/// A weight that is not finite: what cannot be trained on is not stored.
pub(super) fn bytes<M: Objective>(
    trainer: &Trainer<M>,
    curve: &[Point],
    seconds: f64,
    identity: &Identity,
) -> Result<Vec<u8>, TrainError> {
    let mut pieces = BTreeMap::new();
    for (parameter, [first, second]) in trainer.parameters().iter().zip(trainer.moments()?) {
        let (name, shape) = (&parameter.name, parameter.var.dims().to_vec());
        let bad = with_numbers(&parameter.var, |w| w.iter().copied().find(|w| !w.is_finite()))?;
        if let Some(value) = bad {
            let what = format!("a weight of {name}");
            return Err(TrainError::NonFinite { step: curve.len(), what, value: value.into() });
        }
        let piece = |numbers| Piece { shape: shape.clone(), numbers };
        pieces.insert(format!("weight/{name}"), piece(Numbers::Tensor(&parameter.var)));
        pieces.insert(format!("first/{name}"), piece(Numbers::Slice(first)));
        pieces.insert(format!("second/{name}"), piece(Numbers::Slice(second)));
    }
    let header =
        Header { version: VERSION, identity: identity.clone(), seconds, curve: curve.to_vec() };
    let header = serde_json::to_string(&header)
        .map_err(|error| TrainError::unfit(format!("the checkpoint's header: {error}")))?;
    let digest =
        digest(&header, pieces.iter().map(|(name, piece)| (&**name, piece.bytes().into())));
    let metadata = HashMap::from([(HEADER.into(), header), (DIGEST.into(), digest)]);
    safetensors::serialize(&pieces, Some(metadata))
        .map_err(|error| TrainError::unfit(format!("the checkpoint: {error}")))
}

/// Of the header and, in order of their names, all tensors.
fn digest<'a>(header: &str, tensors: impl Iterator<Item = (&'a str, Cow<'a, [u8]>)>) -> String {
    let mut hash = Sha256::new();
    hash.update(header);
    for (name, data) in tensors {
        hash.update(name);
        hash.update(data);
    }
    hex(&hash.finalize())
}

impl Checkpoint {
    /// Reads a checkpoint.
    ///
    /// # Errors
    /// A file that is missing, truncated, altered, or no checkpoint.
    pub fn load(path: &Path) -> Result<Self, TrainError> {
        let fail = |reason: String| TrainError::file(path, reason);
        let bytes = std::fs::read(path).map_err(|error| fail(error.to_string()))?;
        let broken = |error: safetensors::SafeTensorError| {
            fail(format!("the checkpoint is truncated or altered: {error}"))
        };
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
        let file = SafeTensors::deserialize(&bytes).map_err(broken)?;
        let field = |name: &str| metadata.metadata().as_ref().and_then(|map| map.get(name));
        let (Some(text), Some(stored)) = (field(HEADER), field(DIGEST)) else {
            return Err(fail("it is not a checkpoint of a training".into()));
        };
        let tensors: BTreeMap<&str, _> = file.iter().collect();
        let found = digest(text, tensors.iter().map(|(n, t)| (*n, Cow::Borrowed(t.data()))));
        if found != *stored {
            return Err(fail("the checkpoint is altered: its digest does not fit".into()));
        }
        let header: Header = serde_json::from_str(text).map_err(|error| {
            fail(format!("the checkpoint was written by another version of the program: {error}"))
        })?;
        if header.version != VERSION {
            return Err(fail(format!(
                "the checkpoint has version {}, this program reads {VERSION}",
                header.version
            )));
        }
        let numbers = |name: &str| {
            let tensor =
                tensors.get(name).ok_or_else(|| fail(format!("the checkpoint lacks {name}")))?;
            let (fours, _) = tensor.data().as_chunks();
            let numbers: Vec<f32> = fours.iter().map(|b| f32::from_le_bytes(*b)).collect();
            Ok::<_, TrainError>((numbers, tensor.shape().to_vec()))
        };
        let (mut weights, mut moments) = (BTreeMap::new(), BTreeMap::new());
        for name in tensors.keys().filter_map(|name| name.strip_prefix("weight/")) {
            let (weight, shape) = numbers(&format!("weight/{name}"))?;
            let (first, _) = numbers(&format!("first/{name}"))?;
            let (second, _) = numbers(&format!("second/{name}"))?;
            if first.len() != weight.len() || second.len() != weight.len() {
                return Err(fail(format!("moments of {name} have another size than it")));
            }
            weights.insert(name.to_string(), Tensor::from_vec(weight, shape, &Device::Cpu)?);
            moments.insert(name.to_string(), Moments { first, second });
        }
        Ok(Checkpoint { header, weights, moments })
    }
}
