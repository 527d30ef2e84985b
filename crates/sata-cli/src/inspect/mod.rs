//! `sata inspect`: would it work for this model? Per layer and head, before any work on it.

pub(crate) mod candidates;
pub(crate) mod engine;
pub(crate) mod exact;
pub(crate) mod head;
mod heat;
pub(crate) mod input;
mod live;
pub(crate) mod measure;
mod page;
mod report;
pub(crate) mod sample;
mod text;
mod verdict;

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};

use crate::failure::{Failure, Outcome};
use crate::machine;
use crate::near::{self, NearArg};
use crate::numbers::{count, size};
use crate::output::{Staged, say, say_json};
use crate::progress::Progress;
use crate::series::{self, SeriesArg};
use crate::tensors::{Dtype, Number, SafeFile};
use candidates::{Window, candidates};
use input::{Layer, prefixes};
use measure::{Task, measure};
use report::{LayerReport, Report, Tally, one_for_all, recommended_size};
use sample::Sample;
use verdict::Budget;

/// Arguments of `sata inspect`.
#[derive(Debug, Args)]
#[command(after_help = "Verdicts of a head:
  works   the recommended setting is within the budgets
  mostly  it is for the median query, but one in a hundred is off by more than its whole output
  near    the near window alone is within them, and nothing cheaper is
  fails   nothing that was tried is within them; the recommendation is the least error

Errors are |ŷ−y|/|y| of a query's output against softmax in f64. A state is counted whole, for one
key/value head: far sums with their compensation, raw tokens of open blocks and sinks.")]
pub struct InspectArgs {
    /// A safetensors file with tensors PREFIX.q, PREFIX.k, PREFIX.v of each layer, each
    /// [heads, tokens, dim] or [batch, heads, tokens, dim]; rotary embedding already applied
    #[arg(long, value_name = "FILE", required_unless_present = "model")]
    input: Option<PathBuf>,
    /// Instead of a file: a model that reads --text with softmax; a GGUF file, or a folder with one or
    /// with config.json, model.safetensors and tokenizer.json
    #[arg(long, value_name = "DIR", conflicts_with = "input", requires = "text")]
    model: Option<PathBuf>,
    /// Text files, UTF-8, or folders, of which all .txt files are taken
    #[arg(long, value_name = "PATHS", num_args = 1.., requires = "model")]
    text: Vec<PathBuf>,
    /// First tokens of the text to read [default: 1,024; an encoder as many as it takes]
    #[arg(long, value_name = "N", value_parser = size, requires = "model")]
    context: Option<usize>,
    /// Layers to look at [default: all in the file]
    #[arg(long, value_delimiter = ',', value_name = "PREFIX,…")]
    prefixes: Option<Vec<String>>,
    /// Series to try: taylor, gauss, hermite (or hermite:τ), power:P (x^P + 0.001), or .json
    /// files of coefficients
    #[arg(long, value_delimiter = ',', default_value = "taylor,gauss,hermite", value_parser = series::parse)]
    series: Vec<SeriesArg>,
    /// Numbers of terms to try; gauss takes the even ones
    #[arg(long, allow_negative_numbers = true, value_delimiter = ',', default_value = "2,3,4", value_name = "P,…", value_parser = size)]
    terms: Vec<usize>,
    /// What is exact: none, or the own block and so many before it; each window is also tried
    /// alone [default: none,1; for full attention none]
    #[arg(long, allow_negative_numbers = true, value_delimiter = ',', value_name = "N,…", value_parser = near::parse)]
    near: Option<Vec<NearArg>>,
    /// Tokens in a block
    #[arg(long, allow_negative_numbers = true, default_value = "64", value_parser = size)]
    block: usize,
    /// First tokens that stay exact for ever, where anything is
    #[arg(long, default_value_t = 4)]
    sinks: usize,
    /// Each query sees the keys up to its own [default: what the file's metadata `causal` says]
    #[arg(long, conflicts_with = "full")]
    causal: bool,
    /// Every query sees all keys
    #[arg(long)]
    full: bool,
    /// Factor of q·k [default: 1/√d_key]
    #[arg(long, allow_negative_numbers = true)]
    scale: Option<f64>,
    /// Queries to look at in each head and sequence, spread evenly
    #[arg(long, allow_negative_numbers = true, default_value = "256", value_name = "N", value_parser = size)]
    queries: usize,
    /// Look at no query before this token: early ones see little that is far, and would hide the
    /// error [default: 256, or a quarter of the tokens where that is less; 0 for full attention]
    #[arg(long, value_name = "TOKEN")]
    from: Option<usize>,
    /// Number type that the engine computes on
    #[arg(long, default_value = "f32")]
    dtype: DtypeArg,
    /// Largest relative error of the median query
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.1, value_name = "E", value_parser = positive)]
    max_error: f64,
    /// Most bytes of the state of one key/value head; K, M, G are thousands [default: no limit]
    #[arg(long, allow_negative_numbers = true, value_name = "BYTES", value_parser = count)]
    max_state: Option<u64>,
    /// Write a page with heat maps over layers and heads into this file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Threads [default: all processors]
    #[arg(long, allow_negative_numbers = true, value_parser = size)]
    threads: Option<usize>,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DtypeArg {
    F32,
    F64,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 => Ok(x),
        _ => Err(format!("'{text}' is not a number above 0")),
    }
}

