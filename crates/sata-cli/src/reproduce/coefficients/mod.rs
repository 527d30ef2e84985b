//! Past the paper: the same state, other coefficients.
//!
//! A state keeps sums by order and no coefficients, so a query may weigh the orders as it likes.
//! Taylor's coefficients are right at 0; those of `Gauss` and `Hermite` suit the logits that the
//! query has, which it learns from the same sums, at no cost. Here both are held to f64 softmax:
//! [`normal`] on random inputs, [`trained`] behind a near window on activations of a trained
//! model.

mod figures;
mod findings;
mod normal;
mod tables;
mod trained;

pub use figures::{figure_normal, figure_trained};
pub use findings::findings;
pub use tables::{table_normal, table_trained};

use serde::Serialize;

use super::scope::Scope;
use crate::failure::Outcome;
use crate::inspect::candidates::Far;
use crate::progress::Progress;
use crate::series::SeriesArg;
use normal::Normal;
use trained::Trained;

/// All numbers of this experiment.
#[derive(Clone, Debug, Serialize)]
pub struct Coefficients {
    /// Random inputs: by deviation of the logits, series and number of terms.
    pub normal: Vec<Normal>,
    /// Activations of a trained model, by layer.
    pub trained: Vec<Trained>,
}

/// The series that one state serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Series {
    /// 1/p!.
    Taylor,
    /// exp interpolated at the Gauss nodes of each query's logits.
    Gauss,
    /// The least-squares fit of exp under a normal density of each query's logits, τ = 0.9 σ.
    Hermite,
}

impl Series {
    /// All of them.
    pub const ALL: [Series; 3] = [Series::Taylor, Series::Gauss, Series::Hermite];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Series::Taylor => "Taylor",
            Series::Gauss => "Gauss",
            Series::Hermite => "Hermite",
        }
    }

    /// Whether it can have so many terms: Gauss has two a node.
    pub fn takes(self, terms: usize) -> bool {
        self != Series::Gauss || terms.is_multiple_of(2)
    }

    fn far(self, terms: usize) -> Far {
        let (arg, series) = match self {
            Series::Taylor => (SeriesArg::Taylor, sata::Series::Taylor),
            Series::Gauss => (SeriesArg::Gauss, sata::Series::Gauss),
            Series::Hermite => (SeriesArg::Hermite(None), sata::Series::hermite()),
        };
        Far::with_terms(&arg, &series, terms)
    }
}

/// Every series with every number of these terms that it can have.
fn pairs(terms: &[usize]) -> impl Iterator<Item = (Series, usize)> + '_ {
    let of = |series: Series| terms.iter().map(move |&terms| (series, terms));
    Series::ALL.into_iter().flat_map(of).filter(|(series, terms)| series.takes(*terms))
}

/// Units of work, for the progress bar.
pub fn units() -> u64 {
    normal::units() + trained::units()
}

/// Measures both parts.
///
/// # Errors
/// What the library refuses, which on an ordinary machine is nothing.
pub fn run(scope: &Scope, progress: &Progress) -> Outcome<Coefficients> {
    Ok(Coefficients { normal: normal::run(scope, progress)?, trained: trained::run(progress)? })
}
