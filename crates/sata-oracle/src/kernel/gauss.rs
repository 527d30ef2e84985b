//! e^x interpolated at the Gauss nodes of the far logits.

use super::{Measure, ThroughParameters, exp_divided_differences};

/// κ(x) = the polynomial of degree 2n − 1 with κ(ξ_i) = κ'(ξ_i) = e^{ξ_i} at the n Gauss nodes ξ_i of the far logits
/// under their decays.
///
/// Then κ(x) ≤ e^x everywhere, and because n-point quadrature is exact to degree 2n − 1, Σ_s ω_s κ(x_s) =
/// Σ_i λ_i e^{ξ_i} > 0. While the logits take at most n distinct values those are the nodes, and κ is e^x on them.
/// Where they take fewer than n, there are as many nodes as values.
#[derive(Clone, Debug, PartialEq)]
pub struct Gauss {
    /// ξ_1 < ξ_2 < …
    nodes: Vec<f64>,
    /// λ_i > 0, which sum to 1.
    node_weights: Vec<f64>,
    /// `f[ξ_1]`, `f[ξ_1, ξ_1]`, `f[ξ_1, ξ_1, ξ_2]`, … of f(x) = e^{x − log_scale}.
    newton: Vec<f64>,
}

impl Gauss {
    /// The kernel with at most `count` nodes for these logits.
    pub fn new(count: usize, measure: &Measure) -> Self {
        assert!(count >= 1, "Gauss needs a node");
        let nodes = gauss_nodes(count, measure);
        let newton = exp_divided_differences(&each_twice(&nodes));
        let mut gauss = Gauss { nodes, node_weights: vec![], newton };
        // λ_i = Σ_j λ_j l_i(ξ_j)² = Σ_s ω_s l_i(x_s)², a polynomial of degree 2n − 2.
        gauss.node_weights = (0..gauss.nodes.len())
            .map(|i| measure.expect(|x| gauss.lagrange(i, x).0.powi(2)))
            .collect();
        gauss
    }

    /// ξ_1 < ξ_2 < …
    pub fn nodes(&self) -> &[f64] {
        &self.nodes
    }

    /// λ_i, the quadrature weights of the nodes.
    pub fn node_weights(&self) -> &[f64] {
        &self.node_weights
    }

    /// The largest node.
    pub fn log_scale(&self) -> f64 {
        self.nodes[self.nodes.len() - 1]
    }

    /// κ(x) · exp(−log_scale).
    pub fn value(&self, x: f64) -> f64 {
        self.value_and_slope(x).0
    }

    /// κ'(x) · exp(−log_scale).
    pub fn slope(&self, x: f64) -> f64 {
        self.value_and_slope(x).1
    }

    /// κ and κ' at x, times exp(−log_scale): Σ_j newton_j ∏_{i<j} (x − z_i), with z each node twice, and its derivative
    /// by the product rule.
    fn value_and_slope(&self, x: f64) -> (f64, f64) {
        let (mut value, mut slope) = (0.0, 0.0);
        let (mut product, mut product_slope) = (1.0, 0.0);
        for (coefficient, z) in self.newton.iter().zip(each_twice(&self.nodes)) {
            value += coefficient * product;
            slope += coefficient * product_slope;
            product_slope = product_slope * (x - z) + product;
            product *= x - z;
        }
        (value, slope)
    }

    /// (e^{ξ_j} − κ''(ξ_j)) · exp(−log_scale). The interpolation error is e^x − κ(x) = `f[x, z]` ∏_i (x − ξ_i)², with z
    /// each node twice, so its second derivative at ξ_j is 2 `f[ξ_j, z]` ∏_{i≠j} (ξ_j − ξ_i)².
    fn bend(&self, j: usize) -> f64 {
        let mut points = each_twice(&self.nodes);
        points.push(self.nodes[j]);
        let mut bend = 2.0 * exp_divided_differences(&points)[points.len() - 1];
        for i in 0..self.nodes.len() {
            if i != j {
                bend *= (self.nodes[j] - self.nodes[i]) * (self.nodes[j] - self.nodes[i]);
            }
        }
        bend
    }

    /// l_j(x) = ∏_{i≠j} (x − ξ_i)/(ξ_j − ξ_i), which is 1 at ξ_j and 0 at the other nodes, and its derivative.
    fn lagrange(&self, j: usize, x: f64) -> (f64, f64) {
        let (mut value, mut slope) = (1.0, 0.0);
        for i in 0..self.nodes.len() {
            if i != j {
                let width = self.nodes[j] - self.nodes[i];
                slope = (slope * (x - self.nodes[i]) + value) / width;
                value *= (x - self.nodes[i]) / width;
            }
        }
        (value, slope)
    }

    /// k_j(x) = (x − ξ_j) l_j(x)², which is 0 at all nodes and has slope 1 at ξ_j and 0 at the others; and k_j'(x).
    fn slope_basis(&self, j: usize, x: f64) -> (f64, f64) {
        let (l, l_slope) = self.lagrange(j, x);
        let from_node = x - self.nodes[j];
        (from_node * l * l, l * l + 2.0 * from_node * l * l_slope)
    }

