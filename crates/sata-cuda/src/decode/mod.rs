//! Decode: one token for each of many sequences, at the speed of memory.
//!
//! A [`Decoder`] holds all that steps of one size need, so that a step allocates nothing, asks the
//! device nothing, and is one launch: it can be captured in a graph ([`crate::Device::capture`])
//! and replayed, token after token. Positions are on the device; the kernel (`decode.cu`) reads the
//! far sums once for all query heads of a key/value head, folds a block when it is full, and leaves
//! the token in the state.

mod params;
mod recipe;
mod tables;
mod unit;

use std::sync::Arc;

use sata::basis::Basis;
use sata::{Decay, Diagnostics, Error as CallError, Series, Spec};

use params::Params;
pub use recipe::{Recipe, Sizes};
use tables::Tables;

use crate::state::{Arrays, capacity, check_layout};
use crate::{Buffer, Element, Error, Kernel, Plan, RawView, State, Storage, View, ViewMut};

/// One token of each of some sequences.
///
/// q is `[entries, query_heads, 1, d_key]`, k `[entries, kv_heads, 1, d_key]`, v
/// `[entries, kv_heads, 1, d_value]`.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a, E> {
    q: View<'a, E>,
    k: View<'a, E>,
    v: View<'a, E>,
    slots: Option<&'a Buffer<u32>>,
    log_gates: Option<View<'a, f32>>,
    slopes: Option<&'a Buffer<f64>>,
}

impl<'a, E: Element> Step<'a, E> {
    /// For sequences 0, 1, 2 … of the state.
    pub fn new(q: View<'a, E>, k: View<'a, E>, v: View<'a, E>) -> Self {
        Step { q, k, v, slots: None, log_gates: None, slopes: None }
    }

    /// Which sequence of the state each entry is, `[entries]`. They must differ from each other.
    /// An entry that the state does not have, such as `u32::MAX`, is passed over: its output stays
    /// as it was. So a graph of a fixed size serves fewer sequences.
    pub fn slots(mut self, slots: &'a Buffer<u32>) -> Self {
        self.slots = Some(slots);
        self
    }

    /// Logarithms of the forget gates, `[entries, kv_heads, 1, 1]`, for a spec with gates. Above 0
    /// they are not refused, since nobody looks at them on the way.
    pub fn log_gates(mut self, log_gates: View<'a, f32>) -> Self {
        self.log_gates = Some(log_gates);
        self
    }

    /// Slopes of the key/value heads, `[kv_heads]`, for a spec with slopes.
    pub fn slopes(mut self, slopes: &'a Buffer<f64>) -> Self {
        self.slopes = Some(slopes);
        self
    }
}

/// All that steps of some number of sequences need. See the module's page.
///
/// A decoder has memory of its own that a step works in: steps of one decoder must follow each
/// other, as they do on one stream.
#[derive(Debug)]
pub struct Decoder {
    spec: Spec,
    recipe: Recipe,
    kernel: Kernel,
    element: &'static str,
    entries: usize,
    query_heads: usize,
    kv_heads: usize,
    sequences: usize,
    orders: Vec<usize>,
    storage: Storage,
    params: Params,
    shared: u32,
    tally: Buffer<u64>,
    /// What `params` points to.
    #[allow(dead_code)]
    held: Held,
}

/// Tables and work arrays of a decoder.
#[derive(Debug)]
#[allow(dead_code)]
struct Held {
    features: Buffer<[u32; 2]>,
    more_indices: Buffer<u32>,
    coefficients: Buffer<f32>,
    partial: Buffer<f32>,
    done: Buffer<u32>,
}

impl Decoder {
    /// One for steps of `entries` sequences with `query_heads` query heads each, with states such
    /// as `state`.
    ///
    /// # Errors
    /// [`sata::Error::State`] naming the field in which the state does not fit the plan;
    /// [`sata::Error::Shape`] for no entries, or heads that are no multiple of the state's;
    /// [`Error::Unsupported`] for sizes that the kernel does not count or the device has no shared
    /// memory for; what [`crate::Device::kernel`] fails with; [`Error::OutOfMemory`].
    pub fn new<E: Element>(
        plan: &Plan,
        state: &State,
        entries: usize,
        query_heads: usize,
    ) -> Result<Self, Error> {
        let sizes = sizes_of(plan, state, entries, query_heads)?;
        let recipe = Recipe::choose(&sizes, plan.device().properties())?;
        Self::made::<E>(plan, state, [entries, query_heads], &sizes, recipe)
    }

