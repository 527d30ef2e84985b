//! What is computed: data, sizes, and what sees what.

use crate::Series;

/// The sizes of a [`Problem`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Heads of `q` and of the output: a multiple of `kv_heads`.
    pub query_heads: usize,
    /// Heads of `k` and `v`. Query head h reads key/value head h / (query_heads / kv_heads).
    pub kv_heads: usize,
    /// Tokens of `q`.
    pub queries: usize,
    /// Tokens of `k` and `v`.
    pub keys: usize,
    /// d_K.
    pub d_key: usize,
    /// d_V.
    pub d_value: usize,
}

/// Which part of the past is weighed by exp(x) itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Near {
    /// No block: all but the sinks is far.
    None,
    /// The block of the query and this many blocks before it. Causal only.
    Blocks(usize),
}

/// The logarithm g of the decay: a weight carries exp(g_t − g_s). All forms belong to the key/value head.
#[derive(Clone, Debug, PartialEq)]
pub enum Decay {
    /// g = 0.
    None,
    /// ALiBi: g_t = −m·t, one slope m per key/value head.
    Slopes(Vec<f64>),
    /// Forget gates: g_t = Σ_{r≤t} log f_r; the log f_r, `[kv_heads][keys]`.
    LogGates(Vec<f64>),
}

/// One attention over one sequence, all arrays contiguous. [`Problem::new`] gives the paper's setting; change its
/// fields for anything else.
///
/// Key s stands at absolute position s. In a causal problem query i stands at `offset` + i and sees the keys at or
/// before it. Otherwise every query sees all keys and stands, as far as decay goes, at the last of them: a finished
/// context has decayed to its end. (Where a query stands changes denominators, never outputs.)
#[derive(Clone, Debug)]
pub struct Problem<'a> {
    /// All sizes.
    pub shape: Shape,
    /// Queries, `[query_heads][queries][d_key]`.
    pub q: &'a [f64],
    /// Keys, `[kv_heads][keys][d_key]`.
    pub k: &'a [f64],
    /// Values, `[kv_heads][keys][d_value]`.
    pub v: &'a [f64],
    /// 1/c: x = scale · (q·k). By default 1/√d_K.
    pub scale: f64,
    /// Whether a query sees only the keys at or before its position.
    pub causal: bool,
    /// The absolute position of the first query. Causal only: `offset` + queries ≤ keys.
    pub offset: usize,
    /// `[keys]`, false for a key that is not there. It keeps its position, and its gate still forgets.
    pub key_mask: Option<&'a [bool]>,
    /// The polynomial for far keys.
    pub series: Series,
    /// P, the number of terms.
    pub terms: usize,
    /// Which keys are near.
    pub near: Near,
    /// B, tokens per block: blocks begin at the absolute positions 0, B, 2B, …
    pub block: usize,
    /// The first so many keys are near every query.
    pub sinks: usize,
    /// The decay.
    pub decay: Decay,
}

impl<'a> Problem<'a> {
    /// The paper's setting: causal, four Taylor terms, scale 1/√d_K, everything far, no decay, no mask.
    pub fn new(shape: Shape, q: &'a [f64], k: &'a [f64], v: &'a [f64]) -> Self {
        Problem {
            shape,
            q,
            k,
            v,
            scale: 1.0 / (shape.d_key as f64).sqrt(),
            causal: true,
            offset: 0,
            key_mask: None,
            series: Series::Taylor,
            terms: 4,
            near: Near::None,
            block: 64,
            sinks: 0,
            decay: Decay::None,
        }
    }

    /// Panics, naming the argument and the sizes, unless the problem is well formed and finite.
    pub fn check(&self) {
        let Shape { query_heads, kv_heads, queries, keys, d_key, d_value } = self.shape;
        for (name, size) in [
            ("query_heads", query_heads),
            ("kv_heads", kv_heads),
            ("queries", queries),
            ("keys", keys),
            ("d_key", d_key),
            ("d_value", d_value),
            ("block", self.block),
        ] {
            assert!(size > 0, "{name} is 0");
        }
        assert!(
            query_heads.is_multiple_of(kv_heads),
            "query_heads {query_heads} is not a multiple of kv_heads {kv_heads}"
        );
        check_array("q", self.q, query_heads * queries * d_key);
        check_array("k", self.k, kv_heads * keys * d_key);
        check_array("v", self.v, kv_heads * keys * d_value);
        assert!(self.scale.is_finite(), "scale is {}: it must be finite", self.scale);
        if let Some(mask) = self.key_mask {
            assert!(mask.len() == keys, "key_mask has {} elements, keys is {keys}", mask.len());
        }
        match &self.decay {
            Decay::None => {}
            Decay::Slopes(slopes) => check_array("Slopes", slopes, kv_heads),
            Decay::LogGates(log_gates) => check_array("LogGates", log_gates, kv_heads * keys),
        }
        if self.causal {
            assert!(
                self.offset + queries <= keys,
                "offset {} + queries {queries} exceeds keys {keys}: a causal query stands at a key",
                self.offset
            );
        } else {
            assert!(
                self.offset == 0,
                "offset is {}: only causal queries have a position",
                self.offset
            );
            assert!(
                self.near == Near::None,
                "near is {:?}: only causal queries have a block, use Near::None (and sinks)",
                self.near
            );
        }
        self.series.check(self.terms);
    }

