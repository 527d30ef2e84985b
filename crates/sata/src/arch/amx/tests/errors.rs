//! Whole computations in bf16 against f64, and against the formula as one would write it in bf16.

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::emulated::Emulated;
use super::{bf16, machine_can, monomials, normal};
use crate::arch::Packed;
use crate::arch::amx::tiles::{Amx, Tiles};
use crate::arch::amx::vectors::LANES;
use crate::arch::amx::{absorb, direct, is_available, read};
use crate::arch::kernels::{
    Absorb, Coefficients, Direct, PANEL, Read, Scratch, Sight, TOKENS, Tokens, Values,
};
use crate::basis::{Basis, TILE};

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
                by: &[],
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
                sight: Sight::default(),
                fading: None,
                coefficients: Coefficients::Same(&COEFFICIENTS.map(|c| c as f32)),
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
