//! The order in which the Hopper kernels make features (`hopper.cuh` says which), and where each is
//! in the basis.

use std::collections::HashMap;

use sata::basis::Basis;

use crate::plan::each_monomial;

/// Prefixes x_i x_j, i ≤ j < 8, in the kernels' order.
fn pairs() -> impl Iterator<Item = (usize, usize)> {
    [0, 4, 1, 3, 2, 5, 6, 7].into_iter().flat_map(|i| (i..8).map(move |j| (i, j)))
}

/// Elements of a key in a block of neighbouring ones, and features in a block.
pub(super) const BLOCK: usize = 8;

/// Sizes of the kernels for one head size and set of orders.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sizes {
    pub d_key: usize,
    pub d_value: usize,
    /// A bit per order.
    pub orders: u32,
}

impl Sizes {
    pub(super) fn new(d_key: usize, d_value: usize, orders: &[usize]) -> Self {
        Sizes { d_key, d_value, orders: orders.iter().fold(0, |mask, p| mask | 1 << p) }
    }

    pub(super) fn has(&self, order: usize) -> bool {
        self.orders >> order & 1 == 1
    }

    /// Blocks of elements of a key.
    pub(super) fn key_blocks(&self) -> usize {
        self.d_key / BLOCK
    }

    /// Columns: a value, a one, zeros.
    pub(super) fn columns(&self) -> usize {
        (self.d_value + 1).next_multiple_of(8)
    }

    /// Feature blocks of prefixes x_i x_j with both in one block of elements, by last elements.
    fn t_blocks(&self) -> usize {
        if self.has(3) { 36 * self.key_blocks() * self.key_blocks() } else { 0 }
    }

    /// Of those in two blocks of elements, before a third.
    fn r_blocks(&self) -> usize {
        let n = self.key_blocks();
        if self.has(3) { (1..n).map(|b| (n - 1 - b) * 64 * b).sum() } else { 0 }
    }

    fn q_blocks(&self) -> usize {
        let n = self.key_blocks();
        if self.has(2) { n * (n + 1) / 2 * BLOCK } else { 0 }
    }

    pub(super) fn low_blocks(&self) -> usize {
        usize::from(self.has(0)) + if self.has(1) { self.key_blocks() } else { 0 }
    }

    /// Feature blocks in all, padded to whole tiles of 64 features.
    pub(super) fn blocks(&self) -> usize {
        (self.t_blocks() + self.r_blocks() + self.q_blocks() + self.low_blocks())
            .next_multiple_of(8)
    }

    /// Elements of one chunk's sums.
    pub(super) fn elements(&self) -> usize {
        self.blocks() * BLOCK * self.columns()
    }

    /// Warpgroups' worth of work that the sums of a chunk are, `tiles` tiles of 64 features each.
    pub(super) fn sum_items(&self, tiles: usize) -> usize {
        let n = self.key_blocks();
        let groups = 18 / tiles;
        let t = match n {
            _ if !self.has(3) || n == 1 => 0,
            2 => groups,
            _ => n * n.div_ceil(4) * groups,
        };
        let r = if self.has(3) {
            (1..n).map(|b| (n - 1 - b) * (8 * b).div_ceil(tiles)).sum()
        } else {
            0
        };
        let before = if n == 1 { 0 } else { self.t_blocks() + self.r_blocks() };
        t + r + (self.blocks() - before).div_ceil(8).div_ceil(tiles)
    }

    /// The indices of every feature in program order; `None` where a block is padded.
    fn features(&self) -> Vec<Option<Vec<u32>>> {
        let (n, mut all) = (self.key_blocks(), vec![]);
        let mut block = |prefix: &[usize], c: usize| {
            for row in 0..BLOCK {
                let mut indices: Vec<u32> = prefix.iter().map(|&i| i as u32).collect();
                indices.push((BLOCK * c + row) as u32);
                indices.sort_unstable();
                all.push(Some(indices));
            }
        };
        if self.has(3) {
            for a in 0..n {
                for c in 0..n {
                    for (i, j) in pairs() {
                        block(&[BLOCK * a + i, BLOCK * a + j], c);
                    }
                }
            }
            for b in 1..n {
                for c in b + 1..n {
                    for i in 0..BLOCK * b {
                        for j in 0..BLOCK {
                            block(&[i, BLOCK * b + j], c);
                        }
                    }
                }
            }
        }
        if self.has(2) {
            for b in 0..n {
                for c in b..n {
                    for i in 0..BLOCK {
                        block(&[BLOCK * b + i], c);
                    }
                }
            }
        }
        if self.has(1) {
            for c in 0..n {
                block(&[], c);
            }
        }
        if self.has(0) {
            all.push(Some(vec![]));
            all.extend([const { None }; BLOCK - 1]);
        }
        all.resize(self.blocks() * BLOCK, None);
        all
    }
}

/// Where features are, and what a query multiplies each by.
#[derive(Debug, PartialEq)]
pub(super) struct Program {
    /// By place in program order: the feature of the basis, or −1 where there is none or it has been.
    pub places: Vec<i32>,
    /// By feature of the basis: its place.
    pub map: Vec<i32>,
    /// By place: multiplicity, and the order's factor.
    pub coefficients: Vec<f32>,
}

impl Program {
    /// For a basis of just these orders; `factors` by order.
    pub(super) fn new(sizes: &Sizes, basis: &Basis, factors: &[f64]) -> Self {
        let mut index = HashMap::with_capacity(basis.len());
        each_monomial(basis, |indices| {
            let next = index.len() as i32;
            index.insert(indices.to_vec(), next);
        });
        let features = sizes.features();
        let mut program = Program {
            places: vec![-1; features.len()],
            map: vec![-1; basis.len()],
            coefficients: vec![0.0; features.len()],
        };
        for (place, indices) in features.into_iter().enumerate() {
            let Some(indices) = indices else { continue };
            let Some(&feature) = index.get(&indices) else { continue };
            let at = &mut program.map[feature as usize];
            if *at < 0 {
                *at = place as i32;
                program.places[place] = feature;
                let factor = factors.get(indices.len()).copied().unwrap_or(0.0);
                program.coefficients[place] =
                    (basis.multiplicities()[feature as usize] * factor) as f32;
            }
        }
        program
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_has_one_place() {
        for d_key in [8, 16, 24, 32, 40, 64] {
            for orders in [vec![0, 1, 2, 3], vec![0, 1, 2], vec![2], vec![0, 2], vec![3], vec![0]] {
                let sizes = Sizes::new(d_key, 16, &orders);
                let basis = Basis::new(d_key, &orders).unwrap();
                let program = Program::new(&sizes, &basis, &[1.0; 4]);
                assert_eq!(program.places.len(), sizes.blocks() * BLOCK);
                for (feature, &place) in program.map.iter().enumerate() {
                    assert!(place >= 0, "d_key = {d_key}, {orders:?}: feature {feature}");
                    assert_eq!(program.places[place as usize], feature as i32);
                    let multiplicity = basis.multiplicities()[feature] as f32;
                    assert_eq!(program.coefficients[place as usize], multiplicity);
                }
                let used = program.places.iter().filter(|&&p| p >= 0).count();
                assert_eq!(used, basis.len());
            }
        }
    }

    #[test]
    fn padding_is_small_where_heads_are_large() {
        let of = |d| Sizes::new(d, d, &[0, 1, 2, 3]).blocks() * BLOCK;
        assert_eq!([8, 16, 32, 64].map(of), [384, 1408, 7360, 49536]);
    }
}
