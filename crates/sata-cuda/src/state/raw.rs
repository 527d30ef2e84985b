//! The arrays of a state.

use half::bf16;

use super::{Storage, SumsType};
use crate::{Buffer, Device, Error, Plain};

/// What a head's far sums are relative to: `Mark` of the kernels and of the CPU engine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(super) struct Mark {
    /// Tokens summed.
    pub count: u64,
    /// g at the last token folded less g at the last token summed.
    pub lag: f64,
    /// g at the last token folded less g at the sequence's start.
    pub total: f64,
}

// SAFETY: three numbers of the same size.
unsafe impl Plain for Mark {}

/// Addresses of a state's arrays; 0 for those that it does not have.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Arrays {
    pub sums: u64,
    pub z: u64,
    pub sums_low: u64,
    pub z_low: u64,
    pub open_keys: u64,
    pub open_values: u64,
    pub open_weights: u64,
    pub open_fading: u64,
    pub sink_keys: u64,
    pub sink_values: u64,
    pub sink_weights: u64,
    pub sink_fading: u64,
    /// `[slots]`: count u64, lag f64, total f64.
    pub marks: u64,
    pub reaches: u64,
    pub positions: u64,
    pub open: u64,
}

/// Far sums.
#[derive(Debug)]
pub(super) enum Sums {
    F32(Buffer<f32>, Low<f32>),
    Bf16(Buffer<bf16>, Low<u16>),
}

/// What rounding took from sums, where it is kept.
pub(super) type Low<T> = Option<Buffer<T>>;

impl Sums {
    pub(super) fn zeroed(device: &Device, len: usize, storage: Storage) -> Result<Self, Error> {
        fn low<T: Plain>(device: &Device, len: usize, there: bool) -> Result<Low<T>, Error> {
            there.then(|| Buffer::zeroed(device, len)).transpose()
        }
        let there = storage.compensated;
        Ok(match storage.sums {
            SumsType::F32 => Sums::F32(Buffer::zeroed(device, len)?, low(device, len, there)?),
            SumsType::Bf16 => Sums::Bf16(Buffer::zeroed(device, len)?, low(device, len, there)?),
        })
    }

    pub(super) fn of_type(&self) -> SumsType {
        match self {
            Sums::F32(..) => SumsType::F32,
            Sums::Bf16(..) => SumsType::Bf16,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Sums::F32(sums, low) => sums.bytes() + low.as_ref().map_or(0, Buffer::bytes),
            Sums::Bf16(sums, low) => sums.bytes() + low.as_ref().map_or(0, Buffer::bytes),
        }
    }

    pub(super) fn duplicate(&self) -> Result<Self, Error> {
        fn low<T: Plain>(low: &Low<T>) -> Result<Low<T>, Error> {
            low.as_ref().map(Buffer::duplicate).transpose()
        }
        Ok(match self {
            Sums::F32(sums, rest) => Sums::F32(sums.duplicate()?, low(rest)?),
            Sums::Bf16(sums, rest) => Sums::Bf16(sums.duplicate()?, low(rest)?),
        })
    }

    pub(super) fn clear(&mut self) -> Result<(), Error> {
        fn both<T: Plain, L: Plain>(sums: &mut Buffer<T>, low: &mut Low<L>) -> Result<(), Error> {
            sums.fill_bytes(0)?;
            low.as_mut().map_or(Ok(()), |low| low.fill_bytes(0))
        }
        match self {
            Sums::F32(sums, low) => both(sums, low),
            Sums::Bf16(sums, low) => both(sums, low),
        }
    }

    /// Of the sums and of what is beside them, or 0.
    pub(super) fn addresses(&self) -> (u64, u64) {
        match self {
            Sums::F32(sums, low) => (sums.address(), low.as_ref().map_or(0, Buffer::address)),
            Sums::Bf16(sums, low) => (sums.address(), low.as_ref().map_or(0, Buffer::address)),
        }
    }

    /// The sums as f32, and what rounding took from them, where that is another f32.
    pub(super) fn to_host(&self) -> Result<(Vec<f32>, Option<Vec<f32>>), Error> {
        Ok(match self {
            Sums::F32(sums, low) => (sums.to_vec()?, low.as_ref().map(Buffer::to_vec).transpose()?),
            Sums::Bf16(sums, None) => {
                (sums.to_vec()?.into_iter().map(bf16::to_f32).collect(), None)
            }
            Sums::Bf16(sums, Some(low)) => {
                let halves = sums.to_vec()?.into_iter().zip(low.to_vec()?);
                (halves.map(|(sum, low)| join(sum, low)).collect(), None)
            }
        })
    }

    /// From f32 and what rounding took from them.
    pub(super) fn put(&mut self, sums: &[f32], low: &[f32]) -> Result<(), Error> {
        match self {
            Sums::F32(to, Some(to_low)) => {
                to.write(0, sums)?;
                to_low.write(0, low)
            }
            Sums::F32(to, None) => to.write(0, &added(sums, low)),
            Sums::Bf16(to, None) => {
                let sums: Vec<bf16> = added(sums, low).into_iter().map(bf16::from_f32).collect();
                to.write(0, &sums)
            }
            Sums::Bf16(to, Some(to_low)) => {
                let (sums, low): (Vec<bf16>, Vec<u16>) =
                    added(sums, low).into_iter().map(split).unzip();
                to.write(0, &sums)?;
                to_low.write(0, &low)
            }
        }
    }
}

/// Sums with what rounding took from them, rounded once more.
pub(super) fn added(sums: &[f32], low: &[f32]) -> Vec<f32> {
    sums.iter().zip(low).map(|(sum, low)| sum + low).collect()
}

/// The bf16 that is the nearest to an f32 by its bits, and the lower half of these.
fn split(x: f32) -> (bf16, u16) {
    let bits = x.to_bits();
    let high = if x.is_finite() {
        (bits.wrapping_add(0x8000) >> 16) as u16
    } else {
        (bits >> 16) as u16 | u16::from(x.is_nan())
    };
    (bf16::from_bits(high), bits as u16)
}

/// The f32 of two halves.
fn join(high: bf16, low: u16) -> f32 {
    let high = u32::from(high.to_bits()) << 16;
    if high & 0x7f80_0000 == 0x7f80_0000 && low == 0 {
        return f32::from_bits(high);
    }
    f32::from_bits(high.wrapping_add_signed(i32::from(low as i16)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_make_the_same_number() {
        let mut bits = 1u32;
        for _ in 0..100_000 {
            bits = bits.wrapping_mul(0x9e37_79b1).wrapping_add(0x7f4a_7c15);
            let x = f32::from_bits(bits);
            let (high, low) = split(x);
            if x.is_nan() {
                assert!(high.is_nan() && join(high, low).is_nan());
                continue;
            }
            assert_eq!(join(high, low).to_bits(), bits, "{x:e}");
            if high.is_finite() {
                let nearest = (f64::from(bf16::from_f32(x).to_f32()) - f64::from(x)).abs();
                assert!((f64::from(high.to_f32()) - f64::from(x)).abs() <= nearest);
            }
        }
        for x in [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE, 1e-45] {
            let (high, low) = split(x);
            assert_eq!(join(high, low).to_bits(), x.to_bits());
        }
    }
}
