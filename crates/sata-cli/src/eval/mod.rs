//! `sata eval`: bits per byte by position, recall of pairs, needles.

mod figure;
mod input;
mod report;

use std::path::PathBuf;

use clap::Args;
use rand::SeedableRng;
use rand::rngs::StdRng;
use sata_lm::eval::{
    EvalError, NeedleSettings, PositionSettings, RecallSettings, by_position, needle, recall,
};
use sata_lm::infer::{Sampling, Session};

use crate::failure::{Failure, Outcome};
use crate::output::{say, say_json};
use crate::plot;
use crate::pretrained;
use crate::progress::Progress;
pub use input::Input;
use report::Report;

/// Measure a model: bits per byte by position, recall of pairs, needles in a text
///
/// A model reads stretches of text from beginning to end. Its bits per byte are given by position,
/// that is by tokens read before, and beside them those of the same bytes when the model has read
/// no more before them than in training.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Folder with config.json, model.safetensors and tokenizer.json, or a GGUF file or a folder with
    /// one; the model that comes with the program if left away
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Text files, UTF-8, or folders, of which all .txt files are taken
    #[arg(long, value_name = "PATHS", num_args = 1.., required = true)]
    pub text: Vec<PathBuf>,
    /// Tokens of a sequence in training [default: what the folder's training.json says]; for a model
    /// that already existed, tokens of a passage [default: the model's own context]
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Tokens to read in one pass [default: 64 times the context, or all the text if shorter]
    #[arg(long, value_name = "N")]
    positions: Option<usize>,
    /// Passes at most, over stretches that do not overlap
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub passes: usize,
    /// For a model that already existed: attentions to compare with softmax, `auto` for one chosen by the
    /// text's first tokens, or see `sata generate --help`
    #[arg(long, value_name = "SPEC", num_args = 1..)]
    pub attention: Vec<String>,
    /// A file of `sata calibrate`, whose calibration serves attentions that have none
    #[arg(long, value_name = "SPEC.json", requires = "attention")]
    pub calibration: Option<PathBuf>,
    /// Positions to report, FROM-TO [default: by powers of two]
    #[arg(long, value_name = "FROM-TO,…", value_delimiter = ',', requires = "attention")]
    pub ranges: Vec<String>,
    /// Also ask for values of random pairs of words
    #[arg(long)]
    recall: bool,
    /// Also plant a sentence in text and ask for it
    #[arg(long)]
    needle: bool,
    /// Numbers of pairs to recall
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [2, 8, 32])]
    pairs: Vec<usize>,
    /// Tokens between what is to be recalled and the question [default: 0 and 1/4, 1, 4 and 16
    /// times the context, as far as there is text]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    distances: Vec<usize>,
    /// Texts to read for each number of pairs and distance
    #[arg(long, value_name = "N", default_value_t = 16)]
    trials: usize,
    /// Where random numbers begin
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Print JSON instead of tables
    #[arg(long)]
    pub json: bool,
    /// Write a plot of bits per byte against position, .svg or .png
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// Questions of one text of pairs, at most.
const QUESTIONS: usize = 8;

impl From<EvalError> for Failure {
    fn from(error: EvalError) -> Self {
        match error {
            EvalError::Model(error) => Failure::from(error),
            EvalError::Short { .. } => Failure::new(error.to_string())
                .hint("give more text with --text, or smaller --positions or --distances"),
            error => Failure::new(error.to_string()),
        }
    }
}

/// Runs `sata eval`.
///
/// # Errors
/// A model or text that cannot be read or is too short, settings that cannot be.
pub fn run(args: &EvalArgs) -> Outcome {
    if pretrained::is_at(args.model.as_deref()) {
        return pretrained::eval::run(args);
    }
    if !args.attention.is_empty() {
        return Err(Failure::new(
            "--attention is for models that already existed: what attention a model \
             of `sata train` has is in its configuration",
        ));
    }
    if let Some(path) = &args.svg {
        plot::check(path, "--svg")?;
    }
    let input = Input::load(args.model.as_deref(), args.context, &args.text)?;
    let count = input.tokens.len();
    let session = Session::new(&input.weights, Sampling::greedy())?;
    let positions = PositionSettings {
        context: input.context,
        positions: args
            .positions
            .unwrap_or_else(|| count.min(input.context.saturating_mul(64)).max(input.context)),
        passes: args.passes,
    };
    let size = |id: u32| input.sizes.get(id as usize).copied().unwrap_or(0);
    let progress = Progress::new(positions.work(count) as u64);
    progress.doing("bits per byte by position");
    let by_position = by_position(&session, &input.tokens, size, positions, |tokens| {
        progress.done(tokens as u64);
    })?;
    progress.finish();

    // Room for what stands before a needle.
    let lead = (input.context / 4).min(count / 2);
    let distances = match &args.distances[..] {
        [] => [0, input.context / 4, input.context, 4 * input.context, 16 * input.context]
            .into_iter()
            .filter(|distance| lead + distance <= count)
            .collect(),
        some => some.to_vec(),
    };
    let mut rng = StdRng::seed_from_u64(args.seed);
    let mut recalled = None;
    if args.recall {
        let settings = RecallSettings {
            pairs: args.pairs.clone(),
            distances: distances.clone(),
            trials: args.trials,
            questions: QUESTIONS,
        };
        let progress = Progress::new(settings.work() as u64);
        progress.doing("recall");
        let (text, tokenizer) = (&input.tokens, &input.tokenizer);
        let rows = recall(&session, tokenizer, text, &settings, &mut rng, || progress.done(1))?;
        progress.finish();
        recalled = Some(rows);
    }
    let mut found = None;
    if args.needle {
        let settings = NeedleSettings { lead, distances, trials: args.trials };
        let progress = Progress::new(settings.work() as u64);
        progress.doing("needle");
        let (text, tokenizer) = (&input.tokens, &input.tokenizer);
        let rows = needle(&session, tokenizer, text, &settings, &mut rng, || progress.done(1))?;
        progress.finish();
        found = Some(rows);
    }
    let report = Report {
        model: input.weights.source().to_string(),
        digest: input.weights.digest().to_string(),
        config: input.weights.config().clone(),
        text_tokens: count,
        text_bytes: input.bytes,
        seed: args.seed,
        by_position,
        recall: recalled,
        needle: found,
    };
    if let Some(path) = &args.svg {
        plot::write(&figure::by_position(&report), path)?;
    }
    if args.json { say_json(&report) } else { say(report.text()) }
}
