//! A training from beginning to end, over a model small enough to see through.

use std::collections::BTreeMap;
use std::error::Error;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::PathBuf;

use candle_core::{Device, Tensor, Var};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

use super::*;
use crate::{Attention, Config, Kernel, Position};

/// A seed that is printed, or taken from `SATA_TEST_SEED`.
pub fn seed() -> u64 {
    let seed = match std::env::var("SATA_TEST_SEED") {
        Ok(seed) => seed.parse().expect("SATA_TEST_SEED is a number"),
        Err(_) => RandomState::new().build_hasher().finish(),
    };
    println!("SATA_TEST_SEED={seed}");
    seed
}

const VOCAB: usize = 257;
const WIDTH: usize = 16;

/// Guesses the next token from the last one alone: logits are `out` times `embed`'s row.
#[derive(Debug)]
struct Bigram {
    embed: Var,
    out: Var,
}

impl Bigram {
    fn build(vars: &BTreeMap<String, Var>) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let var = |name: &str| vars.get(name).cloned().ok_or(format!("{name} is missing"));
        Ok(Bigram { embed: var("embed")?, out: var("out")? })
    }

    fn weights(seed: u64) -> BTreeMap<String, Tensor> {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut normal = |shape: (usize, usize)| {
            let numbers =
                (0..shape.0 * shape.1).map(|_| 0.1 * rng.sample::<f32, _>(StandardNormal));
            Tensor::from_vec(numbers.collect(), shape, &Device::Cpu).unwrap()
        };
        let (embed, out) = (normal((VOCAB, WIDTH)), normal((WIDTH, VOCAB)));
        BTreeMap::from([("embed".into(), embed), ("out".into(), out)])
    }
}

impl Objective for Bigram {
    fn loss(&self, tokens: &Tensor) -> Result<Tensor, Box<dyn Error + Send + Sync>> {
        let length = tokens.dim(1)? - 1;
        let last = tokens.narrow(1, 0, length)?.flatten_all()?;
        let next = tokens.narrow(1, 1, length)?.flatten_all()?;
        let logits = self.embed.index_select(&last, 0)?.matmul(&self.out)?;
        Ok(candle_nn::loss::cross_entropy(&logits, &next)?)
    }
}

fn settings(seed: u64) -> Settings {
    let attention = Attention {
        heads: 2,
        kv_heads: None,
        head_dim: 8,
        kernel: Kernel::Taylor { terms: 3 },
        near: Some(1),
        block: 16,
        sinks: 0,
        position: Position::Gates,
        qk_norm: false,
    };
    Settings {
        model: ModelSettings { layers: 1, width: WIDTH, mlp: 32, norm_eps: 1e-5, attention },
        tokenizer: TokenizerSettings { vocab: VOCAB },
        train: TrainSettings {
            steps: 12,
            batch: 8,
            micro_batch: 2,
            context: 32,
            lengths: vec![8, 32, 64],
            learning_rate: 3e-2,
            min_learning_rate: 3e-3,
            warmup: 2,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            clip: 1.0,
            seed,
            evaluate_every: 5,
            evaluate_tokens: 256,
            checkpoint_every: 4,
            validation: Validation::Fraction(0.2),
        },
    }
}

fn bytes(text: &str) -> Result<Vec<u32>, TrainError> {
    Ok(text.bytes().map(|byte| u32::from(byte) + 1).collect())
}

fn texts() -> Vec<Text> {
    let text = "the quick brown fox jumps over the lazy dog\n".repeat(60);
    vec![Text { path: "fox.txt".into(), text }]
}

fn corpus(settings: &Settings) -> Corpus {
    let held_out = HeldOut::read(&settings.train.validation).unwrap();
    Corpus::new(&texts(), &held_out, settings.train.longest(), 0, bytes).unwrap()
}

fn identity(settings: &Settings) -> Identity {
    let texts = texts().iter().map(Text::mark).collect();
    Identity { settings: settings.clone(), texts, tokenizer: "t".into() }
}

fn begin(settings: &Settings, threads: usize) -> Trainer<Bigram> {
    let weights = Bigram::weights(settings.train.seed);
    Trainer::new(settings.train.clone(), corpus(settings), threads, &weights, Bigram::build)
        .unwrap()
}

fn resume(settings: &Settings, threads: usize, folder: &Folder) -> Trainer<Bigram> {
    let checkpoint = folder.checkpoint().unwrap();
    checkpoint.header.identity.check(&identity(settings)).unwrap();
    let train = settings.train.clone();
    Trainer::resume(train, corpus(settings), threads, checkpoint, Bigram::build).unwrap()
}

