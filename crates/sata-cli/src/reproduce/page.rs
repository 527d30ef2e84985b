//! The page that holds figures and tables.

use super::activations::PAPER_TERMS;
use super::coefficients::{table_normal, table_trained};
use super::reference;
use super::results::Results;
use crate::cost::Cost;
use crate::errors::QUANTILES;
use crate::html::{CLOSE, escape, open, table};
use crate::plot::{Figure, counts, svg};
use crate::table::{bytes, grouped, seconds, three};

/// The whole page; it needs no other file.
pub fn page(results: &Results, figures: &[Figure]) -> String {
    let mut html = open("Self-attention at constant cost per token, reproduced");
    let machine = &results.machine;
    let about = format!(
        "sata {}, {} run, seed {}; {} threads of {} ({}), {} of memory; {} altogether.",
        results.version,
        results.scope.mode,
        results.scope.seed,
        machine.threads,
        machine.processor.as_deref().unwrap_or("an unnamed processor"),
        machine.level,
        machine.memory.map_or("an unknown amount".into(), bytes),
        seconds(results.seconds),
    );
    html += &format!("<p class=\"note\">{}</p>\n<h2>What it comes to</h2>\n<ul>", escape(&about));
    for finding in &results.findings {
        html += &format!("<li>{}</li>\n", escape(finding));
    }
    html += "</ul>\n";
    for figure in figures {
        html += &format!("<h2>{}</h2>\n{}\n", escape(&figure.title), svg(figure));
        html += &match figure.id.as_str() {
            "figure1" => costs(),
            "figure6" => decode(results),
            "figureA3" => recovery(results),
            "figureA4" => by_length(results),
            "floor" => floor(results),
            "activations" => activations(results),
            "coefficients" => table_normal(&results.coefficients),
            "coefficients-trained" => table_trained(&results.coefficients),
            _ => String::new(),
        };
    }
    html + CLOSE
}

fn costs() -> String {
    let sizes = super::scope::HEADS.map(|d| (d, d));
    let cost = Cost::new(&sizes, &super::scope::TERMS, &[]);
    let rows = cost.heads.iter().map(|head| {
        vec![
            head.d_key.to_string(),
            head.terms.to_string(),
            grouped(head.features),
            grouped(head.state_elements),
            bytes(head.state_bytes_f32),
            grouped(head.flops_paper),
            grouped(head.flops_corrected),
            grouped(head.break_even_tokens_memory),
            grouped(head.break_even_tokens_flops),
        ]
    });
    let headings = [
        "d",
        "P",
        "D",
        "state, elements",
        "f32",
        "FLOPs, paper's (15)",
        "FLOPs, counted again",
        "tokens to break even, memory",
        "tokens to break even, FLOPs",
    ];
    table(&headings, rows)
}

fn recovery(results: &Results) -> String {
    let mut headings: Vec<String> = ["d", "P", "queries", "form", "time"].map(String::from).into();
    headings.extend(QUANTILES.map(|q| format!("{} %", (1000.0 * q).round() / 10.0)));
    headings.extend(
        [
            "max",
            "last 1K",
            "reference median",
            "difference",
            "ref. last 1K",
            "relative, median",
            "95 %",
            "relative RMS",
            "not positive",
        ]
        .map(String::from),
    );
    let rows = results.recovery.iter().map(|one| {
        let mut row = vec![
            one.d.to_string(),
            one.terms.to_string(),
            grouped(one.queries as u128),
            format!("{:?}", one.form).to_lowercase(),
            seconds(one.seconds),
        ];
        row.extend(one.errors.log10_absolute.map(|x| format!("{x:.2}")));
        let or_dash = |x: Option<f64>| x.map_or("–".into(), |x| format!("{x:.2}"));
        row.extend([
            format!("{:.2}", one.errors.log10_largest),
            format!("{:.2}", one.log10_median_last),
            or_dash(one.reference),
            one.reference
                .map_or("–".into(), |x| format!("{:+.3}", one.errors.log10_median() - x)),
            or_dash(one.reference_last),
            format!("{} %", three(100.0 * one.query_relative[2])),
            format!("{} %", three(100.0 * one.query_relative[4])),
            three(one.errors.relative_rms),
            one.diagnostics.non_positive.to_string(),
        ]);
        row
    });
    let headings: Vec<&str> = headings.iter().map(String::as_str).collect();
    format!(
        "<p>log10|Y−Ŷ| of elements at six quantiles, its maximum, and its median over the last 1,024 \
         tokens. Reference: {}. Relative: ‖Y−Ŷ‖/‖Y‖ of single queries. Not positive: denominators \
         over all {} tokens; their outputs stay as computed.</p>\n{}",
        reference::SOURCE,
        grouped(super::scope::TOKENS as u128),
        table(&headings, rows)
    )
}

