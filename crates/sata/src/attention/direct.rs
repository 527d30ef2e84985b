//! The direct form: every query weighs every key, and nothing is summed ahead.

use std::ops::Range;

use super::call::Shape;
use super::local::Local;
use super::method::Method;
use super::standing::Standing;
use super::tally::Tally;
use super::window::{Sinks, Source, Window};
use super::{Piece, finish};
use crate::arch::{Buffer, PANEL, Scratch, Tokens, stride};
use crate::state::{Mark, Raw};
use crate::view::Rows;
use crate::{Element, Real, parallel};

/// Queries of one head that one task answers.
const TASK: usize = 4 * PANEL;

/// What queries see of the keys.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Seen {
    /// Query t sees keys 0 … t.
    Causal,
    /// Query t sees keys 0 … t + this, all near.
    Offset(usize),
    /// All.
    Full,
}

/// Answers all pieces.
pub(crate) fn direct<E: Element>(
    method: &Method<E::Compute>,
    pieces: &[Piece<'_, E>],
    rows: &Rows<'_, E>,
    shape: Shape,
    seen: Seen,
) -> Tally {
    pieces.iter().fold(Tally::default(), |total, piece| {
        let empty = |head| (head, Window::default(), Sinks::default());
        let mut heads: Vec<_> = (0..shape.kv_heads).map(empty).collect();
        parallel::for_each(&mut heads, |(head, window, sinks)| {
            let source = Source { method, piece, kv_head: *head, open: 0, raw: None, folded: 0 };
            *window = Window::new(method, piece.keys);
            window.load(source, 0..piece.keys);
            if method.sinks > 0 {
                let count = method.sinks.min(piece.keys);
                let mut raw = Raw::new([method.d_key, method.d_value], count, method.fades);
                source.keep_sinks(&mut raw, 0.0);
                *sinks = Sinks::new(method, &raw, count);
            }
        });
        let mut tasks: Vec<(usize, Range<usize>)> = (0..shape.kv_heads * shape.group)
            .flat_map(|head| {
                (0..piece.queries)
                    .step_by(TASK)
                    .map(move |first| (head, first..(first + TASK).min(piece.queries)))
            })
            .collect();
        total.merged(parallel::map_reduce(
            &mut tasks,
            Tally::default(),
            |(head, queries)| {
                let (_, window, sinks) = &heads[*head / shape.group];
                task(
                    method,
                    piece,
                    rows,
                    [*head, *head / shape.group],
                    queries.clone(),
                    window,
                    sinks,
                    seen,
                )
            },
            Tally::merged,
        ))
    })
}

#[allow(clippy::too_many_arguments)]
fn task<E: Element>(
    method: &Method<E::Compute>,
    piece: &Piece<'_, E>,
    rows: &Rows<'_, E>,
    [query_head, kv_head]: [usize; 2],
    queries: Range<usize>,
    window: &Window<E::Compute>,
    sinks: &Sinks<E::Compute>,
    seen: Seen,
) -> Tally {
    let nothing = Mark::default();
    let standing = match seen {
        Seen::Causal => Standing::causal(method, window, sinks, &nothing, queries.clone(), 0, 0),
        Seen::Offset(more) => Standing::offset(method, window, queries.start + more, queries.len()),
        Seen::Full => Standing::full(method, window, sinks, &nothing, queries.len()),
    };
    let ld = stride(queries.len());
    let mut x = Buffer::zeroed((method.d_key + 1) * ld);
    let first = queries.start;
    let count = method.load_queries(piece, query_head, queries, &standing, &mut x, ld);
    let mut num = Buffer::zeroed(method.planes() * count * method.padded);
    let mut den = Buffer::zeroed(method.planes() * count);
    let mut tally = Tally::default();
    let mut local = Local {
        window,
        sinks,
        // Moments are of the logits themselves.
        reach: 0.0,
        standing: &standing,
        queries: Tokens { x: &x, ld, count },
        query_head,
        kv_head,
        num: &mut num,
        den: &mut den,
        scratch: &mut Scratch::direct(),
    };
    method.weigh(&mut local, &mut tally);
    // SAFETY: tasks answer disjoint queries.
    unsafe {
        finish(method, rows, piece, [query_head, first], &den[..standing.len()], &num, &mut tally);
    }
    tally
}

impl<T: Real> Method<T> {
    /// Softmax: all is near.
    pub(crate) fn softmax(
        kernels: &'static crate::arch::Kernels<T>,
        [d_key, d_value]: [usize; 2],
        scale: f64,
    ) -> Self {
        Method {
            kernels,
            d_key,
            d_value,
            padded: d_value.next_multiple_of(kernels.lanes),
            scale: T::from_f64(scale),
            near: crate::Near::Blocks(usize::MAX),
            block: 1,
            sinks: 0,
            fades: false,
            rule: crate::series::Rule::Fixed(vec![]),
            orders: vec![],
            coefficients: vec![],
            planes_of: vec![],
            terms: 0,
            noise: crate::series::Noise { relative: 0.0, absolute: 0.0, reach: 0.0 },
            diagnose: false,
            centre: None,
        }
    }
}
