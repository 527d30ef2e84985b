//! The direct form: every query weighs every key by the polynomial.

use std::ops::Range;

use super::call::Shape;
use super::{Piece, finish, load};
use crate::arch::{Buffer, Direct, Kernels, PANEL, Scratch, TOKENS, Tokens};
use crate::basis::TILE;
use crate::view::Rows;
use crate::{Diagnostics, Element, Plan, Real, parallel};

/// Queries of one head that one task answers.
const TASK: usize = 4 * PANEL;

/// By what a query weighs a key.
pub(crate) enum Weight<T> {
    /// Σ a_p x^p.
    Polynomial(Vec<T>),
    /// exp(x).
    Exponential,
}

/// A direct form: sizes and weights.
pub(crate) struct Weighing<T: 'static> {
    pub kernels: &'static Kernels<T>,
    pub d_key: usize,
    pub d_value: usize,
    pub scale: T,
    pub weight: Weight<T>,
    /// Query t sees the keys up to t and this many more; `None`: all.
    pub causal: Option<usize>,
}

impl<T: Real> Weighing<T> {
    pub(super) fn of<E: Element<Compute = T>>(plan: &Plan, causal: bool) -> Self {
        Weighing {
            kernels: plan.kernels::<E>(),
            d_key: plan.spec().d_key(),
            d_value: plan.spec().d_value(),
            scale: T::from_f64(plan.spec().scale()),
            weight: Weight::Polynomial(plan.coefficients()),
            causal: causal.then_some(0),
        }
    }

    fn padded(&self) -> usize {
        self.d_value.next_multiple_of(self.kernels.lanes)
    }

    /// Answers all pieces.
    pub(crate) fn run<E: Element<Compute = T>>(
        &self,
        pieces: &[Piece<'_, E>],
        rows: &Rows<'_, E>,
        shape: Shape,
    ) -> Diagnostics {
        pieces.iter().fold(Diagnostics::default(), |total, piece| {
            let mut loaded: Vec<Loaded<T>> =
                (0..shape.kv_heads).map(|_| Loaded::default()).collect();
            let mut heads: Vec<_> = loaded.iter_mut().enumerate().collect();
            parallel::for_each(&mut heads, |(head, one)| one.load(self, piece, *head));
            let mut tasks: Vec<(usize, Range<usize>)> = (0..shape.kv_heads * shape.group)
                .flat_map(|head| {
                    (0..piece.queries)
                        .step_by(TASK)
                        .map(move |first| (head, first..(first + TASK).min(piece.queries)))
                })
                .collect();
            total.merged(parallel::map_reduce(
                &mut tasks,
                Diagnostics::default(),
                |(head, queries)| {
                    self.task(piece, rows, *head, queries.clone(), &loaded[*head / shape.group])
                },
                Diagnostics::merged,
            ))
        })
    }

    fn task<E: Element<Compute = T>>(
        &self,
        piece: &Piece<'_, E>,
        rows: &Rows<'_, E>,
        head: usize,
        queries: Range<usize>,
        from: &Loaded<T>,
    ) -> Diagnostics {
        let (d_key, padded) = (self.d_key, self.padded());
        let mut x = Buffer::zeroed((d_key + 1) * PANEL);
        let mut num = Buffer::zeroed(PANEL * padded);
        let mut den = Buffer::zeroed(PANEL);
        let mut max = Buffer::zeroed(PANEL);
        let mut scratch = Scratch::direct();
        let mut found = Diagnostics::default();
        let (kernel, coefficients) = match &self.weight {
            Weight::Polynomial(coefficients) => (self.kernels.polynomial, &coefficients[..]),
            Weight::Exponential => (self.kernels.exponential, &[][..]),
        };
        for first in queries.clone().step_by(PANEL) {
            let panel = first..(first + PANEL).min(queries.end);
            let count = load::queries(piece, head, panel.clone(), self.scale, &mut x, PANEL);
            num.fill(T::ZERO);
            den.fill(T::ZERO);
            max.fill(T::LOWEST);
            let seen = self.causal.map_or(piece.keys, |more| piece.keys.min(panel.end + more));
            let mut s = 0;
            while s < seen {
                let tile = TILE.min((seen - s).next_multiple_of(TOKENS));
                // The diagonal, counted within the panel and the tile.
                let diagonal = self.causal.map(|more| (first + more) as isize - s as isize);
                let mut call = Direct {
                    d_key,
                    queries: Tokens { x: &x, ld: PANEL, count },
                    keys: Tokens { x: &from.keys[s..], ld: from.ld, count: tile },
                    values: &from.values[s * padded..],
                    padded,
                    diagonal: diagonal.filter(|&diagonal| diagonal < tile as isize),
                    coefficients,
                    num: &mut num,
                    den: &mut den,
                    max: &mut max,
                    scratch: &mut scratch,
                };
                // SAFETY: kernels are only handed out for instruction sets that are there.
                unsafe { kernel(&mut call) };
                s += tile;
            }
            // SAFETY: tasks answer disjoint queries.
            found = found.merged(unsafe {
                finish(rows, piece, head, first, &den[..panel.len()], &num, padded)
            });
        }
        found
    }
}

/// Keys and values of one head, in the kernels' layout.
#[derive(Default)]
struct Loaded<T> {
    keys: Buffer<T>,
    ld: usize,
    values: Buffer<T>,
}

impl<T: Real> Loaded<T> {
    fn load<E: Element<Compute = T>>(
        &mut self,
        by: &Weighing<T>,
        piece: &Piece<'_, E>,
        head: usize,
    ) {
        self.ld = piece.keys.next_multiple_of(TOKENS);
        self.keys = Buffer::zeroed((by.d_key + 1) * self.ld);
        self.values = Buffer::zeroed(self.ld * by.padded());
        load::keys(piece, head, 0..piece.keys, &mut self.keys, self.ld, 0);
        load::values(piece, head, 0..piece.keys, &mut self.values, by.padded(), 0);
    }
}