fn save(trainer: &Trainer<Bigram>, folder: &Folder, settings: &Settings) -> Result<(), TrainError> {
    folder.save(trainer, &identity(settings), &config(settings))
}

fn config(settings: &Settings) -> Config {
    settings.model.config(VOCAB)
}

/// Curve and weights, bit by bit.
fn bits(trainer: &Trainer<Bigram>) -> Vec<u64> {
    let mut bits = vec![];
    for point in trainer.curve() {
        let Point { step, loss, gradient_norm, learning_rate, validation } = *point;
        bits.push(step as u64);
        let numbers = [loss, gradient_norm, learning_rate, validation.unwrap_or(-1.0)];
        bits.extend(numbers.map(f64::to_bits));
    }
    for parameter in trainer.parameters() {
        let weights: Vec<f32> = parameter.var.flatten_all().unwrap().to_vec1().unwrap();
        let moments = [&parameter.moments.first, &parameter.moments.second];
        let all = moments.into_iter().flatten().chain(&weights);
        bits.extend(all.map(|x| u64::from(x.to_bits())));
    }
    bits
}

#[test]
fn the_curve_is_the_same_on_any_threads_and_after_any_resume() {
    let settings = settings(seed());
    let mut whole = begin(&settings, 1);
    while !whole.is_finished() {
        whole.step().unwrap();
    }
    assert_eq!(whole.curve().len(), 12);
    let evaluated: Vec<usize> =
        whole.curve().iter().filter(|p| p.validation.is_some()).map(|p| p.step).collect();
    assert_eq!(evaluated, [5, 10, 12]);
    for threads in [2, 3, 7] {
        let mut other = begin(&settings, threads);
        while !other.is_finished() {
            other.step().unwrap();
        }
        assert_eq!(bits(&whole), bits(&other), "{threads} threads");
    }
    let room = tempfile::tempdir().unwrap();
    let path = room.path().join("model");
    let mut trainer = begin(&settings, 2);
    let mut folder = Folder::begin(&path).unwrap();
    for stop in [4, 7, 11] {
        while trainer.curve().len() < stop {
            trainer.step().unwrap();
        }
        save(&trainer, &folder, &settings).unwrap();
        // Steps after the checkpoint are lost, and done again.
        trainer.step().unwrap();
        drop(folder);
        folder = Folder::resume(&path).unwrap();
        trainer = resume(&settings, stop % 3 + 1, &folder);
        assert_eq!(trainer.curve().len(), stop);
    }
    while !trainer.is_finished() {
        trainer.step().unwrap();
    }
    assert_eq!(bits(&whole), bits(&trainer), "resumed");
}

#[test]
fn gradients_are_those_of_the_whole_batch() {
    // One micro-batch of everything against many: the same mean, but for rounding.
    let mut settings = settings(seed());
    settings.train.lengths = vec![];
    settings.train.micro_batch = 1;
    settings.train.steps = 3;
    let point = begin(&settings, 2).step().unwrap();
    // Sequences are drawn by micro-batch and row; the same eight, as one batch.
    let corpus = corpus(&settings);
    let draw = data::Draw { seed: settings.train.seed };
    let rows: Vec<u32> = (0..8)
        .flat_map(|i| corpus.train.ids[draw.window(corpus.train.ids.len(), 32, [0, i, 0])].to_vec())
        .collect();
    let tokens = Tensor::from_vec(rows, (8, 33), &Device::Cpu).unwrap();
    let weights = Bigram::weights(settings.train.seed);
    let vars: BTreeMap<String, Var> =
        weights.iter().map(|(n, t)| (n.clone(), Var::from_tensor(t).unwrap())).collect();
    let loss = Bigram::build(&vars).unwrap().loss(&tokens).unwrap();
    let gradients = loss.backward().unwrap();
    let square: f32 = vars
        .values()
        .map(|v| gradients.get(v).unwrap().sqr().unwrap().sum_all().unwrap())
        .map(|sum| sum.to_scalar::<f32>().unwrap())
        .sum();
    let loss = f64::from(loss.to_scalar::<f32>().unwrap());
    // f32 means over 256 tokens of 257 logits.
    assert!((point.loss - loss).abs() < 1e-5 * loss, "{} {loss}", point.loss);
    let norm = f64::from(square).sqrt();
    assert!((point.gradient_norm - norm).abs() < 1e-4 * norm, "{} {norm}", point.gradient_norm);
}

