//! What settings cost: near blocks, series that are chosen per query, decay. Each against going
//! without it, in turn.

use std::fmt;

use sata::{
    Call, DEFAULT_BLOCK, Decay, Form, Near, Plan, Series, Spec, State, View, ViewMut, alibi_slopes,
};

use super::inputs::{normal, rng};
use super::paired::{Paired, paired};
use super::{CpuArgs, Row, Target, decode};
use crate::failure::Outcome;
use crate::table::three;

/// Head sizes that it is measured at.
const DIMS: [usize; 2] = [16, 32];

/// One attention of a comparison.
#[derive(Clone, Copy, Debug)]
struct Setting {
    series: fn() -> Series,
    near: Near,
    decay: Decay,
}

/// The paper's.
const PLAIN: Setting = Setting { series: || Series::Taylor, near: Near::None, decay: Decay::None };

impl Setting {
    const fn near(self, n: usize) -> Self {
        Setting { near: Near::Blocks(n), ..self }
    }

    const fn series(self, series: fn() -> Series) -> Self {
        Setting { series, ..self }
    }

    fn spec(self, d: usize, terms: usize) -> Outcome<Spec> {
        let Setting { series, near, decay } = self;
        Ok(Spec::new(d, d).terms(terms).series(series()).near(near).decay(decay).build()?)
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.series)() {
            Series::Gauss => write!(f, "gauss")?,
            Series::Hermite { .. } => write!(f, "hermite")?,
            _ => write!(f, "taylor")?,
        }
        if let Near::Blocks(n) = self.near {
            write!(f, " near {n}")?;
        }
        if self.decay == Decay::Slopes {
            write!(f, " slopes")?;
        }
        Ok(())
    }
}

/// What is compared with what, and the most that the ratio of their times should be.
type Comparison = (Setting, Setting, Option<f64>);

const fn gauss() -> Series {
    Series::Gauss
}

/// Comparisons of prefill.
const PREFILL: [Comparison; 7] = [
    (PLAIN.near(0), PLAIN, Some(1.0)),
    (PLAIN.near(1), PLAIN, Some(1.0)),
    (PLAIN.series(gauss), PLAIN, Some(1.25)),
    (PLAIN.near(1).series(gauss), PLAIN.near(1), Some(1.25)),
    (PLAIN.series(Series::hermite), PLAIN, Some(1.25)),
    (PLAIN.near(1).series(Series::hermite), PLAIN.near(1), Some(1.25)),
    (Setting { decay: Decay::Slopes, ..PLAIN }, PLAIN, None),
];

/// Comparisons of decode.
const DECODE: [Comparison; 3] = [
    (PLAIN.near(1).series(gauss), PLAIN.near(1), Some(1.15)),
    (PLAIN.near(1).series(Series::hermite), PLAIN.near(1), Some(1.15)),
    (PLAIN.near(1), PLAIN, None),
];

/// Those of them that can have so many terms.
fn possible(all: &[Comparison], terms: usize) -> impl Iterator<Item = Comparison> {
    let fits = move |setting: Setting| terms.is_multiple_of(2) || (setting.series)() != gauss();
    all.iter().copied().filter(move |&(first, ..)| fits(first))
}

fn dims(args: &CpuArgs) -> impl Iterator<Item = usize> {
    args.dims.iter().copied().filter(|d| DIMS.contains(d))
}

fn row(args: &CpuArgs, what: String, (first, second, most): Comparison, times: Paired) -> Row {
    let target = most.filter(|_| args.terms == 4 && !args.quick);
    Row {
        what: format!("{what}, {first} over {second}"),
        measured: format!("{} ns/token/head", three(times.first * 1e9)),
        baseline: format!("{} ns/token/head", three(times.second * 1e9)),
        ratio: times.ratio,
        target: target.map(Target::AtMost),
    }
}

impl Paired {
    /// The same per token and head.
    fn over(self, tokens: usize) -> Self {
        let tokens = tokens as f64;
        Paired { first: self.first / tokens, second: self.second / tokens, ..self }
    }
}

