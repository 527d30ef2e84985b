//! What `scripts/bench-sdpa` measured: torch's attention on the same GPU.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::prefill;
use crate::failure::{Failure, Outcome};

/// The file.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Beside {
    /// The GPU's name.
    pub device: String,
    /// Version of torch.
    pub torch: String,
    /// Whole calls.
    pub calls: Vec<Call>,
    /// One query against a KV cache, one head.
    #[serde(default)]
    pub decode: Vec<Decode>,
}

/// A whole call, causal, bf16.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Call {
    /// `sdpa`, or `chunked`: the same Taylor attention by torch's operations.
    pub what: String,
    /// Of SDPA: `flash`, `cudnn`; else empty.
    #[serde(default)]
    pub backend: String,
    /// `forward`, or `both` passes.
    pub pass: String,
    /// d_K = d_V.
    pub d: usize,
    /// Tokens of each sequence.
    pub tokens: usize,
    /// Nanoseconds per token and head.
    pub ns: f64,
}

/// A step.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Decode {
    /// d_K = d_V.
    pub d: usize,
    /// Tokens in the cache.
    pub tokens: u64,
    /// The shortest of what torch's kernels take.
    pub seconds: f64,
}

impl Beside {
    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be read, or holds something else.
    pub fn read(path: &Path) -> Outcome<Self> {
        let fail = |reason: String| {
            Failure::new(format!("--beside {}: {reason}", path.display()))
                .hint("scripts/bench-sdpa --json FILE writes it")
        };
        let bytes = std::fs::read(path).map_err(|error| fail(error.to_string()))?;
        serde_json::from_slice(&bytes).map_err(|error| fail(error.to_string()))
    }

    /// The fastest that was measured, in ns per token and head.
    pub fn best(&self, what: &str, both: bool, d: usize, tokens: usize) -> Option<&Call> {
        let pass = if both { "both" } else { "forward" };
        self.calls
            .iter()
            .filter(|call| {
                call.what == what && call.pass == pass && call.d == d && call.tokens == tokens
            })
            .min_by(|a, b| a.ns.total_cmp(&b.ns))
    }
}

/// Where ours becomes faster than theirs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Crossing {
    /// It is already at the shortest context that was measured.
    Before(f64),
    /// From about so many tokens on.
    At(f64),
    /// Not up to the longest context that was measured.
    Beyond(f64),
}

/// Finds it among contexts that both have, ascending: tokens, ours, theirs. Between two of them, the
/// ratio is taken to be a power of the length. None where nothing was measured.
pub fn crossing(points: &[(f64, f64, f64)]) -> Option<Crossing> {
    let last = points.last()?;
    let Some(slower) = points.iter().rposition(|(_, ours, theirs)| ours >= theirs) else {
        return Some(Crossing::Before(points[0].0));
    };
    let Some(faster) = points.get(slower + 1) else { return Some(Crossing::Beyond(last.0)) };
    let slower = &points[slower];
    let ratio = |point: &(f64, f64, f64)| (point.1 / point.2).ln();
    let part = ratio(slower) / (ratio(slower) - ratio(faster));
    Some(Crossing::At((slower.0.ln() + part * (faster.0 / slower.0).ln()).exp()))
}

/// Contexts that rows and the file have, at a head size: tokens, ours, theirs.
pub fn common(
    beside: &Beside,
    rows: &[&prefill::Row],
    both: bool,
    d: usize,
) -> Vec<(f64, f64, f64)> {
    let mut points: Vec<(f64, f64, f64)> = rows
        .iter()
        .filter(|row| row.attention.d == d)
        .filter_map(|row| {
            let theirs = beside.best("sdpa", both, d, row.tokens)?;
            Some((row.tokens as f64, row.ns, theirs.ns))
        })
        .collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crossings() {
        assert_eq!(crossing(&[]), None);
        assert_eq!(crossing(&[(1e3, 1.0, 2.0)]), Some(Crossing::Before(1e3)));
        assert_eq!(crossing(&[(1e3, 1.0, 2.0), (1e4, 3.0, 2.0)]), Some(Crossing::Beyond(1e4)));
        // Ours stays, theirs grows with the length: they meet at 2,000.
        let found = crossing(&[(1e3, 2.0, 1.0), (4e3, 2.0, 4.0)]);
        let Some(Crossing::At(tokens)) = found else { panic!("{found:?}") };
        assert!((tokens - 2e3).abs() < 1e-6);
    }

    #[test]
    fn files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sdpa.json");
        let call = r#"{"what": "sdpa", "backend": "flash", "pass": "forward", "d": 8, "tokens": 64, "ns": 2.5}"#;
        let text = format!(r#"{{"device": "X", "torch": "2", "calls": [{call}]}}"#);
        std::fs::write(&path, text).unwrap();
        let beside = Beside::read(&path).unwrap();
        assert_eq!(beside.best("sdpa", false, 8, 64).unwrap().ns, 2.5);
        assert!(beside.best("sdpa", true, 8, 64).is_none());
        std::fs::write(&path, "[1]").unwrap();
        let message = Beside::read(&path).unwrap_err().to_string();
        assert!(message.contains("--beside") && message.contains("bench-sdpa"), "{message}");
    }
}
