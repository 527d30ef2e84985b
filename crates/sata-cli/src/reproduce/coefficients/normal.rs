//! Random inputs whose logits have a known deviation.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use sata::{Call, Form, Plan, View, ViewMut};
use serde::Serialize;

use super::{Series, pairs};
use crate::errors::{Errors, quantile};
use crate::failure::{Failure, Outcome};
use crate::inspect::candidates::{Candidate, Window};
use crate::progress::Progress;
use crate::reproduce::formulas::features;
use crate::reproduce::scope::Scope;
use crate::softmax::{Setting, softmax};

/// d_K = d_V.
pub const HEAD: usize = 32;
/// Keys, all of which every query reads.
pub const KEYS: usize = 4096;
/// Deviations of the logits.
pub const DEVIATIONS: [f64; 4] = [0.5, 1.0, 1.5, 2.0];
/// Numbers of terms.
pub const TERMS: [usize; 5] = [2, 3, 4, 5, 6];

/// What `Hermite` with [`TARGET_TERMS`] terms is to reach at logits of deviation
/// [`TARGET_DEVIATION`].
pub const TARGET: f64 = 0.016;
/// See [`TARGET`].
pub const TARGET_TERMS: usize = 6;
/// See [`TARGET`].
pub const TARGET_DEVIATION: f64 = 1.0;

/// One series and number of terms at one deviation of the logits.
#[derive(Clone, Debug, Serialize)]
pub struct Normal {
    /// s: the logits are q·k/√d of N(0, 1) queries and keys, times this.
    pub deviation: f64,
    /// Which coefficients.
    pub series: Series,
    /// P.
    pub terms: usize,
    /// D.
    pub features: u128,
    /// Queries compared.
    pub queries: usize,
    /// Against f64 softmax.
    pub errors: Errors,
    /// |Ŷ−Y|/|Y| of single queries.
    pub by_query: ByQuery,
    /// Share of queries whose denominator is not positive.
    pub non_positive: f64,
    /// What the engine itself expects where the state has the orders 0, 1 and 2:
    /// √Pr[Poisson(λ) ≥ P], root mean square over queries, with λ = σ² of a query's logits (their
    /// mean square for Taylor).
    pub estimate: Option<f64>,
}

/// Relative errors of single queries in a few numbers.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ByQuery {
    /// Half of them are within this.
    pub median: f64,
    /// Root mean square: what the engine's estimate is one of. It hangs on few queries.
    pub rms: f64,
    /// The worst.
    pub largest: f64,
}

impl ByQuery {
    fn new(got: &[f64], want: &[f64]) -> Self {
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let rows = got.chunks_exact(HEAD).zip(want.chunks_exact(HEAD));
        let mut errors: Vec<f64> = rows
            .map(|(got, want)| {
                let off = norm(&mut got.iter().zip(want).map(|(got, want)| got - want));
                off / norm(&mut want.iter().copied())
            })
            .collect();
        errors.sort_by(f64::total_cmp);
        let rms = norm(&mut errors.iter().copied()) / (errors.len() as f64).sqrt();
        ByQuery { median: quantile(&errors, 0.5), rms, largest: quantile(&errors, 1.0) }
    }
}

/// Units of work, for the progress bar.
pub fn units() -> u64 {
    DEVIATIONS.len() as u64
}

/// Measures every series at every deviation.
///
/// # Errors
/// What the library refuses, which on an ordinary machine is nothing.
pub fn run(scope: &Scope, progress: &Progress) -> Outcome<Vec<Normal>> {
    let context = Context::new(scope.seed, scope.coefficient_queries);
    let mut all = vec![];
    for deviation in DEVIATIONS {
        progress.doing(format!("other coefficients: logits of deviation {deviation}"));
        let at = context.at(deviation)?;
        for (series, terms) in pairs(&TERMS) {
            all.push(at.measure(series, terms)?);
        }
        progress.done(1);
    }
    Ok(all)
}

/// Random queries, keys and values.
struct Context {
    queries: usize,
    qkv: [Vec<f64>; 3],
}

/// A context whose queries are scaled, and its softmax.
struct Scaled<'a> {
    deviation: f64,
    context: &'a Context,
    q: Vec<f64>,
    softmax: Vec<f64>,
}

impl Context {
    fn new(seed: u64, queries: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut draw = |rows| (0..rows * HEAD).map(|_| rng.sample(StandardNormal)).collect();
        let (k, v) = (draw(KEYS), draw(KEYS));
        // Last, so that more queries are the same and some others.
        Context { queries, qkv: [draw(queries), k, v] }
    }

    fn shapes(&self) -> [[usize; 4]; 3] {
        [self.queries, KEYS, KEYS].map(|tokens| [1, 1, tokens, HEAD])
    }

    fn at(&self, deviation: f64) -> Outcome<Scaled<'_>> {
        let [q, k, v] = &self.qkv;
        let q: Vec<f64> = q.iter().map(|q| deviation * q).collect();
        let scale = 1.0 / (HEAD as f64).sqrt();
        let shapes = self.shapes();
        let setting = Setting { shapes, scale, causal: false, key_mask: None, fading: None };
        let softmax = softmax(&setting, [&q, k, v])?;
        Ok(Scaled { deviation, context: self, q, softmax })
    }
}

