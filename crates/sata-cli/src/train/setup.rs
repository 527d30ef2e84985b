//! From arguments to a training that can begin.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use sata_lm::train::{
    Checkpoint, Corpus, Folder, HeldOut, Identity, SMALLEST_VOCAB, Settings, Text, TrainError,
    Trainer, hex, read_texts,
};
use sata_lm::{Config, END_OF_TEXT, Model, Tokenizer, initial_weights};

use super::TrainArgs;
use super::tokens::Kept;
use crate::failure::{Failure, Outcome};

/// Occurrences that a run of bytes needs to become a token.
const MIN_FREQUENCY: u64 = 2;

/// A training that can begin, or go on.
pub struct Setup {
    pub settings: Settings,
    pub identity: Identity,
    pub config: Config,
    pub folder: Folder,
    pub trainer: Trainer<Model>,
}

impl Setup {
    /// Reads, checks and makes everything.
    ///
    /// # Errors
    /// Whatever of it is wrong. Of a new training nothing is written before all is right.
    pub fn new(args: &TrainArgs, threads: usize, device: &Device) -> Outcome<Self> {
        let settings = settings(args)?;
        let resumed = match args.resume {
            true => Some(Folder::resume(&args.out)?),
            false => {
                Folder::check_vacant(&args.out).map_err(|error| {
                    Failure::from(error).hint("--resume goes on; a new training needs a new folder")
                })?;
                None
            }
        };
        let texts = read_texts(&args.text)?;
        let held_out = HeldOut::read(&settings.train.validation)?;
        check_size(&texts, &settings)?;
        let tokenizer = match (&args.tokenizer, &resumed, &args.from) {
            (Some(path), ..) => Tokenizer::load(path)?,
            (None, Some(folder), _) => Tokenizer::load(folder.tokenizer())?,
            (None, None, Some(from)) => Tokenizer::load(from.join("tokenizer.json"))?,
            (None, None, None) => train_tokenizer(&texts, settings.tokenizer.vocab)?,
        };
        let mut marks: Vec<_> = texts.iter().map(Text::mark).collect();
        if let HeldOut::Texts(texts) = &held_out {
            marks.extend(texts.iter().map(Text::mark));
        }
        let identity = Identity {
            settings: settings.clone(),
            texts: marks,
            tokenizer: hex(&tokenizer.digest()),
        };
        let config = settings.model.config(tokenizer.vocab());
        config.check().map_err(|reason| wrong(&args.config, &reason))?;
        let checkpoint = match &resumed {
            Some(folder) => Some(checkpoint(folder, &identity)?),
            None => None,
        };
        let kept = Kept::new(args.tokens.as_deref(), identity.tokenizer.clone())?;
        let encode = |text: &str| {
            kept.tokens(text, |text| {
                tokenizer.encode(text).map_err(|error| TrainError::Unfit(error.to_string()))
            })
        };
        let longest = settings.train.longest();
        let corpus = Corpus::new(&texts, &held_out, longest, END_OF_TEXT, encode)?;
        drop((texts, held_out));
        let train = settings.train.clone();
        let trainer = match checkpoint {
            Some(mut checkpoint) => {
                checkpoint.weights = on(device, checkpoint.weights)?;
                Trainer::resume(train, corpus, threads, checkpoint, |vars| {
                    model(args, &config, vars)
                })?
            }
            None => {
                let mut weights = initial_weights(&config, settings.train.seed)
                    .map_err(|error| TrainError::Model(Box::new(error)))?;
                if let Some(from) = &args.from {
                    weights = weights_of(from, &weights)?;
                }
                let weights = on(device, weights)?;
                Trainer::new(train, corpus, threads, &weights, |vars| model(args, &config, vars))?
            }
        };
        let folder = match resumed {
            Some(folder) => folder,
            None => {
                let folder = Folder::begin(&args.out)?;
                folder.write("tokenizer.json", tokenizer.json().as_bytes())?;
                folder
            }
        };
        Ok(Setup { settings, identity, config, folder, trainer })
    }
}

