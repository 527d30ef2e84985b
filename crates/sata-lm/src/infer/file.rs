//! Sessions as files.
//!
//! # The file, version 1
//!
//! A [safetensors](https://github.com/huggingface/safetensors) file. Tensors, for a model of v
//! tokens and layers i, after t tokens:
//!
//! | tensor             | type, shape       | holds                                                |
//! |--------------------|-------------------|------------------------------------------------------|
//! | `logits`           | F32 `[v]`         | of the token that comes next; `[0]` before the first |
//! | `tail`             | U32 `[n]`         | the last tokens, 4096 at most                        |
//! | `unfinished`       | U8 `[n]`          | the beginning of a character, withheld so far        |
//! | `layers.i.state`   | U8 `[n]`          | the layer's state, as `sata` saves states            |
//! | `layers.i.keys`    | F32 `[h, t, d]`   | in its place for softmax: the KV cache               |
//! | `layers.i.values`  | F32 `[h, t, d]`   | likewise                                             |
//! | `layers.i.fading`  | F64 `[h, t]`      | likewise, with slopes or gates: Σ log of the decays  |
//!
//! Of a mixture each group g of heads has its own, `layers.i.groups.g.state` and so on.
//!
//! Metadata: `format` (`sata-session`), `version`, `model` and `config` (digests of those that it
//! belongs to), `position` (t), `sampling` (JSON), `seed` and `drawn` (the random numbers),
//! `troubles`, and `digest`: SHA-256, in hexadecimal, of all else. It is taken over the other
//! entries in ascending order of keys, then over the tensors in ascending order of names: each key,
//! value, name, `type shape` as text and contents is preceded by its length in bytes, 8 bytes
//! little-endian.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};

use super::Error;
use super::attention::{Memory, Past};
use super::cache::Cache;
use super::sample::{MAX_WINDOW, Random, Sampling};
use super::session::Session;
use super::weights::{Group, Weights, hex};
use crate::Position;

const FORMAT: &str = "sata-session";
const VERSION: &str = "1";

/// Name, type, shape, contents.
type Tensor<'a> = (String, Dtype, Vec<usize>, Cow<'a, [u8]>);