/// Runs `sata inspect`.
///
/// # Errors
/// Anything wrong with the arguments or the file, before any work.
pub fn run(args: &InspectArgs) -> Outcome {
    machine::set_threads(args.threads)?;
    let start = Instant::now();
    let html = match &args.html {
        Some(path) => Some(Staged::new(path, "--html")?),
        None => None,
    };
    let mut report = match args.dtype {
        DtypeArg::F32 => inspect::<f32>(args, Dtype::F32)?,
        DtypeArg::F64 => inspect::<f64>(args, Dtype::F64)?,
    };
    report.seconds = start.elapsed().as_secs_f64();
    if let Some(mut html) = html {
        html.write(page::page(&report).as_bytes())?;
        html.commit()?;
    }
    if args.json {
        return say_json(&report);
    }
    say(report.text())?;
    match &args.html {
        Some(path) => say(format!("wrote {}", path.display())),
        None => Ok(()),
    }
}

fn inspect<E: Number>(args: &InspectArgs, dtype: Dtype) -> Outcome<Report> {
    if let Some(scale) = args.scale.filter(|scale| !scale.is_finite()) {
        return Err(Failure::new(format!("--scale is {scale}, but it must be finite")));
    }
    let Source { name, causal, causal_by, layers: found } = source(args, dtype)?;
    let near = near(args, causal)?;
    let all = candidates(&args.series, &args.terms, &near)?;
    let mut layers = vec![];
    for layer in found {
        let sample = Sample::new(layer.shapes[0][2], args.from, args.queries, causal)?;
        layers.push((layer, sample));
    }
    let window = Window { block: args.block, sinks: args.sinks };
    let budget = Budget { max_error: args.max_error, max_state: args.max_state };
    let task = Task { candidates: &all, window, scale: args.scale, causal };

    let progress = Progress::new(layers.len() as u64 * (all.len() as u64 + 1));
    let mut tally = Tally::new(&all);
    let mut reports = vec![];
    for (layer, sample) in &layers {
        progress.doing(layer.prefix.clone());
        let measured = measure::<E>(layer, sample, &task, &progress)?;
        reports.push(LayerReport::new(layer, sample, &task, &measured, &budget));
        tally.add(measured, &budget);
    }
    progress.finish();

    let (overall, skipped) = tally.finish();
    let heads = reports.iter().map(|layer| layer.heads.len()).sum();
    let size = recommended_size(&reports, size_of::<E::Compute>());
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        input: name,
        causal,
        causal_by,
        dtype: dtype.name(),
        window,
        budget,
        one_for_all: one_for_all(&overall, heads, &budget),
        candidates: overall,
        skipped,
        verdicts: report::count(&reports),
        layers: reports,
        recommended_bytes: size.map(|size| size.0),
        recommended_break_even_tokens: size.map(|size| size.1),
        seconds: 0.0,
    })
}

