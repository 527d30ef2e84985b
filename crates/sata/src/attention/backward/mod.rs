//! The backward of whole calls: what a loss's gradient by the outputs makes of that by the inputs.
//!
//! With v̂ = \[v; 1\], N̂_t = Σ_s w_ts v̂_s and ĝ_t = \[dy/D; −δ/D\], δ = dy·y, every weight has
//! dw_ts = ĝ_t·v̂_s. Of decays: as a query a token gets Σ_s w dw = ĝ·N̂ = 0, as a key
//! −Σ_t w dw, and the logarithm of a gate is part of g of all tokens from its own on.

mod direct;
mod gradients;
mod panel;
mod state;
mod stream;

pub use gradients::Gradients;
pub use state::StateGradient;

use super::method::Method;
use super::{Call, Piece, Seen};
use crate::plan::{Form, Sizes};
use crate::view::Rows;
use crate::{Element, Error, Plan, Real, Series, State, View, parallel};

/// What all heads of a backward call share.
struct Env<'e, E: Element> {
    method: &'e Method<E::Compute>,
    dy: View<'e, E>,
    dq: Rows<'e, E>,
    group: usize,
    /// Row length of keys: whole vectors.
    padded_key: usize,
    /// Whether Σ_t w dw of the keys is wanted.
    fades: bool,
}

impl Plan {
    /// The gradients of Σ dy·y by everything that `call`, a forward call, was given: they are
    /// written to (not added to) what `gradients` names. `dy` is dL/dy
    /// `[batch, query_heads, queries, d_value]`. A query that sees no key has gradient 0; one whose
    /// denominator is 0 or not finite has gradients that are not finite.
    ///
    /// Nothing of the forward call is needed but its arguments: weights and features are made again,
    /// and nothing of the size of tokens × features is stored. A state is the one that the call
    /// *began* with ([`State::fork`](crate::State::fork) keeps it), and stays as it is. `strict` and
    /// `diagnose` are of the forward call alone.
    ///
    /// # Errors
    /// Everything in [`Error`] that names an argument, before any work and with the gradients as
    /// they were; [`Error::Unsupported`] for series whose coefficients are each query's own
    /// ([`Series::Gauss`], [`Series::Hermite`]), states with a centre, and states that hold other
    /// orders than the spec's.
    pub fn backward<E: Real>(
        &self,
        call: Call<'_, '_, E>,
        dy: View<'_, E>,
        gradients: Gradients<'_, E>,
    ) -> Result<(), Error> {
        let shape = call.check_named(self, "dy", dy.shape())?;
        let series = match self.spec().series() {
            Series::Gauss => Some("gauss"),
            Series::Hermite { .. } => Some("hermite"),
            _ => None,
        };
        if let Some(series) = series {
            let what =
                format!("the backward of series {series}, whose coefficients are each query's");
            return Err(Error::Unsupported { what, by: "the CPU engine" });
        }
        gradients.check(self.spec(), &call)?;
        dy.check_finite("dy")?;
        let pieces = call.pieces();
        let initial = call.state.as_deref();
        check_state(self, initial)?;
        if let Some(state) = &gradients.state {
            let position = |piece: &Piece<'_, E>| {
                initial.map_or(0, |state| state.position(piece.sequence)) + piece.keys as u64
            };
            state.check(self.spec(), shape.kv_heads, pieces.iter().map(position))?;
        }
        let method = Method::of::<E>(self, None, false);
        let Gradients { mut q, mut k, mut v, mut log_gates, slopes, mut state } = gradients;
        let longest = |of: fn(&Piece<'_, E>) -> usize| pieces.iter().map(of).max().unwrap_or(0);
        let recipe = self.choose::<E>(Sizes {
            units: pieces.len() * shape.kv_heads,
            group: shape.group,
            queries: longest(|piece| piece.queries),
            keys: longest(|piece| piece.keys),
            causal: call.causal,
            state: initial.is_some() || state.is_some(),
            threads: parallel::threads(),
        });
        let env = Env {
            padded_key: method.d_key.next_multiple_of(method.kernels.lanes),
            method: &method,
            dy,
            dq: q.rows(),
            group: shape.group,
            fades: log_gates.is_some() || slopes.is_some() || (method.fades && state.is_some()),
        };
        let out = gradients::Out {
            k: k.rows(),
            v: v.rows(),
            log_gates: log_gates.as_mut().map(crate::ViewMut::rows),
            slopes,
        };
        if recipe.form == Form::Direct && initial.is_none() && state.is_none() {
            let seen = if call.causal { Seen::Causal } else { Seen::Full };
            direct::backward(&env, &pieces, shape.kv_heads, seen, out);
            return Ok(());
        }
        let basis = self.basis()?;
        // Every head at work has sums, and gradients by them.
        let at_work = (pieces.len() * shape.kv_heads).min(parallel::threads()) as u128;
        let bytes = self.state_bytes::<E>().saturating_mul(2 * at_work);
        let (d_key, orders) = (self.spec().d_key(), self.spec().orders());
        crate::memory::check(d_key, &orders, basis.len() as u128, "the backward pass", bytes)?;
        let sweep =
            stream::Sweep { env: &env, basis: &basis, chunk: recipe.chunk, causal: call.causal };
        let mut units = vec![];
        let mut of_states = state.iter_mut().flat_map(|state| &mut state.sequences);
        for piece in &pieces {
            let past = initial.map(|state| &state.sequences[piece.sequence]);
            let (position, open) = past.map_or((0, 0), |past| (past.position, past.open));
            let mut of_heads = of_states.next().map(|sequence| {
                sequence.position = Some(position);
                sequence.heads.iter_mut()
            });
            for kv_head in 0..shape.kv_heads {
                units.push(stream::Unit {
                    piece,
                    kv_head,
                    open,
                    folded: position - open as u64,
                    past: past.map(|past| &past.heads[kv_head]),
                    gradient: of_heads.as_mut().and_then(Iterator::next),
                    by_slope: 0.0,
                });
            }
        }
        sweep.run(&mut units, &out);
        if let Some(slopes) = out.slopes {
            slopes.fill(0.0);
            units.iter().for_each(|unit| slopes[unit.kv_head] += unit.by_slope);
        }
        Ok(())
    }
}

/// Refuses a state that backward cannot go through.
fn check_state<T: Real>(plan: &Plan, state: Option<&State<T>>) -> Result<(), Error> {
    let Some(state) = state else {
        return Ok(());
    };
    let refused = |what: String| Err(Error::Unsupported { what, by: "the CPU engine" });
    if state.centre().is_some() {
        return refused("the backward of a call with a state that has a centre".into());
    }
    let (holds, needs) = (state.spec().orders(), plan.spec().orders());
    if holds != needs {
        return refused(format!(
            "the backward of a call with a state that holds the orders {holds:?}, not the spec's \
             {needs:?},"
        ));
    }
    Ok(())
}
