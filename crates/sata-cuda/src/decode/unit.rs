//! The kernel, specialised.

use std::fmt::Write;

use sata::basis::features_of_order;
use sata::{Decay, Near, Series, Spec};

use super::params::Params;
use super::{Recipe, Sizes};
use crate::state::capacity;
use crate::{Element, SumsType, Unit, unit};

/// Whether the coefficients of a series are each query's own.
pub(crate) fn is_per_query(spec: &Spec) -> bool {
    spec.coefficients().is_none()
}

/// The unit of a spec, for a state of these orders.
pub(crate) fn unit<E: Element>(
    spec: &Spec,
    orders: &[usize],
    sizes: &Sizes,
    recipe: &Recipe,
    sums: SumsType,
) -> Unit {
    let mut starts = vec![0u128];
    for &p in orders {
        starts.push(starts[starts.len() - 1] + features_of_order(sizes.d_key, p));
    }
    let near = match spec.near() {
        Near::None => -1,
        // A spec's near blocks have at most 2³¹ tokens.
        Near::Blocks(n) => n as i64,
    };
    let series = match spec.series() {
        Series::Gauss => 1,
        Series::Hermite { .. } => 2,
        _ => 0,
    };
    let fades = match spec.decay() {
        Decay::None => 0,
        Decay::Slopes => 1,
        Decay::Gates => 2,
    };
    let highest = orders.last().copied().unwrap_or(0);
    let terms = spec.coefficients().map_or(spec.terms(), |a| a.len());
    unit!("decode.cu")
        .define("D_KEY", sizes.d_key)
        .define("D_VALUE", sizes.d_value)
        .define("FEATURES", sizes.features)
        .define("GROUP", sizes.group)
        .define("PASS", recipe.pass)
        .define("NUMBER", E::KERNEL_NAME)
        .define("HIGHEST", highest)
        .define("TERMS", terms)
        .define("SERIES", series)
        .define("ORDER_COUNT", orders.len())
        .define("ORDERS", list(orders))
        .define("STARTS", list(&starts))
        .define("NEAR", near)
        .define("BLOCK", spec.block())
        .define("CAPACITY", capacity(spec))
        .define("SINKS", spec.sinks())
        .define("FADES", fades)
        .define("WARPS", recipe.warps)
        .define("TEAM", recipe.team)
        .define("LANE_ROWS", recipe.lane_rows)
        .define("IN_FLIGHT", recipe.in_flight)
        .define("ONCE", u32::from(recipe.once))
        .define("FOLD_TOKENS", recipe.fold_tokens)
        .define("MIN_BLOCKS", recipe.blocks)
        .define("SUMS", if sums == SumsType::Bf16 { 1 } else { 0 })
        .define("SHARED_BYTES", recipe.shared_bytes(sizes))
        .size_of::<Params>("DECODE_BYTES")
        .hot()
}

/// As the initialiser of an array.
fn list(values: &[impl std::fmt::Display]) -> String {
    let mut out = String::from("{");
    for (i, value) in values.iter().enumerate() {
        // A string takes whatever is written.
        let _ = write!(out, "{}{value}", if i > 0 { ", " } else { "" });
    }
    out + "}"
}
