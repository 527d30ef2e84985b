//! The units of the kernels and the sizes they are specialised by.

use sata::{Near, Spec};

use super::params::{Item, Logs, Scan, Walk};
use crate::{Unit, unit};

/// Blocks of an exact past are weighed pair by pair: so many chunks of them at most.
pub(super) const MOST_LAG: usize = 4;

/// Bytes of `Place` of the source.
const PLACE: usize = size_of::<Item>() + 80;

/// What the kernels of one spec are made for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Shape {
    pub d_key: usize,
    pub d_value: usize,
    /// A bit for each.
    pub orders: u32,
    pub fades: bool,
    pub near: bool,
    /// Chunks before a query's own whose keys are not in the sums that it reads.
    pub lag: usize,
    /// Whether sums wait in shared memory while rows are read: registers do not hold both.
    pub stash: bool,
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Tokens of a chunk for keys of `d_key` elements: 16 for each warp that reads.
fn chunk(d_key: usize) -> usize {
    if d_key == 8 { 64 } else { 128 }
}

/// Bytes of `count` rows of 8 or 24 elements, whichever holds `columns`.
fn rows(count: usize, columns: usize) -> usize {
    count * if columns <= 8 { 16 } else { 48 }
}

impl Shape {
    pub fn new(spec: &Spec, fades: bool, shared: usize) -> Self {
        let d_key = spec.d_key();
        let (near, lag) = match spec.near() {
            Near::None => (false, 0),
            Near::Blocks(n) => {
                let (block, chunk) = (spec.block(), chunk(d_key));
                // A chunk's first query may stand anywhere in a block, but where both always meet.
                let tokens = n.saturating_mul(block).saturating_add(block - gcd(block, chunk));
                (true, tokens.div_ceil(chunk).min(MOST_LAG + 1))
            }
        };
        let orders =
            spec.orders().iter().filter(|&&order| order < 32).map(|&order| 1 << order).sum();
        let d_value = spec.d_value();
        let shape = Shape { d_key, d_value, orders, fades, near, lag, stash: false };
        let with = Shape { stash: shape.is_large(), ..shape };
        if with.query_shared().max(with.key_shared()) <= shared { with } else { shape }
    }

    /// Whether there are so many features that registers are short.
    fn is_large(&self) -> bool {
        self.d_key == 16 && self.orders >> 3 & 1 == 1
    }

    /// Tokens of a chunk.
    pub fn chunk(&self) -> usize {
        chunk(self.d_key)
    }

    /// Threads of a block.
    pub fn threads(&self) -> usize {
        2 * self.chunk()
    }

    fn columns(&self) -> usize {
        (self.d_value + 9) / 8 * 8
    }

    /// Tiles of 16 features of every base, as `eight_at` of the source counts eights.
    fn tiles(&self) -> usize {
        let d = self.d_key;
        let of = |order: usize, count: usize| if self.orders >> order & 1 == 1 { count } else { 0 };
        let eights = of(3, (d + 1) * (d + 2) / 6) + of(2, d / 2 + 1) + of(1, 1) + of(0, 1);
        d / 8 * eights.div_ceil(2)
    }

    /// Numbers of a set of sums.
    pub fn sums_len(&self) -> usize {
        self.tiles() * self.columns() * 16
    }

    fn logs(&self) -> bool {
        self.fades || self.near
    }

    /// Bytes of a chunk's keys, columns, turned keys, one number a token.
    fn parts(&self) -> [usize; 4] {
        let chunk = self.chunk();
        let keys = rows(chunk, self.d_key);
        [keys, rows(chunk, self.columns()), self.d_key * (chunk + 8) * 2, 4 * chunk]
    }

    /// Bytes of what reads sums: rounded ones, factors, what waits, room that is not used.
    fn table(&self) -> usize {
        rows(16 * self.tiles(), self.columns())
            + (2 * self.tiles() / (self.d_key / 8)).next_multiple_of(4) * 4
            + if self.stash { 4 * self.sums_len() } else { 16 }
            + self.chunk()
    }

