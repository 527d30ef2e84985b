//! GGUF files: metadata, and tensors that may be quantised.
//!
//! The layout is that of the format's published description: magic, version, counts, key-value
//! pairs, tensor descriptions, then the tensors' bytes from the next multiple of the alignment on.
//! Nothing in a file is believed: every count is held against the bytes that are left.

mod blocks;
mod cursor;
mod metadata;

use std::collections::BTreeMap;
use std::path::Path;

use super::error::PretrainedError;
use super::tensors::{Tensor, check_finite};
pub use blocks::Kind;
use cursor::Cursor;
pub use metadata::{Metadata, Value};

/// What such a file begins with.
pub const MAGIC: &[u8; 4] = b"GGUF";
/// Versions that are read; 1 had other widths, and no converter writes it any more.
const VERSIONS: std::ops::RangeInclusive<u32> = 2..=3;
/// Where tensors begin if the file does not say.
const ALIGNMENT: u64 = 32;
/// Most dimensions of a tensor.
const MOST_DIMENSIONS: u32 = 4;
/// Least bytes of a tensor's description: name, dimensions, type, offset.
const LEAST_DESCRIPTION: usize = 8 + 4 + 8 + 4 + 8;

/// Where a tensor lies and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Description {
    /// Rows first, as everywhere here; the file has the fastest first.
    shape: Vec<usize>,
    elements: usize,
    kind: u32,
    /// From the beginning of the file.
    from: u64,
}

/// A whole GGUF file.
#[derive(Debug)]
pub struct Gguf {
    name: String,
    bytes: Vec<u8>,
    metadata: Metadata,
    tensors: BTreeMap<String, Description>,
}

impl Gguf {
    /// Reads a file.
    ///
    /// # Errors
    /// [`PretrainedError::Io`], and those of [`Gguf::parse`].
    pub fn open(path: &Path) -> Result<Self, PretrainedError> {
        let bytes =
            std::fs::read(path).map_err(|error| PretrainedError::io(path, "reading", error))?;
        Self::parse(&path.display().to_string(), bytes)
    }

