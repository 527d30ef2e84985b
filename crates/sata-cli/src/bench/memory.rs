//! Working memory of a long prefill.

use sata::{Call, Plan, Spec, View, ViewMut};

use super::inputs::{normal, rng};
use super::{CpuArgs, Row, Target};
use crate::failure::Outcome;
use crate::machine;
use crate::table::three;

pub fn rows(args: &CpuArgs) -> Outcome<Vec<Row>> {
    let tokens = if args.quick { 1 << 17 } else { 1_000_000 };
    let d = 16;
    let mut rng = rng();
    let (q, k, v): (Vec<f32>, Vec<f32>, Vec<f32>) =
        (normal(&mut rng, tokens * d), normal(&mut rng, tokens * d), normal(&mut rng, tokens * d));
    // Written, so that its pages are there before the measurement.
    let mut y = vec![1f32; tokens * d];
    let shape = [1, 1, tokens, d];
    let plan = Plan::new(&Spec::new(d, d).terms(args.terms).build()?)?;
    let Some(before) = machine::resident() else {
        return Ok(vec![]);
    };
    // Forgets the highest resident size so far; where it cannot, the figure is an upper bound.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    let view = |x| View::new(x, shape);
    plan.run(Call::causal(view(&q)?, view(&k)?, view(&v)?), ViewMut::new(&mut y, shape)?)?;
    let peak = machine::peak_resident().unwrap_or(before);
    let used = peak.saturating_sub(before) as f64 / 1e6;
    Ok(vec![Row {
        what: format!("prefill f32 of {tokens} tokens, d={d} P={}, one head", args.terms),
        measured: format!("{} MB beyond inputs and outputs", three(used)),
        baseline: "MB".into(),
        ratio: used,
        target: (!args.quick).then_some(Target::AtMost(64.0)),
    }])
}
