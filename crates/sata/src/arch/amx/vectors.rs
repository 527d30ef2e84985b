//! The vector side: two f32 numbers into a pair of bf16, and transposing.

use std::arch::x86_64::*;

/// Lanes of a register of f32.
pub(super) const LANES: usize = 16;

/// A factor that makes up, on average over mantissas, for cutting f32 off to bf16.
pub(super) const INFLATE: f32 = 1.0 + 1.0 / 362.0;

/// x ready for its lower half to be cut off: rounded to nearest, halfway cases away from zero (one
/// addition where going to even takes three operations), or as it is.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
fn ready<const ROUND: bool>(x: __m512) -> __m512i {
    let x = _mm512_castps_si512(x);
    if ROUND { _mm512_add_epi32(x, _mm512_set1_epi32(0x8000)) } else { x }
}

/// Sixteen pairs of bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) fn pair<const ROUND: bool>(low: __m512, high: __m512) -> __m512i {
    let upper = _mm512_set1_epi32(0xFFFF_0000_u32 as i32);
    // low | (high & upper)
    _mm512_ternarylogic_epi32::<0xF8>(first::<ROUND>(low), ready::<ROUND>(high), upper)
}

/// As [`pair`] with 0 for the second.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) fn first<const ROUND: bool>(low: __m512) -> __m512i {
    _mm512_srli_epi32::<16>(ready::<ROUND>(low))
}

/// Adds the second members to pairs that [`first`] left at `at`.
///
/// # Safety
/// Sixteen elements at `at` are there.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) unsafe fn store_second<const ROUND: bool>(at: *mut i32, high: __m512) {
    // SAFETY: forwarded.
    unsafe { _mm512_mask_storeu_epi16(at.cast(), 0xAAAA_AAAA, ready::<ROUND>(high)) };
}

/// x rounded to bf16, halfway cases away from zero.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) fn rounded(x: __m512) -> __m512 {
    let bits = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xFFFF_0000_u32 as i32)))
}

/// Rows become columns.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) fn transpose(r: [__m512i; 16]) -> [__m512i; 16] {
    let mut a = r;
    // Pairs of rows, then fours: 4 × 4 blocks are transposed within each 128-bit part.
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    let mut b = a;
    for i in 0..4 {
        b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    // b[4i + j] holds, in part p, column 4p + j of rows 4i … 4i + 3.
    let mut out = b;
    for j in 0..4 {
        let (even, odd) = (
            _mm512_shuffle_i32x4::<0b10_00_10_00>(b[j], b[4 + j]),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(b[j], b[4 + j]),
        );
        let (even_below, odd_below) = (
            _mm512_shuffle_i32x4::<0b10_00_10_00>(b[8 + j], b[12 + j]),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(b[8 + j], b[12 + j]),
        );
        out[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(even, even_below);
        out[8 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(even, even_below);
        out[4 + j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(odd, odd_below);
        out[12 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(odd, odd_below);
    }
    out
}

/// A block of `[16][stride]` numbers.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) unsafe fn load_block(from: *const f32, stride: usize) -> [__m512i; 16] {
    let mut block = [_mm512_setzero_si512(); 16];
    for (i, row) in block.iter_mut().enumerate() {
        // SAFETY: forwarded.
        *row = unsafe { _mm512_loadu_si512(from.add(i * stride).cast()) };
    }
    block
}