    /// See [`FarKernel::through_parameters`](super::FarKernel::through_parameters).
    ///
    /// *κ by its nodes.* κ(ξ_i) = e^{ξ_i} and κ'(ξ_i) = e^{ξ_i} hold for all nodes. Differentiating both by ξ_j shows
    /// that the polynomial ∂κ/∂ξ_j is 0 at all nodes, and has slope e^{ξ_j} − κ''(ξ_j) at ξ_j and 0 at the others:
    ///
    /// ```text
    /// ∂κ(x)/∂ξ_j = (e^{ξ_j} − κ''(ξ_j)) k_j(x)
    /// ```
    ///
    /// *The nodes by the logits.* Σ_i λ_i f(ξ_i) = Σ_s ω_s f(x_s) for every f of degree up to 2n − 1. Differentiating
    /// with f = k_j held, where the left side is λ_j dξ_j, the right side uses dω_s = ω_s (dg_s − Σ_r ω_r dg_r), dg_s
    /// that of g_t − g_s, and Σ_s ω_s k_j(x_s) = Σ_i λ_i k_j(ξ_i) = 0:
    ///
    /// ```text
    /// λ_j dξ_j = Σ_s ω_s (k_j'(x_s) dx_s + k_j(x_s) dg_s)
    /// ```
    pub fn through_parameters(&self, measure: &Measure, c: &[f64]) -> ThroughParameters {
        let mut logits = vec![0.0; c.len()];
        let mut log_decays = vec![0.0; c.len()];
        for j in 0..self.nodes.len() {
            let bend = self.bend(j);
            let mut by_node = 0.0;
            for (x, c) in measure.points.iter().zip(c) {
                by_node += c * bend * self.slope_basis(j, *x).0;
            }
            for s in 0..c.len() {
                let (k, k_slope) = self.slope_basis(j, measure.points[s]);
                let share = measure.weights[s] / self.node_weights[j];
                logits[s] += by_node * share * k_slope;
                log_decays[s] += by_node * share * k;
            }
        }
        ThroughParameters { logits, log_decays }
    }
}

fn each_twice(nodes: &[f64]) -> Vec<f64> {
    nodes.iter().flat_map(|&node| [node, node]).collect()
}

/// The Gauss nodes by Golub and Welsch: the eigenvalues of the Jacobi matrix of the orthogonal polynomials of the
/// distribution. At most `count` of them, ascending.
fn gauss_nodes(count: usize, measure: &Measure) -> Vec<f64> {
    let mean = measure.mean();
    let deviation = measure.variance().sqrt();
    if deviation == 0.0 {
        return vec![mean];
    }
    let standard = Measure {
        points: measure.points.iter().map(|x| (x - mean) / deviation).collect(),
        weights: measure.weights.clone(),
    };
    let (alpha, beta) = jacobi_matrix(count, &standard);
    let lowest = standard.points.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = standard.points.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut nodes = vec![];
    for index in 0..alpha.len() {
        nodes.push(mean + deviation * eigenvalue(index, &alpha, &beta, lowest, highest));
    }
    nodes
}

/// The coefficients of the monic orthogonal polynomials of the distribution (Stieltjes):
///
/// ```text
/// π_{k+1}(x) = (x − α_k) π_k(x) − β_k π_{k−1}(x)
/// α_k = E[x π_k²]/E[π_k²] ,   β_k = E[π_k²]/E[π_{k−1}²]
/// ```
///
/// α is the diagonal of the Jacobi matrix and √β_1, √β_2, … lie beside it; β_1, β_2, … are returned. E[π_k²] = 0 says
/// that the distribution has only k distinct points; then α has k elements. "Zero" is 10⁻¹³ of the terms that π_k is
/// made from, a hundred times over what rounding leaves.
fn jacobi_matrix(count: usize, measure: &Measure) -> (Vec<f64>, Vec<f64>) {
    const ROUNDING: f64 = 1e-13;
    let points = &measure.points;
    let mut alpha = vec![];
    let mut beta = vec![];
    let mut before = vec![0.0; points.len()];
    let mut current = vec![1.0; points.len()];
    let mut norm = 1.0;
    let mut beta_k = 0.0;
    loop {
        let mut alpha_k = 0.0;
        for s in 0..points.len() {
            alpha_k += measure.weights[s] * points[s] * current[s] * current[s] / norm;
        }
        alpha.push(alpha_k);
        if alpha.len() == count {
            return (alpha, beta);
        }

        let mut next = vec![0.0; points.len()];
        let mut next_norm = 0.0;
        let mut terms_norm = 0.0;
        for s in 0..points.len() {
            let a = (points[s] - alpha_k) * current[s];
            let b = beta_k * before[s];
            next[s] = a - b;
            next_norm += measure.weights[s] * next[s] * next[s];
            terms_norm += measure.weights[s] * (a.abs() + b.abs()) * (a.abs() + b.abs());
        }
        if next_norm <= ROUNDING * ROUNDING * terms_norm {
            return (alpha, beta);
        }
        beta_k = next_norm / norm;
        beta.push(beta_k);
        before = current;
        current = next;
        norm = next_norm;
    }
}

/// The eigenvalue with `index` smaller ones of the symmetric tridiagonal matrix with diagonal `alpha` and squares
/// `beta` beside it, which lies between `low` and `high`: halving, with Sturm's count.
fn eigenvalue(index: usize, alpha: &[f64], beta: &[f64], mut low: f64, mut high: f64) -> f64 {
    for _ in 0..120 {
        let middle = low + (high - low) / 2.0;
        if eigenvalues_below(middle, alpha, beta) > index {
            high = middle;
        } else {
            low = middle;
        }
    }
    low + (high - low) / 2.0
}

/// How many eigenvalues are less than x: the number of negative pivots of the matrix less x (Sylvester).
fn eigenvalues_below(x: f64, alpha: &[f64], beta: &[f64]) -> usize {
    let mut count = 0;
    let mut pivot = 1.0;
    for i in 0..alpha.len() {
        let correction = if i == 0 { 0.0 } else { beta[i - 1] / pivot };
        pivot = alpha[i] - x - correction;
        if pivot == 0.0 {
            pivot = f64::MIN_POSITIVE;
        }
        if pivot < 0.0 {
            count += 1;
        }
    }
    count
}
