//! Vectors by the `wide` crate: SSE2 on any x86-64, NEON on aarch64, plain loops elsewhere.

use super::vector::Vector;

/// Eight f32 lanes.
#[derive(Clone, Copy)]
pub(crate) struct F32x8(wide::f32x8);

/// Four f64 lanes.
#[derive(Clone, Copy)]
pub(crate) struct F64x4(wide::f64x4);

macro_rules! portable {
    ($name:ident, $wide:ty, $elem:ty, $lanes:literal) => {
        impl Vector for $name {
            type Elem = $elem;
            const LANES: usize = $lanes;
            // Each of these is two 128-bit registers.
            const REGISTERS: usize = 8;

            #[inline(always)]
            unsafe fn splat(x: $elem) -> Self {
                $name(<$wide>::splat(x))
            }
            #[inline(always)]
            unsafe fn load(p: *const $elem) -> Self {
                // SAFETY: the caller gives LANES readable elements.
                $name(<$wide>::from(unsafe { p.cast::<[$elem; $lanes]>().read_unaligned() }))
            }
            #[inline(always)]
            unsafe fn store(self, p: *mut $elem) {
                // SAFETY: the caller gives LANES writable elements.
                unsafe { p.cast::<[$elem; $lanes]>().write_unaligned(self.0.to_array()) }
            }
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                $name(self.0 + other.0)
            }
            #[inline(always)]
            unsafe fn sub(self, other: Self) -> Self {
                $name(self.0 - other.0)
            }
            #[inline(always)]
            unsafe fn mul(self, other: Self) -> Self {
                $name(self.0 * other.0)
            }
            #[inline(always)]
            unsafe fn mul_add(self, b: Self, c: Self) -> Self {
                $name(self.0 * b.0 + c.0)
            }
            #[inline(always)]
            unsafe fn max(self, other: Self) -> Self {
                // `max` of NaN and a number may give the number; keep the NaN.
                let mut a = self.0.to_array();
                for (a, b) in a.iter_mut().zip(other.0.to_array()) {
                    if *a < b {
                        *a = b;
                    }
                }
                $name(<$wide>::from(a))
            }
            #[inline(always)]
            unsafe fn unless_below(self, x: Self, floor: Self) -> Self {
                let mut a = self.0.to_array();
                for (a, (x, floor)) in
                    a.iter_mut().zip(x.0.to_array().iter().zip(floor.0.to_array()))
                {
                    if *x < floor {
                        *a = 0.0;
                    }
                }
                $name(<$wide>::from(a))
            }
            #[inline(always)]
            unsafe fn sum(self) -> $elem {
                self.0.reduce_add()
            }
            #[inline(always)]
            unsafe fn round(self) -> Self {
                $name(<$wide>::from(self.0.to_array().map(|x| x.round_ties_even())))
            }
            #[inline(always)]
            unsafe fn scale2(self, n: Self) -> Self {
                let mut a = self.0.to_array();
                for (a, n) in a.iter_mut().zip(n.0.to_array()) {
                    *a *= n.exp2();
                }
                $name(<$wide>::from(a))
            }
        }
    };
}

portable!(F32x8, wide::f32x8, f32, 8);
portable!(F64x4, wide::f64x4, f64, 4);
