//! `sata reproduce`: the paper's experiments by one command, and what they leave out.

mod activations;
mod decode;
mod findings;
mod floor;
mod formulas;
mod page;
mod progress;
mod random;
mod recovery;
mod recovery_figures;
mod reference;
mod results;
mod scope;
mod truth;

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;

use crate::failure::{Failure, Outcome};
use crate::machine;
use crate::numbers::size;
use crate::output::{Staged, json, say, say_json};
use crate::plot;
use crate::table::seconds;
use progress::Progress;
use results::{Machine, Results};
use scope::Scope;

/// Arguments of `sata reproduce`.
#[derive(Debug, Args)]
pub struct ReproduceArgs {
    /// Minutes: sampled queries, the slowest sizes left out (default)
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// All sizes and all queries, and contexts as long as memory holds
    #[arg(long)]
    full: bool,
    /// Folder for figures, page and numbers; made if it is not there
    #[arg(long, value_name = "DIR", default_value = "reproduction")]
    out: PathBuf,
    /// Seed of all random inputs
    #[arg(long, default_value_t = 2026)]
    seed: u64,
    /// Threads [default: all processors]
    #[arg(long, allow_negative_numbers = true, value_parser = size)]
    threads: Option<usize>,
    /// Print results.json instead of words
    #[arg(long)]
    json: bool,
}

/// Runs `sata reproduce`.
///
/// # Errors
/// A folder that cannot be written.
pub fn run(args: &ReproduceArgs) -> Outcome {
    machine::set_threads(args.threads)?;
    let scope = if args.full { Scope::full(args.seed) } else { Scope::quick(args.seed) };
    let data = prepare(&args.out)?;
    let start = Instant::now();
    if !args.json {
        say(format!("sata reproduce, {} run, seed {}", scope.mode, scope.seed))?;
    }
    let units = recovery::units(&scope)
        + floor::units(&scope)
        + decode::units(&scope)
        + activations::units();
    let progress = Progress::new(units);
    // Timings first, while the machine is cool and its memory not yet in pieces.
    let decode = decode::run(&scope, &progress)?;
    let activations = activations::run(&progress)?;
    let floor = floor::run(&scope, &progress)?;
    let recovery = recovery::run(&scope, &progress)?;
    progress.finish();
    let results = Results {
        version: env!("CARGO_PKG_VERSION"),
        scope,
        machine: Machine::here()?,
        seconds: start.elapsed().as_secs_f64(),
        findings: vec![],
        recovery,
        floor,
        decode,
        activations,
    }
    .with_findings();
    write(&results, &args.out, data)?;
    if args.json {
        return say_json(&results);
    }
    for finding in &results.findings {
        say(format!("\n• {finding}"))?;
    }
    say(format!(
        "\nwrote {} (page, figures as SVG and PNG, results.json); {} altogether",
        args.out.join("index.html").display(),
        seconds(start.elapsed().as_secs_f64())
    ))
}

/// Makes the folder and shows that it can be written, before any work.
fn prepare(out: &Path) -> Outcome<Staged> {
    std::fs::create_dir_all(out).map_err(|error| {
        Failure::new(format!("--out {}: it cannot be made: {error}", out.display()))
            .hint("name a folder that you may write to")
    })?;
    Staged::new(&out.join("results.json"), "--out")
}

fn write(results: &Results, out: &Path, mut data: Staged) -> Outcome {
    let figures = results.figures();
    let mut files = vec![];
    let mut stage = |name: String, bytes: &[u8]| -> Outcome {
        let mut file = Staged::new(&out.join(name), "--out")?;
        file.write(bytes)?;
        files.push(file);
        Ok(())
    };
    for figure in &figures {
        stage(format!("{}.svg", figure.id), plot::svg(figure).as_bytes())?;
        stage(format!("{}.png", figure.id), &plot::png(figure)?)?;
    }
    stage("index.html".into(), page::page(results, &figures).as_bytes())?;
    data.write(json(results)?.as_bytes())?;
    files.push(data);
    files.into_iter().try_for_each(Staged::commit)
}
