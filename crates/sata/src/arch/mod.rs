//! Instruction sets: what this machine has, and the kernels' entry points for each.
//!
//! The kernels are written once, in [`kernels`]; here each is given `#[target_feature]` per
//! instruction set, and a table of function pointers is chosen once per plan.

#[cfg(target_arch = "x86_64")]
mod amx;
mod buffer;
pub(crate) mod kernels;
mod portable;
pub(crate) mod vector;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::fmt;
use std::str::FromStr;

pub(crate) use buffer::Buffer;
pub(crate) use kernels::{
    Absorb, By, CacheOne, Coefficients, DECODE_SCRATCH, Direct, Fading, Far, FromSums, How,
    Moments, PANEL, Packed, Pairs, PairsWork, QUERIES, Read, ReadBack, ReadBackWork, ReadOne,
    Scratch, Sight, Stretch, TOKENS, Tokens, Values, WeighOne, Weighed, stride,
};

use crate::Error;

/// An instruction set that the kernels exist for, from the least to the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// What every machine of the architecture has (SSE2 on x86-64, NEON on aarch64).
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 (F, VL, BW, DQ).
    Avx512,
    /// AVX-512 with AMX tiles for bf16 inputs; other inputs as [`Level::Avx512`].
    Amx,
}

impl Level {
    /// Every level, from the least to the most.
    pub const ALL: [Level; 4] = [Level::Portable, Level::Avx2, Level::Avx512, Level::Amx];

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return match self {
            Level::Portable => true,
            Level::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Level::Avx512 => {
                Level::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
            }
            Level::Amx => amx::is_available(),
        };
        #[cfg(not(target_arch = "x86_64"))]
        return self == Level::Portable;
    }

    /// The levels this machine has.
    pub fn available() -> Vec<Level> {
        Level::ALL.into_iter().filter(|level| level.is_available()).collect()
    }

    /// The level named by the environment variable `SATA_SIMD`, or the most that there is.
    ///
    /// # Errors
    /// [`Error::Level`] when the variable names one that is unknown or not on this machine.
    pub fn detect() -> Result<Level, Error> {
        match std::env::var("SATA_SIMD") {
            Ok(name) => name.parse(),
            Err(std::env::VarError::NotUnicode(name)) => Err(unavailable(&name.to_string_lossy())),
            Err(std::env::VarError::NotPresent) => {
                Ok(Level::available().pop().unwrap_or(Level::Portable))
            }
        }
    }
}

fn unavailable(asked: &str) -> Error {
    let available: Vec<String> = Level::available().iter().map(Level::to_string).collect();
    Error::Level { asked: asked.into(), available: available.join(", ") }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Amx => "amx",
        })
    }
}

impl FromStr for Level {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self, Error> {
        Level::ALL
            .into_iter()
            .find(|level| level.to_string() == name && level.is_available())
            .ok_or_else(|| unavailable(name))
    }
}

/// Asks for the cache line at `p`, which may lie anywhere.
#[inline(always)]
pub(crate) fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch touches nothing; SSE is part of x86-64.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// (sums, z, multiplicities, coefficient, d_value, out, out_z).
type Pack<T> = unsafe fn(&[T], &[T], &[T], T, usize, &mut [T], &mut [T]);

