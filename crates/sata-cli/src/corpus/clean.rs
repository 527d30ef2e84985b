//! Plain text from wrapped lines.

/// Joins the lines of each paragraph, one empty line between paragraphs, one space between words;
/// takes the underscores of emphasis away. Lines that are indented, and those after them, stay
/// lines of their own: verse, letterheads.
pub fn unwrap_paragraphs<'a>(lines: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut paragraphs = vec![];
    let mut paragraph = String::new();
    for line in lines.into_iter().chain([""]) {
        let words = words(&line.replace('_', ""));
        if words.is_empty() {
            if !paragraph.is_empty() {
                paragraphs.push(std::mem::take(&mut paragraph));
            }
            continue;
        }
        if !paragraph.is_empty() {
            paragraph.push(if line.starts_with([' ', '\t']) { '\n' } else { ' ' });
        }
        paragraph.push_str(&words);
    }
    paragraphs
}

/// Keeps the lines of verse and plays; at most one empty line between them, no spaces after them.
pub fn keep_lines(text: &str) -> String {
    let mut clean = String::new();
    let mut empty = 0;
    for line in text.lines() {
        let line = line.trim_end();
        if line.is_empty() {
            empty += 1;
            continue;
        }
        if !clean.is_empty() && empty > 0 {
            clean.push('\n');
        }
        empty = 0;
        clean.push_str(line);
        clean.push('\n');
    }
    clean
}

/// Words with one space between them.
pub fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_are_joined_and_verse_is_not() {
        let lines =
            ["", "It  is a _truth_", "universally.", "", "", "He sang:", "  one,", "  two.", ""];
        assert_eq!(
            unwrap_paragraphs(lines),
            ["It is a truth universally.", "He sang:\none,\ntwo."]
        );
    }

    #[test]
    fn lines_are_kept() {
        assert_eq!(keep_lines("\n\nA. \r\n  b\n\n\n\nC"), "A.\n  b\n\nC\n");
    }
}
