//! Where a call's sequences lie, and how each is cut into chunks: plain data.

use sata::{Near, Spec};

use crate::Error;

/// `Sequence` of `backward.cuh`, in its order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Row {
    pub q_batch: usize,
    pub q_first: usize,
    pub queries: usize,
    pub k_batch: usize,
    pub k_first: usize,
    pub keys: usize,
    /// Open tokens of the state, and tokens of the sequence before them.
    pub open: usize,
    pub folded: u64,
    places_at: usize,
    queries_at: usize,
    folds_at: usize,
    folds: usize,
    reads_at: usize,
    reads: usize,
    joins: usize,
    open_after: usize,
    pub slot: usize,
    pub ring: usize,
}

impl Row {
    /// Its open tokens and the call's.
    pub fn total(&self) -> usize {
        self.open + self.keys
    }

    /// As kernels take it.
    fn raw(&self) -> [i64; 18] {
        let n = |x: usize| x as i64;
        [
            n(self.q_batch),
            n(self.q_first),
            n(self.queries),
            n(self.k_batch),
            n(self.k_first),
            n(self.keys),
            n(self.open),
            self.folded as i64,
            n(self.places_at),
            n(self.queries_at),
            n(self.folds_at),
            n(self.folds),
            n(self.reads_at),
            n(self.reads),
            n(self.joins),
            n(self.open_after),
            n(self.slot),
            n(self.ring),
        ]
    }
}

/// All sequences of a call with their chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Table {
    pub rows: Vec<Row>,
    pub folds: Vec<i64>,
    /// Queries of each chunk, from and to.
    pub reads: Vec<[i64; 2]>,
    /// Elements per key/value head: places and one more of each sequence; queries.
    pub places: usize,
    pub queries: usize,
    /// Most chunks of a sequence that fold and that read, queries of a chunk, tokens of a fold, queries.
    pub most_folds: usize,
    pub most_reads: usize,
    pub widest_read: usize,
    pub widest_fold: usize,
    pub longest: usize,
    /// Most tokens that come after the last fold of a sequence.
    pub widest_tail: usize,
    /// Whether a sequence folds anything.
    pub folds_any: bool,
}

/// How a sequence is cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    pub causal: bool,
    /// Tokens of a chunk.
    pub chunk: usize,
    /// Whether the gradient by the final state is there.
    pub keep: bool,
}

/// Tokens that are folded in the state when `place` have been seen from a block's beginning on.
pub(crate) fn folded(spec: &Spec, place: usize) -> usize {
    let blocks = place / spec.block();
    match spec.near() {
        Near::None => blocks * spec.block(),
        Near::Blocks(n) => blocks.saturating_sub(n) * spec.block(),
    }
}

/// Folds, and the queries that read at each but the last, as places.
fn cut(spec: &Spec, cut: Cut, row: &Row) -> (Vec<usize>, Vec<[usize; 2]>) {
    let total = row.total();
    let end = folded(spec, total);
    let mut folds = vec![];
    let mut bounds = vec![];
    match spec.near() {
        Near::None => {
            let chunk = cut.chunk.max(1);
            // Up to where the state's sums end, then on.
            let first = if cut.keep { end } else { 0 };
            bounds.extend((0..first).step_by(chunk));
            bounds.extend((first..total).step_by(chunk));
            folds.clone_from(&bounds);
        }
        Near::Blocks(n) => {
            let block = spec.block();
            let chunk = cut.chunk.div_ceil(block).max(1).saturating_mul(block);
            bounds.extend((0..total).step_by(chunk));
            let near = n.saturating_mul(block);
            folds.extend(bounds.iter().map(|&first| first.saturating_sub(near)));
        }
    }
    let last = folds.last().copied().unwrap_or(0);
    folds.push(match spec.near() {
        // All is read from sums.
        _ if !cut.causal => total,
        Near::Blocks(_) if cut.keep => end,
        Near::None if cut.keep && end == total => end,
        _ => last,
    });
    bounds.push(total);
    let reads = bounds.windows(2).map(|w| [w[0], w[1]]).collect();
    (folds, reads)
}

