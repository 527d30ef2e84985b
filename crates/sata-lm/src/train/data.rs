//! Texts as tokens in memory, and which of them a step sees.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::TrainError;
use super::settings::Validation;

/// A text file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// Where it was read.
    pub path: PathBuf,
    /// All of it.
    pub text: String,
}

/// What a text was, to know it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The file's name, without its folder.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
}

/// Reads files, and the `.txt` files in folders and the folders in them, in order of their paths.
///
/// # Errors
/// A path that is not there, a folder without `.txt` files, a file that is empty or not UTF-8.
pub fn read_texts(paths: &[PathBuf]) -> Result<Vec<Text>, TrainError> {
    let mut files = vec![];
    for path in paths {
        let refused = |error: std::io::Error| TrainError::file(path, error.to_string());
        if path.metadata().map_err(refused)?.is_dir() {
            let before = files.len();
            find_texts(path, &mut files)?;
            if files.len() == before {
                return Err(TrainError::file(path, "the folder holds no .txt file"));
            }
        } else {
            files.push(path.clone());
        }
    }
    if files.is_empty() {
        return Err(TrainError::unfit("no text is given"));
    }
    files.into_iter().map(read_text).collect()
}

fn find_texts(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), TrainError> {
    let refused = |error: std::io::Error| TrainError::file(folder, error.to_string());
    let mut entries: Vec<PathBuf> = std::fs::read_dir(folder)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
        .map_err(refused)?;
    entries.sort();
    for path in entries {
        // Folders that are links could lead round in a circle.
        if path.is_dir() && !path.is_symlink() {
            find_texts(&path, files)?;
        } else if path.is_file() && path.extension().is_some_and(|ending| ending == "txt") {
            files.push(path);
        }
    }
    Ok(())
}

fn read_text(path: PathBuf) -> Result<Text, TrainError> {
    let bytes = std::fs::read(&path).map_err(|error| TrainError::file(&path, error.to_string()))?;
    if bytes.is_empty() {
        return Err(TrainError::file(&path, "the file is empty"));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Text { path, text }),
        Err(error) => {
            let at = error.utf8_error().valid_up_to();
            let byte = error.as_bytes()[at];
            let reason = format!("not UTF-8: byte {at} is 0x{byte:02x}");
            Err(TrainError::file(&path, reason))
        }
    }
}

impl Text {
    /// What it is known again by.
    pub fn mark(&self) -> Mark {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        Mark {
            name: name.to_string_lossy().into_owned(),
            bytes: self.text.len() as u64,
            sha256: hex(&Sha256::digest(self.text.as_bytes())),
        }
    }
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Tokens in a row, and the bytes of text that they came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Token numbers.
    pub ids: Vec<u32>,
    /// Bytes of text.
    pub bytes: u64,
}

impl Tokens {
    /// Bits per byte of text, for each nat per token.
    pub fn bits_per_byte(&self) -> f64 {
        self.ids.len() as f64 / (self.bytes.max(1) as f64 * std::f64::consts::LN_2)
    }
}

/// What is trained on and what is held out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corpus {
    /// Trained on.
    pub train: Tokens,
    /// Held out.
    pub validation: Tokens,
    /// The texts of both, in order.
    pub marks: Vec<Mark>,
}

