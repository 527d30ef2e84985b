//! Between GPU and CPU.

use sata::StateParts;

use super::raw::{Mark, added};
use super::{Length, State, Storage};
use crate::{Error, Plan};

impl State {
    /// A state of the CPU engine on this device, kept in the usual way.
    ///
    /// # Errors
    /// As for [`State::from_host_with`].
    pub fn from_host(plan: &Plan, host: &sata::State<f32>) -> Result<Self, Error> {
        Self::from_host_with(plan, host, Storage::of(plan.spec()))
    }

    /// The same, kept in a given way. Where what rounding takes from sums is not kept, it is added
    /// to them, which rounds them once more.
    ///
    /// # Errors
    /// [`sata::Error::State`] naming the field in which it does not fit the plan (it must hold the
    /// plan's own orders); [`Error::Unsupported`] for one with a centre; otherwise as for
    /// [`State::new`].
    pub fn from_host_with(
        plan: &Plan,
        host: &sata::State<f32>,
        storage: Storage,
    ) -> Result<Self, Error> {
        if host.centre().is_some() {
            return Err(Error::Unsupported { what: "a state with a centre".into() });
        }
        let holds = host.spec().orders();
        super::check_layout(host.spec(), plan.spec(), &holds, plan.orders())?;
        if holds != plan.orders() {
            return Err(Error::Call(sata::Error::State {
                field: "orders",
                state: format!("{holds:?}"),
                call: format!("{:?}", plan.orders()),
            }));
        }
        let mut state = Self::with_storage(plan, host.sequences(), host.kv_heads(), storage)?;
        state.put(&host.to_parts())?;
        Ok(state)
    }

    /// The same state for the CPU engine; waits for the device. Sums come out as they are kept: bf16
    /// ones as the f32 they stand for, and with nothing beside them where nothing is kept.
    ///
    /// # Errors
    /// [`Error::Driver`]; [`sata::Error::Part`] when a kernel has left what no state holds.
    pub fn to_host(&self, plan: &Plan) -> Result<sata::State<f32>, Error> {
        super::check_layout(&self.spec, plan.spec(), &self.orders, plan.orders())?;
        let parts = self.parts()?;
        Ok(sata::State::from_parts(plan.host(), self.kv_heads, &parts)?)
    }

    fn put(&mut self, parts: &StateParts<f32>) -> Result<(), Error> {
        self.sums.put(&parts.sums, &parts.sums_low)?;
        match &mut self.z_low {
            Some(low) => {
                self.z.write(0, &parts.z)?;
                low.write(0, &parts.z_low)?;
            }
            None => self.z.write(0, &added(&parts.z, &parts.z_low))?,
        }
        let length = |(&position, &open): (&u64, &usize)| Length { position, open: open as u32 };
        let lengths: Vec<Length> = parts.positions.iter().zip(&parts.open).map(length).collect();
        let ring = Ring::of(self, &lengths);
        let (d_key, d_value) = (self.spec.d_key(), self.spec.d_value());
        self.open_keys.write(0, &ring.wound(&parts.open_keys, d_key))?;
        self.open_values.write(0, &ring.wound(&parts.open_values, d_value))?;
        self.open_weights.write(0, &ring.wound(&parts.open_weights, 1))?;
        self.open_fading.write(0, &ring.wound(&parts.open_fading, 1))?;
        self.sink_keys.write(0, &parts.sink_keys)?;
        self.sink_values.write(0, &parts.sink_values)?;
        self.sink_weights.write(0, &parts.sink_weights)?;
        self.sink_fading.write(0, &parts.sink_fading)?;
        let marks: Vec<Mark> = (0..parts.counts.len())
            .map(|slot| Mark {
                count: parts.counts[slot],
                lag: parts.lags[slot],
                total: parts.totals[slot],
            })
            .collect();
        self.marks.write(0, &marks)?;
        self.reaches.write(0, &parts.reaches)?;
        self.set_lengths(&lengths)
    }

    fn parts(&self) -> Result<StateParts<f32>, Error> {
        let lengths = self.lengths()?;
        let marks = self.marks.to_vec()?;
        let (sums, sums_low) = self.sums.to_host()?;
        let (z, z_low) = (self.z.to_vec()?, self.z_low.as_ref());
        let z_low = z_low.map_or_else(|| Ok(vec![0.0; z.len()]), |low| low.to_vec())?;
        let ring = Ring::of(self, &lengths);
        let (d_key, d_value) = (self.spec.d_key(), self.spec.d_value());
        Ok(StateParts {
            positions: lengths.iter().map(|length| length.position).collect(),
            open: lengths.iter().map(|length| length.open as usize).collect(),
            counts: marks.iter().map(|mark| mark.count).collect(),
            lags: marks.iter().map(|mark| mark.lag).collect(),
            totals: marks.iter().map(|mark| mark.total).collect(),
            reaches: self.reaches.to_vec()?,
            sums_low: sums_low.unwrap_or_else(|| vec![0.0; sums.len()]),
            sums,
            z,
            z_low,
            open_keys: ring.unwound(&self.open_keys.to_vec()?, d_key),
            open_values: ring.unwound(&self.open_values.to_vec()?, d_value),
            open_weights: ring.unwound(&self.open_weights.to_vec()?, 1),
            open_fading: ring.unwound(&self.open_fading.to_vec()?, 1),
            sink_keys: self.sink_keys.to_vec()?,
            sink_values: self.sink_values.to_vec()?,
            sink_weights: self.sink_weights.to_vec()?,
            sink_fading: self.sink_fading.to_vec()?,
            centre: None,
        })
    }
}

/// Where open tokens lie: token t of a sequence at t mod `room`.
struct Ring<'l> {
    room: usize,
    kv_heads: usize,
    lengths: &'l [Length],
}

impl<'l> Ring<'l> {
    fn of(state: &State, lengths: &'l [Length]) -> Self {
        Ring { room: state.capacity(), kv_heads: state.kv_heads, lengths }
    }

    /// Calls `each` with the place in order and the place in the ring of all open tokens.
    fn each(&self, mut each: impl FnMut(usize, usize)) {
        for (n, length) in self.lengths.iter().enumerate() {
            let first = (length.folded() % self.room as u64) as usize;
            for slot in n * self.kv_heads..(n + 1) * self.kv_heads {
                for t in 0..(length.open as usize).min(self.room) {
                    each(slot * self.room + t, slot * self.room + (first + t) % self.room);
                }
            }
        }
    }

    /// From order to ring; 0 where there is no token.
    fn wound<T: Copy + Default>(&self, from: &[T], width: usize) -> Vec<T> {
        let mut to = vec![T::default(); from.len()];
        if !from.is_empty() {
            self.each(|order, ring| {
                to[ring * width..][..width].copy_from_slice(&from[order * width..][..width]);
            });
        }
        to
    }

    /// From ring to order; 0 where there is no token.
    fn unwound<T: Copy + Default>(&self, from: &[T], width: usize) -> Vec<T> {
        let mut to = vec![T::default(); from.len()];
        if !from.is_empty() {
            self.each(|order, ring| {
                to[order * width..][..width].copy_from_slice(&from[ring * width..][..width]);
            });
        }
        to
    }
}
