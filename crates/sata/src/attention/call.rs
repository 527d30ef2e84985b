//! What a call is made of, and every check of it.

use super::Piece;
use crate::{Decay, Element, Error, Near, Plan, Spec, State, View};

/// Queries, keys and values, and what to do with them.
///
/// q is `[batch, query_heads, queries, d_key]`, k `[batch, kv_heads, keys, d_key]`, v
/// `[batch, kv_heads, keys, d_value]`; `query_heads` is a multiple of `kv_heads`, and query head
/// h reads key/value head h / (query_heads / kv_heads).
#[derive(Debug)]
pub struct Call<'a, 's, E: Element> {
    q: View<'a, E>,
    k: View<'a, E>,
    v: View<'a, E>,
    pub(super) causal: bool,
    key_mask: Option<&'a [bool]>,
    packed: Option<(&'a [usize], &'a [usize])>,
    pub(super) state: Option<&'s mut State<E::Compute>>,
    pub(super) strict: bool,
    pub(super) diagnose: bool,
    slopes: Option<&'a [f64]>,
    log_gates: Option<View<'a, f32>>,
}

/// Sizes of a checked call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub kv_heads: usize,
    /// Query heads per key/value head.
    pub group: usize,
}

/// Most tokens of a call, which its kernels count in 32 bits.
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
            diagnose: false,
            slopes: None,
            log_gates: None,
        }
    }

    /// Every query attends to all keys (and to all of the state's past).
    pub fn full(q: View<'a, E>, k: View<'a, E>, v: View<'a, E>) -> Self {
        Call { causal: false, ..Call::causal(q, k, v) }
    }

    /// Which keys exist, `[batch, keys]` row-major (`[keys]` of the packed total for packed
    /// sequences): `false` marks padding. A query with no key at all has denominator 0.
    pub fn key_mask(mut self, mask: &'a [bool]) -> Self {
        self.key_mask = Some(mask);
        self
    }

    /// Sequences of different lengths side by side in a batch of one: sequence i has queries
    /// `cu_queries[i] .. cu_queries[i + 1]` and keys `cu_keys[i] .. cu_keys[i + 1]`.
    pub fn packed(mut self, cu_queries: &'a [usize], cu_keys: &'a [usize]) -> Self {
        self.packed = Some((cu_queries, cu_keys));
        self
    }

    /// Continues from this state and leaves the past in it.
    pub fn state(mut self, state: &'s mut State<E::Compute>) -> Self {
        self.state = Some(state);
        self
    }

    /// Makes denominators that are not positive and finite an error.
    pub fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Slopes m ≥ 0 of the key/value heads, `[kv_heads]`, for a spec with
    /// [`Decay::Slopes`](crate::Decay::Slopes): a weight carries exp(−m·(t − s)), as with ALiBi.
    /// See [`alibi_slopes`](crate::alibi_slopes). A state does not hold them: each token lets the
    /// past fade by the slope of its own call.
    pub fn slopes(mut self, slopes: &'a [f64]) -> Self {
        self.slopes = Some(slopes);
        self
    }

    /// Logarithms of the forget gates, `[batch, kv_heads, keys, 1]`, each at most 0, for a spec
    /// with [`Decay::Gates`](crate::Decay::Gates): a weight carries exp(Σ log f_r) over the tokens
    /// r after s up to t. The gate of a masked key still forgets.
    pub fn log_gates(mut self, log_gates: View<'a, f32>) -> Self {
        self.log_gates = Some(log_gates);
        self
    }

    /// Fills [`Diagnostics::heads`](crate::Diagnostics::heads), which needs the spec to keep the
    /// orders 0, 1 and 2, and some more time.
    pub fn diagnose(mut self, diagnose: bool) -> Self {
        self.diagnose = diagnose;
        self
    }

    /// Products of all queries with all keys and values, of sizes that may not have been checked.
    pub(super) fn products(&self) -> usize {
        let ([batch, heads, queries, d_key], [.., keys, d_value]) =
            (self.q.shape(), self.v.shape());
        let sizes = [batch, heads, queries, keys, d_key.saturating_add(d_value)];
        sizes.iter().fold(1, |product: usize, &size| product.saturating_mul(size))
    }

    /// Checks everything, before any work.
    pub(super) fn check(&self, plan: &Plan, out: [usize; 4]) -> Result<Shape, Error> {
        self.check_named(plan, "out", out)
    }

    /// The shapes of q, k and v.
    pub(super) fn shapes(&self) -> [[usize; 4]; 3] {
        [self.q.shape(), self.k.shape(), self.v.shape()]
    }

    /// Checks everything, before any work; `argument` has the outputs' shape.
    pub(super) fn check_named(
        &self,
        plan: &Plan,
        argument: &'static str,
        out: [usize; 4],
    ) -> Result<Shape, Error> {
        let spec = plan.spec();
        let (q, k, v) = (self.q.shape(), self.k.shape(), self.v.shape());
        for (argument, shape) in [("q", q), ("k", k), ("v", v)] {
            if shape[0] == 0 || shape[1] == 0 {
                return Err(Error::shape(argument, &shape, "batch and heads must be at least 1"));
            }
        }
        for (argument, shape, dim, name) in [
            ("q", q, spec.d_key(), "d_key"),
            ("k", k, spec.d_key(), "d_key"),
            ("v", v, spec.d_value(), "d_value"),
        ] {
            if shape[3] != dim {
                return Err(Error::shape(argument, &shape, format!("the spec has {name} = {dim}")));
            }
        }
        if k[..3] != v[..3] {
            return Err(Error::shape("v", &v, format!("k has shape {k:?}")));
        }
        if q[0] != k[0] {
            return Err(Error::shape("k", &k, format!("q has batch {}", q[0])));
        }
        if q[1] % k[1] != 0 {
            return Err(Error::shape(
                "q",
                &q,
                format!("its heads must be a multiple of the {} key/value heads", k[1]),
            ));
        }
        if self.causal && q[2] != k[2] {
            return Err(Error::shape(
                "k",
                &k,
                format!("causal attention needs as many keys as queries, {}", q[2]),
            ));
        }
        let wants = [q[0], q[1], q[2], spec.d_value()];
        if out != wants {
            return Err(Error::shape(argument, &out, format!("it must be {wants:?}")));
        }
        if let Some(mask) = self.key_mask
            && Some(mask.len()) != k[0].checked_mul(k[2])
        {
            return Err(Error::shape(
                "key_mask",
                &[mask.len()],
                format!("it must have batch · keys = {} elements", k[0].saturating_mul(k[2])),
            ));
        }
        if let Some((cu_queries, cu_keys)) = self.packed {
            check_packed("cu_queries", cu_queries, q)?;
            check_packed("cu_keys", cu_keys, k)?;
            if cu_queries.len() != cu_keys.len() {
                return Err(Error::shape(
                    "cu_keys",
                    &[cu_keys.len()],
                    format!("cu_queries has {} elements", cu_queries.len()),
                ));
            }
            if self.causal && cu_queries != cu_keys {
                return Err(Error::shape(
                    "cu_keys",
                    &[cu_keys.len()],
                    "causal attention needs the same lengths as cu_queries",
                ));
            }
        }
        if let Some(state) = &self.state {
            let sequences = self.packed.map_or(q[0], |(cu, _)| cu.len() - 1);
            state.check(spec, sequences, k[1])?;
            for sequence in 0..sequences {
                let keys = self.packed.map_or(k[2], |(_, cu)| cu[sequence + 1] - cu[sequence]);
                state.check_room(sequence, keys)?;
            }
        }
        self.check_spec(spec)?;
        self.q.check_finite("q")?;
        self.k.check_finite("k")?;
        self.v.check_finite("v")?;
        Ok(Shape { kv_heads: k[1], group: q[1] / k[1] })
    }

    /// What the spec asks of a call beyond shapes.
    fn check_spec(&self, spec: &Spec) -> Result<(), Error> {
        let [_, _, keys, _] = self.k.shape();
        if keys > MOST_TOKENS || self.q.shape()[2] > MOST_TOKENS {
            let expected = format!("a call takes at most {MOST_TOKENS} tokens (extend a state)");
            return Err(Error::shape("k", &self.k.shape(), expected));
        }
        if !self.causal && spec.near() != Near::None {
            let what = format!("near = {:?} with full attention, which has no order,", spec.near());
            return Err(Error::Unsupported { what, by: "the CPU engine" });
        }
        if self.diagnose && !(0..3).all(|p| spec.orders().contains(&p)) {
            let what = format!(
                "diagnose, which needs the orders 0, 1 and 2, with orders {:?}",
                spec.orders()
            );
            return Err(Error::Unsupported { what, by: "the CPU engine" });
        }
        let kv_heads = self.k.shape()[1];
        match (spec.decay(), self.slopes) {
            (Decay::Slopes, None) => {
                return Err(Error::shape("slopes", &[], "the spec has decay = slopes"));
            }
            (Decay::Slopes, Some(slopes)) => check_slopes(slopes, kv_heads)?,
            (decay, Some(slopes)) => {
                let expected = format!("the spec has decay = {decay:?}");
                return Err(Error::shape("slopes", &[slopes.len()], expected));
            }
            (_, None) => (),
        }
        let [batch, _, keys, _] = self.k.shape();
        match (spec.decay(), &self.log_gates) {
            (Decay::Gates, None) => {
                Err(Error::shape("log_gates", &[], "the spec has decay = gates"))
            }
            (Decay::Gates, Some(gates)) => check_gates(gates, [batch, kv_heads, keys, 1]),
            (decay, Some(gates)) => {
                let expected = format!("the spec has decay = {decay:?}");
                Err(Error::shape("log_gates", &gates.shape(), expected))
            }
            (_, None) => Ok(()),
        }
    }

    /// The call's sequences, one by one.
    pub(super) fn pieces(&self) -> Vec<Piece<'a, E>> {
        let (q, k, v) = (self.q, self.k, self.v);
        let (queries, keys) = (q.shape()[2], k.shape()[2]);
        match self.packed {
            Some((cu_queries, cu_keys)) => cu_queries
                .windows(2)
                .zip(cu_keys.windows(2))
                .enumerate()
                .map(|(sequence, (cu_q, cu_k))| Piece {
                    sequence,
                    q_batch: 0,
                    q_first: cu_q[0],
                    queries: cu_q[1] - cu_q[0],
                    k_batch: 0,
                    k_first: cu_k[0],
                    keys: cu_k[1] - cu_k[0],
                    mask: self.key_mask.map(|mask| &mask[cu_k[0]..cu_k[1]]),
                    q,
                    k,
                    v,
                    slopes: self.slopes,
                    log_gates: self.log_gates,
                })
                .collect(),
            None => (0..q.shape()[0])
                .map(|batch| Piece {
                    sequence: batch,
                    q_batch: batch,
                    q_first: 0,
                    queries,
                    k_batch: batch,
                    k_first: 0,
                    keys,
                    mask: self.key_mask.map(|mask| &mask[batch * keys..(batch + 1) * keys]),
                    q,
                    k,
                    v,
                    slopes: self.slopes,
                    log_gates: self.log_gates,
                })
                .collect(),
        }
    }
}

