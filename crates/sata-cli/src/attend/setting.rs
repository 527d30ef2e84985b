//! The attention that the arguments describe.

use sata::{Near, Spec};

use super::AttendArgs;
use super::decay::Fading;
use super::input::Input;
use crate::failure::{Failure, Outcome};

/// The spec of a call.
///
/// # Errors
/// What the library refuses, and arguments that do not go together.
pub fn spec(args: &AttendArgs, input: &Input, fading: &Fading<'_>) -> Outcome<Spec> {
    if let (true, Near::Blocks(n)) = (args.full, args.near.near()) {
        return Err(Failure::new(format!(
            "--near {n} with --full: full attention has no order, so no block is a query's own"
        ))
        .hint("leave one of them away; --sinks goes with --full"));
    }
    let [q, _, v] = input.shapes;
    let mut builder = Spec::new(q[3], v[3])
        .series(args.series.read()?)
        .near(args.near.near())
        .block(args.block)
        .sinks(args.sinks)
        .decay(fading.decay());
    if let Some(terms) = args.terms {
        builder = builder.terms(terms);
    }
    if let Some(scale) = args.scale {
        builder = builder.scale(scale);
    }
    let spec = builder.build()?;
    let orders = spec.orders();
    if args.diagnose && !(0..3).all(|order| orders.contains(&order)) {
        return Err(Failure::new(format!(
            "--diagnose needs the orders 0, 1 and 2, but --series {} with {} terms has {orders:?}",
            args.series,
            spec.terms()
        )));
    }
    if args.center && orders.iter().enumerate().any(|(i, &order)| i != order) {
        return Err(Failure::new(format!(
            "--center needs a series of all orders below its highest, but --series {} has {orders:?}",
            args.series
        )));
    }
    Ok(spec)
}
