//! Figures A3 and A4, absolute above and relative below.

use super::recovery::{BAR, HISTOGRAM, Recovery, Stretch};
use super::scope::{HEADS, Scope, TERMS, TOKENS};
use crate::plot::{Axis, COLORS, Figure, Key, Mark, Numerals, Panel, Style};

fn color(terms: usize) -> &'static str {
    TERMS.iter().position(|&t| t == terms).map_or(COLORS[5], |i| COLORS[i])
}

fn keys(areas: bool) -> Vec<Key> {
    TERMS
        .iter()
        .map(|&terms| {
            let label = format!("P = {terms}");
            if areas {
                Key::area(label, color(terms))
            } else {
                Key::line(label, color(terms), Style::Solid)
            }
        })
        .collect()
}

fn subtitle(scope: &Scope) -> Vec<String> {
    vec![format!(
        "causal, 102,400 tokens from N(0, 1) rounded to f16, f32 arithmetic, against f64 softmax; \
         seed {}, {}",
        scope.seed,
        if scope.elements.is_none() { "all queries" } else { "queries sampled over all positions" }
    )]
}

/// Panels of a row above and a row below, one for each head size that was run.
fn rows(
    all: &[Recovery],
    panel: impl Fn(usize, bool, Vec<&Recovery>) -> Panel,
) -> (usize, Vec<Panel>) {
    let heads: Vec<usize> =
        HEADS.into_iter().filter(|&d| all.iter().any(|one| one.d == d)).collect();
    let mut panels = vec![];
    for relative in [false, true] {
        for &d in &heads {
            let of_head = all.iter().filter(|one| one.d == d).collect();
            panels.push(panel(d, relative, of_head));
        }
    }
    (heads.len(), panels)
}

/// Figure A3: histograms of errors.
pub fn figure_a3(all: &[Recovery], scope: &Scope) -> Figure {
    let shares = |one: &Recovery, relative: bool| {
        if relative { one.histogram_relative.clone() } else { one.histogram.clone() }
    };
    let top = |relative: bool| {
        let all = all.iter().flat_map(|one| shares(one, relative));
        1.1 * all.fold(0.0, f64::max)
    };
    let (columns, panels) = rows(all, |d, relative, of_head| {
        let mut marks = vec![];
        for one in of_head {
            let mut bars = vec![];
            let mut outline = vec![];
            for (i, share) in shares(one, relative).into_iter().enumerate() {
                let left = HISTOGRAM[0] + BAR * i as f64;
                bars.extend([(left, 0.0, share), (left + BAR, 0.0, share)]);
                outline.extend([(left, share), (left + BAR, share)]);
            }
            marks.push(Mark::Band { points: bars, color: color(one.terms).into(), opacity: 0.22 });
            marks.push(Mark::line(outline, color(one.terms)));
        }
        if !relative {
            let (x, label) = (2f64.powi(-10).log10(), "float16 2⁻¹⁰".into());
            marks.push(Mark::Place { x, label, color: "#777777".into() });
        }
        let low = if relative { -4.0 } else { -7.0 };
        Panel {
            title: format!("d = {d}"),
            x: Axis::linear(
                if relative {
                    "log10 ‖Y−Ŷ‖/‖Y‖ of a query"
                } else {
                    "log10 |Y−Ŷ| of an element"
                },
                low,
                1.0,
            ),
            y: Axis::linear(
                if relative { "share of queries" } else { "share of elements" },
                0.0,
                top(relative),
            ),
            marks,
        }
    });
    Figure {
        id: "figureA3".into(),
        title: "Figure A3 · Errors in recovering conventional attention: absolute above, relative \
                below"
            .into(),
        subtitle: subtitle(scope),
        columns,
        panels,
        keys: keys(true),
    }
}

/// Figure A4: errors by context length.
pub fn figure_a4(all: &[Recovery], scope: &Scope) -> Figure {
    let levels = |stretch: &Stretch, relative: bool| {
        if relative { stretch.log10_relative } else { stretch.log10_absolute }
    };
    let (columns, panels) = rows(all, |d, relative, of_head| {
        let mut marks = vec![];
        for one in &of_head {
            let middle = |stretch: &Stretch| ((stretch.from * stretch.to) as f64).sqrt();
            let band = one.positions.iter().map(|stretch| {
                let [low, _, high] = levels(stretch, relative);
                (middle(stretch), low, high)
            });
            let (points, color) = (band.collect(), color(one.terms).into());
            marks.push(Mark::Band { points, color, opacity: 0.12 });
        }
        for one in &of_head {
            let middle = |stretch: &Stretch| ((stretch.from * stretch.to) as f64).sqrt();
            let line =
                one.positions.iter().map(|stretch| (middle(stretch), levels(stretch, relative)[1]));
            marks.push(Mark::line(line.collect(), color(one.terms)));
        }
        Panel {
            title: format!("d = {d}"),
            x: Axis::log("tokens in context", 16.0, TOKENS as f64, Numerals::Counts),
            y: if relative {
                Axis::linear("log10 ‖Y−Ŷ‖/‖Y‖ of a query", -3.5, 1.0)
            } else {
                Axis::linear("log10 |Y−Ŷ| of an element", -6.0, 0.5)
            },
            marks,
        }
    });
    let mut subtitle = subtitle(scope);
    subtitle.push("lines: medians; bands: 5 to 95 %".into());
    Figure {
        id: "figureA4".into(),
        title: "Figure A4 · Errors by context length: absolute above, relative below".into(),
        subtitle,
        columns,
        panels,
        keys: keys(false),
    }
}
