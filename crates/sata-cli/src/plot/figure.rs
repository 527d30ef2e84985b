//! What a figure shows.

use super::axis::Axis;

/// Panels in a grid, a title above and one legend below.
#[derive(Clone, Debug, Default)]
pub struct Figure {
    /// Its name in files and pages, which no other figure has.
    pub id: String,
    /// What it is, in one line.
    pub title: String,
    /// What else to know, one line each, under the title.
    pub subtitle: Vec<String>,
    /// Panels a row.
    pub columns: usize,
    /// The panels, row by row.
    pub panels: Vec<Panel>,
    /// The legend.
    pub keys: Vec<Key>,
}

/// One pair of axes.
#[derive(Clone, Debug)]
pub struct Panel {
    /// Above it.
    pub title: String,
    /// Across.
    pub x: Axis,
    /// Upwards.
    pub y: Axis,
    /// What is drawn, first to last.
    pub marks: Vec<Mark>,
}

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Unbroken.
    Solid,
    /// Dashes.
    Dashed,
    /// Short dashes.
    Dotted,
}

/// An entry of the legend.
#[derive(Clone, Debug)]
pub struct Key {
    /// What it stands for.
    pub label: String,
    /// Its colour.
    pub color: String,
    /// Its line, or a filled box.
    pub style: Option<Style>,
}

/// Something drawn in a panel, in the coordinates of its axes.
#[derive(Clone, Debug)]
pub enum Mark {
    /// A line through points.
    Line {
        /// Its points, left to right.
        points: Vec<(f64, f64)>,
        /// Its colour.
        color: String,
        /// Its look.
        style: Style,
    },
    /// A dot on each point.
    Dots {
        /// The points.
        points: Vec<(f64, f64)>,
        /// Their colour.
        color: String,
    },
    /// The area between two lines.
    Band {
        /// x, lower y, upper y.
        points: Vec<(f64, f64, f64)>,
        /// Its colour.
        color: String,
        /// From 0, not there, to 1, opaque.
        opacity: f64,
    },
    /// A level across the panel, with words at its right end.
    Level {
        /// Where.
        y: f64,
        /// Whether the words stand below it.
        below: bool,
        /// Words.
        label: String,
        /// Colour of line and words.
        color: String,
    },
    /// A place up the panel, with words beside its top.
    Place {
        /// Where.
        x: f64,
        /// Words.
        label: String,
        /// Colour of line and words.
        color: String,
    },
}

impl Key {
    /// An entry for a line.
    pub fn line(label: impl Into<String>, color: &str, style: Style) -> Self {
        Key { label: label.into(), color: color.into(), style: Some(style) }
    }

    /// An entry for bars or bands.
    pub fn area(label: impl Into<String>, color: &str) -> Self {
        Key { label: label.into(), color: color.into(), style: None }
    }
}

impl Mark {
    /// An unbroken line.
    pub fn line(points: Vec<(f64, f64)>, color: &str) -> Self {
        Mark::Line { points, color: color.into(), style: Style::Solid }
    }

    /// A dashed line.
    pub fn dashed(points: Vec<(f64, f64)>, color: &str) -> Self {
        Mark::Line { points, color: color.into(), style: Style::Dashed }
    }

    /// Dots.
    pub fn dots(points: Vec<(f64, f64)>, color: &str) -> Self {
        Mark::Dots { points, color: color.into() }
    }
}
