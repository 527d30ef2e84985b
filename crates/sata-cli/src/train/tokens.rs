//! Tokens of texts that are kept in a folder, so that many trainings on one text need not make them
//! again.

use std::path::{Path, PathBuf};

use sata_lm::train::{TrainError, hex};
use sha2::{Digest, Sha256};

/// A folder of tokens, each file named by a digest of tokenizer and text.
pub struct Kept<'a> {
    folder: Option<&'a Path>,
    tokenizer: String,
}

impl<'a> Kept<'a> {
    /// In a folder, which is made, or nowhere.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(folder: Option<&'a Path>, tokenizer: String) -> Result<Self, TrainError> {
        if let Some(path) = folder {
            std::fs::create_dir_all(path).map_err(|error| file(path, &error.to_string()))?;
        }
        Ok(Kept { folder, tokenizer })
    }

    /// A text's tokens: those of the folder, or those that `encode` makes, which the folder then has.
    ///
    /// # Errors
    /// What `encode` says, and what the system says of writing.
    pub fn tokens(
        &self,
        text: &str,
        encode: impl FnOnce(&str) -> Result<Vec<u32>, TrainError>,
    ) -> Result<Vec<u32>, TrainError> {
        let Some(folder) = self.folder else {
            return encode(text);
        };
        let mut digest = Sha256::new();
        digest.update(&self.tokenizer);
        digest.update(text);
        let path = folder.join(format!("{}.tokens", hex(&digest.finalize())));
        if let Some(tokens) = read(&path) {
            return Ok(tokens);
        }
        let tokens = encode(text)?;
        let mut bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let digest = Sha256::digest(&bytes);
        bytes.extend_from_slice(&digest);
        // Aside first: others may read the folder, or write the same.
        let aside = folder.join(format!("{}.partial", std::process::id()));
        std::fs::write(&aside, bytes)
            .and_then(|()| std::fs::rename(&aside, &path))
            .map_err(|error| file(&path, &error.to_string()))?;
        Ok(tokens)
    }
}

/// What a file holds, if it is whole.
fn read(path: &PathBuf) -> Option<Vec<u32>> {
    let bytes = std::fs::read(path).ok()?;
    let (tokens, digest) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
    if Sha256::digest(tokens)[..] != *digest {
        return None;
    }
    let (fours, rest) = tokens.as_chunks();
    rest.is_empty().then(|| fours.iter().map(|four| u32::from_le_bytes(*four)).collect())
}

fn file(path: &Path, reason: &str) -> TrainError {
    TrainError::File { path: path.into(), reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_encoded_once_and_altered_files_again() {
        let folder = tempfile::tempdir().unwrap();
        let kept = Kept::new(Some(folder.path()), "t".into()).unwrap();
        let encode = |text: &str| Ok(text.bytes().map(u32::from).collect());
        let never = |_: &str| Err(TrainError::Unfit("again".into()));
        assert_eq!(kept.tokens("ab", encode).unwrap(), [97, 98]);
        assert_eq!(kept.tokens("ab", never).unwrap(), [97, 98]);
        assert!(kept.tokens("abc", never).is_err());
        let other = Kept::new(Some(folder.path()), "u".into()).unwrap();
        assert!(other.tokens("ab", never).is_err());
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            std::fs::write(entry.unwrap().path(), [0; 40]).unwrap();
        }
        assert!(kept.tokens("ab", never).is_err());
        assert_eq!(kept.tokens("ab", encode).unwrap(), [97, 98]);
    }
}
