//! The past on a GPU: everything that it is to the future, in a size that never changes.
//!
//! A slot is one key/value head of one sequence, `sequence · kv_heads + head`. All arrays are
//! row-major; with D features, C open tokens and m sinks that there is room for:
//!
//! | array          | shape                  | type         | holds                                       |
//! |----------------|------------------------|--------------|---------------------------------------------|
//! | `sums`         | `[slot][D][d_value]`   | f32, or bf16 | Σ Φ(k) vᵀ, bare monomials as on the CPU     |
//! | `sums_low`     | `[slot][D][d_value]`   | f32, or u16  | what rounding took from them; may be absent |
//! | `z`            | `[slot][D]`            | f32          | Σ Φ(k)                                      |
//! | `z_low`        | `[slot][D]`            | f32          | likewise                                    |
//! | `open_keys`    | `[slot][C][d_key]`     | f32          | a ring: token t of a sequence is at t mod C |
//! | `open_values`  | `[slot][C][d_value]`   | f32          | likewise                                    |
//! | `open_weights` | `[slot][C]`            | f32          | 1, or 0 for a masked token or a sink        |
//! | `open_fading`  | `[slot][C]`            | f64          | each token's own logarithm, where there is decay |
//! | `sink_keys` …  | `[slot][m]` …          | likewise     | the first tokens; logarithms since the start |
//! | `marks`        | `[slot]`               | u64, 2 f64   | tokens summed, lag, total (see the CPU's file) |
//! | `reaches`      | `[slot]`               | f64          | the largest square of a key's length        |
//! | `positions`    | `[sequence]`           | u64          | tokens seen                                 |
//! | `open`         | `[sequence]`           | u32          | of them in open blocks                      |
//!
//! Beside bf16 sums, `sums_low` holds the lower half of an f32's bits: as integers, the bf16 is the
//! nearest to the f32 and the rest what remains, with its sign.

mod check;
mod host;
mod raw;
#[cfg(test)]
mod tests;

use sata::{Decay, Near, Spec};

pub(crate) use check::check_layout;
pub(crate) use raw::Arrays;
use raw::{Mark, Sums};

use crate::{Buffer, Device, Error, Plan};

/// How far sums lie in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SumsType {
    /// `f32`.
    #[default]
    F32,
    /// `bf16`; Z stays `f32`.
    Bf16,
}

impl SumsType {
    /// Bytes of a number.
    pub fn width(self) -> usize {
        match self {
            SumsType::F32 => 4,
            SumsType::Bf16 => 2,
        }
    }
}

/// How a state keeps its far sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Storage {
    /// Their type.
    pub sums: SumsType,
    /// Whether what rounding takes from them is kept beside them. Only folding reads it; it takes as
    /// much memory again.
    pub compensated: bool,
}

impl Storage {
    /// The usual one of a spec: f32, and compensated where nothing fades, so that sums of any number
    /// of tokens keep their digits. Where the past fades, sums stay small and need no such care.
    pub fn of(spec: &Spec) -> Self {
        Storage { sums: SumsType::F32, compensated: spec.decay() == Decay::None }
    }
}

/// The past of some sequences on a GPU, for plans of one spec. Its size is fixed when it is made.
///
/// Keys and values of open tokens and sinks are f32, which holds f32, bf16 and f16 inputs exactly.
/// It moves to the CPU and back ([`State::to_host`], [`State::from_host`]), and so to its file.
#[derive(Debug)]
pub struct State {
    spec: Spec,
    orders: Vec<usize>,
    features: usize,
    sequences: usize,
    kv_heads: usize,
    sums: Sums,
    z: Buffer<f32>,
    z_low: Option<Buffer<f32>>,
    open_keys: Buffer<f32>,
    open_values: Buffer<f32>,
    open_weights: Buffer<f32>,
    open_fading: Buffer<f64>,
    sink_keys: Buffer<f32>,
    sink_values: Buffer<f32>,
    sink_weights: Buffer<f32>,
    sink_fading: Buffer<f64>,
    marks: Buffer<Mark>,
    reaches: Buffer<f64>,
    /// Positions, then as many counts of open tokens, two in a word.
    lengths: Buffer<u64>,
}

/// How far a sequence has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Length {
    /// Tokens seen.
    pub position: u64,
    /// Of those, how many wait in open blocks.
    pub open: u32,
}

