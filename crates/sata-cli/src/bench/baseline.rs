//! What the engine is compared with: a matrix product and a plain read.

use std::hint::black_box;

use super::inputs::{normal, rng};
use super::median;
use crate::failure::Outcome;

/// FLOP/s of the `gemm` crate on a 1024³ product of f32, on `threads` threads.
pub fn gemm(threads: usize) -> Outcome<f64> {
    const N: usize = 1024;
    let mut rng = rng();
    let (a, b): (Vec<f32>, Vec<f32>) = (normal(&mut rng, N * N), normal(&mut rng, N * N));
    let mut c = vec![0f32; N * N];
    let parallelism =
        if threads > 1 { gemm::Parallelism::Rayon(threads) } else { gemm::Parallelism::None };
    let time = median(21, || {
        // SAFETY: a, b and c are N × N, column-major with leading dimension N.
        unsafe {
            gemm::gemm(
                N,
                N,
                N,
                c.as_mut_ptr(),
                N as isize,
                1,
                false,
                a.as_ptr(),
                N as isize,
                1,
                b.as_ptr(),
                N as isize,
                1,
                0f32,
                1f32,
                false,
                false,
                false,
                parallelism,
            );
        }
        black_box(&mut c);
        Ok(())
    })?;
    Ok(2.0 * (N as f64).powi(3) / time)
}

/// Bytes per second of reading `parts` one after another on this thread.
pub fn read(parts: &[&[f32]], runs: usize) -> Outcome<f64> {
    let bytes: usize = parts.iter().map(|part| size_of_val(*part)).sum();
    let time = median(runs, || {
        read_once(parts);
        Ok(())
    })?;
    Ok(bytes as f64 / time)
}

/// Reads `parts` one after another.
pub fn read_once(parts: &[&[f32]]) {
    black_box(parts.iter().map(|part| sum(part)).sum::<f32>());
}

fn sum(x: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            #[target_feature(enable = "avx512f")]
            fn wide(x: &[f32]) -> f32 {
                lanes(x)
            }
            // SAFETY: the instructions were found just now.
            return unsafe { wide(x) };
        }
        if is_x86_feature_detected!("avx2") {
            #[target_feature(enable = "avx2")]
            fn wide(x: &[f32]) -> f32 {
                lanes(x)
            }
            // SAFETY: the instructions were found just now.
            return unsafe { wide(x) };
        }
    }
    lanes(x)
}

/// A sum in 128 lanes: enough in flight to be bound by memory alone.
#[inline(always)]
fn lanes(x: &[f32]) -> f32 {
    let mut lanes = [0f32; 128];
    let (chunks, rest) = x.as_chunks::<128>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x;
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
}
