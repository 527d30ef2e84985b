//! Shakespeare's works, already plain text.

use std::path::Path;

use super::clean::keep_lines;
use super::folder::find;
use super::source::Text;
use crate::failure::{Failure, Outcome};

/// How the files of modern spelling end; those of the first folio end in `_gut_f.txt`.
const ENDING: &str = "_gut.txt";

/// Reads all works in modern spelling, in order of their names.
///
/// # Errors
/// Files that cannot be read or are not UTF-8.
pub fn read(root: &Path) -> Outcome<Vec<Text>> {
    let folder = find(root, "*/shksprdata/texts")?;
    let fail = |error| Failure::io(&folder, "reading", &error);
    let mut texts = vec![];
    for entry in std::fs::read_dir(&folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let Some(name) = file.strip_suffix(ENDING) else { continue };
        let text = std::fs::read_to_string(&path)
            .map_err(|error| Failure::io(&path, "reading", &error))?;
        let text = keep_lines(text.trim_start_matches('\u{feff}'));
        texts.push(Text { name: name.into(), text });
    }
    texts.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(texts)
}
