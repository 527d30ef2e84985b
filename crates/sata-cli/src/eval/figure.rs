//! The plot of bits per byte against position.

use sata_lm::eval::Bucket;

use super::report::Report;
use crate::plot::{Axis, COLORS, Figure, Key, Mark, Numerals, Panel, Style};

/// Bits per byte against the number of tokens before.
pub fn by_position(report: &Report) -> Figure {
    let found = &report.by_position;
    // A range stands at its geometric middle.
    let at = |b: &Bucket| ((b.from as f64) * (b.to as f64)).sqrt();
    let long: Vec<(f64, f64)> = found.buckets.iter().map(|b| (at(b), b.bits_per_byte)).collect();
    let fresh: Vec<(f64, f64)> =
        found.buckets.iter().filter_map(|b| Some((at(b), b.fresh_bits_per_byte?))).collect();
    let all = || long.iter().chain(&fresh).map(|point| point.1);
    let lowest = all().fold(f64::INFINITY, f64::min);
    let highest = all().fold(f64::NEG_INFINITY, f64::max);
    let room = (0.1 * (highest - lowest)).max(0.01 * highest);
    let y = Axis::linear("bits per byte", (lowest - room).max(0.0), highest + room);
    let context = found.settings.context as f64;
    Figure {
        id: "bits-per-byte".into(),
        title: "Bits per byte by position".into(),
        subtitle: vec![format!("{}, {} passes", report.model, found.passes)],
        columns: 1,
        panels: vec![Panel {
            title: String::new(),
            x: Axis::log("tokens before", 1.0, found.settings.positions as f64, Numerals::Counts),
            y,
            marks: vec![
                Mark::Place { x: context, label: "context".into(), color: COLORS[5].into() },
                Mark::dashed(fresh.clone(), COLORS[5]),
                Mark::dots(fresh, COLORS[5]),
                Mark::line(long.clone(), COLORS[0]),
                Mark::dots(long, COLORS[0]),
            ],
        }],
        keys: vec![
            Key::line("all text before", COLORS[0], Style::Solid),
            Key::line("half to all of the context before", COLORS[5], Style::Dashed),
        ],
    }
}