#[test]
fn a_repetitive_text_is_learnt() {
    let mut settings = settings(seed());
    settings.train.steps = 60;
    let mut trainer = begin(&settings, 2);
    while !trainer.is_finished() {
        trainer.step().unwrap();
    }
    let (first, last) = (trainer.curve()[0].loss, trainer.curve()[59]);
    // Uniform over 257 tokens to begin with; the text's bigrams hold less than 1.4 nats.
    assert!((first - (VOCAB as f64).ln()).abs() < 0.1, "{first}");
    assert!(last.loss < 2.0 && last.validation.unwrap() < 2.0, "{last:?}");
}

#[test]
fn a_loss_or_gradient_that_is_not_finite_stops_training() {
    for name in ["embed", "out"] {
        let settings = settings(seed());
        let mut weights = Bigram::weights(1);
        let shape = weights[name].dims().to_vec();
        let numbers = vec![f32::NAN; shape.iter().product()];
        weights.insert(name.into(), Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap());
        let mut trainer =
            Trainer::new(settings.train.clone(), corpus(&settings), 2, &weights, Bigram::build)
                .unwrap();
        let error = trainer.step().unwrap_err().to_string();
        assert_eq!(error, "step 0: the loss is NaN");
        assert!(trainer.curve().is_empty());
        // And nothing that is not finite is stored.
        let room = tempfile::tempdir().unwrap();
        let folder = Folder::begin(&room.path().join("m")).unwrap();
        let error = save(&trainer, &folder, &settings).unwrap_err().to_string();
        assert!(error.contains(&format!("a weight of {name} is NaN")), "{error}");
        assert!(!folder.path().join("checkpoint.safetensors").exists());
    }
}

/// Finite loss, infinite gradient: √ at 0.
#[derive(Debug)]
struct Steep(Var);

impl Objective for Steep {
    fn loss(&self, _: &Tensor) -> Result<Tensor, Box<dyn Error + Send + Sync>> {
        Ok(self.0.sqrt()?.sum_all()?)
    }
}

#[test]
fn the_parameter_whose_gradient_is_not_finite_is_named() {
    let settings = settings(seed());
    let zeros = Tensor::zeros(3, candle_core::DType::F32, &Device::Cpu).unwrap();
    let weights = BTreeMap::from([("steep".to_string(), zeros)]);
    let build = |vars: &BTreeMap<String, Var>| Ok(Steep(vars["steep"].clone()));
    let mut trainer =
        Trainer::new(settings.train.clone(), corpus(&settings), 1, &weights, build).unwrap();
    let error = trainer.step().unwrap_err().to_string();
    assert!(error.contains("gradient of steep is inf"), "{error}");
    let after: Vec<f32> = trainer.model().0.to_vec1().unwrap();
    assert_eq!(after, [0.0; 3]);
}

#[test]
fn a_parameter_without_gradient_is_an_error() {
    let settings = settings(seed());
    let mut weights = Bigram::weights(1);
    weights.insert("idle".into(), Tensor::ones(2, candle_core::DType::F32, &Device::Cpu).unwrap());
    let mut trainer =
        Trainer::new(settings.train.clone(), corpus(&settings), 1, &weights, Bigram::build)
            .unwrap();
    let error = trainer.step().unwrap_err().to_string();
    assert!(error.contains("idle gets no gradient"), "{error}");
}

