//! `--near`: what is exact.

use sata::Near;

use crate::numbers::size;

/// Blocks before a query's own that are exact, or nothing near at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NearArg(pub Option<usize>);

/// Parses one setting of `--near`.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn parse(text: &str) -> Result<NearArg, String> {
    match text {
        "none" => Ok(NearArg(None)),
        "0" => Ok(NearArg(Some(0))),
        _ => size(text).map(|n| NearArg(Some(n))).map_err(|_| {
            format!("'{text}' is neither none nor a number of blocks before a query's own")
        }),
    }
}

impl NearArg {
    /// In the library's words.
    pub fn near(self) -> Near {
        self.0.map_or(Near::None, Near::Blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(parse("none"), Ok(NearArg(None)));
        assert_eq!(parse("0"), Ok(NearArg(Some(0))));
        assert_eq!(parse("2").map(NearArg::near), Ok(Near::Blocks(2)));
        for wrong in ["", "-1", "one"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
