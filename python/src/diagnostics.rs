//! What a call noticed, as Python sees it.

use pyo3::prelude::*;

/// What a call noticed about its denominators.
#[pyclass(frozen, get_all, module = "sata")]
#[derive(Debug)]
pub struct Diagnostics {
    /// Queries answered, over batch, heads and tokens.
    queries: u64,
    /// Queries whose denominator is zero or negative.
    non_positive: u64,
    /// Queries whose denominator is NaN or infinite.
    non_finite: u64,
    /// The first of those: sequence, query head, token of the call; or None.
    first: Option<(usize, usize, usize)>,
    /// Per query head, a `HeadDiagnostics`; empty where it was not asked for or is not known.
    heads: Vec<Py<HeadDiagnostics>>,
}

#[pymethods]
impl Diagnostics {
    /// Whether every denominator was positive and finite.
    #[getter]
    fn is_clean(&self) -> bool {
        self.non_positive == 0 && self.non_finite == 0
    }

    fn __str__(&self) -> String {
        sata::Diagnostics {
            queries: self.queries,
            non_positive: self.non_positive,
            non_finite: self.non_finite,
            first: self.first.map(|(a, b, c)| [a, b, c]),
            heads: vec![],
        }
        .to_string()
    }

    fn __repr__(&self) -> String {
        format!(
            "sata.Diagnostics(queries={}, non_positive={}, non_finite={}, heads={})",
            self.queries,
            self.non_positive,
            self.non_finite,
            self.heads.len()
        )
    }
}

/// What one query head's far logits are like, and what to expect of their series.
#[pyclass(frozen, get_all, module = "sata")]
#[derive(Debug)]
pub struct HeadDiagnostics {
    /// Queries answered.
    queries: u64,
    /// Queries whose denominator is zero or negative.
    non_positive: u64,
    /// Queries whose denominator is NaN or infinite.
    non_finite: u64,
    /// Queries that have a far past; the numbers below are over these.
    far: u64,
    /// Mean of the far logits.
    mean: f64,
    /// Deviation of a query's far logits, root mean square over queries.
    deviation: f64,
    /// The largest such deviation.
    max_deviation: f64,
    /// An estimate of the relative error of the far part, or None. It promises nothing.
    estimate: Option<f64>,
    /// A bound on |y - softmax| in multiples of the largest |v|, or None where there is none.
    bound: Option<f64>,
}

#[pymethods]
impl HeadDiagnostics {
    fn __repr__(&self) -> String {
        let or_none = |x: Option<f64>| x.map_or("None".into(), |x| format!("{x:.4}"));
        format!(
            "sata.HeadDiagnostics(mean={:.4}, deviation={:.4}, estimate={}, bound={})",
            self.mean,
            self.deviation,
            or_none(self.estimate),
            or_none(self.bound)
        )
    }
}

impl Diagnostics {
    pub fn of(py: Python<'_>, found: sata::Diagnostics) -> PyResult<Py<Self>> {
        let head = |head: sata::HeadDiagnostics| {
            Py::new(
                py,
                HeadDiagnostics {
                    queries: head.queries,
                    non_positive: head.non_positive,
                    non_finite: head.non_finite,
                    far: head.far,
                    mean: head.mean,
                    deviation: head.deviation,
                    max_deviation: head.max_deviation,
                    estimate: head.estimate,
                    bound: head.bound,
                },
            )
        };
        let heads: PyResult<Vec<_>> = found.heads.into_iter().map(head).collect();
        Py::new(
            py,
            Diagnostics {
                queries: found.queries,
                non_positive: found.non_positive,
                non_finite: found.non_finite,
                first: found.first.map(|[a, b, c]| (a, b, c)),
                heads: heads?,
            },
        )
    }
}
