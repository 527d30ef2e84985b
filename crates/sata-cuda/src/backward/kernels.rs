//! The kernels of the backward pass for one spec and type: what they are specialised by, and the
//! sizes of their tiles.

use sata::{Decay, Spec};

use super::features::{order, terms};
use super::params::Params;
use crate::{Device, Error, Kernel, Unit, unit};

/// Columns of sums that one block has at most.
const MOST_COLUMNS: usize = 68;

/// What a unit of the kernels is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Kind {
    pub element: &'static str,
    pub d_key: usize,
    pub d_value: usize,
    pub terms: usize,
    pub fades: bool,
    pub causal: bool,
}

impl Kind {
    pub fn new(spec: &Spec, element: &'static str, causal: bool) -> Self {
        Kind {
            element,
            d_key: spec.d_key(),
            d_value: spec.d_value(),
            terms: terms(spec),
            fades: spec.decay() != Decay::None,
            causal,
        }
    }

    pub fn define(&self, unit: Unit) -> Unit {
        unit.define("NUMBER", self.element)
            .define("D_KEY", self.d_key)
            .define("D_VALUE", self.d_value)
            .define("TERMS", self.terms)
            .define("FADES", u8::from(self.fades))
            .define("CAUSAL", u8::from(self.causal))
            .size_of::<Params>("BACKWARD_BYTES")
    }
}

