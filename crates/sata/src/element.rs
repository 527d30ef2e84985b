//! The number types: what tensors hold, and what arithmetic is done in.

use half::{bf16, f16};

use crate::arch::Kernels;
use crate::arch::Level;
use crate::basis::Basis;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

/// What a tensor holds: `f32`, `f64`, or `bf16` and `f16` of the crate `half`.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// The type that arithmetic on it is done in: `f64` for `f64`, `f32` for the others.
    type Compute: Real;
    /// Its name, as safetensors has it.
    const NAME: &'static str;
    /// Whether matrix units that take bf16 may be used on it.
    #[doc(hidden)]
    const BF16: bool;
    /// The same number, wider or equal.
    fn to_compute(self) -> Self::Compute;
    /// The nearest number of this type.
    fn from_compute(x: Self::Compute) -> Self;
    /// Whether it is neither NaN nor infinite.
    fn finite(self) -> bool;
}

/// What arithmetic is done in: `f32` or `f64`.
pub trait Real:
    Element<Compute = Self>
    + std::ops::Add<Output = Self>
    + std::ops::AddAssign
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + PartialOrd
    + Default
    + std::fmt::Debug
{
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// The lowest finite number.
    const LOWEST: Self;
    /// Whether sums of this type over many blocks carry a compensation.
    const COMPENSATED: bool;
    /// The nearest number of this type.
    fn from_f64(x: f64) -> Self;
    /// The same number in f64.
    fn to_f64(self) -> f64;
    /// What rounding took from self · by to give `product`.
    #[doc(hidden)]
    fn lost(self, by: Self, product: Self) -> Self;
    /// Its bits, in the low end.
    #[doc(hidden)]
    fn bits(self) -> u64;
    /// The number of these bits; the high end is ignored where it is narrower.
    #[doc(hidden)]
    fn of_bits(bits: u64) -> Self;
    #[doc(hidden)]
    fn multiplicities(basis: &Basis) -> &[Self];
    #[doc(hidden)]
    fn kernels(level: Level, d_value: usize, bf16: bool) -> &'static Kernels<Self>;
}

impl Element for f32 {
    type Compute = f32;
    const NAME: &'static str = "F32";
    const BF16: bool = false;
    fn to_compute(self) -> f32 {
        self
    }
    fn from_compute(x: f32) -> Self {
        x
    }
    fn finite(self) -> bool {
        self.is_finite()
    }
}

impl Element for f64 {
    type Compute = f64;
    const NAME: &'static str = "F64";
    const BF16: bool = false;
    fn to_compute(self) -> f64 {
        self
    }
    fn from_compute(x: f64) -> Self {
        x
    }
    fn finite(self) -> bool {
        self.is_finite()
    }
}

impl Element for bf16 {
    type Compute = f32;
    const NAME: &'static str = "BF16";
    const BF16: bool = true;
    fn to_compute(self) -> f32 {
        self.to_f32()
    }
    fn from_compute(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn finite(self) -> bool {
        self.is_finite()
    }
}

impl Element for f16 {
    type Compute = f32;
    const NAME: &'static str = "F16";
    const BF16: bool = false;
    fn to_compute(self) -> f32 {
        self.to_f32()
    }
    fn from_compute(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn finite(self) -> bool {
        self.is_finite()
    }
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const LOWEST: Self = f32::MIN;
    const COMPENSATED: bool = true;
    fn from_f64(x: f64) -> Self {
        x as f32
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn lost(self, by: f32, product: f32) -> f32 {
        // The product of two f32 is exact in f64.
        (f64::from(self) * f64::from(by) - f64::from(product)) as f32
    }
    fn bits(self) -> u64 {
        u64::from(self.to_bits())
    }
    fn of_bits(bits: u64) -> Self {
        f32::from_bits(bits as u32)
    }
    fn multiplicities(basis: &Basis) -> &[f32] {
        basis.multiplicities_f32()
    }
    fn kernels(level: Level, d_value: usize, bf16: bool) -> &'static Kernels<f32> {
        crate::arch::kernels_f32(level, d_value, bf16)
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const LOWEST: Self = f64::MIN;
    const COMPENSATED: bool = false;
    fn from_f64(x: f64) -> Self {
        x
    }
    fn to_f64(self) -> f64 {
        self
    }
    fn lost(self, by: f64, product: f64) -> f64 {
        self.mul_add(by, -product)
    }
    fn bits(self) -> u64 {
        self.to_bits()
    }
    fn of_bits(bits: u64) -> Self {
        f64::from_bits(bits)
    }
    fn multiplicities(basis: &Basis) -> &[f64] {
        basis.multiplicities()
    }
    fn kernels(level: Level, d_value: usize, _bf16: bool) -> &'static Kernels<f64> {
        crate::arch::kernels_f64(level, d_value)
    }
}
