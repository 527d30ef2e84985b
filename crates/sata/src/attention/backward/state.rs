//! Gradients by a state, handed from a later call to an earlier one.

use super::panel::Made;
use crate::arch::TOKENS;
use crate::state::{Sums, capacity};
use crate::{Error, Plan, Real, Spec, State};

/// The gradient of a loss by all that a [`State`] holds, for backward through calls that went on
/// with one state: the last call first, each from what the call after it has left here.
///
/// ```
/// use sata::{Call, Gradients, Plan, Spec, State, StateGradient, View, ViewMut};
///
/// let plan = Plan::new(&Spec::new(2, 2).terms(3).build()?)?;
/// let (x, shape) = ([0.1, 0.2, 0.3, -0.4, 0.5, -0.6], [1, 1, 3, 2]);
/// let x = || View::new(&x, shape);
/// let mut y = [0.0; 6];
/// let mut state = State::<f64>::new(&plan, 1, 1)?;
/// let before = state.fork(); // an initial state is needed again
/// plan.run(Call::causal(x()?, x()?, x()?).state(&mut state), ViewMut::new(&mut y, shape)?)?;
/// let mut between = state.fork();
/// plan.run(Call::causal(x()?, x()?, x()?).state(&mut state), ViewMut::new(&mut y, shape)?)?;
///
/// let mut by_state = StateGradient::new(&plan, 1, 1)?; // nothing depends on the final state
/// for initial in [&mut between, &mut before.fork()] {
///     let (mut dq, mut dk, mut dv) = ([0.0; 6], [0.0; 6], [0.0; 6]);
///     let gradients = Gradients::new(
///         ViewMut::new(&mut dq, shape)?,
///         ViewMut::new(&mut dk, shape)?,
///         ViewMut::new(&mut dv, shape)?,
///     );
///     let call = Call::causal(x()?, x()?, x()?).state(initial);
///     plan.backward(call, x()?, gradients.state(&mut by_state))?;
/// }
/// assert_eq!(by_state.position(0), Some(0));
/// # Ok::<(), sata::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct StateGradient<T: Real> {
    spec: Spec,
    kv_heads: usize,
    pub(super) sequences: Vec<SequenceGradient<T>>,
}

#[derive(Clone, Debug)]
pub(super) struct SequenceGradient<T> {
    /// Tokens that the state has seen; none while all is 0, which fits any.
    pub position: Option<u64>,
    pub heads: Vec<HeadGradient<T>>,
}

/// Of one head.
#[derive(Clone, Debug)]
pub(super) struct HeadGradient<T> {
    /// By the far sums, over multiplicity and coefficient.
    pub sums: Sums<T>,
    /// By the open tokens.
    pub open: Made<T>,
    /// By the sinks.
    pub sinks: Made<T>,
    /// By the logarithm of a factor of the weights of all that has been seen.
    pub past: f64,
}

impl<T: Real> StateGradient<T> {
    /// Zeros, for states of this plan, at any position.
    ///
    /// # Errors
    /// As for [`State::new`].
    pub fn new(plan: &Plan, sequences: usize, kv_heads: usize) -> Result<Self, Error> {
        // It takes about the memory of a state, whose limits it shares.
        drop(State::<T>::new(plan, sequences, kv_heads)?);
        let spec = plan.spec();
        let lanes = T::kernels(plan.level(), spec.d_value(), false).lanes;
        let padded = [spec.d_key(), spec.d_value()].map(|d| d.next_multiple_of(lanes));
        let fades = spec.decay() != crate::Decay::None;
        let head = HeadGradient {
            sums: Sums::new(plan.basis()?.len(), spec.d_value()),
            open: Made::zeros(capacity(spec).next_multiple_of(TOKENS), padded, fades),
            sinks: Made::zeros(spec.sinks().next_multiple_of(TOKENS), padded, fades),
            past: 0.0,
        };
        let sequence = SequenceGradient { position: None, heads: vec![head; kv_heads] };
        Ok(StateGradient { spec: spec.clone(), kv_heads, sequences: vec![sequence; sequences] })
    }

    /// The position of the state that it is the gradient by; none for zeros that fit any, and for a
    /// sequence that it does not have.
    pub fn position(&self, sequence: usize) -> Option<u64> {
        self.sequences.get(sequence).and_then(|s| s.position)
    }

    /// Makes it zeros again, for states at any position.
    pub fn reset(&mut self) {
        for sequence in &mut self.sequences {
            sequence.position = None;
            for head in &mut sequence.heads {
                head.sums.clear();
                head.open.clear();
                head.sinks.clear();
                head.past = 0.0;
            }
        }
    }

    /// Refuses a backward call that ends elsewhere than the state it is of.
    pub(super) fn check(
        &self,
        spec: &Spec,
        kv_heads: usize,
        ends: impl ExactSizeIterator<Item = u64>,
    ) -> Result<(), Error> {
        let differs = |field, state: String, call: String| Err(Error::State { field, state, call });
        if self.spec != *spec {
            return differs("spec", format!("{:?}", self.spec), format!("{spec:?}"));
        }
        let counts = [
            ("sequences", self.sequences.len(), ends.len()),
            ("kv_heads", self.kv_heads, kv_heads),
        ];
        for (field, own, call) in counts {
            if own != call {
                return differs(field, own.to_string(), call.to_string());
            }
        }
        for (sequence, end) in self.sequences.iter().zip(ends) {
            if let Some(position) = sequence.position
                && position != end
            {
                return differs("position", position.to_string(), end.to_string());
            }
        }
        Ok(())
    }
}
