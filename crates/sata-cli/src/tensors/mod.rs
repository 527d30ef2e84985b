//! Tensors in files: safetensors and `.npy`, read into typed arrays.

mod check;
mod npy;
mod safe;

use std::path::Path;

use half::{bf16, f16};

pub use check::{check_numbers, check_shapes};
pub use npy::{read_npy, write_npy};
pub use safe::{SafeFile, encode};

use crate::failure::{Failure, Outcome};

/// Numbers of one of the types that files hold.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// IEEE half.
    F16(Vec<f16>),
    /// bfloat16.
    Bf16(Vec<bf16>),
    /// Single.
    F32(Vec<f32>),
    /// Double.
    F64(Vec<f64>),
}

/// A number type, by the name that safetensors gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// Single.
    F32,
    /// Double.
    F64,
}

impl Dtype {
    /// As safetensors writes it.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
            Dtype::F32 => "F32",
            Dtype::F64 => "F64",
        }
    }
}

/// Numbers and their shape, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Sizes.
    pub shape: Vec<usize>,
    /// Numbers, as many as the sizes say.
    pub data: Data,
}

/// A number that tensors hold and attention runs on.
pub trait Number: sata::Element {
    /// All numbers of a tensor as this type, rounded to nearest where it is narrower.
    fn take(data: &Data) -> Vec<Self>;
    /// Wraps numbers of this type.
    fn wrap(data: Vec<Self>) -> Data;
}

/// Converts through f64, which holds every narrower number exactly.
macro_rules! number {
    ($type:ty, $variant:ident, $from_f64:expr) => {
        impl Number for $type {
            fn take(data: &Data) -> Vec<Self> {
                match data {
                    Data::$variant(x) => x.clone(),
                    other => other.to_f64().into_iter().map($from_f64).collect(),
                }
            }
            fn wrap(data: Vec<Self>) -> Data {
                Data::$variant(data)
            }
        }
    };
}

number!(f16, F16, f16::from_f64);
number!(bf16, Bf16, bf16::from_f64);
number!(f32, F32, |x| x as f32);
number!(f64, F64, |x| x);

impl Data {
    /// Its type.
    pub fn dtype(&self) -> Dtype {
        match self {
            Data::F16(_) => Dtype::F16,
            Data::Bf16(_) => Dtype::Bf16,
            Data::F32(_) => Dtype::F32,
            Data::F64(_) => Dtype::F64,
        }
    }

    /// All numbers in f64, exactly.
    pub fn to_f64(&self) -> Vec<f64> {
        match self {
            Data::F16(x) => x.iter().map(|x| x.to_f64()).collect(),
            Data::Bf16(x) => x.iter().map(|x| x.to_f64()).collect(),
            Data::F32(x) => x.iter().map(|&x| f64::from(x)).collect(),
            Data::F64(x) => x.clone(),
        }
    }

    /// Little-endian bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Data::F16(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::Bf16(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::F32(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::F64(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }

    /// Numbers of `dtype` in little-endian `bytes`, whose length is a multiple of the type's.
    pub fn from_bytes(dtype: Dtype, bytes: &[u8]) -> Self {
        match dtype {
            Dtype::F16 => Data::F16(words(bytes).map(f16::from_le_bytes).collect()),
            Dtype::Bf16 => Data::Bf16(words(bytes).map(bf16::from_le_bytes).collect()),
            Dtype::F32 => Data::F32(words(bytes).map(f32::from_le_bytes).collect()),
            Dtype::F64 => Data::F64(words(bytes).map(f64::from_le_bytes).collect()),
        }
    }
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    let (words, _) = bytes.as_chunks::<N>();
    words.iter().copied()
}

impl Tensor {
    /// `[batch, heads, tokens, dim]`, with a batch of 1 where the file has `[heads, tokens, dim]`.
    ///
    /// # Errors
    /// When it has neither three nor four sizes.
    pub fn shape4(&self, argument: &str) -> Outcome<[usize; 4]> {
        match self.shape[..] {
            [heads, tokens, dim] => Ok([1, heads, tokens, dim]),
            [batch, heads, tokens, dim] => Ok([batch, heads, tokens, dim]),
            _ => Err(Failure::new(format!(
                "{argument} has shape {:?}, which has {} sizes, but it must be [heads, tokens, \
                 dim] or [batch, heads, tokens, dim]",
                self.shape,
                self.shape.len()
            ))),
        }
    }
}

/// A whole file.
///
/// # Errors
/// What the system says, with the path.
pub fn read_bytes(path: &Path) -> Outcome<Vec<u8>> {
    std::fs::read(path).map_err(|error| Failure::io(path, "reading", &error))
}
