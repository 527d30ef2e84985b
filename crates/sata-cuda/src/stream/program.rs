//! The features of the streaming kernels (`stream.cuh`, `stream_sixteen.cuh`, `stream_wide.cuh`): monomials eight at a
//! time, each the one before with all indices moved on by one.

use std::collections::HashMap;
use std::fmt::Write;

use sata::basis::Basis;

use crate::plan::each_monomial;

/// Monomials of a half of a tile of features.
pub(super) const HALF: usize = 8;

/// Which features there are and in which order.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Program {
    d_key: usize,
    /// The first monomial of each half, as indices.
    halves: Vec<Vec<usize>>,
}

impl Program {
    /// All monomials of `orders` in `d_key` (8 or 16) indices.
    pub(super) fn new(d_key: usize, orders: &[usize]) -> Self {
        let mut halves = vec![];
        for &order in orders.iter().rev() {
            for orbit in orbits(d_key, order) {
                let period = period(d_key, &orbit);
                for by in (0..period).step_by(HALF) {
                    halves.push(orbit.iter().map(|i| (i + by) % d_key).collect());
                }
            }
        }
        if halves.len() % 2 == 1 {
            // One more that nobody reads: its coefficients are 0.
            halves.push(vec![]);
        }
        Program { d_key, halves }
    }

    /// The features of `stream_wide.cuh`, in 32 indices and of orders up to 2, whichever orders are
    /// kept: tiles of four steps of two halves each.
    pub(super) fn wide() -> Self {
        let d_key = super::units::WIDE;
        let mut halves = vec![];
        for (tile, half) in (0..9).flat_map(|tile| (0..8).map(move |half| (tile, half))) {
            let (from, orbit) = (half % 4 * HALF, half / 4);
            halves.push(match (tile, half) {
                (8, 0 | 1) => vec![from, from + 16],
                (8, 2..6) => vec![(half - 2) * HALF],
                (8, _) => vec![],
                _ => vec![from, (from + tile + 8 * orbit) % d_key],
            });
        }
        Program { d_key, halves }
    }

    /// The features of `stream_sixteen.cuh`, in 16 indices and of orders up to 3, whichever orders
    /// are kept: tiles of four orbits.
    pub(super) fn sixteen() -> Self {
        let d_key = 16;
        let orbit = |indices: &[usize]| {
            [0, HALF].map(|by| indices.iter().map(|i| (i + by) % d_key).collect::<Vec<_>>())
        };
        // Distance of the second index, and a quarter of the first third one's.
        let tile = |second: Option<usize>, third: usize| {
            (4 * third..4 * third + 4).flat_map(move |last| match second {
                Some(second) => orbit(&[0, second, last]),
                None => orbit(&[0, last]),
            })
        };
        let mut halves = vec![];
        for third in 0..3 {
            halves.extend(tile(Some(0), third));
        }
        halves.extend(orbit(&[0, 5, 10]));
        halves.extend([vec![0, 8], vec![]]);
        halves.extend(orbit(&[0]));
        halves.extend(orbit(&[0, 3, 7]));
        for (second, third) in [
            (Some(0), 3),
            (Some(1), 1),
            (Some(1), 2),
            (Some(1), 3),
            (Some(2), 1),
            (Some(2), 2),
            (Some(2), 3),
            (None, 0),
            (Some(3), 2),
            (Some(3), 3),
            (Some(4), 2),
            (None, 1),
        ] {
            halves.extend(tile(second, third));
        }
        Program { d_key, halves }
    }

    /// The same in as few parts of about one size as have `most` tiles each at most.
    pub(super) fn parts(&self, most: usize) -> Vec<Program> {
        let parts = self.tiles().div_ceil(most.max(1)).max(1);
        let cut = |part: usize| part * self.tiles() / parts * 2;
        (0..parts)
            .map(|part| Program {
                d_key: self.d_key,
                halves: self.halves[cut(part)..cut(part + 1)].to_vec(),
            })
            .collect()
    }

    /// Tiles of 16 features.
    pub(super) fn tiles(&self) -> usize {
        self.halves.len() / 2
    }

    /// Features, with padding.
    pub(super) fn features(&self) -> usize {
        self.halves.len() * HALF
    }

    /// The halves as the kernels' define has them.
    pub(super) fn define(&self) -> String {
        let mut text = String::new();
        for half in &self.halves {
            let index = |k: usize| half.get(k).copied().unwrap_or(0);
            // Writing to a string does not fail.
            let _ = write!(
                text,
                "{{{},{},{},{},{}}},",
                half.len(),
                index(0),
                index(1),
                index(2),
                index(3)
            );
        }
        text.pop();
        text
    }

    /// The monomial of each feature, its indices ascending.
    fn monomials(&self) -> impl Iterator<Item = Vec<usize>> {
        self.halves.iter().flat_map(move |half| {
            (0..HALF).map(move |by| {
                let mut indices: Vec<usize> = half.iter().map(|i| (i + by) % self.d_key).collect();
                indices.sort_unstable();
                indices
            })
        })
    }

