//! What all heads of a call share: kernels, sizes, and by what tokens are weighed.

use std::sync::Arc;

use crate::arch::Kernels;
use crate::basis::Tile;
use crate::series::{Noise, Rule};
use crate::state::Centre;
use crate::{Decay, Element, Near, Plan, Real};

/// How a call weighs and mixes.
pub(crate) struct Method<T: 'static> {
    pub kernels: &'static Kernels<T>,
    pub d_key: usize,
    pub d_value: usize,
    /// d_value in whole vectors.
    pub padded: usize,
    pub scale: T,
    pub near: Near,
    pub block: usize,
    pub sinks: usize,
    /// Whether weights fade.
    pub fades: bool,
    /// How coefficients are made.
    pub rule: Rule,
    /// The series' orders, ascending.
    pub orders: Vec<usize>,
    /// What far sums are multiplied by, by order: a_p, or 1 where coefficients are each query's.
    pub coefficients: Vec<T>,
    /// Where coefficients are each query's: the plane of numerators that each order goes to.
    /// Empty: there is one plane.
    pub planes_of: Vec<usize>,
    /// P.
    pub terms: usize,
    /// What rounding leaves in sums, but for how far logits reach.
    pub noise: Noise,
    /// Whether far logits are to be reported.
    pub diagnose: bool,
    pub centre: Option<Arc<Centre>>,
}

impl<T: Real> Method<T> {
    /// That of a plan, with what its state takes off keys and values.
    pub(super) fn of<E: Element<Compute = T>>(
        plan: &Plan,
        centre: Option<Arc<Centre>>,
        diagnose: bool,
    ) -> Self {
        let spec = plan.spec();
        let fixed = spec.coefficients();
        let each = fixed.is_none() || centre.is_some() || diagnose;
        let kernels = plan.kernels::<E>();
        let orders = spec.orders();
        let highest = orders.last().copied().unwrap_or(0);
        let mut coefficients = vec![T::ZERO; highest + 1];
        let mut planes_of = vec![];
        if each {
            planes_of = vec![0; highest + 1];
            for (plane, &order) in orders.iter().enumerate() {
                coefficients[order] = T::ONE;
                planes_of[order] = plane;
            }
        } else if let Some(fixed) = &fixed {
            coefficients = fixed.iter().map(|&a| T::from_f64(a)).collect();
        }
        let mut terms = spec.terms();
        let rule = match (spec.series(), fixed) {
            (crate::Series::Hermite { tau }, _) => Rule::Hermite { tau: *tau },
            (_, Some(mut fixed)) => {
                // Coefficients may end in zeros.
                terms = highest + 1;
                fixed.truncate(terms);
                Rule::Fixed(fixed)
            }
            _ => Rule::Gauss,
        };
        Method {
            kernels,
            d_key: spec.d_key(),
            d_value: spec.d_value(),
            padded: spec.d_value().next_multiple_of(kernels.lanes),
            scale: T::from_f64(spec.scale()),
            near: spec.near(),
            block: spec.block(),
            sinks: spec.sinks(),
            fades: spec.decay() != Decay::None,
            rule,
            orders,
            coefficients,
            planes_of,
            terms,
            noise: Noise {
                relative: 32.0 * kernels.rounding,
                absolute: 4.0 * kernels.rounding,
                reach: 0.0,
            },
            diagnose,
            centre,
        }
    }

    /// Whether coefficients are each query's own.
    pub(super) fn is_per_query(&self) -> bool {
        !self.planes_of.is_empty()
    }

    /// How many numerators and denominators a query has before they are mixed.
    pub(super) fn planes(&self) -> usize {
        if self.is_per_query() { self.orders.len() } else { 1 }
    }

    /// The plane that an order's numerators go to.
    pub(super) fn plane(&self, order: usize) -> usize {
        self.planes_of.get(order).copied().unwrap_or(0)
    }

    /// What a tile's sums are multiplied by; 0 when the series does not use its order.
    pub(super) fn coefficient(&self, tile: &Tile) -> T {
        self.coefficients.get(tile.order).copied().unwrap_or_default()
    }

    /// How many of the tokens up to the one at `place` (in a count that begins with a block) are
    /// far from it.
    pub(super) fn far(&self, place: usize) -> usize {
        match self.near {
            Near::None => place + 1,
            Near::Blocks(n) => (place / self.block).saturating_sub(n) * self.block,
        }
    }

    /// Tokens that have been folded when `place` tokens have been seen.
    pub(super) fn folded(&self, place: usize) -> usize {
        match self.near {
            Near::None => place / self.block * self.block,
            Near::Blocks(n) => (place / self.block).saturating_sub(n) * self.block,
        }
    }

    /// Whether anything is weighed by exp.
    pub(super) fn has_near(&self) -> bool {
        self.near != Near::None || self.sinks > 0
    }

    /// What is taken off the keys of a head.
    pub(super) fn key_centre(&self, kv_head: usize) -> Option<&[f64]> {
        self.centre.as_ref().map(|centre| &centre.keys[kv_head * self.d_key..][..self.d_key])
    }

    /// What is taken off the values of a head.
    pub(super) fn value_centre(&self, kv_head: usize) -> Option<&[f64]> {
        self.centre.as_ref().map(|centre| &centre.values[kv_head * self.d_value..][..self.d_value])
    }
}