/// Sizes of tiles, and the shared memory that they take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    pub absorb: Absorb,
    pub read: Read,
    pub values: Values,
    pub pairs: Pairs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Absorb {
    pub features: usize,
    pub columns: usize,
    pub column_blocks: usize,
    pub threads: usize,
    pub bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Read {
    pub warps: usize,
    pub query_bytes: usize,
    pub key_bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Values {
    pub tokens: usize,
    pub rows: usize,
    pub columns: usize,
    pub column_blocks: usize,
    pub threads: usize,
    pub bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pairs {
    pub tile: usize,
    /// Blocks of a multiprocessor at once.
    pub blocks: usize,
    pub query_bytes: usize,
    pub key_bytes: usize,
}

/// Splits columns evenly into blocks of a multiple of 4.
fn columns(count: usize) -> (usize, usize) {
    let columns = count.div_ceil(count.div_ceil(MOST_COLUMNS)).next_multiple_of(4);
    (columns, count.div_ceil(columns))
}

impl Absorb {
    fn new(kind: &Kind, count: usize) -> Self {
        // Few features are not worth many that are 0.
        let features = if count <= 512 { 64 } else { 128 };
        let (columns, column_blocks) = columns(kind.d_value + 1);
        let floats = (kind.d_key + 1) * 68 + 64 * columns + 64 * (features + 4) + 64;
        let bytes = 4 * floats + (2 * order(kind.terms) * features).next_multiple_of(4);
        let threads = (16 * (columns / 4)).next_multiple_of(32);
        Absorb { features, columns, column_blocks, threads, bytes }
    }
}

impl Read {
    fn new(kind: &Kind, warps: usize) -> Self {
        let values = kind.d_value.next_multiple_of(4);
        let stride = if (values / 4) % 2 == 1 { values } else { values + 4 };
        let more = kind.d_key + 1;
        let tokens = 32 * warps;
        let floats = |sets: usize| {
            32 * (stride + 40 * warps + 1) + (tokens + 4) * (values + more + sets * more)
        };
        Read { warps, query_bytes: 4 * floats(2), key_bytes: 4 * floats(1) }
    }
}

impl Values {
    fn new(kind: &Kind, tokens: usize) -> Self {
        let (columns, column_blocks) = columns(kind.d_value);
        let rows = if columns <= 16 { 4 } else { 8 };
        let threads = (tokens / rows * (columns / 4)).next_multiple_of(32);
        let floats = (kind.d_key + 1 + 32) * (tokens + 4) + 32 * columns;
        let bytes = 4 * floats + 64 * order(kind.terms);
        Values { tokens, rows, columns, column_blocks, threads, bytes }
    }
}

impl Pairs {
    fn new(kind: &Kind, tile: usize, room: usize) -> Self {
        let (depth, stride) = (kind.d_key + kind.d_value, tile + 4);
        // Queries and keys, with what is known of each; weights twice; coefficients.
        let both = 4 * 2 * depth * stride + tile * (2 * 8 + 6 * 4);
        let bytes = both + 4 * 2 * tile * stride + 4 * kind.terms;
        let bytes = bytes.next_multiple_of(8);
        // Two leave each thread 128 registers: too few for accumulators of long keys.
        let two = kind.d_key.max(kind.d_value) <= 64 && 2 * (bytes + 2048) <= room + 2048;
        Pairs { tile, blocks: if two { 2 } else { 1 }, query_bytes: bytes, key_bytes: bytes }
    }
}

impl Tiles {
    /// Those that fit into `shared` bytes for `count` features.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for keys and values that are too long.
    pub fn new(kind: &Kind, count: usize, shared: usize) -> Result<Self, Error> {
        // Static variables come before dynamic ones, which begin at a multiple of 1024.
        let room = shared.saturating_sub(1024);
        let absorb = Absorb::new(kind, count);
        let read = [4, 2, 1].map(|warps| Read::new(kind, warps));
        let read = read.into_iter().find(|read| read.query_bytes <= room);
        let values = [128, 64, 32].map(|tokens| Values::new(kind, tokens));
        let values = values.into_iter().find(|values| values.bytes <= room);
        let pairs = [64, 32].map(|tile| Pairs::new(kind, tile, room));
        // Accumulators are in registers.
        let wide = kind.d_key.max(kind.d_value) > 128;
        let pairs =
            pairs.into_iter().find(|pairs| pairs.query_bytes <= room && !(wide && pairs.tile > 32));
        match (absorb.bytes <= room, read, values, pairs) {
            (true, Some(read), Some(values), Some(pairs)) => {
                Ok(Tiles { absorb, read, values, pairs })
            }
            _ => Err(Error::Unsupported {
                what: format!(
                    "the backward of keys of {} and values of {} elements, which do not fit into \
                     {shared} bytes of shared memory,",
                    kind.d_key, kind.d_value
                ),
            }),
        }
    }

    /// The units of all kernels.
    pub fn units(&self, kind: &Kind) -> [Unit; 7] {
        let Tiles { absorb, read, values, pairs } = *self;
        [
            kind.define(unit!("backward_absorb.cu"))
                .define("FEATURES", absorb.features)
                .define("COLUMNS", absorb.columns)
                .define("SHARED_BYTES", absorb.bytes)
                .hot(),
            kind.define(unit!("backward_scan.cu")),
            kind.define(unit!("backward_read.cu"))
                .define("WARPS", read.warps)
                .define("QUERY_BYTES", read.query_bytes)
                .define("KEY_BYTES", read.key_bytes)
                .hot(),
            kind.define(unit!("backward_values.cu"))
                .define("TOKENS", values.tokens)
                .define("ROWS", values.rows)
                .define("COLUMNS", values.columns)
                .define("SHARED_BYTES", values.bytes)
                .hot(),
            kind.define(unit!("backward_queries.cu"))
                .define("TILE", pairs.tile)
                .define("BLOCKS", pairs.blocks)
                .define("SHARED_BYTES", pairs.query_bytes)
                .hot(),
            kind.define(unit!("backward_keys.cu"))
                .define("TILE", pairs.tile)
                .define("BLOCKS", pairs.blocks)
                .define("SHARED_BYTES", pairs.key_bytes)
                .hot(),
            kind.define(unit!("backward_tokens.cu")),
        ]
    }
}

/// All kernels, loaded.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub tiles: Tiles,
    pub absorb_keys: Kernel,
    pub absorb_queries: Kernel,
    pub scan: Kernel,
    pub read_queries: Kernel,
    pub read_keys: Kernel,
    pub values: Kernel,
    pub queries: Kernel,
    pub keys: Kernel,
    pub sinks: Kernel,
    pub sinks_end: Kernel,
    pub places: Kernel,
    pub weights: Kernel,
    pub logs: Kernel,
    pub slopes: Kernel,
}

impl Kernels {
    pub fn new(device: &Device, kind: &Kind, count: usize) -> Result<Self, Error> {
        let shared = device.properties().shared_per_block as usize;
        let tiles = Tiles::new(kind, count, shared)?;
        let [absorb, scan, read, values, queries, keys, tokens] = tiles.units(kind);
        Ok(Kernels {
            tiles,
            absorb_keys: device.kernel(&absorb, "backward_absorb_keys")?,
            absorb_queries: device.kernel(&absorb, "backward_absorb_queries")?,
            scan: device.kernel(&scan, "backward_scan")?,
            read_queries: device.kernel(&read, "backward_read_queries")?,
            read_keys: device.kernel(&read, "backward_read_keys")?,
            values: device.kernel(&values, "backward_values")?,
            queries: device.kernel(&queries, "backward_queries")?,
            keys: device.kernel(&keys, "backward_keys")?,
            sinks: device.kernel(&keys, "backward_sinks")?,
            sinks_end: device.kernel(&keys, "backward_sinks_end")?,
            places: device.kernel(&tokens, "backward_places")?,
            weights: device.kernel(&tokens, "backward_weights")?,
            logs: device.kernel(&tokens, "backward_logs")?,
            slopes: device.kernel(&tokens, "backward_slopes")?,
        })
    }
}
