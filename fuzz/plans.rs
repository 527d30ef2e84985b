//! The plans that state files are read for.

use sata::{Decay, Near, Plan, Series, Spec};

/// A few small ones.
pub fn plans() -> Vec<Plan> {
    [
        Spec::new(2, 1).terms(2).block(4),
        Spec::new(3, 2).terms(4).block(2),
        Spec::new(2, 3).series(Series::power(4)).block(8),
        Spec::new(1, 1).terms(1).block(1),
        Spec::new(2, 2).series(Series::Fixed { coefficients: vec![1.0, 0.0, 0.3] }).block(4),
        Spec::new(2, 1).series(Series::Gauss).terms(2).near(Near::Blocks(1)).block(2).sinks(3),
        Spec::new(2, 1).terms(3).near(Near::Blocks(0)).block(3).sinks(1).decay(Decay::Gates),
    ]
    .map(|spec| Plan::new(&spec.build().unwrap()).unwrap())
    .into()
}
