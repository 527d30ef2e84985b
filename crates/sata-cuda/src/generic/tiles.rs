//! How the generic kernels' work is cut into blocks and threads.

use crate::Unit;

/// Threads of a block: `THREADS` of `generic.cuh`.
pub(super) const THREADS: usize = 128;
/// Tokens, or features, of a step of the kernels.
const STEP: usize = 32;
/// Columns that one block has at most.
const MOST_COLUMNS: usize = 64;
/// Rows that one block has at most.
const MOST_ROWS: usize = 256;
/// Bytes of queries or keys that a block brings to shared memory at most.
const MOST_STAGED: usize = 48 << 10;

/// Blocks of rows (features, or queries) times columns (of values).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tiles {
    d_key: usize,
    d_value: usize,
    /// Rows and columns of a thread.
    tm: usize,
    tn: usize,
    /// Columns of a block, and how many blocks have them all.
    columns: usize,
    pub column_tiles: usize,
    /// Rows of a block.
    pub rows: usize,
}

impl Tiles {
    /// For about `rows` rows of `d_value` columns each, with at most so many rows in a block.
    fn choose([d_key, d_value]: [usize; 2], rows: usize, most_rows: usize) -> Self {
        let column_tiles = d_value.div_ceil(MOST_COLUMNS);
        let each = d_value.div_ceil(column_tiles);
        let mut best: Option<(f64, Self)> = None;
        for tn in [8, 4] {
            let columns = each.next_multiple_of(tn);
            let row_threads = THREADS / (columns / tn) / 4 * 4;
            for tm in [8, 4, 2, 1] {
                let in_block = row_threads * tm;
                if in_block > most_rows.max(row_threads) {
                    continue;
                }
                // Loads from shared memory take time beside the multiplications, and rows or
                // columns of nothing take as much as others.
                let loads = tm.div_ceil(4) + tn / 4;
                let effort = (tm * tn + 4 * loads) as f64 / (tm * tn) as f64;
                let padded = rows.div_ceil(in_block).max(1) * in_block;
                let cost = effort * padded as f64 * columns as f64;
                let tiles = Tiles { d_key, d_value, tm, tn, columns, column_tiles, rows: in_block };
                if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                    best = Some((cost, tiles));
                }
            }
        }
        // There is always one: some `tm` is 1.
        best.map_or(
            Tiles { d_key, d_value, tm: 1, tn: 4, columns: 4, column_tiles, rows: THREADS },
            |(_, tiles)| tiles,
        )
    }

    /// Features times columns, for sums of `features` features.
    pub(super) fn of_sums(sizes: [usize; 2], features: usize) -> Self {
        Self::choose(sizes, features, MOST_ROWS)
    }

    /// Queries times columns, for chunks of `rows` queries.
    pub(super) fn of_read(sizes: [usize; 2], rows: usize) -> Self {
        let most = (MOST_STAGED / 4 / sizes[0]).clamp(1, MOST_ROWS);
        Self::choose(sizes, rows, most)
    }

    fn define(&self, unit: Unit, staged: bool, shared: usize) -> Unit {
        unit.define("D_KEY", self.d_key)
            .define("D_VALUE", self.d_value)
            .define("TM", self.tm)
            .define("TN", self.tn)
            .define("COLUMNS", self.columns)
            .define("COLUMN_TILES", self.column_tiles)
            .define("STAGED", u8::from(staged))
            .define("SHARED_BYTES", shared)
            .hot()
    }

    /// The sums' unit with its defines, and its bytes of shared memory.
    pub(super) fn sums(&self, unit: Unit) -> (Unit, usize) {
        let keys = (self.d_key + 1) * (STEP + 4);
        let staged = 4 * keys <= MOST_STAGED;
        let floats = STEP * (self.rows + self.columns + 1) + if staged { keys } else { 4 };
        (self.define(unit, staged, 4 * floats), 4 * floats)
    }

    /// The reading unit with its defines, and its bytes of shared memory for factors of `width`.
    pub(super) fn read(&self, unit: Unit, width: usize) -> (Unit, usize) {
        let queries = self.d_key * (self.rows + 4);
        let staged = 4 * queries <= MOST_STAGED + 16 * self.d_key;
        let floats = STEP * (self.rows + 4 + self.columns + 1) + if staged { queries } else { 4 };
        (self.define(unit, staged, 4 * floats), 4 * (floats + STEP * width))
    }
}

/// Blocks of 64 queries times columns, with so many keys at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct LocalTiles {
    d_key: usize,
    d_value: usize,
    columns: usize,
    keys: usize,
    pub column_tiles: usize,
}

impl LocalTiles {
    /// Queries of a block.
    pub(super) const ROWS: usize = 64;
    /// Elements of a key at a time.
    const SLICE: usize = 64;

    pub(super) fn new([d_key, d_value]: [usize; 2]) -> Self {
        let column_tiles = d_value.div_ceil(MOST_COLUMNS);
        let columns = d_value.div_ceil(column_tiles).next_multiple_of(8);
        let keys = if d_key.min(Self::SLICE) + columns <= 96 { 64 } else { 32 };
        LocalTiles { d_key, d_value, columns, keys, column_tiles }
    }

    /// The unit with its defines, and its bytes of shared memory.
    pub(super) fn unit(&self, unit: Unit) -> (Unit, usize) {
        let slice = self.d_key.min(Self::SLICE);
        let pitch = self.keys + 4;
        let floats = Self::ROWS * pitch
            + self.keys * self.columns
            + slice * pitch
            + slice * (Self::ROWS + 4)
            + 3 * self.keys
            + 2 * Self::ROWS;
        let unit = unit
            .define("D_KEY", self.d_key)
            .define("D_VALUE", self.d_value)
            .define("COLUMNS", self.columns)
            .define("KEYS", self.keys)
            .define("SHARED_BYTES", 4 * floats);
        (unit, 4 * floats)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_has_whole_tiles_that_fit() {
        for d_key in [1, 3, 8, 16, 31, 32, 64, 100, 128, 512, 3000] {
            for d_value in [1, 2, 4, 5, 8, 15, 16, 24, 32, 33, 48, 56, 64, 65, 100, 128, 200] {
                for rows in [1, 10, 45, 165, 1000, 50_000] {
                    for tiles in [
                        Tiles::of_sums([d_key, d_value], rows),
                        Tiles::of_read([d_key, d_value], rows),
                    ] {
                        let Tiles { columns, tn, tm, column_tiles, .. } = tiles;
                        assert!(columns % tn == 0 && column_tiles * columns >= d_value);
                        assert_eq!(tiles.rows, THREADS / (columns / tn) / 4 * 4 * tm);
                        assert!(tiles.rows > 0 && tiles.rows % 4 == 0 && tiles.rows <= 256);
                        let bytes = tiles.sums(crate::unit!("generic_sums.cu")).1;
                        assert!(bytes <= 99 << 10, "{tiles:?} needs {bytes}");
                        let bytes = tiles.read(crate::unit!("generic_read.cu"), 3).1;
                        assert!(bytes <= 99 << 10, "{tiles:?} needs {bytes}");
                    }
                }
                let bytes = LocalTiles::new([d_key, d_value]).unit(crate::unit!("fill.cu")).1;
                assert!(bytes <= 99 << 10);
            }
        }
    }
}
