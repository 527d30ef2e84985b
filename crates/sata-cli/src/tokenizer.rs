//! `sata tokenizer`: trains a byte-level BPE tokenizer.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use sata_lm::Tokenizer;

use crate::failure::{Failure, Outcome};
use crate::output::{Staged, say};
use crate::table::{bytes, grouped, seconds};
use crate::texts::read_texts;

/// Train a byte-level BPE tokenizer
#[derive(Debug, Args)]
pub struct TokenizerArgs {
    /// Text files, UTF-8, or folders, of which all .txt files are taken
    #[arg(long, value_name = "PATHS", num_args = 1.., required = true)]
    text: Vec<PathBuf>,
    /// Size of the vocabulary: the end of a text, 256 bytes, and what is learnt
    #[arg(long, value_name = "N", default_value_t = 4096)]
    vocab: usize,
    /// How often a token must occur to be learnt
    #[arg(long, value_name = "N", default_value_t = 2)]
    min_frequency: u64,
    /// File to write, tokenizer.json
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Runs `sata tokenizer`.
///
/// # Errors
/// Texts that cannot be read, a vocabulary that cannot be, a file that cannot be written.
pub fn run(args: &TokenizerArgs) -> Outcome {
    let mut staged = Staged::new(&args.out, "--out")?;
    let texts = read_texts(&args.text)?;
    let start = Instant::now();
    let tokenizer =
        Tokenizer::train(texts.iter().map(String::as_str), args.vocab, args.min_frequency)
            .map_err(|error| Failure::new(error.to_string()).context("--vocab"))?;
    let elapsed = start.elapsed().as_secs_f64();
    staged.write(tokenizer.json().as_bytes())?;
    staged.commit()?;
    let size: usize = texts.iter().map(String::len).sum();
    say(format!(
        "{}: {} tokens, learnt from {} files, {}, in {}",
        args.out.display(),
        grouped(tokenizer.vocab() as u128),
        texts.len(),
        bytes(size as u128),
        seconds(elapsed)
    ))?;
    if tokenizer.vocab() < args.vocab {
        say(format!(
            "fewer than the {} asked for: no other pair occurs {} times within words",
            grouped(args.vocab as u128),
            args.min_frequency
        ))?;
    }
    Ok(())
}
