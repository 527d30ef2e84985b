//! Causal prefill against the matrix product's rate.

use half::bf16;
use sata::{Call, Element, Form, Level, Plan, Spec, View, ViewMut, basis, conventional, cost};

use super::inputs::{normal, rng};
use super::{CpuArgs, Row, Target, baseline, median};
use crate::failure::Outcome;
use crate::table::three;

pub fn rows(args: &CpuArgs) -> Outcome<Vec<Row>> {
    let gemm = baseline::gemm(args.threads)?;
    let mut rows = vec![];
    for dtype in &args.dtype {
        for &d in &args.dims {
            rows.push(match dtype.as_str() {
                "bf16" => row::<bf16>(args, d, gemm)?,
                "f64" => row::<f64>(args, d, gemm)?,
                _ => row::<f32>(args, d, gemm)?,
            });
        }
    }
    Ok(rows)
}

/// What issue and design ask of a rate, as a share of the f32 product's.
fn target(args: &CpuArgs, d: usize, dtype: &str) -> Option<Target> {
    let paper = args.terms == 4 && !args.quick;
    let amx = Level::detect().ok()? == Level::Amx;
    let share = match (dtype, d) {
        ("F32", 32 | 64) => 0.60,
        ("F32", 16) => 0.45,
        ("F32", 8) => 0.25,
        ("BF16", 32 | 64) if amx => 3.0,
        ("BF16", 16) if amx => 1.5,
        _ => return None,
    };
    paper.then_some(Target::AtLeast(share))
}

fn row<E: Element>(args: &CpuArgs, d: usize, gemm: f64) -> Outcome<Row> {
    let tokens = if args.quick { args.tokens.min(4096) } else { args.tokens };
    let shape = [1, args.heads, tokens, d];
    let n: usize = shape.iter().product();
    let mut rng = rng();
    let (q, k, v): (Vec<E>, Vec<E>, Vec<E>) =
        (normal(&mut rng, n), normal(&mut rng, n), normal(&mut rng, n));
    let mut y = q.clone();
    let spec = Spec::new(d, d).terms(args.terms).build()?;
    let plan = Plan::new(&spec)?.with_form(Form::State);
    let runs = if args.quick || d > 32 { 3 } else { 5 };
    let time = median(runs, || {
        let (q, k, v) = (View::new(&q, shape)?, View::new(&k, shape)?, View::new(&v, shape)?);
        plan.run(Call::causal(q, k, v), ViewMut::new(&mut y, shape)?)?;
        Ok(())
    })?;
    let softmax = if args.quick {
        None
    } else {
        Some(median(1, || {
            let (q, k, v) = (View::new(&q, shape)?, View::new(&k, shape)?, View::new(&v, shape)?);
            Ok(conventional::attention(
                q,
                k,
                v,
                spec.scale(),
                true,
                0,
                ViewMut::new(&mut y, shape)?,
            )?)
        })?)
    };
    let pairs = (args.heads * tokens) as f64;
    let flops = cost::useful_flops(d, d, &spec.orders()) as f64 * pairs;
    let features = basis::features(d, &spec.orders());
    let mut measured = format!(
        "{} ns/token/head, {} GFLOP/s",
        three(time / pairs * 1e9),
        three(flops / time / 1e9)
    );
    if let Some(softmax) = softmax {
        measured += &format!(" (softmax {} ns)", three(softmax / pairs * 1e9));
    }
    Ok(Row {
        what: format!("prefill {} d={d} P={} D={features}", E::NAME.to_lowercase(), args.terms),
        measured,
        baseline: format!("gemm f32 1024³ {} GFLOP/s", three(gemm / 1e9)),
        ratio: flops / time / gemm,
        target: target(args, d, E::NAME),
    })
}
