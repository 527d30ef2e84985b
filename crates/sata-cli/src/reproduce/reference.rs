//! What others measured, to compare with: the paper's public reference implementation, and a
//! prototype of other coefficients.

use super::coefficients::Series;

/// Source of the numbers.
pub const SOURCE: &str = "the paper's public reference implementation on one NVIDIA H200 (float16 inputs, \
                          autocast), against float64 softmax, 102,400 tokens";

/// log10|Y−Ŷ| of the reference: head size, terms, median over all tokens, median over the last
/// 1,024 tokens.
#[expect(clippy::approx_constant, reason = "a measured median happens to be −3.14")]
const MEDIANS: [(usize, usize, f64, f64); 13] = [
    (8, 3, -2.80, -2.95),
    (8, 4, -3.07, -3.22),
    (8, 5, -3.30, -3.45),
    (8, 6, -3.63, -3.78),
    (16, 3, -2.75, -2.92),
    (16, 4, -3.01, -3.18),
    (16, 5, -3.24, -3.40),
    (16, 6, -3.55, -3.71),
    (32, 3, -2.72, -2.89),
    (32, 4, -2.98, -3.14),
    (32, 5, -3.20, -3.36),
    (64, 3, -2.71, -2.89),
    (64, 4, -2.97, -3.14),
];

/// The medians, over all tokens and over the last 1,024, where they were measured.
pub fn medians(d: usize, terms: usize) -> Option<(f64, f64)> {
    let found = MEDIANS.iter().find(|row| (row.0, row.1) == (d, terms));
    found.map(|row| (row.2, row.3))
}

/// Source of [`prototype`]'s numbers.
pub const PROTOTYPE: &str = "an early prototype of the same measurement";

/// Median |Y−Ŷ| over median |Y| of the prototype, d = 32, 4,096 keys: series, terms, and at logits of
/// deviation 0.5, 1, 1.5 and 2.
const PROTOTYPES: [(Series, usize, [&str; 4]); 4] = [
    (Series::Taylor, 4, ["0.019", "0.176", "0.44", "0.67"]),
    (Series::Taylor, 6, ["0.0014", "0.048", "0.22", "0.43"]),
    (Series::Hermite, 4, ["0.010", "0.110", "0.31", "0.53"]),
    (Series::Hermite, 6, ["0.0003", "0.013", "0.076", "0.20"]),
];

/// The prototype's error at logits of this deviation, where it was measured, with the digits that
/// it was given with.
pub fn prototype(series: Series, terms: usize, deviation: f64) -> Option<&'static str> {
    let errors = PROTOTYPES.iter().find(|row| (row.0, row.1) == (series, terms))?.2;
    let at = [0.5, 1.0, 1.5, 2.0].iter().position(|&s| s == deviation)?;
    Some(errors[at])
}
