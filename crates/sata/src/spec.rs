//! What an attention is: the one description used everywhere.

use serde::{Deserialize, Serialize};

use crate::Error;

/// Which polynomial stands for `exp`: the coefficients a_p of Σ a_p x^p.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
#[non_exhaustive]
pub enum Series {
    /// a_p = 1/p!, p < terms: the paper's (9).
    Taylor,
    /// Any coefficients a_0, a_1, …; orders whose coefficient is 0 are not kept.
    Fixed {
        /// a_p at index p.
        coefficients: Vec<f64>,
    },
    /// x^exponent + floor, exponent even: recalls exact matches whatever the scale.
    Power {
        /// The exponent, even, at least 2.
        exponent: usize,
        /// Added to every weight, so that the denominator stays positive; 10⁻³ by default.
        floor: f64,
    },
    /// Per query: exp interpolated in value and slope at the Gauss nodes of its far logits.
    Gauss,
    /// Per query: the least-squares fit of exp under a normal density of its far logits.
    Hermite {
        /// Assumed deviation over measured deviation; 0.9 by default.
        tau: f64,
    },
}

impl Series {
    /// `Power` with the usual floor of 10⁻³.
    pub fn power(exponent: usize) -> Self {
        Series::Power { exponent, floor: 1e-3 }
    }

    /// `Hermite` with the usual factor of 0.9: a deviation taken too large costs far more than one
    /// taken too small.
    pub fn hermite() -> Self {
        Series::Hermite { tau: 0.9 }
    }
}

/// What is weighed exactly, by exp, instead of by the series.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Near {
    /// Nothing: the paper's setting.
    None,
    /// The query's own block and this many blocks before it.
    Blocks(usize),
}

/// How weights fade with distance: w ∝ exp(g_t − g_s).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// They do not.
    None,
    /// ALiBi: g_t = −m·t with one slope per key/value head.
    Slopes,
    /// Forget gates: g_t is the running sum of log f per token and key/value head.
    Gates,
}

/// The usual ALiBi slopes of `heads` heads: 2^(−8h/H), h = 1 … H, when H is a power of two; else
/// those of the power of two below, and then every other one of the power of two above (Press,
/// Smith and Lewis, "Train Short, Test Long", 2022, and its published code).
pub fn alibi_slopes(heads: usize) -> Vec<f64> {
    let usual = |n: usize| (1..=n).map(move |h| (-8.0 * h as f64 / n as f64).exp2());
    let below = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
    usual(below).chain(usual(2 * below).step_by(2)).take(heads).collect()
}

/// A validated description of one attention: sizes, series, what is near, decay.
///
/// Made by [`Spec::new`]`(…).build()`; it cannot hold a combination the library would have to
/// refuse later for its own sake (a plan may still refuse what its machine cannot hold).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "SpecBuilder", into = "SpecBuilder")]
pub struct Spec {
    fields: SpecBuilder,
}

/// Collects the fields of a [`Spec`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpecBuilder {
    d_key: usize,
    d_value: usize,
    terms: Option<usize>,
    scale: Option<f64>,
    series: Series,
    near: Near,
    block: usize,
    sinks: usize,
    decay: Decay,
}

/// Number of terms when nothing is said: the paper's choice.
pub const DEFAULT_TERMS: usize = 4;
/// Terms beyond which no series is taken: far beyond the order at which 1/p! is 0 in f64.
const MAX_TERMS: usize = 1 << 16;
/// Largest key or value.
const MAX_SIZE: usize = 1 << 48;
/// Most tokens in a block.
const MAX_BLOCK: usize = 1 << 48;
/// Most tokens in all near blocks, and among sinks.
const MAX_NEAR: usize = 1 << 31;
/// Tokens in a block when nothing is said.
pub const DEFAULT_BLOCK: usize = 64;

