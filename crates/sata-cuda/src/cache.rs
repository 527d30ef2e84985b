//! Compiled code on disk.
//!
//! A folder of files, `$SATA_CACHE_DIR` or `sata/kernels` in the user's cache folder, each named by
//! the hash of all that its code depends on. A file is `SATAKRN1`, that hash (32 bytes), the SHA-256
//! of the hash and the code, the code's length (8 bytes, little-endian) and the code. One that is
//! not just so is made anew. Files are written aside and renamed, so that others never see half of
//! one. A folder that cannot be written to only costs time.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};

use crate::Error;

const MAGIC: &[u8; 8] = b"SATAKRN1";
const HEADER: usize = 8 + 32 + 32 + 8;

/// A hash of all that some code depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key([u8; 32]);

impl Key {
    /// Of texts whose order and borders count.
    pub(crate) fn of<'a>(parts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Key(hash.finalize().into())
    }

    fn name(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Code in this process, loaded once per key. Others wait for whoever is at it, but not for those at
/// other keys.
#[derive(Debug)]
pub(crate) struct Loaded<T>(Mutex<HashMap<Key, Place<T>>>);

type Place<T> = Arc<Mutex<Option<Arc<T>>>>;

impl<T> Default for Loaded<T> {
    fn default() -> Self {
        Loaded(Mutex::default())
    }
}

impl<T> Loaded<T> {
    pub(crate) fn get_or(
        &self,
        key: Key,
        load: impl FnOnce() -> Result<T, Error>,
    ) -> Result<Arc<T>, Error> {
        let place =
            self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default().clone();
        let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(code) = &*place {
            return Ok(code.clone());
        }
        let code = Arc::new(load()?);
        *place = Some(code.clone());
        Ok(code)
    }
}

/// A folder of compiled code, or none.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// The one that the environment names.
    pub(crate) fn usual() -> Self {
        let set =
            |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let users = || {
            let home =
                || set("HOME").or_else(|| set("USERPROFILE")).map(|home| home.join(".cache"));
            set("XDG_CACHE_HOME").filter(|path| path.is_absolute()).or_else(home)
        };
        let folder =
            set("SATA_CACHE_DIR").or_else(|| users().map(|dir| dir.join("sata").join("kernels")));
        Cache { folder }
    }

    #[cfg(test)]
    pub(crate) fn at(folder: &Path) -> Self {
        Cache { folder: Some(folder.to_path_buf()) }
    }

    /// The code of `key`, from the folder or from `make`, which is then kept.
    pub(crate) fn get_or(
        &self,
        key: Key,
        make: impl FnOnce() -> Result<Vec<u8>, Error>,
    ) -> Result<Vec<u8>, Error> {
        let path = self.folder.as_ref().map(|folder| folder.join(key.name()));
        if let Some(code) = path.as_deref().and_then(|path| read(path, key)) {
            return Ok(code);
        }
        let code = make()?;
        if let Some(path) = path {
            // What cannot be kept is made again next time.
            let _ = write(&path, key, &code);
        }
        Ok(code)
    }
}

fn digest(key: Key, code: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(key.0).chain_update(code).finalize().into()
}

/// What a file holds, if it is whole and of this key.
fn read(path: &Path, key: Key) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let (header, code) = bytes.split_at_checked(HEADER)?;
    let sound = header[..8] == *MAGIC
        && header[8..40] == key.0
        && header[40..72] == digest(key, code)
        && header[72..] == (code.len() as u64).to_le_bytes();
    if !sound {
        return None;
    }
    bytes.drain(..HEADER);
    Some(bytes)
}

fn write(path: &Path, key: Key, code: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(MAGIC)?;
    file.write_all(&key.0)?;
    file.write_all(&digest(key, code))?;
    file.write_all(&(code.len() as u64).to_le_bytes())?;
    file.write_all(code)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn key() -> Key {
        Key::of(["a source", "sm_90a"])
    }

    #[test]
    fn borders_count() {
        assert_ne!(Key::of(["ab", "c"]), Key::of(["a", "bc"]));
        assert_ne!(Key::of(["a", ""]), Key::of(["a"]));
    }

    #[test]
    fn code_is_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(&folder.path().join("made/when/needed"));
        let code = cache.get_or(key(), || Ok(vec![1, 2, 3])).unwrap();
        assert_eq!(code, [1, 2, 3]);
        let again = cache.get_or(key(), || panic!("it is there")).unwrap();
        assert_eq!(again, [1, 2, 3]);
        let other = cache.get_or(Key::of(["another"]), || Ok(vec![])).unwrap();
        assert!(other.is_empty());
        let empty = cache.get_or(Key::of(["another"]), || panic!("it is there")).unwrap();
        assert!(empty.is_empty());
    }

    #[test]
    fn a_file_that_is_damaged_in_any_byte_or_cut_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let path = folder.path().join(key().name());
        cache.get_or(key(), || Ok(vec![7; 20])).unwrap();
        let whole = fs::read(&path).unwrap();
        assert_eq!(whole.len(), HEADER + 20);
        let mut damaged: Vec<Vec<u8>> = vec![vec![], [&whole[..], &[0]].concat()];
        damaged.extend((0..whole.len()).map(|at| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            bytes
        }));
        damaged.extend((1..whole.len()).map(|len| whole[..len].to_vec()));
        for bytes in damaged {
            fs::write(&path, &bytes).unwrap();
            let code = cache.get_or(key(), || Ok(vec![7; 20])).unwrap();
            assert_eq!(code, [7; 20]);
            assert_eq!(fs::read(&path).unwrap(), whole, "it was put right");
        }
        // Another key's file under this name.
        let other = Key::of(["another"]);
        cache.get_or(other, || Ok(vec![9])).unwrap();
        fs::copy(folder.path().join(other.name()), &path).unwrap();
        assert_eq!(cache.get_or(key(), || Ok(vec![7; 20])).unwrap(), [7; 20]);
    }

    #[test]
    fn a_failure_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let failed = cache.get_or(key(), || Err(Error::NoCompiler { reason: "none".into() }));
        assert!(failed.is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_cannot_be_written_only_costs_time() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "no folder").unwrap();
        let cache = Cache::at(&file.join("below"));
        for _ in 0..2 {
            assert_eq!(cache.get_or(key(), || Ok(vec![1])).unwrap(), [1]);
        }
        let none = Cache { folder: None };
        assert_eq!(none.get_or(key(), || Ok(vec![1])).unwrap(), [1]);
    }

    #[test]
    fn many_at_once_see_whole_code_or_none() {
        let folder = tempfile::tempdir().unwrap();
        let made = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (cache, made) = (Cache::at(folder.path()), &made);
                scope.spawn(move || {
                    for round in 0..50u8 {
                        let key = Key::of([&*round.to_string()]);
                        let code = cache
                            .get_or(key, || {
                                made.fetch_add(1, Ordering::Relaxed);
                                Ok(vec![round; 10_000])
                            })
                            .unwrap();
                        assert_eq!(code, vec![round; 10_000], "thread {thread}");
                    }
                });
            }
        });
        assert!((50..=400).contains(&made.into_inner()));
        // Nothing is left aside.
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 50);
    }
}
