//! State files taken apart, changed and signed again, by the format's description alone.
#![allow(dead_code)]

use std::collections::BTreeMap;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub dtype: String,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

/// A state file taken apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Forged {
    pub metadata: BTreeMap<String, String>,
    pub tensors: BTreeMap<String, Tensor>,
}

impl Forged {
    /// Takes a file apart, if it is one of safetensors.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
        let file = SafeTensors::deserialize(bytes).ok()?;
        let tensors = file.tensors().into_iter().map(|(name, tensor)| {
            let (dtype, shape) = (tensor.dtype().to_string(), tensor.shape().to_vec());
            (name, Tensor { dtype, shape, data: tensor.data().to_vec() })
        });
        Some(Forged {
            metadata: header.metadata().clone().unwrap_or_default().into_iter().collect(),
            tensors: tensors.collect(),
        })
    }

    pub fn digest(&self) -> String {
        let mut bytes = vec![];
        let number = |bytes: &mut Vec<u8>, n: usize| bytes.extend((n as u64).to_le_bytes());
        let string = |bytes: &mut Vec<u8>, s: &str| {
            number(bytes, s.len());
            bytes.extend(s.as_bytes());
        };
        for (key, value) in &self.metadata {
            if key != "digest" {
                string(&mut bytes, key);
                string(&mut bytes, value);
            }
        }
        for (name, tensor) in &self.tensors {
            string(&mut bytes, name);
            string(&mut bytes, &tensor.dtype);
            number(&mut bytes, tensor.shape.len());
            tensor.shape.iter().for_each(|&n| number(&mut bytes, n));
            number(&mut bytes, tensor.data.len());
            bytes.extend(&tensor.data);
        }
        Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Makes the digest that of the contents.
    pub fn sign(&mut self) {
        let digest = self.digest();
        self.metadata.insert("digest".into(), digest);
    }

    /// A file of the same meaning that this project's own writer would not write: tensors in
    /// descending order, the metadata last, a header with line breaks.
    pub fn bytes(&self) -> Vec<u8> {
        let mut entries: Vec<(String, Value)> = vec![];
        let mut data: Vec<u8> = vec![];
        for (name, tensor) in self.tensors.iter().rev() {
            let offsets = [data.len(), data.len() + tensor.data.len()];
            data.extend(&tensor.data);
            let info =
                json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets});
            entries.push((name.clone(), info));
        }
        entries.push(("__metadata__".into(), json!(self.metadata)));
        let entries: Vec<String> =
            entries.iter().map(|(key, value)| format!("{}:\n {value}", json!(key))).collect();
        let mut header = format!("{{{}}}", entries.join(",\n")).into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.extend(data);
        bytes
    }
}
