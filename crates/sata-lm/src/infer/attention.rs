//! A layer's past, of constant size or growing, and attention to it.

use sata::{Call, State, View, ViewMut};

use super::Error;
use super::cache::Cache;
use super::weights::Weights;
use crate::Position;

/// What a layer remembers.
#[derive(Clone, Debug)]
pub(super) enum Past {
    /// A state: constant cost per token.
    State(State<f32>),
    /// Softmax's KV cache.
    Cache(Cache),
}

/// Queries, keys, values and logarithms of gates of some tokens, one row each.
pub(super) struct Rows<'a> {
    pub rows: &'a mut [f32],
    /// Elements from one row to the next.
    pub stride: usize,
    pub tokens: usize,
}

/// What attention came across: queries without a positive, finite denominator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Troubles(pub u64);

impl Past {
    /// Nothing yet.
    pub(super) fn new(weights: &Weights) -> Result<Self, Error> {
        let a = &weights.config.attention;
        Ok(match &weights.plan {
            Some(plan) => Past::State(State::new(plan, 1, a.kv_heads())?),
            None => Past::Cache(Cache::new(a.kv_heads(), a.head_dim)),
        })
    }

    /// Bytes of its numbers.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Past::State(state) => state.bytes(),
            Past::Cache(cache) => cache.bytes(),
        }
    }

    /// Takes tokens in and answers their queries, `[tokens][heads · head_dim]`. `scratch` is
    /// working memory.
    pub(super) fn attend(
        &mut self,
        weights: &Weights,
        rows: Rows<'_>,
        out: &mut [f32],
        scratch: &mut Vec<f32>,
    ) -> Result<Troubles, Error> {
        match self {
            Past::State(state) => attend_state(weights, state, rows, out),
            Past::Cache(cache) => {
                attend_cache(weights, cache, rows, out, scratch);
                Ok(Troubles::default())
            }
        }
    }
}

fn attend_state(
    weights: &Weights,
    state: &mut State<f32>,
    Rows { rows, stride, tokens }: Rows<'_>,
    out: &mut [f32],
) -> Result<Troubles, Error> {
    let a = &weights.config.attention;
    let Some(plan) = &weights.plan else {
        return Ok(Troubles::default());
    };
    let (heads, kv, d) = (a.heads, a.kv_heads(), a.head_dim);
    let view = |first: usize, heads: usize| {
        let shape = [1, heads, tokens, d];
        View::strided(&rows[first * d..], shape, [0, d, stride])
    };
    let mut call = Call::causal(view(0, heads)?, view(heads, kv)?, view(heads + kv, kv)?);
    match a.position {
        Position::Gates => {
            let gates = &rows[(heads + 2 * kv) * d..];
            let strides = [0, 1, stride];
            call = call.log_gates(View::strided(gates, [1, kv, tokens, 1], strides)?);
        }
        Position::Slopes => call = call.slopes(&weights.slopes),
        Position::None | Position::Rotary => {}
    }
    let out = ViewMut::strided(out, [1, heads, tokens, d], [0, d, heads * d])?;
    let found = plan.run(call.state(state), out)?;
    Ok(Troubles(found.non_positive + found.non_finite))
}

fn attend_cache(
    weights: &Weights,
    cache: &mut Cache,
    Rows { rows, stride, tokens }: Rows<'_>,
    out: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    let a = &weights.config.attention;
    let (heads, kv, d) = (a.heads, a.kv_heads(), a.head_dim);
    let group = heads / kv;
    let scale = (d as f64).powf(-0.5) as f32;
    for (row, out) in rows.chunks_mut(stride).zip(out.chunks_exact_mut(heads * d)).take(tokens) {
        row[..heads * d].iter_mut().for_each(|q| *q *= scale);
        let key_values = &row[heads * d..];
        for head in 0..kv {
            let decay = match a.position {
                Position::Gates => Some(f64::from(key_values[2 * kv * d + head])),
                Position::Slopes => Some(-weights.slopes[head]),
                Position::None | Position::Rotary => None,
            };
            let [key, value] = [head, kv + head].map(|i| &key_values[i * d..(i + 1) * d]);
            cache.push(head, key, value, decay);
        }
        for (head, out) in out.chunks_exact_mut(d).enumerate() {
            let query = &row[head * d..(head + 1) * d];
            cache.attend(weights.kernels, head / group, query, scratch, out);
        }
    }
}