impl Session {
    /// Saves it: written aside, brought to disk and renamed, so that the file is the old one or the
    /// new one, whole.
    ///
    /// # Errors
    /// [`Error::Io`] with what the system says; an old file is then as it was.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        replace(path.as_ref(), &self.to_bytes())
    }

    /// The contents of the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let entries = [
            ("format", FORMAT.to_string()),
            ("version", VERSION.to_string()),
            ("model", self.weights.digest().to_string()),
            ("config", self.weights.config_digest().to_string()),
            ("position", self.position.to_string()),
            ("sampling", serde_json::to_string(&self.sampling).unwrap_or_default()),
            ("seed", self.random.seed.to_string()),
            ("drawn", self.random.drawn.to_string()),
            ("troubles", self.troubles.to_string()),
        ];
        let mut entries: BTreeMap<String, String> =
            entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
        let mut tensors = self.tensors();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let parts = tensors.iter().map(|(name, kind, shape, data)| {
            (name.as_str(), *kind, shape.as_slice(), data.as_ref())
        });
        let digest = digest(&entries, parts);
        entries.insert("digest".into(), digest);
        let views = tensors.iter().filter_map(|(name, kind, shape, data)| {
            Some((name, TensorView::new(*kind, shape.clone(), data).ok()?))
        });
        let entries: HashMap<String, String> = entries.into_iter().collect();
        // Shapes are those of the contents: nothing here can be refused.
        safetensors::serialize(views, Some(entries)).unwrap_or_default()
    }

    fn tensors(&self) -> Vec<Tensor<'_>> {
        let tail: Vec<u8> = self.tail.iter().flat_map(|x| x.to_le_bytes()).collect();
        let logits = f32s(&self.logits);
        let mut all: Vec<Tensor<'_>> = vec![
            ("logits".into(), Dtype::F32, vec![self.logits.len()], logits.into()),
            ("tail".into(), Dtype::U32, vec![self.tail.len()], tail.into()),
            (
                "unfinished".into(),
                Dtype::U8,
                vec![self.unfinished.len()],
                self.unfinished.as_slice().into(),
            ),
        ];
        for (i, past) in self.pasts.iter().enumerate() {
            for (g, memory) in past.0.iter().enumerate() {
                let name = |what: &str| name(&self.weights, [i, g], what);
                self.tensors_of(memory, name, &mut all);
            }
        }
        all
    }

    fn tensors_of(
        &self,
        memory: &Memory,
        name: impl Fn(&str) -> String,
        all: &mut Vec<Tensor<'_>>,
    ) {
        match memory {
            Memory::State(state) => {
                let bytes = state.to_bytes();
                all.push((name("state"), Dtype::U8, vec![bytes.len()], bytes.into()));
            }
            Memory::Cache(cache) => {
                let shape = vec![cache.heads.len(), cache.tokens, cache.d];
                let [keys, values] = cache.rows();
                all.push((name("keys"), Dtype::F32, shape.clone(), f32s(&keys).into()));
                all.push((name("values"), Dtype::F32, shape.clone(), f32s(&values).into()));
                if fades(&self.weights) {
                    let fading = cache.heads.iter().flat_map(|head| &head.fading);
                    let bytes: Vec<u8> = fading.flat_map(|x| x.to_le_bytes()).collect();
                    all.push((name("fading"), Dtype::F64, shape[..2].to_vec(), bytes.into()));
                }
            }
        }
    }

    /// Resumes a session of this model: it goes on exactly as the one that was saved.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for a file that is no session, cut short, altered, or of
    /// another model.
    pub fn load(path: impl AsRef<Path>, weights: &Arc<Weights>) -> Result<Self, Error> {
        let path = path.as_ref();
        let bytes = fs::read(path).map_err(|error| Error::io(path, "reading it", error))?;
        Self::from_bytes(&bytes, &path.display().to_string(), weights)
    }

    /// The same from the contents of the file; `name` is its name in errors.
    ///
    /// # Errors
    /// [`Error::File`], as for [`Session::load`].
    pub fn from_bytes(bytes: &[u8], name: &str, weights: &Arc<Weights>) -> Result<Self, Error> {
        let file = Contents::open(bytes, name)?;
        for (entry, here) in [("model", weights.digest()), ("config", weights.config_digest())] {
            let there = file.entry(entry)?;
            if there != here {
                let [there, here] = [there, here].map(|digest| digest.get(..12).unwrap_or(digest));
                let source = weights.source();
                return file.wrong(format!(
                    "it is a session of another model ({entry} {there}…; {source} is {here}…)"
                ));
            }
        }
        let sampling: Sampling = match serde_json::from_str(file.entry("sampling")?) {
            Ok(sampling) => sampling,
            Err(error) => return file.wrong(format!("sampling: {error}")),
        };
        let mut session = Session::new(weights, sampling)?;
        session.position = file.number("position")?;
        session.random = Random { seed: file.number("seed")?, drawn: file.number("drawn")? };
        session.troubles = file.number("troubles")?;
        let vocab = weights.config().vocab;
        let count = if session.position == 0 { 0 } else { vocab };
        session.logits = file.f32s("logits", &[count])?;
        session.unfinished = file.tensor("unfinished", Dtype::U8, None)?.to_vec();
        let tail = file.tensor("tail", Dtype::U32, None)?;
        let tail = tail.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b));
        session.tail.extend(tail);
        if session.tail.len() as u64 != session.position.min(MAX_WINDOW as u64) {
            let (n, position) = (session.tail.len(), session.position);
            return file.wrong(format!("tail has {n} tokens at position {position}"));
        }
        if let Some(token) = session.tail.iter().find(|&&token| token as usize >= vocab) {
            return file.wrong(format!("tail has token {token}, the model has {vocab}"));
        }
        for (i, past) in session.pasts.iter_mut().enumerate() {
            let memory = |g: usize| file.memory([i, g], session.position, weights);
            *past = Past((0..weights.groups.len()).map(memory).collect::<Result<_, _>>()?);
        }
        Ok(session)
    }
}

fn f32s(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Name of a tensor of a layer's group of heads.
fn name(weights: &Weights, [layer, group]: [usize; 2], what: &str) -> String {
    match weights.groups.len() {
        1 => format!("layers.{layer}.{what}"),
        _ => format!("layers.{layer}.groups.{group}.{what}"),
    }
}

/// Whether a model's caches keep decays.
fn fades(weights: &Weights) -> bool {
    matches!(weights.config().attention.position, Position::Slopes | Position::Gates)
}

fn digest<'a>(
    entries: &BTreeMap<String, String>,
    tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize], &'a [u8])>,
) -> String {
    let mut digest = Sha256::new();
    let mut add = |part: &[u8]| {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    };
    for (key, value) in entries {
        add(key.as_bytes());
        add(value.as_bytes());
    }
    for (name, kind, shape, data) in tensors {
        add(name.as_bytes());
        add(format!("{kind:?} {shape:?}").as_bytes());
        add(data);
    }
    hex(digest)
}

/// A file whose digest is right.
struct Contents<'a> {
    name: &'a str,
    tensors: SafeTensors<'a>,
    entries: BTreeMap<String, String>,
}

impl<'a> Contents<'a> {
    fn open(bytes: &'a [u8], name: &'a str) -> Result<Self, Error> {
        let size = bytes.len();
        let broken = |error| {
            Error::file(name, format!("cut short, altered or no session ({size} bytes): {error}"))
        };
        let tensors = SafeTensors::deserialize(bytes).map_err(broken)?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
        let entries = header.metadata().clone().unwrap_or_default();
        let entries: BTreeMap<String, String> = entries.into_iter().collect();
        let mut file = Contents { name, tensors, entries };
        if file.entries.get("format").map(String::as_str) != Some(FORMAT) {
            return file.wrong("it is not a session: its metadata has no format sata-session");
        }
        let version = file.entry("version")?;
        if version != VERSION {
            return file.wrong(format!("it is of version {version}, this program reads {VERSION}"));
        }
        let said = file.entry("digest")?.to_string();
        file.entries.remove("digest");
        let mut names = file.tensors.names();
        names.sort_unstable();
        let mut parts = vec![];
        for name in names {
            if let Ok(tensor) = file.tensors.tensor(name) {
                parts.push((name, tensor));
            }
        }
        let found = digest(
            &file.entries,
            parts.iter().map(|(name, t)| (*name, t.dtype(), t.shape(), t.data())),
        );
        if found != said {
            return file.wrong("it has been altered: its digest is not that of its contents");
        }
        Ok(file)
    }

