//! Tables of what was measured, and all of them as one page.

use super::beside::{Crossing, common, crossing};
use super::{Report, prefill};
use crate::plot::counts;
use crate::table::{bytes, grouped, seconds, three};

use super::sheet::Sheet;

/// A verdict on a row with a target.
fn verdict(met: Option<bool>) -> String {
    match met {
        Some(true) => "met".into(),
        Some(false) => "**MISSED**".into(),
        None => String::new(),
    }
}

fn percent(x: f64) -> String {
    format!("{} %", three(100.0 * x))
}

fn heads(row: &prefill::Row) -> String {
    let few = if row.fewer_heads { " (fewer)" } else { "" };
    format!("{} × {}{few}", row.batch, row.heads)
}

fn calls(title: &str, rows: &[prefill::Row], both: bool) -> Sheet {
    let mut headings =
        vec!["attention", "d", "type", "tokens", "heads", "ns per token and head", "spread"];
    if !both {
        headings.push("useful TFLOP/s");
    }
    headings.extend(["at most", "aim", ""]);
    let mut sheet = Sheet::new(title, &headings);
    for row in rows {
        let mut cells = vec![
            row.what.clone(),
            row.attention.d.to_string(),
            row.dtype.into(),
            grouped(row.tokens as u128),
            heads(row),
            format!("**{}**", three(row.ns)),
            percent(row.timing.spread()),
        ];
        if !both {
            cells.push(row.useful_tflops.map_or(String::new(), three));
        }
        cells.push(row.target.map_or(String::new(), |target| three(target.at_most)));
        cells.push(row.target.and_then(|target| target.aim).map_or(String::new(), three));
        cells.push(verdict(row.met()));
        sheet.rows.push(cells);
    }
    let odd: Vec<String> = rows
        .iter()
        .filter(|row| row.non_positive + row.non_finite > 0)
        .map(|row| {
            let all = row.batch * row.heads * row.tokens;
            format!(
                "d={} {}: {} not positive, {} not finite of {}",
                row.attention.d,
                row.what,
                grouped(row.non_positive.into()),
                grouped(row.non_finite.into()),
                grouped(all as u128)
            )
        })
        .collect();
    if !odd.is_empty() {
        sheet = sheet.note(format!("Denominators: {}.", odd.join("; ")));
    }
    sheet
}

/// Long contexts, forward.
pub fn prefill(report: &Report) -> Vec<Sheet> {
    if report.prefill.is_empty() {
        return vec![];
    }
    vec![
        calls("Prefill, forward", &report.prefill, false)
            .note("Useful: 4·D·(d_V+1) FLOPs per token and head."),
    ]
}

/// Long contexts, forward and backward.
pub fn backward(report: &Report) -> Vec<Sheet> {
    if report.backward.is_empty() {
        return vec![];
    }
    vec![calls("Prefill, forward and backward together", &report.backward, true)]
}

/// Heads of decode.
pub fn decode(report: &Report) -> Vec<Sheet> {
    if report.decode.is_empty() && report.one.is_empty() {
        return vec![];
    }
    let mut many = Sheet::new(
        "Decode, one token of many heads",
        &[
            "attention",
            "d",
            "sums",
            "block",
            "heads",
            "ns per head",
            "GB/s",
            "of a copy",
            "with open tokens",
            "at least",
            "",
        ],
    )
    .note(format!(
        "Graphs of whole blocks of steps, folds included, on states of four times the L2 cache or \
         more. Bytes of a head and step: far sums, D·(d_V·w + 4) with w bytes a number, read once, \
         and written once a block (with compensation, what rounding takes is read and written then \
         as well); copy {} GB/s, read and written.",
        three(report.machine.copy_bytes_per_second / 1e9)
    ));
    for row in &report.decode {
        let compensated = if row.compensated { ", compensated" } else { "" };
        many.rows.push(vec![
            row.what.clone(),
            row.attention.d.to_string(),
            format!("{}{compensated}", row.sums),
            row.block.to_string(),
            grouped(row.heads as u128),
            format!("**{}**", three(row.ns)),
            three(row.bytes_per_second / 1e9),
            format!("**{}**", percent(row.share)),
            percent(row.share_with_open),
            row.target.map_or(String::new(), percent),
            verdict(row.target.map(|target| row.share >= target)),
        ]);
    }
    let mut one = Sheet::new(
        "Decode, one token of one head, replayed from a graph",
        &["d", "context", "µs", "alone, µs", "longest alone, µs", "state", "at most, µs", ""],
    )
    .note(
        "Replays that follow each other, the mean over a block of 64 with its fold; alone: one \
         replay from an idle stream, the median and the longest of 64.",
    );
    for row in &report.one {
        one.rows.push(vec![
            row.d.to_string(),
            grouped(row.tokens.into()),
            format!("**{}**", three(1e6 * row.replay.following.seconds)),
            three(1e6 * row.replay.alone.seconds),
            three(1e6 * row.replay.alone.most),
            bytes(row.replay.state_bytes as u128),
            row.target.map_or(String::new(), |target| three(1e6 * target)),
            verdict(row.target.map(|target| row.replay.following.seconds <= target)),
        ]);
    }
    vec![many, one]
}

