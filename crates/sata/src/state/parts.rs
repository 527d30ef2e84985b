//! States as plain numbers, for engines that keep them elsewhere.

use std::sync::Arc;

use super::{Centre, HeadState, MAX_POSITION, Raw, State, capacity, check_centre};
use crate::{Decay, Error, Near, Plan, Real, Spec};

/// All that a [`State`] holds, row-major, as the tensors of its file (see [`State::save`]).
///
/// n sequences, h key/value heads, D features in the order of [`basis`](crate::basis), m sinks,
/// and room for C open tokens ([`State::capacity`]). Beyond a sequence's own open tokens and sinks
/// all is 0. Keys and values are less the centre, where there is one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StateParts<T> {
    /// `[n]`: tokens each sequence has seen.
    pub positions: Vec<u64>,
    /// `[n]`: how many of them wait in its open blocks.
    pub open: Vec<usize>,
    /// `[n, h]`: tokens summed, neither masked ones nor sinks.
    pub counts: Vec<u64>,
    /// `[n, h]`: g at the last token folded less g at the last summed, to which sums are relative.
    pub lags: Vec<f64>,
    /// `[n, h]`: g at the last token folded since the sequence's start.
    pub totals: Vec<f64>,
    /// `[n, h]`: the largest square of a stored key's length.
    pub reaches: Vec<f64>,
    /// `[n, h, D, d_value]`: Σ Φ(k) vᵀ over the tokens summed, faded.
    pub sums: Vec<T>,
    /// What rounding took from `sums`; empty for f64.
    pub sums_low: Vec<T>,
    /// `[n, h, D]`: Σ Φ(k).
    pub z: Vec<T>,
    /// What rounding took from `z`; empty for f64.
    pub z_low: Vec<T>,
    /// `[n, h, C, d_key]`.
    pub open_keys: Vec<T>,
    /// `[n, h, C, d_value]`.
    pub open_values: Vec<T>,
    /// `[n, h, C]`: 1, or 0 for a masked token or a sink, whose key is 0 then.
    pub open_weights: Vec<T>,
    /// `[n, h, C]`: each open token's own logarithm; empty without decay.
    pub open_fading: Vec<f64>,
    /// `[n, h, m, d_key]`.
    pub sink_keys: Vec<T>,
    /// `[n, h, m, d_value]`.
    pub sink_values: Vec<T>,
    /// `[n, h, m]`: 1, or 0 for a masked token, whose key is 0 then.
    pub sink_weights: Vec<T>,
    /// `[n, h, m]`: g since the sequence's start; empty without decay.
    pub sink_fading: Vec<f64>,
    /// What was taken off keys and values.
    pub centre: Option<Centre>,
}

/// Whether a sequence can have this position and this many open tokens.
pub(crate) fn is_place(spec: &Spec, position: u64, open: usize) -> bool {
    let folded = position.checked_sub(open as u64);
    // Near blocks are counted from the start, and fold as soon as they may.
    let whole = match spec.near() {
        Near::None => folded.is_some(),
        Near::Blocks(n) => {
            let block = spec.block() as u64;
            folded == Some((position / block).saturating_sub(n as u64) * block)
        }
    };
    whole && open < capacity(spec) && position <= MAX_POSITION
}

impl<T: Real> State<T> {
    /// Tokens that its open blocks have room for: those of the blocks that are near to a query.
    pub fn capacity(&self) -> usize {
        capacity(&self.spec)
    }

