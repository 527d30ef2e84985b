//! How numbers are stored in GGUF tensors: plain, or in blocks that share a scale.
//!
//! Layouts are those of ggml's `block_*` structures, little-endian throughout. A value of a block is
//! d·q or d·q + m in f32, as its reference code has it.

use half::{bf16, f16};

/// What is read, for messages.
pub(super) const KNOWN: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K";

/// A type of storage that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 32-bit floating point.
    F32,
    /// 16-bit IEEE.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// 32 numbers: f16 scale, 4-bit q − 8.
    Q4_0,
    /// 32 numbers: f16 scale and minimum, 4-bit q.
    Q4_1,
    /// 32 numbers: f16 scale, 5-bit q − 16.
    Q5_0,
    /// 32 numbers: f16 scale and minimum, 5-bit q.
    Q5_1,
    /// 32 numbers: f16 scale, 8-bit q.
    Q8_0,
    /// 256 numbers in 8 groups, each with 6-bit scale and minimum, 4-bit q.
    Q4K,
    /// The same with 5-bit q.
    Q5K,
    /// 256 numbers in 16 groups, each with an 8-bit scale, 6-bit q − 32.
    Q6K,
}

/// Names by the format's numbers.
const NAMES: [&str; 31] = [
    "F32", "F16", "Q4_0", "Q4_1", "type 4", "type 5", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K",
    "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL",
    "IQ3_S", "IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16",
];

/// What a type is called.
pub(super) fn name(kind: u32) -> String {
    let known = usize::try_from(kind).ok().and_then(|kind| NAMES.get(kind));
    known.map_or_else(|| format!("type {kind}"), |name| name.to_string())
}

impl Kind {
    /// The type of this number, if it is read.
    pub(super) fn of(number: u32) -> Option<Self> {
        Some(match number {
            0 => Kind::F32,
            1 => Kind::F16,
            2 => Kind::Q4_0,
            3 => Kind::Q4_1,
            6 => Kind::Q5_0,
            7 => Kind::Q5_1,
            8 => Kind::Q8_0,
            12 => Kind::Q4K,
            13 => Kind::Q5K,
            14 => Kind::Q6K,
            30 => Kind::Bf16,
            _ => return None,
        })
    }

    fn number(self) -> u32 {
        match self {
            Kind::F32 => 0,
            Kind::F16 => 1,
            Kind::Q4_0 => 2,
            Kind::Q4_1 => 3,
            Kind::Q5_0 => 6,
            Kind::Q5_1 => 7,
            Kind::Q8_0 => 8,
            Kind::Q4K => 12,
            Kind::Q5K => 13,
            Kind::Q6K => 14,
            Kind::Bf16 => 30,
        }
    }

    /// Its name.
    pub fn name(self) -> String {
        name(self.number())
    }

    /// Numbers in a block.
    pub fn block(self) -> usize {
        match self {
            Kind::F32 | Kind::F16 | Kind::Bf16 => 1,
            Kind::Q4_0 | Kind::Q4_1 | Kind::Q5_0 | Kind::Q5_1 | Kind::Q8_0 => 32,
            Kind::Q4K | Kind::Q5K | Kind::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Kind::F32 => 4,
            Kind::F16 | Kind::Bf16 => 2,
            Kind::Q4_0 => 2 + 16,
            Kind::Q4_1 => 4 + 16,
            Kind::Q5_0 => 2 + 4 + 16,
            Kind::Q5_1 => 4 + 4 + 16,
            Kind::Q8_0 => 2 + 32,
            Kind::Q4K => 4 + 12 + 128,
            Kind::Q5K => 4 + 12 + 32 + 128,
            Kind::Q6K => 128 + 64 + 16 + 2,
        }
    }

    /// Bytes of a tensor of this shape; `None` where a row is not of whole blocks.
    pub fn bytes(self, shape: &[usize]) -> Option<usize> {
        let row = *shape.last()?;
        let elements = shape.iter().try_fold(1usize, |n, size| n.checked_mul(*size))?;
        if !row.is_multiple_of(self.block()) {
            return None;
        }
        (elements / self.block()).checked_mul(self.block_bytes())
    }

