//! Safetensors files in f32, f16 or bf16, in one piece or in shards.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use super::error::PretrainedError;
use super::tensors::{Tensor, check_finite};

/// The index of a model in shards.
const INDEX_FILE: &str = "model.safetensors.index.json";
/// A model in one piece.
const FILE: &str = "model.safetensors";
/// What is read, for messages.
const KNOWN: &str = "F32, F16 and BF16";

/// One file or several.
#[derive(Debug)]
pub struct SafeTensorsFile {
    name: String,
    shards: Vec<Vec<u8>>,
    /// Which shard has a tensor.
    places: BTreeMap<String, usize>,
}

impl SafeTensorsFile {
    /// Whether a folder has one.
    pub fn is_in(folder: &Path) -> bool {
        folder.join(FILE).is_file() || folder.join(INDEX_FILE).is_file()
    }

    /// Reads `model.safetensors` of a folder, or all shards that its index names.
    ///
    /// # Errors
    /// [`PretrainedError::Io`], and [`PretrainedError::File`] for what is no safetensors file.
    pub fn open(folder: &Path) -> Result<Self, PretrainedError> {
        let path = folder.join(FILE);
        if path.is_file() {
            let name = path.display().to_string();
            return Self::parse(&name, vec![(name.clone(), read(&path)?)]);
        }
        let path = folder.join(INDEX_FILE);
        let name = path.display().to_string();
        let index: serde_json::Value = serde_json::from_slice(&read(&path)?)
            .map_err(|error| PretrainedError::file(&name, error.to_string()))?;
        let map = index.get("weight_map").and_then(|map| map.as_object());
        let map = map.ok_or_else(|| PretrainedError::file(&name, "it has no weight_map"))?;
        let mut files: Vec<&str> = map.values().filter_map(|file| file.as_str()).collect();
        files.sort_unstable();
        files.dedup();
        let mut shards = vec![];
        for file in files {
            if Path::new(file).components().count() != 1 || file.starts_with('.') {
                return Err(PretrainedError::file(&name, format!("{file} is no file beside it")));
            }
            let path = folder.join(file);
            shards.push((path.display().to_string(), read(&path)?));
        }
        Self::parse(&name, shards)
    }

    /// Reads shards' bytes, each with its name.
    ///
    /// # Errors
    /// [`PretrainedError::File`] for what is no safetensors file, or a tensor that is there twice.
    pub fn parse(name: &str, shards: Vec<(String, Vec<u8>)>) -> Result<Self, PretrainedError> {
        let (mut places, mut all) = (BTreeMap::new(), vec![]);
        for (i, (shard, bytes)) in shards.into_iter().enumerate() {
            let file = SafeTensors::deserialize(&bytes)
                .map_err(|error| PretrainedError::file(&shard, error.to_string()))?;
            for tensor in file.names() {
                if places.insert(tensor.to_string(), i).is_some() {
                    let reason = format!("tensor {tensor} is in another shard too");
                    return Err(PretrainedError::file(&shard, reason));
                }
            }
            all.push(bytes);
        }
        Ok(SafeTensorsFile { name: name.into(), shards: all, places })
    }

    /// The file's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Names of its tensors.
    pub fn names(&self) -> Vec<&str> {
        self.places.keys().map(String::as_str).collect()
    }

    /// A tensor as f32; `None` if there is none of that name.
    ///
    /// # Errors
    /// [`PretrainedError::Kind`] for a type that is not read, [`PretrainedError::NotFinite`].
    pub fn tensor(&self, name: &str) -> Option<Result<Tensor, PretrainedError>> {
        let bytes = &self.shards[*self.places.get(name)?];
        // Its header was read before.
        let file = SafeTensors::deserialize(bytes).ok()?;
        let view = file.tensor(name).ok()?;
        let bytes = view.data();
        let half = |number: fn([u8; 2]) -> f32| {
            bytes.chunks_exact(2).map(|b| number([b[0], b[1]])).collect::<Vec<f32>>()
        };
        let data = match view.dtype() {
            Dtype::F32 => {
                let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                bytes.chunks_exact(4).map(number).collect()
            }
            Dtype::F16 => half(|b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => half(|b| bf16::from_le_bytes(b).to_f32()),
            other => {
                return Some(Err(PretrainedError::Kind {
                    file: self.name.clone(),
                    name: name.into(),
                    kind: format!("{other:?}"),
                    known: KNOWN,
                }));
            }
        };
        let tensor = Tensor { shape: view.shape().to_vec(), data };
        Some(check_finite(&self.name, name, &tensor.data).map(|()| tensor))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, PretrainedError> {
    std::fs::read(path).map_err(|error| PretrainedError::io(path, "reading", error))
}
