//! Figure A3 of the paper: how well conventional attention is recovered over 102,400 tokens, beside
//! what the paper's public reference implementation gives.

use std::ops::Range;

use half::{bf16, f16};
use sata::Spec;
use sata_cuda::Element;
use serde::Serialize;

use super::inputs::{Inputs, Sizes, wide};
use super::machine::{Engine, How};
use crate::errors::Errors;
use crate::failure::{Failure, Outcome};
use crate::reproduce::random::Sample;
use crate::reproduce::scope::TOKENS;
use crate::reproduce::truth::{LAST, Truth};

/// log10|Y−Ŷ| of the reference: head size, terms, at 5, 25, 50, 75, 95 and 99.9 %, and the median of
/// the last 1,024 tokens.
type Row = (usize, usize, [f64; 6], f64);

#[expect(clippy::approx_constant, reason = "measured numbers happen to be −3.14")]
const REFERENCE: [Row; 13] = [
    (8, 3, [-3.98, -3.21, -2.80, -2.42, -1.92, -1.13], -2.95),
    (8, 4, [-4.36, -3.54, -3.07, -2.65, -2.06, -1.29], -3.22),
    (8, 5, [-4.72, -3.82, -3.30, -2.83, -2.15, -1.38], -3.45),
    (8, 6, [-5.19, -4.21, -3.63, -3.10, -2.29, -1.50], -3.78),
    (16, 3, [-3.85, -3.12, -2.75, -2.43, -1.98, -1.20], -2.92),
    (16, 4, [-4.15, -3.41, -3.01, -2.66, -2.16, -1.42], -3.18),
    (16, 5, [-4.44, -3.67, -3.24, -2.85, -2.29, -1.55], -3.40),
    (16, 6, [-4.83, -4.02, -3.55, -3.13, -2.50, -1.69], -3.71),
    (32, 3, [-3.79, -3.08, -2.72, -2.43, -2.02, -1.22], -2.89),
    (32, 4, [-4.07, -3.35, -2.98, -2.67, -2.23, -1.46], -3.14),
    (32, 5, [-4.31, -3.58, -3.20, -2.87, -2.40, -1.63], -3.36),
    (64, 3, [-3.77, -3.06, -2.71, -2.43, -2.04, -1.25], -2.89),
    (64, 4, [-4.03, -3.32, -2.97, -2.68, -2.28, -1.50], -3.14),
];

/// How far a median may be above the reference's: 0.02, and half a unit of its last digit. Below it,
/// as far again as medians of single draws of inputs deviate, twice: the reference is one draw.
const MEDIAN: f64 = 0.02 + 0.005;
/// How far above the reference's the 75 % and 95 % quantiles may be, likewise.
const UPPER: f64 = 0.02 + 0.005;
/// The 99.9 % quantile: some hundred numbers of few queries decide it, here and there.
const HIGHEST: f64 = 0.15;
/// The median of the last tokens: of a thousand queries.
const OF_LAST: f64 = 0.05;
/// Numbers that are compared, spread over the whole context and over draws of inputs.
const ELEMENTS: usize = 1 << 18;
const ELEMENTS_QUICK: usize = 1 << 15;
/// Numbers of a token over all draws of inputs: those of one draw of small heads are off by 0.02.
const WIDTH: usize = 128;

/// One head size, number of terms and type.
#[derive(Clone, Debug, Serialize)]
pub struct Recovered {
    /// d_K = d_V.
    pub d: usize,
    /// P.
    pub terms: usize,
    /// Of q, k, v and outputs.
    pub dtype: &'static str,
    /// Draws of inputs, a head each.
    pub draws: usize,
    /// Queries that were compared over the whole context.
    pub queries: usize,
    /// Denominators of all tokens that were not positive, or not finite.
    pub bad_denominators: u64,
    /// log10|Y−Ŷ| at 5, 25, 50, 75, 95 and 99.9 %.
    pub quantiles: [f64; 6],
    /// Its median over the last 1,024 tokens.
    pub last: f64,
    /// How far the medians of single draws deviate.
    pub median_deviation: f64,
    /// How far those of the last 1,024 tokens do.
    pub last_deviation: f64,
    /// Its largest.
    pub largest: f64,
    /// ‖Y−Ŷ‖ / ‖Y‖.
    pub relative_rms: f64,
    /// The reference's quantiles, with f16 inputs.
    pub reference: [f64; 6],
    /// The reference's median over the last 1,024 tokens.
    pub reference_last: f64,
    /// What is not as it should be.
    pub faults: Vec<String>,
    /// Whether all is.
    pub pass: bool,
}

/// What a setting is called.
pub fn name(d: usize, terms: usize, dtype: &str) -> String {
    format!("recovery d={d} P={terms} {dtype}")
}

/// All settings of the reference whose names are wanted, in f16 as it had them, and in bf16.
///
/// # Errors
/// What the library refuses, or the device has no room for.
pub fn run(
    engine: &Engine,
    seed: u64,
    quick: bool,
    wanted: impl Fn(&str) -> bool,
    mut done: impl FnMut(&Recovered) -> Outcome,
) -> Outcome<Vec<Recovered>> {
    let mut all = vec![];
    for d in [8, 16, 32, 64] {
        let [of_f16, of_bf16] = [f16::KERNEL_NAME, bf16::KERNEL_NAME].map(|dtype| {
            let wanted = |row: &&Row| row.0 == d && wanted(&name(d, row.1, dtype));
            REFERENCE.iter().filter(wanted).collect::<Vec<_>>()
        });
        if quick && d > 16 || of_f16.is_empty() && of_bf16.is_empty() {
            continue;
        }
        let draws: Vec<Sample> = (0..WIDTH as u64 / d as u64)
            .map(|draw| Sample::new(seed.wrapping_add(1000 * draw), d, TOKENS))
            .collect();
        let elements = if quick { ELEMENTS_QUICK } else { ELEMENTS };
        let inputs = Draws { seed, d, elements, draws: &draws };
        of_type::<f16>(engine, &inputs, &of_f16, &mut all, &mut done)?;
        of_type::<bf16>(engine, &inputs, &of_bf16, &mut all, &mut done)?;
    }
    Ok(all)
}

