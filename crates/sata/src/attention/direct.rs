//! The direct form: every query weighs every key by the polynomial.

use std::ops::Range;

use super::call::Shape;
use super::{Piece, finish, load};
use crate::arch::{Buffer, Direct, Kernels, PANEL, Scratch, TOKENS, Tokens, stride};
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
        let ld = stride(queries.len());
        let mut x = Buffer::zeroed((d_key + 1) * ld);
        let count = load::queries(piece, head, queries.clone(), self.scale, &mut x, ld);
        let mut num = Buffer::zeroed(count * padded);
        let mut den = Buffer::zeroed(count);
        let mut max = Buffer::zeroed(count);
        max.fill(T::LOWEST);
        let (kernel, coefficients) = match &self.weight {
            Weight::Polynomial(coefficients) => (self.kernels.polynomial, &coefficients[..]),
            Weight::Exponential => (self.kernels.exponential, &[][..]),
        };
        let seen = self.causal.map_or(piece.keys, |more| piece.keys.min(queries.end + more));
        let mut call = Direct {
            d_key,
            queries: Tokens { x: &x, ld, count },
            keys: Tokens { x: &from.keys, ld: from.ld, count: seen.next_multiple_of(TOKENS) },
            values: &from.values,
            padded,
            diagonal: self.causal.map(|more| (queries.start + more) as isize),
            coefficients,
            num: &mut num,
            den: &mut den,
            max: &mut max,
            scratch: &mut Scratch::direct(),
        };
        // SAFETY: kernels are only handed out for instruction sets that are there; tasks answer
        // disjoint queries.
        unsafe {
            kernel(&mut call);
            finish(rows, piece, head, queries.start, &den[..queries.len()], &num, padded)
        }
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
        self.ld = stride(piece.keys);
        self.keys = Buffer::zeroed((by.d_key + 1) * self.ld);
        self.values = Buffer::zeroed(self.ld * by.padded());
        load::keys(piece, head, 0..piece.keys, &mut self.keys, self.ld, 0);
        load::values(piece, head, 0..piece.keys, &mut self.values, by.padded(), 0);
    }
}