impl Corpus {
    /// Encodes texts, with `end` after each; `held_out` are texts of their own, or none when the
    /// last `fraction` of every text is held out.
    ///
    /// # Errors
    /// Fewer tokens than one sequence of `longest` tokens needs, and what `encode` refuses.
    pub fn new<'a>(
        texts: &'a [Text],
        held_out: &'a HeldOut,
        longest: usize,
        end: u32,
        encode: impl Fn(&str) -> Result<Vec<u32>, TrainError>,
    ) -> Result<Self, TrainError> {
        let mut marks: Vec<Mark> = texts.iter().map(Text::mark).collect();
        let (train, validation): (Vec<&str>, Vec<&str>) = match held_out {
            HeldOut::Fraction(f) => texts.iter().map(|text| split(&text.text, *f)).unzip(),
            HeldOut::Texts(others) => {
                marks.extend(others.iter().map(Text::mark));
                let whole =
                    |texts: &'a [Text]| texts.iter().map(|text| text.text.as_str()).collect();
                (whole(texts), whole(others))
            }
        };
        let train = tokens(&train, end, &encode)?;
        let validation = tokens(&validation, end, &encode)?;
        for (what, tokens) in [("the text", &train), ("the held-out text", &validation)] {
            if tokens.ids.len() <= longest {
                return Err(TrainError::unfit(format!(
                    "{what} has {} tokens ({} bytes); a sequence of {longest} needs {}",
                    tokens.ids.len(),
                    tokens.bytes,
                    longest + 1
                )));
            }
        }
        Ok(Corpus { train, validation, marks })
    }
}

/// Where the held-out text comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum HeldOut {
    /// The last part of every text.
    Fraction(f64),
    /// Texts of its own.
    Texts(Vec<Text>),
}

impl HeldOut {
    /// Reads what the settings name.
    ///
    /// # Errors
    /// As for [`read_texts`].
    pub fn read(validation: &Validation) -> Result<Self, TrainError> {
        Ok(match validation {
            Validation::Fraction(f) => HeldOut::Fraction(*f),
            Validation::Paths(paths) => HeldOut::Texts(read_texts(paths)?),
        })
    }
}

/// A text's first part and its last `fraction`, cut after a line where one ends in it.
fn split(text: &str, fraction: f64) -> (&str, &str) {
    let mut at = ((1.0 - fraction) * text.len() as f64) as usize;
    while !text.is_char_boundary(at) {
        at += 1;
    }
    match text[at..].find('\n').map(|line| at + line + 1) {
        Some(line) if line < text.len() => text.split_at(line),
        _ => text.split_at(at),
    }
}

fn tokens(
    texts: &[&str],
    end: u32,
    encode: &impl Fn(&str) -> Result<Vec<u32>, TrainError>,
) -> Result<Tokens, TrainError> {
    let mut all = Tokens::default();
    for text in texts {
        all.ids.extend(encode(text)?);
        all.ids.push(end);
        all.bytes += text.len() as u64;
    }
    Ok(all)
}

/// Which sequences steps see: a function of the seed and of their place alone.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    /// The seed.
    pub seed: u64,
}

impl Draw {
    /// The tokens of a sequence, `length` and the one that follows the last; the corpus holds more
    /// than `length`.
    pub fn window(&self, tokens: usize, length: usize, place: [u64; 3]) -> Range<usize> {
        let number = place.iter().fold(mix(self.seed), |hash, &x| mix(hash ^ mix(x)));
        let starts = (tokens - length) as u128;
        let start = ((u128::from(number) * starts) >> 64) as usize;
        start..start + length + 1
    }
}