    /// The key/value head that a query head reads.
    pub fn kv_head(&self, query_head: usize) -> usize {
        query_head / (self.shape.query_heads / self.shape.kv_heads)
    }

    /// The query vector, `[d_key]`.
    pub fn query(&self, query_head: usize, query: usize) -> &'a [f64] {
        vector(self.q, query_head * self.shape.queries + query, self.shape.d_key)
    }

    /// The key vector, `[d_key]`.
    pub fn key(&self, kv_head: usize, key: usize) -> &'a [f64] {
        vector(self.k, kv_head * self.shape.keys + key, self.shape.d_key)
    }

    /// The value vector, `[d_value]`.
    pub fn value(&self, kv_head: usize, key: usize) -> &'a [f64] {
        vector(self.v, kv_head * self.shape.keys + key, self.shape.d_value)
    }

    /// x = scale · (q·k).
    pub fn logit(&self, query_head: usize, query: usize, key: usize) -> f64 {
        let q = self.query(query_head, query);
        let k = self.key(self.kv_head(query_head), key);
        let mut dot = 0.0;
        for i in 0..self.shape.d_key {
            dot += q[i] * k[i];
        }
        self.scale * dot
    }

    /// The absolute position t of a query.
    pub fn position(&self, query: usize) -> usize {
        if self.causal { self.offset + query } else { self.shape.keys - 1 }
    }

    /// Whether a query sees a key.
    pub fn sees(&self, query: usize, key: usize) -> bool {
        let there = match self.key_mask {
            Some(mask) => mask[key],
            None => true,
        };
        there && key <= self.position(query)
    }

    /// Whether a key is near a query that sees it.
    pub fn is_near(&self, query: usize, key: usize) -> bool {
        if key < self.sinks {
            return true;
        }
        match self.near {
            Near::None => false,
            Near::Blocks(n) => {
                let query_block = self.position(query) / self.block;
                let key_block = key / self.block;
                key_block + n >= query_block
            }
        }
    }

    /// g_t − g_{t−1}: how the token at t decays what came before it.
    pub fn log_step(&self, kv_head: usize, t: usize) -> f64 {
        match &self.decay {
            Decay::None => 0.0,
            Decay::Slopes(slopes) => -slopes[kv_head],
            Decay::LogGates(log_gates) => log_gates[kv_head * self.shape.keys + t],
        }
    }

    /// g_t − g_s for every key s ≤ t, summed from t backwards, so that no digits are lost to a large g.
    pub fn log_decays(&self, kv_head: usize, query: usize) -> Vec<f64> {
        let t = self.position(query);
        let mut log_decays = vec![0.0; t + 1];
        match &self.decay {
            Decay::None => {}
            Decay::Slopes(slopes) => {
                for s in 0..=t {
                    log_decays[s] = -slopes[kv_head] * (t - s) as f64;
                }
            }
            Decay::LogGates(log_gates) => {
                for s in (0..t).rev() {
                    log_decays[s] =
                        log_decays[s + 1] + log_gates[kv_head * self.shape.keys + s + 1];
                }
            }
        }
        log_decays
    }
}

fn vector(data: &[f64], row: usize, width: usize) -> &[f64] {
    &data[row * width..(row + 1) * width]
}

fn check_array(name: &str, data: &[f64], expected: usize) {
    assert!(data.len() == expected, "{name} has {} elements, its sizes say {expected}", data.len());
    for (i, x) in data.iter().enumerate() {
        assert!(x.is_finite(), "{name} is {x} at element {i}: it must be finite");
    }
}