impl Length {
    /// Tokens before the first open one.
    pub(crate) fn folded(self) -> u64 {
        self.position - u64::from(self.open)
    }
}

/// Tokens that wait before the oldest block is folded: those of the blocks that are near to a query.
pub(crate) fn capacity(spec: &Spec) -> usize {
    match spec.near() {
        Near::None => spec.block(),
        Near::Blocks(n) => n.saturating_add(1).saturating_mul(spec.block()),
    }
}

impl State {
    /// An empty past of `sequences` sequences with `kv_heads` key/value heads each, kept in the
    /// usual way ([`Storage::of`]).
    ///
    /// # Errors
    /// [`sata::Error::Shape`] for zero sequences or heads, [`sata::Error::TooLarge`],
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn new(plan: &Plan, sequences: usize, kv_heads: usize) -> Result<Self, Error> {
        Self::with_storage(plan, sequences, kv_heads, Storage::of(plan.spec()))
    }

    /// The same, kept in a given way.
    ///
    /// # Errors
    /// As for [`State::new`].
    pub fn with_storage(
        plan: &Plan,
        sequences: usize,
        kv_heads: usize,
        storage: Storage,
    ) -> Result<Self, Error> {
        if sequences == 0 || kv_heads == 0 {
            return Err(Error::Call(sata::Error::Shape {
                argument: "state",
                got: vec![sequences, kv_heads],
                expected: "it needs at least one sequence and one key/value head".into(),
            }));
        }
        let (device, spec) = (plan.device(), plan.spec());
        let features = plan.features()?;
        let (d_key, d_value) = (spec.d_key(), spec.d_value());
        let (room, sinks) = (capacity(spec), spec.sinks());
        let fades = usize::from(spec.decay() != Decay::None);
        // What overflows is more than any device has.
        let of = |parts: &[usize]| parts.iter().fold(1usize, |a, &b| a.saturating_mul(b));
        let slots = of(&[sequences, kv_heads]);
        let f32s = |parts: &[usize]| Buffer::<f32>::zeroed(device, of(parts));
        let f64s = |parts: &[usize]| Buffer::<f64>::zeroed(device, of(parts));
        let low = |parts: &[usize]| storage.compensated.then(|| f32s(parts)).transpose();
        Ok(State {
            sums: Sums::zeroed(device, of(&[slots, features, d_value]), storage)?,
            z: f32s(&[slots, features])?,
            z_low: low(&[slots, features])?,
            open_keys: f32s(&[slots, room, d_key])?,
            open_values: f32s(&[slots, room, d_value])?,
            open_weights: f32s(&[slots, room])?,
            open_fading: f64s(&[slots, room, fades])?,
            sink_keys: f32s(&[slots, sinks, d_key])?,
            sink_values: f32s(&[slots, sinks, d_value])?,
            sink_weights: f32s(&[slots, sinks])?,
            sink_fading: f64s(&[slots, sinks, fades])?,
            marks: Buffer::zeroed(device, slots)?,
            reaches: f64s(&[slots])?,
            lengths: Buffer::zeroed(device, words(sequences))?,
            spec: spec.clone(),
            orders: plan.orders().to_vec(),
            features,
            sequences,
            kv_heads,
        })
    }

