//! How a sequence's tokens are cut into chunks, and what of each is folded.

use std::ops::Range;

use crate::attention::method::Method;
use crate::{Near, Real};

/// Some tokens of a unit, counted from its first open token.
#[derive(Clone, Debug)]
pub(in crate::attention) struct Chunk {
    /// Those that have queries: all new.
    pub queries: Range<usize>,
    /// Far sums hold what comes before this.
    pub first: usize,
    /// What comes before this is folded afterwards.
    pub fold: usize,
}

impl Chunk {
    /// Those that are looked at.
    pub fn window(&self) -> Range<usize> {
        self.first..self.queries.end.max(self.fold)
    }
}

impl<T: Real> Method<T> {
    /// The chunks, of about `chunk` tokens, of `open` tokens of before and `keys` new ones. Unless it
    /// is to be kept, the past need not hold the last ones.
    pub(in crate::attention) fn chunks(
        &self,
        chunk: usize,
        keep: bool,
        open: usize,
        keys: usize,
    ) -> Vec<Chunk> {
        let total = open + keys;
        if self.near == Near::None {
            return self.far_chunks(chunk, keep, open, total);
        }
        let folded = |place: usize| self.folded(place);
        let block = self.block;
        // Whole blocks, so that a chunk's first query has no far token that is still raw.
        let width = chunk.div_ceil(block).max(1).saturating_mul(block);
        let mut chunks = vec![];
        let mut start = open;
        while start < total {
            let end = (start / block * block).saturating_add(width).min(total);
            let fold = if keep || end < total { folded(end) } else { folded(start) };
            chunks.push(Chunk { queries: start..end, first: folded(start), fold });
            start = end;
        }
        chunks
    }

    /// The same with nothing near.
    fn far_chunks(&self, chunk: usize, keep: bool, open: usize, total: usize) -> Vec<Chunk> {
        // What is kept folds in whole blocks; what is not kept need not fold its last chunk.
        let limit = if keep { self.folded(total) } else { total };
        let mut chunks = vec![];
        let mut first = 0;
        while first < limit {
            let end = (first + chunk).min(limit);
            let fold = if keep || end < limit { end } else { first };
            chunks.push(Chunk { queries: first.max(open)..end.max(open), first, fold });
            first = end;
        }
        if first < total {
            chunks.push(Chunk { queries: first.max(open)..total, first, fold: first });
        }
        chunks
    }
}
