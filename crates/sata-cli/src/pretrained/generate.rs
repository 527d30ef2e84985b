//! `sata generate --model` of a decoder that somebody else trained: on past its context.

use std::sync::atomic::Ordering;
use std::time::Instant;

use sata_lm::infer::Sampler;
use sata_lm::pretrained::{Kind, LlamaSession};

use super::spec::named;
use super::{load, sizes};
use crate::failure::{Failure, Outcome};
use crate::generate::GenerateArgs;
use crate::interrupt;
use crate::output::{print, say_json};
use crate::table::{bytes, grouped};

/// What a text begins with if nobody says.
const PROMPT: &str = "Once upon a time";
/// Tokens to write if nobody says.
const TOKENS: u64 = 256;

/// Runs it.
///
/// # Errors
/// Arguments that such a model does not take, files that are wrong, numbers that are none.
pub fn run(args: &GenerateArgs) -> Outcome {
    let Some(path) = &args.model else {
        return Err(Failure::new("--model is needed"));
    };
    if args.resume.is_some() || args.save_session.is_some() {
        return Err(Failure::new("--resume and --save-session are for models of `sata train`"));
    }
    let Some(attention) = &args.attention else {
        return Err(Failure::new("--attention is needed for a model of this kind")
            .hint(format!("it takes {}", super::spec::ATTENTION)));
    };
    let prompt = match &args.prompt {
        None => PROMPT,
        Some(prompt) => prompt.to_str().ok_or_else(|| Failure::new("--prompt: it is not UTF-8"))?,
    };
    let loaded = load(path)?;
    let Kind::Llama(model) = &loaded.model else {
        return Err(Failure::new("--model is an encoder, which writes no text"));
    };
    let named = named(attention, sizes(&loaded.model)[2])?;
    let mut session = LlamaSession::new(model, &named.setting)
        .map_err(|error| Failure::from(error).context("--attention"))?;
    let sampling = args.sampling.fresh()?;
    let mut sampler = Sampler::new(sampling)?;
    let mut text = loaded.tokenizer.encode(prompt)?.0;
    if text.is_empty() {
        return Err(Failure::new("--prompt is empty"));
    }
    let stop = interrupt::flag()?;
    let began = Instant::now();
    let prompt_tokens = text.len();
    let mut hidden = session.read(&text)?;
    let read = began.elapsed().as_secs_f64();
    let (width, mut logits) = (model.config().width, vec![]);
    let mut shown = Shown { json: args.json, all: String::new(), from: 0 };
    shown.update(&loaded.tokenizer, &text, false)?;
    let limit = if args.forever { u64::MAX } else { args.tokens.unwrap_or(TOKENS) };
    let mut written = 0;
    while written < limit && !stop.load(Ordering::Relaxed) {
        model.logits(&hidden[hidden.len() - width..], &mut logits);
        if let Some(x) = logits.iter().find(|x| !x.is_finite()) {
            let at = session.position();
            return Err(Failure::new(format!("a logit is {x} after {at} tokens")));
        }
        let token = sampler.choose(&logits, &text);
        written += 1;
        if Some(token) == loaded.tokenizer.end_of_text() && !args.forever {
            break;
        }
        text.push(token);
        match shown.update(&loaded.tokenizer, &text, false) {
            Err(Failure::BrokenPipe) => return Ok(()),
            other => other?,
        }
        hidden = session.read(&[token])?;
    }
    shown.update(&loaded.tokenizer, &text, true)?;
    let seconds = began.elapsed().as_secs_f64() - read;
    let cache = model.config().cache_bytes(session.position(), 4);
    if args.json {
        return say_json(&serde_json::json!({
            "attention": named.name,
            "text": shown.all,
            "prompt_tokens": prompt_tokens,
            "tokens": written,
            "tokens_per_second": written as f64 / seconds,
            "state_bytes": session.bytes(),
            "cache_bytes": cache,
        }));
    }
    print("\n")?;
    if args.stats {
        eprintln!(
            "{} tokens written after {prompt_tokens}, {:.1} a second; state {}, KV cache for as many {}",
            grouped(written.into()),
            written as f64 / seconds,
            bytes(session.bytes() as u128),
            bytes(cache as u128)
        );
    }
    Ok(())
}

/// Text as far as its characters are whole.
struct Shown {
    json: bool,
    all: String,
    /// Tokens before this are printed and never looked at again.
    from: usize,
}

/// Tokens that are decoded together: characters have fewer.
const TOGETHER: usize = 16;

impl Shown {
    fn update(
        &mut self,
        tokenizer: &sata_lm::pretrained::TextTokenizer,
        text: &[u32],
        last: bool,
    ) -> Outcome {
        let part = tokenizer.decode(&text[self.from..])?;
        if part.ends_with('\u{fffd}') && !last && text.len() - self.from < TOGETHER {
            return Ok(());
        }
        self.from = text.len();
        self.all.push_str(&part);
        if self.json { Ok(()) } else { print(&part) }
    }
}
