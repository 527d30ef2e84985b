//! The backward of whole calls: what a loss's gradient by the outputs makes of that by the inputs.
//!
//! With v̂ = \[v; 1\], N̂_t = Σ_s w_ts v̂_s and ĝ_t = \[dy/D; −δ/D\], δ = dy·y, every weight has
//! dw_ts = ĝ_t·v̂_s. Of decays: as a query a token gets Σ_s w dw = ĝ·N̂ = 0, as a key
//! −Σ_t w dw, and the logarithm of a gate is part of g of all tokens from its own on.

mod direct;
mod gradients;
mod panel;

pub use gradients::Gradients;

use super::method::Method;
use super::{Call, Seen};
use crate::view::Rows;
use crate::{Element, Error, Plan, Real, Series, View};

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
    /// Nothing of the forward call is needed but its arguments: weights are made again. `strict`
    /// and `diagnose` are of the forward call alone.
    ///
    /// # Errors
    /// Everything in [`Error`] that names an argument, before any work and with the gradients as
    /// they were; [`Error::Unsupported`] for series whose coefficients are each query's own
    /// ([`Series::Gauss`], [`Series::Hermite`]).
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
        if call.state.is_some() {
            let what = "the backward of a call with a state".to_string();
            return Err(Error::Unsupported { what, by: "the CPU engine" });
        }
        let method = Method::of::<E>(self, None, false);
        let pieces = call.pieces();
        let seen = if call.causal { Seen::Causal } else { Seen::Full };
        let Gradients { mut q, mut k, mut v, mut log_gates, slopes } = gradients;
        let env = Env {
            padded_key: method.d_key.next_multiple_of(method.kernels.lanes),
            method: &method,
            dy,
            dq: q.rows(),
            group: shape.group,
            fades: log_gates.is_some() || slopes.is_some(),
        };
        let out = gradients::Out {
            k: k.rows(),
            v: v.rows(),
            log_gates: log_gates.as_mut().map(crate::ViewMut::rows),
            slopes,
        };
        direct::backward(&env, &pieces, shape.kv_heads, seen, out);
        Ok(())
    }
}