    /// Reads a file's bytes; `name` is for messages.
    ///
    /// # Errors
    /// [`PretrainedError::File`] for anything that is not GGUF of version 2 or 3, or that ends too
    /// early; [`PretrainedError::Outside`] for a tensor beyond the file's end. A tensor of a type that
    /// is not read is refused when it is asked for.
    pub fn parse(name: &str, bytes: Vec<u8>) -> Result<Self, PretrainedError> {
        let fail = |reason: String| PretrainedError::file(name, reason);
        let mut at = Cursor::new(&bytes);
        if at.take(MAGIC.len()).ok() != Some(&MAGIC[..]) {
            return Err(fail("it does not begin with GGUF".into()));
        }
        let version = at.u32().map_err(fail)?;
        if !VERSIONS.contains(&version) {
            return Err(fail(format!("its version is {version}, only 2 and 3 are read")));
        }
        let count = at.u64().map_err(fail)?;
        let pairs = at.u64().map_err(fail)?;
        let metadata = Metadata::read(&mut at, pairs).map_err(fail)?;
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(value) => match value.as_u64() {
                Some(alignment) if alignment.is_power_of_two() && alignment <= 1 << 20 => alignment,
                _ => return Err(fail(format!("general.alignment is {value}, no power of two"))),
            },
        };
        let fits = at.left() / LEAST_DESCRIPTION;
        if usize::try_from(count).is_ok_and(|count| count > fits) || count > fits as u64 {
            let reason = format!(
                "it says it has {count} tensors, but the {} bytes left hold {fits} at most",
                at.left()
            );
            return Err(fail(reason));
        }
        let mut found = vec![];
        for _ in 0..count {
            found.push(describe(&mut at).map_err(fail)?);
        }
        let base = (at.position() as u64).next_multiple_of(alignment);
        let size = bytes.len() as u64;
        let mut tensors = BTreeMap::new();
        for (tensor, mut description) in found {
            let offset = description.from;
            if !offset.is_multiple_of(alignment) {
                let reason = format!(
                    "tensor {tensor} is at offset {offset}, no multiple of the alignment {alignment}"
                );
                return Err(fail(reason));
            }
            description.from = base.saturating_add(offset);
            // Where the type's size is known its end is too, and is looked at before anything is read.
            let length = Kind::of(description.kind)
                .and_then(|kind| kind.bytes(&description.shape))
                .unwrap_or(0) as u64;
            let to = description.from.saturating_add(length);
            if to > size {
                let (file, from) = (name.to_string(), description.from);
                return Err(PretrainedError::Outside { file, name: tensor, from, to, size });
            }
            if tensors.insert(tensor.clone(), description).is_some() {
                return Err(fail(format!("it has two tensors {tensor}")));
            }
        }
        Ok(Gguf { name: name.into(), bytes, metadata, tensors })
    }

    /// Its key-value pairs.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The file's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Names of its tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// How each type of storage is used: its name and how many tensors have it.
    pub fn kinds(&self) -> BTreeMap<String, usize> {
        let mut kinds = BTreeMap::new();
        for description in self.tensors.values() {
            *kinds.entry(blocks::name(description.kind)).or_default() += 1;
        }
        kinds
    }

    /// A tensor as f32, rows first; `None` if there is none of that name.
    ///
    /// # Errors
    /// [`PretrainedError::Kind`] for a type that is not read, [`PretrainedError::NotFinite`].
    pub fn tensor(&self, name: &str) -> Option<Result<Tensor, PretrainedError>> {
        let description = self.tensors.get(name)?;
        Some(self.read(name, description))
    }

    fn read(&self, name: &str, description: &Description) -> Result<Tensor, PretrainedError> {
        let unread = || PretrainedError::Kind {
            file: self.name.clone(),
            name: name.into(),
            kind: blocks::name(description.kind),
            known: blocks::KNOWN,
        };
        let kind = Kind::of(description.kind).ok_or_else(unread)?;
        let Some(length) = kind.bytes(&description.shape) else {
            let (block, shape) = (kind.block(), description.shape.clone());
            return Err(PretrainedError::Shape {
                file: self.name.clone(),
                name: name.into(),
                shape,
                expected: format!("{} is stored in whole blocks of {block} a row", kind.name()),
            });
        };
        // That it lies within the file was seen when the file was parsed.
        let from = description.from as usize;
        let bytes = self.bytes.get(from..from + length).unwrap_or(&[]);
        let data = kind.read(bytes, description.elements);
        check_finite(&self.name, name, &data)?;
        Ok(Tensor { shape: description.shape.clone(), data })
    }
}

/// One tensor's name, sizes, type and offset.
fn describe(at: &mut Cursor<'_>) -> Result<(String, Description), String> {
    let name = at.string()?;
    let dimensions = at.u32()?;
    if !(1..=MOST_DIMENSIONS).contains(&dimensions) {
        return Err(format!(
            "tensor {name} has {dimensions} dimensions, not 1 to {MOST_DIMENSIONS}"
        ));
    }
    let (mut shape, mut elements) = (vec![], 1usize);
    for _ in 0..dimensions {
        let size = at.u64()?;
        let size = usize::try_from(size).ok().filter(|size| *size > 0);
        let product = size.and_then(|size| elements.checked_mul(size));
        let (Some(size), Some(product)) = (size, product.filter(|n| *n <= isize::MAX as usize / 8))
        else {
            return Err(format!("tensor {name} has a size of 0, or more than memory can hold"));
        };
        elements = product;
        shape.insert(0, size);
    }
    let kind = at.u32()?;
    let from = at.u64()?;
    Ok((name, Description { shape, elements, kind, from }))
}
