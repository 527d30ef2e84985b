//! `--slopes` and `--gates`: how weights fade.

use sata::{Decay, alibi_slopes};

use super::input::{Gates, Input};
use crate::failure::{Failure, Outcome};

/// What `--slopes` says.
#[derive(Clone, Debug, PartialEq)]
pub enum SlopesArg {
    /// The usual ones.
    Alibi,
    /// One per key/value head.
    List(Vec<f64>),
}

/// Parses `--slopes`.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn parse(text: &str) -> Result<SlopesArg, String> {
    if text == "alibi" {
        return Ok(SlopesArg::Alibi);
    }
    let slope = |text: &str| match text.trim().parse::<f64>() {
        Ok(slope) if slope.is_finite() && slope >= 0.0 => Ok(slope),
        _ => Err(format!("'{text}' is neither alibi nor a slope, finite and at least 0")),
    };
    text.split(',').map(slope).collect::<Result<_, _>>().map(SlopesArg::List)
}

/// How weights fade, with the numbers.
#[derive(Debug)]
pub enum Fading<'a> {
    /// They do not.
    None,
    /// By distance, with a slope per key/value head.
    Slopes(Vec<f64>),
    /// By forget gates.
    Gates(&'a Gates),
}

impl<'a> Fading<'a> {
    /// What the arguments and the input say.
    ///
    /// # Errors
    /// When there is not one slope per key/value head.
    pub fn new(slopes: Option<&SlopesArg>, input: &'a Input) -> Outcome<Self> {
        let heads = input.shapes[1][1];
        match (slopes, &input.gates) {
            (None, None) => Ok(Fading::None),
            (_, Some(gates)) => Ok(Fading::Gates(gates)),
            (Some(SlopesArg::Alibi), None) => Ok(Fading::Slopes(alibi_slopes(heads))),
            (Some(SlopesArg::List(slopes)), None) if slopes.len() == heads => {
                Ok(Fading::Slopes(slopes.clone()))
            }
            (Some(SlopesArg::List(slopes)), None) => Err(Failure::new(format!(
                "--slopes has {}, but k has {heads} heads: there must be one for each, or alibi",
                slopes.len()
            ))),
        }
    }

    /// In the library's words.
    pub fn decay(&self) -> Decay {
        match self {
            Fading::None => Decay::None,
            Fading::Slopes(_) => Decay::Slopes,
            Fading::Gates(_) => Decay::Gates,
        }
    }

    /// The slopes, if it has them.
    pub fn slopes(&self) -> Option<&[f64]> {
        match self {
            Fading::Slopes(slopes) => Some(slopes),
            _ => None,
        }
    }

    /// The gates, if it has them.
    pub fn gates(&self) -> Option<&'a Gates> {
        match self {
            Fading::Gates(gates) => Some(gates),
            _ => None,
        }
    }

    /// `[batch, kv_heads, keys]`: the logarithm of what the past fades by at each key.
    pub fn per_key(&self, [batch, heads, keys, _]: [usize; 4]) -> Option<Vec<f64>> {
        match self {
            Fading::None => None,
            Fading::Slopes(slopes) => {
                let slope = |row: usize| -slopes[row % heads];
                Some((0..batch * heads).flat_map(|row| vec![slope(row); keys]).collect())
            }
            Fading::Gates(gates) => Some(gates.logs.iter().map(|&log| f64::from(log)).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_alibi_or_a_list() {
        assert_eq!(parse("alibi"), Ok(SlopesArg::Alibi));
        assert_eq!(parse("0.5,0"), Ok(SlopesArg::List(vec![0.5, 0.0])));
        for wrong in ["", "0.5,", "-1", "nan", "inf", "usual"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
