//! The minimal basis: which monomials there are, how often each occurs, in what order they lie.
//!
//! Order p has m_p = C(d+p−1, p) monomials x_{i1}⋯x_{ip} with i1 ≤ … ≤ ip (the paper's (7)), here
//! in lexicographic order of their indices. All monomials with the same first p−1 indices then
//! lie side by side (a *run*), each one multiplication away from their common prefix. Features
//! are the bare monomials; the multiplicity p!/∏n_i! of each, a diagonal of the paper's C_p (8),
//! is applied when a query reads, so sums and files hold plain sums of monomials.

use std::ops::Range;

use crate::Error;

/// Features per tile: what one call of a kernel handles. A tile's panel of features fits in L1.
pub(crate) const TILE: usize = 64;

/// C(n, k), or `None` where it exceeds 128 bits.
pub(crate) fn binomial(n: usize, k: usize) -> Option<u128> {
    if k > n {
        return Some(0);
    }
    let k = k.min(n - k) as u128;
    let n = n as u128;
    let mut c: u128 = 1;
    for i in 0..k {
        // c · (n − i) / (i + 1) is exact at every step; divide common factors out first.
        let (mut a, mut b) = (n - i, i + 1);
        let g = gcd(a, b);
        a /= g;
        b /= g;
        c = (c / b).checked_mul(a)?;
    }
    Some(c)
}

fn gcd(mut a: u128, mut b: u128) -> u128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// m_p, the number of monomials of order `p` in `d_key` variables (7); `u128::MAX` beyond 128 bits.
pub fn features_of_order(d_key: usize, p: usize) -> u128 {
    if p == 0 {
        return 1;
    }
    match d_key.checked_add(p - 1) {
        Some(n) => binomial(n, p).unwrap_or(u128::MAX),
        None => u128::MAX,
    }
}

/// D, the number of monomials over `orders`; saturates at `u128::MAX`.
pub fn features(d_key: usize, orders: &[usize]) -> u128 {
    orders.iter().fold(0, |sum: u128, &p| sum.saturating_add(features_of_order(d_key, p)))
}

/// Monomials of one order with a common prefix, or a part of them: `prefix · x_i` for
/// `i` in `first .. first + len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Leading indices that the previous run of the tile shares (0 for a tile's first run).
    pub keep: u32,
    /// First last index.
    pub first: u32,
    /// How many last indices.
    pub len: u32,
}

/// Up to 64 consecutive features of one order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tile {
    /// The order p.
    pub order: usize,
    /// Place of its first feature among all features of the basis.
    pub start: usize,
    /// How many features.
    pub len: usize,
    /// Its runs, among [`Basis::runs`].
    pub runs: Range<usize>,
    /// Where the runs' prefixes (p−1 indices each) begin in [`Basis::prefixes`].
    pub prefixes: usize,
}

/// The tables of a set of orders, made once and shared.
#[derive(Debug)]
pub struct Basis {
    d_key: usize,
    orders: Vec<usize>,
    len: usize,
    tiles: Vec<Tile>,
    runs: Vec<Run>,
    prefixes: Vec<u32>,
    multiplicities: Vec<f64>,
    multiplicities_f32: Vec<f32>,
}

impl Basis {
    /// Tables for `orders` (ascending) of monomials in `d_key` variables.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when the tables do not fit in memory, [`Error::Spec`] for no variables.
    pub fn new(d_key: usize, orders: &[usize]) -> Result<Self, Error> {
        if d_key == 0 {
            let (value, requires) = ("0".into(), "it must be at least 1".into());
            return Err(Error::Spec { field: "d_key", value, requires });
        }
        let total = features(d_key, orders);
        let bytes = Self::bytes_needed(d_key, orders);
        crate::memory::check(d_key, orders, total, "the basis", bytes)?;
        let mut basis = Basis {
            d_key,
            orders: orders.to_vec(),
            len: 0,
            tiles: vec![],
            runs: vec![],
            prefixes: vec![],
            multiplicities: Vec::with_capacity(total as usize),
            multiplicities_f32: vec![],
        };
        for &p in orders {
            basis.push_order(p);
        }
        basis.multiplicities_f32 = basis.multiplicities.iter().map(|&m| m as f32).collect();
        Ok(basis)
    }

