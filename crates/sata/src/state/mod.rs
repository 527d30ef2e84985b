//! The state: everything that the past is to the future, in a size that never changes.

mod centre;
mod file;
mod head;
mod mark;
mod merge;
mod parts;
mod sums;

use std::sync::Arc;

use crate::basis::Basis;
use crate::{Error, Plan, Real, Spec};

pub use centre::Centre;
pub(crate) use head::{HeadState, OneWork, Raw, capacity};
pub(crate) use mark::{Mark, faded, running, running_into};
pub use parts::StateParts;
pub(crate) use parts::is_place;
pub(crate) use sums::{FoldWork, Sums};

/// The past of some sequences of equal spec: per key/value head the far sums and the raw keys and
/// values of the open blocks and sinks. Its size is fixed when it is made.
///
/// Tokens wait in the open blocks, weighed one by one, until their block is no longer near (with
/// nothing near: until it is full); then it is summed apart and *folded* into the far sums (with
/// compensation in f32). Cloning forks the past.
#[derive(Clone, Debug)]
pub struct State<T> {
    pub(crate) spec: Spec,
    pub(crate) basis: Arc<Basis>,
    pub(crate) kv_heads: usize,
    pub(crate) centre: Option<Arc<Centre>>,
    pub(crate) sequences: Vec<Sequence<T>>,
}

/// One sequence of a state.
#[derive(Clone, Debug)]
pub(crate) struct Sequence<T> {
    /// Tokens seen.
    pub position: u64,
    /// Tokens of the open blocks: seen, not yet folded.
    pub open: usize,
    pub heads: Vec<HeadState<T>>,
}

impl<T: Real> State<T> {
    /// An empty past of `sequences` sequences with `kv_heads` key/value heads each, for plans of
    /// this spec. `T` is the compute type of the inputs: `f64` for `f64`, `f32` for the others.
    ///
    /// # Errors
    /// [`Error::Shape`] for zero sequences or heads, [`Error::TooLarge`] when it does not fit in
    /// memory.
    pub fn new(plan: &Plan, sequences: usize, kv_heads: usize) -> Result<Self, Error> {
        if sequences == 0 || kv_heads == 0 {
            return Err(Error::shape(
                "state",
                &[sequences, kv_heads],
                "it needs at least one sequence and one key/value head",
            ));
        }
        let spec = plan.spec();
        Self::with_room(plan, sequences, kv_heads, [capacity(spec), spec.sinks()])
    }

    /// One that is dropped after a call over up to `keys` tokens: none of them wait in it.
    pub(crate) fn temporary(
        plan: &Plan,
        sequences: usize,
        kv_heads: usize,
        keys: usize,
    ) -> Result<Self, Error> {
        Self::with_room(plan, sequences, kv_heads, [0, plan.spec().sinks().min(keys)])
    }

    fn with_room(
        plan: &Plan,
        sequences: usize,
        kv_heads: usize,
        room: [usize; 2],
    ) -> Result<Self, Error> {
        let spec = plan.spec();
        let orders = spec.orders();
        let features = crate::basis::features(spec.d_key(), &orders);
        let bytes = bytes_needed::<T>(spec, sequences, kv_heads, room);
        crate::memory::check(spec.d_key(), &orders, features, "the state", bytes)?;
        Ok(Self::empty(spec.clone(), plan.basis()?, sequences, kv_heads, room))
    }

    /// An empty past that keeps keys and values less a constant vector per key/value head.
    /// Answers are those of [`State::new`], to rounding; see [`Centre`].
    ///
    /// # Errors
    /// As for [`State::new`]; [`Error::Shape`] when the centre has other sizes;
    /// [`Error::Unsupported`] for series that keep some orders but not all below them.
    pub fn centred(
        plan: &Plan,
        sequences: usize,
        kv_heads: usize,
        centre: Centre,
    ) -> Result<Self, Error> {
        let spec = plan.spec();
        let (keys, values) = (centre.keys.len(), centre.values.len());
        let fits = centre.kv_heads == kv_heads
            && Some(keys) == kv_heads.checked_mul(spec.d_key())
            && Some(values) == kv_heads.checked_mul(spec.d_value());
        if !fits {
            let expected = format!(
                "the state has {kv_heads} key/value heads with keys of {} and values of {}",
                spec.d_key(),
                spec.d_value()
            );
            return Err(Error::shape("centre", &[centre.kv_heads, keys, values], expected));
        }
        check_centre(true, spec)?;
        let mut state = Self::new(plan, sequences, kv_heads)?;
        state.centre = Some(Arc::new(centre));
        Ok(state)
    }

    /// With room for so many open tokens and sinks.
    fn empty(
        spec: Spec,
        basis: Arc<Basis>,
        sequences: usize,
        kv_heads: usize,
        room: [usize; 2],
    ) -> Self {
        let head = HeadState::new(&spec, &basis, room);
        let sequence = Sequence { position: 0, open: 0, heads: vec![head; kv_heads] };
        State { spec, basis, kv_heads, centre: None, sequences: vec![sequence; sequences] }
    }

    /// The spec it was made for.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// How many sequences.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// How many key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Tokens that sequence `sequence` has seen, masked ones included; 0 for one it does not have.
    pub fn position(&self, sequence: usize) -> u64 {
        self.sequences.get(sequence).map_or(0, |s| s.position)
    }

    /// What is taken off its keys and values, if anything.
    pub fn centre(&self) -> Option<&Centre> {
        self.centre.as_deref()
    }

