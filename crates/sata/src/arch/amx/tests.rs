//! The kernels against plain loops, on the tile unit where there is one and on an emulation.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

use super::tiles::{Amx, Shapes, Tiles};
use super::*;
use crate::arch::kernels::{PANEL, Scratch, TOKENS, Tokens, Values};
use crate::arch::{Buffer, Packed};
use crate::basis::{Basis, TILE, Tile};

/// The tile unit in plain code.
struct Emulated {
    shapes: Option<Shapes>,
    registers: [[[f32; 16]; 16]; 8],
}

impl Emulated {
    fn new() -> Self {
        Emulated { shapes: None, registers: [[[f32::NAN; 16]; 16]; 8] }
    }

    fn rows(&self, i: usize) -> usize {
        self.shapes.as_ref().expect("not configured").rows(i)
    }
}

/// The two bf16 numbers of a register's element.
fn halves(x: f32) -> [f32; 2] {
    [f32::from_bits(x.to_bits() << 16), f32::from_bits(x.to_bits() & 0xFFFF_0000)]
}

impl Tiles for Emulated {
    unsafe fn configure(&mut self, shapes: &Shapes) {
        self.shapes = Some(*shapes);
        self.registers = [[[0.0; 16]; 16]; 8];
    }

    unsafe fn release(&mut self) {
        self.shapes = None;
    }

    unsafe fn zero<const C: usize>(&mut self) {
        self.registers[C] = [[0.0; 16]; 16];
    }

    unsafe fn load<const C: usize>(&mut self, from: *const f32, stride: usize) {
        self.registers[C] = [[0.0; 16]; 16];
        for row in 0..self.rows(C) {
            // SAFETY: forwarded.
            self.registers[C][row] = unsafe { from.add(row * stride).cast::<[f32; 16]>().read() };
        }
    }

    unsafe fn store<const C: usize>(&mut self, to: *mut f32, stride: usize) {
        for row in 0..self.rows(C) {
            // SAFETY: forwarded.
            unsafe { to.add(row * stride).cast::<[f32; 16]>().write(self.registers[C][row]) };
        }
    }

    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        assert!(C != A && A != B && C != B);
        assert!(self.rows(C) == self.rows(A) && self.rows(B) == 16);
        for m in 0..self.rows(A) {
            for k in 0..16 {
                let left = halves(self.registers[A][m][k]);
                for n in 0..16 {
                    let right = halves(self.registers[B][k][n]);
                    let c = &mut self.registers[C][m][n];
                    *c = left[1].mul_add(right[1], left[0].mul_add(right[0], *c));
                }
            }
        }
    }
}

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
    products(basis, tile, x, ld, t, vectors::INFLATE).into_iter().map(cut).collect()
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

