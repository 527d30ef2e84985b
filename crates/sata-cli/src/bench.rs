//! `sata bench`: rates of this machine.

use clap::{Args, Subcommand};

use crate::failure::{Failure, Outcome};

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Measure the CPU engine against plain reads, matrix products and conventional attention
    Cpu(CpuArgs),
}

/// Arguments of `sata bench cpu`.
#[derive(Debug, Args)]
pub struct CpuArgs {
    /// Measure only this
    #[arg(long, value_name = "WHAT")]
    pub only: Option<String>,
    /// Take seconds instead of minutes
    #[arg(long)]
    pub quick: bool,
    /// Print JSON instead of tables
    #[arg(long)]
    pub json: bool,
}

/// Runs `sata bench cpu`.
///
/// # Errors
/// What a measurement says.
pub fn cpu(args: &CpuArgs) -> Outcome {
    let _ = args;
    Err(Failure::new("this build does not measure yet"))
}
