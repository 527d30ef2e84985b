//! Bits per byte against the number of tokens before.

use serde::Serialize;

use super::{BITS_PER_NAT, EvalError, Reader};

/// Tokens that are scored at a time.
const PART: usize = 4096;
/// Positions before this one share a bucket.
const FIRST: usize = 16;
const TASK: &str = "bits per byte by position";

/// How far, and how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PositionSettings {
    /// Tokens of a sequence in training.
    pub context: usize,
    /// Tokens of one pass.
    pub positions: usize,
    /// Passes at most, over stretches of text that do not overlap.
    pub passes: usize,
}

/// What a range of positions gave. A token's position is the number of tokens before it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bucket {
    /// The first position.
    pub from: usize,
    /// After the last.
    pub to: usize,
    /// Tokens scored, all passes together.
    pub tokens: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bits that the model needs for a byte of them; not a number where there are no bytes.
    pub bits_per_byte: f64,
    /// The same for the very same tokens when the model has read only from half the training
    /// length to all of it before each: none for positions before half the training length.
    pub fresh_bits_per_byte: Option<f64>,
}

impl Bucket {
    /// bits_per_byte over fresh_bits_per_byte: below 1 where a longer past helps.
    pub fn ratio(&self) -> Option<f64> {
        self.fresh_bits_per_byte.map(|fresh| self.bits_per_byte / fresh)
    }
}

/// Bits per byte by position.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ByPosition {
    /// What was asked for.
    pub settings: PositionSettings,
    /// Passes made.
    pub passes: usize,
    /// Ranges that double, with an edge at the training length; in order.
    pub buckets: Vec<Bucket>,
    /// Over all positions.
    pub bits_per_byte: f64,
    /// Over positions within the training length.
    pub within_bits_per_byte: f64,
}

#[derive(Clone, Copy, Default)]
struct Sum {
    tokens: u64,
    bytes: u64,
    nats: f64,
    fresh_nats: f64,
}

impl Sum {
    fn per_byte(&self, nats: f64) -> f64 {
        nats * BITS_PER_NAT / self.bytes as f64
    }
}

/// Reads stretches of text from beginning to end, each in one session, and gives the bits per byte
/// by position. `size` gives a token's bytes; `done` is told how many tokens were read, of
/// [`PositionSettings::work`].
///
/// # Errors
/// [`EvalError::Setting`] for a context below 32, fewer positions than it, or no passes;
/// [`EvalError::Short`] when there is less text than one pass; [`EvalError::NotFinite`] for a
/// probability of 0 or NaN; what the reader says.
pub fn by_position<R: Reader>(
    reader: &R,
    tokens: &[u32],
    size: impl Fn(u32) -> usize,
    settings: PositionSettings,
    mut done: impl FnMut(usize),
) -> Result<ByPosition, EvalError> {
    let PositionSettings { context, positions, .. } = settings;
    settings.check(tokens.len())?;
    let edges = edges(context, positions);
    let mut sums = vec![Sum::default(); edges.len() - 1];
    let passes = settings.passes_in(tokens.len());
    // Stretches are spread evenly over the text.
    let spread = tokens.len() / passes;
    for pass in 0..passes {
        let text = &tokens[pass * spread..pass * spread + positions];
        let long = long(reader, text, &mut done)?;
        let fresh = fresh(reader, text, context / 2, &mut done)?;
        let mut bucket = 0;
        for (at, &token) in text.iter().enumerate().skip(1) {
            while at >= edges[bucket + 1] {
                bucket += 1;
            }
            let sum = &mut sums[bucket];
            sum.tokens += 1;
            sum.bytes += size(token) as u64;
            sum.nats -= long[at];
            sum.fresh_nats -= fresh[at];
        }
    }
    let bucket = |(sum, edge): (&Sum, &[usize])| Bucket {
        from: edge[0],
        to: edge[1],
        tokens: sum.tokens,
        bytes: sum.bytes,
        bits_per_byte: sum.per_byte(sum.nats),
        fresh_bits_per_byte: (edge[0] >= context / 2).then(|| sum.per_byte(sum.fresh_nats)),
    };
    let together = |until: usize| {
        let some = sums.iter().zip(&edges[1..]).filter(|(_, to)| **to <= until);
        let (nats, bytes) = some.fold((0.0, 0), |(n, b), (sum, _)| (n + sum.nats, b + sum.bytes));
        nats * BITS_PER_NAT / bytes as f64
    };
    Ok(ByPosition {
        settings,
        passes,
        bits_per_byte: together(positions),
        within_bits_per_byte: together(context),
        buckets: sums.iter().zip(edges.windows(2)).map(bucket).collect(),
    })
}

