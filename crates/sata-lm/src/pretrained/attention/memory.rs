//! Exact tokens, and groups or sums for the rest: a past whose size does not change.

use std::sync::Arc;

use super::exponential::exp_all;
use super::far::{FarPart, FarSums};
use super::groups::Groups;
use super::setting::{Calibration, Far, MemorySetting};
use crate::pretrained::linear::{add_product, dot, times};
use crate::pretrained::rotary::Reach;

/// Keys and values of some tokens, `[tokens][d]` each, and how far back they are from the first token
/// of the current block.
#[derive(Clone, Debug, Default)]
struct Tokens {
    keys: Vec<f32>,
    values: Vec<f32>,
    back: Vec<f32>,
}

impl Tokens {
    fn push(&mut self, key: &[f32], value: &[f32], back: f32) {
        self.keys.extend_from_slice(key);
        self.values.extend_from_slice(value);
        self.back.push(back);
    }

    /// Takes the first `count` out.
    fn pop(&mut self, count: usize, d: usize) -> Tokens {
        Tokens {
            keys: self.keys.drain(..count * d).collect(),
            values: self.values.drain(..count * d).collect(),
            back: self.back.drain(..count).collect(),
        }
    }
}

/// One key/value head's past.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    setting: MemorySetting,
    calibration: Option<Arc<Calibration>>,
    d: usize,
    scale: f32,
    /// Tokens seen.
    position: usize,
    sinks: Tokens,
    /// Tokens before the first open one.
    folded: usize,
    /// All tokens from there on but the sinks.
    open: Tokens,
    kept: Tokens,
    /// How large the key of each kept token is, and the smallest last.
    sizes: Vec<f32>,
    groups: Groups,
    sums: Option<FarSums>,
    /// For rotary embeddings: how far back keys may seem to lie.
    reach: Option<Arc<Reach>>,
}

/// What is visible to a query of some exact tokens.
#[derive(Clone, Copy)]
enum Seen {
    /// All.
    All,
    /// Token i of them if `first + i` is no later than the query.
    From(usize),
}

impl Memory {
    /// Nothing yet. The setting has been checked.
    pub(super) fn new(
        setting: &MemorySetting,
        calibration: Option<&Arc<Calibration>>,
        d: usize,
    ) -> Self {
        let sums = match (setting.far, calibration) {
            (Far::Mixed { rotated }, Some(known)) => Some(FarSums::new(known, d, rotated)),
            _ => None,
        };
        Memory {
            setting: setting.clone(),
            calibration: calibration.cloned(),
            d,
            scale: (d as f64).powf(-0.5) as f32,
            position: 0,
            sinks: Tokens::default(),
            folded: 0,
            open: Tokens::default(),
            kept: Tokens::default(),
            sizes: vec![],
            groups: Groups::default(),
            sums,
            reach: None,
        }
    }

    /// The same, in which what is not near seems to lie no further back than `reach`; sums stay as they
    /// are.
    pub(super) fn within(self, reach: &Arc<Reach>) -> Self {
        Memory { reach: Some(reach.clone()), ..self }
    }

    /// Bytes when everything is full, in f32.
    pub(super) fn bytes(&self) -> usize {
        let MemorySetting { near, block, sinks, kept, far } = &self.setting;
        let tokens = (near + 1) * block + sinks;
        let pair = 2 * self.d * 4;
        let far = match far {
            Far::Nothing => 0,
            Far::Groups(groups) => groups * (pair + 12),
            Far::Mixed { .. } => self.sums.as_ref().map_or(0, FarSums::bytes),
        };
        tokens * (pair + 4) + kept * (pair + 8) + far
    }

