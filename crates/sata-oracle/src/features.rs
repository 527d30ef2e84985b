//! The minimal basis: the paper's sections 2.2 to 2.4.
//!
//! (q·k)^p = Σ_i C_p,i Φ_p(q)_i Φ_p(k)_i over the monomials x_{i1}⋯x_{ip} with i1 ≤ … ≤ ip. The weights C_p stay
//! apart from Φ_p, as in the paper.

/// C(n, r), exactly. Panics when it exceeds `u128`.
pub fn binomial(n: u128, r: u128) -> u128 {
    let mut value = 1u128;
    for i in 1..=r {
        // value = C(n-r+i-1, i-1) here, so the division leaves no remainder.
        value = value.checked_mul(n - r + i).expect("a binomial coefficient exceeds u128") / i;
    }
    value
}

/// m_p = C(d_K + p − 1, p), the paper's (7): how many monomials of order p there are.
pub fn feature_count(d_key: usize, p: usize) -> u128 {
    binomial((d_key + p - 1) as u128, p as u128)
}

/// M_p, the paper's (10): a row i1 ≤ … ≤ ip of indices per monomial, in lexicographic order, counted from 0.
/// For p = 0 there is one empty row (16).
pub fn monomials(d_key: usize, p: usize) -> Vec<Vec<usize>> {
    if p == 0 {
        return vec![vec![]];
    }
    let mut rows = vec![];
    for row in monomials(d_key, p - 1) {
        let first = row.last().copied().unwrap_or(0);
        for i in first..d_key {
            let mut longer = row.clone();
            longer.push(i);
            rows.push(longer);
        }
    }
    rows
}

/// A diagonal element of C_p: in how many orders the row's indices can be written, p!/∏ n_i! with n_i the number of
/// times that index i occurs. Panics when it exceeds `u128`.
pub fn multiplicity(row: &[usize]) -> u128 {
    // Of the j indices so far, the n equal to the newest can take C(j, n) sets of places.
    let mut value = 1u128;
    let mut j = 0;
    while j < row.len() {
        let mut n = 1;
        while j + n < row.len() && row[j + n] == row[j] {
            n += 1;
        }
        j += n;
        value =
            value.checked_mul(binomial(j as u128, n as u128)).expect("a multiplicity exceeds u128");
    }
    value
}

/// The diagonal of C_p, in the order of the rows of M_p.
pub fn multiplicities(monomials: &[Vec<usize>]) -> Vec<u128> {
    monomials.iter().map(|row| multiplicity(row)).collect()
}

/// Φ_p(x), the paper's (10): the product of the elements of x that each row of M_p names.
pub fn features(x: &[f64], monomials: &[Vec<usize>]) -> Vec<f64> {
    let mut phi = vec![];
    for row in monomials {
        let mut product = 1.0;
        for &i in row {
            product *= x[i];
        }
        phi.push(product);
    }
    phi
}

/// ⟨a, b⟩_{C_p} = Σ_i C_p,i a_i b_i, the paper's (8).
pub fn inner_product(a: &[f64], b: &[f64], multiplicities: &[u128]) -> f64 {
    let mut sum = 0.0;
    for i in 0..multiplicities.len() {
        sum += multiplicities[i] as f64 * a[i] * b[i];
    }
    sum
}
