//! A layer's past, of constant size or growing, and attention to it.

use sata::{Call, State, View, ViewMut};

use super::Error;
use super::cache::Cache;
use super::weights::{Group, Weights};
use crate::Position;

/// What a layer remembers, group by group of its heads.
#[derive(Clone, Debug)]
pub(super) struct Past(pub Vec<Memory>);

/// What a group of heads remembers.
#[derive(Clone, Debug)]
pub(super) enum Memory {
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
        let d = weights.config.attention.head_dim;
        let memory = |group: &Group| {
            Ok(match &group.plan {
                Some(plan) => Memory::State(State::new(plan, 1, group.heads[1])?),
                None => Memory::Cache(Cache::new(group.heads[1], d)),
            })
        };
        weights.groups.iter().map(memory).collect::<Result<_, _>>().map(Past)
    }

    /// Bytes of its numbers.
    pub(super) fn bytes(&self) -> usize {
        let bytes = |memory: &Memory| match memory {
            Memory::State(state) => state.bytes(),
            Memory::Cache(cache) => cache.bytes(),
        };
        self.0.iter().map(bytes).sum()
    }

    /// Takes tokens in and answers their queries, `[tokens][heads · head_dim]`. `scratch` is
    /// working memory.
    pub(super) fn attend(
        &mut self,
        weights: &Weights,
        mut rows: Rows<'_>,
        out: &mut [f32],
        scratch: &mut Vec<f32>,
    ) -> Result<Troubles, Error> {
        let mut troubles = Troubles::default();
        for (memory, group) in self.0.iter_mut().zip(&weights.groups) {
            match memory {
                Memory::State(state) => {
                    troubles.0 += attend_state(weights, group, state, &rows, out)?.0;
                }
                Memory::Cache(cache) => {
                    attend_cache(weights, group, cache, &mut rows, out, scratch);
                }
            }
        }
        Ok(troubles)
    }
}

/// Where a group's queries, keys and values begin in a row, and its gates.
fn places(weights: &Weights, group: &Group) -> [usize; 4] {
    let a = &weights.config.attention;
    let (heads, kv, d) = (a.heads, a.kv_heads(), a.head_dim);
    let [query, key] = group.first;
    [query * d, (heads + key) * d, (heads + kv + key) * d, (heads + 2 * kv) * d + key]
}

fn attend_state(
    weights: &Weights,
    group: &Group,
    state: &mut State<f32>,
    Rows { rows, stride, tokens }: &Rows<'_>,
    out: &mut [f32],
) -> Result<Troubles, Error> {
    let a = &weights.config.attention;
    let Some(plan) = &group.plan else {
        return Ok(Troubles::default());
    };
    let (all, d, tokens) = (a.heads, a.head_dim, *tokens);
    let ([heads, kv], [query, key, value, gate]) = (group.heads, places(weights, group));
    let view = |first: usize, heads: usize| {
        View::strided(&rows[first..], [1, heads, tokens, d], [0, d, *stride])
    };
    let mut call = Call::causal(view(query, heads)?, view(key, kv)?, view(value, kv)?);
    match a.position {
        Position::Gates => {
            let strides = [0, 1, *stride];
            call = call.log_gates(View::strided(&rows[gate..], [1, kv, tokens, 1], strides)?);
        }
        Position::Slopes => call = call.slopes(&group.slopes),
        Position::None | Position::Rotary => {}
    }
    let out = ViewMut::strided(&mut out[query..], [1, heads, tokens, d], [0, d, all * d])?;
    let found = plan.run(call.state(state), out)?;
    Ok(Troubles(found.non_positive + found.non_finite))
}

fn attend_cache(
    weights: &Weights,
    group: &Group,
    cache: &mut Cache,
    Rows { rows, stride, tokens }: &mut Rows<'_>,
    out: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    let a = &weights.config.attention;
    let (all, d) = (a.heads, a.head_dim);
    let ([heads, kv], [query, key, value, gate]) = (group.heads, places(weights, group));
    let share = heads / kv;
    let scale = (d as f64).powf(-0.5) as f32;
    for (row, out) in rows.chunks_mut(*stride).zip(out.chunks_exact_mut(all * d)).take(*tokens) {
        row[query..query + heads * d].iter_mut().for_each(|q| *q *= scale);
        for head in 0..kv {
            let decay = match a.position {
                Position::Gates => Some(f64::from(row[gate + head])),
                Position::Slopes => Some(-group.slopes[head]),
                Position::None | Position::Rotary => None,
            };
            let [key, value] = [key, value].map(|first| &row[first + head * d..][..d]);
            cache.push(head, key, value, decay);
        }
        for (head, out) in out[query..query + heads * d].chunks_exact_mut(d).enumerate() {
            let query = &row[query + head * d..][..d];
            cache.attend(weights.kernels, head / share, query, scratch, out);
        }
    }
}
