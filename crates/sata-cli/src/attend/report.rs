//! What `sata attend` did, in words and as data.

use sata::{Diagnostics, Form, HeadDiagnostics, Near, Spec};
use serde::Serialize;

use super::past::StateReport;
use crate::errors::{Errors, QUANTILES};
use crate::table::{bytes, grouped, seconds, table, three};

/// What was done.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where the inputs came from.
    pub input: String,
    /// Where the outputs went.
    pub output: String,
    /// `[batch, heads, tokens, dim]`.
    pub q: [usize; 4],
    /// `[batch, heads, tokens, dim]`.
    pub k: [usize; 4],
    /// `[batch, heads, tokens, dim]`.
    pub v: [usize; 4],
    /// Shape of the output.
    pub y: Vec<usize>,
    /// Type of inputs and output.
    pub dtype: &'static str,
    /// Keys that are masked out.
    pub masked_keys: usize,
    /// Whether queries see only what is before them.
    pub causal: bool,
    /// The attention: series, near blocks, sinks, kind of decay and all else.
    pub spec: Spec,
    /// Slopes of the key/value heads, where weights fade by them.
    pub slopes: Option<Vec<f64>>,
    /// Name of the forget gates, where weights fade by them.
    pub gates: Option<String>,
    /// D.
    pub features: u128,
    /// Direct or state.
    pub form: Form,
    /// Kernels and instruction set.
    pub kernels: &'static str,
    /// Instruction set.
    pub level: String,
    /// Threads.
    pub threads: usize,
    /// Seconds of the attention itself.
    pub seconds: f64,
    /// What the denominators were like.
    pub diagnostics: Diagnostics,
    /// The state, if there is one.
    pub state: Option<StateReport>,
    /// Where the state was left.
    pub state_out: Option<String>,
    /// Against exact softmax in f64, if asked for.
    pub against_softmax: Option<Errors>,
}

impl Report {
    /// The report in sentences.
    pub fn text(&self) -> String {
        let [batch, heads, queries, d_key] = self.q;
        let [_, kv_heads, keys, _] = self.k;
        let mut lines = vec![format!(
            "{} attention of {} quer{} over {} key{}, {heads} head{}{}{}, d_key {d_key}, d_value {}",
            if self.causal { "causal" } else { "full" },
            grouped(queries as u128),
            if queries == 1 { "y" } else { "ies" },
            grouped(keys as u128),
            plural(keys),
            plural(heads),
            if kv_heads == heads {
                String::new()
            } else {
                format!(" on {kv_heads} key/value head{}", plural(kv_heads))
            },
            if batch == 1 { String::new() } else { format!(", batch {batch}") },
            self.v[3],
        )];
        if self.masked_keys > 0 {
            lines.push(format!("  key_mask leaves out {} keys", grouped(self.masked_keys as u128)));
        }
        lines.push(format!(
            "  series   {}, scale {}: D = {} features",
            series(&self.spec),
            three(self.spec.scale()),
            grouped(self.features)
        ));
        lines.push(format!("  near     {}", near(&self.spec)));
        lines.push(format!("  decay    {}", self.decay()));
        lines.push(format!(
            "  computed in the {} form on {} inputs, kernels {} ({}), {} thread{}: {}",
            match self.form {
                Form::Direct => "direct (quadratic)",
                Form::State => "state (linear)",
            },
            self.dtype,
            self.kernels,
            self.level,
            self.threads,
            plural(self.threads),
            seconds(self.seconds)
        ));
        lines.push(denominators(&self.diagnostics));
        if !self.diagnostics.heads.is_empty() {
            lines.push(by_head(&self.diagnostics.heads));
        }
        if let Some(state) = &self.state {
            lines.push(format!(
                "  state    {} → {} tokens, {}{}{}",
                grouped(state.before.into()),
                grouped(state.after.into()),
                bytes(state.bytes as u128),
                if state.centred { ", keys and values less a mean" } else { "" },
                match &self.state_out {
                    Some(path) => format!(", saved to {path}"),
                    None => ", not saved".into(),
                }
            ));
        }
        if let Some(errors) = &self.against_softmax {
            let faded = self.slopes.is_some() || self.gates.is_some();
            lines.push(against_softmax(errors, faded));
        }
        lines.push(format!("  wrote    {}: y {} {:?}", self.output, self.dtype, self.y));
        lines.join("\n")
    }

