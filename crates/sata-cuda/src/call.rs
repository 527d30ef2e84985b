//! What a call is made of, and every check of it that needs no look at device memory.

use sata::{Decay, Error as CallError, Near, Spec};

use crate::{Element, Error, Plan, RawView, State, View};

/// Queries, keys and values on a device, and what to do with them.
///
/// q is `[batch, query_heads, queries, d_key]`, k `[batch, kv_heads, keys, d_key]`, v
/// `[batch, kv_heads, keys, d_value]`; `query_heads` is a multiple of `kv_heads`, and query head
/// h reads key/value head h / (query_heads / kv_heads).
///
/// What is in device memory is not looked at beforehand: NaN and infinities in q, k and v show in
/// the outputs, and in [`Diagnostics`](sata::Diagnostics) as denominators that are not finite.
#[derive(Debug)]
pub struct Call<'a, 's, E> {
    pub(crate) q: View<'a, E>,
    pub(crate) k: View<'a, E>,
    pub(crate) v: View<'a, E>,
    pub(crate) causal: bool,
    pub(crate) key_mask: Option<View<'a, u8>>,
    pub(crate) packed: Option<(&'a [usize], &'a [usize])>,
    pub(crate) state: Option<&'s mut State>,
    pub(crate) strict: bool,
    pub(crate) slopes: Option<&'a [f64]>,
    pub(crate) log_gates: Option<View<'a, f32>>,
}

/// Sizes of a checked call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub kv_heads: usize,
    /// Query heads per key/value head.
    pub group: usize,
    /// How many sequences.
    pub sequences: usize,
}

/// One sequence's share of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Which batch row of q and the output, and which of its tokens come first.
    pub q_batch: usize,
    pub q_first: usize,
    pub queries: usize,
    /// The same for k, v, gates and mask.
    pub k_batch: usize,
    pub k_first: usize,
    pub keys: usize,
}

/// Most tokens of a call.
const MOST_TOKENS: usize = 1 << 31;

impl<'a, 's, E: Element> Call<'a, 's, E> {
    /// Query t attends to keys 0 … t (and to all of the state's past).
    pub fn causal(q: View<'a, E>, k: View<'a, E>, v: View<'a, E>) -> Self {
        Call {
            q,
            k,
            v,
            causal: true,
            key_mask: None,
            packed: None,
            state: None,
            strict: false,
            slopes: None,
            log_gates: None,
        }
    }

    /// Every query attends to all keys (and to all of the state's past).
    pub fn full(q: View<'a, E>, k: View<'a, E>, v: View<'a, E>) -> Self {
        Call { causal: false, ..Call::causal(q, k, v) }
    }

    /// Which keys exist, `[batch, 1, 1, keys]` on the device, a byte each (the packed total for
    /// packed sequences): 0 marks padding. A query with no key at all has denominator 0.
    pub fn key_mask(mut self, mask: View<'a, u8>) -> Self {
        self.key_mask = Some(mask);
        self
    }

    /// Sequences of different lengths side by side in a batch of one: sequence i has queries
    /// `cu_queries[i] .. cu_queries[i + 1]` and keys `cu_keys[i] .. cu_keys[i + 1]`. These are on
    /// the host.
    pub fn packed(mut self, cu_queries: &'a [usize], cu_keys: &'a [usize]) -> Self {
        self.packed = Some((cu_queries, cu_keys));
        self
    }

    /// Continues from this state and leaves the past in it.
    pub fn state(mut self, state: &'s mut State) -> Self {
        self.state = Some(state);
        self
    }

    /// Makes denominators that are not positive and finite an error.
    pub fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Slopes m ≥ 0 of the key/value heads, `[kv_heads]` on the host, for a spec with
    /// [`Decay::Slopes`]: a weight carries exp(−m·(t − s)), as with ALiBi. See
    /// [`sata::alibi_slopes`].
    pub fn slopes(mut self, slopes: &'a [f64]) -> Self {
        self.slopes = Some(slopes);
        self
    }

    /// Logarithms of the forget gates, `[batch, kv_heads, keys, 1]`, each at most 0 (which is not
    /// looked at), for a spec with [`Decay::Gates`]: a weight carries exp(Σ log f_r) over the tokens
    /// r after s up to t. The gate of a masked key still forgets.
    pub fn log_gates(mut self, log_gates: View<'a, f32>) -> Self {
        self.log_gates = Some(log_gates);
        self
    }

