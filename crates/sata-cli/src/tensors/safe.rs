//! safetensors files.

use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype as SafeDtype, SafeTensors, TensorView};

use super::{Data, Dtype, Tensor, read_bytes};
use crate::failure::{Failure, Outcome};

/// A safetensors file in memory.
#[derive(Debug)]
pub struct SafeFile {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl SafeFile {
    /// Reads a file and checks that it is one of safetensors.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn open(path: &Path) -> Outcome<Self> {
        let bytes = read_bytes(path)?;
        Self::from_bytes(path, bytes)
    }

    /// The same of bytes that are already here; `path` is for messages.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Outcome<Self> {
        let file = SafeFile { path: path.to_path_buf(), bytes };
        file.parse()?;
        Ok(file)
    }

    fn parse(&self) -> Outcome<SafeTensors<'_>> {
        SafeTensors::deserialize(&self.bytes).map_err(|error| {
            Failure::new(format!(
                "{}: it is not a safetensors file, or it is damaged ({} bytes): {error}",
                self.path.display(),
                self.bytes.len()
            ))
        })
    }

    /// Names of all tensors, sorted.
    ///
    /// # Errors
    /// None, for a file that has been opened.
    pub fn names(&self) -> Outcome<Vec<String>> {
        let mut names: Vec<String> =
            self.parse()?.names().into_iter().map(|name| name.to_string()).collect();
        names.sort();
        Ok(names)
    }

    /// A remark of the file's metadata, if it has one of this name.
    ///
    /// # Errors
    /// None, for a file that has been opened.
    pub fn remark(&self, name: &str) -> Outcome<Option<String>> {
        let (_, header) = SafeTensors::read_metadata(&self.bytes).map_err(|error| {
            Failure::new(format!("{}: it is damaged: {error}", self.path.display()))
        })?;
        Ok(header.metadata().as_ref().and_then(|remarks| remarks.get(name)).cloned())
    }

    /// A tensor of numbers.
    ///
    /// # Errors
    /// When it is not there, or holds something else.
    pub fn tensor(&self, name: &str) -> Outcome<Tensor> {
        let file = self.parse()?;
        let view = file.tensor(name).map_err(|_| self.missing(name))?;
        let dtype = match view.dtype() {
            SafeDtype::F16 => Dtype::F16,
            SafeDtype::BF16 => Dtype::Bf16,
            SafeDtype::F32 => Dtype::F32,
            SafeDtype::F64 => Dtype::F64,
            other => {
                return Err(Failure::new(format!(
                    "{}: tensor {name} {:?} has dtype {other:?}, but it must be F16, BF16, F32 or \
                     F64",
                    self.path.display(),
                    view.shape()
                )));
            }
        };
        Ok(Tensor { shape: view.shape().to_vec(), data: Data::from_bytes(dtype, view.data()) })
    }

    /// A tensor of truth values (BOOL or U8), if it is there, with its shape.
    ///
    /// # Errors
    /// When it holds something else.
    pub fn mask(&self, name: &str) -> Outcome<Option<(Vec<usize>, Vec<bool>)>> {
        let file = self.parse()?;
        let Ok(view) = file.tensor(name) else {
            return Ok(None);
        };
        match view.dtype() {
            SafeDtype::BOOL | SafeDtype::U8 => {
                let mask = view.data().iter().map(|&b| b != 0).collect();
                Ok(Some((view.shape().to_vec(), mask)))
            }
            other => Err(Failure::new(format!(
                "{}: tensor {name} {:?} has dtype {other:?}, but a mask must be BOOL or U8",
                self.path.display(),
                view.shape()
            ))),
        }
    }

    fn missing(&self, name: &str) -> Failure {
        let names = self.names().unwrap_or_default();
        let failure = Failure::new(format!(
            "{}: there is no tensor {name}; it has {}{}",
            self.path.display(),
            if names.is_empty() {
                "none".into()
            } else {
                names.iter().take(12).cloned().collect::<Vec<_>>().join(", ")
            },
            if names.len() > 12 {
                format!(" and {} more", names.len() - 12)
            } else {
                String::new()
            }
        ));
        match names.iter().find_map(|name| name.strip_suffix(".q")) {
            Some(prefix) => {
                failure.hint(format!("--prefix {prefix} names the tensors {prefix}.q …"))
            }
            None => failure,
        }
    }
}

