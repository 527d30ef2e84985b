//! Running a plan: checks first, then the state form, the direct form, or one step.

mod backward;
mod call;
mod direct;
mod load;
mod local;
mod method;
mod standing;
mod step;
mod stream;
mod tally;
mod window;

pub use backward::{Gradients, StateGradient};
pub use call::Call;
pub(crate) use call::Shape;
pub(crate) use direct::{Seen, direct};
pub(crate) use method::Method;

use crate::plan::{Form, Sizes};
use crate::view::Rows;
use crate::{Decay, Diagnostics, Element, Error, Plan, Real, State, View, ViewMut, parallel};
use tally::Tally;

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
    /// `[kv_heads]`.
    pub slopes: Option<&'a [f64]>,
    /// Shaped like k, with one channel.
    pub log_gates: Option<View<'a, f32>>,
}

/// Below this a gate's logarithm is as good as −∞: no logit makes up for it. Sums of it keep their
/// digits.
const LOWEST_GATE: f64 = -1e5;

impl<E: Element> Piece<'_, E> {
    /// The logarithm of what the past of a head fades by at key `token`.
    fn fading(&self, kv_head: usize, token: usize) -> f64 {
        if let Some(gates) = &self.log_gates {
            let gate = gates.row(self.k_batch, kv_head, self.k_first + token)[0];
            return f64::from(gate).max(LOWEST_GATE);
        }
        self.slopes.map_or(0.0, |slopes| (-slopes[kv_head]).max(LOWEST_GATE))
    }

    /// The largest |k|² of a head's keys, less a centre.
    fn reach(&self, kv_head: usize, centre: Option<&[f64]>) -> f64 {
        (0..self.keys)
            .filter(|&t| self.mask.is_none_or(|mask| mask[t]))
            .map(|t| {
                let row = self.k.row(self.k_batch, kv_head, self.k_first + t);
                match centre {
                    None => square(row),
                    Some(centre) => {
                        let less = row.iter().zip(centre).map(|(k, c)| k.to_compute().to_f64() - c);
                        less.map(|k| k * k).sum()
                    }
                }
            })
            .fold(0.0, f64::max)
    }

    /// The largest |q|² of a head's queries.
    fn query_reach(&self, head: usize) -> f64 {
        (0..self.queries)
            .map(|t| square(self.q.row(self.q_batch, head, self.q_first + t)))
            .fold(0.0, f64::max)
    }
}

fn square<E: Element>(row: &[E]) -> f64 {
    // Several sums at once: one alone would wait for every addition.
    const LANES: usize = 8;
    let mut sums = [E::Compute::ZERO; LANES];
    for part in row.chunks(LANES) {
        for (sum, &x) in sums.iter_mut().zip(part) {
            let x = x.to_compute();
            *sum += x * x;
        }
    }
    sums.into_iter().fold(E::Compute::ZERO, |a, b| a + b).to_f64()
}

/// Products of all queries with all keys and values below which other threads are not woken, which
/// takes them some 20 µs where they sleep.
const ALONE: usize = 1 << 18;

impl Plan {
    /// Computes a call into `out` `[batch, query_heads, queries, d_value]`.
    ///
    /// # Errors
    /// Everything in [`Error`] that names an argument, before any work and with `out` and state
    /// as they were; [`Error::Denominators`] after the work, for strict calls only.
    pub fn run<E: Element>(
        &self,
        call: Call<'_, '_, E>,
        out: ViewMut<'_, E>,
    ) -> Result<Diagnostics, Error> {
        match call.state.is_none() && call.products() < ALONE {
            true => parallel::alone(|| self.compute(call, out)),
            false => self.compute(call, out),
        }
    }