fn files(path: &std::path::Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().is_some_and(|name| name != ".training"))
        .map(|path| (path.clone(), std::fs::read(&path).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn a_write_that_fails_or_is_cut_short_loses_nothing() {
    let settings = settings(seed());
    let room = tempfile::tempdir().unwrap();
    let path = room.path().join("model");
    let folder = Folder::begin(&path).unwrap();
    let mut trainer = begin(&settings, 1);
    trainer.step().unwrap();
    save(&trainer, &folder, &settings).unwrap();
    let before = files(&path);
    let names = ["checkpoint.safetensors", "config.json", "model.safetensors", "training.json"];
    assert_eq!(before.len(), names.len());
    trainer.step().unwrap();
    #[cfg(target_os = "linux")]
    {
        // A disk that is full.
        let aside = path.join("checkpoint.safetensors.partial");
        std::os::unix::fs::symlink("/dev/full", &aside).unwrap();
        let error = save(&trainer, &folder, &settings).unwrap_err().to_string();
        assert!(error.contains("checkpoint.safetensors") && error.contains("space"), "{error}");
        assert!(files(&path) == before);
    }
    // A process that ended in the middle of writing.
    std::fs::write(path.join("checkpoint.safetensors.partial"), b"half of a").unwrap();
    drop(folder);
    let folder = Folder::resume(&path).unwrap();
    let resumed = resume(&settings, 1, &folder);
    assert_eq!(resumed.curve().len(), 1);
    save(&trainer, &folder, &settings).unwrap();
    assert_eq!(resume(&settings, 1, &folder).curve().len(), 2);
    assert!(!path.join("checkpoint.safetensors.partial").exists());
}

#[test]
fn broken_checkpoints_are_refused() {
    let settings = settings(seed());
    let room = tempfile::tempdir().unwrap();
    let path = room.path().join("model");
    assert!(Folder::resume(&path).unwrap_err().to_string().contains("nothing to resume"));
    let folder = Folder::begin(&path).unwrap();
    assert!(Folder::begin(&path).unwrap_err().to_string().contains("another training"));
    save(&begin(&settings, 1), &folder, &settings).unwrap();
    let begun = Folder::begin(&path).unwrap_err().to_string();
    assert!(begun.contains("holds checkpoint.safetensors already"), "{begun}");
    let file = path.join("checkpoint.safetensors");
    let good = std::fs::read(&file).unwrap();
    let load = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        folder.checkpoint().map(drop).map_err(|error| error.to_string())
    };
    load(&good).unwrap();
    for cut in [0, 4, 100, good.len() / 2, good.len() - 1] {
        let said = load(&good[..cut]).unwrap_err();
        assert!(said.contains("truncated or altered"), "{cut}: {said}");
    }
    let mut altered = good.clone();
    let last = altered.len() - 9;
    altered[last] ^= 1;
    assert!(load(&altered).unwrap_err().contains("digest"));
    let model = std::fs::read(path.join("model.safetensors")).unwrap();
    assert!(load(&model).unwrap_err().contains("not a checkpoint"));
}

#[test]
fn another_training_is_not_resumed() {
    let settings = settings(seed());
    let was = identity(&settings);
    let change = |f: &dyn Fn(&mut Identity)| {
        let mut now = was.clone();
        f(&mut now);
        was.check(&now)
    };
    assert_eq!(change(&|_| {}), Ok(()));
    assert_eq!(change(&|now| now.settings.train.checkpoint_every = 1), Ok(()));
    let said = change(&|now| now.settings.train.learning_rate = 0.5).unwrap_err();
    assert!(said.contains("train.learning_rate was 0.03") && said.contains("0.5"), "{said}");
    let said = change(&|now| now.texts[0].sha256 = "0".into()).unwrap_err();
    assert!(said.contains("fox.txt") && said.contains("other contents"), "{said}");
    let said = change(&|now| now.texts.push(was.texts[0].clone())).unwrap_err();
    assert!(said.contains("1 texts") && said.contains("2"), "{said}");
    let said = change(&|now| now.tokenizer = "u".into()).unwrap_err();
    assert!(said.contains("tokenizer"), "{said}");
}

#[test]
fn the_model_that_is_written_is_the_model_that_was_trained() {
    let settings = settings(seed());
    let room = tempfile::tempdir().unwrap();
    let folder = Folder::begin(&room.path().join("model")).unwrap();
    let mut trainer = begin(&settings, 1);
    trainer.step().unwrap();
    save(&trainer, &folder, &settings).unwrap();
    let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    assert_eq!(serde_json::from_slice::<Config>(&read("config.json")).unwrap(), config(&settings));
    let record: serde_json::Value = serde_json::from_slice(&read("training.json")).unwrap();
    assert_eq!(record["curve"][0]["loss"].as_f64(), Some(trainer.curve()[0].loss));
    assert_eq!(record["parameters"], 2 * VOCAB * WIDTH);
    let weights = read("model.safetensors");
    let weights = safetensors::SafeTensors::deserialize(&weights).unwrap();
    assert_eq!(weights.len(), 2);
    for parameter in trainer.parameters() {
        let stored = weights.tensor(&parameter.name).unwrap();
        assert_eq!(
            (stored.dtype(), stored.shape()),
            (safetensors::Dtype::F16, parameter.var.dims())
        );
        let trained: Vec<f32> = parameter.var.flatten_all().unwrap().to_vec1().unwrap();
        for (bytes, w) in stored.data().as_chunks().0.iter().zip(trained) {
            assert_eq!(half::f16::from_le_bytes(*bytes), half::f16::from_f32(w));
        }
    }
}
