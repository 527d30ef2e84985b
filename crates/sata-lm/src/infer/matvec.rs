//! Products of a matrix with the vectors of some tokens, and the element-wise rest of a layer, for
//! each instruction set.
//!
//! A matrix lies in panels of [`PANEL`] rows, column by column, so that lanes are rows: memory is
//! read in order, and nothing is summed across lanes. Each output is one sum over the columns in
//! their order, whatever the number of tokens and the width of the vectors.

use half::{bf16, f16};

use super::lanes::{Four, Lanes, Weight};

/// Rows of a panel; the last one has what is left, in whole [`SMALL`]s.
pub(super) const PANEL: usize = 64;
/// Rows that are padded to.
pub(super) const SMALL: usize = 16;

/// One product: `y[t][r] = Σ_c w[r][c] x[t][c]`.
pub(super) struct Product<'a, W> {
    /// `[padded][columns]`, in panels.
    pub w: &'a [W],
    /// Rows, a multiple of [`SMALL`].
    pub padded: usize,
    pub columns: usize,
    pub tokens: usize,
    /// `[tokens][x_stride]`.
    pub x: &'a [f32],
    pub x_stride: usize,
    /// `[tokens][y_stride]`.
    pub y: &'a mut [f32],
    pub y_stride: usize,
}

/// `R` vectors of rows by `T` tokens.
///
/// # Safety
/// The machine has V's instructions; `w` has `columns` rows of `lanes`, `x` and `y` what their
/// strides and T say.
#[inline(always)]
unsafe fn block<V: Lanes, W: Weight, const R: usize, const T: usize>(
    w: *const W,
    lanes: usize,
    columns: usize,
    (x, x_stride): (*const f32, usize),
    (y, y_stride): (*mut f32, usize),
) {
    // SAFETY: forwarded.
    unsafe {
        let mut sums = [[V::splat(0.0); R]; T];
        let mut w = w;
        for c in 0..columns {
            if T == 1 {
                // One after another: not all fit in registers beside the sums.
                let x = V::splat(*x.add(c));
                for (r, sum) in sums[0].iter_mut().enumerate() {
                    *sum = W::load::<V>(w.add(r * V::N)).mul_add(x, *sum);
                }
            } else {
                let mut weights = [V::splat(0.0); R];
                for (r, weight) in weights.iter_mut().enumerate() {
                    *weight = W::load(w.add(r * V::N));
                }
                for (t, sums) in sums.iter_mut().enumerate() {
                    let x = V::splat(*x.add(t * x_stride + c));
                    for (sum, weight) in sums.iter_mut().zip(weights) {
                        *sum = weight.mul_add(x, *sum);
                    }
                }
            }
            w = w.add(lanes);
        }
        for (t, sums) in sums.iter().enumerate() {
            for (r, sum) in sums.iter().enumerate() {
                sum.store(y.add(t * y_stride + r * V::N));
            }
        }
    }
}

/// See [`Product`]. `ALL` vectors are a panel, `SOME` are [`SMALL`] rows; tokens go by `T`.
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
unsafe fn product<V: Lanes, W: Weight, const ALL: usize, const SOME: usize, const T: usize>(
    a: &mut Product<'_, W>,
) {
    const { assert!(ALL * V::N == PANEL && SOME * V::N == SMALL) };
    let (columns, tokens) = (a.columns, a.tokens);
    assert!(a.padded.is_multiple_of(SMALL) && a.w.len() >= a.padded * columns);
    assert!(a.x_stride >= columns && a.x.len() + a.x_stride >= tokens * a.x_stride + columns);
    assert!(a.y_stride >= a.padded && a.y.len() + a.y_stride >= tokens * a.y_stride + a.padded);
    let mut first = 0;
    while first < a.padded {
        let lanes = PANEL.min(a.padded - first);
        // SAFETY: lengths were checked just now; panels lie one after another.
        unsafe {
            let w = a.w.as_ptr().add(first * columns);
            let mut t = 0;
            while t < tokens {
                let x = (a.x.as_ptr().add(t * a.x_stride), a.x_stride);
                let y = a.y.as_mut_ptr().add(t * a.y_stride + first);
                let many = tokens - t >= T;
                if !many && lanes == PANEL {
                    block::<V, W, ALL, 1>(w, lanes, columns, x, (y, a.y_stride));
                    t += 1;
                    continue;
                }
                for r in (0..lanes).step_by(SMALL) {
                    let (w, y) = (w.add(r), (y.add(r), a.y_stride));
                    if many {
                        block::<V, W, SOME, T>(w, lanes, columns, x, y);
                    } else {
                        block::<V, W, SOME, 1>(w, lanes, columns, x, y);
                    }
                }
                t += if many { T } else { 1 };
            }
        }
        first += lanes;
    }
}

