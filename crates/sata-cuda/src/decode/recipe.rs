//! How a step is laid out on a device: who reads what.

use sata::Error as CallError;

use crate::{Error, Launch, Properties};

/// Warps, blocks and tiles of a step, as plain data. Every recipe gives the same answers, to
/// rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// Warps of a block.
    pub warps: u32,
    /// Warps that serve one head together: 1, or all of a block.
    pub team: u32,
    /// Blocks that share the sums of one head; 1 where `team` is 1.
    pub split: u32,
    /// Features that a lane makes at once: a warp reads tiles of 32 times as many rows.
    pub lane_rows: u32,
    /// Loads that a lane has under way at once, at most.
    pub in_flight: u32,
    /// Blocks that a multiprocessor is to hold at least: bounds the registers.
    pub blocks: u32,
    /// Queries that one pass over the sums answers: a head's others take more passes.
    pub pass: u32,
}

/// Sizes that a recipe depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// d_key.
    pub d_key: usize,
    /// d_value.
    pub d_value: usize,
    /// D: rows of the sums of a head.
    pub features: usize,
    /// Bytes of a number of the sums.
    pub width: usize,
    /// Query heads per key/value head.
    pub group: usize,
    /// Numerators and denominators that a query has: one per order where coefficients are its own.
    pub planes: usize,
    /// P, where coefficients are each query's own; else 0.
    pub terms: usize,
    /// Heads that a step serves: entries times key/value heads.
    pub units: usize,
}

/// Most queries of a pass: more would leave too few registers to have loads under way.
const MOST_QUERIES: usize = 16;
/// Bytes of sums that a single warp reads as fast as a block would, when there are many heads.
const SMALL: usize = 16 << 10;
/// Warps of a multiprocessor that are enough to read memory at full speed.
const BUSY_WARPS: usize = 16;

impl Recipe {
    /// The one for these sizes on a device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when shared memory does not hold a head's query side.
    pub fn choose(sizes: &Sizes, properties: &Properties) -> Result<Self, Error> {
        let processors = properties.multiprocessors.max(1) as usize;
        let passes = sizes.group.div_ceil(MOST_QUERIES);
        let pass = sizes.group.div_ceil(passes) as u32;
        let row = sizes.d_value * sizes.width;
        // A lane's loads of a tile of 32 rows; 8 or more of 16 bytes are wanted, or 16.
        let loads = row.div_ceil(16).max(1);
        let lane_rows = (8 / loads).clamp(1, 4) as u32;
        let in_flight = if pass > 8 { 8 } else { 16 };
        let bytes = sizes.features * (row + 4);
        let many = sizes.units >= processors * BUSY_WARPS;
        let (warps, team) = if many && bytes <= SMALL {
            (4, 1)
        } else if bytes > 4 << 20 {
            (8, 8)
        } else {
            (4, 4)
        };
        let mut recipe = Recipe { warps, team, split: 1, lane_rows, in_flight, blocks: 1, pass };
        if team > 1 {
            let tiles = sizes.features.div_ceil(32 * lane_rows as usize);
            let wanted = (processors * BUSY_WARPS / team as usize).div_ceil(sizes.units.max(1));
            // A part has at least a tile for each of its warps. More than so many cost the last of
            // them more than they save.
            let most = tiles.div_ceil(team as usize).min(processors);
            recipe.split = wanted.clamp(1, most.max(1)) as u32;
        }
        recipe.fit(sizes, properties)
    }

    /// The nearest recipe whose shared memory the device has.
    fn fit(mut self, sizes: &Sizes, properties: &Properties) -> Result<Self, Error> {
        while self.shared_bytes(sizes) > u64::from(properties.shared_per_block) {
            if self.warps > 1 {
                self.warps /= 2;
                self.team = self.team.min(self.warps);
                self.split = if self.team == 1 { 1 } else { self.split };
            } else if self.lane_rows > 1 {
                self.lane_rows /= 2;
            } else {
                let what = format!(
                    "decoding {} query heads per key/value head with keys of {} and values of {} \
                     (they take {} bytes of shared memory; there are {})",
                    sizes.group,
                    sizes.d_key,
                    sizes.d_value,
                    self.shared_bytes(sizes),
                    properties.shared_per_block
                );
                return Err(Error::Unsupported { what });
            }
        }
        Ok(self)
    }

    /// Checks one that was made by hand.
    ///
    /// # Errors
    /// [`Error::Call`] naming the field.
    pub(crate) fn check(&self, sizes: &Sizes) -> Result<(), Error> {
        let no = |field, value: u32, requires: &str| {
            let (value, requires) = (value.to_string(), requires.to_string());
            Err(Error::Call(CallError::Spec { field, value, requires }))
        };
        if !(1..=32).contains(&self.warps) {
            return no("warps", self.warps, "it must be 1 to 32");
        }
        if self.team != 1 && self.team != self.warps {
            return no("team", self.team, "it must be 1 or all warps of a block");
        }
        if self.split == 0 || (self.split > 1 && self.team == 1) {
            return no("split", self.split, "it must be at least 1, and 1 for teams of one warp");
        }
        if !(1..=8).contains(&self.lane_rows) {
            return no("lane_rows", self.lane_rows, "it must be 1 to 8");
        }
        if !(1..=64).contains(&self.in_flight) {
            return no("in_flight", self.in_flight, "it must be 1 to 64");
        }
        if !(1..=32).contains(&self.blocks) {
            return no("blocks", self.blocks, "it must be 1 to 32");
        }
        if self.pass == 0 || self.pass as usize > sizes.group.max(1) || self.pass > 32 {
            return no("pass", self.pass, "it must be 1 to 32 and at most the queries of a head");
        }
        Ok(())
    }

    /// The launch for so many heads.
    pub(crate) fn launch(&self, units: usize, shared: u32) -> Result<Launch, Error> {
        let blocks = match self.team {
            1 => units.div_ceil(self.warps as usize),
            _ => units.saturating_mul(self.split as usize),
        };
        match u32::try_from(blocks) {
            Ok(blocks) if blocks <= i32::MAX as u32 => {
                Ok(Launch::linear(blocks, self.warps * 32).shared(shared))
            }
            _ => Err(Error::Unsupported { what: format!("decoding with {blocks} blocks") }),
        }
    }

    /// Numbers that a part of a head hands on.
    pub(crate) fn partial(&self, sizes: &Sizes) -> usize {
        sizes.planes * self.heads(sizes) * (sizes.d_value + 1)
    }

    /// Query heads of a key/value head, those included that fill up the last pass.
    pub(crate) fn heads(&self, sizes: &Sizes) -> usize {
        sizes.group.next_multiple_of(self.pass as usize)
    }

    /// Bytes of shared memory of a block: as `TEAM_FLOATS` of `decode_types.cuh`.
    pub(crate) fn shared_bytes(&self, sizes: &Sizes) -> u64 {
        let [pass, team] = [self.pass as usize, self.team as usize];
        let (heads, row) = (self.heads(sizes), sizes.d_value + 1);
        let round = |floats: usize| floats.next_multiple_of(4) as u64;
        let floats = round((sizes.d_key + 1) * heads)
            + round(sizes.d_key)
            + round(sizes.d_value)
            + round(sizes.planes * heads * row)
            + round(team * pass * row.max(sizes.planes))
            + round(team * pass)
            + round(pass * sizes.terms)
            + round((team + 2) * pass)
            + 4
            + team as u64 * round((32 * self.lane_rows as usize * pass).max(256));
        4 * floats * u64::from(self.warps / self.team)
    }
}
