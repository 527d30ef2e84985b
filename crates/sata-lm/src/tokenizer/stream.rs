use super::{Tokenizer, TokenizerError};

/// Decodes token by token: gives text as soon as its characters are complete.
///
/// All that it gave and what [`Stream::finish`] gives are together what [`Tokenizer::decode`] makes
/// of the same tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stream {
    pending: Vec<u8>,
}

impl Stream {
    /// One that withholds nothing yet.
    pub fn new() -> Self {
        Stream::default()
    }

    /// One that goes on where another with these [`Stream::pending`] bytes stopped.
    ///
    /// # Errors
    /// [`TokenizerError::Pending`] for bytes that are not the beginning of a character.
    pub fn resume(pending: &[u8]) -> Result<Self, TokenizerError> {
        match std::str::from_utf8(pending) {
            Ok("") => Ok(Stream::default()),
            Err(e) if e.valid_up_to() == 0 && e.error_len().is_none() => {
                Ok(Stream { pending: pending.to_vec() })
            }
            _ => Err(TokenizerError::Pending { bytes: pending.to_vec() }),
        }
    }

    /// Bytes withheld, at most 3: the beginning of a character.
    pub fn pending(&self) -> &[u8] {
        &self.pending
    }

    /// Takes the next token in; gives the text that is complete now, which may be none.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownToken`]; the stream is then as it was.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, TokenizerError> {
        self.pending.extend_from_slice(tokenizer.token_bytes(id)?);
        let mut text = String::new();
        let mut taken = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            taken += chunk.valid().len();
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            let is_last = taken + invalid.len() == self.pending.len();
            let is_unfinished =
                matches!(std::str::from_utf8(invalid), Err(e) if e.error_len().is_none());
            if is_last && is_unfinished {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            taken += invalid.len();
        }
        self.pending.drain(..taken);
        Ok(text)
    }

    /// What remains: a replacement character where a character was begun and not finished.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}