    fn compute<E: Element>(
        &self,
        mut call: Call<'_, '_, E>,
        mut out: ViewMut<'_, E>,
    ) -> Result<Diagnostics, Error> {
        let shape = call.check(self, out.shape())?;
        let Call { strict, causal, diagnose, .. } = call;
        let mut state = call.state.take();
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
        let centre = state.as_ref().and_then(|state| state.centre.clone());
        let method = Method::of::<E>(self, centre, diagnose);
        let mut reaches = vec![];
        let tally = match &mut state {
            Some(state) if causal && pieces.iter().all(|piece| piece.queries == 1) => {
                step::steps(&method, &pieces, &rows, shape.group, state)
            }
            Some(state) => stream::stream(self, &method, &pieces, &rows, sizes, causal, state)?,
            None => match self.choose::<E>(sizes).form {
                Form::Direct => {
                    let seen = if causal { Seen::Causal } else { Seen::Full };
                    direct(&method, &pieces, &rows, shape, seen)
                }
                Form::State => {
                    let mut state = State::temporary(self, pieces.len(), shape.kv_heads, keys)?;
                    stream::stream(self, &method, &pieces, &rows, sizes, causal, &mut state)?
                }
            },
        };
        let mut diagnostics = tally.found.clone();
        if diagnose {
            for kv_head in 0..shape.kv_heads {
                let centre = method.key_centre(kv_head);
                let now = pieces.iter().map(|piece| piece.reach(kv_head, centre));
                let before = state.iter().flat_map(|state| &state.sequences);
                let before = before.map(|sequence| sequence.heads[kv_head].reach);
                let reach = now.chain(before).fold(0.0, f64::max).sqrt();
                let away = centre.map_or(0.0, |c| c.iter().map(|c| c * c).sum::<f64>().sqrt());
                reaches.push(reach + away);
            }
            let reach = |head: usize| {
                let queries = pieces.iter().map(|p| p.query_reach(head)).fold(0.0, f64::max);
                self.spec().scale().abs() * queries.sqrt() * reaches[head / shape.group]
            };
            let heads = shape.kv_heads * shape.group;
            diagnostics = tally.finish(heads, reach, self.spec().series(), self.spec().terms());
        }
        if strict && !diagnostics.is_clean() {
            return Err(Error::Denominators(diagnostics));
        }
        Ok(diagnostics)
    }

    /// One token of every sequence: q `[sequences, query_heads, 1, d_key]` and likewise k, v and
    /// `out`.
    ///
    /// For specs without decay; with one, [`Plan::run`] takes a [`Call`] that has it and a state.
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
        self.no_decay()?;
        if q.shape()[2] != 1 {
            let expected = "a step takes 1 token of every sequence (extend takes any number)";
            return Err(Error::shape("q", &q.shape(), expected));
        }
        self.extend(state, q, k, v, out)
    }

    /// Any number of tokens that follow the state's past; the same numbers as one call over all.
    /// For specs without decay, as [`Plan::step`].
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
        self.no_decay()?;
        self.run(Call::causal(q, k, v).state(state), out)
    }

    /// What is given no decays cannot go on with a past that fades.
    fn no_decay(&self) -> Result<(), Error> {
        let argument = match self.spec().decay() {
            Decay::None => return Ok(()),
            Decay::Slopes => "slopes",
            Decay::Gates => "log_gates",
        };
        let expected = "the spec has a decay: use Plan::run with a Call that is given them";
        Err(Error::shape(argument, &[], expected))
    }
}

/// Writes `num / den` of queries as output rows, `place` their head and the first of them, and
/// counts their denominators.
///
/// # Safety
/// No other thread writes the same rows.
unsafe fn finish<E: Element>(
    method: &Method<E::Compute>,
    rows: &Rows<'_, E>,
    piece: &Piece<'_, E>,
    [head, first]: [usize; 2],
    den: &[E::Compute],
    num: &[E::Compute],
    tally: &mut Tally,
) {
    let padded = method.padded;
    let kv_heads = piece.k.shape()[1];
    let centre = method.value_centre(head / (piece.q.shape()[1] / kv_heads));
    for (t, &den) in den.iter().enumerate() {
        let token = first + t;
        let place = [piece.q_batch, head, piece.q_first + token];
        let row = &num[t * padded..(t + 1) * padded];
        // SAFETY: forwarded from the caller.
        unsafe {
            match centre {
                None => rows.write(place, row.iter().map(|&n| n / den)),
                Some(centre) => {
                    let centre = centre.iter().map(|&c| E::Compute::from_f64(c));
                    rows.write(place, row.iter().zip(centre).map(|(&n, c)| n / den + c));
                }
            }
        }
        tally.count(den.to_f64(), [piece.sequence, head, token], method.diagnose);
    }
}