    /// A copy of all its numbers.
    pub fn to_parts(&self) -> StateParts<T> {
        let (d_key, d_value) = (self.spec.d_key(), self.spec.d_value());
        let features = self.basis.len();
        let room = [capacity(&self.spec), self.spec.sinks()];
        let mut parts = StateParts {
            positions: self.sequences.iter().map(|s| s.position).collect(),
            open: self.sequences.iter().map(|s| s.open).collect(),
            centre: self.centre.as_deref().cloned(),
            ..empty()
        };
        for sequence in &self.sequences {
            let seen = sequence.position.min(room[1] as u64) as usize;
            for head in &sequence.heads {
                parts.counts.push(head.mark.count);
                parts.lags.push(head.mark.lag);
                parts.totals.push(head.mark.total);
                parts.reaches.push(head.reach);
                let HeadState { sums, open, sinks, .. } = head;
                parts.sums.extend_from_slice(&sums.sums[..features * d_value]);
                parts.sums_low.extend_from_slice(&sums.sums_low);
                parts.z.extend_from_slice(&sums.z[..features]);
                parts.z_low.extend_from_slice(&sums.z_low);
                let of_open = Tokens {
                    keys: &mut parts.open_keys,
                    values: &mut parts.open_values,
                    weights: &mut parts.open_weights,
                    fading: &mut parts.open_fading,
                };
                of_open.put(open, [d_key, d_value], [sequence.open, room[0]]);
                let of_sinks = Tokens {
                    keys: &mut parts.sink_keys,
                    values: &mut parts.sink_values,
                    weights: &mut parts.sink_weights,
                    fading: &mut parts.sink_fading,
                };
                of_sinks.put(sinks, [d_key, d_value], [seen, room[1]]);
            }
        }
        parts
    }

    /// A state of such numbers, for plans of this spec.
    ///
    /// # Errors
    /// As for [`State::new`]; [`Error::Shape`] for a part of another length than its shape;
    /// [`Error::Part`] for one that holds what cannot be.
    pub fn from_parts(plan: &Plan, kv_heads: usize, parts: &StateParts<T>) -> Result<Self, Error> {
        let spec = plan.spec();
        let mut state = State::new(plan, parts.positions.len(), kv_heads)?;
        let (d_key, d_value) = (spec.d_key(), spec.d_value());
        let features = state.basis.len();
        let room = [capacity(spec), spec.sinks()];
        check_lengths(parts, spec, features, kv_heads)?;
        check_numbers(parts, spec, kv_heads, room)?;
        if let Some(centre) = &parts.centre {
            let sizes = [centre.keys.len(), centre.values.len()];
            if centre.kv_heads != kv_heads || sizes != [kv_heads * d_key, kv_heads * d_value] {
                let got = [centre.kv_heads, sizes[0], sizes[1]];
                let expected = format!("the state has {kv_heads} heads of {d_key} and {d_value}");
                return Err(Error::shape("centre", &got, expected));
            }
            check_centre(true, spec)?;
            state.centre = Some(Arc::new(centre.clone()));
        }
        for (n, sequence) in state.sequences.iter_mut().enumerate() {
            sequence.position = parts.positions[n];
            sequence.open = parts.open[n];
            let seen = sequence.position.min(room[1] as u64) as usize;
            for (head, to) in sequence.heads.iter_mut().enumerate() {
                let slot = n * kv_heads + head;
                to.mark.count = parts.counts[slot];
                to.mark.lag = parts.lags[slot];
                to.mark.total = parts.totals[slot];
                to.reach = parts.reaches[slot];
                let wide = features * d_value;
                to.sums.sums[..wide].copy_from_slice(of(&parts.sums, slot, wide));
                to.sums.z[..features].copy_from_slice(of(&parts.z, slot, features));
                if T::COMPENSATED {
                    to.sums.sums_low.copy_from_slice(of(&parts.sums_low, slot, wide));
                    to.sums.z_low.copy_from_slice(of(&parts.z_low, slot, features));
                }
                let StateParts { open_keys, open_values, open_weights, open_fading, .. } = parts;
                let from = Tokens {
                    keys: of(open_keys, slot, room[0] * d_key),
                    values: of(open_values, slot, room[0] * d_value),
                    weights: of(open_weights, slot, room[0]),
                    fading: of(open_fading, slot, to.open.fading.len().min(room[0])),
                };
                from.get(&mut to.open, [d_key, d_value], sequence.open);
                let StateParts { sink_keys, sink_values, sink_weights, sink_fading, .. } = parts;
                let from = Tokens {
                    keys: of(sink_keys, slot, room[1] * d_key),
                    values: of(sink_values, slot, room[1] * d_value),
                    weights: of(sink_weights, slot, room[1]),
                    fading: of(sink_fading, slot, to.sinks.fading.len().min(room[1])),
                };
                from.get(&mut to.sinks, [d_key, d_value], seen);
            }
        }
        Ok(state)
    }
}