    /// The same, laid out by another recipe: for measuring.
    ///
    /// # Errors
    /// As for [`Decoder::new`]; [`sata::Error::Spec`] naming a field of the recipe.
    pub fn with_recipe<E: Element>(
        plan: &Plan,
        state: &State,
        entries: usize,
        query_heads: usize,
        recipe: Recipe,
    ) -> Result<Self, Error> {
        let sizes = sizes_of(plan, state, entries, query_heads)?;
        recipe.check(&sizes)?;
        Self::made::<E>(plan, state, [entries, query_heads], &sizes, recipe)
    }

    fn made<E: Element>(
        plan: &Plan,
        state: &State,
        [entries, query_heads]: [usize; 2],
        sizes: &Sizes,
        recipe: Recipe,
    ) -> Result<Self, Error> {
        let (device, spec) = (plan.device(), plan.spec());
        let (sequences, kv_heads) = (state.sequences(), state.kv_heads());
        let storage = state.storage();
        // A state may hold higher orders than the plan that goes on with it.
        let basis = match state.orders() == plan.orders() {
            true => plan.basis()?,
            false => Arc::new(Basis::new(spec.d_key(), state.orders())?),
        };
        let unit = unit::unit::<E>(spec, basis.orders(), sizes, &recipe, storage.sums);
        let kernel = device.kernel(&unit, "decode")?;
        let highest = basis.orders().last().copied().unwrap_or(0);
        let coefficients = spec.coefficients().unwrap_or_else(|| vec![1.0; highest + 1]);
        let tables = Tables::new(&basis, &coefficients);
        let coefficients: Vec<f32> = coefficients.iter().map(|&a| a as f32).collect();
        let partial = match recipe.split {
            1 => 0,
            split => sizes.units * split as usize * recipe.partial(sizes),
        };
        let held = Held {
            features: Buffer::from_slice(device, &tables.features)?,
            more_indices: Buffer::from_slice(device, &tables.more_indices)?,
            coefficients: Buffer::from_slice(device, &coefficients)?,
            partial: Buffer::uninit(device, partial)?,
            done: Buffer::zeroed(device, sizes.units + sequences)?,
        };
        let tally = Buffer::<u64>::zeroed(device, TALLY)?;
        let tau = if let Series::Hermite { tau } = spec.series() { *tau } else { 0.0 };
        // What rounding leaves in sums over features, as the CPU engine counts it.
        let rounding = f64::from(f32::EPSILON);
        let params = Params {
            features: held.features.address(),
            more_indices: held.more_indices.address(),
            coefficients: held.coefficients.address(),
            partial: held.partial.address(),
            parts_done: held.done.address(),
            heads_done: held.done.address_of(sizes.units),
            tally: tally.address(),
            relative_noise: 32.0 * rounding,
            absolute_noise: 4.0 * rounding,
            entries: entries as u32,
            kv_heads: kv_heads as u32,
            sequences: sequences as u32,
            split: recipe.split,
            scale: spec.scale() as f32,
            tau: tau as f32,
            ..Params::default()
        };
        Ok(Decoder {
            spec: spec.clone(),
            recipe,
            kernel,
            element: E::KERNEL_NAME,
            entries,
            query_heads,
            kv_heads,
            sequences,
            orders: basis.orders().to_vec(),
            storage,
            params,
            shared: u32::try_from(recipe.shared_bytes(sizes)).unwrap_or(u32::MAX),
            tally,
            held,
        })
    }