    /// The spec it was made for.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        self.z.device()
    }

    /// How many sequences.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// How many key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// How its far sums are kept.
    pub fn storage(&self) -> Storage {
        Storage { sums: self.sums.of_type(), compensated: self.z_low.is_some() }
    }

    /// Tokens that sequence `sequence` has seen, masked ones included; 0 for one it does not have.
    /// Asks the device, and so waits for it: steps and graphs move positions there.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn position(&self, sequence: usize) -> Result<u64, Error> {
        Ok(self.lengths()?.get(sequence).map_or(0, |length| length.position))
    }

    /// Bytes of all its arrays.
    pub fn bytes(&self) -> usize {
        let f32s = [
            &self.z,
            &self.open_keys,
            &self.open_values,
            &self.open_weights,
            &self.sink_keys,
            &self.sink_values,
            &self.sink_weights,
        ];
        let f64s = [&self.open_fading, &self.sink_fading, &self.reaches];
        let small = self.marks.bytes() + self.lengths.bytes();
        self.sums.bytes()
            + self.z_low.as_ref().map_or(0, Buffer::bytes)
            + f32s.iter().map(|x| x.bytes()).sum::<usize>()
            + f64s.iter().map(|x| x.bytes()).sum::<usize>()
            + small
    }

    /// An independent copy.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn fork(&self) -> Result<Self, Error> {
        Ok(State {
            spec: self.spec.clone(),
            orders: self.orders.clone(),
            sums: self.sums.duplicate()?,
            z: self.z.duplicate()?,
            z_low: self.z_low.as_ref().map(Buffer::duplicate).transpose()?,
            open_keys: self.open_keys.duplicate()?,
            open_values: self.open_values.duplicate()?,
            open_weights: self.open_weights.duplicate()?,
            open_fading: self.open_fading.duplicate()?,
            sink_keys: self.sink_keys.duplicate()?,
            sink_values: self.sink_values.duplicate()?,
            sink_weights: self.sink_weights.duplicate()?,
            sink_fading: self.sink_fading.duplicate()?,
            marks: self.marks.duplicate()?,
            reaches: self.reaches.duplicate()?,
            lengths: self.lengths.duplicate()?,
            ..*self
        })
    }

    /// Forgets everything.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn reset(&mut self) -> Result<(), Error> {
        self.sums.clear()?;
        if let Some(low) = &mut self.z_low {
            low.fill_bytes(0)?;
        }
        for x in [
            &mut self.z,
            &mut self.open_keys,
            &mut self.open_values,
            &mut self.open_weights,
            &mut self.sink_keys,
            &mut self.sink_values,
            &mut self.sink_weights,
        ] {
            x.fill_bytes(0)?;
        }
        for x in [&mut self.open_fading, &mut self.sink_fading, &mut self.reaches] {
            x.fill_bytes(0)?;
        }
        self.marks.fill_bytes(0)?;
        self.lengths.fill_bytes(0)
    }

    /// The orders that its sums hold.
    pub(crate) fn orders(&self) -> &[usize] {
        &self.orders
    }

    /// D, the number of features that its sums hold.
    pub(crate) fn features(&self) -> usize {
        self.features
    }

    /// Tokens that its open blocks have room for.
    pub(crate) fn capacity(&self) -> usize {
        capacity(&self.spec)
    }

    /// How far each sequence has come, from the device.
    pub(crate) fn lengths(&self) -> Result<Vec<Length>, Error> {
        let words = self.lengths.to_vec()?;
        let (positions, open) = words.split_at(self.sequences);
        let open = |n: usize| (open[n / 2] >> (n % 2 * 32)) as u32;
        let length = |(n, &position)| Length { position, open: open(n) };
        Ok(positions.iter().enumerate().map(length).collect())
    }

    /// Tells the device how far each sequence has come.
    pub(crate) fn set_lengths(&mut self, lengths: &[Length]) -> Result<(), Error> {
        let mut words = vec![0u64; words(self.sequences)];
        for (n, length) in lengths.iter().enumerate().take(self.sequences) {
            words[n] = length.position;
            words[self.sequences + n / 2] |= u64::from(length.open) << (n % 2 * 32);
        }
        self.lengths.write(0, &words)
    }

    /// Addresses of its arrays.
    pub(crate) fn arrays(&self) -> Arrays {
        let (sums, sums_low) = self.sums.addresses();
        // An array that is not there has no address.
        fn at<T: crate::Plain>(buffer: &Buffer<T>) -> u64 {
            if buffer.is_empty() { 0 } else { buffer.address() }
        }
        Arrays {
            sums,
            z: self.z.address(),
            sums_low,
            z_low: self.z_low.as_ref().map_or(0, Buffer::address),
            open_keys: self.open_keys.address(),
            open_values: self.open_values.address(),
            open_weights: self.open_weights.address(),
            open_fading: at(&self.open_fading),
            sink_keys: at(&self.sink_keys),
            sink_values: at(&self.sink_values),
            sink_weights: at(&self.sink_weights),
            sink_fading: at(&self.sink_fading),
            marks: self.marks.address(),
            reaches: self.reaches.address(),
            positions: self.lengths.address(),
            open: self.lengths.address_of(self.sequences),
        }
    }
}

/// Words that hold the lengths of so many sequences.
fn words(sequences: usize) -> usize {
    sequences.saturating_add(sequences.div_ceil(2))
}