    /// What a query multiplies the sum of each feature by: its multiplicity, which is taken out of
    /// `multiplicities`, times its order's factor; 0 where the monomial has been before.
    pub(super) fn coefficients(
        &self,
        multiplicities: &mut HashMap<Vec<usize>, f64>,
        factors: &[f64],
    ) -> Vec<f32> {
        self.monomials()
            .map(|indices| {
                let factor = factors.get(indices.len()).copied().unwrap_or(0.0);
                (multiplicities.remove(&indices).unwrap_or(0.0) * factor) as f32
            })
            .collect()
    }
}

/// The multiplicity of each monomial of a basis, its indices ascending.
pub(super) fn multiplicities(basis: &Basis) -> HashMap<Vec<usize>, f64> {
    let mut all = HashMap::with_capacity(basis.len());
    let mut next = basis.multiplicities().iter();
    each_monomial(basis, |indices| {
        let indices: Vec<usize> = indices.iter().map(|&i| i as usize).collect();
        all.insert(indices, *next.next().unwrap_or(&0.0));
    });
    all
}

/// One of each set of monomials that are the same but for a cyclic shift of all indices: the least
/// in lexicographic order, so that neighbours share their first factors.
fn orbits(d: usize, order: usize) -> Vec<Vec<usize>> {
    let mut all = vec![];
    let mut indices = vec![0; order];
    // All ascending tuples that begin with 0.
    loop {
        if is_least(d, &indices) {
            all.push(indices.clone());
        }
        let Some(at) = (1..order).rev().find(|&at| indices[at] + 1 < d) else {
            return all;
        };
        let next = indices[at] + 1;
        indices[at..].fill(next);
    }
}

fn moved(d: usize, indices: &[usize], by: usize) -> Vec<usize> {
    let mut moved: Vec<usize> = indices.iter().map(|i| (i + by) % d).collect();
    moved.sort_unstable();
    moved
}

fn is_least(d: usize, indices: &[usize]) -> bool {
    (1..d).all(|by| moved(d, indices, by).as_slice() >= indices)
}

/// After how many shifts a monomial comes again.
fn period(d: usize, indices: &[usize]) -> usize {
    (1..=d).find(|&by| d.is_multiple_of(by) && moved(d, indices, by) == indices).unwrap_or(d)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_monomial_has_one_coefficient() {
        for d in [8, 16] {
            for orders in
                [vec![0, 1, 2, 3], vec![0, 1, 2], vec![0, 2], vec![0, 4], vec![3], vec![0], vec![1]]
            {
                let program = Program::new(d, &orders);
                let basis = Basis::new(d, &orders).unwrap();
                let mut left = multiplicities(&basis);
                let parts = program.parts(20);
                let coefficients: Vec<f32> =
                    parts.iter().flat_map(|part| part.coefficients(&mut left, &[1.0; 5])).collect();
                assert!(parts.iter().all(|part| part.tiles() <= 20));
                assert_eq!(coefficients.len(), program.features());
                let used = coefficients.iter().filter(|&&c| c > 0.0).count();
                assert_eq!(used, basis.len(), "d = {d}, {orders:?}");
                let sum: f64 = coefficients.iter().map(|&c| f64::from(c)).sum();
                let all: f64 = basis.multiplicities().iter().sum();
                assert_eq!(sum, all, "d = {d}, {orders:?}");
            }
        }
    }

    #[test]
    fn every_monomial_of_wide_heads_has_one_coefficient() {
        for orders in [vec![0, 1, 2], vec![0, 2], vec![0, 1], vec![0]] {
            let program = Program::wide();
            assert_eq!(program.features(), 576);
            let basis = Basis::new(32, &orders).unwrap();
            let coefficients = program.coefficients(&mut multiplicities(&basis), &[1.0; 3]);
            let used = coefficients.iter().filter(|&&c| c > 0.0).count();
            assert_eq!(used, basis.len(), "{orders:?}");
        }
    }

    #[test]
    fn every_monomial_of_heads_of_16_has_one_coefficient() {
        for orders in [vec![0, 1, 2, 3], vec![0, 3], vec![3]] {
            let program = Program::sixteen();
            assert_eq!(program.features(), 1024);
            let basis = Basis::new(16, &orders).unwrap();
            let coefficients = program.coefficients(&mut multiplicities(&basis), &[1.0; 4]);
            let used = coefficients.iter().filter(|&&c| c > 0.0).count();
            assert_eq!(used, basis.len(), "{orders:?}");
            // Orbits that the kernel leaves out, since they have been before.
            let orbit = |tile: usize, orbit: usize| &coefficients[64 * tile + 16 * orbit..][..16];
            for (tile, at) in [(10, 2), (13, 2), (13, 3)] {
                assert!(orbit(tile, at).iter().all(|&c| c == 0.0), "{tile}, {at}");
            }
        }
    }

    #[test]
    fn padding_is_small() {
        let of = |d| Program::new(d, &[0, 1, 2, 3]).features();
        assert_eq!([8, 16].map(of), [176, 976]);
    }
}