impl Spec {
    /// Starts a spec for keys of `d_key` and values of `d_value` elements: four Taylor terms,
    /// scale 1/√d_key, nothing near, blocks of 64, no sinks, no decay.
    // The builder is the only way to a spec, so `new` gives the builder.
    #[allow(clippy::new_ret_no_self)]
    pub fn new(d_key: usize, d_value: usize) -> SpecBuilder {
        SpecBuilder {
            d_key,
            d_value,
            terms: None,
            scale: None,
            series: Series::Taylor,
            near: Near::None,
            block: DEFAULT_BLOCK,
            sinks: 0,
            decay: Decay::None,
        }
    }

    /// Elements of a query or key.
    pub fn d_key(&self) -> usize {
        self.fields.d_key
    }

    /// Elements of a value.
    pub fn d_value(&self) -> usize {
        self.fields.d_value
    }

    /// P: one more than the highest order.
    pub fn terms(&self) -> usize {
        match &self.fields.series {
            Series::Fixed { coefficients } => coefficients.len(),
            Series::Power { exponent, .. } => exponent + 1,
            _ => self.fields.terms.unwrap_or(DEFAULT_TERMS),
        }
    }

    /// c⁻¹: logits are x = scale · q·k.
    pub fn scale(&self) -> f64 {
        self.fields.scale.unwrap_or_else(|| 1.0 / (self.fields.d_key as f64).sqrt())
    }

    /// Which polynomial.
    pub fn series(&self) -> &Series {
        &self.fields.series
    }

    /// What is exact.
    pub fn near(&self) -> Near {
        self.fields.near
    }

    /// Tokens in a block.
    pub fn block(&self) -> usize {
        self.fields.block
    }

    /// First tokens that stay near for ever.
    pub fn sinks(&self) -> usize {
        self.fields.sinks
    }

    /// How weights fade.
    pub fn decay(&self) -> Decay {
        self.fields.decay
    }

    /// The orders a state must hold for this series, ascending.
    pub fn orders(&self) -> Vec<usize> {
        match &self.fields.series {
            Series::Fixed { coefficients } => {
                (0..coefficients.len()).filter(|&p| coefficients[p] != 0.0).collect()
            }
            Series::Power { exponent, floor } => {
                if *floor == 0.0 {
                    vec![*exponent]
                } else {
                    vec![0, *exponent]
                }
            }
            // The deviation of the logits is among what it needs.
            Series::Hermite { .. } => (0..self.terms().max(3)).collect(),
            _ => (0..self.terms()).collect(),
        }
    }

    /// a_0 … a_{P−1} of a series whose coefficients are the same for every query, else `None`.
    pub fn coefficients(&self) -> Option<Vec<f64>> {
        match &self.fields.series {
            Series::Taylor => {
                let mut a = 1.0;
                Some(
                    (0..self.terms())
                        .map(|p| {
                            if p > 0 {
                                a /= p as f64;
                            }
                            a
                        })
                        .collect(),
                )
            }
            Series::Fixed { coefficients } => Some(coefficients.clone()),
            Series::Power { exponent, floor } => {
                let mut a = vec![0.0; exponent + 1];
                a[0] = *floor;
                a[*exponent] = 1.0;
                Some(a)
            }
            Series::Gauss | Series::Hermite { .. } => None,
        }
    }
}

impl SpecBuilder {
    /// P, the number of terms, for series that do not imply it.
    pub fn terms(mut self, terms: usize) -> Self {
        self.terms = Some(terms);
        self
    }

    /// c⁻¹, by which q·k is multiplied.
    pub fn scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Which polynomial.
    pub fn series(mut self, series: Series) -> Self {
        self.series = series;
        self
    }

    /// What is exact.
    pub fn near(mut self, near: Near) -> Self {
        self.near = near;
        self
    }

    /// Tokens in a block, at least 1.
    pub fn block(mut self, block: usize) -> Self {
        self.block = block;
        self
    }

    /// First tokens that stay near for ever.
    pub fn sinks(mut self, sinks: usize) -> Self {
        self.sinks = sinks;
        self
    }

