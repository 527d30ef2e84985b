//! Specs that mix everything, for tests of states.

use sata::{Decay, Near, Series, Spec};

use super::Sizes;

/// A spec without sizes.
#[derive(Clone, Debug)]
pub struct Setting {
    pub series: Series,
    pub terms: usize,
    pub near: Near,
    pub block: usize,
    pub sinks: usize,
    pub decay: Decay,
}

impl Setting {
    pub fn spec(&self, s: Sizes) -> Spec {
        super::calls::spec(s, &self.series, self.terms)
            .near(self.near)
            .block(self.block)
            .sinks(self.sinks)
            .decay(self.decay)
            .build()
            .unwrap()
    }

    /// The relative RMS error allowed, over that of its type, for f64 and f32. See [`slack`].
    pub fn slack(&self) -> [f64; 2] {
        slack(&self.series, self.terms, self.decay)
    }
}

/// The relative RMS error allowed, over that of its type, for f64 and f32.
///
/// A series that is fitted per query is fitted to moments that rounding has touched. Where a query's
/// far logits are few, or all but a few have decayed, the fit has nodes of next to no weight, which
/// rounding can take away: what they weighed is lost then. Logits are taken to deviate by at most 2.
pub fn slack(series: &Series, terms: usize, decay: Decay) -> [f64; 2] {
    match series {
        Series::Gauss if terms <= 2 => [10.0, 10.0],
        Series::Gauss if terms <= 4 => [1e3, if decay == Decay::None { 10.0 } else { 100.0 }],
        Series::Gauss => [1e4, if decay == Decay::None { 300.0 } else { 3000.0 }],
        Series::Hermite { .. } => [100.0, 10.0],
        _ => [1.0, 1.0],
    }
}

/// One of everything, and mixtures.
pub fn settings() -> Vec<Setting> {
    let of = |series, terms, near, block, sinks, decay| Setting {
        series,
        terms,
        near,
        block,
        sinks,
        decay,
    };
    let fixed = Series::Fixed { coefficients: vec![0.7, 0.0, 0.3] };
    let (none, blocks) = (Near::None, Near::Blocks);
    vec![
        of(Series::Taylor, 3, blocks(0), 8, 0, Decay::None),
        of(Series::Taylor, 3, none, 8, 5, Decay::None),
        of(Series::Taylor, 3, none, 8, 0, Decay::Slopes),
        of(Series::Taylor, 3, none, 8, 0, Decay::Gates),
        of(Series::Gauss, 4, none, 8, 0, Decay::None),
        of(Series::hermite(), 3, none, 8, 0, Decay::None),
        of(Series::Taylor, 3, blocks(1), 8, 5, Decay::Gates),
        of(Series::Taylor, 4, blocks(2), 3, 1, Decay::Slopes),
        of(Series::Gauss, 4, blocks(1), 4, 3, Decay::Gates),
        of(Series::Gauss, 2, none, 8, 17, Decay::Gates),
        of(Series::hermite(), 3, blocks(0), 5, 20, Decay::Slopes),
        of(Series::Hermite { tau: 1.0 }, 2, blocks(1), 6, 0, Decay::Gates),
        of(Series::power(2), 3, blocks(1), 1, 2, Decay::Gates),
        of(fixed, 3, blocks(3), 2, 0, Decay::Slopes),
    ]
}
