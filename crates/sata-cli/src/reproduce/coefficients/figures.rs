//! Figures of both parts.

use super::normal::{DEVIATIONS, HEAD, KEYS, Normal, TARGET, TARGET_TERMS, TERMS};
use super::trained::{self, Tail, Trained};
use super::{Coefficients, Series};
use crate::inspect::measure::Spread;
use crate::plot::{Axis, COLORS, Figure, Key, Mark, Numerals, Panel, Style};
use crate::table::grouped;

/// How a series is drawn.
fn style(series: Series) -> Style {
    match series {
        Series::Taylor => Style::Dashed,
        Series::Gauss => Style::Dotted,
        Series::Hermite => Style::Solid,
    }
}

/// The colour of a number of terms.
fn color(terms: usize) -> &'static str {
    COLORS[TERMS.iter().position(|&p| p == terms).unwrap_or(COLORS.len() - 1)]
}

/// Errors by deviation of the logits, a line for each series and number of terms, and beside them
/// what the engine expects.
pub fn figure_normal(all: &Coefficients) -> Figure {
    let curve = |series, terms, of: &dyn Fn(&Normal) -> Option<f64>| -> Vec<(f64, f64)> {
        let of_pair = all.normal.iter().filter(|one| (one.series, one.terms) == (series, terms));
        of_pair.filter_map(|one| Some((one.deviation, of(one)?))).collect()
    };
    let values = all.normal.iter().map(|one| one.errors.relative_median);
    let y = Axis::decades("median |Y−Ŷ| / median |Y|", values, Numerals::Powers);
    let x = || Axis::linear("deviation of the logits s", DEVIATIONS[0], DEVIATIONS[3]);
    let panel = |title: &str, wanted: &dyn Fn(usize) -> bool| {
        let mut marks = vec![];
        for terms in TERMS.into_iter().filter(|&terms| wanted(terms)) {
            for series in Series::ALL {
                let points = curve(series, terms, &|one| Some(one.errors.relative_median));
                let color = color(terms).to_string();
                marks.push(Mark::Line { points: points.clone(), color, style: style(series) });
                marks.push(Mark::dots(points, self::color(terms)));
            }
        }
        if wanted(TARGET_TERMS) {
            let label = format!("{TARGET}: target of Hermite, P = {TARGET_TERMS}, at s = 1");
            marks.push(Mark::Level { y: TARGET, below: true, label, color: "#777777".into() });
        }
        Panel { title: title.into(), x: x(), y: y.clone(), marks }
    };
    let mut estimates = vec![];
    let mut sizes = vec![];
    for terms in TERMS {
        let measured = curve(Series::Hermite, terms, &|one| Some(one.by_query.rms));
        let estimated = curve(Series::Hermite, terms, &|one| one.estimate);
        sizes.extend(measured.iter().chain(&estimated).map(|point| point.1));
        estimates.push(Mark::dots(measured, color(terms)));
        estimates.push(Mark::dashed(estimated, color(terms)));
    }
    let mut keys: Vec<Key> =
        TERMS.map(|terms| Key::area(format!("P = {terms}"), color(terms))).into();
    keys.extend(Series::ALL.map(|series| Key::line(series.name(), "#555555", style(series))));
    Figure {
        id: "coefficients".into(),
        title: "The same state, other coefficients · Errors by deviation of the logits".into(),
        subtitle: vec![format!(
            "N(0, 1) keys and values, d = {HEAD}, {} keys that every query reads; f64, so that \
             only the truncation of the series shows",
            grouped(KEYS as u128)
        )],
        columns: 3,
        panels: vec![
            panel("Even P", &|terms| terms.is_multiple_of(2)),
            panel("Odd P", &|terms| !terms.is_multiple_of(2)),
            Panel {
                title: "Hermite: measured (dots), estimated (dashed)".into(),
                x: x(),
                y: Axis::decades("|Ŷ−Y| / |Y| of queries, RMS", sizes, Numerals::Powers),
                marks: estimates,
            },
        ],
        keys,
    }
}

/// Errors behind a near window by number of terms, a panel for each layer.
pub fn figure_trained(all: &Coefficients) -> Figure {
    let grey = "#777777";
    let values = all.trained.iter().flat_map(|layer| {
        let tails = layer.tails.iter().map(|tail| tail.errors.relative);
        tails.chain([layer.alone.relative]).flat_map(|spread| [spread.median, spread.p99])
    });
    let y = Axis::decades("|ŷ−y| / |y| of a query", values, Numerals::Powers);
    let panel = |layer: &Trained| {
        let mut marks = vec![];
        for (middle, style, label) in [
            (true, Style::Solid, "window alone, median"),
            (false, Style::Dashed, "window alone, 99 %"),
        ] {
            let of = |spread: Spread| if middle { spread.median } else { spread.p99 };
            for (series, color) in Series::ALL.into_iter().zip(COLORS) {
                let point = |tail: &Tail| (tail.terms as f64, of(tail.errors.relative));
                let tails = layer.tails.iter().filter(|tail| tail.series == series);
                let points: Vec<_> = tails.map(point).collect();
                marks.push(Mark::Line { points: points.clone(), color: color.into(), style });
                marks.push(Mark::dots(points, color));
            }
            let (y, color) = (of(layer.alone.relative), grey.into());
            marks.push(Mark::Level { y, below: false, label: label.into(), color });
        }
        Panel {
            title: layer.name.into(),
            x: Axis::linear("terms P", 1.0, 7.0),
            y: y.clone(),
            marks,
        }
    };
    let mut keys: Vec<Key> = Series::ALL
        .into_iter()
        .zip(COLORS)
        .map(|(series, color)| Key::line(series.name(), color, Style::Solid))
        .collect();
    keys.push(Key::line("99 % of queries", "#555555", Style::Dashed));
    Figure {
        id: "coefficients-trained".into(),
        title: "The same state, other coefficients · Behind a near window, on a trained model"
            .into(),
        subtitle: vec![window()],
        columns: 2,
        panels: all.trained.iter().map(panel).collect(),
        keys,
    }
}

/// What is near, in words.
pub fn window() -> String {
    format!(
        "exact: a query's own block of {} tokens, {} before it and {} sinks; queries after a \
         quarter of the tokens",
        trained::WINDOW.block,
        match trained::NEAR {
            1 => "one".to_string(),
            n => n.to_string(),
        },
        trained::WINDOW.sinks
    )
}
