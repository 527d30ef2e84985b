//! The few vector operations that the kernels are written in, once for every machine.

/// A register of `LANES` numbers.
///
/// Every method is `#[inline(always)]` so that it takes on the target features of the entry point
/// that it is used from; on its own it may be slow, never wrong.
///
/// # Safety
/// All methods are unsafe for one reason: the caller must be running on a machine that has the
/// instructions (the entry points in [`super`] are the only callers). `load` and `store` also need
/// `LANES` readable or writable elements at `p`; no alignment is asked for.
pub(crate) trait Vector: Copy {
    /// What a lane holds.
    type Elem: crate::Real;
    /// Lanes in a register.
    const LANES: usize;
    /// Registers the machine has, for the shape of register tiles.
    const REGISTERS: usize;

    unsafe fn splat(x: Self::Elem) -> Self;
    unsafe fn load(p: *const Self::Elem) -> Self;
    unsafe fn store(self, p: *mut Self::Elem);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// self · b + c, fused where the machine can.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// The larger of two numbers, lane by lane.
    unsafe fn max(self, other: Self) -> Self;
    /// self, or 0 in lanes where x is below `floor` (not where it is NaN).
    unsafe fn unless_below(self, x: Self, floor: Self) -> Self;
    /// The sum of the lanes.
    unsafe fn sum(self) -> Self::Elem;
    /// To the nearest integer.
    unsafe fn round(self) -> Self;
    /// self · 2^n for integral n at which neither leaves the normal range.
    unsafe fn scale2(self, n: Self) -> Self;
}

/// e^x for x ≤ 0 and moderately above, to about two units in the last place; 0 where that is
/// nothing beside 1.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2; e^r by its Taylor polynomial (degree 7 in f32, 13 in f64),
/// whose remainder is below the rounding error there.
#[inline(always)]
pub(crate) unsafe fn exp<V: Vector>(x: V) -> V {
    use crate::Real;
    let c = |x: f64| V::Elem::from_f64(x);
    let double = size_of::<V::Elem>() == 8;
    // ln 2 split so that n times the upper part is exact.
    let (high, low) = if double {
        (6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10)
    } else {
        (0.693_359_375, -2.121_944_4e-4)
    };
    let degree = if double { 13 } else { 7 };
    // SAFETY: forwarded from the caller.
    unsafe {
        // Below this e^x is taken for 0: beside the largest weight, which is 1, it is lost, and
        // products with it could be subnormal, which take processors a hundred times as long. NaN
        // stays NaN.
        let floor = V::splat(c(if double { -600.0 } else { -60.0 }));
        let given = x;
        let x = x.max(floor);
        let n = x.mul(V::splat(c(std::f64::consts::LOG2_E))).round();
        let r = n.mul_add(V::splat(c(-high)), x);
        let r = n.mul_add(V::splat(c(-low)), r);
        let mut factorial = 1.0;
        for i in 1..=degree {
            factorial *= f64::from(i);
        }
        let mut y = V::splat(c(1.0 / factorial));
        for i in (0..degree).rev() {
            factorial /= f64::from(i + 1);
            y = y.mul_add(r, V::splat(c(1.0 / factorial)));
        }
        y.scale2(n).unless_below(given, floor)
    }
}
