//! The oracle's answer to all that a spec can say, and a comparison that knows how far rounding
//! may lead away from it.

use sata::{Element, Near, Series, Spec};
use sata_oracle::kernel::{FarKernel, Measure};
use sata_oracle::{self as oracle, FarMoments, Problem};

use super::{Fade, Inputs, f64s};

/// The oracle's outputs of every sequence, query head and query, in this order.
pub struct Truth {
    pub d_value: usize,
    /// `[rows][d_value]`, NaN where a query sees no key.
    pub y: Vec<f64>,
    /// Per row, the sum of the magnitudes that its denominator is made of over its own: what
    /// rounding may grow by.
    pub magnified: Vec<f64>,
    /// Per row, the sign and size of Σ w · exp(−shift).
    pub denominators: Vec<f64>,
    /// Per row, mean and deviation of its far logits.
    pub far: Vec<Option<FarMoments>>,
}

pub fn oracle_series(series: &Series) -> oracle::Series {
    match series {
        Series::Taylor => oracle::Series::Taylor,
        Series::Fixed { coefficients } => oracle::Series::Fixed(coefficients.clone()),
        Series::Power { exponent, floor } => {
            oracle::Series::Power { exponent: *exponent, floor: *floor }
        }
        Series::Gauss => oracle::Series::Gauss,
        Series::Hermite { tau } => oracle::Series::Hermite { tau: *tau },
        other => panic!("{other:?} is not compared here"),
    }
}

/// Each sequence of `inputs` as the oracle's problem.
pub fn each_problem<E: Element>(
    spec: &Spec,
    inputs: &Inputs<E>,
    fade: &Fade,
    causal: bool,
    mut f: impl FnMut(&Problem),
) {
    let s = inputs.sizes;
    let (q, k, v) = (f64s(&inputs.q), f64s(&inputs.k), f64s(&inputs.v));
    let heads = s.kv_heads * s.group;
    for batch in 0..s.batch {
        let part = |n: usize| batch * n..(batch + 1) * n;
        f(&Problem {
            shape: oracle::Shape {
                query_heads: heads,
                kv_heads: s.kv_heads,
                queries: s.queries,
                keys: s.keys,
                d_key: s.d_key,
                d_value: s.d_value,
            },
            q: &q[part(heads * s.queries * s.d_key)],
            k: &k[part(s.kv_heads * s.keys * s.d_key)],
            v: &v[part(s.kv_heads * s.keys * s.d_value)],
            scale: spec.scale(),
            causal,
            offset: 0,
            key_mask: inputs.mask.as_ref().map(|mask| &mask[part(s.keys)]),
            series: oracle_series(spec.series()),
            terms: spec.terms(),
            near: match spec.near() {
                Near::None => oracle::Near::None,
                Near::Blocks(n) => oracle::Near::Blocks(n),
            },
            block: spec.block(),
            sinks: spec.sinks(),
            decay: fade.oracle(s, batch),
        });
    }
}

/// The oracle's answer to `spec`.
pub fn truth<E: Element>(spec: &Spec, inputs: &Inputs<E>, fade: &Fade, causal: bool) -> Truth {
    let s = inputs.sizes;
    let mut truth = Truth {
        d_value: s.d_value,
        y: vec![],
        magnified: vec![],
        denominators: vec![],
        far: vec![],
    };
    if s.queries == 0 || s.keys == 0 {
        let rows = s.batch * s.kv_heads * s.group * s.queries;
        truth.y = vec![f64::NAN; rows * s.d_value];
        truth.magnified = vec![1.0; rows];
        truth.denominators = vec![0.0; rows];
        truth.far = vec![None; rows];
        return truth;
    }
    each_problem(spec, inputs, fade, causal, |problem| {
        let found = oracle::attention(problem);
        for row in 0..found.shifts.len() {
            let (head, query) = (row / s.queries, row % s.queries);
            let all = magnitudes(problem, head, query, found.shifts[row]);
            truth.magnified.push(all / found.scaled_denominators[row].abs());
        }
        truth.y.extend(found.y);
        truth.denominators.extend(found.scaled_denominators);
        truth.far.extend(found.far);
    });
    truth
}

