//! Queries, keys and values of some tokens of one layer.

use crate::pretrained::rotary::Rotary;

/// One layer's queries, keys and values of some tokens, as one row a token: queries, keys, values,
/// head by head.
#[derive(Clone, Debug)]
pub struct Qkv<'a> {
    rows: std::borrow::Cow<'a, [f32]>,
    heads: usize,
    kv_heads: usize,
    d: usize,
}

impl Qkv<'_> {
    /// Rows of `[heads, kv_heads, head_dim]`.
    pub(crate) fn new(rows: Vec<f32>, [heads, kv_heads, d]: [usize; 3]) -> Self {
        Qkv { rows: rows.into(), heads, kv_heads, d }
    }

    /// The same, with queries and keys turned by the rotary embedding.
    pub(crate) fn turned(rows: Vec<f32>, heads: [usize; 3], rotary: &Rotary) -> Self {
        let mut qkv = Self::new(rows, heads);
        let (stride, turned) = (qkv.stride(), (heads[0] + heads[1]) * heads[2]);
        for (t, row) in qkv.rows.to_mut().chunks_exact_mut(stride).enumerate() {
            row[..turned].chunks_exact_mut(heads[2]).for_each(|head| rotary.turn(t, head));
        }
        qkv
    }

    /// Elements of a row.
    fn stride(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.d
    }

    /// How many tokens.
    pub fn tokens(&self) -> usize {
        self.rows.len() / self.stride()
    }

    /// Query heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Elements of a query, key or value.
    pub fn head_dim(&self) -> usize {
        self.d
    }

    fn gather(&self, first: usize) -> Vec<f32> {
        let d = self.d;
        let mut out = Vec::with_capacity(self.tokens() * d);
        for row in self.rows.chunks_exact(self.stride()) {
            out.extend_from_slice(&row[first * d..(first + 1) * d]);
        }
        out
    }

    /// Queries of one head, `[tokens, head_dim]`.
    pub fn queries(&self, head: usize) -> Vec<f32> {
        self.gather(head)
    }

    /// Keys of one key/value head, `[tokens, head_dim]`.
    pub fn keys(&self, kv_head: usize) -> Vec<f32> {
        self.gather(self.heads + kv_head)
    }

    /// Values of one key/value head, `[tokens, head_dim]`.
    pub fn values(&self, kv_head: usize) -> Vec<f32> {
        self.gather(self.heads + self.kv_heads + kv_head)
    }
}

/// `[kv_heads][group][tokens][d]` as `[tokens][heads · d]`.
pub(super) fn interleaved(answers: &[Vec<Vec<f32>>], qkv: &Qkv<'_>) -> Vec<f32> {
    let (tokens, d) = (qkv.tokens(), qkv.head_dim());
    let mut out = Vec::with_capacity(tokens * qkv.heads() * d);
    for t in 0..tokens {
        for head in answers.iter().flatten() {
            out.extend_from_slice(&head[t * d..(t + 1) * d]);
        }
    }
    out
}
