//! From arguments to a session that can write.

use std::sync::Arc;

use sata_lm::Tokenizer;
use sata_lm::infer::{Session, Weights};

use super::GenerateArgs;
use crate::failure::{Failure, Outcome};
use crate::model::Model;
use crate::output::Staged;

/// What a text begins with if nobody says.
const PROMPT: &str = "CHAPTER I\n\n";

/// A session, and what it is to read before it writes.
pub struct Setup {
    /// What was resumed, or nothing yet.
    pub session: Session,
    /// What its tokens are.
    pub tokenizer: Tokenizer,
    /// Tokens of the prompt.
    pub prompt: Vec<u32>,
}

impl Setup {
    /// Reads, checks and makes everything.
    ///
    /// # Errors
    /// Whatever of it is wrong. Nothing is written.
    pub fn new(args: &GenerateArgs) -> Outcome<Self> {
        let prompt = prompt(args)?;
        if let Some(path) = &args.save_session {
            // Rather now than after hours that would be lost.
            drop(Staged::new(path, "--save-session")?);
        }
        let Model { weights, tokenizer } = Model::load(args.model.as_deref())?;
        let session = session(args, &weights)?;
        let prompt = tokenizer.encode(prompt)?;
        if prompt.is_empty() && session.position() == 0 {
            return Err(Failure::new("--resume: the session has no text yet")
                .hint("give it a beginning with --prompt"));
        }
        Ok(Setup { session, tokenizer, prompt })
    }
}

/// The text to read first.
fn prompt(args: &GenerateArgs) -> Outcome<&str> {
    let Some(prompt) = &args.prompt else {
        return Ok(if args.resume.is_some() { "" } else { PROMPT });
    };
    if prompt.is_empty() && args.resume.is_none() {
        return Err(Failure::new("--prompt is empty, and there is no --resume to go on from")
            .hint("leave --prompt away for a beginning that the program has"));
    }
    prompt.to_str().ok_or_else(|| {
        Failure::new(format!("--prompt {}: it is not UTF-8", prompt.to_string_lossy()))
    })
}

/// What was saved, or a new one, with the settings of the command line.
fn session(args: &GenerateArgs, weights: &Arc<Weights>) -> Outcome<Session> {
    let Some(path) = &args.resume else {
        return Ok(Session::new(weights, args.sampling.fresh()?)?);
    };
    let mut session =
        Session::load(path, weights).map_err(|error| Failure::from(error).context("--resume"))?;
    session.set_sampling(args.sampling.over(session.sampling())?)?;
    Ok(session)
}