    /// How weights fade.
    pub fn decay(mut self, decay: Decay) -> Self {
        self.decay = decay;
        self
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::Spec`] naming the field, its value and what it needs.
    pub fn build(self) -> Result<Spec, Error> {
        let no = |field, value: String, requires: &str| {
            Err(Error::Spec { field, value, requires: requires.into() })
        };
        for (field, value) in [("d_key", self.d_key), ("d_value", self.d_value)] {
            if value == 0 || value > MAX_SIZE {
                return no(field, value.to_string(), &format!("it must be 1 to {MAX_SIZE}"));
            }
        }
        if self.block == 0 || self.block > MAX_BLOCK {
            let requires = format!("it must be 1 to {MAX_BLOCK} tokens");
            return no("block", self.block.to_string(), &requires);
        }
        let near = match self.near {
            Near::None => Some(0),
            Near::Blocks(n) => n.checked_add(1).and_then(|n| n.checked_mul(self.block)),
        };
        if near.is_none_or(|tokens| tokens > MAX_NEAR) {
            let requires = format!("its blocks must have at most {MAX_NEAR} tokens together");
            return no("near", format!("{:?} of {}", self.near, self.block), &requires);
        }
        if self.sinks > MAX_NEAR {
            return no("sinks", self.sinks.to_string(), &format!("it must be at most {MAX_NEAR}"));
        }
        if let Some(terms) = self.terms.filter(|&terms| terms > MAX_TERMS) {
            return no("terms", terms.to_string(), &format!("it must be at most {MAX_TERMS}"));
        }
        if self.terms == Some(0) {
            return no("terms", "0".into(), "a series needs at least 1 term");
        }
        if let Some(scale) = self.scale.filter(|s| !s.is_finite()) {
            return no("scale", scale.to_string(), "it must be finite");
        }
        let implied = match &self.series {
            Series::Taylor => None,
            Series::Fixed { coefficients } => {
                if let Some(p) = coefficients.iter().position(|a| !a.is_finite()) {
                    return no(
                        "series",
                        format!("a_{p} = {}", coefficients[p]),
                        "coefficients must be finite",
                    );
                }
                if coefficients.iter().all(|&a| a == 0.0) {
                    return no(
                        "series",
                        format!("{coefficients:?}"),
                        "at least one coefficient must not be 0",
                    );
                }
                if coefficients.len() > MAX_TERMS {
                    return no(
                        "series",
                        format!("{} coefficients", coefficients.len()),
                        &format!("there must be at most {MAX_TERMS}"),
                    );
                }
                Some(coefficients.len())
            }
            Series::Power { exponent, floor } => {
                if *exponent < 2 || exponent % 2 == 1 || *exponent >= MAX_TERMS {
                    return no(
                        "series",
                        format!("power:{exponent}"),
                        &format!(
                            "the exponent must be even, for weights to be positive, from 2 to {MAX_TERMS}"
                        ),
                    );
                }
                if !floor.is_finite() || *floor < 0.0 {
                    return no(
                        "series",
                        format!("power with floor {floor}"),
                        "the floor must be finite and at least 0",
                    );
                }
                Some(exponent + 1)
            }
            Series::Gauss => {
                let terms = self.terms.unwrap_or(DEFAULT_TERMS);
                if terms % 2 == 1 {
                    return no("terms", terms.to_string(), "gauss needs an even number of terms");
                }
                None
            }
            Series::Hermite { tau } => {
                if !tau.is_finite() || *tau < 0.0 {
                    return no("series", format!("hermite:{tau}"), "τ must be finite, at least 0");
                }
                None
            }
        };
        if let (Some(terms), Some(implied)) = (self.terms, implied)
            && terms != implied
        {
            return no(
                "terms",
                terms.to_string(),
                &format!("the series itself has {implied} terms (or leave terms unsaid)"),
            );
        }
        Ok(Spec { fields: self })
    }
}

impl TryFrom<SpecBuilder> for Spec {
    type Error = Error;
    fn try_from(fields: SpecBuilder) -> Result<Self, Error> {
        fields.build()
    }
}

impl From<Spec> for SpecBuilder {
    fn from(spec: Spec) -> Self {
        spec.fields
    }
}
