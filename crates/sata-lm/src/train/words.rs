//! An attention in short words, as on a command line.

use crate::{Attention, Kernel, Position};

impl Attention {
    /// The same heads with what short words change: a kernel (`softmax`, `window`, `taylor:TERMS`,
    /// `power:EXPONENT`), then any of `+near:BLOCKS`, `+near:none`, `+block:TOKENS`,
    /// `+sinks:TOKENS`, `+rotary`, `+slopes`, `+gates`, `+none`. What is not said stays, but that
    /// softmax has no near blocks or sinks.
    ///
    /// # Errors
    /// One sentence that names the word. Whether the whole can be built is for
    /// [`Config::check`](crate::Config::check).
    pub fn in_words(&self, words: &str) -> Result<Self, String> {
        let mut attention = self.clone();
        let mut words = words.split('+');
        let first = words.next().unwrap_or_default();
        attention.kernel = match first.split_once(':') {
            None if first == "softmax" => Kernel::Softmax,
            None if first == "window" => Kernel::Window,
            Some(("taylor", terms)) => Kernel::Taylor { terms: number(first, terms)? },
            Some(("power", exponent)) => Kernel::Power { exponent: number(first, exponent)? },
            _ => {
                return Err(format!(
                    "'{first}' is none of softmax, window, taylor:TERMS, power:EXPONENT"
                ));
            }
        };
        if attention.kernel == Kernel::Softmax {
            (attention.near, attention.sinks) = (None, 0);
        }
        for word in words {
            match word.split_once(':') {
                None if word == "rotary" => attention.position = Position::Rotary,
                None if word == "slopes" => attention.position = Position::Slopes,
                None if word == "gates" => attention.position = Position::Gates,
                None if word == "none" => attention.position = Position::None,
                Some(("near", "none")) => attention.near = None,
                Some(("near", n)) => attention.near = Some(number(word, n)?),
                Some(("block", n)) => attention.block = number(word, n)?,
                Some(("sinks", n)) => attention.sinks = number(word, n)?,
                _ => {
                    return Err(format!(
                        "'{word}' is none of near:BLOCKS, block:TOKENS, sinks:TOKENS, rotary, \
                         slopes, gates, none"
                    ));
                }
            }
        }
        Ok(attention)
    }
}

/// The short words that [`Attention::in_words`] takes.
impl std::fmt::Display for Attention {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.kernel {
            Kernel::Softmax => write!(f, "softmax")?,
            Kernel::Window => write!(f, "window")?,
            Kernel::Taylor { terms } => write!(f, "taylor:{terms}")?,
            Kernel::Power { exponent } => write!(f, "power:{exponent}")?,
        }
        if let Some(blocks) = self.near {
            write!(f, "+near:{blocks}")?;
        }
        if self.block != sata::DEFAULT_BLOCK {
            write!(f, "+block:{}", self.block)?;
        }
        if self.sinks > 0 {
            write!(f, "+sinks:{}", self.sinks)?;
        }
        f.write_str(match self.position {
            Position::None => "+none",
            Position::Rotary => "+rotary",
            Position::Slopes => "+slopes",
            Position::Gates => "+gates",
        })
    }
}

fn number(word: &str, digits: &str) -> Result<usize, String> {
    digits.parse().map_err(|_| format!("'{word}': '{digits}' is not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its words, and that nothing is near where they say nothing of it.
    fn near_said(attention: &Attention) -> String {
        let none = if attention.near.is_none() { "+near:none" } else { "" };
        format!("{attention}{none}")
    }

    #[test]
    fn words_change_what_they_say() {
        let before = Attention {
            heads: 4,
            kv_heads: None,
            head_dim: 16,
            kernel: Kernel::Taylor { terms: 3 },
            near: Some(1),
            block: 64,
            sinks: 2,
            position: Position::Gates,
            qk_norm: true,
        };
        let softmax = before.in_words("softmax+rotary").unwrap();
        assert_eq!((softmax.near, softmax.sinks), (None, 0));
        assert_eq!((&softmax.kernel, softmax.position), (&Kernel::Softmax, Position::Rotary));
        let taylor = before.in_words("taylor:5").unwrap();
        assert_eq!(taylor, Attention { kernel: Kernel::Taylor { terms: 5 }, ..before.clone() });
        let power = before.in_words("power:4+near:none+block:32+sinks:0+slopes").unwrap();
        assert_eq!(
            power,
            Attention {
                kernel: Kernel::Power { exponent: 4 },
                near: None,
                block: 32,
                sinks: 0,
                position: Position::Slopes,
                ..before.clone()
            }
        );
        for attention in [&before, &softmax, &taylor, &power] {
            // A base that differs in everything that words can say.
            let other = before.in_words("window+near:9+block:64+sinks:0+none").unwrap();
            assert_eq!(other.in_words(&near_said(attention)).unwrap(), *attention, "{attention}");
        }
        for (wrong, word) in [
            ("", "''"),
            ("taylor", "'taylor'"),
            ("taylor:x", "'x'"),
            ("softmax+", "''"),
            ("window+far:3", "'far:3'"),
            ("window+near:-1", "'-1'"),
        ] {
            let said = before.in_words(wrong).unwrap_err();
            assert!(said.contains(word), "{wrong}: {said}");
        }
    }
}
