//! Reading and absorbing against plain loops.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

use super::emulated::Emulated;
use super::{
    BASES, COUNTS, D_VALUES, assert_close, away, features, machine_can, monomials, normal, tokens,
};
use crate::arch::Packed;
use crate::arch::amx::tiles::Amx;
use crate::arch::amx::vectors::LANES;
use crate::arch::amx::{absorb, is_available, read};
use crate::arch::kernels::{Absorb, PANEL, Read, Scratch, TOKENS, Tokens, Values};
use crate::basis::{Basis, TILE};

fn check_absorb(make: impl Fn() -> Box<dyn FnMut(&mut Absorb<'_, f32>)>) {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut run = make();
    for (case, &(d, orders)) in BASES.iter().enumerate() {
        let basis = Basis::new(d, orders).unwrap();
        for (i, tile) in basis.tiles().iter().enumerate() {
            for &count in &[16, 32, 48, 64, 112, 192] {
                let d_value = D_VALUES[(case + i + count / 16) % D_VALUES.len()];
                let padded = d_value.next_multiple_of(LANES);
                let ld = count + 5;
                let x = tokens(&mut rng, d, ld, true);
                let mut rows = vec![0.0; count * padded];
                for t in 0..count {
                    rows[t * padded..][..d_value].fill_with(|| normal(&mut rng));
                }
                let each = absorb::prepared_len(padded);
                let mut prepared = vec![f32::NAN; count.div_ceil(PANEL) * each];
                for (p, out) in prepared.chunks_mut(each).enumerate() {
                    let here = PANEL.min(count - p * PANEL);
                    // SAFETY: the machine has AVX-512.
                    unsafe { absorb::prepare(&rows[p * PANEL * padded..], here, padded, out) };
                }
                let mut sums: Vec<f32> = (0..TILE * padded).map(|_| normal(&mut rng)).collect();
                let mut z: Vec<f32> = (0..TILE * TOKENS).map(|_| normal(&mut rng)).collect();
                let mut want: Vec<f64> = sums.iter().map(|&x| x.into()).collect();
                let mut size: Vec<f64> = want.iter().map(|x| x.abs()).collect();
                let lanes = |z: &[f32]| -> Vec<f64> {
                    z.chunks(TOKENS).map(|z| z.iter().map(|&z| f64::from(z)).sum()).collect()
                };
                let mut want_z = lanes(&z);
                let mut size_z: Vec<f64> =
                    z.chunks(TOKENS).map(|z| z.iter().map(|&z| f64::from(z.abs())).sum()).collect();
                for t in 0..count {
                    let exact = monomials(&basis, tile, &x, ld, t);
                    for (f, phi) in features(&basis, tile, &x, ld, t).into_iter().enumerate() {
                        want_z[f] += f64::from(exact[f]);
                        size_z[f] += phi.abs();
                        for j in 0..padded {
                            let term = phi * f64::from(rows[t * padded + j]);
                            want[f * padded + j] += term;
                            size[f * padded + j] += term.abs();
                        }
                    }
                }
                let mut scratch = Scratch::new(&basis);
                scratch.panel.fill(f32::NAN);
                run(&mut Absorb {
                    basis: &basis,
                    tile,
                    tokens: Tokens { x: &x, ld, count },
                    values: Values { rows: &rows, prepared: &prepared },
                    by: &[],
                    padded,
                    sums: &mut sums,
                    z: &mut z,
                    scratch: &mut scratch,
                });
                let what =
                    format!("d {d} orders {orders:?} tile {i} tokens {count} values {d_value}");
                assert_close(&sums, &want, &size, 1e-5, &what);
                let z: Vec<f32> = lanes(&z).iter().map(|&z| z as f32).collect();
                assert_close(&z, &want_z, &size_z, 1e-5, &what);
            }
        }
    }
}

#[test]
fn absorbing_on_emulated_tiles() {
    if machine_can() {
        check_absorb(|| {
            // SAFETY: the machine has AVX-512.
            Box::new(|a| unsafe { absorb::absorb(&mut Emulated::new(), a) })
        });
    }
}

#[test]
fn absorbing_on_the_tile_unit() {
    if is_available() {
        // SAFETY: just asked.
        check_absorb(|| Box::new(|a| unsafe { absorb::absorb(&mut Amx, a) }));
    }
}

fn check_read(mut run: impl FnMut(&mut Read<'_, f32>)) {
    let mut rng = SmallRng::seed_from_u64(2);
    for (case, &(d, orders)) in BASES.iter().enumerate() {
        let basis = Basis::new(d, orders).unwrap();
        let n = basis.tiles().len();
        for (i, range) in (0..n).map(|i| i..i + 1).chain([0..n, n / 2..n]).enumerate() {
            for &count in &COUNTS {
                let d_value = D_VALUES[(case + i + count / 16) % D_VALUES.len()];
                let padded = d_value.next_multiple_of(LANES);
                let ld = count + 3;
                let x = tokens(&mut rng, d, ld, false);
                let mut num: Vec<f32> = (0..count * padded).map(|_| normal(&mut rng)).collect();
                let mut den: Vec<f32> = (0..count).map(|_| normal(&mut rng)).collect();
                let mut want: Vec<f64> = num.iter().map(|&x| x.into()).collect();
                let mut size: Vec<f64> = want.iter().map(|x| x.abs()).collect();
                let mut want_den: Vec<f64> = den.iter().map(|&x| x.into()).collect();
                let mut size_den: Vec<f64> = want_den.iter().map(|x| x.abs()).collect();
                let each = read::packed_len(padded);
                let tiles = &basis.tiles()[range.clone()];
                let mut packed = vec![f32::NAN; tiles.len() * each];
                for (tile, packed) in tiles.iter().zip(packed.chunks_mut(each)) {
                    let sums: Vec<f32> =
                        (0..tile.len * d_value).map(|_| normal(&mut rng)).collect();
                    let z: Vec<f32> = (0..tile.len).map(|_| rng.sample(StandardNormal)).collect();
                    let m = &basis.multiplicities_f32()[tile.start..tile.start + tile.len];
                    let mut z_out = vec![0.0; TILE];
                    // SAFETY: the machine has AVX-512.
                    unsafe { read::pack(&sums, &z, m, 0.37, d_value, packed, &mut z_out) };
                    for t in 0..count {
                        for (f, phi) in features(&basis, tile, &x, ld, t).into_iter().enumerate() {
                            assert_eq!(z_out[f], z[f] * (m[f] * 0.37));
                            let term = phi * f64::from(z_out[f]);
                            want_den[t] += term;
                            size_den[t] += term.abs();
                            for j in 0..d_value {
                                let sum = sums[f * d_value + j] * (m[f] * 0.37);
                                let sum = if tile.len <= 32 { sum.into() } else { away(sum) };
                                want[t * padded + j] += phi * sum;
                                size[t * padded + j] += (phi * sum).abs();
                            }
                        }
                    }
                }
                let mut scratch = Scratch::new(&basis);
                scratch.panel.fill(f32::NAN);
                run(&mut Read {
                    basis: &basis,
                    tiles,
                    tokens: Tokens { x: &x, ld, count },
                    packed: Packed { sums: &packed, z: &[] },
                    padded,
                    num: &mut num,
                    den: &mut den,
                    scratch: &mut scratch,
                });
                let what = format!(
                    "d {d} orders {orders:?} tiles {range:?} tokens {count} values {d_value}"
                );
                assert_close(&num, &want, &size, 1e-5, &what);
                assert_close(&den, &want_den, &size_den, 1e-5, &what);
            }
        }
    }
}

#[test]
fn reading_on_emulated_tiles() {
    if machine_can() {
        // SAFETY: the machine has AVX-512.
        unsafe {
            check_read(|a| read::read(&mut Emulated::new(), a));
        }
    }
}

#[test]
fn reading_on_the_tile_unit() {
    if is_available() {
        // SAFETY: just asked.
        unsafe {
            check_read(|a| read::read(&mut Amx, a));
        }
    }
}
