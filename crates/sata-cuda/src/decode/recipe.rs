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
    /// Whether loads of sums bypass the L1 cache, where nothing would find them again.
    pub once: bool,
    /// Tokens of a block that are brought to shared memory at once when it is folded, a multiple of
    /// 8. A block of no more than these is folded as rows are read; a longer one takes passes of its
    /// own.
    pub fold_tokens: u32,
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
    /// Tokens of a block.
    pub block: usize,
    /// Heads that a step serves: entries times key/value heads.
    pub units: usize,
}

/// Most queries of a pass: more would leave too few registers to have loads under way.
const MOST_QUERIES: usize = 16;
/// Bytes of sums that one warp reads as fast as a block would, when there are many heads.
const SMALL: usize = 96 << 10;
/// Bytes of sums that caches hold until they are folded.
const TINY: usize = 16 << 10;
/// Bytes of sums of one head that keep many warps busy.
const LARGE: usize = 4 << 20;
/// Warps of a multiprocessor that are enough to read memory at full speed.
const BUSY_WARPS: usize = 16;
/// Most parts of a head, as the kernel counts them.
const MOST_PARTS: usize = 256;

impl Recipe {
    /// The one for these sizes on a device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when shared memory does not hold a head's query side.
    pub fn choose(sizes: &Sizes, properties: &Properties) -> Result<Self, Error> {
        let processors = properties.multiprocessors.max(1) as usize;
        let passes = sizes.group.div_ceil(MOST_QUERIES);
        let pass = sizes.group.div_ceil(passes);
        let row = sizes.d_value * sizes.width;
        // A lane's loads, of 16 bytes, of 32 rows.
        let loads = row.div_ceil(16).max(1);
        let rows_for = |most: usize| (most / loads).clamp(1, 6).min(sizes.features.div_ceil(32));
        let bytes = sizes.features * (row + 4);
        let recipe = Recipe {
            warps: 4,
            team: 4,
            split: 1,
            lane_rows: rows_for(8) as u32,
            in_flight: if pass > 4 { 8 } else { 16 },
            once: true,
            fold_tokens: sizes.block.next_multiple_of(8).min(64) as u32,
            // So many registers that none are spilled.
            blocks: if pass > 8 || loads > 16 { 2 } else { 3 },
            pass: pass as u32,
        };
        let recipe = if bytes <= SMALL && sizes.units >= processors * (BUSY_WARPS - 4) {
            let simple = pass == 1 && sizes.planes == 1 && sizes.width == 4 && row <= 64;
            let blocks = match (simple, pass > 2 || sizes.planes > 1) {
                (true, _) => BUSY_WARPS,
                (_, false) => 12,
                (_, true) => 8,
            };
            Recipe {
                warps: 1,
                team: 1,
                lane_rows: rows_for(match blocks {
                    BUSY_WARPS => 16,
                    12.. => 12,
                    _ => 8,
                }) as u32,
                // Tiny sums are found again when they are folded.
                once: bytes > TINY,
                blocks: blocks as u32,
                ..recipe
            }
        } else if sizes.units * 2 * BUSY_WARPS <= processors {
            // What counts is how soon the last part is there.
            let warps = if bytes > LARGE && sizes.width == 4 { 16 } else { 8 };
            let tiles = sizes.features.div_ceil(32);
            let most = (processors / 2 / sizes.units).max(1);
            let split = tiles.div_ceil(warps).clamp(1, most).min(MOST_PARTS) as u32;
            let warps = warps as u32;
            Recipe { warps, team: warps, split, lane_rows: 1, once: false, blocks: 1, ..recipe }
        } else {
            // As many parts as are at work at once: more would wait for the first.
            let at_once = (processors * BUSY_WARPS / 4 / sizes.units).max(1);
            let tiles = sizes.features.div_ceil(32 * recipe.lane_rows as usize);
            let split = at_once.min(tiles.div_ceil(4)).min(MOST_PARTS) as u32;
            Recipe { split, ..recipe }
        };
        recipe.fit(sizes, properties)
    }

