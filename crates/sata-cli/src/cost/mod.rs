//! `sata cost`: what attention of given sizes costs, before any work.

mod figure;
mod report;

use std::path::PathBuf;

use clap::Args;

use crate::failure::{Failure, Outcome};
use crate::numbers::{count, size};
use crate::output::{say, say_json};
use crate::plot;

pub use figure::figure;
pub use report::Cost;

/// Arguments of `sata cost`.
#[derive(Debug, Args)]
pub struct CostArgs {
    /// Sizes of keys
    #[arg(long, allow_negative_numbers = true, value_delimiter = ',', default_value = "8,16,32,64", value_parser = size)]
    d_key: Vec<usize>,
    /// Sizes of values: one for all keys, or one for each [default: as the keys]
    #[arg(long, allow_negative_numbers = true, value_delimiter = ',', value_parser = size)]
    d_value: Vec<usize>,
    /// Numbers of Taylor terms
    #[arg(long, allow_negative_numbers = true, value_delimiter = ',', default_value = "3,4,5,6", value_parser = size)]
    terms: Vec<usize>,
    /// Context lengths; K, M, G are thousands, Ki, Mi, Gi powers of 1,024
    #[arg(long, allow_negative_numbers = true, value_delimiter = ',', default_value = "1K,10K,100K,1M,10M,100M", value_parser = count)]
    tokens: Vec<u64>,
    /// Draw state and FLOPs against context length into this file, .svg or .png
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
}

/// Runs `sata cost`.
///
/// # Errors
/// Sizes that do not fit each other, files that cannot be written.
pub fn run(args: &CostArgs) -> Outcome {
    let d_value = match args.d_value.len() {
        0 => args.d_key.clone(),
        1 => vec![args.d_value[0]; args.d_key.len()],
        n if n == args.d_key.len() => args.d_value.clone(),
        n => {
            return Err(Failure::new(format!(
                "--d-value has {n} sizes, but --d-key has {}: give one, or one for each",
                args.d_key.len()
            )));
        }
    };
    let heads: Vec<(usize, usize)> = args.d_key.iter().copied().zip(d_value).collect();
    let cost = Cost::new(&heads, &args.terms, &args.tokens);
    if let Some(path) = &args.plot {
        plot::write(&figure(&heads, &args.terms, &args.tokens), path)?;
    }
    if args.json {
        return say_json(&cost);
    }
    say(cost.text())?;
    match &args.plot {
        Some(path) => say(format!("\ndrew {}", path.display())),
        None => Ok(()),
    }
}