/// e^x to about one unit in the last place, for x below 88; NaN stays NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let mut y = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        y = y * r + c;
    }
    y * f32::from_bits(((n as i32 + 127) << 23) as u32)
}

/// `gate = silu(gate) · up`.
#[inline(always)]
fn gated(gate: &mut [f32], up: &[f32]) {
    for (g, &u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp(-*g)) * u;
    }
}

/// `out = x / √(mean x² + ε) · weight`.
#[inline(always)]
fn norm(x: &[f32], weight: &[f32], eps: f64, out: &mut [f32]) {
    let mut lanes = [0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x * x;
        }
    }
    let mut sum: f32 = lanes.iter().sum();
    sum += rest.iter().map(|x| x * x).sum::<f32>();
    let by = (1.0 / (f64::from(sum) / x.len() as f64 + eps).sqrt()) as f32;
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        *out = x * by * w;
    }
}

/// Each row of `weight.len()` elements becomes its norm.
#[inline(always)]
fn norm_rows(x: &mut [f32], weight: &[f32], eps: f64) {
    for row in x.chunks_exact_mut(weight.len()) {
        let mut lanes = [0f32; 8];
        for part in row.chunks(8) {
            for (lane, x) in lanes.iter_mut().zip(part) {
                *lane += x * x;
            }
        }
        let [a, b, c, d, e, f, g, h] = lanes;
        let sum = ((a + b) + (c + d)) + ((e + f) + (g + h));
        let by = 1.0 / (sum / row.len() as f32 + eps as f32).sqrt();
        for (x, w) in row.iter_mut().zip(weight) {
            *x *= by * w;
        }
    }
}

/// One query against a KV cache.
pub(super) struct Attend<'a> {
    /// `[d_key]`, with the scale.
    pub query: &'a [f32],
    /// `[blocks][d_key][BLOCK]`.
    pub keys: &'a [f32],
    /// `[tokens][padded]`, padded a multiple of [`VALUE_LANES`].
    pub values: &'a [f32],
    pub padded: usize,
    pub tokens: usize,
    /// Logarithm of all decay up to each token, `[tokens]`; empty without decay.
    pub fading: &'a [f64],
    /// Whole blocks of tokens.
    pub weights: &'a mut [f32],
    /// At most `padded`.
    pub out: &'a mut [f32],
}

/// Tokens of a block of keys.
pub(super) const BLOCK: usize = 16;
/// What values are padded to.
pub(super) const VALUE_LANES: usize = 8;

/// See [`Attend`].
#[inline(always)]
fn attend(a: &mut Attend<'_>) {
    let tokens = a.tokens;
    let (blocks, _) = a.weights.as_chunks_mut::<BLOCK>();
    let each = a.query.len() * BLOCK;
    let mut most = [f32::NEG_INFINITY; BLOCK];
    for (b, weights) in blocks[..tokens.div_ceil(BLOCK)].iter_mut().enumerate() {
        let (keys, _) = a.keys[b * each..(b + 1) * each].as_chunks::<BLOCK>();
        let mut x = [0f32; BLOCK];
        for (q, keys) in a.query.iter().zip(keys) {
            for (x, k) in x.iter_mut().zip(keys) {
                *x += q * k;
            }
        }
        let live = (tokens - b * BLOCK).min(BLOCK);
        if let Some(now) = a.fading.get(tokens - 1) {
            for (x, g) in x.iter_mut().zip(&a.fading[b * BLOCK..][..live]) {
                *x += (now - g) as f32;
            }
        }
        x[live..].fill(f32::NEG_INFINITY);
        for (most, x) in most.iter_mut().zip(x) {
            *most = if x <= *most { *most } else { x };
        }
        *weights = x;
    }
    // Written so that NaN stays.
    let most = most.iter().fold(f32::NEG_INFINITY, |most, &x| if x <= most { most } else { x });
    let mut total = [0f32; BLOCK];
    for weights in &mut blocks[..tokens.div_ceil(BLOCK)] {
        for (w, total) in weights.iter_mut().zip(&mut total) {
            let x = *w - most;
            *w = if x < -80.0 { 0.0 } else { exp(x) };
            *total += *w;
        }
    }
    let by = 1.0 / total.iter().sum::<f32>();
    let weights = &a.weights[..tokens];
    for (first, out) in a.out.chunks_mut(VALUE_LANES).enumerate() {
        let values = &a.values[first * VALUE_LANES..];
        let mut sums = [[0f32; VALUE_LANES]; 4];
        let (fours, rest) = weights.as_chunks::<4>();
        let mut at = 0;
        for four in fours {
            for (w, sums) in four.iter().zip(&mut sums) {
                for (sum, v) in sums.iter_mut().zip(&values[at..at + VALUE_LANES]) {
                    *sum += w * v;
                }
                at += a.padded;
            }
        }
        for w in rest {
            for (sum, v) in sums[0].iter_mut().zip(&values[at..at + VALUE_LANES]) {
                *sum += w * v;
            }
            at += a.padded;
        }
        for (i, out) in out.iter_mut().enumerate() {
            *out = ((sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i])) * by;
        }
    }
}

