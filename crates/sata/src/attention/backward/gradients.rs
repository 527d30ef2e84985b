//! Where gradients go.

use super::state::StateGradient;
use crate::attention::{Call, Piece};
use crate::view::Rows;
use crate::{Decay, Element, Error, Real, Spec, ViewMut};

/// What a backward call fills, each shaped as the call's own argument.
#[derive(Debug)]
pub struct Gradients<'a, E: Real> {
    /// By q, `[batch, query_heads, queries, d_key]`.
    pub q: ViewMut<'a, E>,
    /// By k, `[batch, kv_heads, keys, d_key]`.
    pub k: ViewMut<'a, E>,
    /// By v, `[batch, kv_heads, keys, d_value]`.
    pub v: ViewMut<'a, E>,
    /// By the logarithms of the gates, `[batch, kv_heads, keys, 1]`, for a spec with
    /// [`Decay::Gates`].
    pub log_gates: Option<ViewMut<'a, E>>,
    /// By the slopes, `[kv_heads]`, summed over the batch, for a spec with [`Decay::Slopes`].
    pub slopes: Option<&'a mut [f64]>,
    /// By the final state when the call begins; by the initial one, if there is one, when it ends.
    pub state: Option<&'a mut StateGradient<E>>,
}

impl<'a, E: Real> Gradients<'a, E> {
    /// Those by q, k and v alone.
    pub fn new(q: ViewMut<'a, E>, k: ViewMut<'a, E>, v: ViewMut<'a, E>) -> Self {
        Gradients { q, k, v, log_gates: None, slopes: None, state: None }
    }

    /// And by the logarithms of the gates, `[batch, kv_heads, keys, 1]`.
    pub fn log_gates(mut self, log_gates: ViewMut<'a, E>) -> Self {
        self.log_gates = Some(log_gates);
        self
    }

    /// And by the slopes, `[kv_heads]`, summed over the batch.
    pub fn slopes(mut self, slopes: &'a mut [f64]) -> Self {
        self.slopes = Some(slopes);
        self
    }

    /// And by the state: takes what a later call has left for the state that this call made, leaves
    /// what belongs to the state that it began with.
    pub fn state(mut self, state: &'a mut StateGradient<E>) -> Self {
        self.state = Some(state);
        self
    }

    /// Refuses what does not fit a call that has been checked.
    pub(super) fn check(&self, spec: &Spec, call: &Call<'_, '_, E>) -> Result<(), Error> {
        let [q, k, v] = call.shapes();
        for (argument, got, of, wants) in [
            ("gradients.q", self.q.shape(), "q", q),
            ("gradients.k", self.k.shape(), "k", k),
            ("gradients.v", self.v.shape(), "v", v),
        ] {
            if got != wants {
                return Err(Error::shape(argument, &got, format!("{of} has shape {wants:?}")));
            }
        }
        if let Some(log_gates) = &self.log_gates {
            let (got, wants) = (log_gates.shape(), [k[0], k[1], k[2], 1]);
            if spec.decay() != Decay::Gates {
                let expected = format!("the spec has decay = {:?}", spec.decay());
                return Err(Error::shape("gradients.log_gates", &got, expected));
            }
            if got != wants {
                let expected = format!("it must be {wants:?}");
                return Err(Error::shape("gradients.log_gates", &got, expected));
            }
        }
        if let Some(slopes) = &self.slopes {
            if spec.decay() != Decay::Slopes {
                let expected = format!("the spec has decay = {:?}", spec.decay());
                return Err(Error::shape("gradients.slopes", &[slopes.len()], expected));
            }
            if slopes.len() != k[1] {
                let expected =
                    format!("there must be one for each of the {} key/value heads", k[1]);
                return Err(Error::shape("gradients.slopes", &[slopes.len()], expected));
            }
        }
        Ok(())
    }
}

/// Where the gradients of keys go.
pub(super) struct Out<'a, E> {
    pub k: Rows<'a, E>,
    pub v: Rows<'a, E>,
    pub log_gates: Option<Rows<'a, E>>,
    pub slopes: Option<&'a mut [f64]>,
}

impl<E: Element> Out<'_, E> {
    /// One token's row of either.
    ///
    /// # Safety
    /// No other thread writes the same rows.
    pub unsafe fn write_key(
        &self,
        piece: &Piece<'_, E>,
        kv_head: usize,
        token: usize,
        [dk, dv]: [&[E::Compute]; 2],
    ) {
        let place = [piece.k_batch, kv_head, piece.k_first + token];
        // SAFETY: forwarded.
        unsafe {
            self.k.write(place, dk.iter().copied());
            self.v.write(place, dv.iter().copied());
        }
    }

    /// The gradients by the logarithms of what each token lets the past fade by.
    ///
    /// # Safety
    /// As for [`Out::write_key`].
    pub unsafe fn write_fading(&self, piece: &Piece<'_, E>, kv_head: usize, by_log: &[f64]) {
        if let Some(rows) = &self.log_gates {
            for (token, &x) in by_log.iter().enumerate() {
                let place = [piece.k_batch, kv_head, piece.k_first + token];
                // SAFETY: forwarded.
                unsafe { rows.write(place, std::iter::once(E::Compute::from_f64(x))) };
            }
        }
    }
}

/// What a loss owes to the logarithm of each gate, when tokens have Σ_t w dw of `dw` and all that was
/// seen at the end has `later`; and then to all that was seen at the beginning.
///
/// A gate is part of g of all tokens from its own on, and the weights of each query have Σ w dw = 0.
pub(super) fn by_logs(dw: &[f64], later: f64) -> (Vec<f64>, f64) {
    let mut by_log = vec![0.0; dw.len()];
    let mut sum = later;
    for (by_log, dw) in by_log.iter_mut().zip(dw).rev() {
        sum -= dw;
        *by_log = sum;
    }
    (by_log, sum)
}
