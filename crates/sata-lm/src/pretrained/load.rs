//! From a path to a model and its tokenizer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bert::{Bert, BertConfig};
use super::error::PretrainedError;
use super::gguf::Gguf;
use super::llama::{Llama, LlamaConfig};
use super::safe::SafeTensorsFile;
use super::tokenizer::TextTokenizer;

/// A model that somebody else made, and its tokenizer.
#[derive(Clone, Debug)]
pub struct Pretrained {
    /// The model.
    pub model: Kind,
    /// What its tokens are.
    pub tokenizer: TextTokenizer,
    /// The file or folder that it came from.
    pub source: PathBuf,
}

/// Which kind of model.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A decoder.
    Llama(Arc<Llama>),
    /// An encoder.
    Bert(Arc<Bert>),
}

const CONFIG_FILE: &str = "config.json";
const TOKENIZER_FILE: &str = "tokenizer.json";
const VOCAB_FILE: &str = "vocab.txt";
const ENDING: &str = "gguf";

impl Pretrained {
    /// Whether `path` looks like such a model: a GGUF file, a folder with one, or a folder with a
    /// `config.json` that names a `model_type`.
    pub fn is_at(path: &Path) -> bool {
        if path.is_file() || matches!(gguf_in(path), Ok(Some(_))) {
            return true;
        }
        let config = std::fs::read(path.join(CONFIG_FILE));
        let config = config.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        config.is_some_and(|config: serde_json::Value| config.get("model_type").is_some())
    }

    /// Reads a model: a GGUF file, a folder with one GGUF file, or a folder with `config.json`,
    /// safetensors (in one piece or in shards) and `tokenizer.json` or, for BERT, `vocab.txt`.
    ///
    /// # Errors
    /// What is missing, damaged, or of a kind that is not read.
    pub fn load(path: &Path) -> Result<Self, PretrainedError> {
        if path.is_file() {
            return Self::gguf(path);
        }
        if let Err(error) = path.metadata() {
            return Err(PretrainedError::io(path, "reading", error));
        }
        let has_config = path.join(CONFIG_FILE).is_file() && SafeTensorsFile::is_in(path);
        match gguf_in(path)? {
            Some(file) if !has_config => Self::gguf(&file),
            _ => Self::folder(path),
        }
    }

    fn gguf(path: &Path) -> Result<Self, PretrainedError> {
        let file = Gguf::open(path)?;
        let beside = path.with_file_name(TOKENIZER_FILE);
        let tokenizer = match TextTokenizer::from_gguf(file.name(), file.metadata()) {
            Err(_) if beside.is_file() => TextTokenizer::from_json(&beside)?,
            other => other?,
        };
        let model = Llama::from_gguf(file)?;
        fits(&path.display().to_string(), model.config().vocab, &tokenizer)?;
        Ok(Pretrained { model: Kind::Llama(model.into()), tokenizer, source: path.into() })
    }

    fn folder(folder: &Path) -> Result<Self, PretrainedError> {
        let path = folder.join(CONFIG_FILE);
        let name = path.display().to_string();
        let bytes =
            std::fs::read(&path).map_err(|error| PretrainedError::io(&path, "reading", error))?;
        let json: serde_json::Value = serde_json::from_slice(&bytes)
            .map_err(|error| PretrainedError::file(&name, error.to_string()))?;
        let kind = json.get("model_type").and_then(|kind| kind.as_str()).unwrap_or("not said");
        let tokenizer_file = folder.join(TOKENIZER_FILE);
        match kind {
            "llama" | "mistral" => {
                let config = LlamaConfig::from_json(&name, &json)?;
                let tokenizer = TextTokenizer::from_json(&tokenizer_file)?;
                fits(&name, config.vocab, &tokenizer)?;
                let model = Kind::Llama(Llama::from_safetensors(folder, config)?.into());
                Ok(Pretrained { model, tokenizer, source: folder.into() })
            }
            "bert" => {
                let config = BertConfig::from_json(&name, &json, folder)?;
                let tokenizer = if tokenizer_file.is_file() {
                    TextTokenizer::from_json(&tokenizer_file)?
                } else {
                    let lowercase = lowercase(folder);
                    TextTokenizer::word_piece(&folder.join(VOCAB_FILE), lowercase)?
                };
                fits(&name, config.vocab, &tokenizer)?;
                let model = Kind::Bert(Bert::from_safetensors(folder, config)?.into());
                Ok(Pretrained { model, tokenizer, source: folder.into() })
            }
            other => Err(PretrainedError::Unsupported {
                file: name,
                what: "model_type".into(),
                value: other.into(),
                known: "llama, mistral and bert".into(),
            }),
        }
    }
}

/// The only GGUF file of a folder.
fn gguf_in(folder: &Path) -> Result<Option<PathBuf>, PretrainedError> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Ok(None);
    };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|ending| ending == ENDING))
        .collect();
    files.sort();
    if let [first, second, ..] = &files[..] {
        let reason = format!(
            "it holds {} GGUF files ({}, {} …): name one of them",
            files.len(),
            first.display(),
            second.display()
        );
        return Err(PretrainedError::file(&folder.display().to_string(), reason));
    }
    Ok(files.pop())
}

/// What a `tokenizer_config.json` says about case; BERT's own default is to lower it.
fn lowercase(folder: &Path) -> bool {
    let bytes = std::fs::read(folder.join("tokenizer_config.json"));
    let json = bytes.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    json.and_then(|json: serde_json::Value| json.get("do_lower_case")?.as_bool()).unwrap_or(true)
}

/// A model may have more vectors than its tokenizer has tokens, not fewer.
fn fits(file: &str, vocab: usize, tokenizer: &TextTokenizer) -> Result<(), PretrainedError> {
    if tokenizer.vocab() > vocab {
        let reason = format!("the model has {vocab} tokens, its tokenizer {}", tokenizer.vocab());
        return Err(PretrainedError::file(file, reason));
    }
    Ok(())
}
