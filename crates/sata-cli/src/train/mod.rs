//! `sata train`: a language model from text.

pub mod device;
mod figure;
mod report;
mod setup;
mod tokens;

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use clap::Args;
use sata_lm::train::{Folder, Objective, Settings, TrainError, Trainer};

use crate::failure::{Failure, Outcome};
use crate::numbers::size;
use crate::output::{say, say_json};
use crate::{interrupt, machine, plot};
use device::Profile;
use report::{AtLength, Report, Summary};
use setup::Setup;

/// Arguments of `sata train`.
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct TrainArgs {
    /// Text files, UTF-8, or folders, of which all .txt files are taken
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    pub text: Vec<PathBuf>,
    /// Settings: TOML with the tables model, tokenizer and train
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// A tokenizer.json to take; without one a tokenizer is trained on the text
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Keep the texts' tokens in this folder, and take them from there when they are in it
    #[arg(long, value_name = "DIR")]
    pub tokens: Option<PathBuf>,
    /// Take this instead of what the settings say: KERNEL[+WORD…], see below
    #[arg(long, value_name = "WORDS")]
    pub attention: Option<String>,
    /// The model's folder: weights, config and tokenizer, checkpoint, curve and its plot
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Begin with the weights of this model's folder instead of random ones, and with its tokenizer
    /// if none is named: sizes must be the same, attention may be another
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    pub from: Option<PathBuf>,
    /// Go on from the checkpoint in DIR, with the same settings and text
    #[arg(long)]
    pub resume: bool,
    /// Threads, all processors if left away; the outcome does not depend on it
    #[arg(long, value_name = "N", value_parser = size)]
    pub threads: Option<usize>,
    /// Where it is trained: cpu, cuda, or cuda:N for one of several GPUs
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// On a GPU, say what it spent its time with
    #[arg(long)]
    pub profile: bool,
    /// Look at each layer's tensors and their gradients in every step, and stop at the first number
    /// that is not finite, which is named: slow, to find where it comes from
    #[arg(long)]
    pub check_finite: bool,
    /// At the end, also read all held-out text in sequences of so many times the training's context
    #[arg(long, value_name = "TIMES,…", value_delimiter = ',')]
    pub lengths: Vec<usize>,
    /// Take this instead of train.steps
    #[arg(long, value_name = "N", value_parser = size)]
    pub steps: Option<usize>,
    /// Take this instead of train.seed
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Print the outcome as JSON
    #[arg(long)]
    pub json: bool,
}

const AFTER: &str = "\
Attention in short words: a kernel, softmax, window (near blocks alone), taylor:TERMS or
power:EXPONENT, and then any of
  +near:BLOCKS   blocks before a query's own that are exact; +near:none
  +block:TOKENS  tokens in a block
  +sinks:TOKENS  first tokens that stay exact
  +rotary, +slopes, +gates, +none
                 how position enters
What is not said stays as in the file, but that softmax has neither near blocks nor sinks.
For example: --attention taylor:5+gates+near:1, --attention softmax+rotary

Several kernels are a mixture, each for some of the heads: taylor:3+power:4 in equal shares,
taylor:3*6+power:4*2 of so many heads, window+power:2*2 with the rest for what says no number.
Words for one kernel's heads alone follow a comma: taylor:3,near:1+power:4,near:0+gates. Of a
mixture in the file no near or sinks stay.

