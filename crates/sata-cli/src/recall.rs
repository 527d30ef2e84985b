//! `sata recall`: a small model trained on associative recall alone, and what it recalls.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use clap::Args;
use sata_lm::initial_weights;
use sata_lm::train::{RecallFile, RecallTrainer, TrainError};
use serde::Serialize;

use crate::failure::{Failure, Outcome};
use crate::machine;
use crate::numbers::size;
use crate::output::{say, say_json};
use crate::table::grouped;
use crate::train::device;

/// Train a small model on recalling pairs, and measure what it recalls
///
/// A sequence has pairs of random words, key and value, then filler, then every key again in another
/// order, each to be answered with its value; only the answers are trained on.
#[derive(Debug, Args)]
pub struct RecallArgs {
    /// Settings: TOML with the tables model, recall (words, pairs, join_below, distances, fillers) and train
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Take this instead of what the settings say, in the words of `sata train`
    #[arg(long, value_name = "WORDS")]
    attention: Option<String>,
    /// Take these heads instead: heads and elements of each, such as 8x16
    #[arg(long, value_name = "HEADSxDIM")]
    heads: Option<String>,
    /// Where it is trained: cpu, cuda, or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Threads, all processors if left away
    #[arg(long, value_name = "N", value_parser = size)]
    threads: Option<usize>,
    /// Take this instead of train.steps
    #[arg(long, value_name = "N", value_parser = size)]
    steps: Option<usize>,
    /// Take this instead of train.seed
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Stop training after so many seconds, wherever it is
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// Numbers of pairs to ask for at the end [default: those of the training]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pairs: Vec<usize>,
    /// Distances to ask over at the end [default: those of the training]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    distances: Vec<usize>,
    /// Sequences for each
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = size)]
    sequences: usize,
    /// Steps between looks at the accuracy
    #[arg(long, value_name = "N", default_value_t = 250, value_parser = size)]
    every: usize,
    /// Look at each layer's tensors and their gradients in every step, and stop at the first number
    /// that is not finite, which is named: slow, to find where it comes from
    #[arg(long)]
    check_finite: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

/// Accuracy while it is trained.
#[derive(Debug, Serialize)]
struct Look {
    step: usize,
    loss: f64,
    /// The largest number of pairs that it was trained on so far.
    joined: usize,
    accuracy: f64,
}

/// Accuracy at the end.
#[derive(Debug, Serialize)]
struct Row {
    pairs: usize,
    distance: usize,
    accuracy: f64,
}

#[derive(Debug, Serialize)]
struct Summary {
    attention: String,
    heads: usize,
    head_dim: usize,
    layers: usize,
    parameters: usize,
    /// Of all heads of a layer, f32; none for softmax, which keeps every token.
    state_bytes_per_layer: Option<u128>,
    steps: usize,
    seed: u64,
    seconds: f64,
    tokens_per_step: usize,
    /// Of the largest number of pairs of the training.
    curve: Vec<Look>,
    rows: Vec<Row>,
}

/// Seconds between lines.
const BETWEEN_LINES: Duration = Duration::from_secs(1);

