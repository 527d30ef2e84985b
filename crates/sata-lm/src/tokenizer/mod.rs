//! Byte-level BPE: text to tokens and back, whatever its bytes.

mod alphabet;
mod chunks;
mod error;
mod stream;

pub use error::TokenizerError;
pub use stream::Stream;

use std::io::Write;
use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, Model, ModelWrapper, NormalizerWrapper, PostProcessorWrapper,
    PreTokenizerWrapper, TokenizerBuilder, TokenizerImpl,
};

use chunks::chunks;

/// The token that ends a text; it stands between the texts of a corpus, and no text encodes to it.
pub const END_OF_TEXT: u32 = 0;
/// Its name, and what it decodes to.
pub const END_OF_TEXT_NAME: &str = "<|endoftext|>";

/// The smallest vocabulary: the end of a text, and every byte.
const LEAST_VOCAB: usize = 257;
/// The largest: as a model's.
const MOST_VOCAB: usize = 1 << 24;
/// Bytes of text that are encoded at a time.
const PIECE: usize = 1 << 16;

type Inner = TokenizerImpl<
    ModelWrapper,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// A byte-level BPE tokenizer: token 0 is the end of a text, every byte is a token, and the others
/// are frequent runs of bytes within words.
///
/// Its file is the `tokenizer.json` of the `tokenizers` crate and of Hugging Face.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Inner,
    /// The bytes of every token.
    tokens: Vec<Box<[u8]>>,
    json: String,
}

impl Tokenizer {
    /// Learns up to `vocab` tokens from texts, those that occur at least `min_frequency` times;
    /// fewer when the texts hold no more. The same texts always give the same tokens.
    ///
    /// # Errors
    /// [`TokenizerError::Vocab`] below 257 or above 2²⁴, [`TokenizerError::NoText`] when all texts
    /// are empty.
    pub fn train<'a, I>(texts: I, vocab: usize, min_frequency: u64) -> Result<Self, TokenizerError>
    where
        I: IntoIterator<Item = &'a str>,
        I::IntoIter: Send,
    {
        if !(LEAST_VOCAB..=MOST_VOCAB).contains(&vocab) {
            return Err(TokenizerError::Vocab { vocab, least: LEAST_VOCAB, most: MOST_VOCAB });
        }
        let mut pieces = texts.into_iter().flat_map(|text| chunks(text, PIECE)).peekable();
        if pieces.peek().is_none() {
            return Err(TokenizerError::NoText);
        }
        Self::learn(pieces, vocab, min_frequency)
    }

    /// The tokenizer without merges: 257 tokens, every byte and the end of a text.
    ///
    /// # Errors
    /// None in practice; those of [`Tokenizer::train`] in type.
    pub fn bytes() -> Result<Self, TokenizerError> {
        Self::learn(std::iter::empty::<&str>(), LEAST_VOCAB, 0)
    }

