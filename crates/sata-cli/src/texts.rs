//! Texts named on the command line: files, or folders of `.txt` files.

use std::path::{Path, PathBuf};

use crate::failure::{Failure, Outcome};

/// Reads files, and the `.txt` files in folders and the folders in them, in order of their paths.
///
/// # Errors
/// A path that is not there, a folder without `.txt` files, a file that is empty or not UTF-8.
pub fn read_texts(paths: &[PathBuf]) -> Outcome<Vec<String>> {
    let mut files = vec![];
    for path in paths {
        let there = path.metadata().map_err(|error| Failure::io(path, "reading", &error))?;
        if there.is_dir() {
            let before = files.len();
            find(path, &mut files)?;
            if files.len() == before {
                return Err(Failure::new(format!(
                    "{}: the folder holds no .txt file",
                    path.display()
                )));
            }
        } else {
            files.push(path.clone());
        }
    }
    files.iter().map(|path| read(path)).collect()
}

fn find(folder: &Path, files: &mut Vec<PathBuf>) -> Outcome {
    let entries: Result<Vec<PathBuf>, _> = std::fs::read_dir(folder)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect());
    let mut entries = entries.map_err(|error| Failure::io(folder, "reading", &error))?;
    entries.sort();
    for path in entries {
        // Folders that are links could lead round in a circle.
        if path.is_dir() && !path.is_symlink() {
            find(&path, files)?;
        } else if path.is_file() && path.extension().is_some_and(|ending| ending == "txt") {
            files.push(path);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Outcome<String> {
    let bytes = std::fs::read(path).map_err(|error| Failure::io(path, "reading", &error))?;
    if bytes.is_empty() {
        return Err(Failure::new(format!("{}: the file is empty", path.display())));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let byte = error.as_bytes()[at];
        Failure::new(format!("{}: not UTF-8: byte {at} is 0x{byte:02x}", path.display()))
    })
}
