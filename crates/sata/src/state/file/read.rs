//! Reading a state: nothing is believed that was not checked.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use sha2::{Digest, Sha256};

use super::{
    BASIS, CHUNK, Digester, ENTRIES, FORMAT, MAX_HEADER, Tensor, VERSION, dtype, short, sinks_seen,
};
use crate::basis::{Basis, features};
use crate::state::{
    Centre, HeadState, Raw, bytes_needed, capacity, check_centre, check_layout, is_place,
};
use crate::{Error, Plan, Real, Series, Spec, State};

impl<T: Real> State<T> {
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
                    return Err(no(format!(
                        "is a state of version {version}, made by an older program; this one reads version {VERSION}"
                    )));
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
            Series::Hermite { .. } => spec.terms().max(3) == orders.len(),
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
    fn counts(&self, spec: &Spec) -> Result<Vec<(u64, usize)>, Error> {
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
            let room = capacity(spec);
            if !is_place(spec, position, open) {
                return Err(self.no(format!(
                    "its sequence {sequence} has position {position} and {open} open tokens, with blocks of {} and room for {room}",
                    spec.block()
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
        let centred = self.tensors.contains_key(Tensor::CentreKeys.name());
        for tensor in Tensor::of::<T>(spec, centred) {
            let name = tensor.name();
            let info = self.tensors.get(name);
            let info = info.ok_or_else(|| self.no(format!("it lacks the tensor '{name}'")))?;
            let shape = tensor.shape(spec, features, [sequences, heads]);
            let dtype = tensor.dtype::<T>();
            if info.dtype != dtype || info.shape != shape || heads == 0 {
                return Err(self.no(format!(
                    "its tensor '{name}' is {} {:?}, and by its metadata must be {dtype} {shape:?}",
                    info.dtype, info.shape
                )));
            }
        }
        let known =
            |name: &String| Tensor::of::<T>(spec, centred).any(|tensor| tensor.name() == name);
        if let Some(name) = self.tensors.keys().find(|name| !known(name)) {
            return Err(self.no(format!("it has an unknown tensor '{}'", short(name))));
        }
        Ok(heads)
    }

    fn build<T: Real>(&mut self, plan: &Plan) -> Result<State<T>, Error> {
        let spec = self.spec()?;
        let counts = self.counts(&spec)?;
        let heads = self.check_tensors::<T>(&spec, counts.len())?;
        check_layout(&spec, plan.spec(), false)?;
        let centred = self.tensors.contains_key(Tensor::CentreKeys.name());
        check_centre(centred, &spec).map_err(|error| self.no(error.to_string()))?;
        // The shapes have been found to be as large as the file is long; what is made of them
        // must not be out of proportion, and must fit in memory.
        let orders = spec.orders();
        let room = [capacity(&spec), spec.sinks()];
        let total = features(spec.d_key(), &orders);
        let bytes = bytes_needed::<T>(&spec, counts.len(), heads, room)
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
        let mut state = State::empty(spec, basis, counts.len(), heads, room);
        if self.tensors.contains_key(Tensor::CentreKeys.name()) {
            let [keys, values] =
                [state.spec.d_key(), state.spec.d_value()].map(|d| vec![0.0; heads * d]);
            state.centre = Some(Arc::new(Centre { kv_heads: heads, keys, values }));
        }
        for (sequence, (position, open)) in state.sequences.iter_mut().zip(counts) {
            sequence.position = position;
            sequence.open = open;
        }
        let mut digest = self.digester();
        for (tensor, shape, bytes) in state.tensors() {
            digest.tensor(tensor.name(), &tensor.dtype::<T>().to_string(), &shape, bytes);
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
                    "its tensor '{}' holds what cannot be, or is not 0 beyond its tokens",
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

    fn one(&mut self) -> io::Result<f64> {
        let mut x = [0.0];
        self.get(&mut x)?;
        Ok(x[0])
    }

    /// The first `count` of `room` rows of `width`; whether the others are 0.
    fn padded<T: Real>(
        &mut self,
        to: &mut [T],
        width: usize,
        [count, room]: [usize; 2],
    ) -> io::Result<bool> {
        self.get(&mut to[..count * width])?;
        self.zeros::<T>((room - count) * width)
    }

    /// The same into transposed keys.
    fn keys<T: Real>(
        &mut self,
        raw: &mut Raw<T>,
        d_key: usize,
        [count, room]: [usize; 2],
    ) -> io::Result<bool> {
        let ld = raw.ld;
        self.each(count * d_key, |i, x| raw.keys[i % d_key * ld + i / d_key] = x)?;
        self.zeros::<T>((room - count) * d_key)
    }

    /// Whether `count` numbers are all 0.
    fn zeros<T: Real>(&mut self, count: usize) -> io::Result<bool> {
        let mut zero = true;
        self.each(count, |_, x: T| zero &= x.bits() == 0)?;
        Ok(zero)
    }
}

/// Reads one tensor; false when it holds something where there is no token, or no such thing.
fn fill<T: Real, R: Read>(
    state: &mut State<T>,
    tensor: Tensor,
    numbers: &mut In<'_, R>,
) -> io::Result<bool> {
    let (d_key, d_value) = (state.spec.d_key(), state.spec.d_value());
    let features = state.basis.len();
    let [room, spec_sinks] = [capacity(&state.spec), state.spec.sinks()];
    if let (Tensor::CentreKeys | Tensor::CentreValues, Some(centre)) = (tensor, &mut state.centre) {
        let centre = Arc::make_mut(centre);
        let keys = tensor == Tensor::CentreKeys;
        let to = if keys { &mut centre.keys } else { &mut centre.values };
        numbers.get(to)?;
        return Ok(to.iter().all(|x| x.is_finite()));
    }
    let mut clean = true;
    for sequence in &mut state.sequences {
        let open = [sequence.open, room];
        let seen = [sinks_seen(&state.spec, sequence.position), spec_sinks];
        for HeadState { sums, mark, open: raw, sinks, reach, .. } in &mut sequence.heads {
            // At most 0 and finite.
            let is_log = |x: &f64| *x <= 0.0 && x.is_finite();
            match tensor {
                Tensor::CentreKeys | Tensor::CentreValues => {}
                Tensor::Counts => {
                    let count = numbers.one()?;
                    clean &=
                        count >= 0.0 && count <= sequence.position as f64 && count.fract() == 0.0;
                    mark.count = count as u64;
                }
                Tensor::Lags => {
                    mark.lag = numbers.one()?;
                    clean &= is_log(&mark.lag);
                }
                Tensor::Totals => {
                    mark.total = numbers.one()?;
                    clean &= is_log(&mark.total);
                }
                Tensor::Reaches => {
                    *reach = numbers.one()?;
                    clean &= *reach >= 0.0;
                }
                Tensor::OpenFading => {
                    clean &= numbers.padded(&mut raw.fading, 1, open)?;
                    clean &= raw.fading.iter().all(is_log);
                }
                Tensor::OpenKeys => clean &= numbers.keys(raw, d_key, open)?,
                Tensor::OpenValues => clean &= numbers.padded(&mut raw.values, d_value, open)?,
                Tensor::OpenWeights => {
                    let weights = &mut raw.keys[d_key * raw.ld..];
                    clean &= numbers.padded(weights, 1, open)?;
                    let folded = sequence.position - open[0] as u64;
                    let sinks = (spec_sinks as u64).saturating_sub(folded);
                    clean &= (0..open[0]).all(|i| {
                        raw.is_sound(d_key, i) && (i as u64 >= sinks || !raw.is_live(d_key, i))
                    });
                }
                Tensor::SinkFading => {
                    clean &= numbers.padded(&mut sinks.fading, 1, seen)?;
                    clean &= sinks.fading.iter().all(is_log);
                }
                Tensor::SinkKeys => clean &= numbers.keys(sinks, d_key, seen)?,
                Tensor::SinkValues => clean &= numbers.padded(&mut sinks.values, d_value, seen)?,
                Tensor::SinkWeights => {
                    let weights = &mut sinks.keys[d_key * sinks.ld..];
                    clean &= numbers.padded(weights, 1, seen)?;
                    clean &= (0..seen[0]).all(|i| sinks.is_sound(d_key, i));
                }
                Tensor::Sums => {
                    numbers.get(&mut sums.sums[..features * d_value])?;
                    clean &= mark.count > 0 || sums.sums.iter().all(|&x| x == T::ZERO);
                }
                Tensor::SumsLow => numbers.get(&mut sums.sums_low[..features * d_value])?,
                Tensor::Z => {
                    numbers.get(&mut sums.z[..features])?;
                    clean &= mark.count > 0 || sums.z.iter().all(|&x| x == T::ZERO);
                }
                Tensor::ZLow => numbers.get(&mut sums.z_low[..features])?,
            }
        }
    }
    Ok(clean)
}
