//! The page: heat maps over layers and heads, and the tables.

use super::candidates::Candidate;
use super::heat::{Cell, Row, Scale, Value, map, numbers};
use super::measure::Figures;
use super::report::{HeadCandidate, HeadReport, LayerReport, Report};
use super::text::{CANDIDATES, HEADS};
use super::verdict::Verdict;
use crate::html::{CLOSE, escape, open, table};
use crate::table::{bytes, three};

/// Errors are drawn from here, which is good, to an output that is all error.
const ERRORS: Scale = Scale::Log(0.01, 1.0);

/// The whole page; it needs no other file.
pub fn page(report: &Report) -> String {
    let mut html = open("Would a series do instead of softmax?");
    html += &format!(
        "<p class=\"note\">sata {}. {}</p>\n<ul>",
        report.version,
        escape(&report.about())
    );
    for finding in report.findings() {
        html += &format!("<li>{}</li>\n", escape(&finding));
    }
    for note in report.notes() {
        html += &format!("<li class=\"note\">{}</li>\n", escape(&note));
    }
    html += "</ul>\n<p class=\"note\">Rows are layers, columns query heads. Errors are those of a \
             query's output against softmax in f64, |ŷ−y|/|y|; point at a cell for its \
             figures.</p>\n";
    html += &section("Verdicts and recommended settings", &verdicts(report));
    html += "<p class=\"note\">works: the median query is within the error asked for, and 99 of 100 \
             are off by less than their output. mostly: the first only. near: the window alone is \
             within it, and nothing cheaper is. fails: nothing that was tried is within the \
             budgets.</p>\n";
    let best = |head: &HeadReport| match head.best() {
        Some(best) => of_candidate(best),
        None => Value { number: None, tip: head.reason.clone() },
    };
    html += &section("Median error of the recommended setting", &of(report, ERRORS, best));
    let logits = |head: &HeadReport, number| {
        let logits = &head.logits;
        let tip = format!(
            "logits: mean {}, deviation {}, of one query {}, largest {}",
            three(logits.mean),
            three(logits.deviation),
            three(logits.query_deviation),
            three(logits.largest)
        );
        Value { number: Some(number), tip }
    };
    html += &section(
        "Deviation of the logits",
        &of(report, Scale::Linear, |head| logits(head, head.logits.deviation)),
    );
    html += &section(
        "Largest logit",
        &of(report, Scale::Linear, |head| logits(head, head.logits.largest)),
    );
    html += "<h2>Median error of each candidate</h2>\n";
    for one in &report.candidates {
        html += &format!(
            "<details><summary>{}: {} over all queries</summary>\n{}</details>\n",
            escape(&one.candidate.name()),
            three(one.figures.relative.median),
            of(report, ERRORS, |head| in_head(head, &one.candidate)),
        );
    }
    html += &section("Candidates over all heads", &table(&CANDIDATES, report.candidate_rows()));
    html += "<p class=\"note\">Median and 99 % of queries: |ŷ−y|/|y|, then |ŷ−y|/√d_value \
             (absolute). Not positive: share of denominators that are not positive and finite. \
             State: bytes of one key/value head, far sums with their compensation and the raw \
             tokens of blocks and sinks. Break-even: tokens of a KV cache as large.</p>\n";
    html += &section("Heads", &table(&HEADS, report.head_rows()));
    html + CLOSE
}

fn section(title: &str, body: &str) -> String {
    format!("<h2>{}</h2>\n{body}", escape(title))
}

/// A heat map of one number a head.
fn of(report: &Report, scale: Scale, value: impl Fn(&HeadReport) -> Value) -> String {
    let row = |layer: &LayerReport| {
        let cell = |head| {
            let Value { number, tip } = value(head);
            Value { number, tip: format!("{}, head {}\n{tip}", layer.name(), head.head) }
        };
        Row { name: layer.name().into(), cells: layer.heads.iter().map(cell).collect() }
    };
    let rows: Vec<Row<Value>> = report.layers.iter().map(row).collect();
    numbers(&rows, scale)
}

fn in_head(head: &HeadReport, candidate: &Candidate) -> Value {
    let found = head.candidates.iter().find(|one| one.candidate == *candidate);
    found.map_or_else(
        || Value { number: None, tip: format!("{}: skipped", candidate.name()) },
        of_candidate,
    )
}

fn of_candidate(one: &HeadCandidate) -> Value {
    let Figures { relative, .. } = one.figures;
    let tip = format!(
        "{}: error {}, 99 % {}; {} of state",
        one.candidate.name(),
        three(relative.median),
        three(relative.p99),
        bytes(one.state_bytes)
    );
    Value { number: Some(relative.median), tip }
}

fn verdicts(report: &Report) -> String {
    let color = |verdict| match verdict {
        Verdict::Works => ("#117733".to_string(), true),
        Verdict::Mostly => ("#aadd99".to_string(), false),
        Verdict::Near => ("#88ccee".to_string(), false),
        Verdict::Fails => ("#cc6677".to_string(), true),
    };
    let rows: Vec<Row<Cell>> = report
        .layers
        .iter()
        .map(|layer| {
            let cell = |head: &HeadReport| {
                let setting = head.recommended.as_ref().map_or("nothing".into(), |one| one.name());
                let (name, number) = (layer.name(), head.head);
                let tip = format!("{name}, head {number}\n{setting}: {}", head.reason);
                Cell { text: head.verdict.word().into(), color: color(head.verdict), tip }
            };
            Row { name: layer.name().into(), cells: layer.heads.iter().map(cell).collect() }
        })
        .collect();
    map(&rows)
}
