//! AMX: features made on the vector units in f32, rounded once to bf16, multiplied by the tile
//! unit with sums in f32.
//!
//! The logic is the same for every implementor of [`tiles::Tiles`]: the machine's own, by `asm!`,
//! and an emulation that lets it be tested where there is AVX-512 but no AMX.

mod absorb;
mod direct;
mod features;
mod read;
mod tiles;
mod vectors;

use super::avx512_f32;
use super::kernels::{Absorb, Direct, Read};
use super::{Kernels, Level};
use tiles::Amx;
use vectors::LANES;

/// Whether this machine has what the kernels need.
pub(super) fn is_available() -> bool {
    Level::Avx512.is_available() && tiles::available()
}

/// Whether values are wide enough for tiles to pay.
pub(super) fn suits(d_value: usize) -> bool {
    d_value >= 8 && read::fits(d_value.next_multiple_of(LANES))
}

#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
unsafe fn read(a: &mut Read<'_, f32>) {
    // SAFETY: the caller has made sure of the instructions.
    unsafe { read::read(&mut Amx, a) }
}

#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
unsafe fn absorb(a: &mut Absorb<'_, f32>) {
    // SAFETY: the caller has made sure of the instructions.
    unsafe { absorb::absorb(&mut Amx, a) }
}

#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
unsafe fn polynomial(a: &mut Direct<'_, f32>) {
    // SAFETY: the caller has made sure of the instructions.
    unsafe {
        if direct::fits(a) {
            direct::polynomial(&mut Amx, a);
        } else {
            (avx512_f32::KERNELS.polynomial)(a);
        }
    }
}

/// What takes no tiles is done as with AVX-512.
pub(super) static KERNELS: Kernels<f32> = Kernels {
    name: "amx_bf16",
    lanes: LANES,
    // Their packed sums stay in the second level of cache.
    tiles: 16,
    speed: [4.0, 3.0],
    // Each feature has an error of up to 2⁻⁹; most of it averages out.
    rounding: 1.0 / 16384.0,
    packed_len: read::packed_len,
    prepared_len: absorb::prepared_len,
    read,
    absorb,
    pack: read::pack,
    prepare: absorb::prepare,
    fold: avx512_f32::KERNELS.fold,
    polynomial,
    exponential: avx512_f32::KERNELS.exponential,
    moments: avx512_f32::KERNELS.moments,
    read_one: avx512_f32::KERNELS.read_one,
    weigh_one: avx512_f32::KERNELS.weigh_one,
    cache_one: avx512_f32::KERNELS.cache_one,
    pairs: avx512_f32::KERNELS.pairs,
    read_back: avx512_f32::KERNELS.read_back,
};

#[cfg(test)]
mod tests;
