//! Generation: one core against a plain read of the bytes that it reads, and speed and memory along
//! a session, against the same sizes with softmax and its KV cache.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use sata_lm::infer::{Sampling, Session, Weights};
use sata_lm::{Config, Kernel};
use serde::Serialize;

use super::inputs::{normal, rng};
use super::paired::paired;
use super::{Row, Target, baseline, pool, processor, rows_table};
use crate::failure::{Failure, Outcome};
use crate::model::Model;
use crate::plot::{self, Axis, COLORS, Figure, Key, Mark, Numerals, Panel, Style};
use crate::table::three;
use crate::{machine, output};

/// Arguments of `sata bench generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Folder with config.json, model.safetensors and tokenizer.json; the model that comes with the
    /// program if left away
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Tokens of the long session
    #[arg(long, default_value_t = 200_000)]
    pub tokens: usize,
    /// Tokens up to which softmax with a KV cache is measured; 0 for not at all
    #[arg(long, default_value_t = 16_384)]
    pub softmax_tokens: usize,
    /// Write a plot of the long sessions, .svg or .png
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Print JSON instead of tables
    #[arg(long)]
    pub json: bool,
}

/// Tokens of a window of the long session.
const WINDOW: usize = 10_000;
/// Tokens of a window of softmax.
const SOFTMAX_WINDOW: usize = 1024;
/// Tokens that are timed together on one core: whole blocks.
const STEPS: usize = 512;
/// Times they are, in turn with the plain read.
const ROUNDS: usize = 9;

#[derive(Debug, Serialize)]
struct Report {
    processor: String,
    kernels: &'static str,
    model: String,
    config: Config,
    weight_bytes: usize,
    past_bytes: u64,
    rows: Vec<Row>,
    /// Of the model.
    session: Vec<Window>,
    /// Of the same sizes with softmax.
    softmax: Vec<Window>,
}

/// A stretch of a session.
#[derive(Clone, Copy, Debug, Serialize)]
struct Window {
    /// Tokens when it ended.
    tokens: u64,
    tokens_per_second: f64,
    /// Bytes that the process held when it ended.
    resident: Option<u64>,
    /// Bytes of states or caches.
    past_bytes: usize,
}

/// Runs `sata bench generate`.
///
/// # Errors
/// What cannot be loaded, measured or written.
pub fn run(args: &GenerateArgs) -> Outcome {
    if args.tokens < 3 {
        return Err(Failure::new(format!("--tokens {}: it must be at least 3", args.tokens)));
    }
    let Model { weights, .. } = Model::load(args.model.as_deref())?;
    let report = pool(1)?.install(|| measure(args, &weights))?;
    if let Some(path) = &args.svg {
        plot::write(&figure(&report), path)?;
    }
    if args.json {
        return output::say_json(&report);
    }
    output::say(format!(
        "{}; {} kernels; {}, one core; {} MB of weights, {} MB of state read per token\n",
        report.processor,
        report.kernels,
        report.model,
        three(report.weight_bytes as f64 / 1e6),
        three(report.past_bytes as f64 / 1e6),
    ))?;
    output::say(rows_table(&report.rows))
}

fn measure(args: &GenerateArgs, weights: &Arc<Weights>) -> Outcome<Report> {
    let mut rows = vec![one_core(weights)?];
    let window = WINDOW.min(args.tokens / 3);
    let session = windows(weights, args.tokens, window)?;
    rows.extend(along(&session, window));
    let softmax = if args.softmax_tokens == 0 {
        vec![]
    } else {
        let mut config = weights.config().clone();
        config.attention.kernel = Kernel::Softmax;
        (config.attention.near, config.attention.sinks) = (None, 0);
        let weights = Arc::new(Weights::untrained(&config, 0)?);
        windows(&weights, args.softmax_tokens, SOFTMAX_WINDOW.min(args.softmax_tokens))?
    };
    Ok(Report {
        processor: processor(),
        kernels: weights.level(),
        model: weights.source().to_string(),
        config: weights.config().clone(),
        weight_bytes: weights.bytes_per_token(),
        past_bytes: weights.past_bytes_per_token(0),
        rows,
        session,
        softmax,
    })
}

/// A session after a prompt of a few blocks.
fn begun(weights: &Arc<Weights>) -> Outcome<Session> {
    let mut session = Session::new(weights, Sampling::default())?;
    let vocab = weights.config().vocab as u32;
    let prompt: Vec<u32> = (0..256).map(|i: u32| i.wrapping_mul(2_654_435_761) % vocab).collect();
    session.feed(&prompt)?;
    Ok(session)
}