/// The entry points of one instruction set.
///
/// Every function is unsafe for one reason: the machine must have the instructions. A table is
/// only handed out by [`kernels`], for those that are there.
#[derive(Debug)]
pub(super) struct Kernels {
    pub name: &'static str,
    pub f16: unsafe fn(&mut Product<'_, f16>),
    pub bf16: unsafe fn(&mut Product<'_, bf16>),
    pub f32: unsafe fn(&mut Product<'_, f32>),
    pub gated: unsafe fn(&mut [f32], &[f32]),
    pub norm: unsafe fn(&[f32], &[f32], f64, &mut [f32]),
    pub norm_rows: unsafe fn(&mut [f32], &[f32], f64),
    pub attend: unsafe fn(&mut Attend<'_>),
    /// In place.
    pub exp: unsafe fn(&mut [f32]),
}

macro_rules! entry_points {
    ($(#[$attribute:meta])* $module:ident, $vector:ty, $all:literal, $some:literal, $tokens:literal $(, $features:literal)?) => {
        $(#[$attribute])*
        mod $module {
            use super::*;

            $(#[target_feature(enable = $features)])?
            unsafe fn f16(a: &mut Product<'_, half::f16>) {
                // SAFETY: the caller has made sure of the instructions.
                unsafe { product::<$vector, _, $all, $some, $tokens>(a) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn bf16(a: &mut Product<'_, half::bf16>) {
                // SAFETY: the caller has made sure of the instructions.
                unsafe { product::<$vector, _, $all, $some, $tokens>(a) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn f32(a: &mut Product<'_, f32>) {
                // SAFETY: the caller has made sure of the instructions.
                unsafe { product::<$vector, _, $all, $some, $tokens>(a) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn gated(gate: &mut [f32], up: &[f32]) {
                super::gated(gate, up);
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn norm(x: &[f32], weight: &[f32], eps: f64, out: &mut [f32]) {
                super::norm(x, weight, eps, out);
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn norm_rows(x: &mut [f32], weight: &[f32], eps: f64) {
                super::norm_rows(x, weight, eps);
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn attend(a: &mut Attend<'_>) {
                super::attend(a);
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn exp(x: &mut [f32]) {
                x.iter_mut().for_each(|x| *x = super::exp(*x));
            }

            pub(super) static KERNELS: Kernels = Kernels {
                name: stringify!($module),
                f16,
                bf16,
                f32,
                gated,
                norm,
                norm_rows,
                attend,
                exp,
            };
        }
    };
}

entry_points!(portable, Four, 16, 4, 2);
entry_points!(
    #[cfg(target_arch = "x86_64")]
    avx2,
    crate::infer::lanes::Eight,
    8,
    2,
    4,
    "avx2,fma,f16c"
);
entry_points!(
    #[cfg(target_arch = "x86_64")]
    avx512,
    crate::infer::lanes::Sixteen,
    4,
    1,
    8,
    "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"
);

/// The best for this machine, or what `SATA_SIMD` asks for.
///
/// # Errors
/// [`sata::Error::Level`] for an unknown or unavailable level.
pub(super) fn kernels() -> Result<&'static Kernels, sata::Error> {
    let level = sata::Level::detect()?;
    Ok(of_level(level, std::env::var_os("SATA_SIMD").is_some()))
}

/// Those of a level that is there; `forced` keeps to it where a lower one is faster.
fn of_level(level: sata::Level, forced: bool) -> &'static Kernels {
    #[cfg(target_arch = "x86_64")]
    {
        use sata::Level;
        // Levels do not say whether halves can be converted.
        if !is_x86_feature_detected!("f16c") {
            return &portable::KERNELS;
        }
        match level {
            Level::Portable => &portable::KERNELS,
            Level::Avx2 => &avx2::KERNELS,
            // Zen 4 converts eight halves a cycle, and sixteen in three.
            _ if is_amd() && !forced => &avx2::KERNELS,
            _ => &avx512::KERNELS,
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (level, forced);
        &portable::KERNELS
    }
}

#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    let name = core::arch::x86_64::__cpuid(0);
    [name.ebx, name.edx, name.ecx].map(u32::to_le_bytes) == [*b"Auth", *b"enti", *b"cAMD"]
}

/// Every table that this machine can run.
#[cfg(test)]
pub(super) fn all() -> Vec<&'static Kernels> {
    sata::Level::available().into_iter().map(|level| of_level(level, true)).collect()
}
