//! A needle: one sentence with a random fact, planted in unrelated text and asked for later.

use rand::Rng;
use serde::Serialize;

use super::recall::is_likeliest;
use super::{BITS_PER_NAT, EvalError, Reader, Words, stretch};
use crate::{END_OF_TEXT, Tokenizer};

const TASK: &str = "needle";
/// Words of a fact.
const FACT: usize = 2;

/// What is planted where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NeedleSettings {
    /// Tokens of text before the sentence.
    pub lead: usize,
    /// Tokens of text between the sentence and the question.
    pub distances: Vec<usize>,
    /// Texts for each distance.
    pub trials: usize,
}

/// What a distance gave.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct NeedleRow {
    /// Tokens between sentence and question.
    pub distance: usize,
    /// Texts read.
    pub trials: usize,
    /// Mean log₂ of the probability of the fact's words after the sentence was read.
    pub bits_with: f64,
    /// The same when the same text came without the sentence.
    pub bits_without: f64,
    /// Fraction of texts whose fact a greedy reading gives, word for word.
    pub accuracy: f64,
    /// The same without the sentence: what luck gives.
    pub accuracy_without: f64,
}

impl NeedleSettings {
    /// Texts that will be read, with and without the sentence.
    pub fn work(&self) -> usize {
        2 * self.distances.len() * self.trials
    }

    fn check(&self, tokens: usize) -> Result<(), EvalError> {
        for (setting, value) in
            [("trials", self.trials), ("number of distances given", self.distances.len())]
        {
            if value == 0 {
                return Err(EvalError::Setting { setting, value, requires: "at least 1".into() });
            }
        }
        let far = self.distances.iter().max().copied().unwrap_or(0);
        let needed = self.lead.saturating_add(far);
        if needed > tokens {
            return Err(EvalError::Short { task: TASK, tokens, needed });
        }
        Ok(())
    }
}

/// Plants the sentence `The secret of the … is … ….` of three random words, lets text of a given
/// length follow, writes the sentence's beginning again, and looks at the probability of the rest.
///
/// `done` is told of every text read.
///
/// # Errors
/// [`EvalError::Setting`] for zeros, [`EvalError::Short`] for less text than `lead` and the largest
/// distance, [`EvalError::Words`] for too few words, [`EvalError::NotFinite`]; what reader and
/// tokenizer say.
pub fn needle<R: Reader>(
    reader: &R,
    tokenizer: &Tokenizer,
    text: &[u32],
    settings: &NeedleSettings,
    rng: &mut impl Rng,
    mut done: impl FnMut(),
) -> Result<Vec<NeedleRow>, EvalError> {
    settings.check(text.len())?;
    let words = Words::new(tokenizer, FACT + 1, true)?;
    let apart = tokenizer.encode("\n\n")?;
    let (the, is, stop) =
        (tokenizer.encode("The secret of the")?, tokenizer.encode(" is")?, tokenizer.encode(".")?);
    let mut rows = vec![];
    for &distance in &settings.distances {
        let mut row = NeedleRow {
            distance,
            trials: settings.trials,
            bits_with: 0.0,
            bits_without: 0.0,
            accuracy: 0.0,
            accuracy_without: 0.0,
        };
        let part = 1.0 / settings.trials as f64;
        for _ in 0..settings.trials {
            let drawn = words.draw(FACT + 1, rng)?;
            let (name, fact) = drawn.split_at(1);
            let question = [&the, name, &is[..]].concat();
            let text = stretch(text, settings.lead + distance, rng, TASK)?;
            let (before, after) = text.split_at(settings.lead);
            let start = [END_OF_TEXT];
            let sentence = [&apart, &question, fact, &stop[..]].concat();
            let asked = [&apart[..], &question].concat();
            let with = [&start, before, &sentence, &apart, after, &asked].concat();
            let without = [&start, before, &apart, after, &asked].concat();
            let (nats, is_right) = ask(reader, &with, fact)?;
            row.bits_with += nats * BITS_PER_NAT * part;
            row.accuracy += f64::from(u8::from(is_right)) * part;
            done();
            let (nats, is_right) = ask(reader, &without, fact)?;
            row.bits_without += nats * BITS_PER_NAT * part;
            row.accuracy_without += f64::from(u8::from(is_right)) * part;
            done();
        }
        rows.push(row);
    }
    Ok(rows)
}

/// ln of the probability of a fact after a text, and whether greedy reading gives it.
fn ask<R: Reader>(reader: &R, text: &[u32], fact: &[u32]) -> Result<(f64, bool), EvalError> {
    let mut reader = reader.fresh()?;
    reader.feed(text)?;
    let (mut nats, mut is_right) = (0.0, true);
    for (i, &token) in fact.iter().enumerate() {
        is_right &= is_likeliest(reader.logits(), token);
        for value in reader.score(&[token])? {
            if !value.is_finite() {
                return Err(EvalError::NotFinite { token, place: text.len() + i, value });
            }
            nats += f64::from(value);
        }
    }
    Ok((nats, is_right))
}
