//! Where the ink goes: layout of a figure, as primitives that the SVG and PNG writers take.

use kuva::render::render::{PathData, Primitive, Scene, TextAnchor};

use super::axis::Axis;
use super::figure::{Figure, Key, Mark, Panel, Style};

const FONT: &str = "DejaVu Sans, Verdana, Arial, sans-serif";
const INK: &str = "#222222";
const FAINT: &str = "#e2e2e2";
const FAINTER: &str = "#f1f1f1";

/// Width of a panel's axes.
const WIDTH: f64 = 330.0;
/// Height of a panel's axes.
const HEIGHT: f64 = 230.0;
/// Room left of the axes, for numbers and the label.
const LEFT: f64 = 78.0;
/// Room right of the axes.
const RIGHT: f64 = 22.0;
/// Room above the axes, for the panel's title.
const ABOVE: f64 = 34.0;
/// Room below the axes, for numbers and the label.
const BELOW: f64 = 52.0;
/// Around everything.
const MARGIN: f64 = 14.0;
/// Height of a line of the legend.
const KEY_LINE: f64 = 20.0;
/// Average advance of a character, in sizes of the font.
const ADVANCE: f64 = 0.6;

/// The axes of one panel on the page.
struct Frame {
    left: f64,
    top: f64,
}

impl Frame {
    fn x(&self, axis: &Axis, value: f64) -> f64 {
        self.left + WIDTH * axis.place(value)
    }

    fn y(&self, axis: &Axis, value: f64) -> f64 {
        self.top + HEIGHT * (1.0 - axis.place(value))
    }

    fn right(&self) -> f64 {
        self.left + WIDTH
    }

    fn bottom(&self) -> f64 {
        self.top + HEIGHT
    }
}

/// Lays a figure out.
pub fn scene(figure: &Figure) -> Scene {
    let columns = figure.columns.clamp(1, figure.panels.len().max(1));
    let rows = figure.panels.len().div_ceil(columns);
    let width = 2.0 * MARGIN + columns as f64 * (LEFT + WIDTH + RIGHT);
    let head = MARGIN + 26.0 + 17.0 * figure.subtitle.len() as f64;
    let legend = legend_lines(&figure.keys, width - 2.0 * MARGIN);
    let body = rows as f64 * (ABOVE + HEIGHT + BELOW);
    let height = head + body + KEY_LINE * legend.len() as f64 + MARGIN;

    let mut scene = Scene::new(width, height);
    scene.font_family = Some(FONT.into());
    scene.text_color = Some(INK.into());
    text(&mut scene, (width / 2.0, MARGIN + 14.0), &figure.title, 17, TextAnchor::Middle, INK);
    for (i, line) in figure.subtitle.iter().enumerate() {
        let y = MARGIN + 34.0 + 17.0 * i as f64;
        text(&mut scene, (width / 2.0, y), line, 12, TextAnchor::Middle, "#555555");
    }
    for (i, panel) in figure.panels.iter().enumerate() {
        let (row, column) = ((i / columns) as f64, (i % columns) as f64);
        let frame = Frame {
            left: MARGIN + LEFT + column * (LEFT + WIDTH + RIGHT),
            top: head + ABOVE + row * (ABOVE + HEIGHT + BELOW),
        };
        draw_panel(&mut scene, panel, &frame, format!("{}-{i}", figure.id));
    }
    for (i, line) in legend.iter().enumerate() {
        let column = widest(&figure.keys);
        let left = (width - column * legend[0].len() as f64) / 2.0;
        let y = head + body + KEY_LINE * (i as f64 + 0.5);
        draw_keys(&mut scene, line, column, (left, y));
    }
    scene
}

fn draw_panel(scene: &mut Scene, panel: &Panel, frame: &Frame, id: String) {
    draw_grid(scene, panel, frame);
    // The PNG writer takes the rectangle from the mark, the SVG writer from this definition.
    scene.defs.push(format!(
        "<clipPath id=\"{id}\"><rect x=\"{}\" y=\"{}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         /></clipPath>",
        frame.left, frame.top
    ));
    scene.elements.push(Primitive::ClipStart {
        x: frame.left,
        y: frame.top,
        width: WIDTH,
        height: HEIGHT,
        id,
    });
    for mark in &panel.marks {
        draw_mark(scene, panel, frame, mark);
    }
    scene.elements.push(Primitive::ClipEnd);
    for mark in &panel.marks {
        draw_dots(scene, panel, frame, mark);
    }
    for (from, to) in [
        ((frame.left, frame.top), (frame.left, frame.bottom())),
        ((frame.left, frame.bottom()), (frame.right(), frame.bottom())),
    ] {
        line(scene, from, to, INK, 1.0);
    }
    let middle = frame.left + WIDTH / 2.0;
    text(scene, (middle, frame.top - 12.0), &panel.title, 14, TextAnchor::Middle, INK);
    let below = frame.bottom() + 38.0;
    text(scene, (middle, below), &panel.x.label, 12, TextAnchor::Middle, INK);
    scene.elements.push(Primitive::Text {
        x: frame.left - 60.0,
        y: frame.top + HEIGHT / 2.0,
        content: panel.y.label.clone(),
        size: 12,
        anchor: TextAnchor::Middle,
        rotate: Some(-90.0),
        bold: false,
        color: Some(INK.into()),
    });
}

