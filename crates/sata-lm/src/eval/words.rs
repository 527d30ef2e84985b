use rand::Rng;
use rand::seq::SliceRandom;

use super::EvalError;
use crate::{END_OF_TEXT, Tokenizer};

/// Tokens that are words: a space and at least three letters. They are what random facts are made
/// of, since a model can be asked for each at once.
#[derive(Clone, Debug)]
pub struct Words {
    tokens: Vec<u32>,
    vocab: usize,
}

impl Words {
    /// The words of a tokenizer. One that has too few of them, such as that of single bytes, gives
    /// all tokens but the end of a text instead when `any` is set.
    ///
    /// # Errors
    /// [`EvalError::Tokenizer`], which does not happen.
    pub fn new(tokenizer: &Tokenizer, needed: usize, any: bool) -> Result<Self, EvalError> {
        let vocab = tokenizer.vocab();
        let all = (0..vocab as u32).filter(|&id| id != END_OF_TEXT);
        let mut tokens = vec![];
        for id in all.clone() {
            if is_word(tokenizer.token_bytes(id)?) {
                tokens.push(id);
            }
        }
        if tokens.len() < needed && any {
            tokens = all.collect();
        }
        if tokens.len() < needed {
            return Err(EvalError::Words { vocab, words: tokens.len(), needed });
        }
        Ok(Words { tokens, vocab })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// `count` different words, in random order.
    ///
    /// # Errors
    /// [`EvalError::Words`] when there are fewer.
    pub fn draw(&self, count: usize, rng: &mut impl Rng) -> Result<Vec<u32>, EvalError> {
        if count > self.tokens.len() {
            let words = self.tokens.len();
            return Err(EvalError::Words { vocab: self.vocab, words, needed: count });
        }
        let mut tokens = self.tokens.clone();
        let (drawn, _) = tokens.partial_shuffle(rng, count);
        Ok(drawn.to_vec())
    }
}

fn is_word(bytes: &[u8]) -> bool {
    matches!(bytes, [b' ', letters @ ..] if letters.len() >= 3 && letters.iter().all(u8::is_ascii_lowercase))
}
