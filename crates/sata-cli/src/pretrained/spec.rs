//! `--attention`: softmax, a short text, or a file.

use std::path::Path;

use sata::{Near, Series, Spec};
use sata_lm::pretrained::{Far, HeadSetting, MemorySetting, Setting};

use crate::failure::{Failure, Outcome};
use crate::tensors::read_bytes;

/// A setting and what it was called.
#[derive(Clone, Debug)]
pub struct Named {
    /// As on the command line.
    pub name: String,
    /// The setting.
    pub setting: Setting,
}

/// What `--attention` takes, for help.
pub const ATTENTION: &str = "softmax, a file of `sata calibrate`, or KIND:NUMBER with options, as in \
gauss:4,near=1,sinks=4. Kinds: window:N (the own block and N before it, nothing else), taylor:P, gauss:P, \
hermite:P, power:P (a series for all that is not near), groups:N (N groups of tokens for it), mixed:R \
(gauss with four terms in R directions, a line in the others; needs --calibration). Options: near=N, \
block=N, sinks=N, kept=N (far tokens with the largest keys stay exact; window, groups and mixed)";

/// Reads one `--attention` for heads of `d`.
///
/// # Errors
/// A text that is none of what is accepted, a file that cannot be read.
pub fn named(text: &str, d: usize) -> Outcome<Named> {
    let setting = if text.ends_with(".json") { file(text)? } else { Setting::all(head(text, d)?) };
    Ok(Named { name: text.into(), setting })
}

fn file(text: &str) -> Outcome<Setting> {
    let bytes = read_bytes(Path::new(text)).map_err(|error| error.context("--attention"))?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Failure::new(format!("--attention {text}: {error}"))
            .hint("`sata calibrate` writes such files")
    })
}

/// Options of a short text.
#[derive(Clone, Copy, Debug, Default)]
struct Options {
    near: Option<usize>,
    block: Option<usize>,
    sinks: Option<usize>,
    kept: Option<usize>,
}

fn head(text: &str, d: usize) -> Outcome<HeadSetting> {
    let wrong = |reason: String| {
        Failure::new(format!("--attention {text}: {reason}")).hint(format!("it takes {ATTENTION}"))
    };
    let mut parts = text.split(',');
    let first = parts.next().unwrap_or_default();
    let mut options = Options::default();
    for part in parts {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        let value: usize =
            value.parse().map_err(|_| wrong(format!("'{part}' is not an option NAME=NUMBER")))?;
        let place = match name {
            "near" => &mut options.near,
            "block" => &mut options.block,
            "sinks" => &mut options.sinks,
            "kept" => &mut options.kept,
            _ => return Err(wrong(format!("there is no option {name}"))),
        };
        *place = Some(value);
    }
    if first == "softmax" {
        return match text {
            "softmax" => Ok(HeadSetting::Softmax),
            _ => Err(wrong("softmax takes no options, everything is exact".into())),
        };
    }
    let (kind, number) = first.split_once(':').unwrap_or((first, ""));
    let number: usize =
        number.parse().map_err(|_| wrong(format!("'{first}' is not KIND:NUMBER")))?;
    let block = options.block.unwrap_or(sata::DEFAULT_BLOCK);
    let far = match kind {
        "window" => Far::Nothing,
        "groups" => Far::Groups(number),
        "mixed" => Far::Mixed { rotated: number },
        "taylor" | "gauss" | "hermite" | "power" => {
            if options.kept.is_some() {
                return Err(wrong(format!("{kind} keeps no far tokens exact")));
            }
            let mut spec = Spec::new(d, d).block(block).sinks(options.sinks.unwrap_or(0));
            spec = match kind {
                "taylor" => spec.series(Series::Taylor).terms(number),
                "gauss" => spec.series(Series::Gauss).terms(number),
                "hermite" => spec.series(Series::hermite()).terms(number),
                _ => spec.series(Series::power(number)),
            };
            let near = options.near.map_or(Near::None, Near::Blocks);
            let spec = spec.near(near).build().map_err(|error| wrong(error.to_string()))?;
            return Ok(HeadSetting::Spec { spec });
        }
        _ => return Err(wrong(format!("there is no kind {kind}"))),
    };
    let near = match (kind, options.near) {
        ("window", None) => number,
        ("window", Some(_)) => return Err(wrong("window:N says what is near".into())),
        (_, near) => near.unwrap_or(0),
    };
    Ok(HeadSetting::Memory(MemorySetting {
        near,
        block,
        sinks: options.sinks.unwrap_or(0),
        kept: options.kept.unwrap_or(0),
        far,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_texts() {
        assert_eq!(head("softmax", 8).unwrap(), HeadSetting::Softmax);
        let spec = Spec::new(8, 8).series(Series::Gauss).terms(4).near(Near::Blocks(1)).sinks(4);
        let want = HeadSetting::Spec { spec: spec.build().unwrap() };
        assert_eq!(head("gauss:4,near=1,sinks=4", 8).unwrap(), want);
        let memory = |near, sinks, kept, far| {
            HeadSetting::Memory(MemorySetting { near, block: 64, sinks, kept, far })
        };
        assert_eq!(head("window:2,sinks=4", 8).unwrap(), memory(2, 4, 0, Far::Nothing));
        assert_eq!(head("groups:32,kept=5,near=1", 8).unwrap(), memory(1, 0, 5, Far::Groups(32)));
        assert_eq!(head("mixed:4", 8).unwrap(), memory(0, 0, 0, Far::Mixed { rotated: 4 }));
    }

    #[test]
    fn wrong_ones_say_what_is_accepted() {
        for text in [
            "",
            "gauss",
            "gauss:",
            "gauss:3",
            "gauss:4,near",
            "gauss:4,far=1",
            "gauss:4,kept=1",
            "window:1,near=1",
            "softmax,near=1",
            "window:-1",
            "none:1",
        ] {
            let message = head(text, 8).unwrap_err().to_string();
            assert!(message.contains("--attention") && message.contains("hint"), "{message}");
        }
    }
}
