//! An attention in short words, as on a command line.

use std::fmt;

use crate::{Attention, HeadGroup, Kernel, Position};

impl Attention {
    /// The same heads with what short words change: a kernel (`softmax`, `window`, `taylor:TERMS`,
    /// `power:EXPONENT`), then any of `+near:BLOCKS`, `+near:none`, `+block:TOKENS`,
    /// `+sinks:TOKENS`, `+rotary`, `+slopes`, `+gates`, `+none`. What is not said stays, but that
    /// softmax has no near blocks or sinks.
    ///
    /// Several kernels in a row are a mixture: each may be followed by `*HEADS`, and those that are
    /// not share the heads that are left equally; then by `,near:BLOCKS`, `,near:none` or
    /// `,sinks:TOKENS`, which go before what is said for all.
    ///
    /// # Errors
    /// One sentence that names the word. Whether the whole can be built is for
    /// [`Config::check`](crate::Config::check).
    pub fn in_words(&self, words: &str) -> Result<Self, String> {
        let mut attention = self.clone();
        let mut words = words.split('+').peekable();
        let mut groups = vec![Group::parse(words.next().unwrap_or_default())?];
        while let Some(word) = words.next_if(|word| Group::is_one(word)) {
            groups.push(Group::parse(word)?);
        }
        if groups.iter().all(|group| group.kernel == Kernel::Softmax) {
            (attention.near, attention.sinks) = (None, 0);
        }
        for word in words {
            match word.split_once(':') {
                None if word == "rotary" => attention.position = Position::Rotary,
                None if word == "slopes" => attention.position = Position::Slopes,
                None if word == "gates" => attention.position = Position::Gates,
                None if word == "none" => attention.position = Position::None,
                Some(("near", n)) => attention.near = near(word, n)?,
                Some(("block", n)) => attention.block = number(word, n)?,
                Some(("sinks", n)) => attention.sinks = number(word, n)?,
                _ => {
                    return Err(format!(
                        "'{word}' is none of near:BLOCKS, block:TOKENS, sinks:TOKENS, rotary, \
                         slopes, gates, none, and no further kernel: softmax, window, \
                         taylor:TERMS, power:EXPONENT"
                    ));
                }
            }
        }
        match &groups[..] {
            [all] => {
                if let Some(n) = all.heads.filter(|&n| n != self.heads) {
                    let heads = self.heads;
                    return Err(format!("'*{n}': one kernel alone has all {heads} heads"));
                }
                attention.near = all.near.unwrap_or(attention.near);
                attention.sinks = all.sinks.unwrap_or(attention.sinks);
                attention.kernel = all.kernel.clone();
            }
            several => {
                let share = share(several, self.heads)?;
                let groups = several.iter().map(|group| group.among(&attention, share));
                attention.kernel = Kernel::Mixture { groups: groups.collect() };
                (attention.near, attention.sinks) = (None, 0);
            }
        }
        Ok(attention)
    }
}

/// Heads of each group that does not say how many it has.
fn share(groups: &[Group], heads: usize) -> Result<usize, String> {
    let said = groups.iter().filter_map(|group| group.heads).fold(0, usize::saturating_add);
    let sharing = groups.iter().filter(|group| group.heads.is_none()).count();
    let left = heads.saturating_sub(said);
    if sharing > 0 && (left == 0 || !left.is_multiple_of(sharing)) {
        return Err(format!(
            "{sharing} of its kernels cannot share {left} heads equally (there are {heads}): say \
             how many each has, such as taylor:3*{heads}"
        ));
    }
    Ok(left.checked_div(sharing).unwrap_or(0))
}

/// A kernel, and what is said for its heads alone.
struct Group {
    kernel: Kernel,
    heads: Option<usize>,
    near: Option<Option<usize>>,
    sinks: Option<usize>,
}

impl Group {
    /// Whether a word is a kernel's.
    fn is_one(word: &str) -> bool {
        let name = word.split([':', '*', ',']).next();
        matches!(name, Some("softmax" | "window" | "taylor" | "power"))
    }

