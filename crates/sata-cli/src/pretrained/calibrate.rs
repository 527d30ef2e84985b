//! `sata calibrate`: a setting for every head, chosen by a text under a budget of memory.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use sata_lm::pretrained::calibrate::{Choice, Recorded, choose, measure, record, statistics};
use sata_lm::pretrained::{
    Bert, Calibration, Far, HeadSetting, Heads, Kind, Llama, MemorySetting, Setting,
};
use serde::Serialize;

use super::passages::text;
use super::spec::named;
use super::{load, sizes};
use crate::failure::{Failure, Outcome};
use crate::numbers::{count, size};
use crate::output::{Staged, say, say_json};
use crate::progress::Progress;
use crate::table::{bytes, grouped, table};

/// Choose an attention for every head of a model, by a text and under a budget of memory
///
/// The model reads the text with softmax. Every candidate then answers queries of its second half in
/// every key/value head, and what it changes in the residual stream is measured. Candidates are chosen so
/// that all changes together are least while all states together fit the budget.
#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// A GGUF file, or a folder with one or with config.json, model.safetensors and tokenizer.json
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Text files, UTF-8, or folders, of which all .txt files are taken
    #[arg(long, value_name = "PATHS", num_args = 1.., required = true)]
    text: Vec<PathBuf>,
    /// Bytes of all states together, in f32 [default: a quarter of the KV cache of the model's context]
    #[arg(long, value_name = "BYTES", value_parser = count)]
    budget: Option<u64>,
    /// Tokens to read
    #[arg(long, value_name = "N", default_value = "4096", value_parser = size)]
    context: usize,
    /// Candidates, as for `sata eval --attention`; for an encoder the one setting of all heads [default: windows of 64 to 1,024 tokens with 4 sinks,
    /// alone and with 32 to 1,024 groups]
    #[arg(long, value_name = "SPEC", num_args = 1..)]
    candidates: Vec<String>,
    /// Write the setting here
    #[arg(long, short, value_name = "SPEC.json")]
    output: PathBuf,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Near blocks, sinks, and groups that are tried.
const NEAR: [usize; 4] = [0, 1, 3, 7];
const SINKS: usize = 4;
const GROUPS: [usize; 6] = [32, 64, 128, 256, 512, 1024];
/// Windows alone, besides.
const WIDE: [usize; 2] = [15, 31];

/// A setting, and how it was chosen.
pub struct Chosen {
    /// The setting.
    pub setting: Setting,
    /// What each head got, `[layers][kv_heads]`.
    choices: Vec<Vec<Choice>>,
    names: Vec<String>,
}

/// Chooses for the heads of a model.
///
/// # Errors
/// Candidates that do not fit the model, a budget that not even the smallest fit.
pub fn choose_for(
    model: &Arc<Llama>,
    tokens: &[u32],
    budget: usize,
    asked: &[String],
) -> Outcome<Chosen> {
    let config = model.config();
    let d = config.head_dim;
    let mut candidates = vec![];
    for name in asked {
        match named(name, d)?.setting.heads {
            Heads::All(head) if head != HeadSetting::Softmax => {
                candidates.push((name.clone(), head))
            }
            _ => {
                return Err(Failure::new(format!("--candidates {name}: it has no fixed size")));
            }
        }
    }
    if asked.is_empty() {
        candidates = usual();
    }
    let (names, heads): (Vec<String>, Vec<HeadSetting>) = candidates.into_iter().unzip();
    let is_mixed = |head: &HeadSetting| {
        matches!(head, HeadSetting::Memory(MemorySetting { far: Far::Mixed { .. }, .. }))
    };
    let turns = heads.iter().any(is_mixed);
    let progress = Progress::new(2 * tokens.len() as u64);
    progress.doing("reading the text with softmax");
    let layers = record(model, tokens, |read| progress.done(read as u64))?;
    let (mut calibration, mut errors) = (vec![], vec![]);
    let count = layers.len();
    for (i, layer) in layers.into_iter().enumerate() {
        progress.doing(format!("layer {} of {count}", i + 1));
        let known: Vec<Arc<_>> = (0..config.kv_heads)
            .map(|kv_head| Arc::new(statistics(&layer, kv_head, d, turns)))
            .collect();
        let out = model.output_matrix(i).unwrap_or(&[]);
        errors.push(measure(&layer, out, d, &heads, &known)?);
        calibration.push(known);
        progress.done((tokens.len() / count) as u64);
    }
    progress.finish();
    let choices = choose(&errors, budget).ok_or_else(|| {
        let least: usize = errors
            .iter()
            .flatten()
            .filter_map(|choices| choices.iter().map(|choice| choice.bytes).min())
            .sum();
        Failure::new(format!(
            "the budget is {budget} bytes, but the smallest candidates need {least}"
        ))
    })?;
    let each = choices
        .iter()
        .map(|layer| layer.iter().map(|choice| heads[choice.candidate].clone()).collect());
    let setting = Setting { heads: Heads::Each(each.collect()), calibration };
    Ok(Chosen { setting, choices, names })
}