    fn learn<'a>(
        pieces: impl Iterator<Item = &'a str> + Send,
        vocab: usize,
        min_frequency: u64,
    ) -> Result<Self, TokenizerError> {
        let fail = |e: tokenizers::Error| TokenizerError::Inner {
            doing: "training a tokenizer",
            reason: e.to_string(),
        };
        let byte_level = ByteLevel::new(false, true, true);
        let mut inner = TokenizerBuilder::<
            BPE,
            NormalizerWrapper,
            PreTokenizerWrapper,
            PostProcessorWrapper,
            DecoderWrapper,
        >::new()
        .with_model(BPE::default())
        .with_normalizer(None)
        .with_pre_tokenizer(Some(byte_level.into()))
        .with_post_processor(None)
        .with_decoder(Some(byte_level.into()))
        .build()
        .map_err(fail)?;
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(vocab)
            .min_frequency(min_frequency)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT_NAME, true)])
            .build();
        inner.train(&mut trainer, pieces).map_err(fail)?;
        let json = inner.to_string(false).map_err(fail)?;
        Self::from_bytes(json.as_bytes())
    }

    /// Reads a tokenizer from a file.
    ///
    /// # Errors
    /// [`TokenizerError::Io`] when it cannot be read, [`TokenizerError::File`] when it is no
    /// tokenizer of this kind.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|source| TokenizerError::Io {
            path: path.into(),
            doing: "reading",
            source,
        })?;
        Self::from_bytes(&bytes).map_err(|error| match error {
            TokenizerError::Format { reason } => TokenizerError::File { path: path.into(), reason },
            other => other,
        })
    }

    /// Reads a tokenizer from a file's bytes.
    ///
    /// # Errors
    /// [`TokenizerError::Format`] when it is no byte-level BPE tokenizer, lacks a byte, or does not
    /// end texts with token 0.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let fail = |reason: String| TokenizerError::Format { reason };
        let mut inner: Inner = serde_json::from_slice(bytes).map_err(|e| fail(e.to_string()))?;
        if !matches!(inner.get_model(), ModelWrapper::BPE(_)) {
            return Err(fail("its model is not BPE".into()));
        }
        if inner.get_normalizer().is_some() {
            return Err(fail("it has a normalizer, which changes text".into()));
        }
        match inner.get_pre_tokenizer() {
            Some(PreTokenizerWrapper::ByteLevel(b)) if !b.add_prefix_space => {}
            _ => return Err(fail("its pre-tokenizer is not ByteLevel without prefix".into())),
        }
        let tokens = Self::tokens(&inner).map_err(fail)?;
        // A text that spells the name of the end of a text is no end of a text.
        inner.set_encode_special_tokens(true);
        let json = inner.to_string(false).map_err(|e| fail(e.to_string()))?;
        Ok(Tokenizer { inner, tokens, json })
    }

    /// The bytes of every token.
    fn tokens(inner: &Inner) -> Result<Vec<Box<[u8]>>, String> {
        let vocab = inner.get_vocab_size(true);
        if inner.get_model().get_vocab_size() != vocab {
            return Err("it has added tokens besides its vocabulary".into());
        }
        if inner.get_added_vocabulary().get_added_tokens_decoder().len() != 1 {
            return Err(format!("its added tokens are not {END_OF_TEXT_NAME} alone"));
        }
        if vocab > MOST_VOCAB {
            return Err(format!("it has {vocab} tokens, more than {MOST_VOCAB}"));
        }
        let mut tokens = Vec::with_capacity(vocab);
        let mut single = [false; 256];
        for id in 0..vocab as u32 {
            let Some(name) = inner.id_to_token(id) else {
                return Err(format!("it has {vocab} tokens, but none with the number {id}"));
            };
            if id == END_OF_TEXT {
                if name != END_OF_TEXT_NAME {
                    return Err(format!("its token 0 is {name:?}, not {END_OF_TEXT_NAME:?}"));
                }
                tokens.push(END_OF_TEXT_NAME.as_bytes().into());
                continue;
            }
            let bytes: Option<Box<[u8]>> = name.chars().map(alphabet::byte).collect();
            let Some(bytes) = bytes.filter(|bytes| !bytes.is_empty()) else {
                return Err(format!("its token {id}, {name:?}, does not stand for bytes"));
            };
            if let [byte] = *bytes {
                single[usize::from(byte)] = true;
            }
            tokens.push(bytes);
        }
        match single.iter().position(|there| !there) {
            Some(byte) => Err(format!("it has no token for the byte {byte}")),
            None => Ok(tokens),
        }
    }

    /// Writes the tokenizer's file aside, and puts it in place when it is whole.
    ///
    /// # Errors
    /// [`TokenizerError::Io`]; a file that was there is then still there.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), TokenizerError> {
        let path = path.as_ref();
        let fail = |source| TokenizerError::Io { path: path.into(), doing: "writing", source };
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(".tokenizer-");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let mut file = builder.tempfile_in(folder).map_err(fail)?;
        file.write_all(self.json.as_bytes()).map_err(fail)?;
        file.as_file().sync_all().map_err(fail)?;
        file.persist(path).map_err(|e| fail(e.error))?;
        Ok(())
    }

    /// The tokens of a text. None of them is [`END_OF_TEXT`].
    ///
    /// # Errors
    /// [`TokenizerError::Inner`] should the tokenizer refuse, which no text makes it do.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let pieces: Vec<&str> = chunks(text, PIECE).collect();
        let encode = |piece: &&str| match self.inner.encode_fast(*piece, false) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(e) => {
                Err(TokenizerError::Inner { doing: "encoding a text", reason: e.to_string() })
            }
        };
        let ids: Result<Vec<Vec<u32>>, _> = pieces.par_iter().map(encode).collect();
        Ok(ids?.concat())
    }

    /// The text of tokens. Where their bytes are not UTF-8 it has replacement characters; otherwise
    /// it is exact.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownToken`].
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        let bytes = self.decode_bytes(ids)?;
        Ok(match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
        })
    }

    /// The bytes of tokens.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownToken`].
    pub fn decode_bytes(&self, ids: &[u32]) -> Result<Vec<u8>, TokenizerError> {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.token_bytes(id)?);
        }
        Ok(bytes)
    }

    /// The bytes of one token.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownToken`].
    pub fn token_bytes(&self, id: u32) -> Result<&[u8], TokenizerError> {
        match self.tokens.get(id as usize) {
            Some(bytes) => Ok(bytes),
            None => Err(TokenizerError::UnknownToken { id, vocab: self.vocab() }),
        }
    }

    /// The token of a single byte.
    pub fn byte_token(&self, byte: u8) -> u32 {
        let id = self.inner.token_to_id(&alphabet::character(byte).to_string());
        // Every tokenizer is refused that lacks a byte.
        id.unwrap_or(END_OF_TEXT)
    }

    /// Number of tokens.
    pub fn vocab(&self) -> usize {
        self.tokens.len()
    }

    /// SHA-256 of its file.
    pub fn digest(&self) -> [u8; 32] {
        Sha256::digest(&self.json).into()
    }

    /// Its file: JSON.
    pub fn json(&self) -> &str {
        &self.json
    }
}
