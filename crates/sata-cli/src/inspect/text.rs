//! What was found, in words and tables.

use super::report::{HeadReport, LayerReport, Overall, Report, Skipped};
use crate::table::{bytes, grouped, seconds, table, three};

/// Headings of the table of heads.
pub const HEADS: [&str; 10] = [
    "layer",
    "head",
    "mean",
    "deviation",
    "per query",
    "largest",
    "verdict",
    "setting",
    "state",
    "because",
];

/// Headings of the table of candidates.
pub const CANDIDATES: [&str; 9] = [
    "all heads",
    "median",
    "99 %",
    "absolute",
    "99 %",
    "not positive",
    "heads within",
    "state",
    "break-even",
];

impl Report {
    /// The report as text.
    pub fn text(&self) -> String {
        let mut lines = vec![self.about()];
        lines.extend(self.layers.iter().map(LayerReport::about));
        lines.push(String::new());
        lines.push(table(&HEADS, &align_last(self.head_rows(), HEADS[9])));
        lines.push(
            "logits x over queries and the keys they see: mean, deviation, largest |x|; per \
             query: the mean of each query's own deviation"
                .into(),
        );
        lines.push(String::new());
        lines.push(table(&CANDIDATES, &self.candidate_rows()));
        lines.push(
            "of all queries: |ŷ−y|/|y|, then |ŷ−y|/√d_value (absolute); not positive: \
             denominators that are not positive and finite; state: bytes of one key/value head; \
             break-even: tokens of a KV cache as large"
                .into(),
        );
        lines.extend(self.notes());
        lines.push(String::new());
        lines.extend(self.findings());
        lines.join("\n")
    }

    /// What was looked at.
    pub fn about(&self) -> String {
        let heads: usize = self.layers.iter().map(|layer| layer.heads.len()).sum();
        format!(
            "{}: {} layer{}, {} query head{}, {} ({}); engine on {}, truth in F64",
            self.input,
            self.layers.len(),
            plural(self.layers.len()),
            grouped(heads as u128),
            plural(heads),
            if self.causal { "causal" } else { "full" },
            self.causal_by,
            self.dtype,
        )
    }

    /// One row a head.
    pub fn head_rows(&self) -> Vec<Vec<String>> {
        let rows = |layer| move |head| head_row(layer, head);
        self.layers.iter().flat_map(|layer| layer.heads.iter().map(rows(layer))).collect()
    }

    /// One row a candidate.
    pub fn candidate_rows(&self) -> Vec<Vec<String>> {
        self.candidates.iter().map(candidate_row).collect()
    }

    /// What else to know: which queries show no error, and which candidates were not tried.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = vec![];
        for layer in &self.layers {
            for all_near in layer.all_near.iter().filter(|all_near| all_near.queries > 0) {
                notes.push(format!(
                    "note: near {} leaves nothing far to {} of {} queries of {}; a later --from \
                     leaves them out",
                    all_near.near,
                    all_near.queries,
                    layer.queries,
                    layer.name()
                ));
            }
        }
        let mut skipped: Vec<&Skipped> = self.skipped.iter().collect();
        skipped.sort_by_key(|skipped| &skipped.reason);
        for same in skipped.chunk_by(|a, b| a.reason == b.reason) {
            let names: Vec<String> = same.iter().map(|one| one.candidate.name()).collect();
            notes.push(format!("skipped {}: {}", names.join("; "), same[0].reason));
        }
        notes
    }

    /// What it comes to, a sentence each.
    pub fn findings(&self) -> Vec<String> {
        let error = three(self.budget.max_error);
        let budget = match self.budget.max_state {
            None => format!("a median error of {error}"),
            Some(most) => {
                format!("a median error of {error} and {} of state", bytes(u128::from(most)))
            }
        };
        let counts: Vec<String> = self
            .verdicts
            .iter()
            .filter(|count| count.heads > 0)
            .map(|count| format!("{} {}", count.verdict.word(), count.heads))
            .collect();
        let mut lines = vec![format!("heads, asked for {budget}: {}", counts.join(", "))];
        lines.push(match &self.one_for_all {
            Some(candidate) => format!("one setting for all heads: {}", candidate.name()),
            None => "one setting for all heads: none that was tried".into(),
        });
        if let (Some(states), Some(tokens)) =
            (self.recommended_bytes, self.recommended_break_even_tokens)
        {
            lines.push(format!(
                "the recommended states of these heads together: {}, as much as a KV cache of {} \
                 tokens; {}",
                bytes(states),
                grouped(tokens),
                seconds(self.seconds),
            ));
        }
        lines
    }
}

impl LayerReport {
    /// Its name, also where its tensors have no prefix.
    pub fn name(&self) -> &str {
        if self.prefix.is_empty() { "q, k, v" } else { &self.prefix }
    }

    fn about(&self) -> String {
        let heads = self.heads.len();
        format!(
            "  {}: {heads} head{} on {} key/value head{}, {}{}d_key {}, d_value {}; {} queries \
             from token {} on",
            self.name(),
            plural(heads),
            self.kv_heads,
            plural(self.kv_heads),
            if self.batch == 1 { String::new() } else { format!("batch {}, ", self.batch) },
            if self.tokens == self.keys {
                format!("{} tokens, ", grouped(self.tokens as u128))
            } else {
                format!(
                    "{} queries and {} keys, ",
                    grouped(self.tokens as u128),
                    grouped(self.keys as u128)
                )
            },
            self.d_key,
            self.d_value,
            grouped(self.queries as u128),
            grouped(self.from as u128),
        )
    }
}

fn head_row(layer: &LayerReport, head: &HeadReport) -> Vec<String> {
    let best = head.best();
    let logits = &head.logits;
    vec![
        layer.name().into(),
        head.head.to_string(),
        three(logits.mean),
        three(logits.deviation),
        three(logits.query_deviation),
        three(logits.largest),
        head.verdict.word().into(),
        best.map_or("–".into(), |best| best.candidate.name()),
        best.map_or("–".into(), |best| bytes(best.state_bytes)),
        head.reason.clone(),
    ]
}

fn candidate_row(one: &Overall) -> Vec<String> {
    let figures = &one.figures;
    vec![
        one.candidate.name(),
        three(figures.relative.median),
        three(figures.relative.p99),
        three(figures.absolute.median),
        three(figures.absolute.p99),
        format!("{} %", three(100.0 * (figures.non_positive + figures.non_finite))),
        format!("{}/{}", one.heads_within, one.heads),
        bytes(one.state_bytes),
        grouped(one.break_even_tokens),
    ]
}

/// The same rows with the last column filled up, so that it begins instead of ending in line.
fn align_last(mut rows: Vec<Vec<String>>, heading: &str) -> Vec<Vec<String>> {
    let length = |text: &str| text.chars().count();
    let last = |row: &Vec<String>| row.last().map_or(0, |cell| length(cell));
    let width = rows.iter().map(last).max().unwrap_or(0).max(length(heading));
    for cell in rows.iter_mut().filter_map(|row| row.last_mut()) {
        *cell += &" ".repeat(width - length(cell));
    }
    rows
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}
