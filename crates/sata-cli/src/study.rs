//! `sata study`: tables and plots of the trainings in a folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Outcome};
use crate::output::{say, say_json};
use crate::plot::{self, Axis, COLORS, Figure, Key, Mark, Numerals, Panel, Style};
use crate::table::grouped;

/// Tables and plots of trainings: what `sata train --json` and `sata recall --json` printed
///
/// The folder holds NAME.json for each training, and for those on text NAME/training.json as well,
/// as scripts/study-gpu makes them.
#[derive(Debug, Args)]
pub struct StudyArgs {
    /// The folder
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Write a plot of the curves on held-out text, .svg or .png
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write a plot of recall, .svg or .png
    #[arg(long, value_name = "FILE")]
    recall_svg: Option<PathBuf>,
    /// Print JSON instead of Markdown
    #[arg(long)]
    json: bool,
}

/// A training on text.
#[derive(Debug, Serialize)]
struct Text {
    attention: String,
    seed: u64,
    parameters: usize,
    tokens: usize,
    seconds: f64,
    bits_per_byte: f64,
    at: Vec<AtLength>,
    /// Step and bits per byte of held-out text.
    curve: Vec<(usize, f64)>,
}

#[derive(Debug, Deserialize, Serialize)]
struct AtLength {
    length: usize,
    bits_per_byte: f64,
}

#[derive(Debug, Deserialize)]
struct Trained {
    parameters: usize,
    attention: Option<String>,
    #[serde(default)]
    seed: u64,
    #[serde(default)]
    steps: usize,
    #[serde(default)]
    tokens_per_step: usize,
    seconds: f64,
    validation_bits_per_byte: f64,
    #[serde(default)]
    at: Vec<AtLength>,
}