    /// Checks everything, before any work; `argument` has the outputs' shape `out`.
    pub(crate) fn check(
        &self,
        plan: &Plan,
        argument: &'static str,
        out: [usize; 4],
    ) -> Result<Shape, Error> {
        let spec = plan.spec();
        let (q, k, v) = (self.q.shape(), self.k.shape(), self.v.shape());
        for (argument, shape) in [("q", q), ("k", k), ("v", v)] {
            if shape[0] == 0 || shape[1] == 0 {
                return Err(bad(argument, &shape, "batch and heads must be at least 1"));
            }
        }
        for (argument, shape, dim, name) in [
            ("q", q, spec.d_key(), "d_key"),
            ("k", k, spec.d_key(), "d_key"),
            ("v", v, spec.d_value(), "d_value"),
        ] {
            if shape[3] != dim {
                return Err(bad(argument, &shape, format!("the spec has {name} = {dim}")));
            }
        }
        if k[..3] != v[..3] {
            return Err(bad("v", &v, format!("k has shape {k:?}")));
        }
        if q[0] != k[0] {
            return Err(bad("k", &k, format!("q has batch {}", q[0])));
        }
        if q[1] % k[1] != 0 {
            let expected = format!("its heads must be a multiple of the {} key/value heads", k[1]);
            return Err(bad("q", &q, expected));
        }
        if self.causal && q[2] != k[2] {
            let expected = format!("causal attention needs as many keys as queries, {}", q[2]);
            return Err(bad("k", &k, expected));
        }
        let wants = [q[0], q[1], q[2], spec.d_value()];
        if out != wants {
            return Err(bad(argument, &out, format!("it must be {wants:?}")));
        }
        let wants = [k[0], 1, 1, k[2]];
        if let Some(got) = self.key_mask.as_ref().map(View::shape).filter(|got| *got != wants) {
            return Err(bad("key_mask", &got, format!("it must be {wants:?}")));
        }
        if let Some((cu_queries, cu_keys)) = self.packed {
            check_packed("cu_queries", cu_queries, q)?;
            check_packed("cu_keys", cu_keys, k)?;
            let of_keys = [cu_keys.len()];
            if cu_queries.len() != cu_keys.len() {
                let expected = format!("cu_queries has {} elements", cu_queries.len());
                return Err(bad("cu_keys", &of_keys, expected));
            }
            if self.causal && cu_queries != cu_keys {
                let expected = "causal attention needs the same lengths as cu_queries";
                return Err(bad("cu_keys", &of_keys, expected));
            }
        }
        let sequences = self.packed.map_or(q[0], |(cu, _)| cu.len() - 1);
        if let Some(state) = &self.state {
            state.check(spec, sequences, k[1])?;
        }
        self.check_spec(spec)?;
        self.check_devices(plan)?;
        Ok(Shape { kv_heads: k[1], group: q[1] / k[1], sequences })
    }

    /// What the spec asks of a call beyond shapes.
    fn check_spec(&self, spec: &Spec) -> Result<(), Error> {
        let [batch, kv_heads, keys, _] = self.k.shape();
        if keys > MOST_TOKENS || self.q.shape()[2] > MOST_TOKENS {
            let expected = format!("a call takes at most {MOST_TOKENS} tokens (extend a state)");
            return Err(bad("k", &self.k.shape(), expected));
        }
        if !self.causal && spec.near() != Near::None {
            let what = format!("near = {:?} with full attention, which has no order,", spec.near());
            return Err(Error::Unsupported { what });
        }
        match (spec.decay(), self.slopes) {
            (Decay::Slopes, None) => return Err(bad("slopes", &[], "the spec has decay = slopes")),
            (Decay::Slopes, Some(slopes)) => check_slopes(slopes, kv_heads)?,
            (decay, Some(slopes)) => {
                let expected = format!("the spec has decay = {decay:?}");
                return Err(bad("slopes", &[slopes.len()], expected));
            }
            (_, None) => (),
        }
        match (spec.decay(), self.log_gates.as_ref().map(View::shape)) {
            (Decay::Gates, None) => Err(bad("log_gates", &[], "the spec has decay = gates")),
            (Decay::Gates, Some(got)) if got != [batch, kv_heads, keys, 1] => {
                let expected = format!("it must be {:?}", [batch, kv_heads, keys, 1]);
                Err(bad("log_gates", &got, expected))
            }
            (Decay::Gates, _) | (_, None) => Ok(()),
            (decay, Some(got)) => {
                Err(bad("log_gates", &got, format!("the spec has decay = {decay:?}")))
            }
        }
    }