/// A safetensors file of tensors and remarks, as bytes.
///
/// # Errors
/// When a shape does not fit its data.
pub fn encode(tensors: &[(&str, &Tensor)], remarks: &[(&str, String)]) -> Outcome<Vec<u8>> {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, tensor)| tensor.data.to_bytes()).collect();
    let mut views = vec![];
    for ((name, tensor), bytes) in tensors.iter().zip(&bytes) {
        let dtype = match tensor.data.dtype() {
            Dtype::F16 => SafeDtype::F16,
            Dtype::Bf16 => SafeDtype::BF16,
            Dtype::F32 => SafeDtype::F32,
            Dtype::F64 => SafeDtype::F64,
        };
        let view = TensorView::new(dtype, tensor.shape.clone(), bytes)
            .map_err(|error| Failure::new(format!("tensor {name}: {error}")))?;
        views.push((name.to_string(), view));
    }
    let remarks = remarks.iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
    safetensors::serialize(views, Some(remarks))
        .map_err(|error| Failure::new(format!("safetensors: {error}")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Reads everything that a file claims to hold.
    fn read_all(bytes: Vec<u8>) {
        if let Ok(file) = file(bytes) {
            for name in file.names().unwrap() {
                let _ = file.tensor(&name).map(|tensor| tensor.shape4(&name));
                let _ = file.mask(&name);
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            read_all(bytes);
        }

        #[test]
        fn damage_is_read_or_refused(at: prop::sample::Index, change: u8) {
            let tensor = Tensor { shape: vec![2, 2], data: Data::F32(vec![1.0; 4]) };
            let mut bytes = encode(&[("q", &tensor), ("k", &tensor)], &[]).unwrap();
            let at = at.index(bytes.len());
            bytes[at] = change;
            read_all(bytes);
        }

        #[test]
        fn any_header_is_read_or_refused(
            dtype in "F16|BF16|F32|F64|I64|BOOL|U8|X",
            shape in proptest::collection::vec(any::<u64>(), 0..4),
            offsets: [u32; 2],
            data in 0usize..100,
        ) {
            let header = format!(
                "{{\"q\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":{offsets:?}}}}}"
            );
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.bytes());
            bytes.extend(vec![0; data]);
            read_all(bytes);
        }
    }

    fn file(bytes: Vec<u8>) -> Outcome<SafeFile> {
        SafeFile::from_bytes(Path::new("x.safetensors"), bytes)
    }

    #[test]
    fn what_is_written_is_read() {
        let half = Tensor { shape: vec![1, 2, 1], data: Data::F16(vec![half::f16::ONE; 2]) };
        let double = Tensor { shape: vec![3], data: Data::F64(vec![0.1, 0.2, 0.3]) };
        let bytes = encode(&[("a.q", &half), ("b", &double)], &[("by", "test".into())]).unwrap();
        let file = file(bytes).unwrap();
        assert_eq!(file.names().unwrap(), ["a.q", "b"]);
        assert_eq!(file.remark("by").unwrap().as_deref(), Some("test"));
        assert_eq!(file.remark("for").unwrap(), None);
        assert_eq!(file.tensor("a.q").unwrap(), half);
        assert_eq!(file.tensor("b").unwrap(), double);
        let missing = file.tensor("q").unwrap_err().to_string();
        assert!(missing.contains("a.q, b") && missing.contains("--prefix a"), "{missing}");
        assert!(file.mask("key_mask").unwrap().is_none());
        assert!(file.mask("b").unwrap_err().to_string().contains("F64"));
    }

    #[test]
    fn truncation_anywhere_is_refused() {
        let tensor = Tensor { shape: vec![4], data: Data::F32(vec![1.0; 4]) };
        let bytes = encode(&[("q", &tensor)], &[]).unwrap();
        for len in 0..bytes.len() {
            assert!(file(bytes[..len].to_vec()).is_err(), "{len} of {} bytes", bytes.len());
        }
    }
}