/// Σ over keys of the magnitudes that one query's weights are made of, times exp(−shift): for a
/// fixed series each |a_p| (Σ_i |q_i k_i|/c)^p, the magnitudes of its features' products; the weight
/// itself where it is exact or fitted per query.
fn magnitudes(problem: &Problem, head: usize, query: usize, shift: f64) -> f64 {
    let log_decays = problem.log_decays(problem.kv_head(head), query);
    let (mut sum, mut far, mut far_decays, mut sizes) = (0.0, vec![], vec![], vec![]);
    let shape = problem.shape;
    let row = |x: &'_ [f64], at: usize| x[at * shape.d_key..][..shape.d_key].to_vec();
    let q = row(problem.q, head * shape.queries + query);
    for (key, &log_decay) in log_decays.iter().enumerate() {
        if problem.sees(query, key) {
            let x = problem.logit(head, query, key);
            if problem.is_near(query, key) {
                sum += (log_decay + x - shift).exp();
            } else {
                far.push(x);
                far_decays.push(log_decay);
                let k = row(problem.k, problem.kv_head(head) * shape.keys + key);
                let size: f64 = q.iter().zip(&k).map(|(q, k)| (q * k).abs()).sum();
                sizes.push(size * problem.scale.abs());
            }
        }
    }
    if far.is_empty() {
        return sum;
    }
    match problem.series.coefficients(problem.terms) {
        Some(a) => {
            for (x, log_decay) in sizes.iter().zip(&far_decays) {
                let size: f64 =
                    a.iter().enumerate().map(|(p, a)| (a * x.powi(p as i32)).abs()).sum();
                sum += (log_decay - shift).exp() * size;
            }
        }
        None => {
            let measure = Measure::new(far.clone(), &far_decays);
            let kernel = FarKernel::new(&problem.series, problem.terms, &measure);
            for (x, log_decay) in far.iter().zip(&far_decays) {
                sum += (log_decay + kernel.log_scale() - shift).exp() * kernel.value(*x).abs();
            }
        }
    }
    sum
}

/// Fails unless the relative RMS error is at most `tolerance`, and NaN is where the oracle has it;
/// names the worst row. Each row counts divided by what rounding may grow by: an output N / D is off
/// by δN / D and by y δD / D, so by the magnitudes over the denominator times 1 (a value) or |y|.
#[track_caller]
pub fn assert_rows<E: Element>(what: &str, got: &[E], truth: &Truth, tolerance: f64) {
    let error = row_error(what, got, truth);
    if error.relative > tolerance {
        let d = truth.d_value;
        let row = error.worst;
        panic!(
            "{what}: relative RMS error {:e} > {tolerance:e}; worst row {row}: got {:?}, want {:?}, \
             rounding grows by {:e}",
            error.relative,
            f64s(&got[row * d..(row + 1) * d]),
            &truth.y[row * d..(row + 1) * d],
            truth.magnified[row],
        );
    }
}

/// Fails unless the relative RMS error without the worst twentieth of rows, and one, is at most
/// `tolerance`, and no row is off by more than its size: for sums of which rounding can take away what
/// a few rows depend on.
#[track_caller]
pub fn assert_most_rows<E: Element>(what: &str, got: &[E], truth: &Truth, tolerance: f64) {
    let error = row_error(what, got, truth);
    let mut rows = error.rows.clone();
    rows.sort_by(|a, b| a.0.total_cmp(&b.0));
    rows.truncate(rows.len() - rows.len().min(1 + rows.len() / 20));
    let (off, norm) = rows.iter().fold((0.0, 0.0), |sum, row| (sum.0 + row.0, sum.1 + row.1));
    assert!(
        off <= norm * tolerance.powi(2) && error.relative < 1.0,
        "{what}: relative RMS error of most rows {:e} > {tolerance:e}, of all {:e}, worst row {}",
        (off / norm).sqrt(),
        error.relative,
        error.worst,
    );
}

/// A relative RMS error, the row that has most of it, and of each row that sees a key its squared error
/// and square.
pub struct RowError {
    pub relative: f64,
    pub worst: usize,
    pub rows: Vec<(f64, f64)>,
}

#[track_caller]
pub fn row_error<E: Element>(what: &str, got: &[E], truth: &Truth) -> RowError {
    assert_eq!(got.len(), truth.y.len(), "{what}");
    let (mut error, mut norm, mut worst, mut most) = (0.0, 0.0, 0, -1.0);
    let (mut rows, got) = (vec![], f64s(got));
    for (row, (got, want)) in
        got.chunks(truth.d_value).zip(truth.y.chunks(truth.d_value)).enumerate()
    {
        if want.iter().any(|y| y.is_nan()) {
            let nan = got.iter().all(|y| y.is_nan());
            assert!(nan, "{what}: row {row} is {got:?} though it sees no key");
            continue;
        }
        let size = (want.iter().map(|w| w * w).sum::<f64>() / want.len() as f64).sqrt();
        let by = truth.magnified[row].max(1.0) * size.max(1.0);
        let off: f64 = got.iter().zip(want).map(|(g, w)| ((g - w) / by).powi(2)).sum();
        let square = want.iter().map(|w| (w / by).powi(2)).sum::<f64>();
        rows.push((off, square));
        norm += square;
        error += off;
        if off > most || off.is_nan() {
            (worst, most) = (row, off);
        }
    }
    let relative = match (error, norm) {
        (error, _) if error.is_nan() => f64::INFINITY,
        (error, norm) if error == 0.0 && norm == 0.0 => 0.0,
        _ => (error / norm).sqrt(),
    };
    RowError { relative, worst, rows }
}
