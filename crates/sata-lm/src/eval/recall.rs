//! Associative recall: pairs of random words, and some of them asked for again.

use rand::Rng;
use serde::Serialize;

use super::{EvalError, Reader, Words, stretch};
use crate::{END_OF_TEXT, Tokenizer};

const TASK: &str = "recall";

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RecallSettings {
    /// Numbers of pairs.
    pub pairs: Vec<usize>,
    /// Tokens of text between the last pair and the question.
    pub distances: Vec<usize>,
    /// Texts for each number of pairs and distance.
    pub trials: usize,
    /// Questions for each text, at most; each is asked by itself.
    pub questions: usize,
}

/// What a number of pairs and a distance gave.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RecallRow {
    /// Pairs in the text.
    pub pairs: usize,
    /// Tokens of text after them.
    pub distance: usize,
    /// Questions asked.
    pub questions: usize,
    /// Fraction of answers that were the likeliest of all tokens.
    pub accuracy: f64,
    /// Fraction of answers that were the likeliest of the values in the text.
    pub among_values: f64,
    /// What guessing one of the values would give.
    pub guessing: f64,
}

impl RecallSettings {
    /// Texts that will be read.
    pub fn work(&self) -> usize {
        self.pairs.len() * self.distances.len() * self.trials
    }

    fn check(&self, tokens: usize) -> Result<(), EvalError> {
        let at_least_one = |setting, value: usize| match value {
            0 => Err(EvalError::Setting { setting, value, requires: "at least 1".into() }),
            _ => Ok(()),
        };
        for &pairs in &self.pairs {
            at_least_one("pairs", pairs)?;
        }
        at_least_one("number of pairs given", self.pairs.len())?;
        at_least_one("number of distances given", self.distances.len())?;
        at_least_one("trials", self.trials)?;
        at_least_one("questions", self.questions)?;
        let needed = self.distances.iter().max().copied().unwrap_or(0);
        if needed > tokens {
            return Err(EvalError::Short { task: TASK, tokens, needed });
        }
        Ok(())
    }
}

/// Writes pairs of random words as lines ` key: value`, then text of a given length, then one of the
/// keys again, and looks at which token the model finds the likeliest.
///
/// `text` is what stands between; `done` is told of every text read.
///
/// # Errors
/// [`EvalError::Setting`] for zeros, [`EvalError::Short`] for less text than the largest distance,
/// [`EvalError::Words`] for too few words; what reader and tokenizer say.
pub fn recall<R: Reader>(
    reader: &R,
    tokenizer: &Tokenizer,
    text: &[u32],
    settings: &RecallSettings,
    rng: &mut impl Rng,
    mut done: impl FnMut(),
) -> Result<Vec<RecallRow>, EvalError> {
    settings.check(text.len())?;
    let most = settings.pairs.iter().max().copied().unwrap_or(0);
    let words = Words::new(tokenizer, 2 * most, true)?;
    let (colon, line) = (tokenizer.encode(":")?, tokenizer.encode("\n")?);
    let mut rows = vec![];
    for &pairs in &settings.pairs {
        for &distance in &settings.distances {
            let mut row = Counts::default();
            for _ in 0..settings.trials {
                let drawn = words.draw(2 * pairs, rng)?;
                let (keys, values) = drawn.split_at(pairs);
                let mut tokens = vec![END_OF_TEXT];
                for (&key, &value) in keys.iter().zip(values) {
                    tokens.extend([&[key], &colon[..], &[value], &line].concat());
                }
                tokens.extend(stretch(text, distance, rng, TASK)?);
                tokens.extend(&line);
                let mut past = reader.fresh()?;
                past.feed(&tokens)?;
                // Keys are in random order already, but not their places in the text.
                let asked = rand::seq::index::sample(rng, pairs, settings.questions.min(pairs));
                for i in asked {
                    let mut reader = past.clone();
                    reader.feed(&[&[keys[i]], &colon[..]].concat())?;
                    row.count(reader.logits(), values, i);
                }
                done();
            }
            rows.push(row.row(pairs, distance));
        }
    }
    Ok(rows)
}

#[derive(Default)]
struct Counts {
    questions: usize,
    right: usize,
    right_value: usize,
}

impl Counts {
    fn count(&mut self, logits: &[f32], values: &[u32], answer: usize) {
        let logit = |i: usize| logits[values[i] as usize];
        let is_best_value = (0..values.len()).all(|i| i == answer || logit(i) < logit(answer));
        self.questions += 1;
        self.right_value += usize::from(is_best_value);
        self.right += usize::from(is_likeliest(logits, values[answer]));
    }

    fn row(&self, pairs: usize, distance: usize) -> RecallRow {
        let part = |n: usize| n as f64 / self.questions as f64;
        RecallRow {
            pairs,
            distance,
            questions: self.questions,
            accuracy: part(self.right),
            among_values: part(self.right_value),
            guessing: 1.0 / pairs as f64,
        }
    }
}

/// Whether no other token has as high a logit.
pub(super) fn is_likeliest(logits: &[f32], token: u32) -> bool {
    let at = token as usize;
    logits.iter().enumerate().all(|(i, &x)| i == at || x < logits[at])
}
