//! `sata generate`: text from a model, for as long as one likes.

mod sampling;
mod setup;
mod stats;
mod text;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clap::Args;
use sata_lm::infer::Session;

use crate::failure::{Failure, Outcome};
use crate::numbers::{count, size};
use crate::output::say_json;
use crate::{interrupt, machine, pretrained};
use sampling::SamplingArgs;
use setup::Setup;
use stats::{Meter, Stats};
use text::Text;

/// Arguments of `sata generate`.
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct GenerateArgs {
    /// Folder with config.json, model.safetensors and tokenizer.json, or a GGUF file or a folder with
    /// one; the model that comes with the program if left away
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Attention for a model that already existed, see below
    #[arg(long, value_name = "SPEC")]
    pub attention: Option<String>,
    /// The text to go on with [default: "CHAPTER I" and an empty line; with --resume nothing more]
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<OsString>,
    /// Tokens to write [default: 256]
    #[arg(long, value_name = "N", value_parser = count, allow_negative_numbers = true,
        conflicts_with = "forever")]
    pub tokens: Option<u64>,
    /// Write until Ctrl-C
    #[arg(long)]
    pub forever: bool,
    /// Go on with the text of a session
    #[arg(long, value_name = "FILE")]
    pub resume: Option<PathBuf>,
    /// Save the session at the end, for --resume; it may be the file that is resumed
    #[arg(long, value_name = "FILE")]
    pub save_session: Option<PathBuf>,
    /// Threads, all processors if left away: a prompt is read on them, and a single token too where
    /// states are so large that it pays
    #[arg(long, value_name = "N", value_parser = size)]
    pub threads: Option<usize>,
    /// Say at the end how fast it was and what memory it took, and the seed, on standard error;
    /// meanwhile too, if that is a terminal and the text goes elsewhere
    #[arg(long)]
    pub stats: bool,
    /// Print the text and those figures as JSON at the end, instead of the text as it is written
    #[arg(long)]
    pub json: bool,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// Tokens to write if nobody says.
const TOKENS: u64 = 256;
/// Tokens of a prompt that are read before Ctrl-C is looked at: as many as a session takes at once.
const PART: usize = 256;

const AFTER: &str = "\
The prompt is printed as the beginning of the text, except one that was given before the session was
saved. Where the model ends a text, a line `* * *` between empty lines is printed and another text
begins; it counts as one token. On a terminal the last line is ended, elsewhere nothing is added to
the text.

A session holds all that the model knows of its text, and how tokens are chosen: what is not given
with --resume stays as it was, random numbers go on where they were, and another --seed begins them
anew. N tokens that were saved and M that go on are the same text as N + M at once, to the byte: a
character of which --save-session has the beginning is printed when it is complete. The size of a
session does not depend on the length of its text, unless the model's attention is softmax.

Ctrl-C stops after the token being written, saves the session and prints what was asked for; the exit
code is then 130, with --forever 0. While the prompt is being read it ends with 130 and saves nothing.
A reader that goes away (`| head`) ends it likewise, with 0. A
second Ctrl-C ends it at once, and nothing is saved.

A model that already existed (GGUF, or config.json with a model_type) needs --attention: softmax, a file of
`sata calibrate`, or KIND:NUMBER with options, as in gauss:4,near=1,sinks=4.
  window:N             the query's own block and N before it, nothing else
  taylor:P, gauss:P, hermite:P, power:P   that series for all that is not near
  groups:N             N groups of tokens for it, with one mean key and value each
  mixed:R              gauss with four terms in R directions, a line in the others; calibrated files only
  near=N block=N sinks=N   what is exact
  kept=N               far tokens with the largest keys stay exact too (window, groups and mixed)
Its positions go on past the context that it was trained on; how well that does, its position embedding
decides. --resume and --save-session are for models of `sata train`.";

/// Runs `sata generate`.
///
/// # Errors
/// Wrong arguments or files before anything is printed; numbers that overflow, an output or a
/// session that cannot be written, or Ctrl-C later.
pub fn run(args: &GenerateArgs) -> Outcome {
    let began = Instant::now();
    machine::set_threads(args.threads)?;
    if pretrained::is_at(args.model.as_deref()) {
        return pretrained::generate::run(args);
    }
    if args.attention.is_some() {
        return Err(Failure::new(
            "--attention is for models that already existed: what attention a model \
             of `sata train` has is in its configuration",
        ));
    }
    let Setup { mut session, tokenizer, prompt } = Setup::new(args)?;
    let mut text = Text::new(&tokenizer, session.unfinished(), args.json)?;
    let stop = interrupt::flag()?;
    text.push(&prompt)?;
    read(&mut session, &prompt, &stop)?;

    let limit = if args.forever { None } else { Some(args.tokens.unwrap_or(TOKENS)) };
    let mut meter = Meter::new(began, args.stats && !text.is_on_terminal());
    let written = write(&mut session, &mut text, &mut meter, limit, &stop);
    meter.finish();
    let saved = match (&args.save_session, &written) {
        (Some(path), Ok(())) => {
            session.set_unfinished(text.pending());
            session.save(path).map_err(|error| Failure::from(error).context("--save-session"))
        }
        _ => Ok(()),
    };
    let will_go_on = args.save_session.is_some() && written.is_ok() && saved.is_ok();
    let text = text.finish(will_go_on)?;
    written?;
    let stats = Stats::new(&session, &meter, prompt.len());
    if args.stats {
        stats.say();
    }
    if let Some(text) = text {
        say_json(&stats.with_text(text))?;
    }
    saved?;
    match limit {
        Some(limit) if stop.load(Ordering::Relaxed) && meter.tokens() < limit => {
            let saved = match &args.save_session {
                Some(path) => format!("; --resume {} goes on", path.display()),
                None => String::new(),
            };
            let tokens = meter.tokens();
            Err(Failure::Interrupted(format!("{tokens} of {limit} tokens are written{saved}")))
        }
        _ => Ok(()),
    }
}

/// Reads the prompt, unless Ctrl-C comes.
fn read(session: &mut Session, prompt: &[u32], stop: &AtomicBool) -> Outcome {
    for part in prompt.chunks(PART) {
        session.feed(part)?;
        if stop.load(Ordering::Relaxed) {
            return Err(Failure::Interrupted(
                "the prompt was still being read: no session is saved".into(),
            ));
        }
    }
    Ok(())
}

/// Writes up to the limit, until Ctrl-C, or as long as there is a reader.
fn write(
    session: &mut Session,
    text: &mut Text<'_>,
    meter: &mut Meter,
    limit: Option<u64>,
    stop: &AtomicBool,
) -> Outcome {
    while limit.is_none_or(|limit| meter.tokens() < limit)
        && text.is_read()
        && !stop.load(Ordering::Relaxed)
    {
        let token = session.next_token()?;
        text.push(&[token])?;
        meter.token(session);
    }
    Ok(())
}
