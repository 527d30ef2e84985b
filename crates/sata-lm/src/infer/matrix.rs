//! Weight matrices as they lie in memory.

use half::{bf16, f16};
use rayon::prelude::*;

use super::lanes::Weight;
use super::matvec::{Kernels, PANEL, Product, SMALL};

/// A cache line, to which matrices are aligned.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A type that weights are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    F16,
    Bf16,
    F32,
}

impl Type {
    pub(super) fn bytes(self) -> usize {
        match self {
            Type::F16 | Type::Bf16 => 2,
            Type::F32 => 4,
        }
    }

    /// One number of little-endian bytes.
    pub(super) fn read(self, bytes: &[u8]) -> f32 {
        match (self, bytes) {
            (Type::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
            (Type::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
            (Type::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            _ => f32::NAN,
        }
    }
}

/// A matrix in panels, as `matvec` reads it.
pub(super) struct Matrix {
    lines: Box<[Line]>,
    kind: Type,
    rows: usize,
    columns: usize,
}

impl Matrix {
    /// Rows of little-endian numbers, from several tensors of `columns` columns one below another.
    /// All keep their type if it is one; else they become f32.
    pub(super) fn new(parts: &[(Type, &[u8])], columns: usize) -> Self {
        let first = parts.first().map_or(Type::F32, |(kind, _)| *kind);
        let kind = if parts.iter().all(|(kind, _)| *kind == first) { first } else { Type::F32 };
        let rows_of = |(kind, bytes): &(Type, &[u8])| bytes.len() / (kind.bytes() * columns);
        let rows: usize = parts.iter().map(rows_of).sum();
        let padded = rows.next_multiple_of(SMALL);
        let width = kind.bytes();
        let mut lines = vec![Line([0; 64]); (padded * columns * width).div_ceil(64)];
        let out = lines.as_flattened_bytes();
        let mut row = 0;
        for part in parts {
            let (from, bytes) = part;
            for line in bytes.chunks_exact(from.bytes() * columns) {
                let panel = row / PANEL * PANEL;
                let lanes = PANEL.min(padded - panel);
                for (c, number) in line.chunks_exact(from.bytes()).enumerate() {
                    let at = (panel * columns + c * lanes + row - panel) * width;
                    if *from == kind {
                        out[at..at + width].copy_from_slice(number);
                    } else {
                        out[at..at + width].copy_from_slice(&from.read(number).to_le_bytes());
                    }
                }
                row += 1;
            }
        }
        if cfg!(target_endian = "big") {
            out.chunks_exact_mut(width).for_each(<[u8]>::reverse);
        }
        Matrix { lines: lines.into(), kind, rows, columns }
    }

    /// Rows in whole vectors: what an output must have room for.
    pub(super) fn padded(&self) -> usize {
        self.rows.next_multiple_of(SMALL)
    }

    /// Bytes that a product reads.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.lines[..])
    }

    fn weights<W: Weight>(&self) -> &[W] {
        let len = self.padded() * self.columns;
        assert!(len * size_of::<W>() <= self.bytes() && align_of::<W>() <= 64);
        // SAFETY: the length was checked just now; W is a plain number, for which any bits do.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), len) }
    }

    /// Row `row` as f32.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        match self.kind {
            Type::F16 => self.row_of::<f16>(row, out),
            Type::Bf16 => self.row_of::<bf16>(row, out),
            Type::F32 => self.row_of::<f32>(row, out),
        }
    }

    fn row_of<W: Weight>(&self, row: usize, out: &mut [f32]) {
        let panel = row / PANEL * PANEL;
        let lanes = PANEL.min(self.padded() - panel);
        let from = &self.weights::<W>()[panel * self.columns + row - panel..];
        for (to, from) in out.iter_mut().zip(from.iter().step_by(lanes)) {
            *to = from.to_f32();
        }
    }

    /// `y[t] = self · x[t]` for `tokens` tokens: x `[tokens][x_stride]`, y `[tokens][y_stride]`,
    /// `y_stride` at least [`Self::padded`].
    pub(super) fn times(
        &self,
        kernels: &Kernels,
        tokens: usize,
        (x, x_stride): (&[f32], usize),
        (y, y_stride): (&mut [f32], usize),
    ) {
        /// Tokens from which on threads are worth their while.
        const MANY: usize = 32;
        /// Tokens of one task.
        const TASK: usize = 16;
        if tokens < MANY || rayon::current_num_threads() == 1 {
            return self.part(kernels, tokens, (x, x_stride), (y, y_stride));
        }
        y[..(tokens - 1) * y_stride + self.padded()]
            .par_chunks_mut(TASK * y_stride)
            .zip(x.par_chunks(TASK * x_stride))
            .enumerate()
            .for_each(|(task, (y, x))| {
                let tokens = TASK.min(tokens - task * TASK);
                self.part(kernels, tokens, (x, x_stride), (y, y_stride));
            });
    }