/// A training on recall.
#[derive(Debug, Deserialize, Serialize)]
struct Recalled {
    attention: String,
    heads: usize,
    head_dim: usize,
    parameters: usize,
    state_bytes_per_layer: Option<u64>,
    steps: usize,
    seed: u64,
    seconds: f64,
    rows: Vec<Asked>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Asked {
    pairs: usize,
    distance: usize,
    accuracy: f64,
}

#[derive(Debug, Deserialize)]
struct Record {
    settings: sata_lm::train::Settings,
    tokens_per_step: usize,
    validation: Amount,
    curve: Vec<sata_lm::train::Point>,
}

#[derive(Debug, Deserialize)]
struct Amount {
    bits_per_byte: f64,
}

#[derive(Debug, Serialize)]
struct Study {
    text: Vec<Text>,
    recall: Vec<Recalled>,
}

/// Runs `sata study`.
///
/// # Errors
/// A folder or file that cannot be read, or an empty study.
pub fn run(args: &StudyArgs) -> Outcome {
    for (path, name) in [(&args.svg, "--svg"), (&args.recall_svg, "--recall-svg")] {
        if let Some(path) = path {
            plot::check(path, name)?;
        }
    }
    let study = Study::load(&args.folder)?;
    if let Some(path) = &args.svg {
        plot::write(&curves(&study.text), path)?;
    }
    if let Some(path) = &args.recall_svg {
        plot::write(&recall(&study.recall), path)?;
    }
    if args.json { say_json(&study) } else { say(study.markdown()) }
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Outcome<T> {
    let bytes = std::fs::read(path).map_err(|error| Failure::io(path, "reading", &error))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

impl Study {
    fn load(folder: &Path) -> Outcome<Self> {
        let entries =
            std::fs::read_dir(folder).map_err(|error| Failure::io(folder, "reading", &error))?;
        let mut paths: Vec<PathBuf> =
            entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.retain(|path| {
            path.extension().is_some_and(|extension| extension == "json")
                && path.file_name().is_some_and(|name| name != "tokenizer.json")
        });
        paths.sort();
        let (mut text, mut recall) = (vec![], vec![]);
        for path in paths {
            let record = path.with_extension("").join("training.json");
            if record.exists() {
                text.push(Text::new(read(&path)?, read(&record)?));
            } else {
                // A training on text whose folder is not there, or one on recall.
                let found: serde_json::Value = read(&path)?;
                if found.get("validation_bits_per_byte").is_some() {
                    text.push(Text::without_curve(&path, read(&path)?)?);
                } else {
                    recall.push(read::<Recalled>(&path)?);
                }
            }
        }
        if text.is_empty() && recall.is_empty() {
            return Err(Failure::new(format!("{}: no training is there", folder.display())));
        }
        text.sort_by_key(|t| (t.parameters / 500_000, t.attention.clone(), t.seed));
        recall.sort_by_key(|r| (r.attention.clone(), r.heads * r.head_dim, r.head_dim, r.seed));
        Ok(Study { text, recall })
    }

    fn markdown(&self) -> String {
        let mut lines = vec![];
        let mut lengths: Vec<usize> =
            self.text.iter().flat_map(|t| t.at.iter().map(|at| at.length)).collect();
        lengths.sort_unstable();
        lengths.dedup();
        if !self.text.is_empty() {
            let heads = lengths.iter().map(|n| format!(" held out, {} |", grouped(*n as u128)));
            lines.push(format!(
                "| attention | weights | seed | tokens | s |{}",
                heads.collect::<String>()
            ));
            lines.push(format!("|---|---|---|---|---|{}", "---|".repeat(lengths.len())));
            lines.extend(self.text.iter().map(|t| t.row(&lengths)));
        }
        if !self.recall.is_empty() {
            let mut asked: Vec<(usize, usize)> = self
                .recall
                .iter()
                .flat_map(|r| r.rows.iter().map(|row| (row.distance, row.pairs)))
                .collect();
            asked.sort_unstable();
            asked.dedup();
            let heads = asked.iter().map(|(distance, pairs)| match distance {
                0 => format!(" {pairs} |"),
                n => format!(" {pairs}, {} away |", grouped(*n as u128)),
            });
            lines.push(String::new());
            lines.push(format!(
                "| attention | heads | state of a layer, KB | steps | seed |{}",
                heads.collect::<String>()
            ));
            lines.push(format!("|---|---|---|---|---|{}", "---|".repeat(asked.len())));
            lines.extend(self.recall.iter().map(|r| r.row(&asked)));
        }
        lines.join("\n")
    }
}

impl Text {
    /// Of a training whose folder is not there.
    fn without_curve(path: &Path, trained: Trained) -> Outcome<Self> {
        let Some(attention) = trained.attention else {
            let reason = "it says no attention, and the training's folder is not beside it";
            return Err(Failure::new(format!("{}: {reason}", path.display())));
        };
        Ok(Text {
            attention,
            seed: trained.seed,
            parameters: trained.parameters,
            tokens: trained.steps * trained.tokens_per_step,
            seconds: trained.seconds,
            bits_per_byte: trained.validation_bits_per_byte,
            at: trained.at,
            curve: vec![],
        })
    }

    fn new(trained: Trained, record: Record) -> Self {
        let per_nat = record.validation.bits_per_byte;
        let curve = record.curve.iter();
        Text {
            attention: record.settings.model.attention.to_string(),
            seed: record.settings.train.seed,
            parameters: trained.parameters,
            tokens: record.curve.len() * record.tokens_per_step,
            seconds: trained.seconds,
            bits_per_byte: trained.validation_bits_per_byte,
            at: trained.at,
            curve: curve.filter_map(|p| Some((p.step, p.validation? * per_nat))).collect(),
        }
    }

    fn row(&self, lengths: &[usize]) -> String {
        let Text { attention, seed, parameters, tokens, seconds, .. } = self;
        let at = lengths.iter().map(|n| match self.at.iter().find(|at| at.length == *n) {
            Some(at) => format!(" {:.4} |", at.bits_per_byte),
            None => " |".into(),
        });
        format!(
            "| `{attention}` | {:.2} M | {seed} | {:.1} M | {seconds:.0} |{}",
            *parameters as f64 / 1e6,
            *tokens as f64 / 1e6,
            at.collect::<String>()
        )
    }
}

impl Recalled {
    fn row(&self, asked: &[(usize, usize)]) -> String {
        let state = match self.state_bytes_per_layer {
            Some(bytes) => format!("{:.0}", bytes as f64 / 1e3),
            None => "every token".into(),
        };
        let at = asked.iter().map(|&(distance, pairs)| {
            let row = self.rows.iter().find(|row| (row.distance, row.pairs) == (distance, pairs));
            row.map_or(" |".into(), |row| format!(" {:.1} |", 100.0 * row.accuracy))
        });
        format!(
            "| `{}` | {} × {} | {state} | {} | {} |{}",
            self.attention,
            self.heads,
            self.head_dim,
            self.steps,
            self.seed,
            at.collect::<String>()
        )
    }
}

const STYLES: [Style; 3] = [Style::Solid, Style::Dashed, Style::Dotted];

/// The look of each name, in the names' order.
fn looks(names: impl Iterator<Item = String>) -> BTreeMap<String, (&'static str, Style)> {
    let mut all: Vec<String> = names.collect();
    all.sort();
    all.dedup();
    let look = |i: usize| (COLORS[i % COLORS.len()], STYLES[i / COLORS.len() % STYLES.len()]);
    all.into_iter().enumerate().map(|(i, name)| (name, look(i))).collect()
}

fn keys(looks: &BTreeMap<String, (&'static str, Style)>) -> Vec<Key> {
    looks.iter().map(|(name, (color, style))| Key::line(name, color, *style)).collect()
}

fn line(points: Vec<(f64, f64)>, (color, style): (&'static str, Style)) -> Mark {
    Mark::Line { points, color: color.into(), style }
}

/// Held-out bits per byte in training, a panel for each size, all seeds.
fn curves(text: &[Text]) -> Figure {
    let looks = looks(text.iter().map(|t| t.attention.clone()));
    let mut sizes = BTreeMap::<usize, Vec<&Text>>::new();
    for t in text {
        // Models of one size differ by their gates alone.
        sizes.entry(t.parameters.div_ceil(500_000)).or_default().push(t);
    }
    let panel = |of: &Vec<&Text>| {
        let last = of.iter().map(|t| t.bits_per_byte).fold(f64::INFINITY, f64::min);
        let steps = of.iter().flat_map(|t| t.curve.iter().map(|p| p.0)).max().unwrap_or(1);
        let from = steps as f64 / 8.0;
        let points = |t: &Text| -> Vec<(f64, f64)> {
            let curve = t.curve.iter().map(|&(step, bits)| (step as f64, bits));
            curve.filter(|point| point.0 >= from).collect()
        };
        Panel {
            title: format!("{:.1} M weights", of[0].parameters as f64 / 1e6),
            x: Axis::linear("step", from, steps as f64),
            y: Axis::linear("bits per byte", 0.98 * last, 1.2 * last),
            marks: of.iter().map(|t| line(points(t), looks[&t.attention])).collect(),
        }
    };
    Figure {
        id: "study-gpu".into(),
        title: "Held-out text in training".into(),
        subtitle: vec![],
        columns: sizes.len().clamp(1, 3),
        panels: sizes.values().map(panel).collect(),
        keys: keys(&looks),
    }
}

/// Accuracy by the number of pairs at once after them, and by distance.
fn recall(rows: &[Recalled]) -> Figure {
    let name = |r: &Recalled| format!("{}, {} × {}", r.attention, r.heads, r.head_dim);
    let looks = looks(rows.iter().map(name));
    let of = |f: &dyn Fn(&Asked) -> Option<(f64, f64)>| -> Vec<Mark> {
        let points = |r: &Recalled| {
            let mut points: Vec<(f64, f64)> = r.rows.iter().filter_map(f).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            points
        };
        rows.iter().map(|r| line(points(r), looks[&name(r)])).collect()
    };
    let all = || rows.iter().flat_map(|r| &r.rows);
    let most_pairs = all().map(|row| row.pairs).max().unwrap_or(2) as f64;
    let least_pairs = all().map(|row| row.pairs).min().unwrap_or(1) as f64;
    let far = all().map(|row| row.distance).max().unwrap_or(1).max(2) as f64;
    let percent = |row: &Asked| 100.0 * row.accuracy;
    // The number of pairs that the distances are shown for.
    let shown = all().map(|row| row.pairs).filter(|&n| n <= 64).max().unwrap_or(64);
    Figure {
        id: "recall".into(),
        title: "Associative recall".into(),
        subtitle: vec![],
        columns: 2,
        panels: vec![
            Panel {
                title: "asked at once".into(),
                x: Axis::log("pairs", least_pairs, most_pairs, Numerals::Counts),
                y: Axis::linear("recalled, %", 0.0, 100.0),
                marks: of(&|row| (row.distance == 0).then(|| (row.pairs as f64, percent(row)))),
            },
            Panel {
                title: format!("{shown} pairs, asked later"),
                x: Axis::log("tokens between", 64.0, far, Numerals::Counts),
                y: Axis::linear("recalled, %", 0.0, 100.0),
                marks: of(&|row| {
                    let at = (row.distance as f64).max(64.0);
                    (row.pairs == shown).then(|| (at, percent(row)))
                }),
            },
        ],
        keys: keys(&looks),
    }
}