fn draw_grid(scene: &mut Scene, panel: &Panel, frame: &Frame) {
    // Faint lines first, so that the stronger ones lie over them.
    for labelled in [false, true] {
        let shade = if labelled { FAINT } else { FAINTER };
        for tick in panel.x.ticks().iter().filter(|tick| tick.label.is_some() == labelled) {
            let x = frame.x(&panel.x, tick.at);
            line(scene, (x, frame.top), (x, frame.bottom()), shade, 1.0);
            if let Some(label) = &tick.label {
                line(scene, (x, frame.bottom()), (x, frame.bottom() + 4.0), INK, 1.0);
                text(scene, (x, frame.bottom() + 17.0), label, 11, TextAnchor::Middle, INK);
            }
        }
        for tick in panel.y.ticks().iter().filter(|tick| tick.label.is_some() == labelled) {
            let y = frame.y(&panel.y, tick.at);
            line(scene, (frame.left, y), (frame.right(), y), shade, 1.0);
            if let Some(label) = &tick.label {
                line(scene, (frame.left - 4.0, y), (frame.left, y), INK, 1.0);
                text(scene, (frame.left - 7.0, y + 4.0), label, 11, TextAnchor::End, INK);
            }
        }
    }
}

fn draw_dots(scene: &mut Scene, panel: &Panel, frame: &Frame, mark: &Mark) {
    let Mark::Dots { points, color } = mark else { return };
    let inside = |axis: &Axis, value: f64| (-1e-6..=1.0 + 1e-6).contains(&axis.place(value));
    for &(x, y) in points.iter().filter(|p| inside(&panel.x, p.0) && inside(&panel.y, p.1)) {
        scene.elements.push(Primitive::Circle {
            cx: frame.x(&panel.x, x),
            cy: frame.y(&panel.y, y),
            r: 2.6,
            fill: color.as_str().into(),
            fill_opacity: None,
            stroke: None,
            stroke_width: None,
        });
    }
}

fn draw_mark(scene: &mut Scene, panel: &Panel, frame: &Frame, mark: &Mark) {
    let at = |(x, y): (f64, f64)| (frame.x(&panel.x, x), frame.y(&panel.y, y));
    match mark {
        Mark::Line { points, color, style } => {
            let points: Vec<_> =
                points.iter().filter(|p| p.1.is_finite()).map(|&p| at(p)).collect();
            curve(scene, &points, color, *style);
        }
        // Drawn later, so that the frame does not cut them.
        Mark::Dots { .. } => {}
        Mark::Band { points, color, opacity } => {
            let upper = points.iter().map(|&(x, _, high)| at((x, high)));
            let lower = points.iter().rev().map(|&(x, low, _)| at((x, low)));
            let outline: Vec<_> = upper.chain(lower).collect();
            area(scene, &outline, color, *opacity);
        }
        Mark::Level { y, below, label, color } => {
            let y = frame.y(&panel.y, *y);
            let words = if *below { y + 12.0 } else { y - 4.0 };
            curve(scene, &[(frame.left, y), (frame.right(), y)], color, Style::Dotted);
            text(scene, (frame.right() - 4.0, words), label, 10, TextAnchor::End, color);
        }
        Mark::Place { x, label, color } => {
            let x = frame.x(&panel.x, *x);
            curve(scene, &[(x, frame.top), (x, frame.bottom())], color, Style::Dotted);
            text(scene, (x + 4.0, frame.top + 11.0), label, 10, TextAnchor::Start, color);
        }
    }
}

/// Entries of the legend in lines that fit, as columns of equal width.
fn legend_lines(keys: &[Key], width: f64) -> Vec<Vec<Key>> {
    let fit = (width / widest(keys)).floor().max(1.0) as usize;
    // As many lines as needed, and then no more columns than fill them.
    let lines = keys.len().div_ceil(fit).max(1);
    let columns = keys.len().div_ceil(lines).max(1);
    keys.chunks(columns).map(<[Key]>::to_vec).collect()
}

fn widest(keys: &[Key]) -> f64 {
    keys.iter().map(key_width).fold(1.0, f64::max)
}

