//! The units of the streaming kernels and the sizes they are specialised by.

use super::params::{Chains, Stream};
use super::program::Program;
use crate::{Unit, unit};

/// What the kernels of one spec are made for.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shape {
    pub d_key: usize,
    pub d_value: usize,
    /// P.
    pub terms: usize,
    /// Whether weights decay.
    pub fades: bool,
    /// Whether some are exact.
    pub near: bool,
    /// The features, or a part of them.
    pub program: Program,
    /// Whether other parts' numerators and denominators are added, and whether these are given on.
    pub takes: bool,
    pub gives: bool,
    /// Whether `stream_sixteen.cuh` computes it, whose features these are.
    pub sixteen: bool,
}

/// Accumulators of a thread that hold sums, at most: the other registers are for queries.
const MOST_SUMS: usize = 104;
/// Warps where one to four do not hold all sums.
const MOST_WARPS: usize = 8;

/// Elements of the keys that `stream_wide.cuh` is for.
pub(super) const WIDE: usize = 32;
/// Stages of keys for sums in its kernels that sum and that read; of pieces; of queries.
const WIDE_STAGES: [usize; 2] = [4, 3];
const WIDE_PIECES: usize = 4;
const WIDE_QUERIES: usize = 2;

/// A launch's blocks of threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Blocks {
    /// Units of one.
    pub units: usize,
    pub threads: usize,
    /// Bytes of shared memory.
    pub shared: usize,
}

impl Shape {
    /// Whether `wgmma` multiplies, in kernels of their own.
    pub(super) fn is_wide(&self) -> bool {
        self.d_key == WIDE
    }

    /// Columns of sums, in tiles of 8: a value, a one, zeros.
    fn column_tiles(&self) -> usize {
        self.d_value / 8 + 1
    }

    pub(super) fn columns(&self) -> usize {
        8 * self.column_tiles()
    }

    /// Warps of a unit: as few as hold its sums.
    pub(super) fn warps(&self) -> usize {
        let fits = |warps: usize| {
            self.program.tiles().div_ceil(warps) * self.column_tiles() * 4 <= MOST_SUMS
        };
        // All parts have the same.
        let few: &[usize] = if self.takes || self.gives { &[] } else { &[1, 2, 4] };
        few.iter().copied().find(|&warps| fits(warps)).unwrap_or(MOST_WARPS)
    }

    /// The shapes of as many launches as it takes for registers to hold the sums.
    pub(super) fn parts(&self) -> Vec<Shape> {
        if self.is_wide() {
            return vec![self.clone()];
        }
        let tiles = MOST_SUMS / (4 * self.column_tiles());
        let programs = self.program.parts(MOST_WARPS * tiles);
        let last = programs.len() - 1;
        let part = |(i, program)| Shape { program, takes: i > 0, gives: i < last, ..self.clone() };
        programs.into_iter().enumerate().map(part).collect()
    }

    /// Warps that share queries.
    fn split(&self) -> usize {
        if self.warps() == MOST_WARPS { 2 } else { 1 }
    }

    /// Tiles of 16 queries that a warp reads at once.
    fn row_tiles(&self) -> usize {
        if self.warps() > 8 { 1 } else { 2 }
    }

    /// Tokens of a chunk.
    pub(super) fn chunk(&self) -> usize {
        if self.is_wide() {
            return 128;
        }
        16 * self.row_tiles() * self.warps() / self.split()
    }

    /// Units of a block of threads.
    fn units(&self) -> usize {
        1
    }

    fn threads(&self) -> usize {
        32 * self.warps() * self.units()
    }

    /// The blocks that sum.
    pub(super) fn sums_blocks(&self) -> Blocks {
        match self {
            _ if self.is_wide() => {
                Blocks { units: 2, threads: 384, shared: 2 * self.wide_sum_bytes(0) }
            }
            _ if self.sixteen => {
                Blocks { units: 1, threads: 512, shared: self.sixteen_sum_bytes() }
            }
            _ => self.small_blocks(),
        }
    }

    fn small_blocks(&self) -> Blocks {
        Blocks { units: self.units(), threads: self.threads(), shared: self.shared() }
    }

    /// The blocks that read.
    pub(super) fn read_blocks(&self) -> Blocks {
        match self {
            _ if self.is_wide() => Blocks { units: 1, threads: 512, shared: self.wide_bytes() },
            _ if self.sixteen => Blocks { units: 1, threads: 512, shared: self.sixteen_bytes() },
            _ => self.small_blocks(),
        }
    }

    /// Blocks of threads that a multiprocessor runs at once at least: so many that registers hold all.
    fn least_residents(&self) -> usize {
        match self.warps() {
            1 => 12,
            warps => (8 / warps).max(1),
        }
    }

    /// Units of the blocks that read that a multiprocessor runs at once, when a thread has so many registers (of 65,536, a
    /// quarter per scheduler) and there are so many bytes of shared memory.
    pub(super) fn residents(&self, registers: u32, shared: usize) -> usize {
        if self.is_wide() || self.sixteen {
            return 1;
        }
        let registers = (registers as usize).next_multiple_of(8).max(32);
        let warps = 4 * (16_384 / (32 * registers));
        let by_shared = shared / (self.shared() + 1024);
        self.units() * (warps * 32 / self.threads()).min(by_shared).max(1)
    }

    /// Numbers in one set of sums.
    pub(super) fn elements(&self) -> usize {
        self.program.features() * self.columns()
    }

