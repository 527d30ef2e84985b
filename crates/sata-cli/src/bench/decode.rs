//! Decode on one core: against a plain read of the same bytes, and in microseconds.

use sata::{Plan, Spec, State, View, ViewMut, cost};

use super::inputs::{normal, rng};
use super::{CpuArgs, Row, Target, baseline, median};
use crate::failure::Outcome;
use crate::table::three;

/// Steps that are timed together: one block, so that one fold is in every measurement.
const STEPS: usize = sata::DEFAULT_BLOCK;

pub fn rows(args: &CpuArgs) -> Outcome<Vec<Row>> {
    let mut rows = vec![];
    for &d in &args.dims {
        let spec = Spec::new(d, d).terms(args.terms).build()?;
        let bytes = far_bytes(&spec);
        for heads in head_counts(args, d)? {
            rows.push(row(args, &spec, heads, bytes)?);
        }
    }
    Ok(rows)
}

/// Bytes of the far sums of one head.
fn far_bytes(spec: &Spec) -> usize {
    cost::state_bytes(spec.d_key(), spec.d_value(), &spec.orders(), 4, false) as usize
}

/// As many heads as fill memory beyond any cache: a model has many heads, and other work between
/// two steps. Then few, as in a small model whose states stay in cache.
pub fn head_counts(args: &CpuArgs, d: usize) -> Outcome<Vec<usize>> {
    let bytes = far_bytes(&Spec::new(d, d).terms(args.terms).build()?);
    let limit = if args.quick { 1 << 26 } else { 1 << 28 };
    let many = (limit / bytes).clamp(1, 4096);
    Ok(match args.decode_heads {
        Some(heads) => vec![heads.max(1)],
        None if many > 8 => vec![many, 8],
        None => vec![many],
    })
}

fn row(args: &CpuArgs, spec: &Spec, heads: usize, bytes: usize) -> Outcome<Row> {
    let d = spec.d_key();
    let plan = Plan::new(spec)?;
    let mut state = State::<f32>::new(&plan, 1, heads)?;
    let mut rng = rng();
    let n = heads * d;
    let q: Vec<f32> = normal(&mut rng, n * STEPS);
    let k: Vec<f32> = normal(&mut rng, n * STEPS);
    let v: Vec<f32> = normal(&mut rng, n * STEPS);
    let mut y = vec![0f32; n];
    let shape = [1, heads, 1, d];
    let time = median(if args.quick { 3 } else { 5 }, || {
        for step in 0..STEPS {
            let part = step * n..(step + 1) * n;
            let view = |x| View::new(x, shape);
            plan.step(
                &mut state,
                view(&q[part.clone()])?,
                view(&k[part.clone()])?,
                view(&v[part])?,
                ViewMut::new(&mut y, shape)?,
            )?;
        }
        Ok(())
    })?;
    let each = time / (STEPS * heads) as f64;
    let rate = bytes as f64 / each;
    // The same number of bytes in as many arrays.
    let copies: Vec<Vec<f32>> = (0..heads).map(|_| normal(&mut rng, 1).repeat(bytes / 4)).collect();
    let parts: Vec<&[f32]> = copies.iter().map(Vec::as_slice).collect();
    let read = baseline::read(&parts, 7)?;
    let what = format!("decode f32 d={d} P={}, {heads} heads", args.terms);
    let measured = format!("{} µs/head-step, {} GB/s", three(each * 1e6), three(rate / 1e9));
    let target = |t| (args.terms == 4 && !args.quick).then_some(t);
    Ok(if d <= 16 {
        Row {
            what,
            measured,
            baseline: format!("µs; plain read {} GB/s", three(read / 1e9)),
            ratio: each * 1e6,
            target: match d {
                8 => target(Target::AtMost(1.5)),
                16 => target(Target::AtMost(8.0)),
                _ => None,
            },
        }
    } else {
        Row {
            what,
            measured,
            baseline: format!("plain read {} GB/s", three(read / 1e9)),
            ratio: rate / read,
            target: match d {
                32 | 64 => target(Target::AtLeast(0.6)),
                _ => None,
            },
        }
    })
}