impl Table {
    /// Cuts all sequences, whose rows have all that lies where.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for more chunks than a grid has.
    pub fn new(spec: &Spec, how: Cut, rows: Vec<Row>) -> Result<Self, Error> {
        let mut table = Table::default();
        for mut row in rows {
            let (mut folds, mut reads) = cut(spec, how, &row);
            if !how.causal {
                // One finished context, which is weighed directly where it fits in a chunk.
                if !how.keep && row.total() <= how.chunk {
                    folds = vec![0];
                }
                let first = (0..row.queries).step_by(how.chunk.max(1));
                reads = first.map(|q| [q, (q + how.chunk).min(row.queries)]).collect();
            } else {
                for bounds in &mut reads {
                    *bounds = bounds.map(|place| place.saturating_sub(row.open));
                }
            }
            row.places_at = table.places;
            row.queries_at = table.queries;
            row.folds_at = table.folds.len();
            row.folds = folds.len() - 1;
            row.reads_at = table.reads.len();
            row.reads = reads.len();
            row.open_after = folded(spec, row.total());
            row.joins = folds.iter().position(|&fold| fold == row.open_after).unwrap_or(row.folds);
            if spec.near() != Near::None {
                row.joins = row.folds;
            }
            table.places += row.total() + 1;
            table.queries += row.queries;
            table.most_folds = table.most_folds.max(row.folds);
            table.most_reads = table.most_reads.max(row.reads);
            table.longest = table.longest.max(row.queries);
            for [first, end] in &reads {
                table.widest_read = table.widest_read.max(end - first);
            }
            for bounds in folds.windows(2) {
                table.widest_fold = table.widest_fold.max(bounds[1] - bounds[0]);
            }
            let last = folds[folds.len() - 1];
            table.folds_any |= last > 0;
            table.widest_tail = table.widest_tail.max(row.total() - last);
            table.folds.extend(folds.iter().map(|&fold| fold as i64));
            table.reads.extend(reads.iter().map(|bounds| bounds.map(|x| x as i64)));
            table.rows.push(row);
        }
        let most = table.most_folds.max(table.most_reads);
        if i32::try_from(most).is_err() || i32::try_from(table.rows.len()).is_err() {
            return Err(Error::Unsupported { what: format!("a call of {most} chunks") });
        }
        Ok(table)
    }

    /// Rows as kernels take them.
    pub fn raw(&self) -> Vec<[i64; 18]> {
        self.rows.iter().map(Row::raw).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(open: usize, keys: usize) -> Vec<Row> {
        vec![Row { queries: keys, keys, open, ..Row::default() }]
    }

    /// Every far pair of a query is before its fold or after it, every place in one fold at most, and
    /// queries in one chunk.
    #[test]
    fn chunks_cover_all() {
        for (near, block) in [
            (Near::None, 64),
            (Near::None, 5),
            (Near::Blocks(0), 16),
            (Near::Blocks(1), 16),
            (Near::Blocks(3), 4),
            (Near::Blocks(2), 1),
        ] {
            let spec = Spec::new(2, 2).terms(3).near(near).block(block).build().unwrap();
            let open_most = match near {
                Near::None => block - 1,
                Near::Blocks(n) => (n + 1) * block - 1,
            };
            for open in [0, 1, open_most] {
                for keys in [0, 1, 15, 16, 17, 63, 64, 65, 200] {
                    for (keep, chunk) in [(false, 16), (true, 16), (true, 1), (false, 1000)] {
                        let how = Cut { causal: true, chunk, keep };
                        let table = Table::new(&spec, how, rows(open, keys)).unwrap();
                        let row = &table.rows[0];
                        assert!(table.folds.is_sorted() && table.folds[0] == 0);
                        let mut next = 0;
                        for (read, &fold) in table.reads.iter().zip(&table.folds) {
                            assert!(read[0] >= next || read[0] == read[1]);
                            for query in read[0]..read[1] {
                                assert_eq!(query, next);
                                next += 1;
                                let place = open + query as usize;
                                let far = match near {
                                    Near::None => place + 1,
                                    Near::Blocks(n) => (place / block).saturating_sub(n) * block,
                                };
                                assert!(fold as usize <= far && fold as usize <= place);
                            }
                        }
                        assert_eq!(next as usize, keys);
                        if keep {
                            let end = folded(&spec, open + keys);
                            assert_eq!(
                                table.folds[row.joins], end as i64,
                                "{near:?} {open} {keys}"
                            );
                            assert!(row.folds <= row.joins || near == Near::None);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_finished_context_is_folded_whole_or_not_at_all() {
        let spec = Spec::new(2, 2).terms(3).block(16).build().unwrap();
        for keep in [false, true] {
            for keys in [0, 1, 15, 16, 100] {
                let how = Cut { causal: false, chunk: 32, keep };
                let row = Row { queries: 70, keys, open: 3, ..Row::default() };
                let table = Table::new(&spec, how, vec![row]).unwrap();
                let last = table.folds[table.folds.len() - 1];
                assert_eq!(last, if keep || keys > 29 { keys as i64 + 3 } else { 0 });
                assert_eq!(table.reads, [[0, 32], [32, 64], [64, 70]]);
                if keep {
                    let end = folded(&spec, keys + 3) as i64;
                    assert_eq!(table.folds[table.rows[0].joins], end);
                }
            }
        }
    }
}
