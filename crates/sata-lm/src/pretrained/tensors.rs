//! Tensors of a model file, in f32 and of the sizes that a model expects.

use super::error::PretrainedError;
use super::gguf::Gguf;
use super::safe::SafeTensorsFile;

/// Numbers with their sizes, rows first.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Sizes.
    pub shape: Vec<usize>,
    /// Row-major.
    pub data: Vec<f32>,
}

/// Where a model's tensors come from.
#[derive(Debug)]
pub(super) enum Source {
    Gguf(Gguf),
    Safe(SafeTensorsFile),
}

impl Source {
    pub(super) fn name(&self) -> &str {
        match self {
            Source::Gguf(file) => file.name(),
            Source::Safe(file) => file.name(),
        }
    }

    pub(super) fn names(&self) -> Vec<&str> {
        match self {
            Source::Gguf(file) => file.names().collect(),
            Source::Safe(file) => file.names(),
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.names().contains(&name)
    }

    /// A tensor of exactly this shape; `why` says where its sizes come from.
    pub(super) fn read(
        &self,
        name: &str,
        shape: &[usize],
        why: &str,
    ) -> Result<Vec<f32>, PretrainedError> {
        let found = match self {
            Source::Gguf(file) => file.tensor(name),
            Source::Safe(file) => file.tensor(name),
        };
        let Some(tensor) = found else {
            return Err(self.missing(name));
        };
        let tensor = tensor?;
        if tensor.shape != shape {
            return Err(PretrainedError::Shape {
                file: self.name().into(),
                name: name.into(),
                shape: tensor.shape,
                expected: format!("{why} wants {shape:?}"),
            });
        }
        Ok(tensor.data)
    }

    fn missing(&self, name: &str) -> PretrainedError {
        let names = self.names();
        let some: Vec<&str> = names.iter().take(6).copied().collect();
        let like = match some.len() {
            0 => "; it has none at all".to_string(),
            _ => format!("; it has {} such as {}", names.len(), some.join(", ")),
        };
        PretrainedError::Missing { file: self.name().into(), name: name.into(), like }
    }
}

/// Refuses numbers that are not finite.
pub(super) fn check_finite(file: &str, name: &str, data: &[f32]) -> Result<(), PretrainedError> {
    match data.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(at) => Err(PretrainedError::NotFinite {
            file: file.into(),
            name: name.into(),
            at,
            value: data[at],
        }),
    }
}
