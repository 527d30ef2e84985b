//! The oracle's answer in f64, row by row, and how far rounding may lead away from it.

use rayon::prelude::*;
use sata::{Near, Series, Spec};
use sata_cuda::Element;
use sata_oracle::kernel::{FarKernel, Measure};
use sata_oracle::{self as oracle, Problem};

use super::inputs::{Inputs, wide};
use crate::failure::{Failure, Outcome};

/// One query's output.
#[derive(Clone, Debug)]
pub struct Row {
    /// Which row of `[batch, query_heads, queries]`.
    pub index: usize,
    /// NaN where the query sees no key.
    pub y: Vec<f64>,
    /// The sum of the magnitudes that its denominator is made of over its own: what rounding may
    /// grow by, at least 1.
    pub magnified: f64,
}

/// The oracle's name of a series.
///
/// # Errors
/// For one that it does not have.
pub fn oracle_series(series: &Series) -> Outcome<oracle::Series> {
    Ok(match series {
        Series::Taylor => oracle::Series::Taylor,
        Series::Fixed { coefficients } => oracle::Series::Fixed(coefficients.clone()),
        Series::Power { exponent, floor } => {
            oracle::Series::Power { exponent: *exponent, floor: *floor }
        }
        Series::Gauss => oracle::Series::Gauss,
        Series::Hermite { tau } => oracle::Series::Hermite { tau: *tau },
        other => return Err(Failure::new(format!("the oracle does not have {other:?}"))),
    })
}

/// Inputs in f64, from which problems are cut.
pub struct Wide<'i> {
    spec: &'i Spec,
    series: oracle::Series,
    causal: bool,
    inputs: Inputs<f32>,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    gates: Option<Vec<f64>>,
}

impl<'i> Wide<'i> {
    /// Of inputs of any type.
    ///
    /// # Errors
    /// For a series that the oracle does not have.
    pub fn new<E: Element>(spec: &'i Spec, inputs: &Inputs<E>, causal: bool) -> Outcome<Self> {
        Ok(Wide {
            spec,
            series: oracle_series(spec.series())?,
            causal,
            q: wide(&inputs.q),
            k: wide(&inputs.k),
            v: wide(&inputs.v),
            gates: inputs.gates.as_ref().map(|gates| gates.iter().map(|&g| g.into()).collect()),
            inputs: Inputs {
                sizes: inputs.sizes,
                q: vec![],
                k: vec![],
                v: vec![],
                mask: inputs.mask.clone(),
                slopes: inputs.slopes.clone(),
                gates: None,
            },
        })
    }

    /// Some queries of one query head, over the keys that they see.
    pub fn problem(
        &self,
        batch: usize,
        query_head: usize,
        queries: std::ops::Range<usize>,
    ) -> Problem<'_> {
        let kv_head = query_head / self.inputs.sizes.group;
        self.cut(batch, kv_head, query_head..query_head + 1, queries)
    }

    /// All queries of the query heads of one key/value head.
    pub fn group(&self, batch: usize, kv_head: usize) -> Problem<'_> {
        let s = self.inputs.sizes;
        self.cut(batch, kv_head, kv_head * s.group..(kv_head + 1) * s.group, 0..s.queries)
    }

    fn cut(
        &self,
        batch: usize,
        kv_head: usize,
        heads: std::ops::Range<usize>,
        queries: std::ops::Range<usize>,
    ) -> Problem<'_> {
        let (s, spec) = (self.inputs.sizes, self.spec);
        let keys = if self.causal { queries.end } else { s.keys };
        let slot = batch * s.kv_heads + kv_head;
        // Queries of several heads are all of them: then they lie side by side.
        let q = ((batch * s.query_heads() + heads.start) * s.queries + queries.start) * s.d_key;
        let decay = match (&self.gates, &self.inputs.slopes) {
            (Some(gates), _) => oracle::Decay::LogGates(gates[slot * s.keys..][..keys].to_vec()),
            (_, Some(slopes)) => oracle::Decay::Slopes(vec![slopes[kv_head]]),
            _ => oracle::Decay::None,
        };
        Problem {
            shape: oracle::Shape {
                query_heads: heads.len(),
                kv_heads: 1,
                queries: queries.len(),
                keys,
                d_key: s.d_key,
                d_value: s.d_value,
            },
            q: &self.q[q..][..heads.len() * queries.len() * s.d_key],
            k: &self.k[slot * s.keys * s.d_key..][..keys * s.d_key],
            v: &self.v[slot * s.keys * s.d_value..][..keys * s.d_value],
            scale: spec.scale(),
            causal: self.causal,
            offset: if self.causal { queries.start } else { 0 },
            key_mask: self.inputs.mask.as_ref().map(|mask| &mask[batch * s.keys..][..keys]),
            series: self.series.clone(),
            terms: spec.terms(),
            near: match spec.near() {
                Near::None => oracle::Near::None,
                Near::Blocks(n) => oracle::Near::Blocks(n),
            },
            block: spec.block(),
            sinks: spec.sinks(),
            decay,
        }
    }
}

