//! What a call noticed about its own denominators.

use std::fmt;

/// Counts of queries whose denominator is not a positive, finite number.
///
/// A truncated series with an even number of terms takes negative values, so the weights of a
/// query can sum to zero or less; then its output is not an average of values. Nothing is
/// replaced or hidden: such outputs stay as computed, and are counted here.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Diagnostics {
    /// Queries answered, over batch, heads and tokens.
    pub queries: u64,
    /// Queries whose denominator is zero or negative.
    pub non_positive: u64,
    /// Queries whose denominator is NaN or infinite.
    pub non_finite: u64,
    /// The first of those: sequence, query head, token of the call.
    pub first: Option<[usize; 3]>,
    /// Per query head, over all sequences; empty unless the call asked to
    /// [`diagnose`](crate::Call::diagnose).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub heads: Vec<HeadDiagnostics>,
}

/// What one query head's far logits are like, and what to expect of their series.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct HeadDiagnostics {
    /// Queries answered.
    pub queries: u64,
    /// Queries whose denominator is zero or negative.
    pub non_positive: u64,
    /// Queries whose denominator is NaN or infinite.
    pub non_finite: u64,
    /// Queries that have a far past; the numbers below are over these.
    pub far: u64,
    /// Mean of the far logits, averaged over queries.
    pub mean: f64,
    /// Deviation σ of a query's far logits, under their decays: root mean square over queries.
    pub deviation: f64,
    /// The largest such deviation.
    pub max_deviation: f64,
    /// An estimate of the relative error of the far part, root mean square over queries:
    /// √Pr[Poisson(λ) ≥ P] with λ = σ² for `Gauss` and `Hermite`, and the far logits' mean square
    /// for `Taylor`; `None` for other series. It is made for `Hermite` and normal logits, where it
    /// came out at about the measured root mean square; for the others it is too low, by two to
    /// three times where logits are wide. It promises nothing.
    pub estimate: Option<f64>,
    /// A bound on |ŷ − y| against exact exponentials, in multiples of the largest |v|, that holds
    /// for every query of the call: ε/(1 − ε) with ε = e^R R^P/P! and R the largest |q| times the
    /// largest |k| times |scale|. `Taylor` with P odd only, and only where it is below 1.
    pub bound: Option<f64>,
}

impl Diagnostics {
    /// Whether every denominator was positive and finite.
    pub fn is_clean(&self) -> bool {
        self.non_positive == 0 && self.non_finite == 0
    }

    /// Counts of this and another part of a call together. What is known per head is not added up:
    /// it stays this one's, or becomes the other's where this one has none.
    pub fn merged(self, other: Self) -> Self {
        Diagnostics {
            queries: self.queries + other.queries,
            non_positive: self.non_positive + other.non_positive,
            non_finite: self.non_finite + other.non_finite,
            first: match (self.first, other.first) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            },
            heads: if self.heads.is_empty() { other.heads } else { self.heads },
        }
    }

    pub(crate) fn count(&mut self, denominator: f64, place: [usize; 3]) {
        self.queries += 1;
        if !denominator.is_finite() {
            self.non_finite += 1;
        } else if denominator <= 0.0 {
            self.non_positive += 1;
        } else {
            return;
        }
        self.first = Some(self.first.map_or(place, |first| first.min(place)));
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} queries have a denominator that is not positive, {} one that is not finite",
            self.non_positive, self.queries, self.non_finite
        )?;
        if let Some([sequence, head, token]) = self.first {
            write!(f, " (first: sequence {sequence}, head {head}, token {token})")?;
        }
        Ok(())
    }
}
