//! What the features of a basis are products of, as the kernel looks it up.

use sata::basis::Basis;

use crate::plan::each_monomial;

/// Tables of a basis, the same for all heads.
pub(crate) struct Tables {
    /// `[D]`: indices of a feature's first factors, packed, and its multiplicity times its order's
    /// coefficient, as the bits of an f32. Factors that lower orders lack are `d_key`, which stands
    /// for 1.
    pub features: Vec<[u32; 2]>,
    /// `[words - 1][D]`: the other factors.
    pub more_indices: Vec<u32>,
}

/// Bits of an index: `d_key` itself is one.
fn bits(d_key: usize) -> usize {
    (d_key + 1).next_power_of_two().trailing_zeros().max(1) as usize
}

/// Words of a feature's indices: as `WORDS` of `decode_types.cuh`.
pub(crate) fn words(d_key: usize, highest: usize) -> usize {
    highest.div_ceil(32 / bits(d_key))
}

impl Tables {
    /// With a coefficient per order; orders beyond them have 0.
    pub(crate) fn new(basis: &Basis, coefficients: &[f64]) -> Self {
        let (d_key, len) = (basis.d_key(), basis.len());
        let highest = basis.orders().last().copied().unwrap_or(0);
        let (bits, words) = (bits(d_key), words(d_key, highest));
        let per_word = 32 / bits;
        let mut features = Vec::with_capacity(len);
        let mut more_indices = vec![0u32; words.saturating_sub(1) * len];
        each_monomial(basis, |monomial| {
            let feature = features.len();
            let coefficient = coefficients.get(monomial.len()).copied().unwrap_or(0.0);
            let multiplier = (basis.multiplicities()[feature] * coefficient) as f32;
            let mut first = 0;
            let all = monomial.iter().copied().chain(std::iter::repeat(d_key as u32));
            for (i, index) in all.take(highest).enumerate() {
                let word = match i / per_word {
                    0 => &mut first,
                    w => &mut more_indices[(w - 1) * len + feature],
                };
                *word |= index << (i % per_word * bits);
            }
            features.push([first, multiplier.to_bits()]);
        });
        Tables { features, more_indices }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_indices_are_the_monomials() {
        for (d, orders) in [
            (1, vec![0, 1, 5]),
            (3, vec![0, 1, 2, 3, 4]),
            (7, vec![2]),
            (8, vec![0, 1, 2, 3]),
            (64, vec![0, 2]),
            (300, vec![1, 2]),
            (2, vec![17]),
            (1, vec![0]),
        ] {
            let basis = Basis::new(d, &orders).unwrap();
            let coefficients: Vec<f64> = (0..20).map(|p| 1.0 + f64::from(p)).collect();
            let tables = Tables::new(&basis, &coefficients);
            let highest = *orders.last().unwrap();
            let (bits, words) = (bits(d), words(d, highest));
            assert_eq!(tables.more_indices.len(), words.saturating_sub(1) * basis.len());
            // Σ multiplier · Φ(x) · Φ(y) over the features of an order is a_p (x·y)^p.
            let x: Vec<f64> = (0..d).map(|i| 0.3 + 0.01 * i as f64).chain([1.0]).collect();
            let dot: f64 = x[..d].iter().map(|x| x * x).sum();
            for &p in &orders {
                let mut sum = 0.0;
                for f in basis.order_range(p).unwrap() {
                    let mut phi = 1.0;
                    let mut used = 0;
                    for i in 0..highest {
                        let word = match i / (32 / bits) {
                            0 => tables.features[f][0],
                            w => tables.more_indices[(w - 1) * basis.len() + f],
                        };
                        let index = (word >> (i % (32 / bits) * bits)) as usize & ((1 << bits) - 1);
                        phi *= x[index];
                        used += usize::from(index < d);
                    }
                    assert_eq!(used, p);
                    sum += f64::from(f32::from_bits(tables.features[f][1])) * phi * phi;
                }
                let want = coefficients[p] * dot.powi(p as i32);
                assert!((sum / want - 1.0).abs() < 1e-6, "d = {d}, p = {p}: {sum} {want}");
            }
        }
    }
}
