//! `sata compare`: models that were trained alike, side by side.

mod figure;
mod record;
mod report;

use std::path::PathBuf;

use clap::Args;
use sata_lm::eval::{PositionSettings, by_position};
use sata_lm::infer::{Sampling, Session};

use crate::eval::Input;
use crate::failure::{Failure, Outcome};
use crate::output::{say, say_json};
use crate::plot;
use crate::progress::Progress;
use record::Record;
use report::{Report, Row};

/// Compare trained models: their curves, and bits per byte near and far beyond the training length
///
/// Each model's folder has a record of its training. All read the same text, which should be one that
/// none has seen; the same stretches of it if they have the same tokenizer and training length, which
/// is asked of them.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Folders that `sata train` made; the first is what the others are compared with
    #[arg(value_name = "DIR", required = true)]
    models: Vec<PathBuf>,
    /// Text files, UTF-8, or folders, of which all .txt files are taken
    #[arg(long, value_name = "PATHS", num_args = 1.., required = true)]
    text: Vec<PathBuf>,
    /// How far to read, in training lengths
    #[arg(long, value_name = "N", default_value_t = 8)]
    lengths: usize,
    /// Passes at most, over stretches that do not overlap
    #[arg(long, value_name = "N", default_value_t = 4)]
    passes: usize,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Write a plot of the curves, .svg or .png
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Runs `sata compare`.
///
/// # Errors
/// Folders without a model or a record of its training, text that is too short.
pub fn run(args: &CompareArgs) -> Outcome {
    if let Some(path) = &args.svg {
        plot::check(path, "--svg")?;
    }
    let records: Vec<Record> =
        args.models.iter().map(|folder| Record::load(folder)).collect::<Outcome<_>>()?;
    let inputs: Vec<Input> = args
        .models
        .iter()
        .map(|folder| {
            let input = Input::load(Some(folder), None, &args.text);
            input.map_err(|error| error.context(folder.display()))
        })
        .collect::<Outcome<_>>()?;
    for (folder, input) in args.models.iter().zip(&inputs) {
        let (first, name) = (&inputs[0], folder.display());
        if input.context != first.context {
            return Err(Failure::new(format!(
                "{name}: it was trained on {} tokens at a time, {} on {}",
                input.context,
                args.models[0].display(),
                first.context
            )));
        }
        if input.tokens != first.tokens {
            return Err(Failure::new(format!(
                "{name}: its tokenizer is not that of {}",
                args.models[0].display()
            )));
        }
    }
    let mut rows = vec![];
    for ((folder, record), input) in args.models.iter().zip(&records).zip(&inputs) {
        let settings = PositionSettings {
            context: input.context,
            positions: input.context.saturating_mul(args.lengths.max(1)),
            passes: args.passes,
        };
        let session = Session::new(&input.weights, Sampling::greedy())?;
        let progress = Progress::new(settings.work(input.tokens.len()) as u64);
        progress.doing(format!("{} reads", folder.display()));
        let size = |id: u32| input.sizes.get(id as usize).copied().unwrap_or(0);
        let found = by_position(&session, &input.tokens, size, settings, |tokens| {
            progress.done(tokens as u64);
        })?;
        progress.finish();
        rows.push(Row::new(folder, record, &input.weights.config().attention, found));
    }
    let report = Report { lengths: args.lengths.max(1), rows };
    if let Some(path) = &args.svg {
        plot::write(&figure::curves(&report, &records), path)?;
    }
    if args.json { say_json(&report) } else { say(report.text()) }
}
