//! A session: a model and all that it remembers of one text.

use std::collections::VecDeque;
use std::sync::Arc;

use rayon::prelude::*;

use super::Error;
use super::attention::Past;
use super::layer::Work;
use super::sample::{Choice, MAX_WINDOW, Random, Sampling};
use super::weights::Weights;

/// Tokens that a prompt is taken in at a time.
const PASS: usize = 256;

/// One text in the making: per layer what it remembers, the logits of the next token, the sampler.
///
/// Cloning forks it: both go on alike. With the attention kernels of constant cost its size never
/// changes; softmax's KV cache grows.
#[derive(Clone, Debug)]
pub struct Session {
    pub(super) weights: Arc<Weights>,
    pub(super) pasts: Vec<Past>,
    pub(super) position: u64,
    /// Of the token that comes next, `[vocab]`; empty before the first token.
    pub(super) logits: Vec<f32>,
    /// The last tokens, oldest first, at most [`MAX_WINDOW`].
    pub(super) tail: VecDeque<u32>,
    pub(super) sampling: Sampling,
    pub(super) random: Random,
    pub(super) troubles: u64,
    /// Bytes of text that its reader has withheld so far: the beginning of a character.
    pub(super) unfinished: Vec<u8>,
    choice: Choice,
    work: Work,
}

impl Session {
    /// One that has seen nothing.
    ///
    /// # Errors
    /// [`Error::Sampling`] for settings that cannot be, [`Error::Attention`] for a state that does
    /// not fit in memory.
    pub fn new(weights: &Arc<Weights>, sampling: Sampling) -> Result<Self, Error> {
        sampling.check()?;
        let pasts = (0..weights.config.layers).map(|_| Past::new(weights));
        Ok(Session {
            pasts: pasts.collect::<Result<_, _>>()?,
            position: 0,
            logits: vec![],
            tail: VecDeque::with_capacity(MAX_WINDOW),
            random: Random { seed: sampling.seed, drawn: 0 },
            sampling,
            troubles: 0,
            unfinished: vec![],
            choice: Choice::default(),
            work: Work::new(weights, 1),
            weights: weights.clone(),
        })
    }

    /// The model.
    pub fn weights(&self) -> &Arc<Weights> {
        &self.weights
    }

    /// Tokens seen.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The last tokens, oldest first, 4096 at most.
    pub fn tail(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        self.tail.iter().copied()
    }

    /// How tokens are chosen.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Chooses otherwise from now on; another seed begins its numbers anew.
    ///
    /// # Errors
    /// [`Error::Sampling`], and settings are as they were.
    pub fn set_sampling(&mut self, sampling: Sampling) -> Result<(), Error> {
        sampling.check()?;
        if sampling.seed != self.sampling.seed {
            self.random = Random { seed: sampling.seed, drawn: 0 };
        }
        self.sampling = sampling;
        Ok(())
    }

    /// Logits of the token that comes next, `[vocab]`; empty before the first token.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Bytes of all that it remembers of its text: states, or KV caches.
    pub fn state_bytes(&self) -> usize {
        self.pasts.iter().map(Past::bytes).sum()
    }

    /// Queries so far whose attention had no positive, finite denominator: a series with an even
    /// number of terms has negative weights.
    pub fn troubles(&self) -> u64 {
        self.troubles
    }

    /// Bytes that the reader of the text has withheld, for [`Session::save`].
    pub fn unfinished(&self) -> &[u8] {
        &self.unfinished
    }

    /// Keeps what the reader of the text withholds: the beginning of a character.
    pub fn set_unfinished(&mut self, bytes: &[u8]) {
        self.unfinished.clear();
        self.unfinished.extend_from_slice(bytes);
    }

