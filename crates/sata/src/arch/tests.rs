//! Vector arithmetic of every instruction set against the standard library.

use super::vector::{Vector, exp};
use super::{Level, portable, x86};
use crate::Real;

/// e^x, lane by lane, over the whole range and beyond.
unsafe fn check<V: Vector>() {
    let double = size_of::<V::Elem>() == 8;
    let (ulp, lowest) =
        if double { (f64::EPSILON, -600.0) } else { (f64::from(f32::EPSILON), -60.0) };
    let mut x = lowest;
    while x < 20.0 {
        let input = V::Elem::from_f64(x);
        // SAFETY: the caller has made sure of the instructions.
        let got = unsafe { lane(exp(V::splat(input))) }.to_f64();
        let want = input.to_f64().exp();
        assert!((got - want).abs() <= 3.0 * ulp * want, "e^{x} is {want:e}, not {got:e}");
        x += 0.0137;
    }
    let below = 1.001 * lowest;
    for (x, want) in
        [(0.0, 1.0), (below, 0.0), (-1e4, 0.0), (f64::MIN, 0.0), (f64::NEG_INFINITY, 0.0)]
    {
        // SAFETY: as above.
        let got = unsafe { lane(exp(V::splat(V::Elem::from_f64(x)))) }.to_f64();
        assert_eq!(got, want, "e^{x}");
    }
    // SAFETY: as above.
    unsafe {
        let nan = V::splat(V::Elem::from_f64(f64::NAN));
        assert!(lane(exp(nan)).to_f64().is_nan(), "NaN is hidden by exp");
        assert!(lane(nan.max(V::splat(V::Elem::ONE))).to_f64().is_nan(), "NaN is hidden by max");
        let counted: Vec<V::Elem> = (0..16).map(|i| V::Elem::from_f64(f64::from(i))).collect();
        let lanes = V::LANES as f64;
        assert_eq!(V::load(counted.as_ptr()).sum().to_f64(), lanes * (lanes - 1.0) / 2.0);
    }
}

unsafe fn lane<V: Vector>(v: V) -> V::Elem {
    let mut lanes = [V::Elem::ZERO; 16];
    // SAFETY: LANES ≤ 16.
    unsafe { v.store(lanes.as_mut_ptr()) };
    lanes[V::LANES - 1]
}

#[test]
fn portable_vectors() {
    // SAFETY: these need nothing of the machine.
    unsafe {
        check::<portable::F32x8>();
        check::<portable::F64x4>();
    }
}

#[test]
fn avx2_vectors() {
    if !Level::Avx2.is_available() {
        println!("skipped: no AVX2");
        return;
    }
    // SAFETY: the instructions were found just now.
    unsafe {
        check::<x86::F32x8<16>>();
        check::<x86::F64x4<16>>();
    }
}

#[test]
fn avx512_vectors() {
    if !Level::Avx512.is_available() {
        println!("skipped: no AVX-512");
        return;
    }
    // SAFETY: the instructions were found just now.
    unsafe {
        check::<x86::F32x16>();
        check::<x86::F64x8>();
        check::<x86::F32x8<32>>();
        check::<x86::F64x4<32>>();
    }
}