Settings, with what holds where they are left away:
  [model] layers, width, mlp, norm_eps = 1e-5
  [model.attention] heads, kv_heads (heads), head_dim, kernel = { kind = \"taylor\", terms = 3 }
    (softmax, window, power with exponent; or kind = \"mixture\" with groups, a list of
    { heads, kernel, near, sinks } that takes the place of near and sinks),
    near (none), block = 64, sinks = 0,
    position = \"none\", \"rotary\", \"slopes\" or \"gates\", qk_norm = false
  [tokenizer] vocab = 4096 (257: bytes alone)
  [train] steps, batch, micro_batch, context (batches in sequences of so many tokens),
    lengths = [] (of sequences in turn, with as many tokens a step), learning_rate,
    min_learning_rate = 0, warmup = 0, weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, clip = 1,
    seed = 0, evaluate_every = 100, evaluate_tokens = 32768, checkpoint_every = 500,
    validation = 0.05 (the last part of every file) or [\"PATH\", …]

On a GPU (a program that was built for it, docs/gpu.md) products of matrices and attention are in
bf16, summed in f32, and small micro-batches go through the model together; all else is as on the CPU,
checkpoints included, which either goes on from.

Ctrl-C writes a checkpoint and stops, with exit code 130; --resume then goes on with the same curve,
as it does after a kill, from the last checkpoint.";

/// Runs `sata train`.
///
/// # Errors
/// Wrong settings or texts before any work; a loss that is not finite, a full disk or Ctrl-C later,
/// all of which leave the last checkpoint as it was.
pub fn run(args: &TrainArgs) -> Outcome {
    machine::keep_tensors_on_their_thread();
    machine::keep_tensor_memory();
    let threads = match args.threads {
        Some(threads) => threads,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    machine::set_threads(Some(threads))?;
    let device = device::open(&args.device)?;
    let Setup { settings, identity, config, folder, mut trainer } =
        Setup::new(args, threads, &device)?;
    let stop = interrupt::flag()?;
    let mut report = Report::new(&settings, &trainer);
    let mut profile = Profile::new(args.profile, &device);
    while !trainer.is_finished() {
        let point = trainer.step().map_err(|error| kept(error, args))?;
        report.step(&point);
        profile.step()?;
        let stopping = stop.load(Ordering::Relaxed) && !trainer.is_finished();
        if stopping || trainer.is_checkpoint_due() {
            report.saving();
            folder.save(&trainer, &identity, &config).map_err(|error| kept(error, args))?;
            plot_curve(&folder, &trainer)?;
        }
        if stopping {
            report.finish();
            return Err(Failure::Interrupted(format!(
                "the checkpoint of step {} of {} is written; --resume goes on",
                point.step, settings.train.steps
            )));
        }
    }
    report.finish();
    let at = lengths(args, &settings, &trainer)?;
    let speed = (report.tokens_per_second(), report.usual_tokens_per_second());
    let summary = Summary::new(&args.out, &settings, &trainer, speed, profile.finish(), at);
    if args.json { say_json(&summary) } else { say(summary) }
}

/// Losses at the lengths that are asked for.
fn lengths<M: Objective>(
    args: &TrainArgs,
    settings: &Settings,
    trainer: &Trainer<M>,
) -> Outcome<Vec<AtLength>> {
    let bits_per_nat = trainer.corpus().validation.bits_per_byte();
    let mut at = vec![];
    for times in &args.lengths {
        let length = settings.train.context.saturating_mul(*times);
        if let Some(loss) = trainer.evaluate_at(length)? {
            at.push(AtLength { length, loss, bits_per_byte: loss * bits_per_nat });
        }
    }
    Ok(at)
}

fn plot_curve<M: Objective>(folder: &Folder, trainer: &Trainer<M>) -> Outcome {
    plot::write(&figure::curve(trainer), &folder.path().join("loss.svg"))
}

/// What went wrong, and what is left.
fn kept(error: TrainError, args: &TrainArgs) -> Failure {
    let diverged = matches!(error, TrainError::NonFinite { .. });
    let kept = match Folder::last_step(&args.out) {
        Some(step) => format!("the checkpoint of step {step} is kept"),
        None => "no checkpoint was written yet".into(),
    };
    let advice = if diverged {
        "; a smaller train.learning_rate or more train.warmup may help, in a new folder"
    } else {
        "; --resume goes on from it"
    };
    let advice = if diverged || kept.contains("kept") { advice } else { "" };
    Failure::from(error).hint(format!("{kept}{advice}"))
}
