//! How fast a text was written, and what memory it took.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

use sata_lm::infer::{Sampling, Session};
use serde::Serialize;

use crate::machine;
use crate::progress::Progress;
use crate::table::{bytes, grouped, seconds};

/// Between what is said meanwhile.
const BETWEEN: Duration = Duration::from_millis(500);

/// Counts tokens and time.
pub struct Meter {
    /// When the command began.
    began: Instant,
    /// When writing did.
    writing: Instant,
    /// When it ended.
    ended: Instant,
    tokens: u64,
    /// From the beginning of the command to the first token written.
    first: Option<Duration>,
    progress: Option<Progress>,
    said: Instant,
}

impl Meter {
    /// Of writing that begins now; `tell` for saying so meanwhile, where standard error is a
    /// terminal.
    pub fn new(began: Instant, tell: bool) -> Self {
        let now = Instant::now();
        let progress = (tell && stderr().is_terminal()).then(Progress::endless);
        Meter { began, writing: now, ended: now, tokens: 0, first: None, progress, said: now }
    }

    /// A token of the session is written.
    pub fn token(&mut self, session: &Session) {
        self.tokens += 1;
        self.ended = Instant::now();
        self.first.get_or_insert(self.ended - self.began);
        let Some(progress) = &self.progress else {
            return;
        };
        if self.ended - self.said >= BETWEEN {
            self.said = self.ended;
            progress.doing(Stats::new(session, self, 0).line());
        }
    }

    /// Tokens written.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Nothing more is said.
    pub fn finish(&self) {
        if let Some(progress) = &self.progress {
            progress.finish();
        }
    }

    fn tokens_per_second(&self) -> Option<f64> {
        let elapsed = (self.ended - self.writing).as_secs_f64();
        (self.tokens > 0 && elapsed > 0.0).then(|| self.tokens as f64 / elapsed)
    }
}

/// The figures of a text.
#[derive(Debug, Serialize)]
pub struct Stats<'a> {
    /// Where the model came from.
    model: &'a str,
    /// Tokens written.
    tokens: u64,
    /// Tokens of the prompt, read before them.
    prompt_tokens: usize,
    /// Tokens of the session: those, and all before it was resumed.
    position: u64,
    /// Tokens written per second.
    tokens_per_second: Option<f64>,
    /// From the beginning of the command to the first token written.
    first_token_seconds: Option<f64>,
    /// Bytes of all that the session remembers of its text.
    state_bytes: usize,
    /// Whether they are the same for every text.
    constant: bool,
    /// Bytes of a KV cache of this model for this text, in f32.
    kv_cache_f32_bytes: u64,
    /// Bytes of memory that the program holds, where the system says.
    resident_bytes: Option<u64>,
    /// Queries whose attention had no positive, finite denominator.
    troubles: u64,
    /// How tokens were chosen.
    sampling: &'a Sampling,
}

/// The same with the text.
#[derive(Debug, Serialize)]
pub struct WithText<'a> {
    text: String,
    #[serde(flatten)]
    stats: &'a Stats<'a>,
}

impl<'a> Stats<'a> {
    /// Of a session as it is now.
    pub fn new(session: &'a Session, meter: &Meter, prompt_tokens: usize) -> Self {
        let weights = session.weights();
        Stats {
            model: weights.source(),
            tokens: meter.tokens,
            prompt_tokens,
            position: session.position(),
            tokens_per_second: meter.tokens_per_second(),
            first_token_seconds: meter.first.map(|time| time.as_secs_f64()),
            state_bytes: session.state_bytes(),
            constant: weights.config().attention.is_constant_cost(),
            kv_cache_f32_bytes: weights.cache_bytes(session.position()),
            resident_bytes: machine::resident(),
            troubles: session.troubles(),
            sampling: session.sampling(),
        }
    }

    /// For programs, with the text.
    pub fn with_text(&'a self, text: String) -> WithText<'a> {
        WithText { text, stats: self }
    }

    /// For people, on standard error.
    pub fn say(&self) {
        let mut lines = vec![format!(
            "tokens           {} written, {} of prompt, {} in all",
            grouped(self.tokens.into()),
            grouped(self.prompt_tokens as u128),
            grouped(self.position.into())
        )];
        if let (Some(speed), Some(first)) = (self.speed(), self.first_token_seconds) {
            lines.push(format!("speed            {speed}, the first after {}", seconds(first)));
        }
        lines.extend([
            format!("state            {}, {}", bytes(self.state_bytes as u128), self.growth()),
            format!(
                "KV cache         {} in f32, for a text of this length",
                bytes(self.kv_cache_f32_bytes.into())
            ),
        ]);
        if let Some(resident) = self.resident_bytes {
            lines.push(format!("resident memory  {}", bytes(resident.into())));
        }
        lines.push(format!("seed             {}", self.sampling.seed));
        if self.troubles > 0 {
            lines.push(format!(
                "troubles         {} queries had no positive denominator",
                grouped(self.troubles.into())
            ));
        }
        // Whoever closed it does not want to know.
        let _ = writeln!(stderr(), "{}", lines.join("\n"));
    }

    /// For people, meanwhile.
    fn line(&self) -> String {
        let mut parts = vec![format!("{} tokens", grouped(self.tokens.into()))];
        parts.extend(self.speed());
        parts.push(format!("state {}", bytes(self.state_bytes as u128)));
        parts.push(format!("KV cache {}", bytes(self.kv_cache_f32_bytes.into())));
        parts.extend(self.resident_bytes.map(|n| format!("resident {}", bytes(n.into()))));
        parts.join(", ")
    }

    fn speed(&self) -> Option<String> {
        let speed = self.tokens_per_second?;
        Some(format!("{} tokens/s", grouped(speed.round() as u128)))
    }

    fn growth(&self) -> &'static str {
        if self.constant { "whatever the length" } else { "a KV cache that grows" }
    }
}
