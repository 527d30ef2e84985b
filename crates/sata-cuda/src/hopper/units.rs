//! The units of the Hopper kernels and the sizes they are specialised by.

use super::params::{Commit, Prepare, Read, References, Scan, Sequence, Sums};
use super::program::Sizes;
use crate::{Unit, unit};

/// Tokens of a tile of keys.
pub(super) const KEY_TILE: usize = 64;

/// What the kernels of one spec are made for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Shape {
    pub sizes: Sizes,
    /// P.
    pub terms: usize,
    /// Whether weights decay.
    pub fades: bool,
    /// Whether some are exact.
    pub near: bool,
}

/// Row tiles of a warpgroup of the reading kernel.
const ROW_TILES: usize = 2;
const SUM_STAGES: usize = 6;

impl Shape {
    /// Bytes of a tile of keys and values.
    pub(super) fn tile_bytes(&self) -> usize {
        let keys = KEY_TILE * self.sizes.d_key.next_multiple_of(16) * 2;
        keys + self.value_bytes() + if self.fades { KEY_TILE * 8 + 16 } else { 0 }
    }

    fn value_bytes(&self) -> usize {
        KEY_TILE * self.sizes.columns() * 2
    }

    /// Bytes of the same tokens for sums.
    pub(super) fn sum_tile_bytes(&self) -> usize {
        4 * (self.sizes.d_key + 1) * 32 + self.value_bytes()
    }

    /// Warpgroups that multiply in a block of threads of the reading kernel: fewer where each needs
    /// more registers.
    fn readers(&self) -> usize {
        if self.sizes.columns() > 40 && (self.fades || self.near) { 2 } else { 3 }
    }

    /// Queries of a block of threads.
    pub(super) fn queries(&self) -> usize {
        self.readers() * ROW_TILES * KEY_TILE
    }

    /// Threads of a block of the reading kernel: those that multiply, and a warpgroup that copies.
    pub(super) fn read_threads(&self) -> usize {
        self.readers() * 128 + 128
    }

    fn read_stages(&self) -> usize {
        if self.sizes.columns() > 40 { 7 } else { 6 }
    }

    /// Bytes of shared memory of the reading kernel.
    pub(super) fn read_shared(&self) -> usize {
        let slab = 9 * 16 * self.sizes.columns() * 2;
        let stage = slab.max(self.tile_bytes()).next_multiple_of(128);
        let words = if self.sizes.d_key == 8 { 4 } else { self.sizes.d_key / 2 + 4 };
        let near = usize::from(self.near);
        let row = words * 4 + usize::from(self.fades) * 8 + near * 4;
        self.read_stages() * (stage + 16) + self.queries() * row + near * 64
    }

    /// Warpgroups of the summing kernel, tiles of 64 features of each, and how many of those it
    /// multiplies at once: as many as registers hold without spilling.
    fn sum_tiles(&self) -> [usize; 3] {
        match (self.sizes.d_key, self.sizes.columns()) {
            (8, _) => [1, 6, 3],
            (_, 0..=24) => [3, 9, 1],
            (_, 25..=40) => [3, 3, 3],
            _ => [3, 3, 1],
        }
    }

    /// Blocks of threads of the summing kernel for one chunk.
    pub(super) fn sum_blocks(&self) -> usize {
        let [warpgroups, tiles, _] = self.sum_tiles();
        self.sizes.sum_items(tiles).div_ceil(warpgroups)
    }

    /// Threads of a block of the summing kernel.
    pub(super) fn sum_threads(&self) -> usize {
        self.sum_tiles()[0] * 128 + 128
    }

    /// Bytes of shared memory of the summing kernel.
    pub(super) fn sum_shared(&self) -> usize {
        SUM_STAGES * (self.sum_tile_bytes().next_multiple_of(128) + 16)
    }

    fn unit(&self, unit: Unit) -> Unit {
        unit.define("D_KEY", self.sizes.d_key)
            .define("D_VALUE", self.sizes.d_value)
            .define("TERMS", self.terms)
            .define("ORDERS", self.sizes.orders)
            .define("HAS_G", u8::from(self.fades))
            .define("FEATURE_BLOCKS", self.sizes.blocks())
            .define("KEY_TILE_BYTES", self.tile_bytes())
            .define("TOKEN_TILE_BYTES", self.sum_tile_bytes())
            .size_of::<Sequence>("SEQUENCE_BYTES")
            .least(90)
    }

    pub(super) fn prepare(&self) -> Unit {
        self.unit(unit!("hopper_prepare.cu"))
            .size_of::<Prepare>("PREPARE_BYTES")
            .size_of::<References>("REFERENCES_BYTES")
    }

    pub(super) fn sums(&self) -> Unit {
        let [warpgroups, tiles, group] = self.sum_tiles();
        self.unit(unit!("hopper_sums.cu"))
            .define("WARPGROUPS", warpgroups)
            .define("STAGES", SUM_STAGES)
            .define("SUM_TILES", tiles)
            .define("SUM_GROUP", group)
            .define("CHUNK_BLOCKS", self.sum_blocks())
            .define("SUMS_SHARED", self.sum_shared())
            .size_of::<Sums>("SUMS_BYTES")
            .hot()
            .matrix()
    }

    pub(super) fn scan(&self) -> Unit {
        self.unit(unit!("hopper_scan.cu"))
            .size_of::<Scan>("SCAN_BYTES")
            .size_of::<Commit>("COMMIT_BYTES")
    }

    pub(super) fn read(&self) -> Unit {
        self.unit(unit!("hopper_read.cu"))
            .define("HAS_NEAR", u8::from(self.near))
            .define("WARPGROUPS", self.readers())
            .define("ROW_TILES", ROW_TILES)
            .define("STAGES", self.read_stages())
            .define("BLOCK_QUERIES", self.queries())
            .define("READ_SHARED", self.read_shared())
            .size_of::<Read>("READ_BYTES")
            .hot()
            .matrix()
    }
}