    /// Bytes of g at a chunk's tokens, and of where warps are.
    fn g(&self) -> usize {
        8 * if self.fades { self.chunk() + 2 } else { 2 }
    }

    fn states(&self) -> usize {
        16 * self.threads() / 32
    }

    pub fn query_shared(&self) -> usize {
        let [keys, columns, turned, numbers] = self.parts();
        let slots = self.lag + 2;
        self.table()
            + slots * (keys + columns + if self.logs() { numbers } else { 16 })
            + turned
            + 2 * (keys + columns)
            + if self.fades { columns } else { 16 }
            + slots * self.g()
            + self.states()
            + PLACE
    }

    /// Of what queries that are summed need.
    pub fn sum_shared(&self) -> usize {
        let [keys, columns, turned, numbers] = self.parts();
        let logs = if self.logs() { columns + numbers } else { 32 };
        2 * (keys + columns) + columns + turned + logs + 7 * numbers + 2 * self.g() + PLACE
    }

    pub fn key_shared(&self) -> usize {
        let [keys, columns, ..] = self.parts();
        self.table() + self.sum_shared() + 2 * (keys + columns + self.g()) + 16 + self.states()
    }

    /// Blocks of threads that a multiprocessor should hold, as registers and shared memory let it.
    pub fn blocks(&self) -> usize {
        if self.d_key == 8 { 4 } else { 1 }
    }

    /// Those that walk are not marked as hot: they fill the registers, and the compiler puts one or two
    /// addresses that are used once a chunk elsewhere.
    fn unit(&self, unit: Unit) -> Unit {
        unit.define("D_KEY", self.d_key)
            .define("D_VALUE", self.d_value)
            .define("ORDERS", self.orders)
            .define("CHUNK", self.chunk())
            .define("WARPS", self.threads() / 32)
            .define("ROW_TILES", 1)
            .define("STASH", u8::from(self.stash))
            .define("LAG", self.lag)
            .define("FADES", u8::from(self.fades))
            .define("NEAR", u8::from(self.near))
            .size_of::<Item>("ITEM_BYTES")
            .size_of::<Walk>("WALK_BYTES")
    }

    pub fn queries(&self) -> Unit {
        self.unit(unit!("stream_backward_queries.cu"))
            .define("QUERY_BLOCKS", self.blocks())
            .define("QUERY_SHARED", self.query_shared())
    }

    pub fn keys(&self) -> Unit {
        self.unit(unit!("stream_backward_keys.cu"))
            .define("KEY_BLOCKS", self.blocks())
            .define("KEY_SHARED", self.key_shared())
    }

    pub fn sums(&self) -> Unit {
        self.unit(unit!("stream_backward_sums.cu"))
            .hot()
            .define("SUM_BLOCKS", self.blocks())
            .define("SUM_SHARED", self.sum_shared())
            .size_of::<Scan>("SCAN_BYTES")
    }
}

pub(super) fn logs() -> Unit {
    unit!("stream_backward_logs.cu").size_of::<Item>("ITEM_BYTES").size_of::<Logs>("LOGS_BYTES")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_lag_behind_what_is_near() {
        let lag = |d: usize, n: usize, block: usize| {
            let spec = Spec::new(d, d).near(Near::Blocks(n)).block(block).build().unwrap();
            Shape::new(&spec, false, 1 << 20).lag
        };
        for d in [8, 16] {
            for n in [0, 1, 2] {
                for block in [16, 48, 64] {
                    let (lag, chunk) = (lag(d, n, block), chunk(d));
                    // What chunk c's first query has to see exactly begins at or after chunk c - lag.
                    let holds = |lag: usize| {
                        (lag..lag + 200).all(|c| {
                            let near = (c * chunk / block).saturating_sub(n) * block;
                            near >= (c - lag) * chunk
                        })
                    };
                    assert!(holds(lag), "d {d}, {n} blocks of {block}: {lag}");
                    assert!(lag == 0 || !holds(lag - 1), "d {d}, {n} blocks of {block}: {lag}");
                }
            }
        }
    }
}
