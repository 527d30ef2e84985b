use crate::infer::{Error, Session};

/// A model in the middle of a text. A clone goes on from the same place.
pub trait Reader: Clone {
    /// The same model before any text.
    ///
    /// # Errors
    /// What making it says.
    fn fresh(&self) -> Result<Self, Error>;

    /// Takes tokens in.
    ///
    /// # Errors
    /// No tokens, unknown tokens, numbers that overflow.
    fn feed(&mut self, tokens: &[u32]) -> Result<(), Error>;

    /// Takes tokens in and gives the natural logarithm of the probability of each after all before
    /// it: one for every token, but none for the first of a text.
    ///
    /// # Errors
    /// As for [`Reader::feed`].
    fn score(&mut self, tokens: &[u32]) -> Result<Vec<f32>, Error>;

    /// Logits of the token that comes next, `[vocab]`; empty before the first token.
    fn logits(&self) -> &[f32];
}

impl Reader for Session {
    fn fresh(&self) -> Result<Self, Error> {
        Session::new(self.weights(), self.sampling().clone())
    }

    fn feed(&mut self, tokens: &[u32]) -> Result<(), Error> {
        Session::feed(self, tokens).map(drop)
    }

    fn score(&mut self, tokens: &[u32]) -> Result<Vec<f32>, Error> {
        Session::score(self, tokens)
    }

    fn logits(&self) -> &[f32] {
        Session::logits(self)
    }
}