    /// Answers one token of each entry into `out` `[entries, query_heads, 1, d_value]`, and leaves
    /// it in the state. One launch; nothing is allocated, and nothing waits.
    ///
    /// # Errors
    /// [`sata::Error::Shape`] naming an argument; [`sata::Error::State`] for a state unlike that
    /// which the decoder was made for; [`Error::Argument`] for another device or type of numbers;
    /// [`Error::Launch`]. A sequence of 2⁶³ tokens is not refused: its position is on the device.
    pub fn step<E: Element>(
        &self,
        state: &mut State,
        step: &Step<'_, E>,
        mut out: ViewMut<'_, E>,
    ) -> Result<(), Error> {
        let like = |field, state: String, call: String| {
            Err(Error::Call(CallError::State { field, state, call }))
        };
        check_layout(state.spec(), &self.spec, state.orders(), &self.orders)?;
        if state.orders() != self.orders {
            let (state, call) = (format!("{:?}", state.orders()), format!("{:?}", self.orders));
            return like("orders", state, call);
        }
        if state.storage() != self.storage {
            return like("sums", format!("{:?}", state.storage()), format!("{:?}", self.storage));
        }
        for (field, state, call) in [
            ("sequences", state.sequences(), self.sequences),
            ("kv_heads", state.kv_heads(), self.kv_heads),
        ] {
            if state != call {
                return like(field, state.to_string(), call.to_string());
            }
        }
        self.launch(state.arrays(), step, &mut out)
    }

    /// How steps are laid out.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The kernel, for its registers.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    fn launch<E: Element>(
        &self,
        state: Arrays,
        step: &Step<'_, E>,
        y: &mut ViewMut<'_, E>,
    ) -> Result<(), Error> {
        self.check(step, y)?;
        let gates = step.log_gates.as_ref().map_or(RawView::NONE, View::raw);
        let params = Params {
            q: step.q.raw(),
            k: step.k.raw(),
            v: step.v.raw(),
            y: y.raw(),
            log_gates: gates.address,
            gates_batch: gates.batch,
            gates_head: gates.head,
            slopes: step.slopes.map_or(0, Buffer::address),
            slots: step.slots.map_or(0, Buffer::address),
            state,
            ..self.params
        };
        let launch = self.recipe.launch(self.entries * self.kv_heads, self.shared)?;
        // SAFETY: views were checked for what they point to, and for this decoder's sizes; the
        // state is of its sizes, and so are its own tables and work arrays.
        unsafe { self.kernel.launch(launch, &params) }
    }

    fn check<E: Element>(&self, step: &Step<'_, E>, y: &ViewMut<'_, E>) -> Result<(), Error> {
        if E::KERNEL_NAME != self.element {
            let reason =
                format!("the decoder was made for {}, not {}", self.element, E::KERNEL_NAME);
            return Err(Error::argument("q", reason));
        }
        let (n, heads, kv_heads) = (self.entries, self.query_heads, self.kv_heads);
        let (d_key, d_value) = (self.spec.d_key(), self.spec.d_value());
        for (argument, got, want) in [
            ("q", step.q.shape(), [n, heads, 1, d_key]),
            ("k", step.k.shape(), [n, kv_heads, 1, d_key]),
            ("v", step.v.shape(), [n, kv_heads, 1, d_value]),
            ("out", y.shape(), [n, heads, 1, d_value]),
        ] {
            if got != want {
                return Err(shape(argument, &got, format!("the decoder needs {want:?}")));
            }
        }
        if let Some(slots) = step.slots
            && slots.len() != n
        {
            return Err(shape("slots", &[slots.len()], format!("the decoder has {n} entries")));
        }
        let decay = self.spec.decay();
        let wants = format!("the spec has decay = {decay:?}");
        let gates = step.log_gates.map(|gates| gates.shape());
        match (decay, gates) {
            (Decay::Gates, None) => return Err(shape("log_gates", &[], wants)),
            (Decay::Gates, Some(got)) if got != [n, kv_heads, 1, 1] => {
                let wants = format!("the decoder needs {:?}", [n, kv_heads, 1, 1]);
                return Err(shape("log_gates", &got, wants));
            }
            (Decay::Gates, _) | (_, None) => (),
            (_, Some(got)) => return Err(shape("log_gates", &got, wants)),
        }
        match (decay, step.slopes) {
            (Decay::Slopes, None) => Err(shape("slopes", &[], wants)),
            (Decay::Slopes, Some(slopes)) if slopes.len() != kv_heads => {
                let wants = format!("there must be one for each of the {kv_heads} heads");
                Err(shape("slopes", &[slopes.len()], wants))
            }
            (Decay::Slopes, _) | (_, None) => Ok(()),
            (_, Some(slopes)) => Err(shape("slopes", &[slopes.len()], wants)),
        }
    }

    /// What was noticed about denominators since this was last asked, over all steps; `first` is
    /// entry, query head and 0. Waits for the stream.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn diagnostics(&mut self) -> Result<Diagnostics, Error> {
        let found = self.tally.to_vec()?;
        self.tally.fill_bytes(0)?;
        let [non_positive, non_finite, first] = [found[0], found[1], found[2]];
        // Every fourth number is a counter.
        let queries = found[4..].iter().step_by(4).sum();
        let heads = self.query_heads;
        let place = |first: u64| [!first as usize / heads, !first as usize % heads, 0];
        Ok(Diagnostics {
            queries,
            non_positive,
            non_finite,
            first: (first != 0).then(|| place(first)),
            heads: vec![],
        })
    }
}

