//! The state: everything that the past is to the future, in a size that never changes.

mod file;
mod sums;

use std::sync::Arc;

use crate::basis::Basis;
use crate::{Error, Plan, Real, Spec};

pub(crate) use sums::{FoldWork, HeadState, Open, Sums, fold_tokens};

/// The past of some sequences of equal spec: per key/value head the far sums and the raw keys and
/// values of the open block. Its size is fixed when it is made.
///
/// Tokens wait in the open block, weighed one by one, until the block is full; then it is summed
/// apart and *folded* into the far sums (with compensation in f32). Cloning forks the past.
#[derive(Clone, Debug)]
pub struct State<T> {
    pub(crate) spec: Spec,
    pub(crate) basis: Arc<Basis>,
    pub(crate) kv_heads: usize,
    pub(crate) sequences: Vec<Sequence<T>>,
}

/// One sequence of a state.
#[derive(Clone, Debug)]
pub(crate) struct Sequence<T> {
    /// Tokens seen.
    pub position: u64,
    /// Tokens of the open block: seen, not yet folded.
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
        let orders = spec.orders();
        let features = crate::basis::features(spec.d_key(), &orders);
        let bytes = bytes_needed::<T>(spec, sequences, kv_heads);
        crate::memory::check(spec.d_key(), &orders, features, "the state", bytes)?;
        Ok(Self::empty(spec.clone(), plan.basis()?, sequences, kv_heads))
    }

    fn empty(spec: Spec, basis: Arc<Basis>, sequences: usize, kv_heads: usize) -> Self {
        let head = HeadState::new(&spec, &basis);
        let sequence = Sequence { position: 0, open: 0, heads: vec![head; kv_heads] };
        State { spec, basis, kv_heads, sequences: vec![sequence; sequences] }
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

    /// Bytes of all its numbers: far sums, compensation, open blocks.
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

    /// Appends the past of `next`, a state of the stretch of tokens that follows this one's, made
    /// on its own. Merging is associative: (a b) c = a (b c), to rounding.
    ///
    /// # Errors
    /// [`Error::State`] when the two differ in spec, sequences or heads, or are too long together
    /// to be counted; nothing changes then.
    pub fn merge(&mut self, next: &Self) -> Result<(), Error> {
        self.check_kin(next)?;
        for (mine, other) in self.sequences.iter().zip(&next.sequences) {
            let sum = mine.position.checked_add(other.position);
            if sum.is_none_or(|sum| sum > MAX_POSITION) {
                return Err(Error::State {
                    field: "position",
                    state: mine.position.to_string(),
                    call: other.position.to_string(),
                });
            }
        }
        let kernels = T::kernels(crate::Level::detect()?, self.spec.d_value(), false);
        let mut work = sums::FoldWork::new(&self.basis, self.spec.d_value(), kernels);
        for (mine, other) in self.sequences.iter_mut().zip(&next.sequences) {
            for (head, next) in mine.heads.iter_mut().zip(&other.heads) {
                // Tokens between two far stretches are far too; the later open block stays open.
                head.fold_open(&self.basis, mine.open, &mut work);
                head.sums.add(&next.sums);
                head.open = next.open.clone();
            }
            mine.position += other.position;
            mine.open = other.open;
        }
        Ok(())
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
        check_layout(&self.spec, spec, false)
    }
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

/// Bytes of a state before it is made.
fn bytes_needed<T: Real>(spec: &Spec, sequences: usize, kv_heads: usize) -> u128 {
    let (d_key, d_value) = (spec.d_key(), spec.d_value());
    let width = size_of::<T>();
    let far = crate::cost::state_bytes(d_key, d_value, &spec.orders(), width, T::COMPENSATED);
    let token = d_key as u128 + d_value as u128 + 1;
    let open = (spec.block() as u128 + 16).saturating_mul(token).saturating_mul(width as u128);
    // Working memory of a step, and what alignment adds.
    let rest = (token + spec.terms() as u128 + 512).saturating_mul(width as u128);
    far.saturating_add(open)
        .saturating_add(rest)
        .saturating_mul(sequences as u128)
        .saturating_mul(kv_heads as u128)
}