    /// Numbers of whole blocks.
    pub(super) fn read(self, bytes: &[u8], elements: usize) -> Vec<f32> {
        let mut out = vec![0.0; elements];
        let decode: fn(&[u8], &mut [f32]) = match self {
            Kind::F32 => |b, out| out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Kind::F16 => |b, out| out[0] = half(b),
            Kind::Bf16 => |b, out| out[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            Kind::Q4_0 => q4_0,
            Kind::Q4_1 => q4_1,
            Kind::Q5_0 => q5_0,
            Kind::Q5_1 => q5_1,
            Kind::Q8_0 => q8_0,
            Kind::Q4K => q4_k,
            Kind::Q5K => q5_k,
            Kind::Q6K => q6_k,
        };
        let blocks = bytes.chunks_exact(self.block_bytes());
        for (block, out) in blocks.zip(out.chunks_exact_mut(self.block())) {
            decode(block, out);
        }
        out
    }
}

fn half(b: &[u8]) -> f32 {
    f16::from_le_bytes([b[0], b[1]]).to_f32()
}

/// The low halves of 16 bytes are the first 16 numbers, the high halves the others.
fn nibbles(bytes: &[u8], out: &mut [f32], number: impl Fn(usize, u8) -> f32) {
    for (i, &byte) in bytes.iter().enumerate() {
        out[i] = number(i, byte & 15);
        out[i + 16] = number(i + 16, byte >> 4);
    }
}

fn q4_0(b: &[u8], out: &mut [f32]) {
    let d = half(b);
    nibbles(&b[2..18], out, |_, q| d * (f32::from(q) - 8.0));
}

fn q4_1(b: &[u8], out: &mut [f32]) {
    let (d, m) = (half(b), half(&b[2..]));
    nibbles(&b[4..20], out, |_, q| d * f32::from(q) + m);
}

/// The fifth bit of number i is bit i of 32.
fn fifth(b: &[u8], i: usize) -> f32 {
    if u32::from_le_bytes([b[0], b[1], b[2], b[3]]) >> i & 1 == 1 { 16.0 } else { 0.0 }
}

fn q5_0(b: &[u8], out: &mut [f32]) {
    let d = half(b);
    nibbles(&b[6..22], out, |i, q| d * (f32::from(q) + fifth(&b[2..6], i) - 16.0));
}

fn q5_1(b: &[u8], out: &mut [f32]) {
    let (d, m) = (half(b), half(&b[2..]));
    nibbles(&b[8..24], out, |i, q| d * (f32::from(q) + fifth(&b[4..8], i)) + m);
}

fn q8_0(b: &[u8], out: &mut [f32]) {
    let d = half(b);
    for (out, &q) in out.iter_mut().zip(&b[2..34]) {
        *out = d * f32::from(q as i8);
    }
}

/// Six-bit scale and minimum of group `j` of 8, from 12 bytes.
fn scale_and_minimum(b: &[u8], j: usize) -> (f32, f32) {
    let (scale, minimum) = if j < 4 {
        (b[j] & 63, b[j + 4] & 63)
    } else {
        ((b[j + 4] & 15) | (b[j - 4] >> 6 << 4), (b[j + 4] >> 4) | (b[j] >> 6 << 4))
    };
    (scale.into(), minimum.into())
}

fn q4_k(b: &[u8], out: &mut [f32]) {
    let (d, least) = (half(b), half(&b[2..]));
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(&b[4..16], j);
        let (scale, minimum) = (d * scale, least * minimum);
        // Groups come in pairs, which share 32 bytes.
        let bytes = &b[16 + j / 2 * 32..][..32];
        for (out, byte) in out.iter_mut().zip(bytes) {
            let q = if j.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
            *out = scale * f32::from(q) - minimum;
        }
    }
}

fn q5_k(b: &[u8], out: &mut [f32]) {
    let (d, least) = (half(b), half(&b[2..]));
    let high = &b[16..48];
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(&b[4..16], j);
        let (scale, minimum) = (d * scale, least * minimum);
        let bytes = &b[48 + j / 2 * 32..][..32];
        for ((out, byte), high) in out.iter_mut().zip(bytes).zip(high) {
            let q = if j.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
            let fifth = if high >> j & 1 == 1 { 16.0 } else { 0.0 };
            *out = scale * (f32::from(q) + fifth) - minimum;
        }
    }
}

fn q6_k(b: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&b[..128], &b[128..192], &b[192..208]);
    let d = half(&b[208..]);
    for (n, out) in out.chunks_exact_mut(128).enumerate() {
        let (low, high, scales) = (&low[n * 64..], &high[n * 32..], &scales[n * 8..]);
        for l in 0..32 {
            for part in 0..4 {
                let byte = low[l + part % 2 * 32];
                let four = if part < 2 { byte & 15 } else { byte >> 4 };
                let q = four | (high[l] >> (2 * part) & 3) << 4;
                let scale = f32::from(scales[l / 16 + 2 * part] as i8);
                out[l + 32 * part] = d * scale * (f32::from(q) - 32.0);
            }
        }
    }
}
