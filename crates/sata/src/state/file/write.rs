//! Writing a state.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use safetensors::tensor::TensorInfo;
use serde::Serialize;

use super::replace::replace;
use super::{BASIS, CHUNK, Digester, FORMAT, Tensor, VERSION, dtype, json};
use crate::state::HeadState;
use crate::{Error, Real, State};

impl<T: Real> State<T> {
    /// Writes the state to a file of safetensors, from which [`State::load`] reads the same
    /// state, bit for bit.
    ///
    /// It is written aside, brought to disk and renamed: whatever happens, `path` holds either
    /// what it held before or all of the new state.
    ///
    /// # Errors
    /// [`Error::Io`] naming what the system refused, [`Error::File`] when `path` is there and not
    /// a file; nothing is left behind then.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let head = self.head();
        replace(path.as_ref(), |file| {
            file.write_all(&head)?;
            self.data(file)
        })
    }

    /// What [`State::save`] writes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.head();
        bytes.reserve_exact(self.tensors().iter().map(|&(_, _, bytes)| bytes).sum());
        // A vector takes whatever is written.
        let _ = self.data(&mut bytes);
        bytes
    }

    /// The tensors, and how many bytes each has.
    pub(super) fn tensors(&self) -> Vec<(Tensor, Vec<usize>, usize)> {
        let counts = [self.sequences.len(), self.kv_heads];
        Tensor::of::<T>()
            .map(|tensor| {
                let shape = tensor.shape(&self.spec, self.basis.len(), counts);
                let bytes = shape.iter().product::<usize>() * size_of::<T>();
                (tensor, shape, bytes)
            })
            .collect()
    }

    /// The file up to the tensors' data.
    fn head(&self) -> Vec<u8> {
        let positions: Vec<u64> = self.sequences.iter().map(|s| s.position).collect();
        let open: Vec<usize> = self.sequences.iter().map(|s| s.open).collect();
        let mut metadata = BTreeMap::from([
            ("format", FORMAT.to_string()),
            ("version", VERSION.to_string()),
            ("spec", json(&self.spec)),
            ("orders", json(self.basis.orders())),
            ("basis", BASIS.to_string()),
            ("positions", json(&positions)),
            ("open", json(&open)),
        ]);
        let mut digest = Digester::new(metadata.iter().map(|(&key, value)| (key, value.as_str())));
        let mut tensors = BTreeMap::new();
        let mut at = 0;
        for (tensor, shape, bytes) in self.tensors() {
            digest.tensor(tensor.name(), T::NAME, &shape, bytes);
            // The digest takes whatever is written.
            let _ = self.tensor(tensor, &mut digest.0);
            let info = TensorInfo { dtype: dtype::<T>(), shape, data_offsets: (at, at + bytes) };
            tensors.insert(tensor.name(), info);
            at += bytes;
        }
        metadata.insert("digest", digest.finish());
        let mut header = json(&Header { metadata, tensors }).into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut head = (header.len() as u64).to_le_bytes().to_vec();
        head.append(&mut header);
        head
    }

    /// The tensors' data.
    fn data(&self, to: &mut dyn Write) -> io::Result<()> {
        Tensor::of::<T>().try_for_each(|tensor| self.tensor(tensor, to))
    }

    /// One tensor's data.
    fn tensor(&self, tensor: Tensor, to: &mut dyn Write) -> io::Result<()> {
        let mut out = Out { bytes: Vec::with_capacity(CHUNK + 8), to };
        let d_value = self.spec.d_value();
        let features = self.basis.len();
        for sequence in &self.sequences {
            let unused = self.spec.block() - sequence.open;
            for HeadState { sums, open, .. } in &sequence.heads {
                match tensor {
                    Tensor::OpenKeys => {
                        for t in 0..sequence.open {
                            for channel in 0..self.spec.d_key() {
                                out.put(&open.keys[channel * open.ld + t..][..1])?;
                            }
                        }
                        out.zeros::<T>(unused * self.spec.d_key())?;
                    }
                    Tensor::OpenValues => {
                        out.put(&open.values[..sequence.open * d_value])?;
                        out.zeros::<T>(unused * d_value)?;
                    }
                    Tensor::OpenWeights => {
                        out.put(&open.keys[self.spec.d_key() * open.ld..][..sequence.open])?;
                        out.zeros::<T>(unused)?;
                    }
                    Tensor::Sums => out.put(&sums.sums[..features * d_value])?,
                    Tensor::SumsLow => out.put(&sums.sums_low[..features * d_value])?,
                    Tensor::Z => out.put(&sums.z[..features])?,
                    Tensor::ZLow => out.put(&sums.z_low[..features])?,
                }
            }
        }
        out.flush()
    }
}

#[derive(Serialize)]
struct Header<'a> {
    #[serde(rename = "__metadata__")]
    metadata: BTreeMap<&'a str, String>,
    #[serde(flatten)]
    tensors: BTreeMap<&'a str, TensorInfo>,
}

/// Numbers on their way out.
struct Out<'w> {
    bytes: Vec<u8>,
    to: &'w mut dyn Write,
}

impl Out<'_> {
    fn put<T: Real>(&mut self, numbers: &[T]) -> io::Result<()> {
        for part in numbers.chunks(CHUNK / size_of::<T>()) {
            for x in part {
                self.bytes.extend_from_slice(&x.bits().to_le_bytes()[..size_of::<T>()]);
            }
            if self.bytes.len() >= CHUNK {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn zeros<T: Real>(&mut self, count: usize) -> io::Result<()> {
        (0..count).try_for_each(|_| self.put(&[T::ZERO]))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.write_all(&self.bytes)?;
        self.bytes.clear();
        Ok(())
    }
}
