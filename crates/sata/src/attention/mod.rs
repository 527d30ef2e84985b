//! Running a plan: checks first, then the state form, the direct form, or one step.

mod call;
mod direct;
mod load;
mod step;
mod stream;

pub use call::Call;
pub(crate) use call::Shape;
pub(crate) use direct::{Weighing, Weight};

use crate::plan::{Form, Sizes};
use crate::view::Rows;
use crate::{Diagnostics, Element, Error, Plan, State, View, ViewMut, parallel};

/// One sequence's share of a call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece<'a, E> {
    /// Index among the call's sequences, and so in the state.
    pub sequence: usize,
    /// Which batch row of q and the output, and which of its tokens come first.
    pub q_batch: usize,
    pub q_first: usize,
    pub queries: usize,
    /// The same for k and v.
    pub k_batch: usize,
    pub k_first: usize,
    pub keys: usize,
    /// `[keys]`: which keys exist.
    pub mask: Option<&'a [bool]>,
    pub q: View<'a, E>,
    pub k: View<'a, E>,
    pub v: View<'a, E>,
}

impl Plan {
    /// Computes a call into `out` `[batch, query_heads, queries, d_value]`.
    ///
    /// # Errors
    /// Everything in [`Error`] that names an argument, before any work and with `out` and state
    /// as they were; [`Error::Denominators`] after the work, for strict calls only.
    pub fn run<E: Element>(
        &self,
        mut call: Call<'_, '_, E>,
        mut out: ViewMut<'_, E>,
    ) -> Result<Diagnostics, Error> {
        let shape = call.check(self, out.shape())?;
        let strict = call.strict;
        let causal = call.causal;
        let state = call.state.take();
        let pieces = call.pieces();
        let rows = out.rows();
        let (units, queries, keys) = (
            pieces.len() * shape.kv_heads,
            pieces.iter().map(|piece| piece.queries).max().unwrap_or(0),
            pieces.iter().map(|piece| piece.keys).max().unwrap_or(0),
        );
        let sizes = Sizes {
            units,
            group: shape.group,
            queries,
            keys,
            causal,
            state: state.is_some(),
            threads: parallel::threads(),
        };
        let diagnostics = match state {
            Some(state) if causal && pieces.iter().all(|piece| piece.queries == 1) => {
                step::steps(self, &pieces, &rows, shape.group, state)
            }
            Some(state) => stream::stream(self, &pieces, &rows, sizes, causal, state)?,
            None => match self.choose::<E>(sizes).form {
                Form::Direct => direct::Weighing::of::<E>(self, causal).run(&pieces, &rows, shape),
                Form::State => {
                    let mut state = State::new(self, pieces.len(), shape.kv_heads)?;
                    stream::stream(
                        self,
                        &pieces,
                        &rows,
                        Sizes { state: false, ..sizes },
                        causal,
                        &mut state,
                    )?
                }
            },
        };
        if strict && !diagnostics.is_clean() {
            return Err(Error::Denominators(diagnostics));
        }
        Ok(diagnostics)
    }

    /// One token of every sequence: q `[sequences, query_heads, 1, d_key]` and likewise k, v and
    /// `out`.
    ///
    /// # Errors
    /// As for [`Plan::run`].
    pub fn step<E: Element>(
        &self,
        state: &mut State<E::Compute>,
        q: View<'_, E>,
        k: View<'_, E>,
        v: View<'_, E>,
        out: ViewMut<'_, E>,
    ) -> Result<Diagnostics, Error> {
        if q.shape()[2] != 1 {
            let expected = "a step takes 1 token of every sequence (extend takes any number)";
            return Err(Error::shape("q", &q.shape(), expected));
        }
        self.extend(state, q, k, v, out)
    }

    /// Any number of tokens that follow the state's past; the same numbers as one call over all.
    ///
    /// # Errors
    /// As for [`Plan::run`].
    pub fn extend<E: Element>(
        &self,
        state: &mut State<E::Compute>,
        q: View<'_, E>,
        k: View<'_, E>,
        v: View<'_, E>,
        out: ViewMut<'_, E>,
    ) -> Result<Diagnostics, Error> {
        self.run(Call::causal(q, k, v).state(state), out)
    }
}

/// Writes `num / den` of `tokens` queries as output rows, and counts their denominators.
///
/// # Safety
/// No other thread writes the same rows.
pub(crate) unsafe fn finish<E: Element>(
    rows: &Rows<'_, E>,
    piece: &Piece<'_, E>,
    head: usize,
    first: usize,
    den: &[E::Compute],
    num: &[E::Compute],
    padded: usize,
) -> Diagnostics {
    let mut diagnostics = Diagnostics::default();
    for (t, &den) in den.iter().enumerate() {
        let token = first + t;
        let place = [piece.q_batch, head, piece.q_first + token];
        // SAFETY: forwarded from the caller.
        unsafe { rows.write(place, num[t * padded..(t + 1) * padded].iter().map(|&n| n / den)) };
        diagnostics.count(crate::Real::to_f64(den), [piece.sequence, head, token]);
    }
    diagnostics
}
