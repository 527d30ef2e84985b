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
const READ_STAGES: usize = 16;
/// Bytes of shared memory that a block of the summing kernel may have, a little left for its tables.
const MOST_SHARED: usize = (227 << 10) - 1024;

/// One way of summing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Summing {
    shape: Shape,
    /// Warpgroups that multiply, tiles of 64 features of each, and how many of those it multiplies
    /// at once: as many as registers hold without spilling.
    warpgroups: usize,
    tiles: usize,
    group: usize,
    /// Whether what precedes each chunk is kept and written, or each chunk's own sums.
    pub prefix: bool,
    stages: usize,
    /// Blocks of threads, each with a slice of the features, for all of them.
    pub blocks: usize,
    /// Bytes of what a block keeps, and of all its shared memory.
    pub kept: usize,
    pub shared: usize,
}

impl Summing {
    /// Threads of a block.
    pub(super) fn threads(&self) -> usize {
        self.warpgroups * 128 + 128
    }

    /// Blocks of a team, and teams, no more than units of a member. Larger teams read tokens from
    /// memory less often: measured faster at d = 64 (P = 3: 2.47 against 2.60 ms), slower below
    /// (d = 32, P = 4: 3.47 against 3.14 ms).
    pub(super) fn teams(&self, heads: usize, multiprocessors: usize) -> (usize, usize) {
        let largest = if self.shape.sizes.columns() > 40 { self.blocks } else { 1 };
        let of = |team: usize| {
            let passes = self.blocks.div_ceil(team);
            let teams = (multiprocessors / team).clamp(1, (heads * passes).max(1));
            (passes as f64 / teams as f64, team, teams)
        };
        let all = || (1..=largest.min(multiprocessors).max(1)).map(of);
        let least = all().map(|(cost, ..)| cost).fold(f64::INFINITY, f64::min);
        // Of ways that are as good within 6 %, the largest teams.
        let best = all().rfind(|(cost, ..)| *cost <= 1.06 * least);
        best.map_or((1, 1), |(_, team, teams)| (team, teams))
    }

    /// Flags of a block.
    pub(super) fn flags(&self) -> usize {
        self.warpgroups
    }