    /// Bytes of shared memory of a unit, as `stream.cuh` lays it out.
    fn unit_bytes(&self) -> usize {
        let (chunk, tiles) = (self.chunk(), self.column_tiles());
        let key = if self.d_key == 8 { 16 } else { 2 * self.d_key + 16 };
        let column = (tiles | 1) * 16;
        let g = usize::from(self.fades);
        let stage = chunk * (2 * key + column + 16 * g);
        let exchange = if self.split() > 1 {
            self.warps() / self.split() * self.row_tiles() * 32 * (tiles * 16 + 16)
        } else {
            0
        };
        2 * stage
            + chunk * self.d_key * 4
            + g * chunk * 12
            + self.program.features() * column
            + exchange
            + 64
    }

    /// Bytes of the stages of a unit's sums in `stream_wide.cuh`, where it sums or reads.
    fn wide_sum_bytes(&self, kernel: usize) -> usize {
        let (plane, g) = (64 * 16 + 32, usize::from(self.fades));
        let planes = 5 + self.d_value / 8;
        let stage = 4 * 65 * 32 + planes * plane + 128 + g * 64 * 8;
        (WIDE_STAGES[kernel] * (stage + 16)).next_multiple_of(128)
    }

    /// Bytes of shared memory of `stream_wide_read.cu`.
    fn wide_bytes(&self) -> usize {
        let (plane, g) = (64 * 16 + 32, usize::from(self.fades));
        let piece = (4 + self.column_tiles()) * plane + g * 64 * 16;
        let queries = 5 * (128 * 16 + 32) + g * (128 * 8 + 16);
        let features = self.program.features();
        self.wide_sum_bytes(1)
            + 2 * self.column_tiles() * features * 16
            + WIDE_PIECES * (piece + 16)
            + WIDE_QUERIES * (queries + 16)
            + features * 4
            + 2 * 16
            + 8 * 32
            + 33 * 34 * 4
            + 8
    }

    /// Bytes of shared memory of `stream_sixteen_sums.cu`.
    fn sixteen_sum_bytes(&self) -> usize {
        let stage = (2 + self.column_tiles()) * (128 * 16 + 32) + usize::from(self.fades) * 128 * 8;
        2 * stage + 8 * 49 * 32
    }

    /// Bytes of shared memory of `stream_sixteen_read.cu`.
    fn sixteen_bytes(&self) -> usize {
        let (tiles, g) = (self.column_tiles(), usize::from(self.fades));
        let features = self.program.features();
        let queries = 64 * 48 + g * (64 * 8 + 16);
        let piece = (2 + tiles) * (64 * 16 + 32) + g * 64 * 16;
        (self.sixteen_sum_bytes() + 4 * (queries + piece)).next_multiple_of(128)
            + 2 * tiles * features * 16
            + features * 4
            + 4 * 8
    }

    /// Bytes of shared memory of a block of threads: its units', and coefficients.
    fn shared(&self) -> usize {
        self.units() * self.unit_bytes() + self.program.features() * 4
    }

    fn unit(&self, unit: Unit) -> Unit {
        unit.define("D_KEY", self.d_key)
            .define("D_VALUE", self.d_value)
            .define("TERMS", self.terms)
            .define("FEATURE_TILES", self.program.tiles())
            .define("HALVES", self.program.define())
            .define("WARPS", self.warps())
            .define("ROW_TILES", self.row_tiles())
            .define("SPLIT", self.split())
            .define("UNITS", self.units())
            .define("RESIDENTS", self.least_residents())
            .define("HAS_G", u8::from(self.fades))
            .define("HAS_NEAR", u8::from(self.near))
            .define("TAKES", u8::from(self.takes))
            .define("GIVES", u8::from(self.gives))
            .define("UNIT_BYTES", self.unit_bytes())
            .size_of::<Stream>("STREAM_BYTES")
    }

    fn wide(&self, unit: Unit) -> Unit {
        unit.define("D_VALUE", self.d_value)
            .define("TERMS", self.terms)
            .define("HAS_G", u8::from(self.fades))
            .define("HAS_NEAR", u8::from(self.near))
            .size_of::<Stream>("STREAM_BYTES")
            .matrix()
    }

    pub(super) fn sums(&self) -> Unit {
        if self.is_wide() {
            return self
                .wide(unit!("stream_wide_sums.cu"))
                .define("SUM_BYTES", 2 * self.wide_sum_bytes(0))
                .size_of::<Chains>("CHAINS_BYTES")
                .hot();
        }
        if self.sixteen {
            return self
                .wide(unit!("stream_sixteen_sums.cu"))
                .define("UNIT_BYTES", self.sixteen_sum_bytes())
                .size_of::<Chains>("CHAINS_BYTES")
                .hot();
        }
        self.unit(unit!("stream_sums.cu")).size_of::<Chains>("CHAINS_BYTES").hot()
    }

    pub(super) fn read(&self) -> Unit {
        if self.is_wide() {
            let unit = self.wide(unit!("stream_wide_read.cu")).hot();
            return unit.define("UNIT_BYTES", self.wide_bytes());
        }
        if self.sixteen {
            let unit = self.wide(unit!("stream_sixteen_read.cu")).hot();
            return unit.define("UNIT_BYTES", self.sixteen_bytes());
        }
        let unit = self.unit(unit!("stream_read.cu"));
        // With features of order 4 sm_80 has a few registers too few; spilled ones are not those of
        // instructions that are on their way.
        if self.takes || self.gives { unit } else { unit.hot() }
    }
}