/// (sums, z, len, d_value, factor of what was there, far).
type Fold<T> = unsafe fn(&[T], &[T], usize, usize, T, &mut Far<'_, T>);

/// The kernels of one level and element type.
///
/// Every function is unsafe for one reason: the machine must have the level's instructions. A
/// table is only handed out by [`kernels_f32`] and [`kernels_f64`], for levels that are available.
#[doc(hidden)]
#[derive(Debug)]
pub struct Kernels<T> {
    /// Its name, as a plan prints it.
    pub(crate) name: &'static str,
    /// Lanes of the vectors, to which d_value is padded.
    pub(crate) lanes: usize,
    /// Tiles to pack and read at a time.
    pub(crate) tiles: usize,
    /// How much faster it is than the vector kernels at features and at pairs, about.
    pub(crate) speed: [f64; 2],
    /// Relative rounding error of sums over features that it makes, about.
    pub(crate) rounding: f64,
    /// Elements that `pack` writes for one tile, given d_value padded.
    pub(crate) packed_len: fn(padded: usize) -> usize,
    /// Elements that `prepare` writes for one panel, given d_value padded; 0 when it is not needed.
    pub(crate) prepared_len: fn(padded: usize) -> usize,
    pub(crate) read: unsafe fn(&mut Read<'_, T>),
    pub(crate) absorb: unsafe fn(&mut Absorb<'_, T>),
    pub(crate) pack: Pack<T>,
    /// (rows `[tokens][padded]`, tokens, padded, out).
    pub(crate) prepare: unsafe fn(&[T], usize, usize, &mut [T]),
    pub(crate) fold: Fold<T>,
    pub(crate) polynomial: unsafe fn(&mut Direct<'_, T>),
    pub(crate) exponential: unsafe fn(&mut Direct<'_, T>),
    pub(crate) moments: unsafe fn(&mut Moments<'_, T>),
    pub(crate) read_one: unsafe fn(&mut ReadOne<'_, T>),
    /// (what, d_key).
    pub(crate) weigh_one: unsafe fn(&mut WeighOne<'_, T>, usize),
    pub(crate) cache_one: unsafe fn(&mut CacheOne<'_, T>),
    pub(crate) pairs: unsafe fn(&mut Pairs<'_, T>),
    pub(crate) read_back: unsafe fn(&mut ReadBack<'_, T>),
}

/// A module with one entry point per kernel and their table.
macro_rules! entry_points {
    ($(#[$attribute:meta])* $module:ident, $elem:ty, $vector:ty, $wide:ty $(, $features:literal)?) => {
        $(#[$attribute])*
        mod $module {
            use super::kernels::vector_kernels;
            use super::vector::Vector;
            use super::*;

            /// What fits d_value.
            type V = $vector;
            /// What features are made in.
            type G = $wide;

            $(#[target_feature(enable = $features)])?
            unsafe fn read(a: &mut Read<'_, $elem>) {
                // SAFETY: the caller has made sure of the instructions.
                unsafe { vector_kernels::read::<V, G>(a) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn absorb(a: &mut Absorb<'_, $elem>) {
                // SAFETY: the caller has made sure of the instructions.
                unsafe { vector_kernels::absorb::<V, G>(a) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn pack(s: &[$elem], z: &[$elem], m: &[$elem], c: $elem, d: usize, o: &mut [$elem], oz: &mut [$elem]) {
                // SAFETY: the caller has made sure of the instructions.
                unsafe { vector_kernels::pack::<V>(s, z, m, c, d, o, oz) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn fold(s: &[$elem], z: &[$elem], len: usize, d: usize, by: $elem, far: &mut Far<'_, $elem>) {
                // SAFETY: the caller has made sure of the instructions.
                unsafe { vector_kernels::fold::<V, G>(s, z, len, d, by, far) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn polynomial(a: &mut Direct<'_, $elem>) {
                // SAFETY: the caller has made sure of the instructions.
                unsafe { vector_kernels::polynomial::<V, G>(a) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn exponential(a: &mut Direct<'_, $elem>) {
                // SAFETY: the caller has made sure of the instructions.
                unsafe { vector_kernels::exponential::<V, G>(a) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn moments(a: &mut Moments<'_, $elem>) {
                // SAFETY: the caller has made sure of the instructions.
                unsafe { vector_kernels::moments::<G>(a) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn read_one(a: &mut ReadOne<'_, $elem>) {
                // SAFETY: the caller has made sure of the instructions.
                unsafe { vector_kernels::read_one::<V>(a) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn cache_one(a: &mut CacheOne<'_, $elem>) {
                // SAFETY: the caller has made sure of the instructions.
                unsafe { vector_kernels::cache_one::<V>(a) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn pairs(a: &mut Pairs<'_, $elem>) {
                // SAFETY: the caller has made sure of the instructions.
                unsafe { vector_kernels::pairs::<V, G>(a) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn read_back(a: &mut ReadBack<'_, $elem>) {
                // SAFETY: the caller has made sure of the instructions.
                unsafe { vector_kernels::read_back::<G>(a) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn weigh_one(a: &mut WeighOne<'_, $elem>, d_key: usize) {
                // SAFETY: the caller has made sure of the instructions.
                unsafe { vector_kernels::weigh_one::<V>(a, d_key) }
            }

            pub(super) static KERNELS: Kernels<$elem> = Kernels {
                name: stringify!($module),
                lanes: V::LANES,
                tiles: 1,
                speed: [1.0, 1.0],
                rounding: <$elem>::EPSILON as f64,
                packed_len: |padded| crate::basis::TILE * padded,
                prepared_len: |_| 0,
                read,
                absorb,
                pack,
                prepare: nothing_to_prepare,
                fold,
                polynomial,
                exponential,
                moments,
                read_one,
                weigh_one,
                cache_one,
                pairs,
                read_back,
            };
        }
    };
}

/// The values of the vector kernels are used as they are.
unsafe fn nothing_to_prepare<T>(_rows: &[T], _tokens: usize, _padded: usize, _out: &mut [T]) {}

entry_points!(portable_f32, f32, super::portable::F32x8, super::portable::F32x8);
entry_points!(portable_f64, f64, super::portable::F64x4, super::portable::F64x4);
entry_points!(
    #[cfg(target_arch = "x86_64")]
    avx2_f32,
    f32,
    super::x86::F32x8<16>,
    super::x86::F32x8<16>,
    "avx2,fma"
);
entry_points!(
    #[cfg(target_arch = "x86_64")]
    avx2_f64,
    f64,
    super::x86::F64x4<16>,
    super::x86::F64x4<16>,
    "avx2,fma"
);
entry_points!(
    #[cfg(target_arch = "x86_64")]
    avx512_f32,
    f32,
    super::x86::F32x16,
    super::x86::F32x16,
    "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"
);
entry_points!(
    #[cfg(target_arch = "x86_64")]
    avx512_f32_half,
    f32,
    super::x86::F32x8<32>,
    super::x86::F32x16,
    "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"
);
entry_points!(
    #[cfg(target_arch = "x86_64")]
    avx512_f64,
    f64,
    super::x86::F64x8,
    super::x86::F64x8,
    "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"
);
entry_points!(
    #[cfg(target_arch = "x86_64")]
    avx512_f64_half,
    f64,
    super::x86::F64x4<32>,
    super::x86::F64x8,
    "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"
);

/// Whether half-width vectors waste fewer lanes on rows of `d_value`.
#[cfg(target_arch = "x86_64")]
fn half_is_tighter(d_value: usize, lanes: usize) -> bool {
    d_value.next_multiple_of(lanes / 2) < d_value.next_multiple_of(lanes)
}

/// The f32 kernels of an available level for values of `d_value`.
pub(crate) fn kernels_f32(level: Level, d_value: usize, bf16: bool) -> &'static Kernels<f32> {
    assert!(level.is_available(), "{level} is not available");
    #[cfg(target_arch = "x86_64")]
    match level {
        Level::Amx if bf16 && amx::suits(d_value) => &amx::KERNELS,
        Level::Portable => &portable_f32::KERNELS,
        Level::Avx2 => &avx2_f32::KERNELS,
        Level::Avx512 | Level::Amx if half_is_tighter(d_value, 16) => &avx512_f32_half::KERNELS,
        Level::Avx512 | Level::Amx => &avx512_f32::KERNELS,
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (d_value, bf16);
        &portable_f32::KERNELS
    }
}

/// The f64 kernels of an available level for values of `d_value`.
pub(crate) fn kernels_f64(level: Level, d_value: usize) -> &'static Kernels<f64> {
    assert!(level.is_available(), "{level} is not available");
    #[cfg(target_arch = "x86_64")]
    match level {
        Level::Portable => &portable_f64::KERNELS,
        Level::Avx2 => &avx2_f64::KERNELS,
        Level::Avx512 | Level::Amx if half_is_tighter(d_value, 8) => &avx512_f64_half::KERNELS,
        Level::Avx512 | Level::Amx => &avx512_f64::KERNELS,
    }
    #[cfg(not(target_arch = "x86_64"))]
    &portable_f64::KERNELS
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
