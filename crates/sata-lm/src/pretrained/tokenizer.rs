//! Tokenizers of models that somebody else made.

use std::path::Path;

use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::bert::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::bert::BertProcessing;
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

use super::error::PretrainedError;
use super::gguf::{Metadata, Value};

/// Text to tokens and back.
#[derive(Clone, Debug)]
pub struct TextTokenizer {
    inner: Tokenizer,
    /// Put before a text.
    begin: Option<u32>,
    /// Ends a text.
    end: Option<u32>,
}

/// Tokens, and the first byte of a text and the byte after the last that each stands for.
pub type Encoded = (Vec<u32>, Vec<(usize, usize)>);

/// Words of the tokenizers that split as GPT-2's does.
const GPT2: [&str; 4] = ["default", "gpt-2", "gpt2", "jais"];
/// … and digits one by one first.
const DIGITS: [&str; 4] = ["smollm", "starcoder", "refact", "command-r"];
/// How Llama 3 splits text.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Types of tokens in GGUF that text is not split into.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

impl TextTokenizer {
    /// The byte-level BPE tokenizer inside a GGUF file.
    ///
    /// # Errors
    /// [`PretrainedError::Unsupported`] for another kind, [`PretrainedError::File`] for parts that are
    /// missing or do not fit each other.
    pub fn from_gguf(file: &str, metadata: &Metadata) -> Result<Self, PretrainedError> {
        let unsupported = |what: &str, value: &str, known: String| PretrainedError::Unsupported {
            file: file.into(),
            what: what.into(),
            value: value.into(),
            known,
        };
        let text = |key: &str| metadata.get(key).and_then(Value::as_text).unwrap_or("not said");
        let model = text("tokenizer.ggml.model");
        if model != "gpt2" {
            let known = "gpt2; a tokenizer.json beside the file is taken instead, if there is one";
            return Err(unsupported("tokenizer.ggml.model", model, known.into()));
        }
        let split = match metadata.get("tokenizer.ggml.pre").and_then(Value::as_text) {
            None => byte_level(true).into(),
            Some(pre) if GPT2.contains(&pre) => byte_level(true).into(),
            Some(pre) if DIGITS.contains(&pre) => {
                Sequence::new(vec![Digits::new(true).into(), byte_level(true).into()]).into()
            }
            Some("llama-bpe" | "llama3" | "llama-v3") => {
                let pattern = SplitPattern::Regex(LLAMA3.into());
                let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                    .map_err(|error| PretrainedError::file(file, error.to_string()))?;
                Sequence::new(vec![split.into(), byte_level(false).into()]).into()
            }
            Some(pre) => {
                let known = [&GPT2[..], &DIGITS[..], &["llama-bpe"]].concat().join(", ");
                return Err(unsupported("tokenizer.ggml.pre", pre, known));
            }
        };
        Self::byte_level_bpe(file, metadata, split)
    }

    fn byte_level_bpe(
        file: &str,
        metadata: &Metadata,
        split: PreTokenizerWrapper,
    ) -> Result<Self, PretrainedError> {
        let fail = |reason: String| PretrainedError::file(file, reason);
        let array = |key: &str| {
            let found = metadata.get(key).and_then(Value::as_array);
            found.ok_or_else(|| fail(format!("its metadata has no array {key}")))
        };
        let tokens = array("tokenizer.ggml.tokens")?;
        let mut names = Vec::with_capacity(tokens.len());
        for (i, token) in tokens.iter().enumerate() {
            let name = token.as_text();
            names.push(name.ok_or_else(|| fail(format!("token {i} is {token}, no text")))?);
        }
        let mut merges = vec![];
        for (i, merge) in array("tokenizer.ggml.merges")?.iter().enumerate() {
            let pair = merge.as_text().and_then(|text| {
                // A space alone may begin the first part.
                let at = text.char_indices().skip(1).find(|(_, c)| *c == ' ')?.0;
                Some((text[..at].to_string(), text[at + 1..].to_string()))
            });
            merges.push(pair.ok_or_else(|| fail(format!("merge {i} is {merge}, no two parts")))?);
        }
        let vocab: Vec<(String, u32)> =
            names.iter().enumerate().map(|(i, name)| (name.to_string(), i as u32)).collect();
        let bpe = BPE::builder()
            .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
            .build()
            .map_err(|error| fail(format!("its tokenizer: {error}")))?;
        let mut inner = Tokenizer::new(bpe);
        inner.with_pre_tokenizer(Some(split));
        inner.with_decoder(Some(ByteLevelDecoder::default()));
        if let Some(types) = metadata.get("tokenizer.ggml.token_type").and_then(Value::as_array) {
            let special: Vec<AddedToken> = names
                .iter()
                .zip(types)
                .filter(|(_, kind)| matches!(kind.as_u64(), Some(CONTROL | USER_DEFINED)))
                .map(|(name, kind)| AddedToken::from(*name, kind.as_u64() == Some(CONTROL)))
                .collect();
            inner.add_special_tokens(special).map_err(|error| fail(error.to_string()))?;
        }
        let id = |key: &str| -> Result<Option<u32>, PretrainedError> {
            match metadata.get(key) {
                None => Ok(None),
                Some(value) => match value.as_u64() {
                    Some(id) if (id as usize) < names.len() => Ok(Some(id as u32)),
                    _ => {
                        Err(fail(format!("{key} is {value}, but there are {} tokens", names.len())))
                    }
                },
            }
        };
        let begins = metadata.get("tokenizer.ggml.add_bos_token") == Some(&Value::Bool(true));
        let begin = if begins { id("tokenizer.ggml.bos_token_id")? } else { None };
        Ok(TextTokenizer { inner, begin, end: id("tokenizer.ggml.eos_token_id")? })
    }

