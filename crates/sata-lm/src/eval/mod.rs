//! What a model has learnt: bits per byte by position, recall of pairs, needles in a text.
//!
//! Everything reads through a [`Reader`], which an inference session is, so that what the tasks
//! measure can be tested with readers whose memory is known.

mod error;
mod needle;
mod position;
mod reader;
mod recall;
mod words;

pub use error::EvalError;
pub use needle::{NeedleRow, NeedleSettings, needle};
pub use position::{Bucket, ByPosition, PositionSettings, by_position};
pub use reader::Reader;
pub use recall::{RecallRow, RecallSettings, recall};
pub use words::Words;

/// log₂ e: bits per nat.
pub const BITS_PER_NAT: f64 = std::f64::consts::LOG2_E;

/// `count` tokens of `tokens` from a random place on.
fn stretch<'a>(
    tokens: &'a [u32],
    count: usize,
    rng: &mut impl rand::Rng,
    task: &'static str,
) -> Result<&'a [u32], EvalError> {
    let Some(places) = tokens.len().checked_sub(count) else {
        return Err(EvalError::Short { task, tokens: tokens.len(), needed: count });
    };
    let at = rng.random_range(0..=places);
    Ok(&tokens[at..at + count])
}