fn by_length(results: &Results) -> String {
    let wanted = [256, 1024, 4096, 16_384, 65_536];
    let mut headings = vec!["d".to_string(), "P".to_string()];
    headings.extend(wanted.map(|n| format!("{} tokens", counts(f64::from(n)))));
    let rows = results.recovery.iter().map(|one| {
        let mut row = vec![one.d.to_string(), one.terms.to_string()];
        row.extend(wanted.map(|n| {
            let stretch = one.positions.iter().find(|stretch| stretch.from == n as usize);
            stretch.map_or("–".into(), |stretch| {
                let relative = 100.0 * 10f64.powf(stretch.log10_relative[1]);
                format!("{:.2} · {} %", stretch.log10_absolute[1], three(relative))
            })
        }));
        row
    });
    let headings: Vec<&str> = headings.iter().map(String::as_str).collect();
    format!(
        "<p>Median log10|Y−Ŷ| and median relative error in the half octave that begins at so many \
         tokens: the absolute error falls with the outputs themselves, the relative one does \
         not.</p>\n{}",
        table(&headings, rows)
    )
}

fn decode(results: &Results) -> String {
    let rows = results.decode.iter().map(|point| {
        vec![
            point.d.to_string(),
            counts(point.tokens as f64),
            bytes(point.cache_bytes),
            bytes(point.state_bytes),
            seconds(point.cache_seconds),
            seconds(point.state_seconds),
            three(point.cache_seconds / point.state_seconds),
        ]
    });
    let headings =
        ["d", "tokens", "KV cache", "state", "time, KV cache", "time, constant cost", "ratio"];
    format!(
        "<p>Both sides measured at every length; where a KV cache would not fit in the memory set \
         aside for it, the curve ends. Contexts beyond 1,024 tokens repeat those (timings do not \
         depend on values); the state of a long one is merged from states of shorter ones, which \
         gives the same sums. A state's bytes include its compensation and its open block.</p>\n{}",
        table(&headings, rows)
    )
}

fn floor(results: &Results) -> String {
    let rows = results.floor.iter().map(|floor| {
        vec![
            floor.terms.to_string(),
            counts(floor.tokens as f64),
            floor.dtype.to_string(),
            three(floor.arithmetic),
            three(floor.with_rounded_inputs),
            three(floor.truncation),
        ]
    });
    let headings =
        ["P", "tokens", "type", "same inputs", "with inputs rounded", "truncation of the series"];
    format!(
        "<p>Relative RMS over {} queries of the second half of the context. f16 and bf16 hold \
         inputs and outputs; sums are f32.</p>\n{}",
        super::floor::QUERIES,
        table(&headings, rows)
    )
}

fn activations(results: &Results) -> String {
    let rows = results.activations.iter().map(|layer| {
        let paper = layer.at(PAPER_TERMS);
        vec![
            layer.name.to_string(),
            format!("{} × {} × {}", layer.heads, layer.tokens, layer.d),
            if layer.causal { "causal" } else { "full" }.into(),
            three(layer.logits_deviation),
            three(layer.logits_largest),
            three(paper.errors.relative_median),
            three(paper.errors.relative_rms),
            format!("{} %", three(100.0 * paper.non_positive)),
            layer.terms_needed.map_or("–".into(), |terms| terms.to_string()),
            layer.features_needed.map_or("–".into(), grouped),
            three(layer.engine_f64),
            three(layer.engine_f32),
        ]
    });
    let headings = [
        "layer",
        "heads × tokens × d",
        "",
        "deviation of logits",
        "largest |logit|",
        "P = 4: median error",
        "P = 4: relative RMS",
        "P = 4: not positive",
        "terms for 1 %",
        "D then",
        "engine f64 / oracle",
        "engine f32 / oracle",
    ];
    format!(
        "<p>Relative errors against f64 softmax: median |Y−Ŷ| over median |Y|, and RMS. The last \
         two columns hold the engine to the oracle of the same operation (RMS in f64, medians in \
         f32), so that what is off is the series and not the arithmetic.</p>\n{}",
        table(&headings, rows)
    )
}
