//! Files that appear whole or not at all.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use crate::Error;

/// Replaces the file at `path` by what `write` writes, all of it or nothing.
pub(super) fn replace(
    path: &Path,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), Error> {
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

#[cfg(test)]
mod tests {
    use std::io::Write;

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
