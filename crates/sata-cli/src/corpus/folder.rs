//! The folder of one source: made aside, and put in place when it is whole.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::{Builder, TempDir};

use super::fetch::{Package, fetch};
use super::record::{Entry, File};
use super::source::{Source, Text};
use crate::failure::{Failure, Outcome};

/// Name of the file that holds a package's notice of copyright.
const NOTICE: &str = "NOTICE";

/// Fetches a source and writes its texts to `dir`/name, in place of what was there.
///
/// # Errors
/// What fetching, reading or writing says; what was there is then still there.
pub fn make(dir: &Path, source: &Source) -> Outcome<Entry> {
    let work =
        TempDir::new().map_err(|error| Failure::new(format!("temporary folder: {error}")))?;
    let package = fetch(source, work.path())?;
    let context = format!("package {} {}", source.package, package.version);
    let read = || -> Outcome<(Vec<Text>, Vec<u8>)> {
        let texts = (source.read)(&package.root)?;
        if texts.iter().all(|text| text.text.is_empty()) {
            return Err(Failure::new("it holds no text"));
        }
        let path = find(&package.root, source.notice)?;
        let notice = std::fs::read(&path).map_err(|error| Failure::io(&path, "reading", &error))?;
        Ok((texts, notice))
    };
    let (texts, notice) = read().map_err(|failure| failure.context(&context))?;
    write(dir, source, &package, &texts, &notice)
}

/// A path whose first part may be a star, which stands for the only folder there.
pub fn find(root: &Path, pattern: &str) -> Outcome<PathBuf> {
    let Some(rest) = pattern.strip_prefix("*/") else {
        return Ok(root.join(pattern));
    };
    let fail = |error| Failure::io(root, "reading", &error);
    for entry in std::fs::read_dir(root).map_err(fail)? {
        let path = entry.map_err(fail)?.path().join(rest);
        if path.exists() {
            return Ok(path);
        }
    }
    Err(Failure::new(format!("it holds no {pattern}")))
}

fn write(
    dir: &Path,
    source: &Source,
    package: &Package,
    texts: &[Text],
    notice: &[u8],
) -> Outcome<Entry> {
    let target = dir.join(source.name);
    let fail = |doing: &'static str| {
        let target = target.clone();
        move |error: std::io::Error| Failure::io(&target, doing, &error)
    };
    let mut builder = Builder::new();
    builder.prefix(".sata-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // What an ordinary new folder gets; the process's mask still applies.
        builder.permissions(std::fs::Permissions::from_mode(0o777));
    }
    let aside = builder.tempdir_in(dir).map_err(fail("making it aside"))?;
    let new = aside.path().join("new");
    std::fs::create_dir(&new).map_err(fail("making it aside"))?;
    std::fs::write(new.join(NOTICE), notice).map_err(fail("writing"))?;
    let mut files = vec![];
    for Text { name, text } in texts.iter().filter(|text| !text.text.is_empty()) {
        let file = format!("{name}.txt");
        std::fs::write(new.join(&file), text).map_err(fail("writing"))?;
        files.push(File {
            path: format!("{}/{file}", source.name),
            bytes: text.len() as u64,
            sha256: hex(&Sha256::digest(text)),
        });
    }
    if target.exists() {
        std::fs::rename(&target, aside.path().join("old")).map_err(fail("putting it away"))?;
    }
    std::fs::rename(&new, &target).map_err(fail("putting it in place"))?;
    Ok(Entry {
        name: source.name.into(),
        what: source.what.into(),
        package: source.package.into(),
        version: package.version.clone(),
        client: source.client.to_string(),
        licence: source.licence.into(),
        bytes: files.iter().map(|file| file.bytes).sum(),
        files,
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