/// Which of a truth's rows are looked at.
type Indices = fn(&Truth) -> Vec<usize>;

/// The standard deviation of some numbers, 0 of one.
fn deviation(x: &[f64]) -> f64 {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0)).sqrt()
}

/// Inputs of some heads.
struct Draws<'d> {
    seed: u64,
    d: usize,
    elements: usize,
    draws: &'d [Sample],
}

fn of_type<E: Element>(
    engine: &Engine,
    inputs: &Draws<'_>,
    rows: &[&Row],
    all: &mut Vec<Recovered>,
    done: &mut impl FnMut(&Recovered) -> Outcome,
) -> Outcome {
    if rows.is_empty() {
        return Ok(());
    }
    let Draws { seed, d, elements, draws } = *inputs;
    let heads = draws.len();
    let mut truths = vec![];
    let mut qkv: [Vec<E>; 3] = Default::default();
    for (i, draw) in draws.iter().enumerate() {
        let narrow = |x: &Vec<f32>| x.iter().map(|&x| E::from_compute(x)).collect::<Vec<E>>();
        let own = [0, 1, 2].map(|i| narrow(&draw.qkv[i]));
        let exact = [0, 1, 2].map(|i: usize| wide(&own[i]));
        let seed = seed.wrapping_add(i as u64);
        truths.push(Truth::new(seed, d, &exact, Some(elements / d / heads))?);
        qkv.iter_mut().zip(own).for_each(|(all, own)| all.extend(own));
    }
    let [q, k, v] = qkv;
    let sizes = Sizes { kv_heads: heads, ..Sizes::new(TOKENS, d, d) };
    let inputs = Inputs { sizes, q, k, v, mask: None, slopes: None, gates: None };
    for &&(_, terms, reference, reference_last) in rows {
        let spec = Spec::new(d, d).terms(terms).build()?;
        let mut machine = engine.machine(&spec, &inputs, true, How::default())?;
        let found = machine.whole(None)?;
        let y = machine.y()?;
        drop(machine);
        // Rows of all draws that a truth has at some indices.
        let errors = |heads: Range<usize>, indices: Indices| -> Outcome<Errors> {
            let (mut got, mut want) = (vec![], vec![]);
            for head in heads {
                let truth = &truths[head];
                for i in indices(truth) {
                    let at = (head * TOKENS + truth.positions[i]) * d;
                    got.extend(wide(&y[at..at + d]));
                    want.extend_from_slice(truth.row(i));
                }
            }
            Errors::new(got, &want)
                .ok_or_else(|| Failure::new(format!("d = {d}, P = {terms}: no finite output")))
        };
        let all_tokens: Indices = |truth| truth.uniform.clone();
        let last_tokens: Indices = |truth| truth.within(TOKENS - LAST..TOKENS).collect();
        let (over_all, over_last) = (errors(0..heads, all_tokens)?, errors(0..heads, last_tokens)?);
        let spread = |indices: Indices| -> Outcome<f64> {
            let medians: Outcome<Vec<f64>> = (0..heads)
                .map(|head| Ok(errors(head..head + 1, indices)?.log10_median()))
                .collect();
            Ok(deviation(&medians?))
        };
        let (median_deviation, last_deviation) = (spread(all_tokens)?, spread(last_tokens)?);
        let quantiles = over_all.log10_absolute;
        let mut faults = vec![];
        let mut check = |name: &str, fine: bool, got: f64, want: f64| {
            if !fine {
                faults.push(format!("{name} is {got:.3}, the reference's {want:.2}"));
            }
        };
        let fits = |off: f64, by: f64, deviation: f64| (-by - 2.0 * deviation..=by).contains(&off);
        let off = quantiles[2] - reference[2];
        check("the median", fits(off, MEDIAN, median_deviation), quantiles[2], reference[2]);
        for (i, name, by) in [(3, "75 %", UPPER), (4, "95 %", UPPER), (5, "99.9 %", HIGHEST)] {
            check(name, quantiles[i] <= reference[i] + by, quantiles[i], reference[i]);
        }
        let last = over_last.log10_median();
        let off = last - reference_last;
        check("the last tokens' median", fits(off, OF_LAST, last_deviation), last, reference_last);
        if over_all.not_finite > 0 {
            faults.push(format!("{} outputs are not finite", over_all.not_finite));
        }
        let recovered = Recovered {
            d,
            terms,
            dtype: E::KERNEL_NAME,
            draws: heads,
            queries: truths.iter().map(|truth| truth.uniform.len()).sum(),
            bad_denominators: found.non_positive + found.non_finite,
            quantiles,
            last,
            median_deviation,
            last_deviation,
            largest: over_all.log10_largest,
            relative_rms: over_all.relative_rms,
            reference,
            reference_last,
            pass: faults.is_empty(),
            faults,
        };
        done(&recovered)?;
        all.push(recovered);
    }
    Ok(())
}