/// None of anything.
fn empty<T>() -> StateParts<T> {
    StateParts {
        positions: vec![],
        open: vec![],
        counts: vec![],
        lags: vec![],
        totals: vec![],
        reaches: vec![],
        sums: vec![],
        sums_low: vec![],
        z: vec![],
        z_low: vec![],
        open_keys: vec![],
        open_values: vec![],
        open_weights: vec![],
        open_fading: vec![],
        sink_keys: vec![],
        sink_values: vec![],
        sink_weights: vec![],
        sink_fading: vec![],
        centre: None,
    }
}

/// The `slot`-th stretch of `len` numbers.
fn of<T>(all: &[T], slot: usize, len: usize) -> &[T] {
    &all[slot * len..][..len]
}

/// One head's raw tokens among the parts.
struct Tokens<V, F> {
    keys: V,
    values: V,
    weights: V,
    fading: F,
}

impl<T: Real> Tokens<&mut Vec<T>, &mut Vec<f64>> {
    /// Appends `count` of `room` tokens, and zeros for the others.
    fn put(self, raw: &Raw<T>, [d_key, d_value]: [usize; 2], [count, room]: [usize; 2]) {
        let grown =
            |to: &mut Vec<T>, width: usize| to.resize(to.len() + (room - count) * width, T::ZERO);
        for t in 0..count {
            self.keys.extend((0..d_key).map(|c| raw.keys[c * raw.ld + t]));
        }
        grown(self.keys, d_key);
        self.values.extend_from_slice(&raw.values[..count * d_value]);
        grown(self.values, d_value);
        self.weights.extend_from_slice(&raw.keys[d_key * raw.ld..][..count]);
        grown(self.weights, 1);
        if !raw.fading.is_empty() {
            self.fading.extend_from_slice(&raw.fading[..count]);
            self.fading.resize(self.fading.len() + room - count, 0.0);
        }
    }
}

impl<T: Real> Tokens<&[T], &[f64]> {
    /// Brings `count` tokens to where there are none.
    fn get(self, raw: &mut Raw<T>, [d_key, d_value]: [usize; 2], count: usize) {
        let ld = raw.ld;
        for t in 0..count {
            for c in 0..d_key {
                raw.keys[c * ld + t] = self.keys[t * d_key + c];
            }
            raw.keys[d_key * ld + t] = self.weights[t];
        }
        raw.values[..count * d_value].copy_from_slice(&self.values[..count * d_value]);
        if !raw.fading.is_empty() {
            raw.fading[..count].copy_from_slice(&self.fading[..count]);
        }
    }
}

fn check_lengths<T: Real>(
    parts: &StateParts<T>,
    spec: &Spec,
    features: usize,
    kv_heads: usize,
) -> Result<(), Error> {
    let (d_key, d_value) = (spec.d_key(), spec.d_value());
    let (room, sinks) = (capacity(spec), spec.sinks());
    let (n, fades) = (parts.positions.len(), usize::from(spec.decay() != Decay::None));
    let low = usize::from(T::COMPENSATED);
    let slots = n * kv_heads;
    let lengths = [
        ("open", parts.open.len(), n),
        ("counts", parts.counts.len(), slots),
        ("lags", parts.lags.len(), slots),
        ("totals", parts.totals.len(), slots),
        ("reaches", parts.reaches.len(), slots),
        ("sums", parts.sums.len(), slots * features * d_value),
        ("sums_low", parts.sums_low.len(), slots * features * d_value * low),
        ("z", parts.z.len(), slots * features),
        ("z_low", parts.z_low.len(), slots * features * low),
        ("open_keys", parts.open_keys.len(), slots * room * d_key),
        ("open_values", parts.open_values.len(), slots * room * d_value),
        ("open_weights", parts.open_weights.len(), slots * room),
        ("open_fading", parts.open_fading.len(), slots * room * fades),
        ("sink_keys", parts.sink_keys.len(), slots * sinks * d_key),
        ("sink_values", parts.sink_values.len(), slots * sinks * d_value),
        ("sink_weights", parts.sink_weights.len(), slots * sinks),
        ("sink_fading", parts.sink_fading.len(), slots * sinks * fades),
    ];
    match lengths.into_iter().find(|(_, got, wants)| got != wants) {
        Some((part, got, wants)) => {
            let expected = format!("{n} sequences of {kv_heads} heads have {wants} of them");
            Err(Error::shape(part, &[got], expected))
        }
        None => Ok(()),
    }
}

