//! Austen's novels out of an R package's data.

use std::path::Path;

use super::clean::unwrap_paragraphs;
use super::rdata::character_vectors;
use super::source::Text;
use crate::failure::{Failure, Outcome};

const DATABASE: &str = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb";

/// Title in the first line, and the file's name.
const NOVELS: [(&str, &str); 6] = [
    ("SENSE AND SENSIBILITY", "sense_and_sensibility"),
    ("PRIDE AND PREJUDICE", "pride_and_prejudice"),
    ("MANSFIELD PARK", "mansfield_park"),
    ("EMMA", "emma"),
    ("NORTHANGER ABBEY", "northanger_abbey"),
    ("PERSUASION", "persuasion"),
];

/// Reads the novels.
///
/// # Errors
/// A database that cannot be read, or a novel that is not there.
pub fn read(root: &Path) -> Outcome<Vec<Text>> {
    let path = root.join(DATABASE);
    let bytes = std::fs::read(&path).map_err(|error| Failure::io(&path, "reading", &error))?;
    let vectors = character_vectors(&bytes)
        .map_err(|reason| Failure::new(format!("{DATABASE}: {reason}")))?;
    let novel = |(title, name): (&str, &str)| {
        let lines = vectors.iter().find(|lines| {
            lines.first().is_some_and(|line| line.trim().eq_ignore_ascii_case(title))
        });
        let lines = lines.ok_or_else(|| Failure::new(format!("{DATABASE}: no novel {title}")))?;
        Ok(Text { name: name.into(), text: clean(lines) })
    };
    NOVELS.into_iter().map(novel).collect()
}

fn clean(lines: &[String]) -> String {
    // The publisher's note after the last chapter is not Austen's.
    let end = lines.iter().position(|line| line.trim() == "A NOTE ON THE TEXT");
    let lines = &lines[..end.unwrap_or(lines.len())];
    let mut paragraphs = unwrap_paragraphs(lines.iter().map(String::as_str));
    let is_note = |p: &str| {
        let is_printers = p.starts_with("[End volume") || p.starts_with("[At this point");
        // Rows of stars between scenes.
        is_printers || p.chars().all(|c| matches!(c, '*' | ' ' | '\n'))
    };
    paragraphs.retain(|paragraph| !is_note(paragraph));
    paragraphs.join("\n\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_and_stars_go() {
        let lines = [
            "EMMA",
            "",
            "It _was_",
            "so.",
            "",
            " * * *",
            "",
            "[End volume one.",
            "Printed by X]",
            "",
            "FINIS",
            "",
            "A NOTE ON THE TEXT",
            "",
            "By a publisher.",
        ];
        assert_eq!(clean(&lines.map(String::from)), "EMMA\n\nIt was so.\n\nFINIS\n");
    }
}
