//! Tables of both parts, for the page.

use super::figures::window;
use super::normal::{DEVIATIONS, Normal, TERMS};
use super::{Coefficients, Series, pairs};
use crate::html::table;
use crate::inspect::measure::Figures;
use crate::reproduce::reference;
use crate::table::{bytes, grouped, three};

impl Coefficients {
    /// Random inputs at a deviation of the logits, with a series of so many terms.
    pub(super) fn at(&self, deviation: f64, series: Series, terms: usize) -> Option<&Normal> {
        let wanted = (deviation, series, terms);
        self.normal.iter().find(|one| (one.deviation, one.series, one.terms) == wanted)
    }
}

/// Errors by series and number of terms, and what the engine expected.
pub fn table_normal(all: &Coefficients) -> String {
    let mut headings: Vec<String> = ["series", "P", "D"].map(String::from).into();
    headings.extend(DEVIATIONS.map(|s| format!("s = {s}")));
    let rows = pairs(&TERMS).map(|(series, terms)| {
        let of = |of: &dyn Fn(&Normal) -> String| {
            DEVIATIONS.map(|s| all.at(s, series, terms).map_or("–".into(), of))
        };
        let features = all.at(DEVIATIONS[0], series, terms).map(|one| one.features);
        let mut row = vec![
            series.name().to_string(),
            terms.to_string(),
            features.map_or("–".into(), grouped),
        ];
        row.extend(of(&|one| {
            let error = three(one.errors.relative_median);
            match reference::prototype(series, terms, one.deviation) {
                Some(prototype) => format!("{error} ({prototype})"),
                None => error,
            }
        }));
        row
    });
    let headings: Vec<&str> = headings.iter().map(String::as_str).collect();
    let errors = table(&headings, rows);

    let mut headings = vec!["series".to_string(), "P".to_string()];
    for s in DEVIATIONS {
        headings.extend([format!("s = {s}: expected"), "RMS".into(), "median".into()]);
    }
    let rows = pairs(&TERMS).map(|(series, terms)| {
        let mut row = vec![series.name().to_string(), terms.to_string()];
        for s in DEVIATIONS {
            let Some(one) = all.at(s, series, terms) else { continue };
            row.push(one.estimate.map_or("–".into(), three));
            row.extend([three(one.by_query.rms), three(one.by_query.median)]);
        }
        row
    });
    let headings: Vec<&str> = headings.iter().map(String::as_str).collect();
    let non_positive = all.normal.iter().map(|one| one.non_positive).fold(0.0, f64::max);
    format!(
        "<p>Median |Y−Ŷ| over median |Y| of elements, {} queries, against f64 softmax; in brackets: \
         {}. All series read the same state of D features. Denominators that are not positive: at \
         most {} % of the queries of any row.</p>\n{errors}<p>What diagnosing a call expects, \
         √Pr[Poisson(σ²) ≥ P] of each query's logits from sums that the state holds anyway, beside \
         the relative errors |Ŷ−Y|/|Y| of queries that were measured. It is a root mean square over \
         queries, made for Hermite, and needs the orders 0, 1 and 2.</p>\n{}",
        all.normal.first().map_or(0, |one| one.queries),
        reference::PROTOTYPE,
        three(100.0 * non_positive),
        table(&headings, rows)
    )
}

/// Errors behind the near window.
pub fn table_trained(all: &Coefficients) -> String {
    let cells = |figures: &Figures| {
        [
            three(figures.relative.median),
            three(figures.relative.p99),
            format!("{} %", three(100.0 * figures.non_positive)),
        ]
    };
    let rows = all.trained.iter().flat_map(|layer| {
        let mut alone = vec![layer.name.to_string(), "window alone".into(), "–".into(), "–".into()];
        alone.push("–".into());
        alone.extend(cells(&layer.alone));
        let tails = layer.tails.iter().map(|tail| {
            let orders: Vec<usize> = (0..tail.terms).collect();
            let mut row = vec![
                layer.name.to_string(),
                format!("… and {}", tail.series.name()),
                tail.terms.to_string(),
                grouped(tail.features),
                bytes(sata::cost::state_bytes(layer.d, layer.d, &orders, 4, false)),
            ];
            row.extend(cells(&tail.errors));
            row
        });
        std::iter::once(alone).chain(tails).collect::<Vec<_>>()
    });
    let headings =
        ["layer", "far past", "P", "D", "f32 sums", "median error", "99 %", "not positive"];
    let note = window();
    format!(
        "<p>|ŷ−y|/|y| of a query's output against f64 softmax; {note}. The excerpt is short, and so \
         are the blocks: with the usual 64 tokens about half of what a query sees would be near. Six terms of d = 64 \
         are shown for what they do; nobody would keep such a state.</p>\n{}",
        table(&headings, rows)
    )
}
