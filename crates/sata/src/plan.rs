//! A plan: what one spec needs on this machine, made once, shared by threads.

use std::sync::{Arc, OnceLock};

use serde::Serialize;

use crate::arch::{Kernels, Level, PANEL};
use crate::basis::{Basis, features};
use crate::{Element, Error, Real, Spec, cost};

/// How a call is computed. Both give the same numbers, to rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Every query weighs every key by the polynomial: quadratic, best for short contexts.
    Direct,
    /// Queries read sums of features: linear.
    State,
}

/// The choices made for one call, as plain data.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recipe {
    /// Direct or state form.
    pub form: Form,
    /// Tokens whose sums are added to the far sums at once.
    pub chunk: usize,
    /// Parts that the features of one head are split into, one thread each.
    pub slices: usize,
    /// Number of features.
    pub features: u128,
    /// Name of the kernels.
    pub kernels: &'static str,
    /// Estimated cost per key/value head, in FLOPs of the vector kernels: direct form.
    pub direct_flops: f64,
    /// The same for the state form.
    pub state_flops: f64,
}

/// Sizes that a recipe depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub units: usize,
    pub group: usize,
    pub queries: usize,
    pub keys: usize,
    pub causal: bool,
    /// Whether sums are read before or asked for after.
    pub state: bool,
    pub threads: usize,
}

/// A spec made ready: basis tables, coefficients, choice of kernels. Immutable; share it by
/// reference or [`Arc`].
#[derive(Debug)]
pub struct Plan {
    spec: Spec,
    level: Level,
    form: Option<Form>,
    orders: Vec<usize>,
    basis: OnceLock<Arc<Basis>>,
}

impl Plan {
    /// A plan for the best instruction set of this machine, or the one that `SATA_SIMD` names
    /// (`portable`, `avx2`, `avx512`, `amx`).
    ///
    /// # Errors
    /// [`Error::Level`] for an unknown or unavailable level.
    pub fn new(spec: &Spec) -> Result<Self, Error> {
        Self::with_level(spec, Level::detect()?)
    }

    /// A plan for a given instruction set.
    ///
    /// # Errors
    /// As for [`Plan::new`].
    pub fn with_level(spec: &Spec, level: Level) -> Result<Self, Error> {
        if !level.is_available() {
            // Parsing the name gives the error that says what there is.
            level.to_string().parse::<Level>()?;
        }
        Ok(Plan {
            orders: spec.orders(),
            spec: spec.clone(),
            level,
            form: None,
            basis: OnceLock::new(),
        })
    }

    /// The same plan, held to one form instead of choosing per call.
    pub fn with_form(mut self, form: Form) -> Self {
        self.form = Some(form);
        self
    }

    /// What it was made for.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Its instruction set.
    pub fn level(&self) -> Level {
        self.level
    }

    /// The basis of the spec's orders, made at first use.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when its tables do not fit in memory.
    pub fn basis(&self) -> Result<Arc<Basis>, Error> {
        if let Some(basis) = self.basis.get() {
            return Ok(basis.clone());
        }
        let basis = Arc::new(Basis::new(self.spec.d_key(), &self.orders)?);
        Ok(self.basis.get_or_init(|| basis).clone())
    }

    pub(crate) fn kernels<E: Element>(&self) -> &'static Kernels<E::Compute> {
        E::Compute::kernels(self.level, self.spec.d_value(), E::BF16)
    }

    /// Bytes of the far sums of one key/value head for inputs of type `E`, compensation included.
    pub fn state_bytes<E: Element>(&self) -> u128 {
        let width = size_of::<E::Compute>();
        let compensated = E::Compute::COMPENSATED;
        cost::state_bytes(self.spec.d_key(), self.spec.d_value(), &self.orders, width, compensated)
    }

    /// What would be done for `queries` queries and `keys` keys of `units` key/value heads (over
    /// all sequences), each read by `group` query heads, on `threads` threads.
    pub fn recipe<E: Element>(
        &self,
        [units, group]: [usize; 2],
        [queries, keys]: [usize; 2],
        causal: bool,
        state: bool,
        threads: usize,
    ) -> Recipe {
        let (units, group, threads) = (units.max(1), group.max(1), threads.max(1));
        self.choose::<E>(Sizes { units, group, queries, keys, causal, state, threads })
    }

    pub(crate) fn choose<E: Element>(&self, sizes: Sizes) -> Recipe {
        let (d_key, d_value) = (self.spec.d_key(), self.spec.d_value());
        let features = features(d_key, &self.orders);
        let [by_features, by_pairs] = self.kernels::<E>().speed;
        let one = features as f64 * 2.0 * (d_value as f64 + 1.0) / by_features;
        let pair = cost::direct_flops(d_key, d_value, self.spec.terms()) as f64 / by_pairs;
        let (queries, keys, group) = (sizes.queries as f64, sizes.keys as f64, sizes.group as f64);
        // Adding a chunk's sums to the far sums and preparing these for reading costs about as
        // much as 32 FLOPs an element; half a chunk per query is weighed directly.
        let touch = 32.0 * features as f64 * (d_value as f64 + 1.0);
        let chunk = (2.0 * touch / (pair * group)).sqrt();
        let chunk = ((chunk / PANEL as f64).round() as usize).clamp(1, 32) * PANEL;
        let pairs = if sizes.causal { queries * keys / 2.0 } else { queries * keys };
        let direct_flops = group * pairs * pair;
        let within = if sizes.causal {
            group * queries * chunk.min(sizes.keys) as f64 / 2.0 * pair
        } else {
            0.0
        };
        let chunks = (keys / chunk as f64).ceil();
        let state_flops = one * (group * queries + keys) + chunks * touch + within;
        let form = self.form.unwrap_or(if !sizes.state && direct_flops <= state_flops {
            Form::Direct
        } else {
            Form::State
        });
        // Heads first; what threads are left split the features of each.
        let slices = match form {
            Form::Direct => 1,
            Form::State => {
                let tiles = (features / crate::basis::TILE as u128).min(1 << 20) as usize;
                let rounds = sizes.units.div_ceil(sizes.threads).max(1);
                // Splitting pays when whole heads would leave threads idle.
                let idle = rounds.saturating_mul(sizes.threads).saturating_sub(sizes.units);
                if idle.saturating_mul(4) > sizes.units {
                    sizes.threads.div_ceil(sizes.units.min(sizes.threads)).clamp(1, tiles.max(1))
                } else {
                    1
                }
            }
        };
        Recipe {
            form,
            chunk,
            slices,
            features,
            kernels: self.kernels::<E>().name,
            direct_flops,
            state_flops,
        }
    }
}
