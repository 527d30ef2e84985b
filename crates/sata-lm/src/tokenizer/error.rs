use std::path::PathBuf;

/// What went wrong with a tokenizer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A vocabulary of this size cannot be trained.
    #[error("vocab is {vocab}, it must be {least} (every byte, and the end of a text) to {most}")]
    Vocab {
        /// What was asked for.
        vocab: usize,
        /// The smallest possible.
        least: usize,
        /// The largest possible.
        most: usize,
    },
    /// There is nothing to train on.
    #[error("texts: there is no text to train on")]
    NoText,
    /// A file could not be read or written.
    #[error("{}: {doing}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Reading or writing.
        doing: &'static str,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file is no tokenizer of this kind.
    #[error("not a byte-level BPE tokenizer: {reason}")]
    Format {
        /// What is wrong with it.
        reason: String,
    },
    /// The same, with the file's name.
    #[error("{}: not a byte-level BPE tokenizer: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A token that is not in the vocabulary.
    #[error("token {id} is not in the vocabulary, whose {vocab} tokens are 0 to {}", vocab - 1)]
    UnknownToken {
        /// The token.
        id: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// Bytes given as the beginning of a character are not one.
    #[error("pending bytes {bytes:?} are not the beginning of a character in UTF-8")]
    Pending {
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// The tokenizer itself refused.
    #[error("{doing}: {reason}")]
    Inner {
        /// Training or encoding.
        doing: &'static str,
        /// What it said.
        reason: String,
    },
}
