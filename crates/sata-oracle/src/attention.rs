//! The operation, one pair of tokens at a time.

use crate::Problem;
use crate::row::{FarMoments, Row};

/// What attention gives, one entry per query head and query.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Output {
    /// y, `[query_heads][queries][d_value]`.
    pub y: Vec<f64>,
    /// Σ_s w_ts, `[query_heads][queries]`. Infinite where the number exceeds an f64.
    pub denominators: Vec<f64>,
    /// Σ_s w_ts · exp(−shift), `[query_heads][queries]`: always in range, with the same sign.
    pub scaled_denominators: Vec<f64>,
    /// The shift of each query, `[query_heads][queries]`: its largest exponent.
    pub shifts: Vec<f64>,
    /// The far logits' moments, `[query_heads][queries]`, or `None` where a query has no far key.
    pub far: Vec<Option<FarMoments>>,
}

impl Output {
    pub(crate) fn push(
        &mut self,
        numerator: &[f64],
        denominator: f64,
        shift: f64,
        far: Option<FarMoments>,
    ) {
        for n in numerator {
            self.y.push(n / denominator);
        }
        self.denominators.push(denominator * shift.exp());
        self.scaled_denominators.push(denominator);
        self.shifts.push(shift);
        self.far.push(far);
    }
}

/// y_t = Σ_s w_ts v_s / Σ_s w_ts with w_ts = exp(g_t − g_s) κ_ts: the operation as the crate's front page has it.
pub fn attention(problem: &Problem) -> Output {
    problem.check();
    let mut output = Output::default();
    for head in 0..problem.shape.query_heads {
        for query in 0..problem.shape.queries {
            let row = Row::new(problem, head, query);
            let numerator = row.numerator(problem, problem.kv_head(head));
            output.push(&numerator, row.denominator(), row.shift, row.moments());
        }
    }
    output
}
