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

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Cursor, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{HeadState, MAX_POSITION, State, bytes_needed, check_layout};
use crate::basis::{Basis, features};
use crate::{Error, Plan, Real, Series, Spec};

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

    /// Reads a state that serves `plan`: one of its sizes that holds its orders, and perhaps more.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read; [`Error::File`] when it is no such file, of a
    /// newer version, truncated or altered; [`Error::State`] naming the field in which it does not
    /// fit the plan; [`Error::TooLarge`] when it does not fit in memory.
    pub fn load(plan: &Plan, path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let met = fs::metadata(path).map_err(|e| Error::io(path, "looking for it", e))?;
        if !met.is_file() {
            return Err(Error::file(path, "is not a file"));
        }
        let file = File::open(path).map_err(|e| Error::io(path, "opening it", e))?;
        let met = file.metadata().map_err(|e| Error::io(path, "asking for its length", e))?;
        StateFile::open(file, met.len(), path)?.state(plan)
    }

    /// Reads a state from the bytes of a file; errors name it `name`.
    ///
    /// # Errors
    /// As for [`State::load`].
    pub fn from_bytes(plan: &Plan, bytes: &[u8], name: impl AsRef<Path>) -> Result<Self, Error> {
        StateFile::open(Cursor::new(bytes), bytes.len() as u64, name.as_ref())?.state(plan)
    }

    /// The tensors, and how many bytes each has.
    fn tensors(&self) -> Vec<(Tensor, Vec<usize>, usize)> {
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

#[derive(Serialize)]
struct Header<'a> {
    #[serde(rename = "__metadata__")]
    metadata: BTreeMap<&'a str, String>,
    #[serde(flatten)]
    tensors: BTreeMap<&'a str, TensorInfo>,
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

/// Replaces the file at `path` by what `write` writes, all of it or nothing.
fn replace(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), Error> {
    let io = |doing| move |e| Error::io(path, doing, e);
    // A link stays a link.
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let old = fs::metadata(&target).ok();
    if old.as_ref().is_some_and(|old| !old.is_file()) {
        return Err(Error::file(path, "is there and not a file"));
    }
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut aside = tempfile::Builder::new();
    aside.prefix(".sata-state-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Less what the user's mask says, as for any new file.
        aside.permissions(fs::Permissions::from_mode(0o666));
    }
    let mut file = aside.tempfile_in(folder).map_err(io("making a file beside it"))?;
    write(file.as_file_mut()).map_err(io("writing a file beside it"))?;
    if let Some(old) = old {
        // As far as the user may: the file is none the worse without.
        let _ = file.as_file().set_permissions(old.permissions());
    }
    file.as_file().sync_all().map_err(io("bringing a file beside it to disk"))?;
    file.persist(&target).map_err(|e| Error::io(path, "renaming a file to it", e.error))?;
    // The new name itself survives a loss of power only once the folder is on disk; not every
    // system can do that, and the file is good either way.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}

/// A file whose header has been read.
struct StateFile<R> {
    reader: R,
    len: u64,
    path: PathBuf,
    /// Where the tensors' data begin.
    data: u64,
    entries: BTreeMap<String, String>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl<R: Read + Seek> StateFile<R> {
    /// Reads the header: a safetensors file of the right format and version.
    fn open(mut reader: R, len: u64, path: &Path) -> Result<Self, Error> {
        let no = |reason: String| Error::file(path, reason);
        let io = |e| Error::io(path, "reading its header", e);
        if len < 8 {
            return Err(no(format!("has {len} bytes: not a safetensors file")));
        }
        let mut size = [0; 8];
        reader.read_exact(&mut size).map_err(io)?;
        let size = u64::from_le_bytes(size);
        if size > len - 8 {
            let reason = "truncated, or not a safetensors file";
            return Err(no(format!(
                "its header claims {size} bytes of the file's {len}: {reason}"
            )));
        }
        if size > MAX_HEADER {
            let reason = "not a state, or more sequences than a file is read for";
            return Err(no(format!(
                "its header has {size} bytes of at most {MAX_HEADER}: {reason}"
            )));
        }
        let mut header = vec![0; size as usize];
        reader.read_exact(&mut header).map_err(io)?;
        let body = header.trim_ascii_end();
        if !body.starts_with(b"{") || header[body.len()..].iter().any(|&byte| byte != b' ') {
            return Err(no("not a safetensors file: its header is no JSON object".into()));
        }
        let header: Metadata = serde_json::from_slice(body)
            .map_err(|e| no(format!("not a safetensors file, or altered: {e}")))?;
        let data = 8 + size;
        let claimed = (data as u128) + header.data_len() as u128;
        if claimed != u128::from(len) {
            return Err(no(format!(
                "has {len} bytes, but its header describes {claimed}: truncated or altered"
            )));
        }
        let entries: BTreeMap<String, String> =
            header.metadata().clone().unwrap_or_default().into_iter().collect();
        let tensors =
            header.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        if entries.get("format").map(String::as_str) != Some(FORMAT) {
            return Err(no(format!(
                "is a safetensors file, but no state: its metadata lacks format = {FORMAT}"
            )));
        }
        match entries.get("version").map(|version| (version, version.parse::<u64>())) {
            Some((version, Ok(number))) if *version == number.to_string() => {
                if number > VERSION {
                    return Err(no(format!(
                        "is a state of version {number}, made by a newer program; this one reads version {VERSION}"
                    )));
                }
                if number < VERSION {
                    return Err(no(format!("has version {version}, which there never was")));
                }
            }
            other => {
                let version = other.map_or("missing", |(version, _)| version);
                return Err(no(format!("its version is '{}', not a number", short(version))));
            }
        }
        Ok(StateFile { reader, len, path: path.into(), data, entries, tensors })
    }

    fn no(&self, reason: impl Into<String>) -> Error {
        Error::file(&self.path, reason)
    }

    /// The state, if all is well with the file and it serves the plan.
    fn state<T: Real>(mut self, plan: &Plan) -> Result<State<T>, Error> {
        match self.build(plan) {
            Err(error @ (Error::State { .. } | Error::File { .. })) => {
                // What does not fit may be an altered file rather than another's.
                Err(self.altered().unwrap_or(error))
            }
            other => other,
        }
    }

    /// What is wrong with the digest, if anything is.
    fn altered(&mut self) -> Option<Error> {
        let stated = self.entries.get("digest").cloned();
        let mut digest = self.digester();
        let mut chunk = vec![0; CHUNK];
        for (name, info) in &self.tensors {
            let (from, to) = info.data_offsets;
            digest.tensor(name, &info.dtype.to_string(), &info.shape, to - from);
            self.reader.seek(SeekFrom::Start(self.data + from as u64)).ok()?;
            let mut left = to - from;
            while left > 0 {
                let part = &mut chunk[..left.min(CHUNK)];
                self.reader.read_exact(part).ok()?;
                digest.0.update(&*part);
                left -= part.len();
            }
        }
        let found = digest.finish();
        (stated.as_deref() != Some(found.as_str())).then(|| self.mismatch(&found))
    }

    fn mismatch(&self, found: &str) -> Error {
        let stated = self.entries.get("digest").map_or("missing", String::as_str);
        self.no(format!(
            "altered or damaged: its digest is {}, but its contents have {found}",
            short(stated)
        ))
    }

    fn digester(&self) -> Digester {
        let entries = self.entries.iter().filter(|(key, _)| *key != "digest");
        Digester::new(entries.map(|(key, value)| (key.as_str(), value.as_str())))
    }

    fn entry(&self, key: &str) -> Result<&str, Error> {
        let value = self.entries.get(key).map(String::as_str);
        value.ok_or_else(|| self.no(format!("its metadata lacks '{key}'")))
    }

    fn parsed<J: serde::de::DeserializeOwned>(&self, key: &str) -> Result<J, Error> {
        serde_json::from_str(self.entry(key)?).map_err(|e| self.no(format!("its '{key}': {e}")))
    }

    /// The spec, whose orders are known to be few enough to list.
    fn spec(&self) -> Result<Spec, Error> {
        if let Some(key) = self.entries.keys().find(|key| !ENTRIES.contains(&key.as_str())) {
            return Err(self.no(format!("its metadata has an unknown '{}'", short(key))));
        }
        let basis = self.entry("basis")?;
        if basis != BASIS {
            return Err(
                self.no(format!("its basis is '{}', which must be '{BASIS}'", short(basis)))
            );
        }
        let spec: Spec = self.parsed("spec")?;
        let orders: Vec<usize> = self.parsed("orders")?;
        // Those of most series are as many as its terms: compare before listing them.
        let few = match spec.series() {
            Series::Fixed { .. } | Series::Power { .. } => true,
            _ => spec.terms() == orders.len(),
        };
        if !few || spec.orders() != orders {
            return Err(self.no(format!(
                "its orders begin {:?}, which are not those of its {} terms",
                &orders[..orders.len().min(8)],
                spec.terms()
            )));
        }
        Ok(spec)
    }

    /// Tokens seen and tokens open, per sequence.
    fn counts(&self, block: usize) -> Result<Vec<(u64, usize)>, Error> {
        let positions: Vec<u64> = self.parsed("positions")?;
        let open: Vec<usize> = self.parsed("open")?;
        if positions.is_empty() || positions.len() != open.len() {
            return Err(self.no(format!(
                "it has {} positions and {} counts of open tokens; both are one per sequence",
                positions.len(),
                open.len()
            )));
        }
        let counts: Vec<(u64, usize)> = positions.into_iter().zip(open).collect();
        for (sequence, &(position, open)) in counts.iter().enumerate() {
            if open >= block || open as u64 > position || position > MAX_POSITION {
                return Err(self.no(format!(
                    "its sequence {sequence} has position {position} and {open} open tokens, with blocks of {block}"
                )));
            }
        }
        Ok(counts)
    }

    /// Checks every tensor's type and shape; gives the number of key/value heads.
    fn check_tensors<T: Real>(&self, spec: &Spec, sequences: usize) -> Result<usize, Error> {
        let sums = self.tensors.get(Tensor::Sums.name());
        let sums = sums.ok_or_else(|| self.no("it lacks the tensor 'sums'"))?;
        if sums.dtype != dtype::<T>() && matches!(sums.dtype, Dtype::F32 | Dtype::F64) {
            return Err(Error::State {
                field: "dtype",
                state: sums.dtype.to_string(),
                call: T::NAME.into(),
            });
        }
        let heads = sums.shape.get(1).copied().unwrap_or(0);
        let features =
            usize::try_from(features(spec.d_key(), &spec.orders())).unwrap_or(usize::MAX);
        for tensor in Tensor::of::<T>() {
            let name = tensor.name();
            let info = self.tensors.get(name);
            let info = info.ok_or_else(|| self.no(format!("it lacks the tensor '{name}'")))?;
            let shape = tensor.shape(spec, features, [sequences, heads]);
            if info.dtype != dtype::<T>() || info.shape != shape || heads == 0 {
                return Err(self.no(format!(
                    "its tensor '{name}' is {} {:?}, and by its metadata must be {} {shape:?}",
                    info.dtype,
                    info.shape,
                    T::NAME
                )));
            }
        }
        let known = |name: &String| Tensor::of::<T>().any(|tensor| tensor.name() == name);
        if let Some(name) = self.tensors.keys().find(|name| !known(name)) {
            return Err(self.no(format!("it has an unknown tensor '{}'", short(name))));
        }
        Ok(heads)
    }

    fn build<T: Real>(&mut self, plan: &Plan) -> Result<State<T>, Error> {
        let spec = self.spec()?;
        let counts = self.counts(spec.block())?;
        let heads = self.check_tensors::<T>(&spec, counts.len())?;
        check_layout(&spec, plan.spec(), false)?;
        // The shapes have been found to be as large as the file is long; what is made of them
        // must not be out of proportion, and must fit in memory.
        let orders = spec.orders();
        let total = features(spec.d_key(), &orders);
        let bytes = bytes_needed::<T>(&spec, counts.len(), heads)
            .saturating_add(total.saturating_mul(24 + 4 * spec.terms() as u128));
        if bytes > (1 << 26) + 256 * u128::from(self.len) {
            return Err(self.no(format!(
                "its {} bytes would take {bytes} bytes of memory to serve {} terms",
                self.len,
                spec.terms()
            )));
        }
        crate::memory::check(spec.d_key(), &orders, total, "the state", bytes)?;
        let basis = if orders == plan.spec().orders() {
            plan.basis()?
        } else {
            Arc::new(Basis::new(spec.d_key(), &orders)?)
        };
        let mut state = State::empty(spec, basis, counts.len(), heads);
        for (sequence, (position, open)) in state.sequences.iter_mut().zip(counts) {
            sequence.position = position;
            sequence.open = open;
        }
        let mut digest = self.digester();
        for (tensor, shape, bytes) in state.tensors() {
            digest.tensor(tensor.name(), T::NAME, &shape, bytes);
            let Some(info) = self.tensors.get(tensor.name()) else {
                continue;
            };
            let at = self.data + info.data_offsets.0 as u64;
            let io = |e| Error::io(&self.path, "reading it", e);
            self.reader.seek(SeekFrom::Start(at)).map_err(io)?;
            let mut numbers =
                In { reader: &mut self.reader, digest: &mut digest.0, bytes: vec![0; CHUNK] };
            let clean = fill(&mut state, tensor, &mut numbers).map_err(io)?;
            if !clean {
                return Err(self.no(format!(
                    "its tensor '{}' is not 0 beyond the open tokens",
                    tensor.name()
                )));
            }
        }
        let found = digest.finish();
        if self.entry("digest")? != found {
            return Err(self.mismatch(&found));
        }
        Ok(state)
    }
}

/// Numbers on their way in.
struct In<'r, R> {
    reader: &'r mut R,
    digest: &'r mut Sha256,
    bytes: Vec<u8>,
}

impl<R: Read> In<'_, R> {
    /// Hands `count` numbers to `take`, with their indices.
    fn each<T: Real>(&mut self, count: usize, mut take: impl FnMut(usize, T)) -> io::Result<()> {
        let width = size_of::<T>();
        let mut done = 0;
        while done < count {
            let n = (count - done).min(CHUNK / width);
            let bytes = &mut self.bytes[..n * width];
            self.reader.read_exact(bytes)?;
            self.digest.update(&*bytes);
            for (i, bytes) in bytes.chunks_exact(width).enumerate() {
                let mut bits = [0; 8];
                bits[..width].copy_from_slice(bytes);
                take(done + i, T::of_bits(u64::from_le_bytes(bits)));
            }
            done += n;
        }
        Ok(())
    }

    fn get<T: Real>(&mut self, to: &mut [T]) -> io::Result<()> {
        self.each(to.len(), |i, x| to[i] = x)
    }

    /// Whether `count` numbers are all 0.
    fn zeros<T: Real>(&mut self, count: usize) -> io::Result<bool> {
        let mut zero = true;
        self.each(count, |_, x: T| zero &= x.bits() == 0)?;
        Ok(zero)
    }
}

/// Reads one tensor; false when it holds something where there is no token.
fn fill<T: Real, R: Read>(
    state: &mut State<T>,
    tensor: Tensor,
    numbers: &mut In<'_, R>,
) -> io::Result<bool> {
    let (d_key, d_value) = (state.spec.d_key(), state.spec.d_value());
    let features = state.basis.len();
    let mut clean = true;
    for sequence in &mut state.sequences {
        let count = sequence.open;
        let unused = state.spec.block() - count;
        for HeadState { sums, open, .. } in &mut sequence.heads {
            match tensor {
                Tensor::OpenKeys => {
                    let ld = open.ld;
                    numbers
                        .each(count * d_key, |i, x| open.keys[i % d_key * ld + i / d_key] = x)?;
                    clean &= numbers.zeros::<T>(unused * d_key)?;
                }
                Tensor::OpenValues => {
                    numbers.get(&mut open.values[..count * d_value])?;
                    clean &= numbers.zeros::<T>(unused * d_value)?;
                }
                Tensor::OpenWeights => {
                    numbers.get(&mut open.keys[d_key * open.ld..][..count])?;
                    clean &= numbers.zeros::<T>(unused)?;
                }
                Tensor::Sums => numbers.get(&mut sums.sums[..features * d_value])?,
                Tensor::SumsLow => numbers.get(&mut sums.sums_low[..features * d_value])?,
                Tensor::Z => numbers.get(&mut sums.z[..features])?,
                Tensor::ZLow => numbers.get(&mut sums.z_low[..features])?,
            }
        }
    }
    Ok(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names of what is in a folder.
    fn names(folder: &Path) -> Vec<std::ffi::OsString> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn a_write_that_fails_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("past");
        fs::write(&path, "old").unwrap();
        let full = |file: &mut File| {
            file.write_all(b"half of the ne")?;
            Err(io::ErrorKind::StorageFull.into())
        };
        let error = replace(&path, full).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("past: writing a file beside it"), "{text}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["past"]);

        // So does a program that ends in the middle of it.
        let ended = std::panic::catch_unwind(|| replace(&path, |_| panic!("in the middle")));
        assert!(ended.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["past"]);

        replace(&path, |file| file.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["past"]);
    }

    #[test]
    fn a_name_alone_is_a_file_of_the_working_folder() {
        let name = format!("state-{}.tmp", std::process::id());
        replace(Path::new(&name), |file| file.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&name).unwrap(), b"new");
        fs::remove_file(&name).unwrap();
    }
}