    /// Bytes of all its numbers: far sums, compensation, open blocks, sinks.
    pub fn bytes(&self) -> usize {
        self.sequences.iter().flat_map(|s| &s.heads).map(HeadState::bytes).sum()
    }

    /// An independent copy.
    pub fn fork(&self) -> Self {
        self.clone()
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        for sequence in &mut self.sequences {
            sequence.position = 0;
            sequence.open = 0;
            sequence.heads.iter_mut().for_each(HeadState::reset);
        }
    }

    fn check_kin(&self, other: &Self) -> Result<(), Error> {
        let differs = |field, state: String, call: String| Err(Error::State { field, state, call });
        if self.sequences.len() != other.sequences.len() {
            return differs(
                "sequences",
                self.sequences.len().to_string(),
                other.sequences.len().to_string(),
            );
        }
        if self.kv_heads != other.kv_heads {
            return differs("kv_heads", self.kv_heads.to_string(), other.kv_heads.to_string());
        }
        if self.centre != other.centre {
            let name = |centre: &Option<Arc<Centre>>| {
                centre.as_ref().map_or("none", |_| "another").to_string()
            };
            let state = if self.centre.is_some() { "its own" } else { "none" };
            return differs("centre", state.into(), name(&other.centre));
        }
        check_layout(&self.spec, &other.spec, true)
    }

    /// Refuses a call of `spec` over `sequences` and `kv_heads` that this state cannot serve.
    pub(crate) fn check(
        &self,
        spec: &Spec,
        sequences: usize,
        kv_heads: usize,
    ) -> Result<(), Error> {
        let differs = |field, state: usize, call: usize| {
            Err(Error::State { field, state: state.to_string(), call: call.to_string() })
        };
        if self.sequences.len() != sequences {
            return differs("sequences", self.sequences.len(), sequences);
        }
        if self.kv_heads != kv_heads {
            return differs("kv_heads", self.kv_heads, kv_heads);
        }
        check_layout(&self.spec, spec, false)?;
        check_centre(self.centre.is_some(), spec)
    }

    /// Refuses `keys` more tokens than a sequence can count.
    pub(crate) fn check_room(&self, sequence: usize, keys: usize) -> Result<(), Error> {
        let position = self.position(sequence);
        if u64::try_from(keys).is_ok_and(|keys| keys <= MAX_POSITION - position) {
            return Ok(());
        }
        let (state, call) = (position.to_string(), format!("{keys} more tokens"));
        Err(Error::State { field: "position", state, call })
    }
}

/// Refuses series that keep some orders but not all below them, where keys have a centre: what it
/// takes off a logit brings the lower orders in.
pub(crate) fn check_centre(centred: bool, spec: &Spec) -> Result<(), Error> {
    let orders = spec.orders();
    if !centred || orders.iter().enumerate().all(|(i, &p)| i == p) {
        return Ok(());
    }
    let what = format!("a centre for the orders {orders:?}, without all below them,");
    Err(Error::Unsupported { what, by: "the CPU engine" })
}

/// Refuses a call whose sums would not be those of the state. A state serves every series whose
/// orders it holds, and any scale, since neither is part of its sums.
fn check_layout(state: &Spec, call: &Spec, same_orders: bool) -> Result<(), Error> {
    let fields = [
        ("d_key", state.d_key().to_string(), call.d_key().to_string()),
        ("d_value", state.d_value().to_string(), call.d_value().to_string()),
        ("block", state.block().to_string(), call.block().to_string()),
        ("near", format!("{:?}", state.near()), format!("{:?}", call.near())),
        ("sinks", state.sinks().to_string(), call.sinks().to_string()),
        ("decay", format!("{:?}", state.decay()), format!("{:?}", call.decay())),
    ];
    for (field, state, call) in fields {
        if state != call {
            return Err(Error::State { field, state, call });
        }
    }
    let (holds, needs) = (state.orders(), call.orders());
    let fits = if same_orders { holds == needs } else { needs.iter().all(|p| holds.contains(p)) };
    if !fits {
        return Err(Error::State {
            field: "orders",
            state: format!("{holds:?}"),
            call: format!("{needs:?}"),
        });
    }
    Ok(())
}

/// Tokens that a sequence can count: what fits a signed number in every language that reads files.
const MAX_POSITION: u64 = i64::MAX as u64;

/// Bytes of a state with room for so many open tokens and sinks, before it is made.
fn bytes_needed<T: Real>(
    spec: &Spec,
    sequences: usize,
    kv_heads: usize,
    [open, sinks]: [usize; 2],
) -> u128 {
    let (d_key, d_value) = (spec.d_key(), spec.d_value());
    let width = size_of::<T>();
    let far = crate::cost::state_bytes(d_key, d_value, &spec.orders(), width, T::COMPENSATED);
    let token = d_key as u128 + d_value as u128 + 1;
    let raw = (open as u128).saturating_add(sinks as u128 + 32);
    // Each has a decay, and room for how far it has faded.
    let open = raw.saturating_mul((token + 2).saturating_mul(width as u128) + 8);
    // Working memory of a step, and what alignment adds.
    let planes = spec.orders().len() as u128;
    let rest = token + planes.saturating_mul(spec.d_value() as u128 + 20);
    let rest = (rest + spec.terms() as u128 + 512).saturating_mul(width as u128);
    far.saturating_add(open)
        .saturating_add(rest)
        .saturating_mul(sequences as u128)
        .saturating_mul(kv_heads as u128)
}
