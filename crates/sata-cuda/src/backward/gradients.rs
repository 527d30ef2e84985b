//! Where gradients go.

use sata::{Decay, Error as CallError, Spec};

use super::StateGradient;
use crate::{Buffer, Call, Device, Element, Error, ViewMut};

/// What a backward call fills, each shaped as the call's own argument, on the plan's device.
#[derive(Debug)]
pub struct Gradients<'a, E> {
    /// By q, `[batch, query_heads, queries, d_key]`.
    pub q: ViewMut<'a, E>,
    /// By k, `[batch, kv_heads, keys, d_key]`.
    pub k: ViewMut<'a, E>,
    /// By v, `[batch, kv_heads, keys, d_value]`.
    pub v: ViewMut<'a, E>,
    /// By the logarithms of the gates, `[batch, kv_heads, keys, 1]`, for a spec with
    /// [`Decay::Gates`].
    pub log_gates: Option<ViewMut<'a, f32>>,
    /// By the slopes, `[kv_heads]`, summed over the batch, for a spec with [`Decay::Slopes`].
    pub slopes: Option<&'a mut Buffer<f64>>,
    /// By the final state when the call begins; by the initial one, if there is one, when it ends.
    pub state: Option<&'a mut StateGradient>,
}

impl<'a, E: Element> Gradients<'a, E> {
    /// Those by q, k and v alone.
    pub fn new(q: ViewMut<'a, E>, k: ViewMut<'a, E>, v: ViewMut<'a, E>) -> Self {
        Gradients { q, k, v, log_gates: None, slopes: None, state: None }
    }

    /// And by the logarithms of the gates, `[batch, kv_heads, keys, 1]`.
    pub fn log_gates(mut self, log_gates: ViewMut<'a, f32>) -> Self {
        self.log_gates = Some(log_gates);
        self
    }

    /// And by the slopes, `[kv_heads]`, summed over the batch.
    pub fn slopes(mut self, slopes: &'a mut Buffer<f64>) -> Self {
        self.slopes = Some(slopes);
        self
    }

    /// And by the state: takes what a later call has left for the state that this call made, leaves
    /// what belongs to the state that it began with.
    pub fn state(mut self, state: &'a mut StateGradient) -> Self {
        self.state = Some(state);
        self
    }

    /// Refuses what does not fit a call that has been checked.
    pub(super) fn check(
        &self,
        device: &Device,
        spec: &Spec,
        call: &Call<'_, '_, E>,
    ) -> Result<(), Error> {
        let [q, k, v] = [call.q.shape(), call.k.shape(), call.v.shape()];
        for (argument, got, of, wants) in [
            ("gradients.q", self.q.shape(), "q", q),
            ("gradients.k", self.k.shape(), "k", k),
            ("gradients.v", self.v.shape(), "v", v),
        ] {
            if got != wants {
                return Err(bad(argument, &got, format!("{of} has shape {wants:?}")));
            }
        }
        let decays = || format!("the spec has decay = {:?}", spec.decay());
        if let Some(got) = self.log_gates.as_ref().map(ViewMut::shape) {
            let wants = [k[0], k[1], k[2], 1];
            if spec.decay() != Decay::Gates {
                return Err(bad("gradients.log_gates", &got, decays()));
            }
            if got != wants {
                return Err(bad("gradients.log_gates", &got, format!("it must be {wants:?}")));
            }
        }
        if let Some(slopes) = &self.slopes {
            if spec.decay() != Decay::Slopes {
                return Err(bad("gradients.slopes", &[slopes.len()], decays()));
            }
            if slopes.len() != k[1] {
                let expected =
                    format!("there must be one for each of the {} key/value heads", k[1]);
                return Err(bad("gradients.slopes", &[slopes.len()], expected));
            }
        }
        let devices = [
            ("gradients.q", Some(self.q.device())),
            ("gradients.k", Some(self.k.device())),
            ("gradients.v", Some(self.v.device())),
            ("gradients.log_gates", self.log_gates.as_ref().map(ViewMut::device)),
            ("gradients.slopes", self.slopes.as_ref().map(|slopes| slopes.device())),
            ("gradients.state", self.state.as_ref().map(|state| state.device())),
        ];
        for (argument, own) in devices {
            if own.is_some_and(|own| !own.is_same(device)) {
                return Err(Error::argument(argument, "it is on another device than the plan"));
            }
        }
        Ok(())
    }
}

fn bad(argument: &'static str, got: &[usize], expected: String) -> Error {
    Error::Call(CallError::Shape { argument, got: got.to_vec(), expected })
}
