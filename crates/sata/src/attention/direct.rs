//! The direct form: every query weighs every key by the polynomial.

use std::ops::Range;

use super::call::Shape;
use super::{Piece, finish, load};
use crate::arch::{Buffer, Direct, PANEL, Scratch, TOKENS, Tokens};
use crate::basis::TILE;
use crate::view::Rows;
use crate::{Diagnostics, Element, Plan, Real, parallel};

/// Queries of one head that one task answers.
const TASK: usize = 4 * PANEL;

/// Keys and values of one head, in the kernels' layout.
struct Loaded<'p, 'a, E: Element> {
    piece: &'p Piece<'a, E>,
    head: usize,
    keys: Buffer<E::Compute>,
    values: Buffer<E::Compute>,
}

/// All pieces of a call without a state.
pub(super) fn direct<E: Element>(
    plan: &Plan,
    pieces: &[Piece<'_, E>],
    rows: &Rows<'_, E>,
    shape: Shape,
    causal: bool,
) -> Diagnostics {
    let kernels = plan.kernels::<E>();
    let (d_key, d_value) = (plan.spec().d_key(), plan.spec().d_value());
    let padded = d_value.next_multiple_of(kernels.lanes);
    let coefficients = plan.coefficients::<E::Compute>();
    let scale = E::Compute::from_f64(plan.spec().scale());
    let mut total = Diagnostics::default();
    for piece in pieces {
        let ld = piece.keys.next_multiple_of(TOKENS);
        let mut loaded: Vec<Loaded<'_, '_, E>> = (0..shape.kv_heads)
            .map(|head| Loaded {
                piece,
                head,
                keys: Buffer::zeroed((d_key + 1) * ld),
                values: Buffer::zeroed(ld * padded),
            })
            .collect();
        parallel::for_each(&mut loaded, |one| {
            load::keys(one.piece, one.head, 0..one.piece.keys, &mut one.keys, ld, 0);
            load::values(one.piece, one.head, 0..one.piece.keys, &mut one.values, padded, 0);
        });
        let mut tasks: Vec<(usize, Range<usize>)> = (0..shape.kv_heads * shape.group)
            .flat_map(|head| {
                (0..piece.queries)
                    .step_by(TASK)
                    .map(move |first| (head, first..(first + TASK).min(piece.queries)))
            })
            .collect();
        let part = parallel::map_reduce(
            &mut tasks,
            Diagnostics::default(),
            |(head, queries)| {
                let from = &loaded[*head / shape.group];
                let mut x = Buffer::zeroed((d_key + 1) * PANEL);
                let mut num = Buffer::zeroed(PANEL * padded);
                let mut den = Buffer::zeroed(PANEL);
                let mut scratch = Scratch::new(1);
                let mut found = Diagnostics::default();
                let mut first = queries.start;
                while first < queries.end {
                    let panel = first..(first + PANEL).min(queries.end);
                    let count = load::queries(piece, *head, panel.clone(), scale, &mut x, PANEL);
                    num.fill(E::Compute::ZERO);
                    den.fill(E::Compute::ZERO);
                    let keys = if causal { panel.end } else { piece.keys };
                    let mut s = 0;
                    while s < keys {
                        let tile = TILE.min((keys - s).next_multiple_of(TOKENS));
                        let mut call = Direct {
                            d_key,
                            queries: Tokens { x: &x, ld: PANEL, count },
                            keys: Tokens { x: &from.keys[s..], ld, count: tile },
                            values: &from.values[s * padded..],
                            padded,
                            diagonal: (causal && s + tile > panel.start)
                                .then(|| panel.start as isize - s as isize),
                            coefficients: &coefficients,
                            num: &mut num,
                            den: &mut den,
                            max: &mut [],
                            scratch: &mut scratch,
                        };
                        // SAFETY: kernels are only handed out for instruction sets that are there.
                        unsafe { (kernels.polynomial)(&mut call) };
                        s += tile;
                    }
                    // SAFETY: tasks answer disjoint queries.
                    let part = unsafe {
                        finish(rows, piece, *head, first, &den[..panel.len()], &num, padded)
                    };
                    found = found.merged(part);
                    first = panel.end;
                }
                found
            },
            Diagnostics::merged,
        );
        total = total.merged(part);
    }
    total
}
