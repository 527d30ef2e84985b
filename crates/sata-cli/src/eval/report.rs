//! What was measured, as text and as JSON.

use sata_lm::Config;
use sata_lm::eval::{ByPosition, NeedleRow, RecallRow};
use serde::Serialize;

use crate::table::{bytes, grouped, table};

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where the model came from.
    pub model: String,
    /// SHA-256 of its weights.
    pub digest: String,
    /// What it is.
    pub config: Config,
    /// Tokens of the text.
    pub text_tokens: usize,
    /// Its bytes.
    pub text_bytes: usize,
    /// Where random numbers began.
    pub seed: u64,
    /// Bits per byte.
    pub by_position: ByPosition,
    /// Pairs, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recall: Option<Vec<RecallRow>>,
    /// Needles, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub needle: Option<Vec<NeedleRow>>,
}

impl Report {
    /// For people.
    pub fn text(&self) -> String {
        let mut parts = vec![
            format!(
                "{}: {} tokens of text, {}",
                self.model,
                grouped(self.text_tokens as u128),
                bytes(self.text_bytes as u128)
            ),
            self.positions(),
        ];
        parts.extend(self.recall.as_deref().map(recall));
        parts.extend(self.needle.as_deref().map(needle));
        parts.join("\n\n")
    }

    fn positions(&self) -> String {
        let found = &self.by_position;
        let context = found.settings.context as f64;
        let rows: Vec<Vec<String>> = found
            .buckets
            .iter()
            .map(|b| {
                let optional = |x: Option<f64>| x.map_or_else(String::new, |x| format!("{x:.4}"));
                vec![
                    format!("{} to {}", grouped(b.from as u128), grouped(b.to as u128 - 1)),
                    format!("{:.3}", b.to as f64 / context),
                    grouped(b.bytes.into()),
                    format!("{:.4}", b.bits_per_byte),
                    optional(b.fresh_bits_per_byte),
                    optional(b.ratio()),
                ]
            })
            .collect();
        let headings = ["tokens before", "of context", "bytes", "bits per byte", "fresh", "ratio"];
        format!(
            "Bits per byte by position, {} passes of {} tokens; context {}; \"fresh\" is the same \
             text after half to all of the context\n{}\nall positions {:.4}, within the context {:.4}",
            found.passes,
            grouped(found.settings.positions as u128),
            grouped(found.settings.context as u128),
            table(&headings, &rows),
            found.bits_per_byte,
            found.within_bits_per_byte,
        )
    }
}

fn percent(x: f64) -> String {
    format!("{:.1} %", 100.0 * x)
}

fn recall(rows: &[RecallRow]) -> String {
    let cells = |row: &RecallRow| {
        vec![
            row.pairs.to_string(),
            grouped(row.distance as u128),
            row.questions.to_string(),
            percent(row.accuracy),
            percent(row.among_values),
            percent(row.guessing),
        ]
    };
    let headings = ["pairs", "distance", "questions", "greedy", "among values", "guessing"];
    let cells: Vec<Vec<String>> = rows.iter().map(cells).collect();
    format!("Recall of pairs of words\n{}", table(&headings, &cells))
}

fn needle(rows: &[NeedleRow]) -> String {
    let cells = |row: &NeedleRow| {
        vec![
            grouped(row.distance as u128),
            row.trials.to_string(),
            format!("{:.2}", row.bits_with),
            format!("{:.2}", row.bits_without),
            format!("{:+.2}", row.bits_with - row.bits_without),
            percent(row.accuracy),
            percent(row.accuracy_without),
        ]
    };
    let headings = ["distance", "texts", "log2 p", "without it", "gain", "greedy", "without it"];
    let cells: Vec<Vec<String>> = rows.iter().map(cells).collect();
    format!("A sentence planted in text, and asked for\n{}", table(&headings, &cells))
}