/// Swatch, label and the gap after it.
fn key_width(key: &Key) -> f64 {
    34.0 + key.label.chars().count() as f64 * 12.0 * ADVANCE + 14.0
}

fn draw_keys(scene: &mut Scene, keys: &[Key], column: f64, (left, y): (f64, f64)) {
    for (i, key) in keys.iter().enumerate() {
        let x = left + i as f64 * column;
        match key.style {
            Some(style) => curve(scene, &[(x, y), (x + 26.0, y)], &key.color, style),
            None => {
                let outline =
                    [(x, y - 5.0), (x + 26.0, y - 5.0), (x + 26.0, y + 5.0), (x, y + 5.0)];
                area(scene, &outline, &key.color, 0.6);
            }
        }
        text(scene, (x + 32.0, y + 4.0), &key.label, 12, TextAnchor::Start, INK);
    }
}

fn text(
    scene: &mut Scene,
    (x, y): (f64, f64),
    content: &str,
    size: u32,
    anchor: TextAnchor,
    color: &str,
) {
    scene.elements.push(Primitive::Text {
        x,
        y,
        content: content.into(),
        size,
        anchor,
        rotate: None,
        bold: false,
        color: Some(color.into()),
    });
}

fn line(scene: &mut Scene, from: (f64, f64), to: (f64, f64), color: &str, width: f64) {
    scene.elements.push(Primitive::Line {
        x1: from.0,
        y1: from.1,
        x2: to.0,
        y2: to.1,
        stroke: color.into(),
        stroke_width: width,
        stroke_dasharray: None,
    });
}

fn curve(scene: &mut Scene, points: &[(f64, f64)], color: &str, style: Style) {
    let pieces = match style {
        Style::Solid => vec![points.to_vec()],
        Style::Dashed => dashes(points, 7.0, 4.0),
        Style::Dotted => dashes(points, 2.0, 3.0),
    };
    for points in pieces {
        scene.elements.push(Primitive::PolyLine {
            points,
            stroke: color.into(),
            stroke_width: if style == Style::Dotted { 1.2 } else { 2.0 },
            stroke_dasharray: None,
        });
    }
}

fn area(scene: &mut Scene, outline: &[(f64, f64)], color: &str, opacity: f64) {
    let mut d = String::new();
    for (i, (x, y)) in outline.iter().enumerate() {
        d += &format!("{}{x:.2} {y:.2} ", if i == 0 { 'M' } else { 'L' });
    }
    d += "Z";
    scene.elements.push(Primitive::Path(Box::new(PathData {
        d,
        fill: Some(color.into()),
        stroke: "none".into(),
        stroke_width: 0.0,
        opacity: Some(opacity),
        stroke_dasharray: None,
    })));
}

/// Cuts a line into dashes that keep their rhythm around its corners (writers of PNG restart
/// theirs at each).
fn dashes(points: &[(f64, f64)], on: f64, off: f64) -> Vec<Vec<(f64, f64)>> {
    let mut pieces = vec![];
    let mut piece: Vec<(f64, f64)> = points.first().copied().into_iter().collect();
    let (mut drawing, mut left) = (true, on);
    for pair in points.windows(2) {
        let (mut from, to) = (pair[0], pair[1]);
        loop {
            let rest = (to.0 - from.0).hypot(to.1 - from.1);
            if rest <= left {
                left -= rest;
                if drawing {
                    piece.push(to);
                }
                break;
            }
            let part = left / rest;
            from = (from.0 + part * (to.0 - from.0), from.1 + part * (to.1 - from.1));
            if drawing {
                piece.push(from);
                pieces.push(std::mem::take(&mut piece));
                left = off;
            } else {
                piece = vec![from];
                left = on;
            }
            drawing = !drawing;
        }
    }
    if piece.len() > 1 {
        pieces.push(piece);
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dashes_cover_their_share_of_the_line() {
        let points: Vec<(f64, f64)> = (0..100).map(|i| (f64::from(i), 0.0)).collect();
        let length: f64 =
            dashes(&points, 7.0, 4.0).iter().map(|dash| dash[dash.len() - 1].0 - dash[0].0).sum();
        assert!((length - 99.0 * 7.0 / 11.0).abs() < 7.0, "{length}");
    }

    #[test]
    fn legend_breaks_before_it_overflows() {
        let keys = vec![Key::area("eleven char", "#000000"); 10];
        let lines = legend_lines(&keys, 400.0);
        assert!(lines.len() > 1);
        for line in &lines {
            assert!(widest(&keys) * line.len() as f64 <= 400.0);
        }
        assert_eq!(lines.iter().map(Vec::len).sum::<usize>(), 10);
    }
}