    fn parse(word: &str) -> Result<Self, String> {
        let mut words = word.split(',');
        let first = words.next().unwrap_or_default();
        let (kernel, heads) = match first.split_once('*') {
            Some((kernel, heads)) => (kernel, Some(number(first, heads)?)),
            None => (first, None),
        };
        let kernel = match kernel.split_once(':') {
            None if kernel == "softmax" => Kernel::Softmax,
            None if kernel == "window" => Kernel::Window,
            Some(("taylor", terms)) => Kernel::Taylor { terms: number(first, terms)? },
            Some(("power", exponent)) => Kernel::Power { exponent: number(first, exponent)? },
            _ => {
                return Err(format!(
                    "'{kernel}' is none of softmax, window, taylor:TERMS, power:EXPONENT"
                ));
            }
        };
        let mut group = Group { kernel, heads, near: None, sinks: None };
        for word in words {
            match word.split_once(':') {
                Some(("near", n)) => group.near = Some(near(word, n)?),
                Some(("sinks", n)) => group.sinks = Some(number(word, n)?),
                _ => return Err(format!("'{word}' is neither near:BLOCKS nor sinks:TOKENS")),
            }
        }
        Ok(group)
    }

    /// Its heads in a mixture, with what an attention says for all.
    fn among(&self, attention: &Attention, share: usize) -> HeadGroup {
        let (near, sinks) = match self.kernel {
            Kernel::Softmax => (None, 0),
            _ => (attention.near, attention.sinks),
        };
        HeadGroup {
            heads: self.heads.unwrap_or(share),
            kernel: self.kernel.clone(),
            near: self.near.unwrap_or(near),
            sinks: self.sinks.unwrap_or(sinks),
        }
    }
}

/// What all of a mixture's groups have that can have it.
fn common<T: PartialEq>(groups: &[HeadGroup], of: impl Fn(&HeadGroup) -> T) -> Option<T> {
    let mut all = groups.iter().filter(|group| group.kernel != Kernel::Softmax).map(of);
    let first = all.next()?;
    all.all(|x| x == first).then_some(first)
}

/// The short words that [`Attention::in_words`] takes.
impl fmt::Display for Attention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut near, mut sinks) = (self.near, self.sinks);
        if let Kernel::Mixture { groups } = &self.kernel {
            let (all_near, all_sinks) = (common(groups, |g| g.near), common(groups, |g| g.sinks));
            let equal = groups.iter().all(|group| group.heads == groups[0].heads);
            for (i, group) in groups.iter().enumerate() {
                let plus = if i == 0 { "" } else { "+" };
                write!(f, "{plus}{}", group.kernel)?;
                if !equal {
                    write!(f, "*{}", group.heads)?;
                }
                if group.kernel == Kernel::Softmax {
                    continue;
                }
                match group.near {
                    _ if all_near.is_some() => {}
                    Some(blocks) => write!(f, ",near:{blocks}")?,
                    None => write!(f, ",near:none")?,
                }
                if all_sinks.is_none() {
                    write!(f, ",sinks:{}", group.sinks)?;
                }
            }
            (near, sinks) = (all_near.flatten(), all_sinks.unwrap_or(0));
        } else {
            write!(f, "{}", self.kernel)?;
        }
        if let Some(blocks) = near {
            write!(f, "+near:{blocks}")?;
        }
        if self.block != sata::DEFAULT_BLOCK {
            write!(f, "+block:{}", self.block)?;
        }
        if sinks > 0 {
            write!(f, "+sinks:{sinks}")?;
        }
        f.write_str(match self.position {
            Position::None => "+none",
            Position::Rotary => "+rotary",
            Position::Slopes => "+slopes",
            Position::Gates => "+gates",
        })
    }
}

/// The short word for it; for a mixture those of its groups.
impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kernel::Softmax => write!(f, "softmax"),
            Kernel::Window => write!(f, "window"),
            Kernel::Taylor { terms } => write!(f, "taylor:{terms}"),
            Kernel::Power { exponent } => write!(f, "power:{exponent}"),
            Kernel::Mixture { groups } => {
                let words: Vec<String> = groups.iter().map(|g| g.kernel.to_string()).collect();
                f.write_str(&words.join("+"))
            }
        }
    }
}