/// Refuses what no state holds; lengths are right.
fn check_numbers<T: Real>(
    parts: &StateParts<T>,
    spec: &Spec,
    kv_heads: usize,
    [room, sinks]: [usize; 2],
) -> Result<(), Error> {
    let no = |part, reason: String| Err(Error::Part { part, reason });
    let is_log = |x: &f64| *x <= 0.0 && x.is_finite();
    let logs = [
        ("lags", &parts.lags),
        ("totals", &parts.totals),
        ("open_fading", &parts.open_fading),
        ("sink_fading", &parts.sink_fading),
    ];
    for (part, logs) in logs {
        if let Some(i) = logs.iter().position(|x| !is_log(x)) {
            return no(part, format!("{} at {i}, but logarithms of decays are at most 0", logs[i]));
        }
    }
    if let Some(i) = parts.reaches.iter().position(|x| *x < 0.0 || x.is_nan()) {
        return no("reaches", format!("{} at {i}, but squares are at least 0", parts.reaches[i]));
    }
    for (n, (&position, &open)) in parts.positions.iter().zip(&parts.open).enumerate() {
        if !is_place(spec, position, open) {
            let reason = format!(
                "{position} with {open} open tokens for sequence {n}, which blocks of {} and room \
                 for {room} do not have",
                spec.block()
            );
            return no("positions", reason);
        }
        let seen = position.min(sinks as u64) as usize;
        // Sinks are not among the open tokens' weights.
        let lighter = (sinks as u64).saturating_sub(position - open as u64).min(open as u64);
        for slot in n * kv_heads..(n + 1) * kv_heads {
            let count = parts.counts[slot];
            if count > position {
                return no("counts", format!("{count} at {slot}, of {position} tokens"));
            }
            let tokens = [
                ("open_weights", &parts.open_weights, &parts.open_keys, room, open, lighter),
                ("sink_weights", &parts.sink_weights, &parts.sink_keys, sinks, seen, 0),
            ];
            for (part, weights, keys, room, count, lighter) in tokens {
                let d_key = spec.d_key();
                let weights = &of(weights, slot, room)[..count];
                let keys = of(keys, slot, room * d_key);
                for (t, (&weight, key)) in weights.iter().zip(keys.chunks(d_key)).enumerate() {
                    let gone = weight == T::ZERO && key.iter().all(|&x| x == T::ZERO);
                    if !gone && (weight != T::ONE || (t as u64) < lighter) {
                        let reason = format!(
                            "{weight:?} for token {t} of {slot}; a weight is 1, or 0 with a key of 0"
                        );
                        return no(part, reason);
                    }
                }
            }
        }
    }
    let zero = |all: &[T]| all.iter().all(|&x| x == T::ZERO);
    for (slot, _) in parts.counts.iter().enumerate().filter(|(_, count)| **count == 0) {
        let slots = parts.counts.len();
        if !zero(of(&parts.sums, slot, parts.sums.len() / slots))
            || !zero(of(&parts.z, slot, parts.z.len() / slots))
        {
            return no("sums", format!("numbers at {slot}, which has summed no tokens"));
        }
    }
    Ok(())
}