/// Tokens per second against plain reads of as many bytes, in turn.
fn one_core(weights: &Arc<Weights>) -> Outcome<Row> {
    let mut session = begun(weights)?;
    let position = session.position() + STEPS as u64;
    let bytes = weights.bytes_per_token() as u64 + weights.past_bytes_per_token(position);
    let copy = normal::<f32>(&mut rng(), 4096).repeat((bytes as usize / 4).div_ceil(4096));
    let copy = &copy[..bytes as usize / 4];
    let both = paired(
        ROUNDS,
        || (0..STEPS).try_for_each(|_| Ok(session.next_token().map(drop)?)),
        || {
            for _ in 0..STEPS {
                baseline::read_once(&[copy]);
            }
            Ok(())
        },
    )?;
    let rate = |seconds: f64| STEPS as f64 / seconds;
    Ok(Row {
        what: "tokens/s on one core, of what reading its bytes allows".into(),
        measured: format!("{} tokens/s", three(rate(both.first))),
        baseline: format!(
            "{} tokens/s; plain read {} GB/s",
            three(rate(both.second)),
            three(bytes as f64 * rate(both.second) / 1e9)
        ),
        ratio: 1.0 / both.ratio,
        target: Some(Target::AtLeast(0.7)),
    })
}

/// Speed and memory, window by window.
fn windows(weights: &Arc<Weights>, tokens: usize, window: usize) -> Outcome<Vec<Window>> {
    let mut session = begun(weights)?;
    let mut found = vec![];
    for _ in 0..tokens / window {
        let start = Instant::now();
        for _ in 0..window {
            session.next_token()?;
        }
        found.push(Window {
            tokens_per_second: window as f64 / start.elapsed().as_secs_f64(),
            tokens: session.position(),
            resident: machine::resident(),
            past_bytes: session.state_bytes(),
        });
    }
    Ok(found)
}

/// The end of a long session against its beginning.
fn along(windows: &[Window], window: usize) -> Vec<Row> {
    let (Some(first), Some(second), Some(last)) = (windows.first(), windows.get(1), windows.last())
    else {
        return vec![];
    };
    let speed = |w: &Window| format!("{} tokens/s", three(w.tokens_per_second));
    let mut rows = vec![Row {
        what: format!("speed of the last {window} tokens of {}, of the second", last.tokens),
        measured: speed(last),
        baseline: speed(second),
        ratio: last.tokens_per_second / second.tokens_per_second,
        target: Some(Target::AtLeast(0.95)),
    }];
    if let (Some(before), Some(after)) = (first.resident, last.resident) {
        let memory = |bytes: u64| format!("{} MB", three(bytes as f64 / 1e6));
        rows.push(Row {
            what: format!("resident memory after {} tokens, of {}", last.tokens, first.tokens),
            measured: memory(after),
            baseline: memory(before),
            ratio: after as f64 / before as f64,
            target: Some(Target::AtMost(1.02)),
        });
    }
    rows
}

fn figure(report: &Report) -> Figure {
    let all = || report.session.iter().chain(&report.softmax);
    let longest = all().map(|w| w.tokens).max().unwrap_or(1) as f64;
    let shortest = all().map(|w| w.tokens).min().unwrap_or(1) as f64;
    let panel = |title: &str, label: &str, of: fn(&Window) -> f64| {
        let curve = |windows: &[Window]| -> Vec<(f64, f64)> {
            windows.iter().map(|w| (w.tokens as f64, of(w))).collect()
        };
        let (ours, softmax) = (curve(&report.session), curve(&report.softmax));
        Panel {
            title: title.into(),
            x: Axis::log("tokens written", shortest, longest.max(2.0 * shortest), Numerals::Counts),
            y: Axis::decades(label, all().map(of), Numerals::Counts),
            marks: vec![
                Mark::dashed(softmax.clone(), COLORS[2]),
                Mark::dots(softmax, COLORS[2]),
                Mark::line(ours.clone(), COLORS[0]),
                Mark::dots(ours, COLORS[0]),
            ],
        }
    };
    Figure {
        id: "generation".into(),
        title: "Writing on: speed and memory along one session".into(),
        subtitle: vec![format!("{}, one core; {}", report.model, report.processor)],
        columns: 2,
        panels: vec![
            panel("Speed", "tokens per second", |w| w.tokens_per_second),
            panel("Resident memory", "MB", |w| w.resident.unwrap_or(0) as f64 / 1e6),
        ],
        keys: vec![
            Key::line("constant cost", COLORS[0], Style::Solid),
            Key::line("softmax with a KV cache", COLORS[2], Style::Dashed),
        ],
    }
}