    /// Bytes that the tables take at most: two multiplicities per feature, and in the worst case a
    /// run of one with its prefix.
    pub(crate) fn bytes_needed(d_key: usize, orders: &[usize]) -> u128 {
        let highest = orders.last().copied().unwrap_or(0) as u128;
        features(d_key, orders).saturating_mul(24 + 4 * highest.saturating_sub(1))
    }

    fn push_order(&mut self, p: usize) {
        let d = self.d_key;
        if p == 0 {
            self.open_tile(0);
            self.push_run(0, &[], 0, 1);
            self.multiplicities.push(1.0);
            return;
        }
        self.open_tile(p);
        let mut prefix = vec![0usize; p - 1];
        loop {
            let mut keep = self.shared_with_last(p, &prefix);
            let first = prefix.last().copied().unwrap_or(0);
            self.push_multiplicities(&prefix, first);
            let mut from = first;
            while from < d {
                let tile = &self.tiles[self.tiles.len() - 1];
                let room = TILE - tile.len;
                if room == 0 {
                    self.open_tile(p);
                    keep = 0;
                    continue;
                }
                let len = room.min(d - from);
                self.push_run(keep, &prefix, from, len);
                from += len;
            }
            // The next prefix in lexicographic order.
            let Some(at) = prefix.iter().rposition(|&i| i + 1 < d) else {
                break;
            };
            let next = prefix[at] + 1;
            prefix[at..].fill(next);
        }
    }

    fn open_tile(&mut self, order: usize) {
        self.tiles.push(Tile {
            order,
            start: self.len,
            len: 0,
            runs: self.runs.len()..self.runs.len(),
            prefixes: self.prefixes.len(),
        });
    }

    /// How many leading indices `prefix` shares with the open tile's last run.
    fn shared_with_last(&self, p: usize, prefix: &[usize]) -> usize {
        let tile = &self.tiles[self.tiles.len() - 1];
        if tile.len == 0 {
            return 0;
        }
        let last = &self.prefixes[self.prefixes.len() - (p - 1)..];
        last.iter().zip(prefix).take_while(|&(&a, &b)| a as usize == b).count()
    }

    fn push_run(&mut self, keep: usize, prefix: &[usize], first: usize, len: usize) {
        self.runs.push(Run { keep: keep as u32, first: first as u32, len: len as u32 });
        self.prefixes.extend(prefix.iter().map(|&i| i as u32));
        self.len += len;
        if let Some(tile) = self.tiles.last_mut() {
            tile.len += len;
            tile.runs.end = self.runs.len();
        }
    }

    /// Multiplicities of `prefix`·x_i for i ≥ first: the prefix's own times p over the number of
    /// times the last index occurs.
    fn push_multiplicities(&mut self, prefix: &[usize], first: usize) {
        let p = prefix.len() + 1;
        let repeats = prefix.iter().rev().take_while(|&&i| i == first).count();
        match multiplicity(prefix).and_then(|m| m.checked_mul(p as u128)) {
            Some(m) => {
                // m counts the last index as new; where it repeats, divide by its count.
                for i in first..self.d_key {
                    let times = if i == first { repeats as u128 + 1 } else { 1 };
                    self.multiplicities.push((m / times) as f64);
                }
            }
            None => {
                // Beyond 128 bits an f64 holds it to within rounding, as it would hold the
                // integer.
                let m = multiplicity_f64(prefix) * p as f64;
                for i in first..self.d_key {
                    let times = if i == first { repeats as f64 + 1.0 } else { 1.0 };
                    self.multiplicities.push(m / times);
                }
            }
        }
    }

    /// Elements of a key.
    pub fn d_key(&self) -> usize {
        self.d_key
    }

    /// The orders, ascending.
    pub fn orders(&self) -> &[usize] {
        &self.orders
    }

