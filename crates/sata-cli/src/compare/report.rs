//! What was compared, as a table and as JSON.

use std::path::Path;

use sata_lm::Attention;
use sata_lm::eval::ByPosition;
use serde::Serialize;

use super::record::Record;
use crate::table::{grouped, table, three};

/// All models.
#[derive(Debug, Serialize)]
pub struct Report {
    /// How far they read, in training lengths.
    pub lengths: usize,
    /// The models, as they were named.
    pub rows: Vec<Row>,
}

/// One model.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Its folder's name.
    pub model: String,
    /// Its attention in short words.
    pub attention: String,
    /// Where its random numbers began.
    pub seed: u64,
    /// Weights.
    pub parameters: usize,
    /// Bits per byte of the text that its training held out, at the end.
    pub held_out: Option<f64>,
    /// Bits per byte of the text within the training length.
    pub within: f64,
    /// Over the last range of positions.
    pub far: f64,
    /// Over that of the same tokens with no more than the training length before them.
    pub far_over_fresh: Option<f64>,
    /// Median and largest norm of its gradients after the warm-up.
    pub gradient_norms: Option<[f64; 2]>,
    /// In training.
    pub tokens_per_second: f64,
    /// Bits per byte by position.
    pub by_position: ByPosition,
}

impl Row {
    /// That of a model.
    pub fn new(folder: &Path, record: &Record, attention: &Attention, found: ByPosition) -> Self {
        let last = found.buckets.last();
        Row {
            model: folder.file_name().unwrap_or(folder.as_os_str()).to_string_lossy().into(),
            attention: attention.to_string(),
            seed: record.settings.train.seed,
            parameters: record.parameters,
            held_out: record.held_out().last().map(|(_, bits)| bits),
            within: found.within_bits_per_byte,
            far: last.map_or(f64::NAN, |bucket| bucket.bits_per_byte),
            far_over_fresh: last.and_then(|bucket| bucket.ratio()),
            gradient_norms: record.gradient_norms(),
            tokens_per_second: record.tokens_per_second(),
            by_position: found,
        }
    }
}

impl Report {
    /// For people.
    pub fn text(&self) -> String {
        let first = self.rows.first().map(|row| row.within);
        let rows: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|row| {
                let bits = |x: Option<f64>| x.map_or_else(String::new, |x| format!("{x:.4}"));
                let over = first.map(|first| 100.0 * (row.within / first - 1.0));
                let norms = row.gradient_norms;
                vec![
                    row.attention.clone(),
                    row.seed.to_string(),
                    grouped(row.parameters as u128),
                    bits(row.held_out),
                    bits(Some(row.within)),
                    over.map_or_else(String::new, |over| format!("{over:+.2} %")),
                    bits(Some(row.far)),
                    bits(row.far_over_fresh),
                    norms.map_or_else(String::new, |[middle, most]| {
                        format!("{} / {}", three(middle), three(most))
                    }),
                    grouped(row.tokens_per_second as u128),
                ]
            })
            .collect();
        let far = format!("to {}×", self.lengths);
        let headings = [
            "attention",
            "seed",
            "weights",
            "held out",
            "1×",
            "to first",
            &far,
            "over fresh",
            "gradient",
            "tokens/s",
        ];
        format!(
            "Bits per byte; 1× is within the training length, {far} the last range of positions, \
             \"fresh\" the same tokens\nwith no more than the training length before them; norms of \
             gradients: median / largest\n{}",
            table(&headings, &rows)
        )
    }
}
