//! What a call notices while it answers.

use crate::series::{Rule, poisson_tail, taylor_bound};
use crate::{Diagnostics, HeadDiagnostics};

/// Counts of a part of a call, per query head where they are asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub found: Diagnostics,
    heads: Vec<Head>,
}

/// Sums over one head's queries.
#[derive(Clone, Debug, Default)]
struct Head {
    queries: u64,
    non_positive: u64,
    non_finite: u64,
    far: u64,
    mean: f64,
    variance: f64,
    max_variance: f64,
    tail: f64,
}

/// The larger; NaN if either is.
fn largest(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

impl Tally {
    /// Counts a query's denominator; `place` is its sequence, head and token.
    pub(super) fn count(&mut self, denominator: f64, place: [usize; 3], by_head: bool) {
        self.found.count(denominator, place);
        if by_head {
            let head = self.head(place[1]);
            head.queries += 1;
            if !denominator.is_finite() {
                head.non_finite += 1;
            } else if denominator <= 0.0 {
                head.non_positive += 1;
            }
        }
    }

    /// Adds the moments of a query's far logits.
    pub(super) fn far(&mut self, head: usize, mean: f64, variance: f64, rule: &Rule, terms: usize) {
        // Comparisons that leave NaN as it is.
        let variance = if variance < 0.0 { 0.0 } else { variance };
        let lambda = match rule {
            Rule::Fixed(_) => variance + mean * mean,
            Rule::Gauss | Rule::Hermite { .. } => variance,
        };
        let head = self.head(head);
        head.far += 1;
        head.mean += mean;
        head.variance += variance;
        head.max_variance = largest(head.max_variance, variance);
        head.tail += poisson_tail(lambda, terms);
    }

    fn head(&mut self, head: usize) -> &mut Head {
        if self.heads.len() <= head {
            self.heads.resize(head + 1, Head::default());
        }
        &mut self.heads[head]
    }

    /// Both parts together.
    pub(super) fn merged(mut self, other: Self) -> Self {
        for (i, other) in other.heads.iter().enumerate() {
            let head = self.head(i);
            head.queries += other.queries;
            head.non_positive += other.non_positive;
            head.non_finite += other.non_finite;
            head.far += other.far;
            head.mean += other.mean;
            head.variance += other.variance;
            head.max_variance = largest(head.max_variance, other.max_variance);
            head.tail += other.tail;
        }
        Tally { found: self.found.merged(other.found), heads: self.heads }
    }

    /// The diagnostics of a call of `heads` query heads, whose logits are at most `reach` of their
    /// head, for a series of `terms` terms.
    pub(super) fn finish(
        mut self,
        heads: usize,
        reach: impl Fn(usize) -> f64,
        series: &crate::Series,
        terms: usize,
    ) -> Diagnostics {
        use crate::Series;
        self.heads.resize(heads, Head::default());
        let heads = self.heads.iter().enumerate().map(|(i, head)| {
            let over = |sum: f64| if head.far == 0 { 0.0 } else { sum / head.far as f64 };
            HeadDiagnostics {
                queries: head.queries,
                non_positive: head.non_positive,
                non_finite: head.non_finite,
                far: head.far,
                mean: over(head.mean),
                deviation: over(head.variance).sqrt(),
                max_deviation: head.max_variance.sqrt(),
                estimate: match series {
                    Series::Taylor | Series::Gauss | Series::Hermite { .. } => {
                        Some(over(head.tail).sqrt())
                    }
                    _ => None,
                },
                bound: match series {
                    Series::Taylor => taylor_bound(reach(i), terms),
                    _ => None,
                },
            }
        });
        Diagnostics { heads: heads.collect(), ..self.found }
    }
}
