//! What a call noticed about its own denominators.

use std::fmt;

/// Counts of queries whose denominator is not a positive, finite number.
///
/// A truncated series with an even number of terms takes negative values, so the weights of a
/// query can sum to zero or less; then its output is not an average of values. Nothing is
/// replaced or hidden: such outputs stay as computed, and are counted here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Diagnostics {
    /// Queries answered, over batch, heads and tokens.
    pub queries: u64,
    /// Queries whose denominator is zero or negative.
    pub non_positive: u64,
    /// Queries whose denominator is NaN or infinite.
    pub non_finite: u64,
    /// The first of those: sequence, query head, token of the call.
    pub first: Option<[usize; 3]>,
}

impl Diagnostics {
    /// Whether every denominator was positive and finite.
    pub fn is_clean(&self) -> bool {
        self.non_positive == 0 && self.non_finite == 0
    }

    /// Counts of this and another part of a call together.
    pub fn merged(self, other: Self) -> Self {
        Diagnostics {
            queries: self.queries + other.queries,
            non_positive: self.non_positive + other.non_positive,
            non_finite: self.non_finite + other.non_finite,
            first: match (self.first, other.first) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            },
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
