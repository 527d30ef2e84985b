//! States as files.
//!
//! # The file, version 2
//!
//! A [safetensors](https://github.com/huggingface/safetensors) file, little-endian, that any
//! program can write and read from this description. Tensors are of the type of the sums, `F32` or
//! `F64`, but for those marked `F64`, which always are. With n sequences, h key/value heads, D
//! features, m sinks, blocks of B tokens, and C = B tokens in the open blocks, or (b + 1)·B with b
//! near blocks before a query's own:
//!
//! | tensor          | shape               | holds                                              |
//! |-----------------|---------------------|----------------------------------------------------|
//! | `centre_keys`   | `[h, d_key]`        | `F64`; with a centre: what was taken off all keys  |
//! | `centre_values` | `[h, d_value]`      | `F64`; likewise off all values                     |
//! | `counts`        | `[n, h]`            | `F64`; tokens summed: neither masked ones nor sinks|
//! | `lags`          | `[n, h]`            | `F64`; g at the last token folded less g at the last summed, to which sums are relative; at most 0 |
//! | `open_fading`   | `[n, h, C]`         | `F64`; with decay: each open token's own logarithm |
//! | `open_keys`     | `[n, h, C, d_key]`  | keys of the open tokens; 0 from `open` on          |
//! | `open_values`   | `[n, h, C, d_value]`| their values, likewise                             |
//! | `open_weights`  | `[n, h, C]`         | 1, or 0 for a masked token or a sink, likewise     |
//! | `reaches`       | `[n, h]`            | `F64`; the largest square of a stored key's length |
//! | `sink_fading`   | `[n, h, m]`         | `F64`; with sinks and decay: g since the start     |
//! | `sink_keys`     | `[n, h, m, d_key]`  | with sinks: their keys; 0 where there are none yet |
//! | `sink_values`   | `[n, h, m, d_value]`| likewise                                           |
//! | `sink_weights`  | `[n, h, m]`         | 1, or 0 for a masked token, likewise               |
//! | `sums`          | `[n, h, D, d_value]`| Σ Φ(k) vᵀ over the tokens summed, faded            |
//! | `sums_low`      | `[n, h, D, d_value]`| only with `F32`: what rounding took from `sums`    |
//! | `totals`        | `[n, h]`            | `F64`; g at the last token folded since the start  |
//! | `z`             | `[n, h, D]`         | Σ Φ(k) over the tokens summed, faded               |
//! | `z_low`         | `[n, h, D]`         | only with `F32`: what rounding took from `z`       |
//!
//! Keys and values are less the centre, where there is one. The key of a token of weight 0 is 0.
//!
//! The metadata has exactly these entries:
//!
//! | entry       | value                                                                          |
//! |-------------|--------------------------------------------------------------------------------|
//! | `format`    | `sata-state`                                                                   |
//! | `version`   | `2`                                                                            |
//! | `spec`      | the [`Spec`] as JSON                                                           |
//! | `orders`    | JSON array: the orders p whose features are held, ascending, those of the spec |
//! | `basis`     | `bare-lexicographic`                                                           |
//! | `positions` | JSON array: tokens each sequence has seen, at most 2⁶³ − 1                     |
//! | `open`      | JSON array: how many of them wait in its open blocks, less than C              |
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

use crate::state::capacity;
use crate::{Decay, Real, Spec};

const FORMAT: &str = "sata-state";
const VERSION: u64 = 2;
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
    CentreKeys,
    CentreValues,
    Counts,
    Lags,
    OpenFading,
    OpenKeys,
    OpenValues,
    OpenWeights,
    Reaches,
    SinkFading,
    SinkKeys,
    SinkValues,
    SinkWeights,
    Sums,
    SumsLow,
    Totals,
    Z,
    ZLow,
}

