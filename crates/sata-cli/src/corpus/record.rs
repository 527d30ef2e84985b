//! `corpus.json` and `licences.md`: what a corpus is made of, and under what terms.

use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::source::SOURCES;
use crate::failure::{Failure, Outcome};
use crate::output::{json, write_file};

const RECORD: &str = "corpus.json";
const LICENCES: &str = "licences.md";

/// What a corpus is made of.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Record {
    /// One per package.
    pub sources: Vec<Entry>,
}

/// What came of one package.
#[derive(Debug, Serialize, Deserialize)]
pub struct Entry {
    /// Name of its folder.
    pub name: String,
    /// What it is.
    pub what: String,
    /// Name of the package.
    pub package: String,
    /// Its version.
    pub version: String,
    /// Who fetched it.
    pub client: String,
    /// Under what terms its text is.
    pub licence: String,
    /// Bytes of text.
    pub bytes: u64,
    /// Its texts.
    pub files: Vec<File>,
}

/// One text.
#[derive(Debug, Serialize, Deserialize)]
pub struct File {
    /// Where, within the corpus.
    pub path: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
}

impl Record {
    /// The record of a folder, empty when it has none.
    ///
    /// # Errors
    /// A record that cannot be read.
    pub fn load(dir: &Path) -> Outcome<Self> {
        let path = dir.join(RECORD);
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                Failure::new(format!("{}: {error}", path.display()))
                    .hint("it is not a record of this program: name another folder, or remove it")
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Record::default()),
            Err(error) => Err(Failure::io(&path, "reading", &error)),
        }
    }

    /// Adds an entry, in place of one of its name.
    pub fn put(&mut self, entry: Entry) {
        self.sources.retain(|old| old.name != entry.name);
        self.sources.push(entry);
        let order = |entry: &Entry| SOURCES.iter().position(|source| source.name == entry.name);
        self.sources.sort_by_key(order);
    }

    /// Writes both files.
    ///
    /// # Errors
    /// What the system says.
    pub fn save(&self, dir: &Path) -> Outcome {
        write_file(&dir.join(RECORD), format!("{}\n", json(self)?).as_bytes())?;
        write_file(&dir.join(LICENCES), self.licences().as_bytes())
    }

    fn licences(&self) -> String {
        let mut text = String::from(
            "# Licences\n\nEach folder holds one package's texts, cleaned of markup, and in NOTICE \
             the package's own notice of copyright.\n\n\
             | folder | what | package | from | terms |\n|---|---|---|---|---|\n",
        );
        for entry in &self.sources {
            text += &format!(
                "| {} | {} | {} {} | {} | {} |\n",
                entry.name,
                entry.what,
                entry.package,
                entry.version,
                if entry.client == "pip" { "PyPI" } else { "Debian" },
                entry.licence
            );
        }
        text
    }
}