    /// D, the number of features.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no features (never, for a basis of a spec).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The tiles, in the order of their features.
    pub fn tiles(&self) -> &[Tile] {
        &self.tiles
    }

    /// The runs of all tiles.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The prefixes of all runs, p−1 indices each.
    pub fn prefixes(&self) -> &[u32] {
        &self.prefixes
    }

    /// p!/∏n_i! of every feature, computed with integers.
    pub fn multiplicities(&self) -> &[f64] {
        &self.multiplicities
    }

    pub(crate) fn multiplicities_f32(&self) -> &[f32] {
        &self.multiplicities_f32
    }

    /// The features of one order, among all.
    pub fn order_range(&self, order: usize) -> Option<Range<usize>> {
        let mut start = 0;
        for &p in &self.orders {
            let len = features_of_order(self.d_key, p) as usize;
            if p == order {
                return Some(start..start + len);
            }
            start += len;
        }
        None
    }
}

/// p!/∏n_i! of ascending `indices`, as a product of binomials; `None` beyond 128 bits.
pub fn multiplicity(indices: &[usize]) -> Option<u128> {
    let mut product: u128 = 1;
    let mut placed = 0;
    for group in indices.chunk_by(|a, b| a == b) {
        placed += group.len();
        product = product.checked_mul(binomial(placed, group.len())?)?;
    }
    Some(product)
}

fn multiplicity_f64(indices: &[usize]) -> f64 {
    let mut product = 1.0;
    let mut placed = 0;
    for group in indices.chunk_by(|a, b| a == b) {
        for i in 1..=group.len() {
            placed += 1;
            product *= placed as f64 / i as f64;
        }
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_the_papers_heads() {
        for (d, p, want) in
            [(8, 4, 165), (16, 4, 969), (32, 4, 6545), (64, 4, 47905), (64, 6, 11_238_513)]
        {
            assert_eq!(features(d, &(0..p).collect::<Vec<_>>()), want, "d = {d}, P = {p}");
        }
    }

    #[test]
    fn every_monomial_once_with_its_multiplicity() {
        for (d, orders) in
            [(1, vec![0, 1, 5]), (3, vec![0, 1, 2, 3, 4]), (5, vec![4]), (70, vec![1, 2])]
        {
            let basis = Basis::new(d, &orders).unwrap();
            let mut seen = 0;
            for tile in basis.tiles() {
                assert_eq!(tile.start, seen);
                assert!(tile.len <= TILE && tile.len > 0);
                let width = tile.order.saturating_sub(1);
                let mut stack = vec![u32::MAX; width];
                for (r, run) in basis.runs()[tile.runs.clone()].iter().enumerate() {
                    let at = tile.prefixes + r * width;
                    let prefix = &basis.prefixes()[at..at + width];
                    assert_eq!(&stack[..run.keep as usize], &prefix[..run.keep as usize]);
                    stack.copy_from_slice(prefix);
                    for i in run.first..run.first + run.len {
                        let mut indices: Vec<usize> = prefix.iter().map(|&i| i as usize).collect();
                        if tile.order > 0 {
                            indices.push(i as usize);
                        }
                        assert!(indices.is_sorted());
                        let count = multiplicity(&indices).unwrap() as f64;
                        assert_eq!(basis.multiplicities()[seen], count, "{indices:?}");
                        seen += 1;
                    }
                }
            }
            assert_eq!(seen as u128, features(d, &orders));
            // The multiplicities of order p count all d^p permutations.
            for &p in &orders {
                let sum: f64 = basis.multiplicities()[basis.order_range(p).unwrap()].iter().sum();
                assert_eq!(sum, (d as f64).powi(p as i32));
            }
        }
    }

    #[test]
    fn multiplicities_beyond_128_bits_are_rounded_not_refused() {
        let basis = Basis::new(2, &[200]).unwrap();
        let middle = basis.multiplicities()[100];
        // C(200, 100)
        assert!((middle / 9.054851465610328e58 - 1.0).abs() < 1e-12, "{middle}");
    }
}
