//! What `sata eval` found of a decoder, as text, as JSON and as a plot.

use sata_lm::pretrained::LlamaConfig;
use serde::Serialize;

use crate::plot::{Axis, COLORS, Figure, Key, Mark, Numerals, Panel, Style};
use crate::table::{bytes, grouped, table};

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where the model came from.
    pub model: String,
    /// What it is.
    pub config: LlamaConfig,
    /// Tokens of a passage.
    pub context: usize,
    /// How many.
    pub passages: usize,
    /// First tokens of the text that chose a setting and were not measured.
    pub calibrated_on_first: usize,
    /// Bytes of softmax's KV cache at the end of a passage, f32.
    pub cache_bytes: usize,
    /// The same of the model's own context.
    pub full_cache_bytes: usize,
    /// One for each setting, softmax first.
    pub rows: Vec<Row>,
}

/// One setting.
#[derive(Debug, Serialize)]
pub struct Row {
    /// As on the command line.
    pub attention: String,
    /// Bytes of all that it remembers, f32.
    pub bytes: usize,
    /// Seconds for all passages, logits included.
    pub seconds: f64,
    /// By position.
    pub ranges: Vec<Range>,
}

/// Predictions after `from` to `to` tokens.
#[derive(Debug, Serialize)]
pub struct Range {
    /// Tokens read before the first prediction, less one.
    pub from: usize,
    /// One more than before the last.
    pub to: usize,
    /// Predictions.
    pub tokens: usize,
    /// Bytes of the tokens predicted.
    pub bytes: usize,
    /// Mean −ln p.
    pub nats_per_token: f64,
    /// The same in bits, of a byte of text.
    pub bits_per_byte: f64,
    /// How often the likeliest token is softmax's.
    pub top1_agreement: f64,
}

impl Report {
    /// For people.
    pub fn text(&self) -> String {
        let mut parts = vec![format!(
            "{}: {} passages of {} tokens; KV cache {} in f32 ({} at the model's own {})",
            self.model,
            self.passages,
            grouped(self.context as u128),
            bytes(self.cache_bytes as u128),
            bytes(self.full_cache_bytes as u128),
            grouped(self.config.context as u128),
        )];
        let Some(softmax) = self.rows.first() else {
            return parts.remove(0);
        };
        for (i, range) in softmax.ranges.iter().enumerate() {
            let cells = |row: &Row| {
                let found = &row.ranges[i];
                let more = found.nats_per_token / range.nats_per_token - 1.0;
                vec![
                    row.attention.clone(),
                    bytes(row.bytes as u128),
                    format!("{:.1} %", 100.0 * row.bytes as f64 / self.full_cache_bytes as f64),
                    format!("{:.4}", found.nats_per_token),
                    format!("{:.4}", found.bits_per_byte),
                    format!("{:+.2} %", 100.0 * more),
                    format!("{:.1} %", 100.0 * found.top1_agreement),
                ]
            };
            let headings = [
                "attention",
                "bytes",
                "of full KV",
                "nats/token",
                "bits/byte",
                "to softmax",
                "same top",
            ];
            let rows: Vec<Vec<String>> = self.rows.iter().map(cells).collect();
            parts.push(format!(
                "Tokens {} to {}, {} predictions\n{}",
                grouped(range.from as u128),
                grouped(range.to as u128),
                grouped(range.tokens as u128),
                table(&headings, &rows)
            ));
        }
        parts.join("\n\n")
    }

    /// Nats per token more than softmax's against position.
    pub fn figure(&self) -> Figure {
        let none = Vec::new();
        let softmax = self.rows.first().map_or(&none, |row| &row.ranges);
        // A range stands at its geometric middle.
        let at = |range: &Range| ((range.from.max(1) as f64) * (range.to as f64)).sqrt();
        let lines: Vec<Vec<(f64, f64)>> = self
            .rows
            .iter()
            .skip(1)
            .map(|row| {
                let pairs = row.ranges.iter().zip(softmax);
                let points = pairs.map(|(r, s)| (at(r), r.nats_per_token - s.nats_per_token));
                let mut points: Vec<(f64, f64)> = points.collect();
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                points
            })
            .collect();
        let all = || lines.iter().flatten().map(|point| point.1);
        let (lowest, highest) = (all().fold(0.0, f64::min), all().fold(0.01, f64::max));
        let room = 0.05 * (highest - lowest);
        let mut marks = vec![];
        let mut keys = vec![];
        for (i, line) in lines.iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            marks.push(Mark::line(line.clone(), color));
            marks.push(Mark::dots(line.clone(), color));
            keys.push(Key::line(self.rows[i + 1].attention.clone(), color, Style::Solid));
        }
        Figure {
            id: "above-softmax".into(),
            title: "Loss above softmax's by position".into(),
            subtitle: vec![format!(
                "{}, {} passages of {} tokens",
                self.config_words(),
                self.passages,
                grouped(self.context as u128)
            )],
            columns: 1,
            panels: vec![Panel {
                title: String::new(),
                x: Axis::log("tokens before", 16.0, self.context as f64, Numerals::Counts),
                y: Axis::linear("nats per token above softmax", lowest - room, highest + room),
                marks,
            }],
            keys,
        }
    }

    fn config_words(&self) -> String {
        let c = &self.config;
        format!("{} layers, {} key/value heads of {}", c.layers, c.kv_heads, c.head_dim)
    }
}
