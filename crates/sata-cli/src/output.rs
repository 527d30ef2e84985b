//! Standard output that may be closed early, and files that appear whole or not at all.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use tempfile::{Builder, NamedTempFile};

use crate::failure::{Failure, Outcome};

/// Writes a line to standard output.
///
/// # Errors
/// [`Failure::BrokenPipe`] when its reader has gone.
pub fn say(line: impl Display) -> Outcome {
    print(&format!("{line}\n"))
}

/// Writes text to standard output, where it is seen at once.
///
/// # Errors
/// As for [`say`].
pub fn print(text: &str) -> Outcome {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::BrokenPipe,
        _ => Failure::new(format!("standard output: {error}")),
    })
}

/// Writes a value to standard output as indented JSON.
///
/// # Errors
/// As for [`say`].
pub fn say_json(value: &impl Serialize) -> Outcome {
    say(json(value)?)
}

/// A value as indented JSON.
///
/// # Errors
/// When it cannot be represented, which for the program's own reports does not happen.
pub fn json(value: &impl Serialize) -> Outcome<String> {
    serde_json::to_string_pretty(value).map_err(|error| Failure::new(format!("JSON: {error}")))
}

/// A file being written aside, in the folder where it will be.
///
/// Making it shows that the folder can be written; dropping it leaves the target as it was.
#[derive(Debug)]
pub struct Staged {
    file: NamedTempFile,
    target: PathBuf,
}

impl Staged {
    /// Opens a file beside `target`, which `argument` named.
    ///
    /// # Errors
    /// When the folder is missing or cannot be written, or `target` is not a regular file.
    pub fn new(target: &Path, argument: &str) -> Outcome<Self> {
        let fail =
            |reason: String| Failure::new(format!("{argument} {}: {reason}", target.display()));
        if target.file_name().is_none() {
            return Err(fail("it does not name a file".into()));
        }
        if let Ok(there) = target.metadata()
            && !there.is_file()
        {
            let what = if there.is_dir() { "a folder" } else { "not a regular file" };
            return Err(fail(format!("it is {what}, and is left alone")));
        }
        let folder = folder_of(target);
        let mut builder = Builder::new();
        builder.prefix(".sata-");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // What an ordinary new file gets; the process's mask still applies.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let file = builder.tempfile_in(folder).map_err(|error| {
            fail(format!("nothing can be written into the folder {}: {error}", folder.display()))
                .hint("name a folder that exists and that you may write to")
        })?;
        Ok(Staged { file, target: target.to_path_buf() })
    }

    /// Where it is being written.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&mut self, bytes: &[u8]) -> Outcome {
        let written = self.file.write_all(bytes);
        written.map_err(|error| Failure::io(&self.target, "writing", &error))
    }

    /// Puts it in place of whatever was there.
    ///
    /// # Errors
    /// What the system says; the old file is then still there.
    pub fn commit(self) -> Outcome {
        let target = self.target;
        let synced = self.file.as_file().sync_all();
        synced.map_err(|error| Failure::io(&target, "writing to disk", &error))?;
        let renamed = self.file.persist(&target);
        renamed.map_err(|error| Failure::io(&target, "putting it in place", &error.error))?;
        // The rename itself reaches the disk with the folder; not every system lets it be opened.
        if let Ok(folder) = File::open(folder_of(&target)) {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

/// Writes a whole file aside and puts it in place.
///
/// # Errors
/// As for [`Staged`].
pub fn write_file(target: &Path, bytes: &[u8]) -> Outcome {
    let mut staged = Staged::new(target, "output")?;
    staged.write(bytes)?;
    staged.commit()
}

fn folder_of(target: &Path) -> &Path {
    match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_file_leaves_the_target_alone() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("y");
        std::fs::write(&target, "old").unwrap();
        let mut staged = Staged::new(&target, "--output").unwrap();
        staged.write(b"new").unwrap();
        drop(staged);
        assert_eq!(std::fs::read(&target).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        write_file(&target, b"new").unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"new");
    }

    #[test]
    fn folders_and_missing_folders_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let taken = Staged::new(folder.path(), "--output").unwrap_err().to_string();
        assert!(taken.contains("--output") && taken.contains("is a folder"), "{taken}");
        let missing = Staged::new(&folder.path().join("no/y"), "--output").unwrap_err().to_string();
        assert!(missing.contains("folder"), "{missing}");
    }
}