/// Short contexts: rows of head sizes, columns of lengths.
fn lengths(title: &str, rows: &[&prefill::Row]) -> Vec<Sheet> {
    if rows.is_empty() {
        return vec![];
    }
    let mut tokens: Vec<usize> = rows.iter().map(|row| row.tokens).collect();
    tokens.sort_unstable();
    tokens.dedup();
    let mut headings = vec!["d".to_string()];
    headings.extend(tokens.iter().map(|&n| grouped(n as u128)));
    let mut dims: Vec<usize> = rows.iter().map(|row| row.attention.d).collect();
    dims.dedup();
    let mut sheet = Sheet { title: title.into(), headings, ..Sheet::default() };
    for d in dims {
        let mut cells = vec![d.to_string()];
        for &n in &tokens {
            let row = rows.iter().find(|row| row.attention.d == d && row.tokens == n);
            cells.push(row.map_or(String::new(), |row| three(row.ns)));
        }
        sheet.rows.push(cells);
    }
    vec![sheet]
}

/// Rows of the paper's setting in bf16, short contexts and the long one.
fn paper<'r>(short: &'r [prefill::Row], long: &'r [prefill::Row]) -> Vec<&'r prefill::Row> {
    let is_paper = |row: &&prefill::Row| {
        row.attention == super::attention::Attention::paper(row.attention.d) && row.dtype == "bf16"
    };
    let long = long.iter().filter(is_paper);
    short.iter().chain(long.filter(|row| short.iter().all(|s| s.tokens != row.tokens))).collect()
}

/// Short contexts, forward.
pub fn short(report: &Report) -> Vec<Sheet> {
    lengths("Short contexts, forward, ns per token and head", &paper(&report.short, &[]))
}

/// Short contexts, both passes.
pub fn short_both(report: &Report) -> Vec<Sheet> {
    let title = "Short contexts, forward and backward together, ns per token and head";
    lengths(title, &paper(&report.short_both, &[]))
}

/// Figure 6 as a table.
pub fn figure6(report: &Report) -> Vec<Sheet> {
    if report.figure6.is_empty() {
        return vec![];
    }
    let mut sheet = Sheet::new(
        "Figure 6: one more token after a context",
        &["d", "context", "step, µs", "state", "KV cache, bf16", "its bytes at the copy's rate, µs", "torch SDPA, µs"],
    )
    .note(
        "A state costs the same wherever it stands: those of long contexts are merged from shorter \
         ones instead of absorbed token by token. The KV cache's time is a bound, not a measurement.",
    );
    for point in &report.figure6 {
        let sdpa = report.beside.as_ref().and_then(|beside| {
            beside.decode.iter().find(|step| (step.d, step.tokens) == (point.d, point.tokens))
        });
        sheet.rows.push(vec![
            point.d.to_string(),
            grouped(point.tokens.into()),
            three(1e6 * point.replay.following.seconds),
            bytes(point.replay.state_bytes as u128),
            bytes(point.cache_bytes),
            three(1e6 * point.cache_bound_seconds),
            sdpa.map_or(String::new(), |step| three(1e6 * step.seconds)),
        ]);
    }
    let mut prefilled = Sheet::new(
        "Contexts that were absorbed token by token",
        &["d", "tokens", "in", "ns a token", "a step after them, µs", "its error against f64"],
    );
    for one in &report.prefilled {
        prefilled.rows.push(vec![
            one.d.to_string(),
            grouped(one.tokens.into()),
            seconds(one.seconds),
            three(1e9 * one.seconds / one.tokens as f64),
            three(1e6 * one.following.seconds),
            format!("{:.1e}", one.relative_error),
        ]);
    }
    vec![sheet, prefilled]
}

