//! The text: printed as it is written, or kept to the end.

use std::io::{IsTerminal, stdout};

use sata_lm::{END_OF_TEXT, Stream, Tokenizer};

use crate::failure::{Failure, Outcome};
use crate::output::print;

/// What stands where the model ends a text and begins another.
const BETWEEN_TEXTS: &str = "\n\n* * *\n\n";

/// Tokens in, text out, as soon as its characters are complete.
pub struct Text<'a> {
    tokenizer: &'a Tokenizer,
    stream: Stream,
    /// All of it, where it is not printed.
    kept: Option<String>,
    is_on_terminal: bool,
    is_read: bool,
    /// Whether what was printed ends a line.
    ends_line: bool,
}

impl<'a> Text<'a> {
    /// One that goes on after `pending`, the beginning of a character. It is printed, or kept.
    ///
    /// # Errors
    /// Bytes that begin no character.
    pub fn new(tokenizer: &'a Tokenizer, pending: &[u8], keep: bool) -> Outcome<Self> {
        let stream =
            Stream::resume(pending).map_err(|error| Failure::from(error).context("--resume"))?;
        Ok(Text {
            tokenizer,
            stream,
            kept: keep.then(String::new),
            is_on_terminal: !keep && stdout().is_terminal(),
            is_read: true,
            ends_line: true,
        })
    }

    /// Whether it is printed on a terminal.
    pub fn is_on_terminal(&self) -> bool {
        self.is_on_terminal
    }

    /// Whether its reader is still there.
    pub fn is_read(&self) -> bool {
        self.is_read
    }

    /// Bytes withheld: the beginning of a character.
    pub fn pending(&self) -> &[u8] {
        self.stream.pending()
    }

    /// Adds tokens.
    ///
    /// # Errors
    /// A token that is none, an output that cannot be written.
    pub fn push(&mut self, tokens: &[u32]) -> Outcome {
        let mut text = String::new();
        for &token in tokens {
            if token == END_OF_TEXT {
                text.push_str(&std::mem::take(&mut self.stream).finish());
                text.push_str(BETWEEN_TEXTS);
            } else {
                text.push_str(&self.stream.push(self.tokenizer, token)?);
            }
        }
        self.put(&text)
    }

    /// Ends it, and gives it if it was kept. What is withheld stays so if the text will go on.
    ///
    /// # Errors
    /// An output that cannot be written.
    pub fn finish(mut self, will_go_on: bool) -> Outcome<Option<String>> {
        if !will_go_on {
            let rest = std::mem::take(&mut self.stream).finish();
            self.put(&rest)?;
        }
        if self.is_on_terminal && !self.ends_line {
            self.put("\n")?;
        }
        Ok(self.kept)
    }

    fn put(&mut self, text: &str) -> Outcome {
        if text.is_empty() || !self.is_read {
            return Ok(());
        }
        self.ends_line = text.ends_with('\n');
        match &mut self.kept {
            Some(kept) => kept.push_str(text),
            None => match print(text) {
                Err(Failure::BrokenPipe) => self.is_read = false,
                printed => printed?,
            },
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_end_are_set_apart_and_nothing_is_lost() {
        let tokenizer = Tokenizer::bytes().unwrap();
        let [a, half] = [b'a', "é".as_bytes()[0]].map(|byte| tokenizer.byte_token(byte));
        let mut text = Text::new(&tokenizer, &"€".as_bytes()[..2], true).unwrap();
        text.push(&[tokenizer.byte_token("€".as_bytes()[2]), half, END_OF_TEXT, a, half]).unwrap();
        assert_eq!(text.pending(), &"é".as_bytes()[..1]);
        let want = format!("€\u{fffd}{BETWEEN_TEXTS}a\u{fffd}");
        assert_eq!(text.finish(false).unwrap(), Some(want));
    }
}
