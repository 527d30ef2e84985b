//! States as files.
//!
//! # The file, version 1
//!
//! A [safetensors](https://github.com/huggingface/safetensors) file, little-endian, that any
//! program can write and read from this description. All tensors are of one type, `F32` or `F64`,
//! that of the sums; with n sequences, h key/value heads, D features and blocks of B tokens:
//!
//! | tensor         | shape               | holds                                               |
//! |----------------|---------------------|-----------------------------------------------------|
//! | `open_keys`    | `[n, h, B, d_key]`  | keys of the open tokens; 0 from `open` on           |
//! | `open_values`  | `[n, h, B, d_value]`| their values, likewise                              |
//! | `open_weights` | `[n, h, B]`         | 1, or 0 for a masked token, likewise                |
//! | `sums`         | `[n, h, D, d_value]`| Σ Φ(k) vᵀ over the folded tokens                    |
//! | `sums_low`     | `[n, h, D, d_value]`| only with `F32`: what rounding took from `sums`     |
//! | `z`            | `[n, h, D]`         | Σ Φ(k) over the folded tokens                       |
//! | `z_low`        | `[n, h, D]`         | only with `F32`: what rounding took from `z`        |
//!
//! The metadata has exactly these entries:
//!
//! | entry       | value                                                                          |
//! |-------------|--------------------------------------------------------------------------------|
//! | `format`    | `sata-state`                                                                   |
//! | `version`   | `1`                                                                            |
//! | `spec`      | the [`Spec`] as JSON                                                           |
//! | `orders`    | JSON array: the orders p whose features are held, ascending, those of the spec |
//! | `basis`     | `bare-lexicographic`                                                           |
//! | `positions` | JSON array: tokens each sequence has seen, at most 2⁶³ − 1                     |
//! | `open`      | JSON array: how many of them wait in its open block, less than B               |
//! | `digest`    | SHA-256 of all else, 64 lower-case hexadecimal digits                          |
//!
//! `bare-lexicographic`: the D features are, order by order, the monomials x_{i1}⋯x_{ip} with
//! i1 ≤ … ≤ ip in lexicographic order of their indices, without any factor. Multiplicities
//! p!/∏n_i!, the series' coefficients and the scale are applied when a query reads.
//!
//! The digest is taken over this sequence of bytes, where *number* is 8 bytes, little-endian, and
//! *string* is the number of its bytes and then its bytes (UTF-8):
//! 1. for each metadata entry but `digest`, in ascending order of keys (as bytes): string key,
//!    string value;
//! 2. for each tensor, in ascending order of names: string name, string type (`F32`, `F64`),
//!    number of dimensions, each dimension as a number, number of bytes of its data, its data.
//!
//! The order of entries and tensors in the file is free. The header is padded with spaces only.

mod read;
mod replace;
mod write;

use safetensors::Dtype;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{Real, Spec};

const FORMAT: &str = "sata-state";
const VERSION: u64 = 1;
const BASIS: &str = "bare-lexicographic";
/// The entries of the metadata, all of them needed.
const ENTRIES: [&str; 8] =
    ["format", "version", "spec", "orders", "basis", "positions", "open", "digest"];
/// A header holds a few numbers per sequence; one that is larger is none of ours.
const MAX_HEADER: u64 = 1 << 24;
/// Bytes converted at once.
const CHUNK: usize = 1 << 16;

/// The tensors, in the order of their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tensor {
    OpenKeys,
    OpenValues,
    OpenWeights,
    Sums,
    SumsLow,
    Z,
    ZLow,
}

impl Tensor {
    const ALL: [Tensor; 7] = [
        Tensor::OpenKeys,
        Tensor::OpenValues,
        Tensor::OpenWeights,
        Tensor::Sums,
        Tensor::SumsLow,
        Tensor::Z,
        Tensor::ZLow,
    ];

    /// Those of a state of `T`.
    fn of<T: Real>() -> impl Iterator<Item = Tensor> {
        Self::ALL
            .into_iter()
            .filter(|tensor| T::COMPENSATED || !matches!(tensor, Tensor::SumsLow | Tensor::ZLow))
    }

    fn name(self) -> &'static str {
        match self {
            Tensor::OpenKeys => "open_keys",
            Tensor::OpenValues => "open_values",
            Tensor::OpenWeights => "open_weights",
            Tensor::Sums => "sums",
            Tensor::SumsLow => "sums_low",
            Tensor::Z => "z",
            Tensor::ZLow => "z_low",
        }
    }

    fn shape(self, spec: &Spec, features: usize, [sequences, heads]: [usize; 2]) -> Vec<usize> {
        let rest: &[usize] = match self {
            Tensor::OpenKeys => &[spec.block(), spec.d_key()],
            Tensor::OpenValues => &[spec.block(), spec.d_value()],
            Tensor::OpenWeights => &[spec.block()],
            Tensor::Sums | Tensor::SumsLow => &[features, spec.d_value()],
            Tensor::Z | Tensor::ZLow => &[features],
        };
        [&[sequences, heads], rest].concat()
    }
}

fn dtype<T: Real>() -> Dtype {
    if size_of::<T>() == 8 { Dtype::F64 } else { Dtype::F32 }
}

/// The beginning of text from a file, fit for a message.
fn short(text: &str) -> String {
    text.chars().take(70).flat_map(char::escape_debug).collect()
}

/// JSON of something that always has one.
fn json(value: &(impl Serialize + ?Sized)) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// The digest in the making.
struct Digester(Sha256);

impl Digester {
    /// Begins with the metadata, which comes in ascending order and without the digest.
    fn new<'a>(metadata: impl Iterator<Item = (&'a str, &'a str)>) -> Self {
        let mut digest = Digester(Sha256::new());
        for (key, value) in metadata {
            digest.string(key);
            digest.string(value);
        }
        digest
    }

    fn number(&mut self, number: usize) {
        self.0.update((number as u64).to_le_bytes());
    }

    fn string(&mut self, string: &str) {
        self.number(string.len());
        self.0.update(string);
    }

    /// What comes before a tensor's data.
    fn tensor(&mut self, name: &str, dtype: &str, shape: &[usize], bytes: usize) {
        self.string(name);
        self.string(dtype);
        self.number(shape.len());
        shape.iter().for_each(|&dim| self.number(dim));
        self.number(bytes);
    }

    fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