/// Prefill, on the threads of the pool that it runs in.
pub fn prefill(args: &CpuArgs) -> Outcome<Vec<Row>> {
    let tokens = if args.quick { args.tokens.min(4096) } else { args.tokens };
    let slopes = alibi_slopes(args.heads);
    let rounds = if args.quick { 3 } else { 7 };
    let mut rows = vec![];
    for d in dims(args) {
        let shape = [1, args.heads, tokens, d];
        let n = shape.iter().product();
        let mut rng = rng();
        let [q, k, v]: [Vec<f32>; 3] = std::array::from_fn(|_| normal(&mut rng, n));
        let run = |plan: &Plan, y: &mut [f32]| {
            let view = |x| View::new(x, shape);
            let mut call = Call::causal(view(&q)?, view(&k)?, view(&v)?);
            if plan.spec().decay() == Decay::Slopes {
                call = call.slopes(&slopes);
            }
            plan.run(call, ViewMut::new(y, shape)?)?;
            Ok(())
        };
        let [mut y, mut z] = [q.clone(), q.clone()];
        for comparison in possible(&PREFILL, args.terms) {
            let plan = |setting: Setting| -> Outcome<Plan> {
                Ok(Plan::new(&setting.spec(d, args.terms)?)?.with_form(Form::State))
            };
            let (first, second) = (plan(comparison.0)?, plan(comparison.1)?);
            let times = paired(rounds, || run(&first, &mut y), || run(&second, &mut z))?;
            let what = format!("prefill f32 d={d} P={}", args.terms);
            rows.push(row(args, what, comparison, times.over(tokens * args.heads)));
        }
    }
    Ok(rows)
}

/// Decode steps, with as many heads as do not fit in any cache, and with few.
pub fn decode(args: &CpuArgs) -> Outcome<Vec<Row>> {
    let mut rows = vec![];
    for d in dims(args) {
        for heads in decode::head_counts(args, d)? {
            let n = heads * d;
            let mut rng = rng();
            let [q, k, v]: [Vec<f32>; 3] = std::array::from_fn(|_| normal(&mut rng, n * STEPS));
            let rounds = match args.quick {
                true => 3,
                false if heads > 8 => 7,
                false => 51,
            };
            for comparison in possible(&DECODE, args.terms) {
                let decoder = |setting: Setting| {
                    Decoder::new(&setting.spec(d, args.terms)?, heads, [&q, &k, &v])
                };
                let (mut first, mut second) = (decoder(comparison.0)?, decoder(comparison.1)?);
                let times = paired(rounds, || first.block(), || second.block())?;
                let what = format!("decode f32 d={d} P={}, {heads} heads", args.terms);
                rows.push(row(args, what, comparison, times.over(heads * STEPS)));
            }
        }
    }
    Ok(rows)
}

/// Steps that are timed together: one block, so that one fold is in every measurement.
const STEPS: usize = DEFAULT_BLOCK;

/// A past that goes on, step by step.
struct Decoder<'a> {
    plan: Plan,
    state: State<f32>,
    qkv: [&'a [f32]; 3],
    y: Vec<f32>,
}

impl<'a> Decoder<'a> {
    /// One whose near blocks are full and whose far past has begun.
    fn new(spec: &Spec, heads: usize, qkv: [&'a [f32]; 3]) -> Outcome<Self> {
        let plan = Plan::new(spec)?;
        let state = State::new(&plan, 1, heads)?;
        let mut decoder = Decoder { plan, state, qkv, y: vec![0.0; heads * spec.d_value()] };
        let near = match spec.near() {
            Near::None => 0,
            Near::Blocks(n) => n + 1,
        };
        for _ in 0..=near {
            decoder.block()?;
        }
        Ok(decoder)
    }

    fn block(&mut self) -> Outcome {
        let n = self.y.len();
        let shape = [1, self.state.kv_heads(), 1, self.plan.spec().d_value()];
        for step in 0..STEPS {
            let view = |x: &'a [f32]| View::new(&x[step * n..][..n], shape);
            let [q, k, v] = self.qkv;
            let y = ViewMut::new(&mut self.y, shape)?;
            self.plan.step(&mut self.state, view(q)?, view(k)?, view(v)?, y)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gauss_is_compared_where_it_can_be() {
        let names = |terms| {
            let name = |(first, second, _)| format!("{first} over {second}");
            possible(&DECODE, terms).map(name).collect::<Vec<_>>()
        };
        let all = [
            "gauss near 1 over taylor near 1",
            "hermite near 1 over taylor near 1",
            "taylor near 1 over taylor",
        ];
        assert_eq!(names(4), all);
        assert_eq!(names(3), all[1..]);
    }
}