impl PositionSettings {
    fn check(&self, tokens: usize) -> Result<(), EvalError> {
        let least = 2 * FIRST;
        let wrong =
            |setting, value, requires: String| Err(EvalError::Setting { setting, value, requires });
        if self.context < least {
            return wrong("context", self.context, format!("at least {least}"));
        }
        if self.positions < self.context {
            let requires = format!("at least the context, {}", self.context);
            return wrong("positions", self.positions, requires);
        }
        if self.passes == 0 {
            return wrong("passes", 0, "at least 1".into());
        }
        if tokens < self.positions {
            return Err(EvalError::Short { task: TASK, tokens, needed: self.positions });
        }
        Ok(())
    }

    /// Passes that a text is enough for.
    fn passes_in(&self, tokens: usize) -> usize {
        (tokens / self.positions).min(self.passes)
    }

    /// Tokens that will be read of a text of so many tokens.
    pub fn work(&self, tokens: usize) -> usize {
        if self.check(tokens).is_err() {
            return 0;
        }
        let half = self.context / 2;
        let scored = self.positions - half;
        let again = scored + scored.div_ceil(half) * half;
        self.passes_in(tokens) * (self.positions + again)
    }
}

/// Ranges of positions: the first, then doubling, so that one ends at the training length.
fn edges(context: usize, positions: usize) -> Vec<usize> {
    let mut edges = vec![];
    let mut edge = context;
    while edge >= FIRST {
        edges.push(edge);
        edge /= 2;
    }
    edges.push(1);
    edges.reverse();
    let mut edge = context;
    while edge < positions {
        edge = (2 * edge).min(positions);
        edges.push(edge);
    }
    edges
}

/// ln of every token's probability in one session; 0 for the first.
fn long<R: Reader>(
    reader: &R,
    text: &[u32],
    done: &mut impl FnMut(usize),
) -> Result<Vec<f64>, EvalError> {
    let mut reader = reader.fresh()?;
    let mut scores = vec![0.0];
    for part in text.chunks(PART) {
        let first = scores.len();
        let found = reader.score(part)?;
        scores.extend(finite(&found, &text[first..], first)?);
        done(part.len());
    }
    Ok(scores)
}

/// ln of every token's probability after `half` to 2·`half` − 1 tokens; 0 for the first `half`.
fn fresh<R: Reader>(
    reader: &R,
    text: &[u32],
    half: usize,
    done: &mut impl FnMut(usize),
) -> Result<Vec<f64>, EvalError> {
    let mut scores = vec![0.0; half];
    for start in (0..).step_by(half).take_while(|start| start + half < text.len()) {
        let piece = &text[start..text.len().min(start + 2 * half)];
        let mut reader = reader.fresh()?;
        reader.feed(&piece[..half])?;
        let found = reader.score(&piece[half..])?;
        scores.extend(finite(&found, &piece[half..], start + half)?);
        done(piece.len());
    }
    Ok(scores)
}

fn finite<'a>(
    scores: &'a [f32],
    tokens: &[u32],
    place: usize,
) -> Result<impl Iterator<Item = f64> + 'a, EvalError> {
    match scores.iter().position(|score| !score.is_finite()) {
        Some(at) => {
            let (token, value) = (tokens[at], scores[at]);
            Err(EvalError::NotFinite { token, place: place + at, value })
        }
        None => Ok(scores.iter().map(|&score| f64::from(score))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_double_and_end_at_the_context() {
        assert_eq!(edges(64, 200), [1, 16, 32, 64, 128, 200]);
        assert_eq!(edges(100, 100), [1, 25, 50, 100]);
        assert_eq!(edges(32, 32), [1, 16, 32]);
    }
}
