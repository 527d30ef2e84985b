//! Stretches of text to read.

use std::path::PathBuf;

use sata_lm::pretrained::TextTokenizer;

use crate::failure::{Failure, Outcome};
use crate::texts::read_texts;

/// Tokens of a stretch, and how many bytes of text each stands for.
pub struct Passage {
    /// Tokens.
    pub tokens: Vec<u32>,
    /// Bytes of each; none of a token that is put before a text.
    pub bytes: Vec<usize>,
}

/// All texts one after another.
///
/// # Errors
/// Files that cannot be read.
pub fn text(paths: &[PathBuf]) -> Outcome<String> {
    Ok(read_texts(paths)?.join("\n\n"))
}

/// `count` stretches of `length` tokens, evenly spread over a text from its token `skip` on; fewer if
/// the text is too short for so many that do not overlap.
///
/// # Errors
/// A text that is too short for one.
pub fn passages(
    tokenizer: &TextTokenizer,
    text: &str,
    [skip, length, count]: [usize; 3],
) -> Outcome<Vec<Passage>> {
    let (tokens, places) = tokenizer.encode(text)?;
    let free = tokens.len().saturating_sub(skip);
    if length < 2 || free < length {
        return Err(Failure::new(format!(
            "--context is {length}, but --text has {free} tokens{}",
            if skip > 0 {
                format!(" after the first {skip}, which chose the setting")
            } else {
                String::new()
            }
        ))
        .hint("give more text, or a context of at least 2 tokens that it has"));
    }
    let count = count.clamp(1, free / length);
    let mut ends = vec![0];
    ends.extend(places.iter().scan(0, |last, place| {
        *last = place.1.max(*last);
        Some(*last)
    }));
    let spare = free - count * length;
    Ok((0..count)
        .map(|i| {
            let from = skip + i * length + spare * i / (count - 1).max(1);
            let sizes = (from..from + length).map(|t| ends[t + 1] - ends[t]);
            Passage { tokens: tokens[from..from + length].to_vec(), bytes: sizes.collect() }
        })
        .collect())
}