    /// Takes tokens in, up to 256 at a time, and gives the logits of what follows the last.
    ///
    /// # Errors
    /// [`Error::Empty`] without tokens and [`Error::Token`] for one that is not in the vocabulary,
    /// both before any work; [`Error::NotFinite`] and [`Error::Attention`] when numbers overflow.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<&[f32], Error> {
        if tokens.is_empty() {
            return Err(Error::Empty { argument: "tokens" });
        }
        self.weights.check_tokens(tokens)?;
        self.passes(tokens, |_, _| {})?;
        Ok(&self.logits)
    }

    /// Takes tokens in and gives the natural logarithm of the probability that the model gave each
    /// of them after all before it: one for every token, but none for the first of a session.
    ///
    /// # Errors
    /// As for [`Session::feed`].
    pub fn score(&mut self, tokens: &[u32]) -> Result<Vec<f32>, Error> {
        if tokens.is_empty() {
            return Err(Error::Empty { argument: "tokens" });
        }
        self.weights.check_tokens(tokens)?;
        let mut scores = Vec::with_capacity(tokens.len());
        if !self.logits.is_empty() {
            scores.push(log_probability(&self.logits, tokens[0]));
        }
        let weights = self.weights.clone();
        let (padded, width) = (weights.embed.padded(), weights.config.width);
        /// Tokens whose logits are held at a time.
        const PART: usize = 64;
        let mut logits = vec![0.0; PART.min(tokens.len()) * padded];
        let mut first = 0;
        self.passes(tokens, |hidden, count| {
            // Those that something follows.
            let count = count.min(tokens.len() - 1 - first);
            for at in (0..count).step_by(PART) {
                let part = PART.min(count - at);
                let x = (&hidden[at * width..], width);
                weights.embed.times(weights.kernels, part, x, (&mut logits, padded));
                let found =
                    logits[..part * padded].par_chunks(padded).enumerate().map(|(t, row)| {
                        let next = tokens[first + at + t + 1];
                        log_probability(&row[..weights.config.vocab], next)
                    });
                scores.extend(found.collect::<Vec<_>>());
            }
            first += count;
        })?;
        Ok(scores)
    }

    /// Chooses a token, takes it in, and gives it.
    ///
    /// # Errors
    /// [`Error::Empty`] before the first token; [`Error::NotFinite`] and [`Error::Attention`] when
    /// numbers overflow.
    pub fn next_token(&mut self) -> Result<u32, Error> {
        if self.logits.is_empty() {
            return Err(Error::Empty { argument: "the text so far" });
        }
        let kernels = self.weights.kernels;
        let recent = self.tail.len().saturating_sub(self.sampling.window);
        let token = self.choice.choose(
            &self.sampling,
            &mut self.random,
            &self.logits,
            self.tail.range(recent..).copied(),
            // SAFETY: kernels are only handed out for instructions that are there.
            |x| unsafe { (kernels.exp)(x) },
        );
        self.step(token)?;
        Ok(token)
    }

    /// One token by the session's own working memory.
    fn step(&mut self, token: u32) -> Result<(), Error> {
        let weights = &*self.weights;
        let found = self.work.pass(weights, &mut self.pasts, self.position, &[token])?;
        self.troubles += found.0;
        let (x, padded) = (self.work.hidden(), weights.embed.padded());
        self.logits.resize(padded, 0.0);
        let width = weights.config.width;
        weights.embed.times(weights.kernels, 1, (x, width), (&mut self.logits, padded));
        self.seen(&[token])
    }

    /// Several tokens; `each` gets the hidden states of every pass.
    fn passes(&mut self, tokens: &[u32], mut each: impl FnMut(&[f32], usize)) -> Result<(), Error> {
        if let [token] = tokens {
            self.step(*token)?;
            each(self.work.hidden(), 1);
            return Ok(());
        }
        let weights = self.weights.clone();
        let mut work = Work::new(&weights, tokens.len().min(PASS));
        let mut parts = tokens.chunks(work.room()).peekable();
        while let Some(part) = parts.next() {
            let found = work.pass(&weights, &mut self.pasts, self.position, part)?;
            self.troubles += found.0;
            each(work.hidden(), part.len());
            if parts.peek().is_none() {
                let (width, padded) = (weights.config.width, weights.embed.padded());
                let last = &work.hidden()[(part.len() - 1) * width..];
                self.logits.resize(padded, 0.0);
                weights.embed.times(weights.kernels, 1, (last, width), (&mut self.logits, padded));
            } else {
                self.logits.clear();
            }
            self.seen(part)?;
        }
        Ok(())
    }

    /// Counts tokens whose states are there, and looks at the logits that follow them.
    fn seen(&mut self, tokens: &[u32]) -> Result<(), Error> {
        self.position += tokens.len() as u64;
        for &token in &tokens[tokens.len().saturating_sub(MAX_WINDOW)..] {
            if self.tail.len() == MAX_WINDOW {
                self.tail.pop_front();
            }
            self.tail.push_back(token);
        }
        self.logits.truncate(self.weights.config.vocab);
        match self.logits.iter().position(|x| !x.is_finite()) {
            Some(token) => {
                let (value, position) = (self.logits[token], self.position);
                Err(Error::NotFinite { token, value, position })
            }
            None => Ok(()),
        }
    }
}

/// ln of the softmax of `logits` at `token`.
fn log_probability(logits: &[f32], token: u32) -> f32 {
    let top = logits.iter().fold(f32::NEG_INFINITY, |top, &x| if x <= top { top } else { x });
    let sum: f64 = logits.iter().map(|&x| f64::from((x - top).exp())).sum();
    (f64::from(logits[token as usize] - top) - sum.ln()) as f32
}