    /// Takes tokens in and answers the queries of `group` heads, each `[tokens][d]`; gives the same.
    /// Where `answers` is false for a query's block, its answer is 0.
    pub(super) fn attend(
        &mut self,
        queries: &[Vec<f32>],
        keys: &[f32],
        values: &[f32],
        answers: impl Fn(usize) -> bool,
    ) -> Vec<Vec<f32>> {
        let (d, block) = (self.d, self.setting.block);
        let tokens = keys.len() / d;
        let mut out = vec![vec![0.0; keys.len()]; queries.len()];
        let mut done = 0;
        while done < tokens {
            let part = (block - self.position % block).min(tokens - done);
            if self.position.is_multiple_of(block) {
                self.age();
            }
            self.fold_old();
            let first = self.position;
            self.take(&keys[done * d..(done + part) * d], &values[done * d..(done + part) * d]);
            if answers(first / block) {
                let range = done * d..(done + part) * d;
                let rows: Vec<f32> = queries
                    .iter()
                    .flat_map(|q| q[range.clone()].iter().map(|x| x * self.scale))
                    .collect();
                let answer = self.weigh(&rows, Some((first, part)));
                for (out, answer) in out.iter_mut().zip(answer.chunks_exact(part * d)) {
                    out[range.clone()].copy_from_slice(answer);
                }
            }
            done += part;
        }
        out
    }

    /// Takes all tokens of a text in, and then answers all its queries: nothing is near.
    pub(super) fn attend_all(
        &mut self,
        queries: &[Vec<f32>],
        keys: &[f32],
        values: &[f32],
    ) -> Vec<Vec<f32>> {
        let (d, step) = (self.d, self.setting.block * self.d);
        for (keys, values) in keys.chunks(step).zip(values.chunks(step)) {
            self.take(keys, values);
            let all = self.open.keys.len() / d;
            let old = self.open.pop(all, d);
            self.folded = self.position;
            self.fold(old);
        }
        let scaled = |q: &Vec<f32>| q.iter().map(|x| x * self.scale).collect::<Vec<f32>>();
        queries.iter().map(|q| self.weigh(&scaled(q), None)).collect()
    }

    fn take(&mut self, keys: &[f32], values: &[f32]) {
        let d = self.d;
        for (key, value) in keys.chunks_exact(d).zip(values.chunks_exact(d)) {
            let to =
                if self.position < self.setting.sinks { &mut self.sinks } else { &mut self.open };
            to.push(key, value, -((self.position % self.setting.block) as f32));
            self.position += 1;
        }
    }

    /// A block begins.
    fn age(&mut self) {
        let block = self.setting.block;
        self.open.back.iter_mut().for_each(|back| *back += block as f32);
        if let Some(reach) = &self.reach {
            let Memory { sinks, kept, groups, .. } = self;
            for (keys, back) in [
                (&mut sinks.keys, &mut sinks.back),
                (&mut kept.keys, &mut kept.back),
                (&mut groups.keys, &mut groups.back),
            ] {
                reach.age(keys, back, block);
            }
        }
    }

    /// Folds what is no longer near the next token.
    fn fold_old(&mut self) {
        let MemorySetting { near, block, sinks, .. } = self.setting;
        let from = (self.position / block).saturating_sub(near) * block;
        let begins = self.folded.max(sinks);
        if from > begins {
            let old = self.open.pop(from - begins, self.d);
            self.folded = from;
            self.fold(old);
        }
    }

    fn fold(&mut self, tokens: Tokens) {
        let d = self.d;
        let rest = if self.setting.kept == 0 { tokens } else { self.keep(tokens) };
        if rest.keys.is_empty() {
            return;
        }
        match self.setting.far {
            Far::Nothing => {}
            Far::Groups(most) => {
                let known = self.calibration.as_deref();
                let rest = [&rest.keys[..], &rest.values, &rest.back];
                self.groups.fold(rest, most, d, known);
            }
            Far::Mixed { .. } => {
                if let Some(sums) = &mut self.sums {
                    sums.fold(&rest.keys, &rest.values);
                }
            }
        }
    }

    /// Keeps the tokens with the largest keys; gives the others.
    fn keep(&mut self, tokens: Tokens) -> Tokens {
        let d = self.d;
        let pairs = tokens.keys.chunks_exact(d).zip(tokens.values.chunks_exact(d));
        for ((key, value), &back) in pairs.zip(&tokens.back) {
            self.sizes.push(self.size(key));
            self.kept.push(key, value, back);
        }
        let mut order: Vec<usize> = (0..self.sizes.len()).collect();
        order.sort_by(|&a, &b| self.sizes[b].total_cmp(&self.sizes[a]));
        let mut stays = vec![false; order.len()];
        order.iter().take(self.setting.kept).for_each(|&i| stays[i] = true);
        let (mut kept, mut rest, mut sizes) = (Tokens::default(), Tokens::default(), vec![]);
        let all = self.kept.keys.chunks_exact(d).zip(self.kept.values.chunks_exact(d));
        for (i, ((key, value), &back)) in all.zip(&self.kept.back).enumerate() {
            if stays[i] {
                kept.push(key, value, back);
                sizes.push(self.sizes[i]);
            } else {
                rest.push(key, value, back);
            }
        }
        (self.kept, self.sizes) = (kept, sizes);
        rest
    }

