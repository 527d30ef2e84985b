//! The tile unit in plain code.

use crate::arch::amx::tiles::{Shapes, Tiles};

/// The tile unit in plain code.
pub(super) struct Emulated {
    shapes: Option<Shapes>,
    registers: [[[f32; 16]; 16]; 8],
}

impl Emulated {
    pub(super) fn new() -> Self {
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
