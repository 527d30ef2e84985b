//! The plot: curves of training, and bits per byte by position.

use super::record::Record;
use super::report::Report;
use crate::plot::{Axis, COLORS, Figure, Key, Mark, Numerals, Panel, Style};

const STYLES: [Style; 3] = [Style::Solid, Style::Dashed, Style::Dotted];

/// Both panels, a line for every model.
pub fn curves(report: &Report, records: &[Record]) -> Figure {
    let trained: Vec<Vec<(f64, f64)>> = records.iter().map(|r| r.held_out().collect()).collect();
    let read: Vec<Vec<(f64, f64)>> = report
        .rows
        .iter()
        .map(|row| {
            let at = |from: usize, to: usize| ((from as f64) * (to as f64)).sqrt();
            let buckets = &row.by_position.buckets;
            buckets.iter().map(|b| (at(b.from, b.to), b.bits_per_byte)).collect()
        })
        .collect();
    let steps = trained.iter().flatten().map(|p| p.0).fold(1.0, f64::max);
    let context = report.rows.first().map_or(1, |row| row.by_position.settings.context) as f64;
    let far = report.rows.iter().map(|row| row.by_position.settings.positions).max().unwrap_or(1);
    let place = Mark::Place { x: context, label: "training".into(), color: COLORS[5].into() };
    Figure {
        id: "compared".into(),
        title: "Models compared".into(),
        subtitle: vec![],
        columns: 2,
        panels: vec![
            Panel {
                title: "held-out text, in training".into(),
                x: Axis::linear("step", 0.0, steps),
                y: bits(&trained, 1.25),
                marks: marks(&trained),
            },
            Panel {
                title: "unseen text, by position".into(),
                x: Axis::log("tokens before", 1.0, far as f64, Numerals::Counts),
                y: bits(&read, 1.6),
                marks: marks(&read).into_iter().chain([place]).collect(),
            },
        ],
        keys: report
            .rows
            .iter()
            .enumerate()
            .map(|(i, row)| Key::line(&row.attention, color(i), style(i)))
            .collect(),
    }
}

fn color(i: usize) -> &'static str {
    COLORS[i % COLORS.len()]
}

fn style(i: usize) -> Style {
    STYLES[i / COLORS.len() % STYLES.len()]
}

fn marks(lines: &[Vec<(f64, f64)>]) -> Vec<Mark> {
    let line = |(i, points): (usize, &Vec<(f64, f64)>)| Mark::Line {
        points: points.clone(),
        color: color(i).into(),
        style: style(i),
    };
    lines.iter().enumerate().map(line).collect()
}

/// From below the lowest to `most` times it: what is far worse runs out of the picture.
fn bits(lines: &[Vec<(f64, f64)>], most: f64) -> Axis {
    let lowest = lines.iter().flatten().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let highest = lines.iter().flatten().map(|p| p.1).fold(0.0, f64::max);
    let lowest = if lowest.is_finite() { lowest } else { 1.0 };
    Axis::linear("bits per byte", 0.98 * lowest, highest.clamp(1.02 * lowest, most * lowest))
}
