//! What `sata attend` did, in words and as data.

use sata::{Diagnostics, Form, Spec};
use serde::Serialize;

use super::compute::StateReport;
use crate::errors::{Errors, QUANTILES};
use crate::table::{bytes, grouped, seconds, three};

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
    /// The attention.
    pub spec: Spec,
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
        if let Some(state) = &self.state {
            lines.push(format!(
                "  state    {} → {} tokens, {}{}",
                grouped(state.before.into()),
                grouped(state.after.into()),
                bytes(state.bytes as u128),
                match &self.state_out {
                    Some(path) => format!(", saved to {path}"),
                    None => ", not saved".into(),
                }
            ));
        }
        if let Some(errors) = &self.against_softmax {
            lines.push(against_softmax(errors));
        }
        lines.push(format!("  wrote    {}: y {} {:?}", self.output, self.dtype, self.y));
        lines.join("\n")
    }
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

fn series(spec: &Spec) -> String {
    match spec.series() {
        sata::Series::Taylor => format!("taylor, P = {} terms", spec.terms()),
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

fn against_softmax(errors: &Errors) -> String {
    let quantiles: Vec<String> = QUANTILES
        .iter()
        .zip(errors.log10_absolute)
        .map(|(q, x)| format!("{x:.2} ({} %)", (1000.0 * q).round() / 10.0))
        .collect();
    format!(
        "  against softmax in f64: relative error {} (RMS), {} (median over median)\n           \
         log10 |Y−Ŷ|: {}, largest {:.2}{}",
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
