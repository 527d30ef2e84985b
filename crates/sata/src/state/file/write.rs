//! Writing a state.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use safetensors::tensor::TensorInfo;
use serde::Serialize;

use super::replace::replace;
use super::{BASIS, CHUNK, Digester, FORMAT, Tensor, VERSION, json, sinks_seen};
use crate::state::{HeadState, Raw, capacity};
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
        self.kinds()
            .map(|tensor| {
                let shape = tensor.shape(&self.spec, self.basis.len(), counts);
                let width = if tensor.is_double() { 8 } else { size_of::<T>() };
                let bytes = shape.iter().product::<usize>() * width;
                (tensor, shape, bytes)
            })
            .collect()
    }

    fn kinds(&self) -> impl Iterator<Item = Tensor> + use<T> {
        Tensor::of::<T>(&self.spec, self.centre.is_some())
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
            let dtype = tensor.dtype::<T>();
            digest.tensor(tensor.name(), &dtype.to_string(), &shape, bytes);
            // The digest takes whatever is written.
            let _ = self.tensor(tensor, &mut digest.0);
            let info = TensorInfo { dtype, shape, data_offsets: (at, at + bytes) };
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
        self.kinds().try_for_each(|tensor| self.tensor(tensor, to))
    }

    /// One tensor's data.
    fn tensor(&self, tensor: Tensor, to: &mut dyn Write) -> io::Result<()> {
        let mut out = Out { bytes: Vec::with_capacity(CHUNK + 8), to };
        let (d_key, d_value) = (self.spec.d_key(), self.spec.d_value());
        let features = self.basis.len();
        if let (Tensor::CentreKeys | Tensor::CentreValues, Some(centre)) = (tensor, &self.centre) {
            let keys = tensor == Tensor::CentreKeys;
            out.put(if keys { &centre.keys } else { &centre.values })?;
            return out.flush();
        }
        let [room, sinks] = [capacity(&self.spec), self.spec.sinks()];
        for sequence in &self.sequences {
            let open = [sequence.open, room];
            let seen = [sinks_seen(&self.spec, sequence.position), sinks];
            for HeadState { sums, mark, open: raw, sinks, reach, .. } in &sequence.heads {
                match tensor {
                    Tensor::CentreKeys | Tensor::CentreValues => {}
                    Tensor::Counts => out.put(&[mark.count as f64])?,
                    Tensor::Lags => out.put(&[mark.lag])?,
                    Tensor::Totals => out.put(&[mark.total])?,
                    Tensor::Reaches => out.put(&[*reach])?,
                    Tensor::OpenFading => out.padded(&raw.fading, 1, open)?,
                    Tensor::OpenKeys => out.keys(raw, d_key, open)?,
                    Tensor::OpenValues => out.padded(&raw.values, d_value, open)?,
                    Tensor::OpenWeights => out.padded(&raw.keys[d_key * raw.ld..], 1, open)?,
                    Tensor::SinkFading => out.padded(&sinks.fading, 1, seen)?,
                    Tensor::SinkKeys => out.keys(sinks, d_key, seen)?,
                    Tensor::SinkValues => out.padded(&sinks.values, d_value, seen)?,
                    Tensor::SinkWeights => out.padded(&sinks.keys[d_key * sinks.ld..], 1, seen)?,
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

    /// The first `count` of rows of `width`, and zeros up to `room` rows.
    fn padded<T: Real>(
        &mut self,
        rows: &[T],
        width: usize,
        [count, room]: [usize; 2],
    ) -> io::Result<()> {
        self.put(&rows[..count * width])?;
        self.zeros::<T>((room - count) * width)
    }

    /// The same with transposed keys.
    fn keys<T: Real>(
        &mut self,
        raw: &Raw<T>,
        d_key: usize,
        [count, room]: [usize; 2],
    ) -> io::Result<()> {
        for t in 0..count {
            for channel in 0..d_key {
                self.put(&raw.keys[channel * raw.ld + t..][..1])?;
            }
        }
        self.zeros::<T>((room - count) * d_key)
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
