//! Gradients by a state, handed from a later call to an earlier one, in a device's memory.

use sata::{Decay, Spec};

use super::params::{Params, RawTokens};
use crate::{Buffer, Device, Error, Plan};

/// The gradient of a loss by all that a state holds, for backward through calls that went on with
/// one state: the last call first, each from what the call after it has left here.
///
/// As on the CPU ([`sata::StateGradient`]): that by the far sums is kept over multiplicity and
/// coefficient.
#[derive(Debug)]
pub struct StateGradient {
    spec: Spec,
    kv_heads: usize,
    /// Tokens that the state has seen; none while all is 0, which fits any.
    positions: Vec<Option<u64>>,
    /// `[rows][features][d_value]`, `[rows][features]`.
    sums: Buffer<f32>,
    z: Buffer<f32>,
    /// By what the final state holds, and room for that by the initial one.
    now: Tokens,
    next: Tokens,
}

/// By raw tokens, and by the logarithm of a factor of the weights of all that has been seen.
#[derive(Debug)]
struct Tokens {
    open: Raw,
    sinks: Raw,
    /// `[rows]`.
    past: Buffer<f64>,
}

#[derive(Debug)]
struct Raw {
    keys: Buffer<f32>,
    values: Buffer<f32>,
    /// Σ w dw.
    fading: Buffer<f64>,
    most: usize,
}

impl Raw {
    fn new(device: &Device, spec: &Spec, rows: usize, most: usize) -> Result<Self, Error> {
        let tokens = rows.saturating_mul(most);
        let fades = if spec.decay() == Decay::None { 0 } else { tokens };
        Ok(Raw {
            keys: Buffer::zeroed(device, tokens.saturating_mul(spec.d_key()))?,
            values: Buffer::zeroed(device, tokens.saturating_mul(spec.d_value()))?,
            fading: Buffer::zeroed(device, fades)?,
            most,
        })
    }

    fn clear(&mut self) -> Result<(), Error> {
        self.keys.fill_bytes(0)?;
        self.values.fill_bytes(0)?;
        self.fading.fill_bytes(0)
    }

    fn raw(&self) -> RawTokens {
        if self.most == 0 {
            return RawTokens::NONE;
        }
        RawTokens {
            keys: self.keys.address(),
            values: self.values.address(),
            fading: self.fading.address(),
            weights: 0,
            most: self.most as i64,
        }
    }
}

impl Tokens {
    fn new(device: &Device, spec: &Spec, rows: usize) -> Result<Self, Error> {
        let open = crate::state::capacity(spec);
        Ok(Tokens {
            open: Raw::new(device, spec, rows, open)?,
            sinks: Raw::new(device, spec, rows, spec.sinks())?,
            past: Buffer::zeroed(device, rows)?,
        })
    }

    fn clear(&mut self) -> Result<(), Error> {
        self.open.clear()?;
        self.sinks.clear()?;
        self.past.fill_bytes(0)
    }
}

impl StateGradient {
    /// Zeros, for states of `sequences` sequences with `kv_heads` heads each, at any position.
    ///
    /// # Errors
    /// As for [`State::new`](crate::State::new).
    pub fn new(plan: &Plan, sequences: usize, kv_heads: usize) -> Result<Self, Error> {
        if sequences == 0 || kv_heads == 0 {
            return Err(Error::Call(sata::Error::Shape {
                argument: "state gradient",
                got: vec![sequences, kv_heads],
                expected: "it needs at least one sequence and one key/value head".into(),
            }));
        }
        let rows = sequences.saturating_mul(kv_heads);
        let (device, spec, features) = (plan.device(), plan.spec(), plan.features()?);
        let sums = rows.saturating_mul(features).saturating_mul(spec.d_value());
        Ok(StateGradient {
            spec: spec.clone(),
            kv_heads,
            positions: vec![None; sequences],
            sums: Buffer::zeroed(device, sums)?,
            z: Buffer::zeroed(device, rows.saturating_mul(features))?,
            now: Tokens::new(device, spec, rows)?,
            next: Tokens::new(device, spec, rows)?,
        })
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        self.sums.device()
    }

    /// The position of the state that it is the gradient by; none for zeros that fit any, and for a
    /// sequence that it does not have.
    pub fn position(&self, sequence: usize) -> Option<u64> {
        self.positions.get(sequence).copied().flatten()
    }

    /// Makes it zeros again, for states at any position.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn reset(&mut self) -> Result<(), Error> {
        self.positions.fill(None);
        self.sums.fill_bytes(0)?;
        self.z.fill_bytes(0)?;
        self.now.clear()
    }

    /// Refuses a backward call that ends elsewhere than the state it is of.
    pub(super) fn check(
        &self,
        spec: &Spec,
        kv_heads: usize,
        ends: impl ExactSizeIterator<Item = u64>,
    ) -> Result<(), Error> {
        let differs = |field, state: String, call: String| {
            Err(Error::Call(sata::Error::State { field, state, call }))
        };
        if self.spec != *spec {
            return differs("spec", format!("{:?}", self.spec), format!("{spec:?}"));
        }
        let counts = [
            ("sequences", self.positions.len(), ends.len()),
            ("kv_heads", self.kv_heads, kv_heads),
        ];
        for (field, own, call) in counts {
            if own != call {
                return differs(field, own.to_string(), call.to_string());
            }
        }
        for (position, end) in self.positions.iter().zip(ends) {
            if let Some(position) = position
                && *position != end
            {
                return differs("position", position.to_string(), end.to_string());
            }
        }
        Ok(())
    }

    /// Puts its addresses where kernels find them. Sums go from one to the other in place.
    pub(super) fn give(&mut self, params: &mut Params) -> Result<(), Error> {
        self.next.clear()?;
        params.final_sums = self.sums.address();
        params.final_z = self.z.address();
        params.final_open = self.now.open.raw();
        params.final_sinks = self.now.sinks.raw();
        params.final_past = self.now.past.address();
        params.initial_sums = self.sums.address();
        params.initial_z = self.z.address();
        params.initial_open = self.next.open.raw();
        params.initial_sinks = self.next.sinks.raw();
        params.initial_past = self.next.past.address();
        Ok(())
    }

    /// All has been enqueued: it is the gradient by the states at `positions`.
    pub(super) fn moved(&mut self, positions: impl Iterator<Item = u64>) {
        std::mem::swap(&mut self.now, &mut self.next);
        self.positions.clear();
        self.positions.extend(positions.map(Some));
    }
}