    /// The nearest recipe whose shared memory the device has.
    fn fit(mut self, sizes: &Sizes, properties: &Properties) -> Result<Self, Error> {
        while self.shared_bytes(sizes) > u64::from(properties.shared_per_block) {
            if self.fold_tokens > 8 {
                self.fold_tokens = (self.fold_tokens / 2).next_multiple_of(8);
            } else if self.warps > 1 {
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
        if self.split == 0 || self.split as usize > MOST_PARTS || (self.split > 1 && self.team == 1)
        {
            return no("split", self.split, "it must be 1 to 256, and 1 for teams of one warp");
        }
        if self.fold_tokens == 0 || !self.fold_tokens.is_multiple_of(8) || self.fold_tokens > 256 {
            return no("fold_tokens", self.fold_tokens, "it must be a multiple of 8, at most 256");
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

    /// Rows of sums that a warp loads at once.
    fn rows_at_once(&self, sizes: &Sizes) -> usize {
        let widest = 16 / sizes.width;
        let fits = |n: &usize| sizes.d_value.is_multiple_of(*n);
        let vector = [widest, widest / 2, widest / 4].into_iter().find(fits).unwrap_or(1);
        32 / (sizes.d_value / vector).min(32)
    }

    /// Bytes of shared memory of a block: as `TEAM_FLOATS` of `decode_types.cuh`.
    pub(crate) fn shared_bytes(&self, sizes: &Sizes) -> u64 {
        let [pass, team, fold] = [self.pass, self.team, self.fold_tokens].map(|n| n as usize);
        let (heads, row) = (self.heads(sizes), sizes.d_value + 1);
        let round = |floats: usize| floats.next_multiple_of(4) as u64;
        let at_once = self.rows_at_once(sizes);
        let fold_rows = at_once * if at_once >= 8 { 4 } else { 8 };
        let warp = (32 * self.lane_rows as usize * pass).max(256).max(8 * fold_rows);
        let floats = round((sizes.d_key + 1) * heads)
            + round(sizes.d_key)
            + round(sizes.d_value)
            + round(sizes.planes * heads * row)
            + round(team * pass * row.max(sizes.planes))
            + round(team * pass)
            + round(pass * sizes.terms)
            + round((team + 2) * pass)
            + 4
            + round((sizes.d_key + 1) * (fold + 4))
            + round(fold * sizes.d_value)
            + fold as u64
            + team as u64 * round(warp);
        4 * floats * u64::from(self.warps / self.team)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn h100() -> Properties {
        Properties {
            name: "H100".into(),
            capability: (9, 0),
            multiprocessors: 132,
            shared_per_block: 227 << 10,
            l2_bytes: 50 << 20,
            memory: 80 << 30,
        }
    }

    fn sizes(d: usize, features: usize, units: usize) -> Sizes {
        let (group, planes, terms, block) = (1, 1, 0, 64);
        Sizes { d_key: d, d_value: d, features, width: 4, group, planes, terms, block, units }
    }

    /// Warps, team, parts of a head.
    fn layout(sizes: &Sizes) -> [u32; 3] {
        let recipe = Recipe::choose(sizes, &h100()).unwrap();
        recipe.check(sizes).unwrap();
        assert!(recipe.shared_bytes(sizes) <= 227 << 10);
        [recipe.warps, recipe.team, recipe.split]
    }

    #[test]
    fn many_small_heads_take_a_warp_each_and_large_ones_are_split() {
        assert_eq!(layout(&sizes(8, 165, 8192)), [1, 1, 1]);
        assert_eq!(layout(&sizes(16, 969, 2048)), [1, 1, 1]);
        assert_eq!(layout(&sizes(32, 6545, 256)), [4, 4, 2]);
        assert_eq!(layout(&sizes(64, 47905, 32)), [4, 4, 16]);
        assert_eq!(layout(&sizes(8, 165, 1)), [8, 8, 1]);
        assert_eq!(layout(&sizes(32, 6545, 1)), [8, 8, 26]);
        assert_eq!(layout(&sizes(64, 47905, 1)), [16, 16, 66]);
    }

    #[test]
    fn what_does_not_fit_is_refused_and_what_nearly_does_is_not() {
        for group in [1, 7, 16, 40, 128] {
            let sizes = Sizes { group, ..sizes(64, 2145, 4) };
            let recipe = Recipe::choose(&sizes, &h100()).unwrap();
            assert!(recipe.heads(&sizes) - group < recipe.pass as usize);
            layout(&sizes);
        }
        let far_too_many = Sizes { group: 4096, ..sizes(64, 2145, 4) };
        assert!(matches!(
            Recipe::choose(&far_too_many, &h100()),
            Err(Error::Unsupported { what }) if what.contains("4096 query heads")
        ));
    }
}
