//! The direct form against plain loops.

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::emulated::Emulated;
use super::{assert_close, machine_can, normal, tokens};
use crate::arch::amx::tiles::Amx;
use crate::arch::amx::vectors::LANES;
use crate::arch::amx::{direct, is_available};
use crate::arch::kernels::{Coefficients, Direct, Scratch, Sight, Tokens};

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
                    let to: Vec<u32> = diagonal.map_or(vec![], |diagonal| {
                        let to = |t: usize| (t as isize + diagonal + 1).clamp(0, nk as isize);
                        (0..nq).map(|t| to(t) as u32).collect()
                    });
                    run(&mut Direct {
                        d_key,
                        queries: Tokens { x: &q, ld: q_ld, count: nq },
                        keys: Tokens { x: &k, ld: k_ld, count: nk },
                        values: &values,
                        padded,
                        sight: Sight { from: &[], to: &to },
                        fading: None,
                        coefficients: Coefficients::Same(coefficients),
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