impl Scaled<'_> {
    fn measure(&self, series: Series, terms: usize) -> Outcome<Normal> {
        let candidate = Candidate { far: Some(series.far(terms)), near: None };
        let window = Window { block: 64, sinks: 0 };
        let Some(spec) = candidate.spec([HEAD; 2], None, window)? else {
            return Err(Failure::new("a series without a description"));
        };
        let diagnose = (0..3).all(|order| spec.orders().contains(&order));
        // The direct form gives the same numbers without sums, of which six terms have many.
        let plan = Plan::new(&spec)?.with_form(Form::Direct);
        let [q_shape, k_shape, v_shape] = self.context.shapes();
        let [_, k, v] = &self.context.qkv;
        let (q, k, v) =
            (View::new(&self.q, q_shape)?, View::new(k, k_shape)?, View::new(v, v_shape)?);
        let mut y = vec![0.0; self.q.len()];
        let call = Call::full(q, k, v).diagnose(diagnose);
        let found = plan.run(call, ViewMut::new(&mut y, q_shape)?)?;
        let by_query = ByQuery::new(&y, &self.softmax);
        let errors = Errors::new(y, &self.softmax)
            .ok_or_else(|| Failure::new(format!("{}: no finite output", candidate.name())))?;
        Ok(Normal {
            deviation: self.deviation,
            series,
            terms,
            features: features(HEAD, terms),
            queries: self.context.queries,
            errors,
            by_query,
            non_positive: found.non_positive as f64 / found.queries as f64,
            estimate: found.heads.first().and_then(|head| head.estimate),
        })
    }
}

#[cfg(test)]
mod tests {
    use sata_oracle::{Problem, Shape};

    use super::*;

    /// Median over median, written out again.
    fn off(got: &[f64], want: &[f64]) -> f64 {
        let median = |mut x: Vec<f64>| {
            x.sort_by(f64::total_cmp);
            (x[(x.len() - 1) / 2] + x[x.len() / 2]) / 2.0
        };
        let differences = got.iter().zip(want).map(|(got, want)| (got - want).abs());
        median(differences.collect()) / median(want.iter().map(|want| want.abs()).collect())
    }

    #[test]
    fn six_terms_that_suit_the_logits_reach_their_target() {
        // Enough that it does not hang on the draw: with 64 queries some seeds miss it.
        let context = Context::new(2026, 512);
        let at = context.at(TARGET_DEVIATION).unwrap();
        let [taylor, hermite] =
            [Series::Taylor, Series::Hermite].map(|series| at.measure(series, TARGET_TERMS));
        let (taylor, hermite) = (taylor.unwrap(), hermite.unwrap());
        let error = |normal: &Normal| normal.errors.relative_median;
        assert!(error(&hermite) <= TARGET, "{hermite:?}");
        assert!(error(&taylor) >= 0.03, "{taylor:?}");
        assert_eq!(hermite.features, 435_897);
        // √Pr[Poisson(1) ≥ 6] = 0.0244, and the logits of queries do not all have deviation 1.
        let estimate = hermite.estimate.unwrap();
        assert!((0.024..0.035).contains(&estimate), "{estimate}");
    }

    #[test]
    fn known_errors_by_query() {
        let mut want = vec![0.0; 2 * HEAD];
        (want[0], want[HEAD]) = (2.0, -4.0);
        let mut got = want.clone();
        (got[3], got[HEAD]) = (0.6, -2.0);
        let errors = ByQuery::new(&got, &want);
        assert!((errors.median - 0.4).abs() < 1e-12 && errors.largest == 0.5);
        assert!((errors.rms - (0.34f64 / 2.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn the_oracle_finds_the_same() {
        let context = Context::new(5, 12);
        for deviation in [0.5, 2.0] {
            let at = context.at(deviation).unwrap();
            for (series, terms) in pairs(&[2, 3, 4, 6]) {
                let shape = Shape {
                    query_heads: 1,
                    kv_heads: 1,
                    queries: context.queries,
                    keys: KEYS,
                    d_key: HEAD,
                    d_value: HEAD,
                };
                let [q, k, v] = &context.qkv;
                let mut problem = Problem::new(shape, q, k, v);
                problem.causal = false;
                problem.scale = deviation / (HEAD as f64).sqrt();
                problem.terms = terms;
                problem.series = match series {
                    Series::Taylor => sata_oracle::Series::Taylor,
                    Series::Gauss => sata_oracle::Series::Gauss,
                    Series::Hermite => sata_oracle::Series::Hermite { tau: 0.9 },
                };
                let got = sata_oracle::attention(&problem);
                let want = off(&got.y, &sata_oracle::softmax_attention(&problem).y);
                let found = at.measure(series, terms).unwrap();
                let error = found.errors.relative_median;
                assert!((error / want - 1.0).abs() < 1e-9, "{found:?}: {want}");
                let negative = got.denominators.iter().filter(|&&x| x <= 0.0).count();
                assert_eq!(found.non_positive, negative as f64 / context.queries as f64);
            }
        }
    }
}