    /// A `tokenizer.json`.
    ///
    /// # Errors
    /// [`PretrainedError::File`] when it is none.
    pub fn from_json(path: &Path) -> Result<Self, PretrainedError> {
        let name = path.display().to_string();
        let bytes = std::fs::read(path).map_err(|e| PretrainedError::io(path, "reading", e))?;
        let mut inner = Tokenizer::from_bytes(bytes)
            .map_err(|error| PretrainedError::file(&name, error.to_string()))?;
        // Texts are cut and padded, if at all, by whoever asks.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| PretrainedError::file(&name, e.to_string()))?;
        let end = ["<|endoftext|>", "</s>", "<|end_of_text|>", "[SEP]"];
        let end = end.iter().find_map(|token| inner.token_to_id(token));
        Ok(TextTokenizer { inner, begin: None, end })
    }

    /// BERT's WordPiece tokenizer of a `vocab.txt`.
    ///
    /// # Errors
    /// [`PretrainedError::File`] when it lacks the tokens that begin and end a text.
    pub fn word_piece(path: &Path, lowercase: bool) -> Result<Self, PretrainedError> {
        let name = path.display().to_string();
        let fail = |reason: String| PretrainedError::file(&name, reason);
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|error| PretrainedError::io(path, "reading", error))?;
        let vocab: Vocab =
            text.lines().enumerate().map(|(i, token)| (token.to_string(), i as u32)).collect();
        let model = WordPiece::builder()
            .vocab(vocab)
            .unk_token("[UNK]".into())
            .build()
            .map_err(|error| fail(error.to_string()))?;
        let mut inner = Tokenizer::new(model);
        let id = |inner: &Tokenizer, token: &str| match inner.token_to_id(token) {
            Some(id) => Ok((token.to_string(), id)),
            None => Err(fail(format!("it has no token {token}"))),
        };
        let (end, begin) = (id(&inner, "[SEP]")?, id(&inner, "[CLS]")?);
        id(&inner, "[UNK]")?;
        let normalizer = BertNormalizer::new(true, true, None, lowercase);
        inner.with_normalizer(Some(normalizer)).map_err(|error| fail(error.to_string()))?;
        inner.with_pre_tokenizer(Some(BertPreTokenizer));
        inner.with_post_processor(Some(BertProcessing::new(end.clone(), begin)));
        Ok(TextTokenizer { inner, begin: None, end: Some(end.1) })
    }

    /// Tokens that there are.
    pub fn vocab(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The token that ends a text, if it has one.
    pub fn end_of_text(&self) -> Option<u32> {
        self.end
    }

    /// Tokens of a text, with what the tokenizer puts around it; those stand for no bytes.
    ///
    /// # Errors
    /// [`PretrainedError::Input`] for text that it cannot take.
    pub fn encode(&self, text: &str) -> Result<Encoded, PretrainedError> {
        let encoding = self
            .inner
            .encode(text, true)
            .map_err(|error| PretrainedError::Input(format!("tokenizing: {error}")))?;
        let (mut ids, mut places) = (vec![], vec![]);
        if let Some(begin) = self.begin {
            ids.push(begin);
            places.push((0, 0));
        }
        ids.extend_from_slice(encoding.get_ids());
        places.extend_from_slice(encoding.get_offsets());
        Ok((ids, places))
    }

    /// Text of tokens, without those that are not text.
    ///
    /// # Errors
    /// [`PretrainedError::Input`] for tokens that it does not have.
    pub fn decode(&self, ids: &[u32]) -> Result<String, PretrainedError> {
        self.inner
            .decode(ids, true)
            .map_err(|error| PretrainedError::Input(format!("tokens to text: {error}")))
    }
}

fn byte_level(splits: bool) -> ByteLevel {
    ByteLevel::new(false, true, splits)
}