    /// All of it must be on the plan's device.
    fn check_devices(&self, plan: &Plan) -> Result<(), Error> {
        let devices = [
            ("q", Some(self.q.device())),
            ("k", Some(self.k.device())),
            ("v", Some(self.v.device())),
            ("key_mask", self.key_mask.as_ref().map(View::device)),
            ("log_gates", self.log_gates.as_ref().map(View::device)),
            ("state", self.state.as_ref().map(|state| state.device())),
        ];
        for (argument, device) in devices {
            if device.is_some_and(|device| !device.is_same(plan.device())) {
                return Err(Error::argument(argument, "it is on another device than the plan"));
            }
        }
        Ok(())
    }

    /// The call's sequences, one by one.
    pub(crate) fn pieces(&self) -> Vec<Piece> {
        let (queries, keys) = (self.q.shape()[2], self.k.shape()[2]);
        match self.packed {
            Some((cu_queries, cu_keys)) => cu_queries
                .windows(2)
                .zip(cu_keys.windows(2))
                .map(|(cu_q, cu_k)| Piece {
                    q_batch: 0,
                    q_first: cu_q[0],
                    queries: cu_q[1] - cu_q[0],
                    k_batch: 0,
                    k_first: cu_k[0],
                    keys: cu_k[1] - cu_k[0],
                })
                .collect(),
            None => (0..self.q.shape()[0])
                .map(|batch| Piece {
                    q_batch: batch,
                    q_first: 0,
                    queries,
                    k_batch: batch,
                    k_first: 0,
                    keys,
                })
                .collect(),
        }
    }

    /// The gates as kernels take them, or none.
    pub(crate) fn raw_gates(&self) -> RawView {
        self.log_gates.as_ref().map_or(RawView::NONE, View::raw)
    }

    /// The mask's address and how far apart its batch rows are.
    pub(crate) fn raw_mask(&self) -> Option<(u64, usize)> {
        self.key_mask.as_ref().map(|mask| (mask.address(), mask.strides()[0]))
    }
}

fn bad(argument: &'static str, got: &[usize], expected: impl Into<String>) -> Error {
    Error::Call(CallError::Shape { argument, got: got.to_vec(), expected: expected.into() })
}

fn check_slopes(slopes: &[f64], kv_heads: usize) -> Result<(), Error> {
    if slopes.len() != kv_heads {
        let expected = format!("there must be one for each of the {kv_heads} key/value heads");
        return Err(bad("slopes", &[slopes.len()], expected));
    }
    match slopes.iter().position(|m| !m.is_finite() || *m < 0.0) {
        Some(head) => Err(Error::Call(CallError::Spec {
            field: "slopes",
            value: format!("{} for head {head}", slopes[head]),
            requires: "a slope must be finite and at least 0".into(),
        })),
        None => Ok(()),
    }
}

fn check_packed(argument: &'static str, cu: &[usize], shape: [usize; 4]) -> Result<(), Error> {
    if shape[0] != 1 {
        let expected =
            format!("packed sequences need a batch of 1, and shape {shape:?} has {}", shape[0]);
        return Err(bad(argument, &[cu.len()], expected));
    }
    let fits = cu.len() >= 2 && cu[0] == 0 && cu.is_sorted() && cu[cu.len() - 1] == shape[2];
    if fits {
        return Ok(());
    }
    let expected = format!(
        "it must rise from 0 to the {} tokens, one element more than sequences; it is {:?}{}",
        shape[2],
        &cu[..cu.len().min(8)],
        if cu.len() > 8 { " …" } else { "" }
    );
    Err(bad(argument, &[cu.len()], expected))
}

#[cfg(test)]
mod tests;
