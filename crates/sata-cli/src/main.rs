//! The program `sata`: attention at constant cost per token, from files.

mod attend;
mod bench;
mod cost;
mod errors;
mod failure;
mod machine;
mod numbers;
mod output;
mod plot;
mod reproduce;
mod softmax;
mod table;
mod tensors;

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
    /// Print what attention of given sizes costs, and where the fixed cost meets the growing one
    Cost(cost::CostArgs),
    /// Run the experiments of the paper, and some that it leaves out: figures, tables, numbers
    Reproduce(reproduce::ReproduceArgs),
    /// Measure this machine
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

/// Exit code of every error, clap's own included.
const WRONG: u8 = 2;

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // Nobody is reading any more: that is their choice, not an error.
        Err(Failure::BrokenPipe) => ExitCode::SUCCESS,
        Err(failure) => {
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "error: {failure}");
            ExitCode::from(WRONG)
        }
    }
}

fn run(cli: &Cli) -> Outcome {
    match &cli.command {
        Command::Attend(args) => attend::run(args),
        Command::Cost(args) => cost::run(args),
        Command::Reproduce(args) => reproduce::run(args),
        Command::Bench(bench::BenchCommand::Cpu(args)) => bench::cpu(args),
    }
}