    pub(super) fn unit(&self) -> Unit {
        self.shape
            .unit(unit!("hopper_sums.cu"))
            .define("PREFIX", u8::from(self.prefix))
            .define("WARPGROUPS", self.warpgroups)
            .define("STAGES", self.stages)
            .define("SUM_TILES", self.tiles)
            .define("SUM_GROUP", self.group)
            .define("CHUNK_BLOCKS", self.blocks)
            .define("SUMS_SHARED", self.shared)
            .size_of::<Sums>("SUMS_BYTES")
            .hot()
            .matrix()
    }
}

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
        if self.sizes.columns() > 40 && self.near { 2 } else { 3 }
    }

    /// Queries of a block of threads.
    pub(super) fn queries(&self) -> usize {
        self.readers() * ROW_TILES * KEY_TILE
    }

    /// Threads of a block of the reading kernel: those that multiply, and a warpgroup that copies.
    pub(super) fn read_threads(&self) -> usize {
        self.readers() * 128 + 128
    }

    /// Whether a block of the reading kernel goes on with other queries after its first.
    pub(super) fn read_persists(&self) -> bool {
        !self.sizes.has(3) && (self.sizes.columns() <= 40 || self.readers() == 2)
    }

    /// Stages of the reading kernel, and bytes of its shared memory.
    fn read_ring(&self) -> (usize, usize) {
        let steps = if self.sizes.has(3) { 9 } else { 4.max(self.sizes.low_blocks().div_ceil(2)) };
        let slab = steps * 16 * self.sizes.columns() * 2;
        let stage = slab.max(self.tile_bytes()).next_multiple_of(128) + 16;
        let words = if self.sizes.d_key == 8 { 4 } else { self.sizes.d_key / 2 + 4 };
        let words = words * (1 + usize::from(self.read_persists()));
        let near = usize::from(self.near);
        let row = words * 4 + usize::from(self.fades) * 8 + near * 4;
        let rows = self.queries() * row + near * 64;
        let stages = ((MOST_SHARED - rows) / stage).min(READ_STAGES);
        (stages, stages * stage + rows)
    }

    /// Bytes of shared memory of the reading kernel.
    pub(super) fn read_shared(&self) -> usize {
        self.read_ring().1
    }

    /// The summing kernel for chunks that are summed apart.
    pub(super) fn chunk_sums(&self) -> Summing {
        let [warpgroups, tiles, group] = match (self.sizes.d_key, self.sizes.columns()) {
            (8, _) => [1, 6, 3],
            (_, 0..=24) => [3, 9, 1],
            (_, 25..=40) => [3, 3, 3],
            _ => [3, 3, 1],
        };
        self.summing(warpgroups, tiles, group, false)
    }

    /// The summing kernel that keeps what precedes each chunk, for so many heads on so many
    /// multiprocessors: the largest tiles of which there are enough. `None` where there are not, or
    /// where a scan of each chunk's own sums is faster and `or_scan` says that there is one.
    pub(super) fn prefix_sums(
        &self,
        heads: usize,
        multiprocessors: usize,
        or_scan: bool,
    ) -> Option<Summing> {
        let of =
            |[warpgroups, tiles, group]: [usize; 3]| self.summing(warpgroups, tiles, group, true);
        let all: &[[usize; 3]] = match (self.sizes.d_key, self.sizes.columns()) {
            // A head has too few features to be one's work for its whole length.
            (0..32, _) => &[],
            (_, 0..=40) => &[[4, 2, 2], [3, 1, 1]],
            // Three tiles do not fit registers, and two reach no more than sums of chunks do.
            _ if self.sizes.has(3) && or_scan => &[],
            _ if self.sizes.has(3) => &[[3, 2, 1], [3, 1, 1]],
            _ => &[[3, 1, 1]],
        };
        let units = |summing: &Summing| heads * summing.blocks;
        let full = all.iter().map(|&each| of(each)).find(|s| units(s) >= multiprocessors);
        let last = all.last().map(|&each| of(each));
        full.or(last.filter(|s| 4 * units(s) >= 3 * multiprocessors))
    }

    fn summing(&self, warpgroups: usize, tiles: usize, group: usize, prefix: bool) -> Summing {
        let stage = self.sum_tile_bytes().next_multiple_of(128) + 16;
        let kept = if prefix { warpgroups * tiles * self.sizes.columns() * 256 } else { 0 };
        let stages = SUM_STAGES.min((MOST_SHARED - kept) / stage);
        Summing {
            shape: *self,
            warpgroups,
            tiles,
            group,
            prefix,
            stages,
            blocks: self.sizes.sum_items(tiles).div_ceil(warpgroups),
            kept,
            shared: stages * stage + kept,
        }
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
            .define("STAGES", self.read_ring().0)
            .define("BLOCK_QUERIES", self.queries())
            .define("READ_SHARED", self.read_shared())
            .size_of::<Read>("READ_BYTES")
            .hot()
            .matrix()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_heads_have_prefix_sums_where_there_is_no_scan() {
        for (d, columns) in [(32, 40), (64, 72)] {
            let sizes = Sizes::new(d, d, &[0, 1, 2, 3]);
            assert_eq!(sizes.columns(), columns);
            let shape = Shape { sizes, terms: 4, fades: false, near: false };
            let summing = shape.prefix_sums(16, 132, false);
            assert!(summing.is_some_and(|s| s.prefix && s.shared <= MOST_SHARED), "d = {d}");
            assert_eq!(shape.prefix_sums(16, 132, true).is_some(), d == 32);
        }
    }

    #[test]
    fn teams_are_all_multiprocessors_or_nearly() {
        for d in [32, 64] {
            let sizes = Sizes::new(d, d, &[0, 1, 2]);
            let shape = Shape { sizes, terms: 3, fades: false, near: false };
            for heads in [1, 5, 16, 100] {
                let Some(summing) = shape.prefix_sums(heads, 132, false) else { continue };
                let (team, teams) = summing.teams(heads, 132);
                assert!(team <= summing.blocks && team * teams <= 132, "{team} × {teams}");
                assert!(
                    3 * team * teams >= 2 * 132.min(heads * summing.blocks),
                    "{team} × {teams}"
                );
            }
        }
    }
}