    fn decay(&self) -> String {
        match (&self.slopes, &self.gates) {
            (Some(slopes), _) => {
                let some: Vec<String> = slopes.iter().take(8).map(|&slope| three(slope)).collect();
                let more = if slopes.len() > some.len() { ", …" } else { "" };
                format!("slope{} {}{more}", plural(slopes.len()), some.join(", "))
            }
            (None, Some(gates)) => format!("forget gates, logarithms from {gates}"),
            (None, None) => "none".into(),
        }
    }
}

fn near(spec: &Spec) -> String {
    let block = spec.block();
    let blocks = match spec.near() {
        Near::None => format!("nothing (blocks of {block})"),
        Near::Blocks(0) => format!("a query's own block of {block}"),
        Near::Blocks(n) => format!("a query's own block of {block} and {n} before it"),
    };
    match spec.sinks() {
        0 => format!("{blocks}, no sinks"),
        sinks => format!("{blocks}, {sinks} sink{}", plural(sinks)),
    }
}

/// A row per query head, and what its columns mean.
fn by_head(heads: &[HeadDiagnostics]) -> String {
    let number = |x: Option<f64>| x.map_or("–".into(), three);
    let rows: Vec<Vec<String>> = heads
        .iter()
        .enumerate()
        .map(|(head, one)| {
            let far = |x: f64| number((one.far > 0).then_some(x));
            let share = 100.0 * one.non_positive as f64 / (one.queries as f64).max(1.0);
            vec![
                format!("  {head}"),
                format!("{} %", three(share)),
                grouped(one.far.into()),
                far(one.mean),
                far(one.deviation),
                far(one.max_deviation),
                number(one.estimate.filter(|_| one.far > 0)),
                number(one.bound),
            ]
        })
        .collect();
    let headings = [
        "  head",
        "not positive",
        "far queries",
        "logit mean",
        "logit σ",
        "largest σ",
        "estimate",
        "bound",
    ];
    format!(
        "{}\n  logits: of the far past, by query\n  estimate: of the relative error of the far \
         part, if its logits are normal; no promise\n  bound: on |ŷ−y| over the largest |v|, for \
         every query; only of an odd number of Taylor terms, and only below 1",
        table(&headings, &rows)
    )
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

/// The series in words.
pub fn series(spec: &Spec) -> String {
    let terms = spec.terms();
    match spec.series() {
        sata::Series::Taylor => format!("taylor, P = {terms} terms"),
        sata::Series::Gauss => format!("gauss, P = {terms} terms"),
        sata::Series::Hermite { tau } => format!("hermite, τ = {tau}σ, P = {terms} terms"),
        sata::Series::Power { exponent, floor } => format!("x^{exponent} + {floor}"),
        sata::Series::Fixed { coefficients } => {
            format!("{} coefficients from a file", coefficients.len())
        }
        other => format!("{other:?}"),
    }
}

fn denominators(diagnostics: &Diagnostics) -> String {
    if diagnostics.is_clean() {
        return format!(
            "  denominators: all {} are positive and finite",
            grouped(diagnostics.queries.into())
        );
    }
    format!(
        "  warning  {diagnostics}:\n           those outputs are not averages of values (--strict \
         makes this an error)"
    )
}

fn against_softmax(errors: &Errors, faded: bool) -> String {
    let quantiles: Vec<String> = QUANTILES
        .iter()
        .zip(errors.log10_absolute)
        .map(|(q, x)| format!("{x:.2} ({} %)", (1000.0 * q).round() / 10.0))
        .collect();
    format!(
        "  against softmax in f64{}: relative error {} (RMS), {} (median over median)\n           \
         log10 |Y−Ŷ|: {}, largest {:.2}{}",
        if faded { " with the same decay" } else { "" },
        three(errors.relative_rms),
        three(errors.relative_median),
        quantiles.join(", "),
        errors.log10_largest,
        if errors.not_finite == 0 {
            String::new()
        } else {
            format!("\n           {} elements are not finite and left out", errors.not_finite)
        }
    )
}
