//! Tables of the features, for the kernels of the backward pass.

use sata::Spec;
use sata::basis::Basis;

use crate::{Buffer, Device, Error};

/// Features that a tile of runs has.
pub(crate) const TILE: usize = 32;
/// Features are padded to a multiple of this.
const PADDED: usize = 128;

/// The tables on the host.
#[derive(Debug)]
pub(crate) struct Rows {
    /// Of each feature: where its prefix begins, and its last index.
    pub features: Vec<[u32; 2]>,
    /// Prefixes, one index less than [`order`] each.
    pub prefixes: Vec<u16>,
    /// Multiplicity times coefficient.
    pub factors: Vec<f32>,
    /// Of each run of features with a common prefix: its first last index, its length, the prefix,
    /// and zeros up to [`run_len`] numbers; and one more, to be read ahead.
    pub runs: Vec<u16>,
    /// Runs before each tile of [`TILE`] features.
    pub tile_runs: Vec<i32>,
}

/// Indices of each monomial: those of lower orders begin with `d_key`, which stands for 1.
pub(crate) fn order(terms: usize) -> usize {
    terms.saturating_sub(1).max(1)
}

/// Numbers that describe a run.
pub(crate) fn run_len(terms: usize) -> usize {
    (order(terms) + 1).next_multiple_of(4)
}

/// Orders of the monomials that a spec keeps, the highest and one more for `terms`.
pub(crate) fn terms(spec: &Spec) -> usize {
    spec.orders().last().map_or(1, |highest| highest + 1)
}

impl Rows {
    pub fn new(basis: &Basis, coefficients: &[f64], terms: usize) -> Self {
        let (d_key, width) = (basis.d_key(), order(terms) - 1);
        let count = basis.len().next_multiple_of(PADDED);
        let mut rows = Rows {
            features: Vec::with_capacity(count),
            prefixes: vec![d_key as u16; width.max(1)],
            factors: Vec::with_capacity(count),
            runs: vec![],
            tile_runs: vec![],
        };
        let mut last_prefix: Vec<u16> = rows.prefixes[..width].to_vec();
        let mut prefix_at = 0;
        let run_len = run_len(terms);
        for tile in basis.tiles() {
            let own = tile.order.saturating_sub(1);
            for (r, run) in basis.runs()[tile.runs.clone()].iter().enumerate() {
                let indices = &basis.prefixes()[tile.prefixes + r * own..][..own];
                let mut prefix = vec![d_key as u16; width - own];
                prefix.extend(indices.iter().map(|&i| i as u16));
                if prefix != last_prefix {
                    prefix_at = rows.prefixes.len();
                    rows.prefixes.extend(&prefix);
                    last_prefix = prefix;
                }
                for i in run.first..run.first + run.len {
                    let last = if tile.order == 0 { d_key as u32 } else { i };
                    rows.push(prefix_at as u32, last, &last_prefix, run_len);
                    let at = rows.features.len() - 1;
                    let factor = basis.multiplicities()[at] * coefficients[tile.order];
                    rows.factors.push(factor as f32);
                }
            }
        }
        rows.tile_runs.push((rows.runs.len() / run_len) as i32);
        rows.runs.resize(rows.runs.len() + run_len, 0);
        rows.features.resize(count, [0, d_key as u32]);
        rows.factors.resize(count, 0.0);
        rows
    }

    fn push(&mut self, prefix_at: u32, last: u32, prefix: &[u16], run_len: usize) {
        let begins = self.features.len().is_multiple_of(TILE);
        if begins {
            self.tile_runs.push((self.runs.len() / run_len) as i32);
        }
        let follows = self.features.last() == Some(&[prefix_at, last.wrapping_sub(1)]);
        if follows && !begins {
            let at = self.runs.len() - run_len + 1;
            self.runs[at] += 1;
        } else {
            let end = self.runs.len() + run_len;
            self.runs.extend([last as u16, 1]);
            self.runs.extend(prefix);
            self.runs.resize(end, 0);
        }
        self.features.push([prefix_at, last]);
    }
}

/// The tables on the device.
#[derive(Debug)]
pub(crate) struct Features {
    pub count: usize,
    pub features: Buffer<[u32; 2]>,
    pub prefixes: Buffer<u16>,
    pub factors: Buffer<f32>,
    pub runs: Buffer<u16>,
    pub tile_runs: Buffer<i32>,
    /// a_p.
    pub coefficients: Buffer<f32>,
}

impl Features {
    /// Those of a spec whose coefficients are the same for every query.
    pub fn new(device: &Device, spec: &Spec, basis: &Basis) -> Result<Self, Error> {
        let terms = terms(spec);
        let mut a = spec.coefficients().unwrap_or_default();
        // Coefficients may end in zeros.
        a.resize(terms, 0.0);
        let rows = Rows::new(basis, &a, terms);
        let coefficients: Vec<f32> = a.iter().map(|&a| a as f32).collect();
        Ok(Features {
            count: basis.len(),
            features: Buffer::from_slice(device, &rows.features)?,
            prefixes: Buffer::from_slice(device, &rows.prefixes)?,
            factors: Buffer::from_slice(device, &rows.factors)?,
            runs: Buffer::from_slice(device, &rows.runs)?,
            tile_runs: Buffer::from_slice(device, &rows.tile_runs)?,
            coefficients: Buffer::from_slice(device, &coefficients)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_is_in_one_run_of_its_tile() {
        for (d_key, orders) in [
            (1, vec![0]),
            (3, vec![0, 1]),
            (5, vec![0, 1, 2, 3]),
            (17, vec![0, 2]),
            (4, vec![5]),
            (33, vec![0, 1, 2]),
        ] {
            let basis = Basis::new(d_key, &orders).unwrap();
            let terms = orders[orders.len() - 1] + 1;
            let width = order(terms) - 1;
            let rows = Rows::new(&basis, &vec![1.0; terms], terms);
            let mut seen = 0;
            for (tile, bounds) in rows.tile_runs.windows(2).enumerate() {
                assert_eq!(seen, tile * TILE);
                for run in bounds[0] as usize..bounds[1] as usize {
                    let run = &rows.runs[run * run_len(terms)..][..run_len(terms)];
                    for i in run[0]..run[0] + run[1] {
                        let [prefix, last] = rows.features[seen];
                        assert_eq!(last, u32::from(i));
                        assert_eq!(run[2..][..width], rows.prefixes[prefix as usize..][..width]);
                        seen += 1;
                    }
                }
            }
            assert_eq!(seen, basis.len());
            // Monomials are those of the basis, by their value at a point.
            let x: Vec<f64> = (0..d_key).map(|i| 1.0 + 0.1 * i as f64).collect();
            let value = |i: usize| if i == d_key { 1.0 } else { x[i] };
            for &p in &orders {
                for f in basis.order_range(p).unwrap() {
                    let [prefix, last] = rows.features[f];
                    let prefix = &rows.prefixes[prefix as usize..][..width];
                    let ones = prefix.iter().filter(|&&i| usize::from(i) == d_key).count();
                    assert_eq!(ones, width + 1 - p.max(1));
                    let product = prefix.iter().map(|&i| value(i.into())).product::<f64>();
                    assert!(product * value(last as usize) >= 1.0);
                    assert_eq!(rows.factors[f], basis.multiplicities()[f] as f32);
                }
            }
            assert!(rows.features.len() >= basis.len());
            assert!(rows.features.len().is_multiple_of(PADDED));
        }
    }
}
