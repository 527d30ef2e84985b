//! Bringing the caller's rows into the kernels' layout.

use std::ops::Range;

use super::Piece;
use crate::arch::TOKENS;
use crate::{Element, Real, View};

/// Transposes tokens of one head into `x[channel * ld + at ..]`, times `scale`.
pub(super) fn transpose<E: Element>(
    view: &View<'_, E>,
    [batch, head, first]: [usize; 3],
    count: usize,
    scale: Option<E::Compute>,
    x: &mut [E::Compute],
    ld: usize,
    at: usize,
) {
    let mut t = 0;
    // Sixteen tokens at a time, so that a row of `x` is written a cache line at a time.
    while t < count {
        let n = TOKENS.min(count - t);
        let mut rows: [&[E]; TOKENS] = [&[]; TOKENS];
        for (i, row) in rows[..n].iter_mut().enumerate() {
            *row = view.row(batch, head, first + t + i);
        }
        let d = rows[0].len();
        for channel in 0..d {
            let to = &mut x[channel * ld + at + t..][..n];
            match scale {
                Some(scale) => {
                    for (to, row) in to.iter_mut().zip(&rows) {
                        *to = row[channel].to_compute() * scale;
                    }
                }
                None => {
                    for (to, row) in to.iter_mut().zip(&rows) {
                        *to = row[channel].to_compute();
                    }
                }
            }
        }
        t += n;
    }
}

/// Zeroes columns `columns` of `rows` rows.
pub(super) fn clear<T: Real>(x: &mut [T], ld: usize, rows: usize, columns: Range<usize>) {
    for row in 0..rows {
        x[row * ld + columns.start..row * ld + columns.end].fill(T::ZERO);
    }
}

/// Loads queries of head `head`, scaled, with weight 1; columns up to a multiple of TOKENS are
/// zero. Gives back the padded count.
pub(super) fn queries<E: Element>(
    piece: &Piece<'_, E>,
    head: usize,
    tokens: Range<usize>,
    scale: E::Compute,
    x: &mut [E::Compute],
    ld: usize,
) -> usize {
    let d_key = piece.q.shape()[3];
    let count = tokens.len();
    let padded = count.next_multiple_of(TOKENS);
    let place = [piece.q_batch, head, piece.q_first + tokens.start];
    transpose(&piece.q, place, count, Some(scale), x, ld, 0);
    clear(x, ld, d_key + 1, count..padded);
    x[d_key * ld..][..count].fill(E::Compute::ONE);
    padded
}

/// Loads keys of head `head` at column `at`, with weight 1 or, where masked, 0 (and a key of 0,
/// so that all its features are 0).
pub(super) fn keys<E: Element>(
    piece: &Piece<'_, E>,
    head: usize,
    tokens: Range<usize>,
    x: &mut [E::Compute],
    ld: usize,
    at: usize,
) {
    let d_key = piece.k.shape()[3];
    let count = tokens.len();
    let place = [piece.k_batch, head, piece.k_first + tokens.start];
    transpose(&piece.k, place, count, None, x, ld, at);
    let weights = &mut x[d_key * ld + at..][..count];
    weights.fill(E::Compute::ONE);
    if let Some(mask) = piece.mask {
        for (t, &keep) in mask[tokens].iter().enumerate() {
            if !keep {
                clear(x, ld, d_key + 1, at + t..at + t + 1);
            }
        }
    }
}

/// Loads values of head `head` into `rows[at ..]` of `padded` columns.
pub(super) fn values<E: Element>(
    piece: &Piece<'_, E>,
    head: usize,
    tokens: Range<usize>,
    rows: &mut [E::Compute],
    padded: usize,
    at: usize,
) {
    for (t, token) in tokens.enumerate() {
        let from = piece.v.row(piece.k_batch, head, piece.k_first + token);
        let to = &mut rows[(at + t) * padded..(at + t + 1) * padded];
        let (body, tail) = to.split_at_mut(from.len());
        for (to, &from) in body.iter_mut().zip(from) {
            *to = from.to_compute();
        }
        tail.fill(E::Compute::ZERO);
    }
}