    /// The expected square of the logit of a key less the mean; its square without a calibration.
    fn size(&self, key: &[f32]) -> f32 {
        let d = self.d;
        let Some(known) = &self.calibration else {
            return dot(key, key);
        };
        let centred: Vec<f32> = key.iter().zip(&known.centre).map(|(k, c)| k - c).collect();
        let mut place = vec![0.0; d];
        for (x, row) in centred.iter().zip(known.metric.chunks_exact(d)) {
            place.iter_mut().zip(row).for_each(|(place, l)| *place += x * l);
        }
        dot(&place, &place)
    }

    /// Answers queries with the scale, `[heads][tokens][d]`: the first of the tokens and how many
    /// there are, or those that see everything.
    fn weigh(&self, queries: &[f32], causal: Option<(usize, usize)>) -> Vec<f32> {
        let d = self.d;
        let rows = queries.len() / d;
        let begins = self.folded.max(self.setting.sinks);
        let parts = [
            (&self.sinks.keys, &self.sinks.values, Seen::From(0)),
            (&self.kept.keys, &self.kept.values, Seen::All),
            (&self.groups.keys, &self.groups.values, Seen::All),
            (&self.open.keys, &self.open.values, Seen::From(begins)),
        ];
        let far = self.sums.as_ref().and_then(|sums| sums.read(queries));
        let mut maxima = match &far {
            Some(far) => far.levels.clone(),
            None => vec![f32::NEG_INFINITY; rows],
        };
        let mut logits = vec![];
        for (i, (keys, _, seen)) in parts.iter().enumerate() {
            let count = keys.len() / d;
            let mut x = vec![0.0; rows * count];
            times(queries, keys, d, &mut x);
            if i == 2 {
                let more: Vec<f32> = self.groups.counts.iter().map(|n| n.ln()).collect();
                for row in x.chunks_exact_mut(count.max(1)) {
                    row.iter_mut().zip(&more).for_each(|(x, more)| *x += more);
                }
            }
            if let (Seen::From(begin), Some((first, tokens))) = (*seen, causal) {
                for (r, row) in x.chunks_exact_mut(count.max(1)).enumerate() {
                    let visible = (first + r % tokens + 1).saturating_sub(begin).min(count);
                    row[visible..].fill(f32::NEG_INFINITY);
                }
            }
            for (max, row) in maxima.iter_mut().zip(x.chunks_exact(count.max(1))) {
                // NaN is kept.
                *max = row.iter().fold(*max, |max, &x| if x <= max { max } else { x });
            }
            logits.push(x);
        }
        let mut out = vec![0.0; rows * d];
        let mut denominators = vec![0.0f32; rows];
        if let Some(FarPart { numerators, denominators: dens, levels }) = far {
            for (r, max) in maxima.iter().enumerate() {
                let factor = (levels[r] - max).exp();
                denominators[r] = factor * dens[r];
                let from = &numerators[r * d..(r + 1) * d];
                out[r * d..(r + 1) * d].iter_mut().zip(from).for_each(|(out, x)| *out = factor * x);
            }
        }
        for ((_, values, _), mut x) in parts.into_iter().zip(logits) {
            let count = values.len() / d;
            for ((row, max), den) in
                x.chunks_exact_mut(count.max(1)).zip(&maxima).zip(&mut denominators)
            {
                row.iter_mut().for_each(|x| *x -= max);
                exp_all(row);
                *den += row.iter().sum::<f32>();
            }
            add_product(&x, values, d, &mut out);
        }
        for (row, den) in out.chunks_exact_mut(d).zip(&denominators) {
            row.iter_mut().for_each(|x| *x /= den);
        }
        out
    }
}