    fn wrong<T>(&self, reason: impl Into<String>) -> Result<T, Error> {
        Err(Error::file(self.name, reason))
    }

    fn entry(&self, key: &str) -> Result<&str, Error> {
        match self.entries.get(key) {
            Some(value) => Ok(value),
            None => self.wrong(format!("its metadata has no {key}")),
        }
    }

    fn number(&self, key: &str) -> Result<u64, Error> {
        let text = self.entry(key)?;
        match text.parse() {
            Ok(number) => Ok(number),
            Err(_) => self.wrong(format!("{key} is '{text}', which is no number")),
        }
    }

    fn tensor(&self, name: &str, kind: Dtype, shape: Option<&[usize]>) -> Result<&[u8], Error> {
        let Ok(tensor) = self.tensors.tensor(name) else {
            return self.wrong(format!("no tensor {name}"));
        };
        if tensor.dtype() != kind || shape.is_some_and(|shape| shape != tensor.shape()) {
            let (got, has) = (tensor.dtype(), tensor.shape());
            let shape = shape.map_or(String::new(), |shape| format!(" {shape:?}"));
            return self.wrong(format!("{name} is {got:?} {has:?}, it must be {kind:?}{shape}"));
        }
        // The file's own header says where, and was checked against its length.
        let data = tensor.data();
        Ok(data)
    }

    fn f32s(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let bytes = self.tensor(name, Dtype::F32, Some(shape))?;
        let numbers: Vec<f32> =
            bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        match numbers.iter().find(|x| !x.is_finite()) {
            Some(x) => self.wrong(format!("{name} holds {x}")),
            None => Ok(numbers),
        }
    }

    fn memory(&self, place: [usize; 2], position: u64, weights: &Weights) -> Result<Memory, Error> {
        let name = |what: &str| name(weights, place, what);
        let d = weights.config().attention.head_dim;
        let Group { plan, heads: [_, heads], .. } = &weights.groups[place[1]];
        let heads = *heads;
        let Some(plan) = plan else {
            let Ok(tokens) = usize::try_from(position) else {
                return self.wrong(format!("position is {position}"));
            };
            let shape = [heads, tokens, d];
            let keys = self.f32s(&name("keys"), &shape)?;
            let values = self.f32s(&name("values"), &shape)?;
            let mut fading = vec![];
            if fades(weights) {
                let bytes = self.tensor(&name("fading"), Dtype::F64, Some(&shape[..2]))?;
                fading = bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
                if let Some(x) = fading.iter().find(|x| !x.is_finite()) {
                    return self.wrong(format!("{} holds {x}", name("fading")));
                }
            }
            return Ok(Memory::Cache(Cache::from_rows(shape, [&keys, &values], &fading)));
        };
        let bytes = self.tensor(&name("state"), Dtype::U8, None)?;
        let state =
            sata::State::from_bytes(plan, bytes, format!("{}: {}", self.name, name("state")))
                .map_err(|error| Error::file(self.name, error.to_string()))?;
        let has = (state.sequences(), state.kv_heads(), state.position(0));
        if has != (1, heads, position) {
            return self.wrong(format!(
                "{} has [sequences, heads, position] {has:?}, it must be {:?}",
                name("state"),
                (1, heads, position)
            ));
        }
        Ok(Memory::State(state))
    }
}

/// Replaces the file at `path` by `bytes`, all of it or nothing.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let io = |doing| move |error| Error::io(path, doing, error);
    // A link stays a link.
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let old = fs::metadata(&target).ok();
    if old.as_ref().is_some_and(|old| !old.is_file()) {
        return Err(Error::file(&path.display().to_string(), "is there and not a file"));
    }
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut aside = tempfile::Builder::new();
    aside.prefix(".sata-session-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Less what the user's mask says, as for any new file.
        aside.permissions(fs::Permissions::from_mode(0o666));
    }
    let mut file = aside.tempfile_in(folder).map_err(io("making a file beside it"))?;
    file.write_all(bytes).map_err(io("writing a file beside it"))?;
    if let Some(old) = old {
        // As far as the user may: the file is none the worse without.
        let _ = file.as_file().set_permissions(old.permissions());
    }
    file.as_file().sync_all().map_err(io("bringing a file beside it to disk"))?;
    file.persist(&target).map_err(|e| Error::io(path, "renaming a file to it", e.error))?;
    // The new name survives a loss of power once the folder is on disk, where that can be done.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}
