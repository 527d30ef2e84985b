//! The Bible, one verse per line of JSON.

use std::path::Path;

use serde::Deserialize;

use super::clean::words;
use super::folder::find;
use super::source::Text;
use crate::failure::{Failure, Outcome};

#[derive(Deserialize)]
struct Verse {
    text: String,
    book: String,
    chapter: u32,
}

/// Reads every book: a heading per chapter, a line per verse.
///
/// # Errors
/// A file that cannot be read or has other lines.
pub fn read(root: &Path) -> Outcome<Vec<Text>> {
    // A source archive has a folder of its own around everything, a wheel has not.
    let wheel = root.join("bible/data/kjv.jsonl");
    let path = if wheel.exists() { wheel } else { find(root, "*/bible/data/kjv.jsonl")? };
    let lines =
        std::fs::read_to_string(&path).map_err(|error| Failure::io(&path, "reading", &error))?;
    books(&lines).map_err(|reason| Failure::new(format!("{}: {reason}", path.display())))
}

fn books(lines: &str) -> Result<Vec<Text>, String> {
    let mut books: Vec<Text> = vec![];
    let mut at = (String::new(), 0);
    for (i, line) in lines.lines().enumerate() {
        let verse: Verse =
            serde_json::from_str(line).map_err(|error| format!("line {}: {error}", i + 1))?;
        let text = words(&verse.text.replace(['[', ']'], ""));
        if text.is_empty() {
            continue;
        }
        if verse.book != at.0 {
            // Two digits, so that files in order of their names are in order of the books.
            let number = books.len() + 1;
            let name: String =
                verse.book.to_lowercase().replace(|c: char| !c.is_alphanumeric(), "_");
            books.push(Text {
                name: format!("{number:02}_{name}"),
                text: format!("{}\n", verse.book),
            });
            at = (verse.book.clone(), 0);
        }
        let Some(book) = books.last_mut() else { continue };
        if verse.chapter != at.1 {
            at.1 = verse.chapter;
            book.text += &format!("\nChapter {}\n\n", verse.chapter);
        }
        book.text += &text;
        book.text.push('\n');
    }
    Ok(books)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn books_and_chapters() {
        let line = |book: &str, chapter: u32, text: &str| {
            format!(
                r#"{{"citation": "", "text": "{text}", "book": "{book}", "chapter": {chapter}, "verse": 1}}"#
            )
        };
        let lines = [
            line("Genesis", 1, "In the [beginning]."),
            line("Genesis", 1, "And."),
            line("Genesis", 2, "Thus."),
            line("3 John", 1, "[]"),
            line("3 John", 1, "The elder."),
        ];
        let books = books(&lines.join("\n")).unwrap();
        let want = "Genesis\n\nChapter 1\n\nIn the beginning.\nAnd.\n\nChapter 2\n\nThus.\n";
        assert_eq!(books[0], Text { name: "01_genesis".into(), text: want.into() });
        assert_eq!(books[1].name, "02_3_john");
        assert!(super::books("{").unwrap_err().contains("line 1"));
    }
}
