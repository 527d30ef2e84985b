//! The kernels on the tile unit, where there is one, and on an emulation.

mod emulated;
mod errors;
mod rates;
mod sums;
mod weighing;

use rand::Rng;
use rand::rngs::SmallRng;
use rand_distr::StandardNormal;

use super::vectors::INFLATE;
use crate::arch::Level;
use crate::basis::{Basis, Tile};

fn bf16(x: f32) -> f32 {
    half::bf16::from_f32(x).to_f32()
}

/// As the kernels round: halfway cases away from zero.
fn away(x: f32) -> f64 {
    f32::from_bits((x.to_bits() + 0x8000) & 0xFFFF_0000).into()
}

fn normal(rng: &mut SmallRng) -> f32 {
    bf16(rng.sample::<f32, _>(StandardNormal))
}

/// Tokens in the kernels' layout; every seventh weighs nothing.
fn tokens(rng: &mut SmallRng, d: usize, ld: usize, masked: bool) -> Vec<f32> {
    let mut x: Vec<f32> = (0..(d + 1) * ld).map(|_| normal(rng)).collect();
    for t in 0..ld {
        x[d * ld + t] = if masked && t % 7 == 3 { 0.0 } else { 1.0 };
    }
    x
}

/// All monomials of a tile for one token, unrounded, times `factor`.
fn products(basis: &Basis, tile: &Tile, x: &[f32], ld: usize, t: usize, factor: f32) -> Vec<f32> {
    let weight = x[basis.d_key() * ld + t];
    if tile.order == 0 {
        return vec![weight];
    }
    let width = tile.order - 1;
    let mut out = vec![];
    for (r, run) in basis.runs()[tile.runs.clone()].iter().enumerate() {
        let prefix = &basis.prefixes()[tile.prefixes + r * width..][..width];
        let product = prefix.iter().fold(weight * factor, |p, &i| p * x[i as usize * ld + t]);
        for i in run.first..run.first + run.len {
            out.push(product * x[i as usize * ld + t]);
        }
    }
    assert_eq!(out.len(), tile.len);
    out
}

fn monomials(basis: &Basis, tile: &Tile, x: &[f32], ld: usize, t: usize) -> Vec<f32> {
    products(basis, tile, x, ld, t, 1.0)
}

/// Features as the kernels make them bf16.
fn features(basis: &Basis, tile: &Tile, x: &[f32], ld: usize, t: usize) -> Vec<f64> {
    if tile.order < 2 {
        return monomials(basis, tile, x, ld, t).into_iter().map(away).collect();
    }
    let cut = |x: f32| f64::from(f32::from_bits(x.to_bits() & 0xFFFF_0000));
    products(basis, tile, x, ld, t, INFLATE).into_iter().map(cut).collect()
}

/// d_key and orders whose tiles have between them all kinds of lengths and runs.
const BASES: [(usize, &[usize]); 8] = [
    (1, &[0, 1, 5]),
    (7, &[1, 2]),
    (8, &[3]),
    (15, &[1, 2]),
    (17, &[1, 2, 3]),
    (16, &[0, 1, 2, 3]),
    (33, &[1, 2]),
    (5, &[4]),
];
const COUNTS: [usize; 5] = [16, 32, 48, 64, 112];
const D_VALUES: [usize; 10] = [1, 8, 15, 16, 17, 32, 33, 64, 80, 130];

fn machine_can() -> bool {
    let can = Level::Avx512.is_available();
    if !can {
        eprintln!("skipped: no AVX-512");
    }
    can
}

fn assert_close(got: &[f32], want: &[f64], size: &[f64], bound: f64, what: &str) {
    for (i, ((&got, &want), &size)) in got.iter().zip(want).zip(size).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(error <= bound * size + 1e-30, "{what}: element {i} is {got}, not {want}");
    }
}
