//! One query at a time: decode.

use std::ops::Range;

use super::{Piece, finish};
use crate::arch::{DECODE_SCRATCH, Kernels, ReadOne, TOKENS, WeighOne};
use crate::basis::Basis;
use crate::state::{FoldWork, HeadState, Open, Sums};
use crate::view::Rows;
use crate::{Diagnostics, Element, Plan, Real, State, parallel};

/// Features that one task reads: enough to hide the cost of handing a task out.
const TASK_FEATURES: usize = 1 << 15;

/// What all heads of a step share.
struct Env<'e, E: Element> {
    basis: &'e Basis,
    kernels: &'static Kernels<E::Compute>,
    coefficients: Vec<E::Compute>,
    scale: E::Compute,
    d_value: usize,
    padded: usize,
}

impl<'e, E: Element> Env<'e, E> {
    fn new(plan: &Plan, basis: &'e Basis) -> Self {
        let kernels = plan.kernels::<E>();
        Env {
            basis,
            kernels,
            coefficients: plan.coefficients(),
            scale: E::Compute::from_f64(plan.spec().scale()),
            d_value: plan.spec().d_value(),
            padded: plan.spec().d_value().next_multiple_of(kernels.lanes),
        }
    }
}

/// Every sequence takes one token.
pub(super) fn steps<E: Element>(
    plan: &Plan,
    pieces: &[Piece<'_, E>],
    rows: &Rows<'_, E>,
    group: usize,
    state: &mut State<E::Compute>,
) -> Diagnostics {
    let basis = state.basis.clone();
    let env = Env::<E>::new(plan, &basis);
    let block = plan.spec().block();
    let each = TASK_FEATURES.div_ceil(basis.len()).max(1);
    let mut tasks = vec![];
    for (piece, sequence) in pieces.iter().zip(&mut state.sequences) {
        let open = sequence.open;
        sequence.position += 1;
        sequence.open = (open + 1) % block;
        for (i, heads) in sequence.heads.chunks_mut(each).enumerate() {
            tasks.push((piece, open, i * each, heads));
        }
    }
    parallel::map_reduce(
        &mut tasks,
        Diagnostics::default(),
        |(piece, open, first, heads)| {
            let open = *open;
            let mut found = Diagnostics::default();
            let mut work = None;
            // One head's working memory serves all of the task: it stays in cache.
            let mut scratch =
                heads.first_mut().map(|h| std::mem::take(&mut h.scratch)).unwrap_or_default();
            for i in 0..heads.len() {
                let ahead = ahead(&heads[i].sums, heads.get(i + 1).map(|next| &next.sums));
                if let Some(next) = heads.get(i + 1) {
                    next.prefetch_open(open + 1);
                }
                let head = &mut heads[i];
                let kv_head = *first + i;
                append(piece, kv_head, head, open, env.d_value);
                for query_head in kv_head * group..(kv_head + 1) * group {
                    let HeadState { sums, open: tokens, .. } = &*head;
                    // SAFETY: tasks answer disjoint heads.
                    let part = unsafe {
                        one(
                            &env,
                            piece,
                            [query_head, 0],
                            rows,
                            sums,
                            ahead,
                            tokens,
                            open + 1,
                            &mut scratch,
                        )
                    };
                    found = found.merged(part);
                }
                if open + 1 == block {
                    let work = work
                        .get_or_insert_with(|| FoldWork::new(env.basis, env.d_value, env.kernels));
                    head.fold_open(env.basis, block, work);
                }
            }
            if let Some(head) = heads.first_mut() {
                head.scratch = scratch;
            }
            found
        },
        Diagnostics::merged,
    )
}

/// Where to ask for memory while `sums` are read: further on in them where they are large, else in
/// the next head's.
fn ahead<T: Real>(sums: &Sums<T>, next: Option<&Sums<T>>) -> isize {
    const FURTHER: usize = 8192;
    if size_of_val(&sums.sums[..]) >= 8 * FURTHER {
        return FURTHER as isize;
    }
    next.map_or(0, |next| {
        next.sums.as_ptr().addr().wrapping_sub(sums.sums.as_ptr().addr()) as isize
    })
}

/// Puts the piece's only token at place `open` of the open block.
fn append<E: Element>(
    piece: &Piece<'_, E>,
    kv_head: usize,
    head: &mut HeadState<E::Compute>,
    open: usize,
    d_value: usize,
) {
    let block = &mut head.open;
    super::load::keys(piece, kv_head, 0..1, &mut block.keys, block.ld, open);
    super::load::values(piece, kv_head, 0..1, &mut block.values, d_value, open);
}

/// A few queries read a finished context one by one.
#[allow(clippy::too_many_arguments)]
pub(super) fn read_each<E: Element>(
    plan: &Plan,
    piece: &Piece<'_, E>,
    query_head: usize,
    queries: Range<usize>,
    rows: &Rows<'_, E>,
    head: &HeadState<E::Compute>,
    open: usize,
    basis: &Basis,
) -> Diagnostics {
    let env = Env::<E>::new(plan, basis);
    let mut scratch = head.scratch.clone();
    let sums = &head.sums;
    queries.fold(Diagnostics::default(), |found, query| {
        // SAFETY: the caller's task alone answers these queries.
        found.merged(unsafe {
            one(
                &env,
                piece,
                [query_head, query],
                rows,
                sums,
                ahead(sums, None),
                &head.open,
                open,
                &mut scratch,
            )
        })
    })
}

/// One query reads far sums and open block, and its output is written.
///
/// # Safety
/// No other thread writes the same row.
#[allow(clippy::too_many_arguments)]
unsafe fn one<E: Element>(
    env: &Env<'_, E>,
    piece: &Piece<'_, E>,
    [query_head, query]: [usize; 2],
    rows: &Rows<'_, E>,
    sums: &Sums<E::Compute>,
    ahead: isize,
    open_block: &Open<E::Compute>,
    open: usize,
    scratch: &mut [E::Compute],
) -> Diagnostics {
    let d_key = env.basis.d_key();
    let terms = scratch.len() - d_key - env.d_value - 3 * TOKENS;
    let (kernel, rest) = scratch.split_at_mut(terms);
    debug_assert!(kernel.len() >= DECODE_SCRATCH);
    let (x, num) = rest.split_at_mut(d_key + TOKENS);
    let row = piece.q.row(piece.q_batch, query_head, piece.q_first + query);
    for (x, &q) in x.iter_mut().zip(row) {
        *x = q.to_compute() * env.scale;
    }
    let num = &mut num[..env.padded];
    num.fill(E::Compute::ZERO);
    let mut den = E::Compute::ZERO;
    let mut read = ReadOne {
        basis: env.basis,
        query: x,
        sums: &sums.sums,
        z: &sums.z,
        d_value: env.d_value,
        ahead,
        coefficients: &env.coefficients,
        num,
        den: &mut den,
        scratch: kernel,
    };
    // SAFETY: kernels are only handed out for instruction sets that are there.
    unsafe { (env.kernels.read_one)(&mut read) };
    if open > 0 {
        let mut weigh = WeighOne {
            query: x,
            keys: &open_block.keys,
            ld: open_block.ld,
            count: open,
            values: &open_block.values,
            d_value: env.d_value,
            coefficients: &env.coefficients,
            num,
            den: &mut den,
            scratch: kernel,
        };
        // SAFETY: as above.
        unsafe { (env.kernels.weigh_one)(&mut weigh, d_key) };
    }
    // SAFETY: forwarded from the caller.
    unsafe { finish(rows, piece, query_head, query, &[den], num, env.padded) }
}