/// Against torch on the same GPU.
pub fn beside(report: &Report) -> Vec<Sheet> {
    let Some(beside) = &report.beside else { return vec![] };
    let mut sheets = vec![];
    for (both, short, long) in
        [(false, &report.short, &report.prefill), (true, &report.short_both, &report.backward)]
    {
        let rows = paper(short, long);
        if rows.is_empty() {
            continue;
        }
        let pass = if both { "forward and backward" } else { "forward" };
        let mut sheet = Sheet::new(
            format!("Beside torch {} on the same GPU, {pass}, ns per token and head", beside.torch),
            &[
                "d",
                "tokens",
                "ours",
                "SDPA, best",
                "by",
                "SDPA / ours",
                "chunked torch",
                "chunked / ours",
            ],
        );
        for row in &rows {
            let d = row.attention.d;
            let sdpa = beside.best("sdpa", both, d, row.tokens);
            let chunked = beside.best("chunked", both, d, row.tokens);
            if sdpa.is_none() && chunked.is_none() {
                continue;
            }
            let ns =
                |call: Option<&super::beside::Call>| call.map_or(String::new(), |c| three(c.ns));
            let over = |call: Option<&super::beside::Call>| {
                call.map_or(String::new(), |call| three(call.ns / row.ns))
            };
            sheet.rows.push(vec![
                d.to_string(),
                grouped(row.tokens as u128),
                three(row.ns),
                ns(sdpa),
                sdpa.map_or(String::new(), |call| call.backend.clone()),
                over(sdpa),
                ns(chunked),
                over(chunked),
            ]);
        }
        let mut dims: Vec<usize> = rows.iter().map(|row| row.attention.d).collect();
        dims.sort_unstable();
        dims.dedup();
        let found: Vec<String> = dims
            .into_iter()
            .filter_map(|d| {
                let tokens = match crossing(&common(beside, &rows, both, d))? {
                    Crossing::Before(n) => format!("at {} already", counts(n)),
                    Crossing::At(n) => format!("from {} tokens on", counts(round(n))),
                    Crossing::Beyond(n) => format!("not up to {}", counts(n)),
                };
                Some(format!("d = {d} {tokens}"))
            })
            .collect();
        sheets.push(sheet.note(format!("Ours is faster than SDPA: {}.", found.join(", "))));
    }
    sheets
}

/// Two digits.
fn round(n: f64) -> f64 {
    let unit = 10f64.powf(n.log10().floor() - 1.0);
    (n / unit).round() * unit
}

/// The whole page.
pub fn markdown(report: &Report) -> String {
    let mut text = format!(
        "## GPU: {}\n\n`{}`, version {}, {} in all. {}.\n",
        report.machine.name,
        report.command,
        report.version,
        seconds(report.seconds),
        report.machine.line()
    );
    text += "bf16 inputs drawn from N(0, 1) unless a type is named, near blocks of 64; times by device \
             events after a call that is not counted, medians; spread: longest less shortest, over the \
             median.\n";
    let sheets = [
        prefill(report),
        backward(report),
        decode(report),
        short(report),
        short_both(report),
        beside(report),
        figure6(report),
    ];
    for sheet in sheets.concat() {
        text += &format!("\n{}", sheet.markdown());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_digits() {
        assert_eq!(round(1234.0), 1200.0);
        assert_eq!(round(99.6), 100.0);
    }
}
