//! The tile registers: eight of up to 16 rows of 64 bytes, and a product of bf16 pairs.

use std::arch::asm;

/// Rows and row lengths of the eight tile registers, as LDTILECFG takes them.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub(super) struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// Full rows of 64 bytes; as many of them as given.
    pub(super) const fn new(rows: [u8; 8]) -> Self {
        let mut shapes = Shapes {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        let mut i = 0;
        while i < 8 {
            shapes.row_bytes[i] = 64;
            shapes.rows[i] = rows[i];
            i += 1;
        }
        shapes
    }

    /// Rows of register `i`.
    #[cfg(test)]
    pub(super) fn rows(&self, i: usize) -> usize {
        self.rows[i] as usize
    }
}

/// What the kernels do with tile registers. Strides are counted in elements of four bytes.
///
/// # Safety
/// All methods are unsafe: the machine must have what the implementor uses, `configure` must have
/// come first, registers must be below 8, and the memory of a register's rows must be there.
pub(super) trait Tiles {
    unsafe fn configure(&mut self, shapes: &Shapes);
    /// Gives the registers back: nothing of them is left to be saved at a context switch.
    unsafe fn release(&mut self);
    unsafe fn zero<const C: usize>(&mut self);
    unsafe fn load<const C: usize>(&mut self, from: *const f32, stride: usize);
    unsafe fn store<const C: usize>(&mut self, to: *mut f32, stride: usize);
    /// c[m][n] += Σ_k a[m][k] · b[k / 2][n][k % 2], all of a and b bf16, c f32.
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self);
}

/// The machine's own.
pub(super) struct Amx;

/// One instruction on tile registers. They are all declared as changed: no compiler uses them, and
/// one that did would have to keep off them between these instructions.
macro_rules! tile {
    ($($body:tt)*) => {
        asm!(
            $($body)*,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        )
    };
}

impl Tiles for Amx {
    #[inline(always)]
    unsafe fn configure(&mut self, shapes: &Shapes) {
        // SAFETY: the machine has AMX; the shapes are valid for palette 1.
        unsafe { tile!("ldtilecfg [{}]", in(reg) shapes) };
    }

    #[inline(always)]
    unsafe fn release(&mut self) {
        // SAFETY: the machine has AMX.
        unsafe { tile!("tilerelease") };
    }

    #[inline(always)]
    unsafe fn zero<const C: usize>(&mut self) {
        // SAFETY: forwarded.
        unsafe { tile!("tilezero tmm{c}", c = const C) };
    }

    #[inline(always)]
    unsafe fn load<const C: usize>(&mut self, from: *const f32, stride: usize) {
        // SAFETY: forwarded.
        unsafe {
            tile!("tileloadd tmm{c}, [{p} + {s} * 4]", c = const C, p = in(reg) from, s = in(reg) stride);
        }
    }

    #[inline(always)]
    unsafe fn store<const C: usize>(&mut self, to: *mut f32, stride: usize) {
        // SAFETY: forwarded.
        unsafe {
            tile!("tilestored [{p} + {s} * 4], tmm{c}", c = const C, p = in(reg) to, s = in(reg) stride);
        }
    }

    #[inline(always)]
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: forwarded.
        unsafe { tile!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B) };
    }
}

/// Whether the processor has AMX with bf16 and the system lets this process use it. Asks the
/// system once per process.
pub(super) fn available() -> bool {
    static AVAILABLE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *AVAILABLE.get_or_init(|| processor_has_it() && system_saves_it() && system_allows_it())
}

#[allow(unused_unsafe)] // Newer compilers know that CPUID does no harm.
fn processor_has_it() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    // SAFETY: every x86-64 processor has CPUID.
    unsafe {
        const TILE: u32 = 1 << 24;
        const BF16: u32 = 1 << 22;
        __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (TILE | BF16) == TILE | BF16
    }
}

/// Tile configuration and data are among what the system saves at a context switch.
#[allow(unused_unsafe)]
fn system_saves_it() -> bool {
    const TILES: u64 = 0b11 << 17;
    #[target_feature(enable = "xsave")]
    fn saved() -> u64 {
        // SAFETY: register 0 is there wherever XGETBV is.
        unsafe { std::arch::x86_64::_xgetbv(0) }
    }
    // SAFETY: XGETBV is there when OSXSAVE is set.
    unsafe { std::arch::x86_64::__cpuid(1).ecx & 1 << 27 != 0 && saved() & TILES == TILES }
}

/// Linux hands out tile data on request, once for all threads of a process.
#[cfg(target_os = "linux")]
fn system_allows_it() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: this system call touches no memory of ours.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Elsewhere how to ask is not known to this program.
#[cfg(not(target_os = "linux"))]
fn system_allows_it() -> bool {
    false
}
