//! The attentions that are measured, and what they should take.

use sata::{Decay, Near, Series, Spec, cost};
use serde::Serialize;

use crate::failure::Outcome;

/// Far weights.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kernel {
    /// So many terms.
    Taylor(usize),
    /// An even exponent.
    Power(usize),
}

/// One attention, with d_K = d_V = d.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Attention {
    /// d_K and d_V.
    pub d: usize,
    /// Far weights.
    pub kernel: Kernel,
    /// Whether there are gates, and the block before a query's own is exact, as its own is: the
    /// recipe for training.
    pub trained: bool,
    /// Whether a query sees only the tokens up to its own.
    pub causal: bool,
}

/// Nanoseconds per token and head.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Target {
    /// What it should take at most.
    pub at_most: f64,
    /// What is aimed at.
    pub aim: Option<f64>,
}

/// Head sizes that have targets.
pub const DIMS: [usize; 4] = [8, 16, 32, 64];
/// Heads that are measured at each, so that all have as many elements.
const HEADS: [usize; 4] = [128, 64, 32, 16];
/// P = 4, forward: at most, and aimed at.
const FORWARD: [(f64, f64); 4] = [(0.10, 0.04), (0.35, 0.20), (2.8, 1.8), (36.0, 24.0)];
/// P = 4, forward and backward: at most.
const BOTH: [f64; 4] = [0.5, 1.6, 12.0, 160.0];

impl Attention {
    /// The paper's: causal, all far, four terms.
    pub fn paper(d: usize) -> Self {
        Attention { d, kernel: Kernel::Taylor(4), trained: false, causal: true }
    }

    /// All that a head size is measured with, the paper's first.
    pub fn all(d: usize) -> Vec<Self> {
        let paper = Self::paper(d);
        let trained = |terms| Attention { kernel: Kernel::Taylor(terms), trained: true, ..paper };
        let power = |exponent| Attention { kernel: Kernel::Power(exponent), ..paper };
        let mut all = vec![paper];
        match d {
            16 => {
                let five = Attention { kernel: Kernel::Taylor(5), ..paper };
                all.extend([five, trained(5), power(4)]);
            }
            32 | 64 => all.extend([trained(3), power(2)]),
            _ => (),
        }
        all
    }

    /// Its specification.
    ///
    /// # Errors
    /// None for the sizes that are measured.
    pub fn spec(&self) -> Outcome<Spec> {
        let builder = match self.kernel {
            Kernel::Taylor(terms) => Spec::new(self.d, self.d).terms(terms),
            Kernel::Power(exponent) => Spec::new(self.d, self.d).series(Series::power(exponent)),
        };
        let builder = match self.trained {
            true => builder.near(Near::Blocks(1)).decay(Decay::Gates),
            false => builder,
        };
        Ok(builder.build()?)
    }

    /// In a few words.
    pub fn name(&self) -> String {
        let mut name = match self.kernel {
            Kernel::Taylor(terms) => format!("taylor P={terms}"),
            Kernel::Power(exponent) => format!("power {exponent}"),
        };
        if self.trained {
            name += " near 1 gates";
        }
        if !self.causal {
            name += ", full";
        }
        name
    }

    /// Heads that are measured.
    pub fn heads(&self) -> usize {
        DIMS.iter().position(|&d| d == self.d).map_or(16, |at| HEADS[at])
    }

    /// FLOPs that one token of one head needs: 4 D (d_V + 1).
    ///
    /// # Errors
    /// As for [`Attention::spec`].
    pub fn flops(&self) -> Outcome<f64> {
        Ok(cost::useful_flops(self.d, self.d, &self.spec()?.orders()) as f64)
    }

    /// What it should take: the paper's setting as such, others at the same useful rate.
    ///
    /// # Errors
    /// As for [`Attention::spec`].
    pub fn target(&self, both: bool) -> Outcome<Option<Target>> {
        let Some(at) = DIMS.iter().position(|&d| d == self.d) else { return Ok(None) };
        if !self.causal {
            return Ok(None);
        }
        let paper = Self::paper(self.d);
        let factor = self.flops()? / paper.flops()?;
        Ok(Some(if both {
            Target { at_most: factor * BOTH[at], aim: None }
        } else {
            let (at_most, aim) = FORWARD[at];
            Target { at_most: factor * at_most, aim: Some(factor * aim) }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_those_of_the_same_useful_rate() {
        let paper = Attention::paper(32);
        assert_eq!(paper.target(false).unwrap().unwrap().at_most, 2.8);
        assert_eq!(paper.target(true).unwrap().unwrap().at_most, 12.0);
        assert_eq!(paper.flops().unwrap(), 4.0 * 6545.0 * 33.0);
        let power = Attention { kernel: Kernel::Power(2), ..paper };
        let target = power.target(false).unwrap().unwrap();
        assert!((target.at_most - 2.8 * 529.0 / 6545.0).abs() < 1e-12, "{target:?}");
        assert_eq!(Attention { causal: false, ..paper }.target(false).unwrap(), None);
    }

    #[test]
    fn names_differ() {
        for d in DIMS {
            let names: Vec<String> = Attention::all(d).iter().map(Attention::name).collect();
            assert!(names.iter().enumerate().all(|(i, name)| !names[..i].contains(name)));
        }
    }
}
