//! The precision floor: how exactly each number type carries the operation out, apart from the
//! truncation of the series.

use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use rayon::prelude::*;
use sata::{Call, Form, Plan, Real, Spec, View, ViewMut};
use sata_oracle::{Output, Problem, Shape};
use serde::Serialize;

use super::progress::Progress;
use super::random::stratified;
use super::scope::{Scope, TERMS};
use crate::errors::Errors;
use crate::failure::{Failure, Outcome};
use crate::plot::{Axis, COLORS, Figure, Key, Mark, Numerals, Panel, Style};
use crate::tensors::{Data, Number};

/// Queries compared, spread over the second half of the context.
pub const QUERIES: usize = 48;

/// Names of the number types, in the order of the figure.
pub const TYPES: [&str; 4] = ["f64", "f32", "f16", "bf16"];

/// Errors of one number of terms, length and number type.
#[derive(Clone, Debug, Serialize)]
pub struct Floor {
    /// P.
    pub terms: usize,
    /// Tokens of the context.
    pub tokens: usize,
    /// f64, f32, f16 or bf16: what inputs and outputs are held in.
    pub dtype: &'static str,
    /// Relative RMS against the f64 oracle of the same operation on the same, rounded inputs.
    pub arithmetic: f64,
    /// The same against the oracle on the inputs before they were rounded to this type.
    pub with_rounded_inputs: f64,
    /// Relative RMS of the operation itself against softmax, in f64.
    pub truncation: f64,
}

/// Units of work, for the progress bar.
pub fn units(scope: &Scope) -> u64 {
    scope.floor_tokens.iter().map(|&tokens| unit(tokens)).sum::<u64>() * TERMS.len() as u64
}

fn unit(tokens: usize) -> u64 {
    1 + tokens as u64 / 8192
}

/// One context and the queries that are looked at.
struct Context {
    d: usize,
    tokens: usize,
    qkv: [Vec<f64>; 3],
    positions: Vec<usize>,
}

/// Measures all lengths and numbers of terms.
///
/// # Errors
/// What the library refuses, which on an ordinary machine is nothing.
pub fn run(scope: &Scope, progress: &Progress) -> Outcome<Vec<Floor>> {
    let mut all = vec![];
    let d = scope.floor_head;
    for &tokens in &scope.floor_tokens {
        let mut rng = StdRng::seed_from_u64(scope.seed.wrapping_add(tokens as u64));
        let mut draw = || (0..tokens * d).map(|_| rng.sample(StandardNormal)).collect();
        let context = Context {
            d,
            tokens,
            qkv: [draw(), draw(), draw()],
            positions: stratified(scope.seed, tokens / 2..tokens, QUERIES),
        };
        let softmax = context.oracle(&context.qkv, 1, sata_oracle::softmax_attention);
        for terms in TERMS {
            progress.doing(format!("precision floor: P = {terms}, {tokens} tokens"));
            let exact = context.oracle(&context.qkv, terms, sata_oracle::attention);
            let truncation = relative(&exact, &softmax)?;
            let mut push = |dtype, (arithmetic, with_rounded_inputs)| {
                all.push(Floor {
                    terms,
                    tokens,
                    dtype,
                    arithmetic,
                    with_rounded_inputs,
                    truncation,
                });
            };
            push(TYPES[0], context.errors::<f64>(terms, &exact)?);
            push(TYPES[1], context.errors::<f32>(terms, &exact)?);
            push(TYPES[2], context.errors::<f16>(terms, &exact)?);
            push(TYPES[3], context.errors::<bf16>(terms, &exact)?);
            progress.done(unit(tokens));
        }
    }
    Ok(all)
}

fn relative(got: &[f64], want: &[f64]) -> Outcome<f64> {
    Errors::new(got.iter().copied(), want)
        .map(|errors| errors.relative_rms)
        .ok_or_else(|| Failure::new("no finite output"))
}