/// What is looked at.
struct Source {
    name: String,
    causal: bool,
    causal_by: &'static str,
    layers: Vec<Layer>,
}

/// The file's layers, or the model's.
fn source(args: &InspectArgs, dtype: Dtype) -> Outcome<Source> {
    if let Some(model) = &args.model {
        let live = live::live(model, &args.text, args.context)?;
        let asked = args.causal || args.full;
        let mut layers = live.layers;
        if let Some(prefixes) = &args.prefixes {
            let there: Vec<String> = layers.iter().map(|layer| layer.prefix.clone()).collect();
            let chosen = chosen(prefixes, &there, &model.display().to_string())?;
            layers.retain(|layer| chosen.contains(&layer.prefix));
        }
        let causal = if asked { args.causal } else { live.causal };
        let causal_by = if asked { "as asked" } else { "the model is so" };
        return Ok(Source { name: model.display().to_string(), causal, causal_by, layers });
    }
    let Some(input) = &args.input else {
        return Err(Failure::new("--input or --model is needed"));
    };
    let name = input.display().to_string();
    let file = SafeFile::open(input).map_err(|failure| failure.context("--input"))?;
    let (causal, causal_by) = causal(args, &file, &name)?;
    let there = prefixes(&file)?;
    let chosen = match &args.prefixes {
        Some(asked) => chosen(asked, &there, &name)?,
        None => there,
    };
    let read = |prefix: &String| Layer::read(&file, prefix, causal, dtype);
    let layers = chosen.iter().map(read).collect::<Outcome<Vec<Layer>>>()?;
    Ok(Source { name, causal, causal_by, layers })
}

/// Whether attention is causal, and who says so.
fn causal(args: &InspectArgs, file: &SafeFile, name: &str) -> Outcome<(bool, &'static str)> {
    if args.causal || args.full {
        return Ok((args.causal, "as asked"));
    }
    match file.remark("causal")?.as_deref() {
        Some("true") => Ok((true, "the file says so")),
        Some("false") => Ok((false, "the file says so")),
        Some(other) => Err(Failure::new(format!(
            "{name}: its metadata has causal = \"{other}\", which is neither true nor false"
        ))
        .hint("--causal or --full decides instead")),
        None => Ok((true, "nothing says so: --full otherwise")),
    }
}

fn near(args: &InspectArgs, causal: bool) -> Outcome<Vec<Option<usize>>> {
    match &args.near {
        None if causal => Ok(vec![None, Some(1)]),
        None => Ok(vec![None]),
        Some(near) => {
            let near: Vec<Option<usize>> = near.iter().map(|near| near.0).collect();
            match near.iter().flatten().next() {
                Some(n) if !causal => Err(Failure::new(format!(
                    "--near {n} is for causal attention; in full attention no block is a query's \
                     own"
                ))
                .hint("--near none, or --causal")),
                _ => Ok(near),
            }
        }
    }
}

/// The layers to look at, each once.
fn chosen(asked: &[String], there: &[String], name: &str) -> Outcome<Vec<String>> {
    let mut chosen: Vec<String> = vec![];
    for prefix in asked {
        if prefix.is_empty() {
            return Err(Failure::new("--prefixes has an empty name")
                .hint(format!("the file has {}", there.join(", "))));
        }
        if !there.contains(prefix) {
            return Err(Failure::new(format!(
                "--prefixes names {prefix}, but {name} has no tensor {prefix}.q; it has layers {}",
                there.join(", ")
            )));
        }
        if !chosen.contains(prefix) {
            chosen.push(prefix.clone());
        }
    }
    Ok(chosen)
}