/// The model over some variables, under a watch where that is asked for.
fn model(
    args: &TrainArgs,
    config: &Config,
    vars: &BTreeMap<String, Var>,
) -> Result<Model, Box<dyn std::error::Error + Send + Sync>> {
    let model = Model::from_vars(config, vars)?;
    Ok(if args.check_finite { model.watched() } else { model })
}

/// Those of a model's folder, of the names and shapes of `like`, as f32.
fn weights_of(folder: &Path, like: &BTreeMap<String, Tensor>) -> Outcome<BTreeMap<String, Tensor>> {
    let path = folder.join("model.safetensors");
    let wrong = |reason: String| Failure::new(format!("--from {}: {reason}", path.display()));
    if let Err(error) = std::fs::metadata(&path) {
        return Err(Failure::io(&path, "reading", &error));
    }
    let mut found = candle_core::safetensors::load(&path, &Device::Cpu)
        .map_err(|error| wrong(error.to_string()))?;
    let mut weights = BTreeMap::new();
    for (name, like) in like {
        let Some(weight) = found.remove(name) else {
            return Err(wrong(format!("{name} is missing, of shape {:?}", like.dims())));
        };
        if weight.dims() != like.dims() {
            let (is, asked) = (weight.dims(), like.dims());
            return Err(wrong(format!("{name} has shape {is:?}, the settings ask for {asked:?}")));
        }
        let weight = weight.to_dtype(DType::F32).map_err(TrainError::from)?;
        weights.insert(name.clone(), weight);
    }
    if let Some(name) = found.keys().min() {
        return Err(wrong(format!("the settings have no {name}")));
    }
    Ok(weights)
}

/// Weights brought to a device.
fn on(device: &Device, weights: BTreeMap<String, Tensor>) -> Outcome<BTreeMap<String, Tensor>> {
    let there = |(name, weight): (String, Tensor)| Ok((name, weight.to_device(device)?));
    let weights = weights.into_iter().map(there).collect::<Result<_, TrainError>>();
    Ok(weights?)
}

/// The file's settings with what the command line changes of them.
fn settings(args: &TrainArgs) -> Outcome<Settings> {
    let mut settings = Settings::load(&args.config)?;
    if let Some(words) = &args.attention {
        let attention = settings.model.attention.in_words(words);
        settings.model.attention =
            attention.map_err(|reason| Failure::new(format!("--attention {words}: {reason}")))?;
    }
    if let Some(steps) = args.steps {
        settings.train.steps = steps;
    }
    if let Some(seed) = args.seed {
        settings.train.seed = seed;
    }
    settings.check().map_err(|reason| {
        let said = match &args.attention {
            Some(words) if reason.contains("attention") => format!("--attention {words}: {reason}"),
            _ => format!("{} with the command line: {reason}", args.config.display()),
        };
        Failure::new(said)
    })?;
    Ok(settings)
}

fn wrong(config: &Path, reason: &str) -> Failure {
    Failure::new(format!("{}: {reason}", config.display()))
}

/// Refuses what no tokenizer could make long enough, before one is trained.
fn check_size(texts: &[Text], settings: &Settings) -> Outcome {
    let bytes: usize = texts.iter().map(|text| text.text.len()).sum();
    let (most, longest) = (bytes + texts.len(), settings.train.longest());
    if most <= longest {
        return Err(Failure::new(format!(
            "--text: {bytes} bytes are too few for a sequence of {longest} tokens"
        )));
    }
    Ok(())
}

fn train_tokenizer(texts: &[Text], vocab: usize) -> Outcome<Tokenizer> {
    if vocab == SMALLEST_VOCAB {
        return Ok(Tokenizer::bytes()?);
    }
    let texts = texts.iter().map(|text| text.text.as_str());
    Ok(Tokenizer::train(texts, vocab, MIN_FREQUENCY)?)
}

fn checkpoint(folder: &Folder, identity: &Identity) -> Outcome<Checkpoint> {
    let checkpoint = folder.checkpoint()?;
    checkpoint.header.identity.check(identity).map_err(|reason| {
        Failure::new(format!("{}: {reason}", folder.path().display()))
            .hint("--resume goes on with the same settings, text and tokenizer alone")
    })?;
    Ok(checkpoint)
}
