//! Tables of a set of orders on the device: what each feature is the product of.

use sata::Spec;
use sata::basis::{Basis, features};

use super::params::Group;
use crate::problem::is_per_query;
use crate::{Buffer, Device, Error};

/// Features of a group at most: those of a step of the reading kernel.
const GROUP: usize = 32;
/// The highest order there are tables for.
const MOST_ORDER: usize = 128;
/// Set in the first factor of a feature whose others, but the last, are those of the one before.
const SAME_PREFIX: u32 = 1 << 31;

/// The features of some orders.
#[derive(Debug)]
pub(super) struct Tables {
    pub orders: Vec<usize>,
    pub features: usize,
    /// Factors that each feature has room for.
    pub width: usize,
    /// `[features][width]`, padded with `d_key`.
    pub factors: Buffer<u32>,
    /// `[features]`.
    pub multiplicities: Buffer<f32>,
    /// The first feature of each order, and the number of all.
    starts: Vec<usize>,
}

impl Tables {
    pub(super) fn new(device: &Device, d_key: usize, orders: &[usize]) -> Result<Self, Error> {
        let highest = orders.last().copied().unwrap_or(0);
        let count = features(d_key, orders);
        if highest > MOST_ORDER || count > i32::MAX as u128 {
            let what = format!("order {highest} of keys of {d_key}, with {count} features,");
            return Err(Error::Unsupported { what });
        }
        let basis = Basis::new(d_key, orders)?;
        let width = highest.max(1);
        let mut factors = Vec::with_capacity(basis.len() * width);
        for tile in basis.tiles() {
            let prefix_len = tile.order.saturating_sub(1);
            for (r, run) in basis.runs()[tile.runs.clone()].iter().enumerate() {
                let prefix = &basis.prefixes()[tile.prefixes + r * prefix_len..][..prefix_len];
                for i in 0..run.len {
                    let at = factors.len();
                    factors.extend_from_slice(prefix);
                    if tile.order > 0 {
                        factors.push(run.first + i);
                    }
                    factors.resize(at + width, d_key as u32);
                    if i > 0 {
                        factors[at] |= SAME_PREFIX;
                    }
                }
            }
        }
        let multiplicities: Vec<f32> = basis.multiplicities().iter().map(|&m| m as f32).collect();
        let mut starts = vec![0];
        for &order in orders {
            starts.push(starts[starts.len() - 1] + features(d_key, &[order]) as usize);
        }
        Ok(Tables {
            orders: orders.to_vec(),
            features: basis.len(),
            width,
            factors: Buffer::from_slice(device, &factors)?,
            multiplicities: Buffer::from_slice(device, &multiplicities)?,
            starts,
        })
    }

    /// The features that a series reads, in groups, and the first group of each plane: one plane
    /// for each order of `reads`, in order, or one for all; `coefficients` by order.
    fn groups(
        &self,
        reads: &[usize],
        coefficients: impl Fn(usize) -> f32,
        each: bool,
    ) -> (Vec<Group>, Vec<i32>) {
        let (mut groups, mut planes) = (vec![], vec![0]);
        for (i, &order) in self.orders.iter().enumerate() {
            if !reads.contains(&order) {
                continue;
            }
            let all = self.starts[i]..self.starts[i + 1];
            groups.extend(all.clone().step_by(GROUP).map(|first| Group {
                first: first as i32,
                count: GROUP.min(all.end - first) as i32,
                order: order as i32,
                coefficient: coefficients(order),
            }));
            if each {
                planes.push(groups.len() as i32);
            }
        }
        if !each {
            planes.push(groups.len() as i32);
        }
        (groups, planes)
    }
}

/// What a series reads of tables.
#[derive(Debug)]
pub(super) struct Reading {
    /// Whether each query has coefficients of its own.
    pub each: bool,
    /// The highest order that is read.
    pub highest: usize,
    /// Numerators of a query: of each order, or of all together.
    pub planes: usize,
    pub groups: Buffer<Group>,
    pub group_count: usize,
    /// The first group of each plane, and the number of all.
    pub plane_groups: Buffer<i32>,
    /// By order: a_p (1 where each query has its own), and the plane, or −1.
    pub coefficients: Buffer<f32>,
    pub plane_of: Buffer<i32>,
}

impl Reading {
    pub(super) fn new(device: &Device, spec: &Spec, tables: &Tables) -> Result<Self, Error> {
        let (each, reads) = (is_per_query(spec), spec.orders());
        let highest = reads.last().copied().unwrap_or(0);
        let fixed = spec.coefficients().unwrap_or_default();
        let coefficient = |order: usize| match each {
            true => 1.0,
            false => fixed.get(order).copied().unwrap_or(0.0) as f32,
        };
        let (groups, plane_groups) = tables.groups(&reads, coefficient, each);
        let coefficients: Vec<f32> = (0..=highest).map(coefficient).collect();
        let plane = |order| reads.iter().position(|&p| p == order).map_or(-1, |at| at as i32);
        let plane_of: Vec<i32> = (0..=highest).map(plane).collect();
        Ok(Reading {
            each,
            highest,
            planes: plane_groups.len() - 1,
            group_count: groups.len(),
            groups: Buffer::from_slice(device, &groups)?,
            plane_groups: Buffer::from_slice(device, &plane_groups)?,
            coefficients: Buffer::from_slice(device, &coefficients)?,
            plane_of: Buffer::from_slice(device, &plane_of)?,
        })
    }
}

#[cfg(all(test, feature = "emulator", unix))]
mod tests {
    use super::*;

    #[test]
    fn factors_are_those_of_the_basis() {
        let device = Device::emulated().unwrap();
        let tables = Tables::new(&device, 3, &[0, 1, 3]).unwrap();
        let factors = tables.factors.to_vec().unwrap();
        assert_eq!(tables.features, 1 + 3 + 10);
        assert_eq!(factors[..6], [3, 3, 3, 0, 3, 3]);
        // Of order 3: 000, 001, 002, 011, …
        let third: Vec<u32> = factors[12..24].iter().map(|f| f & !SAME_PREFIX).collect();
        assert_eq!(third, [0, 0, 0, 0, 0, 1, 0, 0, 2, 0, 1, 1]);
        let same: Vec<bool> = factors.iter().step_by(3).map(|f| f & SAME_PREFIX != 0).collect();
        assert_eq!(same[4..8], [false, true, true, false]);
        let (groups, planes) = tables.groups(&[0, 3], |p| p as f32, true);
        assert_eq!(planes, [0, 1, 2]);
        assert_eq!(groups[1], Group { first: 4, count: 10, order: 3, coefficient: 3.0 });
    }
}