fn usual() -> Vec<(String, HeadSetting)> {
    let mut all = vec![];
    let mut add = |near: usize, far: Far| {
        let name = match far {
            Far::Groups(groups) => format!("groups:{groups},near={near},sinks={SINKS}"),
            _ => format!("window:{near},sinks={SINKS}"),
        };
        let block = sata::DEFAULT_BLOCK;
        let memory = MemorySetting { near, block, sinks: SINKS, kept: 0, far };
        all.push((name, HeadSetting::Memory(memory)));
    };
    for near in NEAR {
        add(near, Far::Nothing);
        GROUPS.into_iter().for_each(|groups| add(near, Far::Groups(groups)));
    }
    WIDE.into_iter().for_each(|near| add(near, Far::Nothing));
    all
}

/// What was chosen.
#[derive(Debug, Serialize)]
struct Report {
    tokens: usize,
    budget: usize,
    bytes: usize,
    /// Changes of all heads together, as shares of the residual stream's mean square.
    error: f64,
    /// The candidates, and how many heads took each.
    candidates: Vec<(String, usize)>,
    /// `[layers][kv_heads]`.
    choices: Vec<Vec<Choice>>,
}

/// One setting for all heads of an encoder, with what parts of a text say about them.
fn encoder(args: &CalibrateArgs, model: &Bert, tokens: &[u32]) -> Outcome<Setting> {
    let [candidate] = &args.candidates[..] else {
        return Err(Failure::new("--model is an encoder: --candidates must name the one setting")
            .hint("--candidates groups:128, for example"));
    };
    let d = model.config().head_dim();
    let mut setting = named(candidate, d)?.setting;
    let mut layers = vec![Recorded::default(); model.config().layers];
    let wants = tokens.len().min(args.context);
    for part in tokens[..wants].chunks(model.config().positions) {
        let softmax = Setting::softmax();
        model.hidden(part, &softmax, &mut |layer, qkv| layers[layer].push(qkv))?;
    }
    let known = |layer: &Recorded| -> Vec<Arc<Calibration>> {
        (0..model.config().heads).map(|head| Arc::new(statistics(layer, head, d, true))).collect()
    };
    setting.calibration = layers.iter().map(known).collect();
    Ok(setting)
}

/// Runs `sata calibrate`.
///
/// # Errors
/// As [`choose_for`]; a file that cannot be read or written.
pub fn run(args: &CalibrateArgs) -> Outcome {
    let mut output = Staged::new(&args.output, "--output")?;
    let loaded = load(&args.model)?;
    let text = text(&args.text)?;
    let tokens = loaded.tokenizer.encode(&text)?.0;
    let model = match &loaded.model {
        Kind::Llama(model) => model,
        Kind::Bert(model) => {
            let setting = encoder(args, model, &tokens)?;
            setting.check_sizes(sizes(&loaded.model))?;
            output.write(compact(&setting)?.as_bytes())?;
            output.commit()?;
            return say(format!(
                "{} with a calibration: wrote {}",
                args.candidates[0],
                args.output.display()
            ));
        }
    };
    let config = model.config();
    let Some(tokens) = tokens.get(..args.context) else {
        let (wants, has) = (args.context, tokens.len());
        return Err(Failure::new(format!("--context is {wants} tokens, --text has {has}")));
    };
    let budget = match args.budget {
        Some(budget) => usize::try_from(budget).unwrap_or(usize::MAX),
        None => config.cache_bytes(config.context, 4) / 4,
    };
    let chosen = choose_for(model, tokens, budget, &args.candidates)?;
    chosen.setting.check_sizes(sizes(&loaded.model))?;
    output.write(compact(&chosen.setting)?.as_bytes())?;
    output.commit()?;
    let all = || chosen.choices.iter().flatten();
    let taken = |i: usize| all().filter(|choice| choice.candidate == i).count();
    let report = Report {
        tokens: tokens.len(),
        budget,
        bytes: all().map(|choice| choice.bytes).sum(),
        error: all().map(|choice| choice.error).sum(),
        candidates: chosen.names.iter().cloned().enumerate().map(|(i, n)| (n, taken(i))).collect(),
        choices: chosen.choices,
    };
    if args.json {
        return say_json(&report);
    }
    let rows: Vec<Vec<String>> = report
        .candidates
        .iter()
        .filter(|candidate| candidate.1 > 0)
        .map(|(name, heads)| vec![name.clone(), heads.to_string()])
        .collect();
    say(format!(
        "{} tokens read; {} of {} bytes, {:.1} % of the KV cache of {} tokens\n{}\nwrote {}",
        grouped(report.tokens as u128),
        bytes(report.bytes as u128),
        bytes(report.budget as u128),
        100.0 * report.bytes as f64 / config.cache_bytes(config.context, 4) as f64,
        grouped(config.context as u128),
        table(&["attention", "key/value heads"], &rows),
        args.output.display()
    ))
}

/// A setting as JSON in one line: most of it are numbers of the calibration.
fn compact(setting: &Setting) -> Outcome<String> {
    serde_json::to_string(setting).map_err(|error| Failure::new(format!("JSON: {error}")))
}
