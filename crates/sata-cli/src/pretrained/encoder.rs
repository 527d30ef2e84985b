//! `sata eval --model` of an encoder: how far a text's vector is from the one that softmax makes.

use sata_lm::pretrained::{Bert, BertConfig, Setting, TextTokenizer};
use serde::Serialize;

use super::spec::Named;
use crate::errors::quantile;
use crate::eval::EvalArgs;
use crate::failure::{Failure, Outcome};
use crate::output::{say, say_json};
use crate::progress::Progress;
use crate::table::{grouped, table};

/// Shortest and longest passage, in tokens of the text.
const LENGTHS: [usize; 2] = [200, 500];
/// Passages if nobody says.
const PASSAGES: usize = 50;

/// Everything that was measured.
#[derive(Debug, Serialize)]
struct Report {
    config: BertConfig,
    passages: usize,
    /// Tokens of the shortest and the longest passage, those put around a text included.
    tokens: [usize; 2],
    rows: Vec<Row>,
}

/// One setting.
#[derive(Debug, Serialize)]
struct Row {
    attention: String,
    /// Cosines to softmax's vector: least, 5 %, median, mean.
    least: f64,
    percent5: f64,
    median: f64,
    mean: f64,
    /// How often a passage's nearest other passage is the one that it is with softmax.
    same_nearest: f64,
}

/// Runs it.
///
/// # Errors
/// A text that is too short, settings that do not fit.
pub fn run(
    args: &EvalArgs,
    model: &Bert,
    tokenizer: &TextTokenizer,
    text: &str,
    settings: &[Named],
) -> Outcome {
    let longest = args.context.unwrap_or(LENGTHS[1]).min(model.config().positions);
    let passages = passages(tokenizer, text, longest)?;
    let progress = Progress::new((passages.len() * (settings.len() + 1)) as u64);
    let embed = |named: &Named| -> Outcome<Vec<Vec<f32>>> {
        progress.doing(named.name.clone());
        passages
            .iter()
            .map(|tokens| {
                let vector = model.embed(tokens, &named.setting).map_err(|error| {
                    Failure::from(error).context(format!("--attention {}", named.name))
                });
                progress.done(1);
                vector
            })
            .collect()
    };
    let softmax = Named { name: "softmax".into(), setting: Setting::softmax() };
    let truth = embed(&softmax)?;
    let mut rows = vec![];
    for named in settings {
        let got = embed(named)?;
        let mut cosines: Vec<f64> =
            got.iter().zip(&truth).map(|(got, truth)| cosine(got, truth)).collect();
        cosines.sort_by(f64::total_cmp);
        let same = (0..got.len()).filter(|&i| nearest(&got, i) == nearest(&truth, i)).count();
        rows.push(Row {
            attention: named.name.clone(),
            least: cosines[0],
            percent5: quantile(&cosines, 0.05),
            median: quantile(&cosines, 0.5),
            mean: cosines.iter().sum::<f64>() / cosines.len() as f64,
            same_nearest: same as f64 / got.len() as f64,
        });
    }
    progress.finish();
    let lengths = passages.iter().map(Vec::len);
    let tokens = [lengths.clone().min().unwrap_or(0), lengths.max().unwrap_or(0)];
    let report = Report { config: model.config().clone(), passages: passages.len(), tokens, rows };
    if args.json { say_json(&report) } else { say(words(&report)) }
}

fn words(report: &Report) -> String {
    let cells = |row: &Row| {
        vec![
            row.attention.clone(),
            format!("{:.4}", row.median),
            format!("{:.4}", row.mean),
            format!("{:.4}", row.percent5),
            format!("{:.4}", row.least),
            format!("{:.0} %", 100.0 * row.same_nearest),
        ]
    };
    let rows: Vec<Vec<String>> = report.rows.iter().map(cells).collect();
    let headings = ["attention", "median", "mean", "5 %", "least", "same nearest"];
    format!(
        "Cosine to softmax's vector, {} passages of {} to {} tokens\n{}",
        report.passages,
        grouped(report.tokens[0] as u128),
        grouped(report.tokens[1] as u128),
        table(&headings, &rows)
    )
}

/// Passages of lengths spread evenly from the shortest to `longest`, spread evenly over the text.
fn passages(tokenizer: &TextTokenizer, text: &str, longest: usize) -> Outcome<Vec<Vec<u32>>> {
    let (tokens, places) = tokenizer.encode(text)?;
    let shortest = LENGTHS[0].min(longest);
    let each = tokens.len() / PASSAGES;
    if each < longest + 2 {
        return Err(Failure::new(format!(
            "--text has {} tokens, {PASSAGES} passages of up to {longest} need {}",
            tokens.len(),
            PASSAGES * (longest + 2)
        ))
        .hint("give more text, or a smaller --context"));
    }
    (0..PASSAGES)
        .map(|i| {
            // What is put around a text counts.
            let length = shortest + (longest - shortest) * i / (PASSAGES - 1);
            let first = 1 + i * each;
            let last = first + length.saturating_sub(3);
            let (from, to) = (places[first].0, places[last].1);
            let mut tokens = tokenizer.encode(&text[from..to])?.0;
            tokens.truncate(longest);
            Ok(tokens)
        })
        .collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let product = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    product(a, b) / (product(a, a) * product(b, b)).sqrt()
}

fn nearest(all: &[Vec<f32>], i: usize) -> Option<usize> {
    let others = (0..all.len()).filter(|&j| j != i);
    others.max_by(|&a, &b| cosine(&all[a], &all[i]).total_cmp(&cosine(&all[b], &all[i])))
}