fn near(word: &str, blocks: &str) -> Result<Option<usize>, String> {
    if blocks == "none" { Ok(None) } else { number(word, blocks).map(Some) }
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

    #[test]
    fn several_kernels_are_a_mixture() {
        let before = Attention {
            heads: 8,
            kv_heads: None,
            head_dim: 16,
            kernel: Kernel::Softmax,
            near: Some(1),
            block: 64,
            sinks: 0,
            position: Position::Gates,
            qk_norm: true,
        };
        let groups = |words: &str| {
            let attention = before.in_words(words).unwrap();
            assert_eq!((attention.near, attention.sinks), (None, 0), "{words}");
            // Said again, and read from anything else.
            let other = before.in_words("window+near:9+sinks:3+none").unwrap();
            let again = other.in_words(&format!("{attention}+sinks:0"));
            if attention.to_string().contains("sinks") || words.contains("near:none") {
                assert_eq!(before.in_words(&attention.to_string()).unwrap(), attention, "{words}");
            } else {
                assert_eq!(again.unwrap(), attention, "{words}: {attention}");
            }
            let Kernel::Mixture { groups } = attention.kernel.clone() else {
                panic!("{words}: {attention}");
            };
            let each = groups.iter().map(|g| (g.heads, g.kernel.to_string(), g.near, g.sinks));
            (attention.to_string(), each.collect::<Vec<_>>())
        };
        let group = |heads, kernel: &str, near, sinks| (heads, String::from(kernel), near, sinks);
        let (said, each) = groups("taylor:3+power:4");
        assert_eq!(said, "taylor:3+power:4+near:1+gates");
        assert_eq!(each, [group(4, "taylor:3", Some(1), 0), group(4, "power:4", Some(1), 0)]);
        let (said, each) = groups("taylor:3*6+power:4*2+near:2+slopes");
        assert_eq!(said, "taylor:3*6+power:4*2+near:2+slopes");
        assert_eq!(each, [group(6, "taylor:3", Some(2), 0), group(2, "power:4", Some(2), 0)]);
        let (said, each) = groups("window+power:2*2,near:0+block:16");
        assert_eq!(said, "window*6,near:1+power:2*2,near:0+block:16+gates");
        assert_eq!(each, [group(6, "window", Some(1), 0), group(2, "power:2", Some(0), 0)]);
        let (said, each) = groups("softmax*2+taylor:3+power:2,near:none,sinks:4");
        assert_eq!(said, "softmax*2+taylor:3*3,near:1,sinks:0+power:2*3,near:none,sinks:4+gates");
        assert_eq!(each[0], group(2, "softmax", None, 0));
        assert_eq!(each[2], group(3, "power:2", None, 4));
        let (said, _) = groups("softmax+taylor:3+near:0+sinks:2");
        assert_eq!(said, "softmax+taylor:3+near:0+sinks:2+gates");

        let alone = before.in_words("taylor:3*8,near:2").unwrap();
        assert_eq!((&alone.kernel, alone.near), (&Kernel::Taylor { terms: 3 }, Some(2)));
        let mixed = before.in_words("taylor:3+power:4").unwrap();
        let back = mixed.in_words("taylor:5+near:1").unwrap();
        assert_eq!(back.to_string(), "taylor:5+near:1+gates");
        for (wrong, word) in [
            ("taylor:3*4", "'*4'"),
            ("taylor:3+power:4+window", "share 8 heads equally"),
            ("taylor:3*8+power:4", "share 0 heads equally"),
            ("taylor:3*x+power:4", "'x'"),
            ("taylor:3+power", "'power'"),
            ("taylor:3+power:4,far:2", "'far:2'"),
            ("taylor:3+near:1+power:4", "'power:4'"),
        ] {
            let said = before.in_words(wrong).unwrap_err();
            assert!(said.contains(word), "{wrong}: {said}");
        }
    }
}
