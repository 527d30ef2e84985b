//! AVX2 and AVX-512 vectors.

use core::arch::x86_64::*;

use super::vector::Vector;

/// Eight f32 lanes; `R` registers: 16 with AVX2, 32 with AVX-512VL.
#[derive(Clone, Copy)]
pub(crate) struct F32x8<const R: usize>(__m256);

/// Four f64 lanes; `R` as for [`F32x8`].
#[derive(Clone, Copy)]
pub(crate) struct F64x4<const R: usize>(__m256d);

/// Sixteen f32 lanes.
#[derive(Clone, Copy)]
pub(crate) struct F32x16(__m512);

/// Eight f64 lanes.
#[derive(Clone, Copy)]
pub(crate) struct F64x8(__m512d);

// SAFETY (all unsafe blocks below): the trait's contract — the caller runs on a machine with the
// instructions, and pointers cover LANES elements.

macro_rules! common {
    ($elem:ty, $lanes:literal, $set1:ident, $load:ident, $store:ident, $add:ident, $sub:ident,
     $mul:ident, $fma:ident, $max:ident) => {
        type Elem = $elem;
        const LANES: usize = $lanes;

        #[inline(always)]
        unsafe fn splat(x: $elem) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { $set1(x) })
        }
        #[inline(always)]
        unsafe fn load(p: *const $elem) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { $load(p) })
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut $elem) {
            // SAFETY: the trait's contract.
            unsafe { $store(p, self.0) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { $add(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { $sub(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { $mul(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { $fma(self.0, b.0, c.0) })
        }
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            // The instruction gives its second operand when either is NaN: put `self` there.
            // SAFETY: the trait's contract.
            Self(unsafe { $max(other.0, self.0) })
        }
    };
}

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

impl<const R: usize> Vector for F32x8<R> {
    const REGISTERS: usize = R;
    common!(
        f32,
        8,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_add_ps,
        _mm256_sub_ps,
        _mm256_mul_ps,
        _mm256_fmadd_ps,
        _mm256_max_ps
    );
    #[inline(always)]
    unsafe fn unless_below(self, x: Self, floor: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let keep = _mm256_cmp_ps::<_CMP_NLT_UQ>(x.0, floor.0);
            Self(_mm256_and_ps(self.0, keep))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the trait's contract.
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm256_round_ps::<NEAREST>(self.0) })
    }
    #[inline(always)]
    unsafe fn scale2(self, n: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            // Two steps of half the exponent each, so that neither leaves the normal range.
            let n = _mm256_cvtps_epi32(n.0);
            let half = _mm256_srai_epi32::<1>(n);
            let rest = _mm256_sub_epi32(n, half);
            let bias = _mm256_set1_epi32(127);
            let a = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias)));
            let b = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(rest, bias)));
            Self(_mm256_mul_ps(_mm256_mul_ps(self.0, a), b))
        }
    }
}

impl<const R: usize> Vector for F64x4<R> {
    const REGISTERS: usize = R;
    common!(
        f64,
        4,
        _mm256_set1_pd,
        _mm256_loadu_pd,
        _mm256_storeu_pd,
        _mm256_add_pd,
        _mm256_sub_pd,
        _mm256_mul_pd,
        _mm256_fmadd_pd,
        _mm256_max_pd
    );
    #[inline(always)]
    unsafe fn unless_below(self, x: Self, floor: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let keep = _mm256_cmp_pd::<_CMP_NLT_UQ>(x.0, floor.0);
            Self(_mm256_and_pd(self.0, keep))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f64 {
        // SAFETY: the trait's contract.
        unsafe {
            let x = _mm_add_pd(_mm256_castpd256_pd128(self.0), _mm256_extractf128_pd::<1>(self.0));
            _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)))
        }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm256_round_pd::<NEAREST>(self.0) })
    }
    #[inline(always)]
    unsafe fn scale2(self, n: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let n = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n.0));
            // An arithmetic shift of 64-bit lanes by way of a bias that keeps them positive.
            let half = _mm256_sub_epi64(
                _mm256_srli_epi64::<1>(_mm256_add_epi64(n, _mm256_set1_epi64x(4096))),
                _mm256_set1_epi64x(2048),
            );
            let rest = _mm256_sub_epi64(n, half);
            let bias = _mm256_set1_epi64x(1023);
            let a = _mm256_castsi256_pd(_mm256_slli_epi64::<52>(_mm256_add_epi64(half, bias)));
            let b = _mm256_castsi256_pd(_mm256_slli_epi64::<52>(_mm256_add_epi64(rest, bias)));
            Self(_mm256_mul_pd(_mm256_mul_pd(self.0, a), b))
        }
    }
}

impl Vector for F32x16 {
    const REGISTERS: usize = 32;
    common!(
        f32,
        16,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        _mm512_sub_ps,
        _mm512_mul_ps,
        _mm512_fmadd_ps,
        _mm512_max_ps
    );
    #[inline(always)]
    unsafe fn unless_below(self, x: Self, floor: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, floor.0);
            Self(_mm512_maskz_mov_ps(keep, self.0))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_roundscale_ps::<NEAREST>(self.0) })
    }
    #[inline(always)]
    unsafe fn scale2(self, n: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_scalef_ps(self.0, n.0) })
    }
}

impl Vector for F64x8 {
    const REGISTERS: usize = 32;
    common!(
        f64,
        8,
        _mm512_set1_pd,
        _mm512_loadu_pd,
        _mm512_storeu_pd,
        _mm512_add_pd,
        _mm512_sub_pd,
        _mm512_mul_pd,
        _mm512_fmadd_pd,
        _mm512_max_pd
    );
    #[inline(always)]
    unsafe fn unless_below(self, x: Self, floor: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let keep = _mm512_cmp_pd_mask::<_CMP_NLT_UQ>(x.0, floor.0);
            Self(_mm512_maskz_mov_pd(keep, self.0))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f64 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_reduce_add_pd(self.0) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_roundscale_pd::<NEAREST>(self.0) })
    }
    #[inline(always)]
    unsafe fn scale2(self, n: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_scalef_pd(self.0, n.0) })
    }
}
