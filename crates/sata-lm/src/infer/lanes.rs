//! Vectors of f32, filled from weights of two or four bytes.

use half::{bf16, f16};

/// N numbers in one register.
///
/// Every function is unsafe for two reasons alone: the machine must have the instructions, and
/// pointers must have N elements.
#[allow(clippy::missing_safety_doc)]
pub(super) trait Lanes: Copy {
    const N: usize;
    unsafe fn splat(x: f32) -> Self;
    /// self · b + c.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    unsafe fn from_f16(p: *const f16) -> Self;
    unsafe fn from_bf16(p: *const bf16) -> Self;
    unsafe fn from_f32(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
}

/// A type that weights are kept in.
#[allow(clippy::missing_safety_doc)]
pub(super) trait Weight: Copy {
    unsafe fn load<V: Lanes>(p: *const Self) -> V;
    fn to_f32(self) -> f32;
}

impl Weight for f16 {
    #[inline(always)]
    unsafe fn load<V: Lanes>(p: *const Self) -> V {
        // SAFETY: forwarded.
        unsafe { V::from_f16(p) }
    }
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl Weight for bf16 {
    #[inline(always)]
    unsafe fn load<V: Lanes>(p: *const Self) -> V {
        // SAFETY: forwarded.
        unsafe { V::from_bf16(p) }
    }
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

impl Weight for f32 {
    #[inline(always)]
    unsafe fn load<V: Lanes>(p: *const Self) -> V {
        // SAFETY: forwarded.
        unsafe { V::from_f32(p) }
    }
    fn to_f32(self) -> f32 {
        self
    }
}

/// Four numbers, by the compiler.
#[derive(Clone, Copy)]
pub(super) struct Four([f32; 4]);

#[allow(clippy::undocumented_unsafe_blocks, reason = "plain reads, as the trait says")]
impl Lanes for Four {
    const N: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Four([x; 4])
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        Four(std::array::from_fn(|i| self.0[i] * b.0[i] + c.0[i]))
    }
    #[inline(always)]
    unsafe fn from_f16(p: *const f16) -> Self {
        Four(std::array::from_fn(|i| unsafe { (*p.add(i)).to_f32_const() }))
    }
    #[inline(always)]
    unsafe fn from_bf16(p: *const bf16) -> Self {
        Four(std::array::from_fn(|i| {
            f32::from_bits(u32::from(unsafe { (*p.add(i)).to_bits() }) << 16)
        }))
    }
    #[inline(always)]
    unsafe fn from_f32(p: *const f32) -> Self {
        Four(unsafe { p.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { p.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Eight, Sixteen};

#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks, reason = "intrinsics, as the trait says")]
mod x86 {
    use core::arch::x86_64::*;

    use super::{Lanes, bf16, f16};

    /// AVX2, FMA and F16C.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Eight(__m256);

    impl Lanes for Eight {
        const N: usize = 8;
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            Eight(unsafe { _mm256_set1_ps(x) })
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            Eight(unsafe { _mm256_fmadd_ps(self.0, b.0, c.0) })
        }
        #[inline(always)]
        unsafe fn from_f16(p: *const f16) -> Self {
            Eight(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) })
        }
        #[inline(always)]
        unsafe fn from_bf16(p: *const bf16) -> Self {
            let wide = unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())) };
            Eight(unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)) })
        }
        #[inline(always)]
        unsafe fn from_f32(p: *const f32) -> Self {
            Eight(unsafe { _mm256_loadu_ps(p) })
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe { _mm256_storeu_ps(p, self.0) }
        }
    }

    /// AVX-512 F.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Sixteen(__m512);

    impl Lanes for Sixteen {
        const N: usize = 16;
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            Sixteen(unsafe { _mm512_set1_ps(x) })
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            Sixteen(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
        }
        #[inline(always)]
        unsafe fn from_f16(p: *const f16) -> Self {
            Sixteen(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
        }
        #[inline(always)]
        unsafe fn from_bf16(p: *const bf16) -> Self {
            let wide = unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())) };
            Sixteen(unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)) })
        }
        #[inline(always)]
        unsafe fn from_f32(p: *const f32) -> Self {
            Sixteen(unsafe { _mm512_loadu_ps(p) })
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe { _mm512_storeu_ps(p, self.0) }
        }
    }
}
