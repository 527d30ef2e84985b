//! Running a call on the device: checks, then the back end that serves it.

use sata::{Decay, Diagnostics, Error as CallError};

use crate::call::Shape;
use crate::generic::{self, Tally};
use crate::hopper;
use crate::problem::{Fading, Past, Problem, Stretch};
use crate::stream;
use crate::units::Units;
use crate::{Buffer, Call, Element, Error, Plan, State, SumsType, ViewMut};

/// What a call will have noticed when the device has done it.
#[derive(Debug)]
pub struct Pending {
    tally: Buffer<Tally>,
    queries: u64,
    query_heads: usize,
    most_queries: usize,
    strict: bool,
}

impl Pending {
    /// Waits for the device, and says what the call noticed about denominators.
    ///
    /// # Errors
    /// [`Error::Driver`]; for a strict call [`sata::Error::Denominators`].
    pub fn wait(self) -> Result<Diagnostics, Error> {
        let mut tally = [Tally::default()];
        self.tally.read(0, &mut tally)?;
        let [Tally { non_positive, non_finite, first }] = tally;
        let place = || {
            // Kept as its complement, so that 0 stands for none and the largest is the first.
            let (place, queries) = (!first as usize, self.most_queries.max(1));
            let head = place / queries;
            [head / self.query_heads, head % self.query_heads, place % queries]
        };
        let diagnostics = Diagnostics {
            queries: self.queries,
            non_positive,
            non_finite,
            first: (non_positive + non_finite > 0).then(place),
            ..Diagnostics::default()
        };
        if self.strict && !diagnostics.is_clean() {
            return Err(Error::Call(CallError::Denominators(diagnostics)));
        }
        Ok(diagnostics)
    }
}

impl Plan {
    /// Computes a call into `out` `[batch, query_heads, queries, d_value]`, and waits for it.
    ///
    /// # Errors
    /// Everything in [`Error`] that names an argument, before any work and with `out` and state as
    /// they were; for strict calls [`sata::Error::Denominators`], after the work. After
    /// [`Error::OutOfMemory`], and what a device may report, a state is not to be relied on.
    pub fn run<E: Element>(
        &self,
        call: Call<'_, '_, E>,
        out: ViewMut<'_, E>,
    ) -> Result<Diagnostics, Error> {
        self.enqueue(call, out)?.wait()
    }

    /// The same without waiting: the work is in the order of the device's stream. A call with a
    /// state asks the device how far that has come first, which waits for what was before.
    ///
    /// # Errors
    /// As for [`Plan::run`], but for what is only known afterwards.
    pub fn enqueue<E: Element>(
        &self,
        mut call: Call<'_, '_, E>,
        out: ViewMut<'_, E>,
    ) -> Result<Pending, Error> {
        let shape = call.check(self, "out", out.shape())?;
        if !out.device().is_same(self.device()) {
            return Err(Error::argument("out", "it is on another device than the plan"));
        }
        let strict = call.strict;
        let state = call.state.take();
        let sequences = stretches(&call, state.as_deref())?;
        let slopes = match call.slopes {
            Some(slopes) => {
                let units = self.once("units", || Ok(Units::new(self.device())))?;
                Some(units.table(slopes)?)
            }
            None => None,
        };
        let fading = match (self.spec().decay(), &slopes) {
            (Decay::Slopes, Some(slopes)) => Fading::Slopes(slopes.address()),
            (Decay::Gates, _) => Fading::Gates(call.raw_gates()),
            _ => Fading::None,
        };
        let problem = Problem {
            device: self.device(),
            spec: self.spec(),
            element: E::KERNEL_NAME,
            q: call.q.raw(),
            y: out.raw(),
            k: call.k.raw(),
            v: call.v.raw(),
            kv_heads: shape.kv_heads,
            group: shape.group,
            causal: call.causal,
            fading,
            mask: call.raw_mask(),
            sequences,
            past: state.as_deref().map(past),
        };
        let tally = Buffer::zeroed(self.device(), 1)?;
        let pending = pending(&problem, shape, strict, tally);
        let wish = self.wish();
        let small = wish.matrix && stream::serves(&problem, wish);
        let wide = wish.matrix && hopper::serves(&problem);
        if small && !(wide && stream::is_short(&problem, wish)) {
            stream::run(self, &problem, wish, &pending.tally)?;
        } else if wide {
            hopper::run(self, &problem, wish, &pending.tally)?;
        } else {
            generic::run(self, &problem, wish, &pending.tally)?;
        }
        Ok(pending)
    }

    /// Any number of tokens that follow the state's past; the same numbers as one call over all.
    /// For specs without decay; with one, [`Plan::run`] takes a [`Call`] that has it and a state.
    ///
    /// # Errors
    /// As for [`Plan::run`].
    pub fn extend<E: Element>(
        &self,
        state: &mut State,
        q: crate::View<'_, E>,
        k: crate::View<'_, E>,
        v: crate::View<'_, E>,
        out: ViewMut<'_, E>,
    ) -> Result<Diagnostics, Error> {
        self.run(Call::causal(q, k, v).state(state), out)
    }
}

fn pending(problem: &Problem<'_>, shape: Shape, strict: bool, tally: Buffer<Tally>) -> Pending {
    Pending {
        tally,
        queries: problem.queries(),
        query_heads: shape.kv_heads * shape.group,
        most_queries: problem.sequences.iter().map(|s| s.queries).max().unwrap_or(0),
        strict,
    }
}

/// The sequences of a checked call, and where its state stands.
pub(crate) fn stretches<E: Element>(
    call: &Call<'_, '_, E>,
    state: Option<&State>,
) -> Result<Vec<Stretch>, Error> {
    let lengths = state.map(State::lengths).transpose()?;
    let mut all = vec![];
    for (i, piece) in call.pieces().into_iter().enumerate() {
        let (mut open, mut folded) = (0, 0);
        if let Some(length) = lengths.as_ref().and_then(|lengths| lengths.get(i)) {
            State::check_room(length.position, piece.keys)?;
            (open, folded) = (length.open as usize, length.folded());
        }
        all.push(Stretch {
            q_batch: piece.q_batch,
            q_first: piece.q_first,
            queries: piece.queries,
            k_batch: piece.k_batch,
            k_first: piece.k_first,
            keys: piece.keys,
            open,
            folded,
        });
    }
    Ok(all)
}

pub(crate) fn past(state: &State) -> Past {
    Past {
        orders: state.orders().to_vec(),
        is_bf16: state.storage().sums == SumsType::Bf16,
        capacity: state.capacity(),
        sinks: state.spec().sinks(),
        arrays: state.arrays(),
    }
}