    fn part(
        &self,
        kernels: &Kernels,
        tokens: usize,
        (x, x_stride): (&[f32], usize),
        (y, y_stride): (&mut [f32], usize),
    ) {
        let (padded, columns) = (self.padded(), self.columns);
        // SAFETY: kernels are only handed out for instructions that are there.
        unsafe {
            match self.kind {
                Type::F16 => {
                    let w = self.weights();
                    (kernels.f16)(&mut Product {
                        w,
                        padded,
                        columns,
                        tokens,
                        x,
                        x_stride,
                        y,
                        y_stride,
                    })
                }
                Type::Bf16 => {
                    let w = self.weights();
                    (kernels.bf16)(&mut Product {
                        w,
                        padded,
                        columns,
                        tokens,
                        x,
                        x_stride,
                        y,
                        y_stride,
                    })
                }
                Type::F32 => {
                    let w = self.weights();
                    (kernels.f32)(&mut Product {
                        w,
                        padded,
                        columns,
                        tokens,
                        x,
                        x_stride,
                        y,
                        y_stride,
                    })
                }
            }
        }
    }
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Matrix({:?}, {} × {})", self.kind, self.rows, self.columns)
    }
}

trait AsFlattenedBytes {
    fn as_flattened_bytes(&mut self) -> &mut [u8];
}

impl AsFlattenedBytes for [Line] {
    fn as_flattened_bytes(&mut self) -> &mut [u8] {
        // SAFETY: a line is 64 bytes without padding.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), size_of_val(self)) }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::infer::matvec::all;

    #[test]
    fn products_are_those_of_plain_loops() {
        let seed: u64 = rand::random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        for kernels in all() {
            for kind in [Type::F16, Type::Bf16, Type::F32] {
                // Rows around vectors and panels, tokens around those taken at once and by a task.
                for rows in [1, 15, 16, 17, 63, 64, 65, 129] {
                    for tokens in [1, 2, 7, 8, 9, 31, 32, 33] {
                        let columns = rng.random_range(1..40);
                        let numbers: Vec<f32> =
                            (0..rows * columns).map(|_| rng.random_range(-1.0..1.0)).collect();
                        let bytes: Vec<u8> = numbers
                            .iter()
                            .flat_map(|&x| match kind {
                                Type::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
                                Type::Bf16 => bf16::from_f32(x).to_le_bytes().to_vec(),
                                Type::F32 => x.to_le_bytes().to_vec(),
                            })
                            .collect();
                        let w: Vec<f32> =
                            bytes.chunks_exact(kind.bytes()).map(|x| kind.read(x)).collect();
                        let (top, bottom) = bytes.split_at(rows / 2 * columns * kind.bytes());
                        let matrix = Matrix::new(&[(kind, top), (kind, bottom)], columns);
                        let x_stride = columns + rng.random_range(0..3);
                        let x: Vec<f32> =
                            (0..tokens * x_stride).map(|_| rng.random_range(-1.0..1.0)).collect();
                        let y_stride = matrix.padded() + rng.random_range(0..3);
                        let mut y = vec![f32::NAN; tokens * y_stride];
                        matrix.times(kernels, tokens, (&x, x_stride), (&mut y, y_stride));
                        for t in 0..tokens {
                            for r in 0..rows {
                                let row = &w[r * columns..][..columns];
                                let want: f64 = row
                                    .iter()
                                    .zip(&x[t * x_stride..])
                                    .map(|(&w, &x)| f64::from(w) * f64::from(x))
                                    .sum();
                                let got = f64::from(y[t * y_stride + r]);
                                assert!(
                                    (got - want).abs() < 1e-5,
                                    "{} {kind:?} {rows} × {columns}, {tokens} tokens, row {r}: \
                                     {got} instead of {want}",
                                    kernels.name
                                );
                            }
                        }
                        let mut row = vec![f32::NAN; columns];
                        matrix.row(rows - 1, &mut row);
                        assert_eq!(row, w[(rows - 1) * columns..]);
                    }
                }
            }
        }
    }
}
