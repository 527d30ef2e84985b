//! What a forward and a backward pass together take over the forward pass, in turn.

use sata::{Call, Decay, Gradients, Near, Plan, Series, Spec, View, ViewMut};

use super::inputs::{normal, rng};
use super::paired::paired;
use super::{CpuArgs, Row, Target};
use crate::failure::Outcome;
use crate::table::three;

/// The most that both passes should take of the forward one.
const MOST: f64 = 4.5;

/// An attention that is trained.
struct Setting {
    what: &'static str,
    series: Series,
    terms: usize,
    near: Near,
    decay: Decay,
}

/// Those that are measured at a head size.
fn settings(d: usize) -> Vec<Setting> {
    let plain =
        |what, series, terms| Setting { what, series, terms, near: Near::None, decay: Decay::None };
    let trained = |what, terms| Setting {
        near: Near::Blocks(1),
        decay: Decay::Gates,
        ..plain(what, Series::Taylor, terms)
    };
    let mut all = vec![plain("taylor P=3", Series::Taylor, 3)];
    if d <= 32 {
        all.push(plain("taylor P=4", Series::Taylor, 4));
    }
    all.push(trained("taylor P=3 near 1 gates", 3));
    if d <= 16 {
        all.push(trained("taylor P=5 near 1 gates", 5));
    }
    all.push(plain("power 2", Series::power(2), 3));
    all
}

/// Rows for long sequences, which take the state form, and short ones, which take the direct form.
pub fn rows(args: &CpuArgs) -> Outcome<Vec<Row>> {
    let long = if args.quick { args.tokens.min(2048) } else { args.tokens };
    let mut rows = vec![];
    for &d in &args.dims {
        for setting in settings(d) {
            for tokens in [512, long] {
                rows.push(row(args, d, &setting, tokens)?);
            }
        }
    }
    Ok(rows)
}

fn row(args: &CpuArgs, d: usize, setting: &Setting, tokens: usize) -> Outcome<Row> {
    let shape = [1, args.heads, tokens, d];
    let n: usize = shape.iter().product();
    let mut rng = rng();
    let mut numbers = || normal::<f32>(&mut rng, n);
    let (q, k, v, dy) = (numbers(), numbers(), numbers(), numbers());
    let gate_shape = [1, args.heads, tokens, 1];
    let gates: Vec<f32> = k.iter().take(args.heads * tokens).map(|x| -0.02 * x * x).collect();
    let (mut y, mut dq, mut dk, mut dv) = (q.clone(), q.clone(), q.clone(), q.clone());
    let mut d_gates = gates.clone();
    let builder = Spec::new(d, d).series(setting.series.clone()).near(setting.near);
    let builder = match setting.series {
        Series::Taylor => builder.terms(setting.terms),
        _ => builder,
    };
    let plan = Plan::new(&builder.decay(setting.decay).build()?)?;
    let gated = setting.decay == Decay::Gates;
    let call = || {
        let call =
            Call::causal(View::new(&q, shape)?, View::new(&k, shape)?, View::new(&v, shape)?);
        Outcome::Ok(if gated { call.log_gates(View::new(&gates, gate_shape)?) } else { call })
    };
    let forward = |y: &mut [f32]| -> Outcome {
        plan.run(call()?, ViewMut::new(y, shape)?)?;
        Ok(())
    };
    let mut both = |y: &mut [f32]| -> Outcome {
        plan.run(call()?, ViewMut::new(y, shape)?)?;
        let out = Gradients::new(
            ViewMut::new(&mut dq, shape)?,
            ViewMut::new(&mut dk, shape)?,
            ViewMut::new(&mut dv, shape)?,
        );
        let out = if gated { out.log_gates(ViewMut::new(&mut d_gates, gate_shape)?) } else { out };
        plan.backward(call()?, View::new(&dy, shape)?, out)?;
        Ok(())
    };
    let mut other = y.clone();
    let rounds = if args.quick { 3 } else { 5 };
    let times = paired(rounds, || both(&mut y), || forward(&mut other))?;
    let per = 1e9 / (args.heads * tokens) as f64;
    let recipe = plan.recipe::<f32>([args.heads, 1], [tokens; 2], true, false, args.threads);
    Ok(Row {
        what: format!("backward d={d} {}, {tokens} tokens ({:?})", setting.what, recipe.form),
        measured: format!("forward and backward {} ns/token/head", three(times.first * per)),
        baseline: format!("forward {} ns", three(times.second * per)),
        ratio: times.ratio,
        target: (!args.quick).then_some(Target::AtMost(MOST)),
    })
}
