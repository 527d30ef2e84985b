//! The two types that tensors may have, with what the row kernels need of them.

use candle_core::WithDType;
use sata::Real;

/// `f32` or `f64`.
pub(crate) trait Float: WithDType + Real {
    /// e^x for x ≤ 0, to a few units in the last place; NaN stays NaN. Vectorises.
    fn exp_of_negative(self) -> Self;
    /// ln x.
    fn log(self) -> Self;
    /// ln(1 + x).
    fn log_1p(self) -> Self;
    /// √x.
    fn root(self) -> Self;
    /// −|x|.
    fn minus_abs(self) -> Self;
    /// The nearest number of this type.
    fn of(x: f64) -> Self {
        <Self as Real>::from_f64(x)
    }
    /// 1 / (1 + e^−x).
    #[inline(always)]
    fn sigmoid(self) -> Self {
        let e = self.minus_abs().exp_of_negative();
        let tail = if self >= Self::ZERO { Self::ONE } else { e };
        tail / (Self::ONE + e)
    }
}

impl Float for f32 {
    #[inline(always)]
    fn exp_of_negative(self) -> f32 {
        // Below this the result is subnormal.
        const LEAST: f32 = -87.33;
        // Adding and taking away this rounds to a whole number, which is then in the low bits.
        const ROUND: f32 = 12_582_912.0;
        // Comparisons as they stand leave NaN alone.
        let x = if self < LEAST { LEAST } else { self };
        let rounded = x * std::f32::consts::LOG2_E + ROUND;
        let n = rounded - ROUND;
        // ln 2 in two parts: the first times n is exact.
        let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
        let p = 1.987_569_1e-4;
        let p = p * r + 1.398_199_9e-3;
        let p = p * r + 8.333_452e-3;
        let p = p * r + 4.166_579_6e-2;
        let p = p * r + 1.666_666_5e-1;
        let p = p * r + 0.5;
        let e = p * r * r + r + 1.0;
        let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
        if self < LEAST { 0.0 } else { e * power }
    }
    fn log(self) -> f32 {
        self.ln()
    }
    fn log_1p(self) -> f32 {
        self.ln_1p()
    }
    #[inline(always)]
    fn root(self) -> f32 {
        self.sqrt()
    }
    #[inline(always)]
    fn minus_abs(self) -> f32 {
        -self.abs()
    }
}

impl Float for f64 {
    #[inline(always)]
    fn exp_of_negative(self) -> f64 {
        self.exp()
    }
    fn log(self) -> f64 {
        self.ln()
    }
    fn log_1p(self) -> f64 {
        self.ln_1p()
    }
    #[inline(always)]
    fn root(self) -> f64 {
        self.sqrt()
    }
    #[inline(always)]
    fn minus_abs(self) -> f64 {
        -self.abs()
    }
}

/// Σ f(i-th elements) over two rows, in sixteen sums side by side so that it vectorises.
#[inline(always)]
pub(crate) fn sum2<T: Float>(a: &[T], b: &[T], f: impl Fn(T, T) -> T) -> T {
    let mut lanes = [T::ZERO; 16];
    let (a_blocks, b_blocks) = (a.chunks_exact(16), b.chunks_exact(16));
    let mut sum = T::ZERO;
    for (&x, &y) in a_blocks.remainder().iter().zip(b_blocks.remainder()) {
        sum += f(x, y);
    }
    for (a, b) in a_blocks.zip(b_blocks) {
        for i in 0..16 {
            lanes[i] += f(a[i], b[i]);
        }
    }
    for lane in lanes {
        sum += lane;
    }
    sum
}

/// The largest element; NaN counts for nothing here, and an empty row gives the lowest number.
#[inline(always)]
pub(crate) fn largest<T: Float>(row: &[T]) -> T {
    let more = |a: T, b: T| if b > a { b } else { a };
    let mut lanes = [T::LOWEST; 16];
    let blocks = row.chunks_exact(16);
    let mut most = T::LOWEST;
    for &x in blocks.remainder() {
        most = more(most, x);
    }
    for block in blocks {
        for i in 0..16 {
            lanes[i] = more(lanes[i], block[i]);
        }
    }
    lanes.into_iter().fold(most, more)
}

/// Compiles a function once for AVX-512, once for AVX2 and once for any machine, and calls the
/// best that there is.
macro_rules! vectorised {
    ($(#[$doc:meta])* $vis:vis fn $name:ident<$t:ident: Float>(
        $($arg:ident: $type:ty),* $(,)?
    ) $(-> $returns:ty)? $body:block) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name<$t: Float>($($arg: $type),*) $(-> $returns)? {
            #[inline(always)]
            fn body<$t: Float>($($arg: $type),*) $(-> $returns)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                fn avx512<$t: Float>($($arg: $type),*) $(-> $returns)? {
                    body::<$t>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2<$t: Float>($($arg: $type),*) $(-> $returns)? {
                    body::<$t>($($arg),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                {
                    // SAFETY: the features are there.
                    return unsafe { avx512::<$t>($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: the features are there.
                    return unsafe { avx2::<$t>($($arg),*) };
                }
            }
            body::<$t>($($arg),*)
        }
    };
}
pub(crate) use vectorised;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exp() {
        let mut worst = 0f64;
        for i in 0..2_000_000 {
            let x = -(i as f32) * 87.3 / 2e6;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(x.exp_of_negative()) - want).abs() / want);
        }
        assert!(worst < 2e-7, "{worst:e}");
        assert_eq!(0f32.exp_of_negative(), 1.0);
        assert_eq!((-88f32).exp_of_negative(), 0.0);
        assert_eq!(f32::NEG_INFINITY.exp_of_negative(), 0.0);
        assert!(f32::NAN.exp_of_negative().is_nan());
    }

    #[test]
    fn sigmoid_at_its_ends() {
        assert_eq!(f32::INFINITY.sigmoid(), 1.0);
        assert_eq!(f32::NEG_INFINITY.sigmoid(), 0.0);
        assert_eq!(0f32.sigmoid(), 0.5);
        assert!(f32::NAN.sigmoid().is_nan() && f64::NAN.sigmoid().is_nan());
    }
}
