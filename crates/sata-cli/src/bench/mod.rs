//! `sata bench`: rates of this machine, as ratios against baselines measured in the same run.

mod backward;
mod baseline;
mod decode;
pub mod generate;
pub mod gpu;
mod inputs;
mod memory;
mod paired;
mod prefill;
mod settings;

use std::time::Instant;

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::failure::{Failure, Outcome};
use crate::output;
use crate::table::table;

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Measure the CPU engine against plain reads, matrix products and conventional attention
    Cpu(CpuArgs),
    /// Measure an NVIDIA GPU: prefill, gradients, decode, and figure 6 of the paper
    Gpu(gpu::GpuArgs),
    /// Measure generation: one core against a plain read of what it reads, and a long session
    /// against softmax with a KV cache
    Generate(generate::GenerateArgs),
}

/// Arguments of `sata bench cpu`.
#[derive(Debug, Args)]
pub struct CpuArgs {
    /// Measure only these, of prefill, decode, settings (what near blocks, series chosen per query
    /// and decay cost, over going without), backward (both passes over the forward one) and memory
    #[arg(long, value_name = "WHAT", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Head sizes d_key = d_value; settings are measured at 16 and 32
    #[arg(long, value_name = "D", value_delimiter = ',', default_values_t = [8, 16, 32, 64])]
    pub dims: Vec<usize>,
    /// Input types, of f32, bf16 and f64
    #[arg(long, value_name = "TYPE", value_delimiter = ',', default_values_t = ["f32".to_string(), "bf16".to_string()])]
    pub dtype: Vec<String>,
    /// Taylor terms
    #[arg(long, default_value_t = 4)]
    pub terms: usize,
    /// Tokens of the prefill
    #[arg(long, default_value_t = 16384)]
    pub tokens: usize,
    /// Heads of the prefill
    #[arg(long, default_value_t = 8)]
    pub heads: usize,
    /// Heads of the decode; if left away, as many as fill 256 MB with far sums (4096 at most), and 8
    #[arg(long)]
    pub decode_heads: Option<usize>,
    /// Threads of the prefill and of its baseline
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Take seconds instead of minutes: fewer tokens and runs
    #[arg(long)]
    pub quick: bool,
    /// Print JSON instead of tables
    #[arg(long)]
    pub json: bool,
}

/// A measured row: what is compared with a target.
#[derive(Debug, Serialize)]
struct Row {
    what: String,
    /// What was measured, in words with its unit.
    measured: String,
    /// The baseline of the same run, likewise.
    baseline: String,
    /// Measured over baseline, or the measured number itself where the target is absolute.
    ratio: f64,
    target: Option<Target>,
}

/// What the number should reach.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    fn met(self, x: f64) -> bool {
        match self {
            Target::AtLeast(t) => x >= t,
            Target::AtMost(t) => x <= t,
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    level: sata::Level,
    available: Vec<sata::Level>,
    processor: String,
    threads: usize,
    rows: Vec<Row>,
}

/// Runs `sata bench cpu`.
///
/// # Errors
/// A word that is not known, or what the library refuses.
pub fn cpu(args: &CpuArgs) -> Outcome {
    for word in &args.only {
        if !["prefill", "decode", "settings", "backward", "memory"].contains(&word.as_str()) {
            return Err(Failure::new(format!(
                "--only {word}: it is none of prefill, decode, settings, backward, memory"
            )));
        }
    }
    for word in &args.dtype {
        if !["f32", "bf16", "f64"].contains(&word.as_str()) {
            return Err(Failure::new(format!("--dtype {word}: it is none of f32, bf16, f64")));
        }
    }
    if args.threads == 0 || args.heads == 0 || args.tokens == 0 || args.dims.contains(&0) {
        return Err(Failure::new("--threads, --heads, --tokens and --dims must be at least 1"));
    }
    let wants = |what: &str| args.only.is_empty() || args.only.iter().any(|word| word == what);
    let level = sata::Level::detect()?;
    let mut rows = vec![];
    if wants("prefill") {
        rows.extend(pool(args.threads)?.install(|| prefill::rows(args))?);
    }
    if wants("decode") {
        // One core, as the targets are.
        rows.extend(pool(1)?.install(|| decode::rows(args))?);
    }
    if wants("settings") {
        rows.extend(pool(args.threads)?.install(|| settings::prefill(args))?);
        rows.extend(pool(1)?.install(|| settings::decode(args))?);
    }
    if wants("backward") {
        rows.extend(pool(args.threads)?.install(|| backward::rows(args))?);
    }
    if wants("memory") {
        rows.extend(pool(args.threads)?.install(|| memory::rows(args))?);
    }
    let report = Report {
        level,
        available: sata::Level::available(),
        processor: processor(),
        threads: args.threads,
        rows,
    };
    if args.json {
        return output::say_json(&report);
    }
    output::say(format!(
        "{}; level {level}; {} threads for prefill, 1 for decode\n",
        report.processor, args.threads
    ))?;
    output::say(rows_table(&report.rows))
}

/// Rows as text.
fn rows_table(rows: &[Row]) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let (target, met) = match row.target {
                Some(target @ Target::AtLeast(t)) => (format!("≥ {t}"), verdict(target, row.ratio)),
                Some(target @ Target::AtMost(t)) => (format!("≤ {t}"), verdict(target, row.ratio)),
                None => (String::new(), String::new()),
            };
            vec![
                row.what.clone(),
                row.measured.clone(),
                row.baseline.clone(),
                crate::table::three(row.ratio),
                target,
                met,
            ]
        })
        .collect();
    table(&["", "measured", "baseline", "ratio", "target", ""], &cells)
}

fn verdict(target: Target, x: f64) -> String {
    if target.met(x) { "met".into() } else { "MISSED".into() }
}

fn pool(threads: usize) -> Outcome<rayon::ThreadPool> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|error| Failure::new(format!("--threads {threads}: {error}")))
}

/// The processor's name, where the system says it.
fn processor() -> String {
    std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_string())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.into())
}

/// Median seconds of `runs` calls after one that is not counted.
fn median(runs: usize, mut f: impl FnMut() -> Outcome) -> Outcome<f64> {
    f()?;
    let mut times = Vec::with_capacity(runs);
    for _ in 0..runs.max(1) {
        let start = Instant::now();
        f()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