/// Runs `sata recall`.
///
/// # Errors
/// Wrong settings, or a loss that is not finite.
pub fn run(args: &RecallArgs) -> Outcome {
    machine::keep_tensors_on_their_thread();
    machine::keep_tensor_memory();
    let file = settings(args)?;
    let device = device::open(&args.device)?;
    let threads = match args.threads {
        Some(threads) => threads,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let config = file.model.config(file.recall.vocab());
    let model = |error| TrainError::Model(Box::new(error));
    let weights = initial_weights(&config, file.train.seed).map_err(model)?;
    let there = |(name, weight): (String, Tensor)| Ok((name, weight.to_device(&device)?));
    let weights = weights.into_iter().map(there).collect::<Result<_, TrainError>>()?;
    let (task, train) = (file.recall.clone(), file.train.clone());
    let mut trainer = RecallTrainer::new(&config, task, train, threads, &weights)?;
    if args.check_finite {
        trainer = trainer.watched();
    }
    let began = Instant::now();
    let most = file.recall.pairs.iter().copied().max().unwrap_or(1);
    let nearest = file.recall.distances.iter().copied().min().unwrap_or(0);
    let (mut curve, mut line) = (vec![], None::<Instant>);
    while trainer.done() < file.train.steps {
        let point = trainer.step()?;
        let late = args.seconds.is_some_and(|most| began.elapsed().as_secs_f64() > most);
        let last = late || trainer.done() == file.train.steps;
        if last || trainer.done().is_multiple_of(args.every) {
            let accuracy = trainer.accuracy(most, nearest, args.sequences)?;
            let joined = trainer.joined().iter().copied().max().unwrap_or(1);
            curve.push(Look { step: point.step, loss: point.loss, joined, accuracy });
            if last || line.is_none_or(|line| line.elapsed() >= BETWEEN_LINES) {
                line = Some(Instant::now());
                let (step, steps, loss) = (point.step, file.train.steps, point.loss);
                let _ = writeln!(
                    std::io::stderr(),
                    "step {step}/{steps}: {loss:.4} nats, trained to {joined} pairs, {most} pairs {:.1} %, {:.0} s",
                    100.0 * accuracy,
                    began.elapsed().as_secs_f64()
                );
            }
        }
        if late {
            break;
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let or = |given: &[usize], usual: &[usize]| match given {
        [] => usual.to_vec(),
        given => given.to_vec(),
    };
    let mut rows = vec![];
    for pairs in or(&args.pairs, &file.recall.pairs) {
        for distance in or(&args.distances, &file.recall.distances) {
            let accuracy = trainer.accuracy(pairs, distance, args.sequences)?;
            rows.push(Row { pairs, distance, accuracy });
        }
    }
    let attention = &file.model.attention;
    let wrong = |error: sata::Error| Failure::new(error.to_string());
    let summary = Summary {
        attention: attention.to_string(),
        heads: attention.heads,
        head_dim: attention.head_dim,
        layers: file.model.layers,
        parameters: trainer.parameters_count(),
        state_bytes_per_layer: attention.state_bytes().map_err(wrong)?,
        steps: trainer.done(),
        seed: file.train.seed,
        seconds,
        tokens_per_step: file.train.tokens_per_step(),
        curve,
        rows,
    };
    if args.json { say_json(&summary) } else { say(summary) }
}

fn settings(args: &RecallArgs) -> Outcome<RecallFile> {
    let path = args.config.display();
    let text = std::fs::read_to_string(&args.config)
        .map_err(|error| Failure::io(&args.config, "reading", &error))?;
    let mut file: RecallFile = toml::from_str(&text)
        .map_err(|error| Failure::new(format!("{path}: {}", error.to_string().trim_end())))?;
    if let Some(words) = &args.heads {
        let two = words.split_once('x');
        let two = two.and_then(|(heads, dim)| Some((heads.parse().ok()?, dim.parse().ok()?)));
        let Some((heads, dim)) = two else {
            return Err(Failure::new(format!("--heads {words}: it must be such as 8x16")));
        };
        (file.model.attention.heads, file.model.attention.head_dim) = (heads, dim);
    }
    if let Some(words) = &args.attention {
        let attention = file.model.attention.in_words(words);
        file.model.attention =
            attention.map_err(|reason| Failure::new(format!("--attention {words}: {reason}")))?;
    }
    if let Some(steps) = args.steps {
        file.train.steps = steps;
    }
    if let Some(seed) = args.seed {
        file.train.seed = seed;
    }
    let wrong = |reason: String| Failure::new(format!("{path}: {reason}"));
    file.recall.check().map_err(wrong)?;
    let config = file.model.config(file.recall.vocab());
    config.check().map_err(|reason| wrong(format!("model.{reason}")))?;
    Ok(file)
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}, {} heads of {}, {} parameters, {} steps of {} tokens in {:.0} s",
            self.attention,
            self.heads,
            self.head_dim,
            grouped(self.parameters as u128),
            self.steps,
            grouped(self.tokens_per_step as u128),
            self.seconds
        )?;
        match self.state_bytes_per_layer {
            Some(bytes) => writeln!(f, "state: {} bytes a layer", grouped(bytes))?,
            None => writeln!(f, "state: every token")?,
        }
        write!(f, "{:>8} {:>10} {:>10}", "pairs", "distance", "recalled")?;
        for Row { pairs, distance, accuracy } in &self.rows {
            write!(f, "\n{pairs:>8} {distance:>10} {:>8.1} %", 100.0 * accuracy)?;
        }
        Ok(())
    }
}
