//! `sata reproduce`: the paper's experiments by one command, and what they leave out.

mod activations;
mod coefficients;
mod decode;
mod findings;
mod floor;
mod formulas;
mod page;
pub(crate) mod random;
mod recovery;
mod recovery_figures;
mod reference;
mod results;
pub(crate) mod scope;
pub(crate) mod truth;

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;

use crate::failure::{Failure, Outcome};
use crate::machine;
use crate::numbers::size;
use crate::output::{Staged, json, say, say_json};
use crate::plot;
use crate::progress::{self, Progress};
use crate::table::seconds;
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
    let results = experiments(scope, start)?;
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

fn experiments(scope: Scope, start: Instant) -> Outcome<Results> {
    let units = recovery::units(&scope)
        + floor::units(&scope)
        + decode::units(&scope)
        + activations::units()
        + coefficients::units();
    let progress = Progress::new(units);
    // Timings first, while the machine is cool and its memory not yet in pieces.
    let decode = decode::run(&scope, &progress)?;
    let activations = activations::run(&progress)?;
    let coefficients = coefficients::run(&scope, &progress)?;
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
        coefficients,
    };
    Ok(results.with_findings())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_run_finds_what_the_quick_one_does() {
        let scope = Scope {
            recovery: vec![(8, 3), (8, 4)],
            elements: Some(8192),
            floor_tokens: vec![256],
            floor_head: 4,
            decode_tokens: 4096,
            coefficient_queries: 512,
            ..Scope::quick(1)
        };
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("new/folder");
        let data = prepare(&out).unwrap();
        let results = experiments(scope, Instant::now()).unwrap();
        for one in &results.recovery {
            let difference = one.errors.log10_median() - one.reference.unwrap();
            assert!(difference.abs() < 0.1, "P = {}: {difference}", one.terms);
        }
        for floor in &results.floor {
            let limit = match floor.dtype {
                "f64" => 1e-12,
                "f32" => 1e-5,
                "f16" => 1e-3,
                _ => 8e-3,
            };
            assert!(floor.arithmetic < limit, "{floor:?}");
        }
        assert!(results.activations.iter().all(|layer| layer.engine_f64 < 1e-9));
        assert!(results.findings.iter().any(|finding| finding.contains("do not suffice")));
        let compared = results.coefficients.normal.iter().filter_map(|one| {
            let prototype = reference::prototype(one.series, one.terms, one.deviation)?;
            Some((one, prototype.parse::<f64>().unwrap()))
        });
        assert_eq!(compared.clone().count(), 16);
        for (one, prototype) in compared {
            // Another draw of keys moves the smallest of these by a quarter, and one has one digit.
            let ratio = one.errors.relative_median / prototype;
            assert!((0.7..1.4).contains(&ratio), "{one:?}: {prototype}");
        }
        assert!(results.findings.iter().any(|finding| finding.contains("at most 0.016, met")));

        write(&results, &out, data).unwrap();
        let page = std::fs::read_to_string(out.join("index.html")).unwrap();
        for figure in results.figures() {
            assert!(page.contains(&figure.title), "{}", figure.title);
            for extension in ["svg", "png"] {
                assert!(out.join(format!("{}.{extension}", figure.id)).exists());
            }
        }
        let json = std::fs::read(out.join("results.json")).unwrap();
        let data: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(data["scope"]["seed"], 1);
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 2 * results.figures().len() + 2);
    }
}