impl Context {
    /// Errors of the engine on inputs of type `E`: against the oracle of those, and against
    /// `exact`.
    fn errors<E: Number>(&self, terms: usize, exact: &[f64]) -> Outcome<(f64, f64)> {
        let [q, k, v] = self.qkv.each_ref().map(|x| E::take(&Data::F64(x.clone())));
        let rounded = [&q, &k, &v].map(|x| E::wrap(x.clone()).to_f64());
        let plan = Plan::new(&Spec::new(self.d, self.d).terms(terms).build()?)?;
        let plan = plan.with_form(Form::State);
        let shape = [1, 1, self.tokens, self.d];
        let mut y = vec![E::from_compute(E::Compute::ZERO); q.len()];
        let call =
            Call::causal(View::new(&q, shape)?, View::new(&k, shape)?, View::new(&v, shape)?);
        plan.run(call, ViewMut::new(&mut y, shape)?)?;
        let y = E::wrap(y).to_f64();
        let rows = self.positions.iter().flat_map(|&t| &y[t * self.d..(t + 1) * self.d]);
        let got: Vec<f64> = rows.copied().collect();
        let same = self.oracle(&rounded, terms, sata_oracle::attention);
        Ok((relative(&got, &same)?, relative(&got, exact)?))
    }

    /// The oracle's outputs at the positions.
    fn oracle(
        &self,
        [q, k, v]: &[Vec<f64>; 3],
        terms: usize,
        attention: fn(&Problem<'_>) -> Output,
    ) -> Vec<f64> {
        let d = self.d;
        let one = |&t: &usize| {
            let (query_heads, kv_heads, queries, keys) = (1, 1, 1, t + 1);
            let shape = Shape { query_heads, kv_heads, queries, keys, d_key: d, d_value: d };
            let (q, k, v) = (&q[t * d..(t + 1) * d], &k[..(t + 1) * d], &v[..(t + 1) * d]);
            let mut problem = Problem::new(shape, q, k, v);
            problem.offset = t;
            problem.terms = terms;
            attention(&problem).y
        };
        self.positions.par_iter().flat_map_iter(one).collect()
    }
}

/// The floor by length, a panel for each number of terms.
pub fn figure(all: &[Floor], scope: &Scope) -> Figure {
    let high = scope.floor_tokens.iter().copied().max().unwrap_or(1) as f64;
    let values = |terms: usize, dtype: &str, of: fn(&Floor) -> f64| -> Vec<(f64, f64)> {
        all.iter()
            .filter(|floor| floor.terms == terms && floor.dtype == dtype)
            .map(|floor| (floor.tokens as f64, of(floor)))
            .collect()
    };
    let panel = |terms: usize| {
        let mut marks = vec![Mark::Line {
            points: values(terms, TYPES[0], |floor| floor.truncation),
            color: COLORS[5].into(),
            style: Style::Dashed,
        }];
        for (dtype, color) in TYPES.into_iter().zip(COLORS) {
            let points = values(terms, dtype, |floor| floor.arithmetic);
            marks.push(Mark::line(points.clone(), color));
            marks.push(Mark::dots(points, color));
            if dtype != TYPES[0] {
                let points = values(terms, dtype, |floor| floor.with_rounded_inputs);
                marks.push(Mark::Line { points, color: color.into(), style: Style::Dotted });
            }
        }
        Panel {
            title: format!("P = {terms}"),
            x: Axis::log("tokens in context", 1e3, high, Numerals::Counts),
            y: Axis::log("relative error (RMS)", 1e-17, 1.0, Numerals::Powers),
            marks,
        }
    };
    let mut keys: Vec<Key> = TYPES
        .into_iter()
        .zip(COLORS)
        .map(|(dtype, color)| Key::line(format!("{dtype}, same inputs"), color, Style::Solid))
        .collect();
    keys.push(Key::line("with inputs rounded", "#999999", Style::Dotted));
    keys.push(Key::line("truncation of the series", COLORS[5], Style::Dashed));
    Figure {
        id: "floor".into(),
        title: "Precision floor · Errors of arithmetic apart from truncation".into(),
        subtitle: vec![format!(
            "state form, d = {}, N(0, 1), causal; against the f64 oracle of the same operation; \
             f16 and bf16 include rounding the output",
            scope.floor_head
        )],
        columns: 2,
        panels: TERMS.map(panel).into(),
        keys,
    }
}