fn check_polynomial(mut run: impl FnMut(&mut Direct<'_, f32>)) {
    let mut rng = SmallRng::seed_from_u64(3);
    let mut case = 0;
    for d_key in [1, 2, 7, 8, 15, 16, 17, 32, 33, 64, 100] {
        for nq in [16, 48, 64, 112, 320] {
            for nk in [16, 32, 48, 64, 80, 128] {
                for diagonal in [None, Some(0), Some(17), Some(-20), Some(100), Some(-100)] {
                    case += 1;
                    let d_value: usize = [1, 15, 16, 17, 32, 64, 80, 128][case % 8];
                    let padded = d_value.next_multiple_of(LANES);
                    let coefficients = &[1.0, 0.75, 0.3, 0.2, -0.1][..1 + case % 5];
                    let (q_ld, k_ld) = (nq + 2, nk + 9);
                    let mut q = tokens(&mut rng, d_key, q_ld, false);
                    q.iter_mut().for_each(|q| *q *= 1.0 / (d_key as f32).sqrt());
                    let mut k = tokens(&mut rng, d_key, k_ld, true);
                    for t in 0..k_ld {
                        for c in 0..d_key {
                            k[c * k_ld + t] *= k[d_key * k_ld + t];
                        }
                    }
                    let values: Vec<f32> = (0..nk * padded).map(|_| normal(&mut rng)).collect();
                    let mut num: Vec<f32> = (0..nq * padded).map(|_| normal(&mut rng)).collect();
                    let mut den: Vec<f32> = (0..nq).map(|_| normal(&mut rng)).collect();
                    let mut want: Vec<f64> = num.iter().map(|&x| x.into()).collect();
                    let mut size: Vec<f64> = want.iter().map(|x| x.abs()).collect();
                    let mut want_den: Vec<f64> = den.iter().map(|&x| x.into()).collect();
                    let mut size_den: Vec<f64> = want_den.iter().map(|x| x.abs()).collect();
                    for t in 0..nq {
                        for s in 0..nk {
                            if diagonal.is_some_and(|diagonal| s as isize > t as isize + diagonal) {
                                continue;
                            }
                            let x: f64 = (0..d_key)
                                .map(|c| f64::from(q[c * q_ld + t]) * f64::from(k[c * k_ld + s]))
                                .sum();
                            let w =
                                coefficients.iter().rev().fold(0.0, |w, &c| w * x + f64::from(c));
                            let w = w * f64::from(k[d_key * k_ld + s]);
                            want_den[t] += w;
                            size_den[t] += w.abs();
                            for j in 0..padded {
                                let term = w * f64::from(values[s * padded + j]);
                                want[t * padded + j] += term;
                                size[t * padded + j] += term.abs();
                            }
                        }
                    }
                    let mut scratch = Scratch::direct();
                    scratch.panel.fill(f32::NAN);
                    run(&mut Direct {
                        d_key,
                        queries: Tokens { x: &q, ld: q_ld, count: nq },
                        keys: Tokens { x: &k, ld: k_ld, count: nk },
                        values: &values,
                        padded,
                        diagonal,
                        coefficients,
                        num: &mut num,
                        den: &mut den,
                        max: &mut [],
                        scratch: &mut scratch,
                    });
                    let what =
                        format!("d {d_key} queries {nq} keys {nk} values {d_value} {diagonal:?}");
                    // What cutting a weight off takes or the factor before adds, at most.
                    assert_close(&num, &want, &size, 1.0 / 180.0, &what);
                    assert_close(&den, &want_den, &size_den, 1.0 / 180.0, &what);
                }
            }
        }
    }
}

#[test]
fn weighing_on_emulated_tiles() {
    if machine_can() {
        // SAFETY: the machine has AVX-512.
        check_polynomial(|a| unsafe { direct::polynomial(&mut Emulated::new(), a) });
    }
}

#[test]
fn weighing_on_the_tile_unit() {
    if is_available() {
        // SAFETY: just asked.
        check_polynomial(|a| unsafe { direct::polynomial(&mut Amx, a) });
    }
}

/// What a computation in bf16 gives: Σ w v / Σ w over all keys.
struct Inputs {
    d: usize,
    keys: usize,
    queries: usize,
    /// `[token][d]`, unscaled.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

const COEFFICIENTS: [f64; 4] = [1.0, 1.0, 0.5, 1.0 / 6.0];

impl Inputs {
    fn scale(&self) -> f64 {
        1.0 / (self.d as f64).sqrt()
    }

    fn average(&self, weight: impl Fn(&[f32], &[f32]) -> f64) -> Vec<f64> {
        let mut out = vec![];
        for q in self.q.chunks(self.d) {
            let mut y = vec![0.0; self.d];
            let mut total = 0.0;
            for (k, v) in self.k.chunks(self.d).zip(self.v.chunks(self.d)) {
                let w = weight(q, k);
                total += w;
                y.iter_mut().zip(v).for_each(|(y, &v)| *y += w * f64::from(v));
            }
            out.extend(y.iter().map(|y| y / total));
        }
        out
    }

    fn exact(&self) -> Vec<f64> {
        self.average(|q, k| {
            let x: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
            let x = x * self.scale();
            COEFFICIENTS.iter().rev().fold(0.0, |w, c| w * x + c)
        })
    }

    /// Every step of the direct form rounded to bf16, but sums in more.
    fn naive_direct(&self) -> Vec<f64> {
        let r = |x: f64| f64::from(bf16(x as f32));
        self.average(|q, k| {
            let x: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
            let x = r(r(x) * self.scale());
            COEFFICIENTS.iter().rev().fold(0.0, |w, &c| r(r(w * x) + r(c)))
        })
    }

    /// Features and their sums rounded to bf16, added up in more.
    fn naive_features(&self, basis: &Basis) -> Vec<f64> {
        let r = |x: f64| f64::from(bf16(x as f32));
        let d = self.d;
        let phi = |x: &[f32], scale: f64| -> Vec<f64> {
            let mut x: Vec<f32> = x.iter().map(|&x| r(f64::from(x) * scale) as f32).collect();
            x.push(1.0);
            let all = basis.tiles().iter().flat_map(|tile| monomials(basis, tile, &x, 1, 0));
            all.map(|x| r(x.into())).collect()
        };
        let mut sums = vec![0.0; basis.len() * (d + 1)];
        for (k, v) in self.k.chunks(d).zip(self.v.chunks(d)) {
            for (phi, sums) in phi(k, 1.0).iter().zip(sums.chunks_mut(d + 1)) {
                sums.iter_mut().zip(v).for_each(|(sum, &v)| *sum += phi * f64::from(v));
                sums[d] += phi;
            }
        }
        for tile in basis.tiles() {
            for f in tile.start..tile.start + tile.len {
                let weight = basis.multiplicities()[f] * COEFFICIENTS[tile.order];
                sums[f * (d + 1)..][..d + 1].iter_mut().for_each(|sum| *sum = r(*sum * weight));
            }
        }
        let mut out = vec![];
        for q in self.q.chunks(d) {
            let mut y = vec![0.0; d + 1];
            for (phi, sums) in phi(q, self.scale()).iter().zip(sums.chunks(d + 1)) {
                y.iter_mut().zip(sums).for_each(|(y, sum)| *y += phi * sum);
            }
            out.extend(y[..d].iter().map(|n| n / y[d]));
        }
        out
    }

    fn transposed(&self, rows: &[f32], scale: f32) -> Vec<f32> {
        let n = rows.len() / self.d;
        let mut x = vec![1.0; (self.d + 1) * n];
        for (t, row) in rows.chunks(self.d).enumerate() {
            row.iter().enumerate().for_each(|(c, &v)| x[c * n + t] = v * scale);
        }
        x
    }

    /// The kernels: absorb all keys, read, divide.
    fn by_state(&self, t: &mut impl Tiles, basis: &Basis) -> Vec<f64> {
        let d = self.d;
        let padded = d.next_multiple_of(LANES);
        let k = self.transposed(&self.k, 1.0);
        let q = self.transposed(&self.q, self.scale() as f32);
        let mut rows = vec![0.0; self.keys * padded];
        rows.chunks_mut(padded)
            .zip(self.v.chunks(d))
            .for_each(|(to, v)| to[..d].copy_from_slice(v));
        let part = absorb::prepared_len(padded);
        let mut prepared = vec![0.0; self.keys / PANEL * part];
        for (p, out) in prepared.chunks_mut(part).enumerate() {
            // SAFETY: the machine has AVX-512.
            unsafe { absorb::prepare(&rows[p * PANEL * padded..], PANEL, padded, out) };
        }
        let mut scratch = Scratch::new(basis);
        let each = read::packed_len(padded);
        let mut packed = vec![0.0; basis.tiles().len() * each];
        for (tile, packed) in basis.tiles().iter().zip(packed.chunks_mut(each)) {
            let (mut sums, mut z) = (vec![0.0; TILE * padded], vec![0.0; TILE * TOKENS]);
            let mut a = Absorb {
                basis,
                tile,
                tokens: Tokens { x: &k, ld: self.keys, count: self.keys },
                values: Values { rows: &rows, prepared: &prepared },
                padded,
                sums: &mut sums,
                z: &mut z,
                scratch: &mut scratch,
            };
            // SAFETY: the machine has what is asked for.
            unsafe { absorb::absorb(t, &mut a) };
            let sums: Vec<f32> = sums.chunks(padded).flat_map(|row| row[..d].to_vec()).collect();
            let z: Vec<f32> = z.chunks(TOKENS).map(|z| z.iter().sum()).collect();
            let m = &basis.multiplicities_f32()[tile.start..tile.start + tile.len];
            let c = COEFFICIENTS[tile.order] as f32;
            // SAFETY: as above.
            unsafe { read::pack(&sums, &z, m, c, d, packed, &mut [0.0; TILE]) };
        }
        let mut num = vec![0.0; self.queries * padded];
        let mut den = vec![0.0; self.queries];
        for at in (0..self.queries).step_by(PANEL) {
            let mut a = Read {
                basis,
                tiles: basis.tiles(),
                tokens: Tokens { x: &q[at..], ld: self.queries, count: PANEL },
                packed: Packed { sums: &packed, z: &[] },
                padded,
                num: &mut num[at * padded..],
                den: &mut den[at..],
                scratch: &mut scratch,
            };
            // SAFETY: as above.
            unsafe { read::read(t, &mut a) };
        }
        divided(&num, &den, padded, d)
    }

    /// The kernels' direct form.
    fn by_pairs(&self, t: &mut impl Tiles) -> Vec<f64> {
        let d = self.d;
        let padded = d.next_multiple_of(LANES);
        let k = self.transposed(&self.k, 1.0);
        let q = self.transposed(&self.q, self.scale() as f32);
        let mut rows = vec![0.0; self.keys * padded];
        rows.chunks_mut(padded)
            .zip(self.v.chunks(d))
            .for_each(|(to, v)| to[..d].copy_from_slice(v));
        let mut num = vec![0.0; self.queries * padded];
        let mut den = vec![0.0; self.queries];
        for at in (0..self.queries).step_by(PANEL) {
            let mut a = Direct {
                d_key: d,
                queries: Tokens { x: &q[at..], ld: self.queries, count: PANEL },
                keys: Tokens { x: &k, ld: self.keys, count: self.keys },
                values: &rows,
                padded,
                diagonal: None,
                coefficients: &COEFFICIENTS.map(|c| c as f32),
                num: &mut num[at * padded..],
                den: &mut den[at..],
                max: &mut [],
                scratch: &mut Scratch::direct(),
            };
            // SAFETY: the machine has what is asked for.
            unsafe { direct::polynomial(t, &mut a) };
        }
        divided(&num, &den, padded, d)
    }
}

fn divided(num: &[f32], den: &[f32], padded: usize, d: usize) -> Vec<f64> {
    let rows = num.chunks(padded).zip(den);
    rows.flat_map(|(row, den)| row[..d].iter().map(|n| f64::from(n / den)).collect::<Vec<_>>())
        .collect()
}

fn relative(got: &[f64], want: &[f64]) -> f64 {
    let error: f64 = got.iter().zip(want).map(|(a, b)| (a - b).powi(2)).sum();
    (error / want.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

/// Relative root mean square errors against f64 stay below those of the formula as one would
/// write it in bf16.
fn check_errors(t: &mut impl Tiles) {
    for (seed, d, keys, shift, spread, width) in [
        (1, 16, 64, 0.0, 0.0, 1.0),
        (2, 16, 1024, 0.0, 0.0, 1.0),
        (3, 32, 1024, 0.0, 0.0, 1.0),
        (4, 16, 1024, 1.0, 0.5, 1.0),
        (5, 32, 512, 2.0, 0.5, 0.7),
        (6, 8, 4096, 0.5, 0.2, 1.3),
        (7, 64, 64, 1.0, 0.5, 1.0),
    ] {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut some = |n: usize, shift: f32| -> Vec<f32> {
            (0..n).map(|_| bf16(width * normal(&mut rng) + shift)).collect()
        };
        let queries = PANEL;
        let inputs = Inputs {
            d,
            keys,
            queries,
            q: some(queries * d, spread),
            k: some(keys * d, spread),
            v: some(keys * d, shift),
        };
        let basis = Basis::new(d, &[0, 1, 2, 3]).unwrap();
        let exact = inputs.exact();
        let error = |y: Vec<f64>| relative(&y, &exact);
        let (direct, features) =
            (error(inputs.naive_direct()), error(inputs.naive_features(&basis)));
        let (state, pairs) = (error(inputs.by_state(t, &basis)), error(inputs.by_pairs(t)));
        let what = format!(
            "d {d} keys {keys} means {shift} {spread}: naive direct {direct:.2e} features \
             {features:.2e}; by state {state:.2e} by pairs {pairs:.2e}"
        );
        eprintln!("{what}");
        assert!(state <= 1.2 * features && state <= 2.0 * direct && pairs <= direct, "{what}");
    }
}

#[test]
fn errors_on_emulated_tiles() {
    if machine_can() {
        check_errors(&mut Emulated::new());
    }
}

#[test]
fn errors_on_the_tile_unit() {
    if is_available() {
        check_errors(&mut Amx);
    }
}

/// Tiles that do nothing: what is left is the time of the vector units.
struct Nothing;

impl Tiles for Nothing {
    unsafe fn configure(&mut self, _shapes: &Shapes) {}
    unsafe fn release(&mut self) {}
    unsafe fn zero<const C: usize>(&mut self) {}
    unsafe fn load<const C: usize>(&mut self, _from: *const f32, _stride: usize) {}
    unsafe fn store<const C: usize>(&mut self, _to: *mut f32, _stride: usize) {}
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {}
}

/// Tiles that store nothing but zeros.
struct Zeros;

impl Tiles for Zeros {
    unsafe fn configure(&mut self, _shapes: &Shapes) {}
    unsafe fn release(&mut self) {}
    unsafe fn zero<const C: usize>(&mut self) {}
    unsafe fn load<const C: usize>(&mut self, _from: *const f32, _stride: usize) {}
    unsafe fn store<const C: usize>(&mut self, to: *mut f32, stride: usize) {
        for row in 0..16 {
            // SAFETY: forwarded.
            unsafe { to.add(row * stride).cast::<[f32; 16]>().write([0.0; 16]) };
        }
    }
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {}
}

/// Seconds of one call, the best of some.
fn seconds(mut f: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    let start = std::time::Instant::now();
    while start.elapsed().as_secs_f64() < 0.03 {
        let start = std::time::Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// As in use, on a cache line: rows that straddle two take twice as long.
fn aligned(values: Vec<f32>) -> Buffer<f32> {
    let mut buffer = Buffer::zeroed(values.len());
    buffer.copy_from_slice(&values);
    buffer
}

/// Useful rates on one core: `cargo test --release -p sata --lib amx::tests::rates -- --ignored --nocapture`.
#[test]
#[ignore = "a benchmark"]
fn rates() {
    if !machine_can() {
        return;
    }
    let vectors = &avx512_f32::KERNELS;
    for d in [8, 16, 32, 64] {
        let basis = Basis::new(d, &[0, 1, 2, 3]).unwrap();
        let tiles = &basis.tiles()[..basis.tiles().len().min(110)];
        let padded = d.next_multiple_of(LANES);
        let features: usize = tiles.iter().map(|tile| tile.len).sum();
        for (chunk, ld) in [(256, 272), (512, 528)] {
            let mut rng = SmallRng::seed_from_u64(4);
            let x = aligned(tokens(&mut rng, d, ld, false));
            let rows = aligned((0..chunk * padded).map(|_| normal(&mut rng)).collect());
            let mut num = Buffer::zeroed(chunk * padded);
            let mut den = Buffer::zeroed(chunk);
            let mut scratch = Scratch::new(&basis);
            let sums = aligned((0..TILE * d).map(|_| normal(&mut rng)).collect());
            let z: Vec<f32> = (0..TILE).map(|_| normal(&mut rng)).collect();
            let each = read::packed_len(padded);
            let mut packed = Buffer::zeroed(tiles.len() * each);
            let mut packed_z = Buffer::zeroed(TILE);
            let weights = [1.0; TILE];
            let pack = seconds(|| {
                for out in packed.chunks_mut(each) {
                    // SAFETY: the machine has AVX-512.
                    unsafe { read::pack(&sums, &z, &weights, 0.5, d, out, &mut packed_z) };
                }
            });
            let part = absorb::prepared_len(padded);
            let mut prepared = Buffer::zeroed(chunk / PANEL * part);
            let prepare = seconds(|| {
                for (p, out) in prepared.chunks_mut(part).enumerate() {
                    // SAFETY: the machine has AVX-512.
                    unsafe { absorb::prepare(&rows[p * PANEL * padded..], PANEL, padded, out) };
                }
            });
            let rate = |seconds: f64| 2e-9 * (features * (d + 1) * chunk) as f64 / seconds;
            eprintln!(
                "d {d} chunk {chunk} ld {ld}: {features} features; per tile: pack {:.0} ns, prepare a panel {:.0} ns",
                pack / tiles.len() as f64 * 1e9,
                prepare / (chunk / PANEL) as f64 * 1e9,
            );
            macro_rules! reading {
                ($tiles:expr, $group:expr) => {
                    rate(seconds(|| {
                        for (tiles, packed) in
                            tiles.chunks($group).zip(packed.chunks($group * each))
                        {
                            let mut a = Read {
                                basis: &basis,
                                tiles,
                                tokens: Tokens { x: &x, ld, count: chunk },
                                packed: Packed { sums: packed, z: &[] },
                                padded,
                                num: &mut num,
                                den: &mut den,
                                scratch: &mut scratch,
                            };
                            // SAFETY: the machine has what is asked for.
                            unsafe { read::read($tiles, &mut a) };
                        }
                    }))
                };
            }
            let mut tile_sums = Buffer::zeroed(TILE * padded);
            let mut tile_z = Buffer::zeroed(TILE * TOKENS);
            macro_rules! absorbing {
                ($tiles:expr, $tokens:expr) => {
                    rate(seconds(|| {
                        for tile in tiles {
                            for at in (0..chunk).step_by($tokens) {
                                let mut a = Absorb {
                                    basis: &basis,
                                    tile,
                                    tokens: Tokens { x: &x[at..], ld, count: $tokens },
                                    values: Values {
                                        rows: &rows[at * padded..],
                                        prepared: &prepared[at / PANEL * part..],
                                    },
                                    padded,
                                    sums: &mut tile_sums,
                                    z: &mut tile_z,
                                    scratch: &mut scratch,
                                };
                                // SAFETY: the machine has what is asked for.
                                unsafe { absorb::absorb($tiles, &mut a) };
                            }
                        }
                    }))
                };
            }
            if is_available() {
                eprintln!(
                    "  GFLOP/s: read by 1, 16, all tiles {:.0} {:.0} {:.0}, absorb by panels {:.0}, whole {:.0}",
                    reading!(&mut Amx, 1),
                    reading!(&mut Amx, 16),
                    reading!(&mut Amx, 1000),
                    absorbing!(&mut Amx, PANEL),
                    absorbing!(&mut Amx, chunk),
                );
            }
            eprintln!(
                "  vectors alone: read {:.0}, absorb {:.0}",
                reading!(&mut Nothing, 1000),
                absorbing!(&mut Nothing, chunk),
            );
            let plain = Buffer::zeroed(TILE * padded);
            let old_read = seconds(|| {
                for tile in tiles {
                    for t in (0..chunk).step_by(PANEL) {
                        let mut a = Read {
                            basis: &basis,
                            tiles: std::slice::from_ref(tile),
                            tokens: Tokens { x: &x[t..], ld, count: PANEL },
                            packed: Packed { sums: &plain, z: &z },
                            padded,
                            num: &mut num[t * padded..],
                            den: &mut den[t..],
                            scratch: &mut scratch,
                        };
                        // SAFETY: the machine has AVX-512.
                        unsafe { (vectors.read)(&mut a) };
                    }
                }
            });
            eprintln!("  f32 read {:.0} GFLOP/s", rate(old_read));
            // One call for some queries and keys; nanoseconds per block of 64 by 64.
            let mut weigh =
                |f: &mut dyn FnMut(&mut Direct<'_, f32>), queries: usize, keys: usize| {
                    let seconds = seconds(|| {
                        for t in (0..chunk).step_by(queries) {
                            for s in (0..chunk).step_by(keys) {
                                f(&mut Direct {
                                    d_key: d,
                                    queries: Tokens { x: &x[t..], ld, count: queries },
                                    keys: Tokens { x: &x[s..], ld, count: keys },
                                    values: &rows[s * padded..],
                                    padded,
                                    diagonal: None,
                                    coefficients: &[1.0, 1.0, 0.5, 0.16],
                                    num: &mut num[t * padded..],
                                    den: &mut den[t..],
                                    max: &mut [],
                                    scratch: &mut scratch,
                                });
                            }
                        }
                    });
                    seconds * 1e9 / (chunk / PANEL).pow(2) as f64
                };
            // SAFETY: the machine has what is asked for.
            unsafe {
                let f32 = weigh(&mut |a| (vectors.polynomial)(a), PANEL, TILE);
                eprintln!("  direct, ns per block: f32 {f32:.0}");
                let mut tiles = |a: &mut Direct<'_, f32>| direct::polynomial(&mut Amx, a);
                if is_available() {
                    eprintln!(
                        "    tiles {:.0}, many keys {:.0}, many of both {:.0}",
                        weigh(&mut tiles, PANEL, TILE),
                        weigh(&mut tiles, PANEL, chunk),
                        weigh(&mut tiles, chunk, chunk),
                    );
                }
                let mut zeros = |a: &mut Direct<'_, f32>| direct::polynomial(&mut Zeros, a);
                eprintln!(
                    "    vectors alone {:.0}, many of both {:.0}",
                    weigh(&mut zeros, PANEL, TILE),
                    weigh(&mut zeros, chunk, chunk),
                );
            }
        }
    }
}