/// The oracle's rows, those of `indices` or all.
///
/// # Errors
/// For a series that the oracle does not have.
pub fn rows<E: Element>(
    spec: &Spec,
    inputs: &Inputs<E>,
    causal: bool,
    indices: Option<&[usize]>,
) -> Outcome<Vec<Row>> {
    let wide = Wide::new(spec, inputs, causal)?;
    let all: Vec<usize>;
    let indices = match indices {
        Some(indices) => indices,
        None => {
            all = (0..inputs.sizes.rows()).collect();
            &all
        }
    };
    Ok(indices.par_iter().map(|&index| row(&wide, index)).collect())
}

fn row(wide: &Wide<'_>, index: usize) -> Row {
    let s = wide.inputs.sizes;
    let (batch, rest) =
        (index / (s.query_heads() * s.queries), index % (s.query_heads() * s.queries));
    let (head, query) = (rest / s.queries, rest % s.queries);
    let problem = wide.problem(batch, head, query..query + 1);
    if !(0..problem.shape.keys).any(|key| problem.sees(0, key)) {
        return Row { index, y: vec![f64::NAN; s.d_value], magnified: 1.0 };
    }
    let found = oracle::attention(&problem);
    let magnitudes = magnitudes(&problem, found.shifts[0]);
    let magnified = (magnitudes / found.scaled_denominators[0].abs()).max(1.0);
    Row { index, y: found.y, magnified }
}

/// Σ over keys of the magnitudes that the weights of the problem's only query are made of, times
/// exp(−shift): for a series of the same coefficients for all each |a_p| (Σ_i |q_i k_i|/c)^p, the
/// magnitudes of its features' products; the weight itself where it is exact, or fitted per query.
fn magnitudes(problem: &Problem<'_>, shift: f64) -> f64 {
    let log_decays = problem.log_decays(0, 0);
    let q = problem.query(0, 0);
    let (mut sum, mut far, mut far_decays, mut sizes) = (0.0, vec![], vec![], vec![]);
    for (key, &log_decay) in log_decays.iter().enumerate() {
        if !problem.sees(0, key) {
            continue;
        }
        let x = problem.logit(0, 0, key);
        if problem.is_near(0, key) {
            sum += (log_decay + x - shift).exp();
            continue;
        }
        far.push(x);
        far_decays.push(log_decay);
        let size: f64 = q.iter().zip(problem.key(0, key)).map(|(q, k)| (q * k).abs()).sum();
        sizes.push(size * problem.scale.abs());
    }
    if far.is_empty() {
        return sum;
    }
    match problem.series.coefficients(problem.terms) {
        Some(a) => {
            for (x, log_decay) in sizes.iter().zip(&far_decays) {
                let size = a.iter().rev().fold(0.0, |sum, a| sum * x + a.abs());
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

/// How far outputs `[rows, d_value]` are from the oracle's rows: relative RMS, where each row counts
/// over what rounding may grow by. An output N / D is off by δN / D and by y δD / D, so by the
/// magnitudes over the denominator times 1 (a value) or |y|. Infinite where an output is not a number
/// and should be, or the other way round. Rows of which rounding may leave no denominator at all do
/// not count.
pub fn error<E: Element>(got: &[E], rows: &[Row]) -> f64 {
    let (mut error, mut norm) = (0.0, 0.0);
    let vanishes = |row: &&Row| row.magnified * rounding::<E>() >= 1.0;
    for row in rows.iter().filter(|row| !vanishes(row)) {
        let got = wide(&got[row.index * row.y.len()..][..row.y.len()]);
        if row.y.iter().any(|y| y.is_nan()) {
            if !got.iter().all(|y| y.is_nan()) {
                return f64::INFINITY;
            }
            continue;
        }
        let size = (row.y.iter().map(|y| y * y).sum::<f64>() / row.y.len() as f64).sqrt();
        let by = row.magnified * size.max(1.0);
        error += got.iter().zip(&row.y).map(|(g, y)| ((g - y) / by).powi(2)).sum::<f64>();
        norm += row.y.iter().map(|y| (y / by).powi(2)).sum::<f64>();
    }
    match (error, norm) {
        (error, _) if error.is_nan() => f64::INFINITY,
        (0.0, _) => 0.0,
        _ => (error / norm).sqrt(),
    }
}

/// The most that rounding to `E` changes a number by, over the number.
fn rounding<E: Element>() -> f64 {
    let halves = (1..).map(|n| 0.5f32.powi(n));
    let seen = |by: &f32| E::from_compute(1.0 + by).to_compute() > 1.0;
    halves.take_while(seen).last().map_or(1.0, |by| f64::from(by) / 2.0)
}