impl Tensor {
    const ALL: [Tensor; 18] = [
        Tensor::CentreKeys,
        Tensor::CentreValues,
        Tensor::Counts,
        Tensor::Lags,
        Tensor::OpenFading,
        Tensor::OpenKeys,
        Tensor::OpenValues,
        Tensor::OpenWeights,
        Tensor::Reaches,
        Tensor::SinkFading,
        Tensor::SinkKeys,
        Tensor::SinkValues,
        Tensor::SinkWeights,
        Tensor::Sums,
        Tensor::SumsLow,
        Tensor::Totals,
        Tensor::Z,
        Tensor::ZLow,
    ];

    /// Those of a state of `T`, perhaps with a centre.
    fn of<T: Real>(spec: &Spec, centred: bool) -> impl Iterator<Item = Tensor> + use<T> {
        let fades = spec.decay() != Decay::None;
        let sinks = spec.sinks() > 0;
        Self::ALL.into_iter().filter(move |tensor| match tensor {
            Tensor::SumsLow | Tensor::ZLow => T::COMPENSATED,
            Tensor::CentreKeys | Tensor::CentreValues => centred,
            Tensor::OpenFading => fades,
            Tensor::SinkFading => fades && sinks,
            Tensor::SinkKeys | Tensor::SinkValues | Tensor::SinkWeights => sinks,
            _ => true,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Tensor::CentreKeys => "centre_keys",
            Tensor::CentreValues => "centre_values",
            Tensor::Counts => "counts",
            Tensor::Lags => "lags",
            Tensor::OpenFading => "open_fading",
            Tensor::OpenKeys => "open_keys",
            Tensor::OpenValues => "open_values",
            Tensor::OpenWeights => "open_weights",
            Tensor::Reaches => "reaches",
            Tensor::SinkFading => "sink_fading",
            Tensor::SinkKeys => "sink_keys",
            Tensor::SinkValues => "sink_values",
            Tensor::SinkWeights => "sink_weights",
            Tensor::Sums => "sums",
            Tensor::SumsLow => "sums_low",
            Tensor::Totals => "totals",
            Tensor::Z => "z",
            Tensor::ZLow => "z_low",
        }
    }

    /// Whether it is `F64` in a state of any type.
    fn is_double(self) -> bool {
        matches!(
            self,
            Tensor::CentreKeys
                | Tensor::CentreValues
                | Tensor::Counts
                | Tensor::Lags
                | Tensor::OpenFading
                | Tensor::Reaches
                | Tensor::SinkFading
                | Tensor::Totals
        )
    }

    fn dtype<T: Real>(self) -> Dtype {
        if self.is_double() { Dtype::F64 } else { dtype::<T>() }
    }

    fn shape(self, spec: &Spec, features: usize, [sequences, heads]: [usize; 2]) -> Vec<usize> {
        let open = capacity(spec);
        let rest: &[usize] = match self {
            Tensor::CentreKeys => return vec![heads, spec.d_key()],
            Tensor::CentreValues => return vec![heads, spec.d_value()],
            Tensor::Counts | Tensor::Lags | Tensor::Reaches | Tensor::Totals => &[],
            Tensor::OpenKeys => &[open, spec.d_key()],
            Tensor::OpenValues => &[open, spec.d_value()],
            Tensor::OpenWeights | Tensor::OpenFading => &[open],
            Tensor::SinkKeys => &[spec.sinks(), spec.d_key()],
            Tensor::SinkValues => &[spec.sinks(), spec.d_value()],
            Tensor::SinkWeights | Tensor::SinkFading => &[spec.sinks()],
            Tensor::Sums | Tensor::SumsLow => &[features, spec.d_value()],
            Tensor::Z | Tensor::ZLow => &[features],
        };
        [&[sequences, heads], rest].concat()
    }
}

/// How many sinks of those that there is room for a sequence has.
fn sinks_seen(spec: &Spec, position: u64) -> usize {
    position.min(spec.sinks() as u64) as usize
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
