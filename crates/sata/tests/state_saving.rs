//! Saving replaces a file whole, or leaves it as it was.

mod common;

use std::path::Path;

use common::states::{small, taylor};
use sata::Error;

/// What a folder holds, to see that nothing has changed.
fn contents(folder: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(path).unwrap_or_default()))
        .collect();
    files.sort();
    files
}

#[test]
fn what_cannot_be_written_leaves_the_old_file() {
    let plan = taylor(2, 1, 2, 4);
    let state = small::<f32>(&plan);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("past.safetensors");
    state.save(&path).unwrap();
    let before = contents(folder.path());

    // A folder that is none, and a file that is a folder.
    for bad in [path.join("below"), folder.path().join("no/such")] {
        match state.save(&bad) {
            Err(Error::Io { path, doing: "making a file beside it", .. }) => assert_eq!(path, bad),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(state.save(folder.path()), Err(Error::File { .. })));
    assert_eq!(contents(folder.path()), before);
    #[cfg(unix)]
    {
        use std::fs::Permissions;
        use std::os::unix::fs::PermissionsExt;
        // A device is not replaced by a file.
        assert!(matches!(state.save("/dev/null"), Err(Error::File { .. })));
        // A folder that may not be written to, unless the user may do everything.
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o555)).unwrap();
        let probe = folder.path().join("probe");
        if std::fs::write(&probe, b"").is_err() {
            assert!(matches!(state.save(&path), Err(Error::Io { .. })));
        } else {
            std::fs::remove_file(&probe).unwrap();
        }
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        assert_eq!(contents(folder.path()), before);
    }
}

#[test]
fn saving_replaces_a_file_and_keeps_what_is_its_own() {
    let plan = taylor(2, 1, 2, 4);
    let (old, new) = (small::<f32>(&plan), small::<f32>(&plan));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("past.safetensors");
    old.save(&path).unwrap();
    #[cfg(unix)]
    {
        use std::fs::{Permissions, metadata, set_permissions};
        use std::os::unix::fs::{PermissionsExt, symlink};
        let mode = |path: &Path| metadata(path).unwrap().permissions().mode() & 0o777;
        std::fs::write(folder.path().join("plain"), b"").unwrap();
        assert_eq!(mode(&path), mode(&folder.path().join("plain")), "as any new file");
        set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let link = folder.path().join("link");
        symlink(&path, &link).unwrap();
        new.save(&link).unwrap();
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(mode(&path), 0o640);
        std::fs::remove_file(&link).unwrap();
        std::fs::remove_file(folder.path().join("plain")).unwrap();
    }
    new.save(&path).unwrap();
    assert!(std::fs::read(&path).unwrap() == new.to_bytes());
    assert_eq!(contents(folder.path()).len(), 1);
}
