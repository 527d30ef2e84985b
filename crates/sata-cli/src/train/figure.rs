//! The plot of the curve.

use sata_lm::train::{Objective, Trainer};

use crate::plot::{Axis, COLORS, Figure, Key, Mark, Panel, Style};

/// Points of the training curve, at most; each is a mean over steps.
const POINTS: usize = 200;

/// Loss of the training and held-out text, in bits per byte.
pub fn curve<M: Objective>(trainer: &Trainer<M>) -> Figure {
    let (points, corpus) = (trainer.curve(), trainer.corpus());
    let (train, held_out) = (corpus.train.bits_per_byte(), corpus.validation.bits_per_byte());
    let together = points.len().div_ceil(POINTS).max(1);
    let trained: Vec<(f64, f64)> = points
        .chunks(together)
        .map(|part| {
            let mean =
                |f: &dyn Fn(usize) -> f64| (0..part.len()).map(f).sum::<f64>() / part.len() as f64;
            (mean(&|i| part[i].step as f64), mean(&|i| part[i].loss * train))
        })
        .collect();
    let evaluated: Vec<(f64, f64)> = points
        .iter()
        .filter_map(|point| Some((point.step as f64, point.validation? * held_out)))
        .collect();
    let all = || trained.iter().chain(&evaluated).map(|point| point.1);
    let lowest = all().fold(f64::INFINITY, f64::min);
    let highest = all().fold(0.0, f64::max);
    // The first steps would leave little room for the others.
    let (low, high) = (0.95 * lowest, highest.min(3.0 * lowest).max(1.01 * lowest));
    let label = match together {
        1 => "text".into(),
        n => format!("text, means of {n} steps"),
    };
    Figure {
        id: "loss".into(),
        title: "Loss in training".into(),
        subtitle: vec![],
        columns: 1,
        panels: vec![Panel {
            title: String::new(),
            x: Axis::linear("step", 0.0, trainer.settings().steps as f64),
            y: Axis::linear("bits per byte", low, high),
            marks: vec![
                Mark::line(trained, COLORS[0]),
                Mark::line(evaluated.clone(), COLORS[2]),
                Mark::dots(evaluated, COLORS[2]),
            ],
        }],
        keys: vec![
            Key::line(label, COLORS[0], Style::Solid),
            Key::line("held-out text", COLORS[2], Style::Solid),
        ],
    }
}