impl Plan {
    /// One token of each entry of `step`, with a decoder that the plan makes at the first step of
    /// its sizes and keeps: see [`Decoder::step`].
    ///
    /// # Errors
    /// As for [`Decoder::new`] and [`Decoder::step`].
    pub fn step<E: Element>(
        &self,
        state: &mut State,
        step: &Step<'_, E>,
        out: ViewMut<'_, E>,
    ) -> Result<(), Error> {
        let [entries, query_heads, ..] = step.q.shape();
        let name = format!(
            "{} {entries} {query_heads} {} {} {:?} {:?}",
            E::KERNEL_NAME,
            state.sequences(),
            state.kv_heads(),
            state.orders(),
            state.storage(),
        );
        let make = || Decoder::new::<E>(self, state, entries, query_heads);
        self.once(name, make)?.step(state, step, out)
    }
}

fn shape(argument: &'static str, got: &[usize], expected: impl Into<String>) -> Error {
    Error::Call(CallError::Shape { argument, got: got.to_vec(), expected: expected.into() })
}

/// What a recipe is chosen by; checked for what the kernel counts in 32 bits.
fn sizes_of(
    plan: &Plan,
    state: &State,
    entries: usize,
    query_heads: usize,
) -> Result<Sizes, Error> {
    let (spec, kv_heads) = (plan.spec(), state.kv_heads());
    check_layout(state.spec(), spec, state.orders(), plan.orders())?;
    if !state.device().is_same(plan.device()) {
        return Err(Error::argument("state", "it lies on another device than the plan"));
    }
    if entries == 0 || query_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
        let expected = format!(
            "it needs an entry, and query heads that are a multiple of the {kv_heads} key/value heads"
        );
        return Err(shape("q", &[entries, query_heads, 1, spec.d_key()], expected));
    }
    let per_query = unit::is_per_query(spec);
    let sizes = Sizes {
        d_key: spec.d_key(),
        d_value: spec.d_value(),
        features: state.features(),
        width: state.storage().sums.width(),
        group: query_heads / kv_heads,
        planes: if per_query { state.orders().len() } else { 1 },
        terms: if per_query { spec.terms() } else { 0 },
        block: spec.block(),
        units: entries.saturating_mul(kv_heads),
    };
    const MOST: usize = i32::MAX as usize / 2;
    for (what, size) in [
        ("features", sizes.features),
        ("open tokens", capacity(spec)),
        ("sinks", spec.sinks()),
        ("query heads", sizes.units.saturating_mul(sizes.group)),
        ("sequences", state.sequences()),
    ] {
        if size > MOST {
            return Err(Error::Unsupported { what: format!("decoding with {size} {what}") });
        }
    }
    if sizes.terms > MOST_FITTED {
        let what = format!("decoding with {} terms of each query's own", sizes.terms);
        return Err(Error::Unsupported { what });
    }
    Ok(sizes)
}

/// Words of the kernel's `Tally`: three numbers, and counters four words apart.
const TALLY: usize = 4 + 4 * 32;

/// Most terms of a series that is fitted to each query: as many as their nodes can use.
const MOST_FITTED: usize = 32;