/// The finaliser of SplitMix64.
fn mix(x: u64) -> u64 {
    let mut x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Starts of at most `count` sequences of `length` tokens and one, spread evenly over so many
/// tokens without overlap.
pub fn spread(tokens: usize, length: usize, count: usize) -> Vec<usize> {
    let fit = (tokens - 1) / length;
    let count = count.clamp(1, fit.max(1));
    (0..count).map(|i| i * fit / count * length).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &str) -> Result<Vec<u32>, TrainError> {
        Ok(text.bytes().map(|byte| u32::from(byte) + 1).collect())
    }

    fn text(text: impl Into<String>) -> Text {
        Text { path: "a.txt".into(), text: text.into() }
    }

    #[test]
    fn folders_are_read_in_order_of_paths() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::create_dir(path("b")).unwrap();
        for (name, text) in [("c.txt", "3"), ("b/x.txt", "2"), ("a.txt", "1"), ("d.md", "no")] {
            std::fs::write(path(name), text).unwrap();
        }
        let texts = read_texts(&[path("d.md"), folder.path().into()]).unwrap();
        let all: Vec<&str> = texts.iter().map(|text| text.text.as_str()).collect();
        assert_eq!(all, ["no", "1", "2", "3"]);
    }

    #[test]
    fn what_is_no_text_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::create_dir(path("none")).unwrap();
        std::fs::write(path("empty.txt"), "").unwrap();
        std::fs::write(path("latin.txt"), b"caf\xe9 au lait").unwrap();
        for (name, words) in [
            ("none", "no .txt file"),
            ("empty.txt", "empty"),
            ("latin.txt", "byte 3 is 0xe9"),
            ("missing.txt", "No such file"),
        ] {
            let said = read_texts(&[path(name)]).unwrap_err().to_string();
            assert!(said.contains(name) && said.contains(words), "{said}");
        }
    }

    #[test]
    fn the_last_part_is_held_out_with_nothing_lost() {
        let lines: String = (0..1000).map(|i| format!("line {i} é\n")).collect();
        let one_line = "é".repeat(999);
        for whole in [&lines, &one_line] {
            let (train, held) = split(whole, 0.1);
            assert_eq!(&format!("{train}{held}"), whole);
            let share = held.len() as f64 / whole.len() as f64;
            assert!((0.08..=0.101).contains(&share), "{share}");
        }
        let corpus =
            Corpus::new(&[text("ab\ncd\n"), text("x\ny\n")], &HeldOut::Fraction(0.5), 2, 0, bytes);
        let corpus = corpus.unwrap();
        let spelt = |ids: &[u32]| -> String {
            let letter = |&id: &u32| if id == 0 { '|' } else { char::from((id - 1) as u8) };
            ids.iter().map(letter).collect()
        };
        assert_eq!(spelt(&corpus.train.ids), "ab\n|x\n|");
        assert_eq!(corpus.train.bytes + corpus.validation.bytes, 10);
        assert_eq!(corpus.marks.len(), 2);
    }

    #[test]
    fn a_corpus_shorter_than_a_sequence_is_refused() {
        let held = HeldOut::Texts(vec![text("x".repeat(100))]);
        assert!(Corpus::new(&[text("a".repeat(64))], &held, 64, 0, bytes).is_ok());
        let said = Corpus::new(&[text("a".repeat(63))], &held, 64, 0, bytes).unwrap_err();
        assert!(said.to_string().contains("64 tokens (63 bytes); a sequence of 64 needs 65"));
        let held = HeldOut::Texts(vec![text("x")]);
        let said = Corpus::new(&[text("a".repeat(64))], &held, 64, 0, bytes).unwrap_err();
        assert!(said.to_string().contains("held-out"), "{said}");
    }

    #[test]
    fn windows_cover_the_text_and_repeat_for_the_same_place() {
        let draw = Draw { seed: 7 };
        let mut seen = [false; 10];
        for step in 0..400 {
            let window = draw.window(13, 4, [step, 0, 1]);
            assert_eq!(window, draw.window(13, 4, [step, 0, 1]));
            assert!(window.len() == 5 && window.end <= 13);
            seen[window.start] = true;
        }
        // 9 starts; one is left out with a probability of 9·(8/9)⁴⁰⁰ < 10⁻¹⁹ for a random seed.
        assert!(seen[..9].iter().all(|&seen| seen) && !seen[9]);
    }

    #[test]
    fn evaluation_is_spread_without_overlap() {
        assert_eq!(spread(101, 10, 100), (0..10).map(|i| i * 10).collect::<Vec<_>>());
        assert_eq!(spread(101, 10, 2), [0, 50]);
        assert_eq!(spread(11, 10, 5), [0]);
        for start in spread(1000, 64, 7) {
            assert!(start + 65 <= 1000);
        }
    }
}
