//! Which queries are looked at.

use crate::failure::{Failure, Outcome};

/// Queries before this token are left out of causal attention when nothing is said.
const FROM: usize = 256;

/// Queries spread evenly over the tokens from one on.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The first token that is looked at.
    pub from: usize,
    /// Tokens whose queries are looked at, ascending.
    pub positions: Vec<usize>,
}

impl Sample {
    /// `count` of `tokens` queries, none before `from` (by default 256 or a quarter of the tokens
    /// where a query sees only what is before it, else 0).
    ///
    /// # Errors
    /// When `from` leaves no token.
    pub fn new(tokens: usize, from: Option<usize>, count: usize, causal: bool) -> Outcome<Self> {
        let from = from.unwrap_or(if causal { FROM.min(tokens / 4) } else { 0 });
        if from >= tokens {
            return Err(Failure::new(format!(
                "--from {from} leaves no query: there are {tokens} tokens"
            )));
        }
        let there = tokens - from;
        let count = count.min(there);
        // A product of two sizes need not fit into one.
        let place = |i| (i as u128 * there as u128 / count as u128) as usize;
        Ok(Sample { from, positions: (0..count).map(|i| from + place(i)).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_spread_over_all_tokens_from_the_first() {
        let sample = Sample::new(1024, None, 256, true).unwrap();
        assert_eq!((sample.from, sample.positions.len()), (256, 256));
        assert_eq!((sample.positions[0], sample.positions[255]), (256, 1021));
        assert!(sample.positions.is_sorted_by(|a, b| a < b));
        assert_eq!(
            Sample::new(320, None, 1000, true).unwrap().positions,
            (80..320).collect::<Vec<_>>()
        );
        assert_eq!(Sample::new(320, None, 2, false).unwrap().positions, [0, 160]);
        assert!(Sample::new(10, Some(10), 1, true).is_err());
    }
}