fn check_slopes(slopes: &[f64], kv_heads: usize) -> Result<(), Error> {
    if slopes.len() != kv_heads {
        let expected = format!("there must be one for each of the {kv_heads} key/value heads");
        return Err(Error::shape("slopes", &[slopes.len()], expected));
    }
    match slopes.iter().position(|m| !m.is_finite() || *m < 0.0) {
        Some(head) => Err(Error::Spec {
            field: "slopes",
            value: format!("{} for head {head}", slopes[head]),
            requires: "a slope must be finite and at least 0".into(),
        }),
        None => Ok(()),
    }
}

fn check_gates(gates: &View<'_, f32>, expected: [usize; 4]) -> Result<(), Error> {
    if gates.shape() != expected {
        return Err(Error::shape("log_gates", &gates.shape(), format!("it must be {expected:?}")));
    }
    gates.check_finite("log_gates")?;
    let [batch, heads, tokens, _] = expected;
    for b in 0..batch {
        for head in 0..heads {
            for token in 0..tokens {
                let gate = gates.row(b, head, token)[0];
                if gate > 0.0 {
                    return Err(Error::Spec {
                        field: "log_gates",
                        value: format!("{gate} at {:?} [batch, head, token]", [b, head, token]),
                        requires: "the logarithm of a gate must be at most 0".into(),
                    });
                }
            }
        }
    }
    Ok(())
}

fn check_packed(argument: &'static str, cu: &[usize], shape: [usize; 4]) -> Result<(), Error> {
    if shape[0] != 1 {
        return Err(Error::shape(
            argument,
            &[cu.len()],
            format!("packed sequences need a batch of 1, and shape {shape:?} has {}", shape[0]),
        ));
    }
    let fits = cu.len() >= 2 && cu[0] == 0 && cu.is_sorted() && cu[cu.len() - 1] == shape[2];
    if !fits {
        return Err(Error::shape(
            argument,
            &[cu.len()],
            format!(
                "it must rise from 0 to the {} tokens, one element more than sequences; it is \
                 {:?}{}",
                shape[2],
                &cu[..cu.len().min(8)],
                if cu.len() > 8 { " …" } else { "" }
            ),
        ));
    }
    Ok(())
}
