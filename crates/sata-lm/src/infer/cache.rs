//! A KV cache for softmax, which grows by every token.

use super::matvec::{Attend, BLOCK, Kernels, VALUE_LANES};

/// Keys and values of all tokens of one layer.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    pub heads: Vec<Head>,
    pub d: usize,
    /// d in whole vectors.
    padded: usize,
    pub tokens: usize,
}

/// Those of one key/value head.
#[derive(Clone, Debug, Default)]
pub(super) struct Head {
    /// `[blocks][d][BLOCK]`: tokens of a block are lanes.
    keys: Vec<f32>,
    /// `[tokens][padded]`.
    values: Vec<f32>,
    /// Logarithm of all decay up to each token; empty without decay.
    pub fading: Vec<f64>,
}

impl Cache {
    pub(super) fn new(heads: usize, d: usize) -> Self {
        let padded = d.next_multiple_of(VALUE_LANES);
        Cache { heads: vec![Head::default(); heads], d, padded, tokens: 0 }
    }

    /// Adds a token's key and value to one head; the last head's completes it.
    pub(super) fn push(&mut self, head: usize, key: &[f32], value: &[f32], decay: Option<f64>) {
        let (at, d) = (self.tokens, self.d);
        let last = head + 1 == self.heads.len();
        let head = &mut self.heads[head];
        if at.is_multiple_of(BLOCK) {
            head.keys.resize(head.keys.len() + d * BLOCK, 0.0);
        }
        let block = &mut head.keys[at / BLOCK * d * BLOCK..];
        for (lanes, &k) in block.chunks_mut(BLOCK).zip(key) {
            lanes[at % BLOCK] = k;
        }
        head.values.extend_from_slice(value);
        head.values.resize((at + 1) * self.padded, 0.0);
        if let Some(decay) = decay {
            let before = head.fading.last().copied().unwrap_or(0.0);
            head.fading.push(before + decay);
        }
        if last {
            self.tokens += 1;
        }
    }

    /// The last token's query against all of a head; `weights` is working memory.
    pub(super) fn attend(
        &self,
        kernels: &Kernels,
        head: usize,
        query: &[f32],
        weights: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let room = self.tokens.next_multiple_of(BLOCK);
        if weights.len() < room {
            // Grows as the cache does, by halves, not by every token.
            weights.resize(room + room / 2, 0.0);
        }
        let head = &self.heads[head];
        let mut call = Attend {
            query,
            keys: &head.keys,
            values: &head.values,
            padded: self.padded,
            tokens: self.tokens,
            fading: &head.fading,
            weights,
            out,
        };
        // SAFETY: kernels are only handed out for instructions that are there.
        unsafe { (kernels.attend)(&mut call) };
    }

    /// Bytes of its numbers.
    pub(super) fn bytes(&self) -> usize {
        let each = |head: &Head| 4 * (head.keys.len() + head.values.len()) + 8 * head.fading.len();
        self.heads.iter().map(each).sum()
    }

    /// Keys and values, `[heads][tokens][d]` each, in f32.
    pub(super) fn rows(&self) -> [Vec<f32>; 2] {
        let len = self.heads.len() * self.tokens * self.d;
        let mut out = [Vec::with_capacity(len), Vec::with_capacity(len)];
        for head in &self.heads {
            for t in 0..self.tokens {
                let block = &head.keys[t / BLOCK * self.d * BLOCK..];
                out[0].extend((0..self.d).map(|c| block[c * BLOCK + t % BLOCK]));
                out[1].extend_from_slice(&head.values[t * self.padded..][..self.d]);
            }
        }
        out
    }

    /// The cache of such rows and of `fading`, `[heads][tokens]` or nothing.
    pub(super) fn from_rows(
        [heads, tokens, d]: [usize; 3],
        [keys, values]: [&[f32]; 2],
        fading: &[f64],
    ) -> Self {
        let mut cache = Cache::new(heads, d);
        for t in 0..tokens {
            for head in 0..heads {
                let row = (head * tokens + t) * d..(head * tokens + t + 1) * d;
                cache.push(head, &keys[row.clone()], &values[row], None);
            }
        }
        for (head, fading) in cache.heads.iter_mut().zip(fading.chunks(tokens.max(1))) {
            head.fading = fading.to_vec();
        }
        cache
    }
}
