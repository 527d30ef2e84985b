//! Long texts in pieces that are tokenized as they would be in one.

/// Pieces of `text` of at least `least` bytes, except the last.
///
/// Words are split off by an expression whose matches never hold a white-space character after one
/// that is not, so a cut between two such characters changes nothing. Where there is none, there is
/// no cut.
pub fn chunks(text: &str, least: usize) -> impl Iterator<Item = &str> + Send {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let cut = cut_after(rest, least).unwrap_or(rest.len());
        let (piece, left) = rest.split_at(cut);
        rest = left;
        Some(piece)
    })
}

/// The first place at or after `least` bytes where white space follows something else. Only the
/// ASCII space and line feed are looked for.
fn cut_after(text: &str, least: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    // An ASCII byte before the cut is a character of its own, which is easily known not to be
    // white space.
    let cut = |i: &usize| matches!(bytes[*i], b' ' | b'\n') && bytes[*i - 1].is_ascii_graphic();
    (least.max(1)..bytes.len()).find(cut)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_text() {
        let text = "ab  c\u{a0} d\n\né f ,\n g";
        for least in 0..30 {
            let pieces: Vec<&str> = chunks(text, least).collect();
            assert_eq!(pieces.concat(), text);
            for pair in pieces.windows(2) {
                assert!(pair[0].len() >= least, "{pieces:?}");
                assert!(!pair[0].ends_with(char::is_whitespace), "{pieces:?}");
                assert!(pair[1].starts_with(char::is_whitespace), "{pieces:?}");
            }
        }
        assert_eq!(chunks(text, 0).count(), 5);
        assert_eq!(chunks("", 0).count(), 0);
    }
}
