//! What training says while it runs, and at its end.

use std::fmt;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sata_lm::train::{Objective, Point, Settings, Trainer};
use serde::Serialize;

use super::device::Share;
use crate::progress::Progress;
use crate::table::grouped;

/// Seconds between plain lines, where there is no evaluation to tell of.
const BETWEEN_LINES: Duration = Duration::from_secs(10);
/// Share that a new step has in the smoothed loss and time.
const NEWEST: f64 = 0.1;

/// Tells how far training has come: a bar on a terminal, lines elsewhere.
pub struct Report {
    bar: Option<Progress>,
    steps: usize,
    tokens_per_step: usize,
    /// Bits per byte for each nat per token, of the text and of the held-out text.
    per_nat: [f64; 2],
    /// Steps and seconds of this run.
    done: usize,
    began: Instant,
    before: Instant,
    /// Smoothed.
    loss: Option<f64>,
    seconds: Option<f64>,
    /// What each step without evaluation took.
    each: Vec<f64>,
    validation: Option<f64>,
    last_line: Option<Instant>,
}

impl Report {
    /// Of a training that begins or goes on.
    pub fn new<M: Objective>(settings: &Settings, trainer: &Trainer<M>) -> Self {
        let (done, steps) = (trainer.curve().len(), settings.train.steps);
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = Progress::new(steps as u64);
            bar.done(done as u64);
            bar
        });
        let corpus = trainer.corpus();
        let now = Instant::now();
        let report = Report {
            bar,
            steps,
            tokens_per_step: settings.train.tokens_per_step(),
            per_nat: [corpus.train.bits_per_byte(), corpus.validation.bits_per_byte()],
            done: 0,
            began: now,
            before: now,
            loss: None,
            seconds: None,
            each: vec![],
            validation: trainer.curve().iter().rev().find_map(|point| point.validation),
            last_line: None,
        };
        let from = if done > 0 { format!("from step {done}, ") } else { String::new() };
        report.line(&format!(
            "{from}{} parameters, {} tokens of {} bytes, {} tokens a step",
            grouped(trainer.parameters_count() as u128),
            grouped(corpus.train.ids.len() as u128),
            grouped(corpus.train.bytes.into()),
            grouped(settings.train.tokens_per_step() as u128),
        ));
        report
    }

    /// A step is done.
    pub fn step(&mut self, point: &Point) {
        let now = Instant::now();
        let took = (now - self.before).as_secs_f64();
        self.before = now;
        self.done += 1;
        let smooth = |old: Option<f64>, new: f64| old.map_or(new, |old| old + NEWEST * (new - old));
        if point.validation.is_none() {
            self.each.push(took);
        }
        self.loss = Some(smooth(self.loss, point.loss));
        self.seconds = Some(smooth(self.seconds, took));
        self.validation = point.validation.or(self.validation);
        let text = self.text(point);
        if let Some(bar) = &self.bar {
            bar.doing(text);
            bar.done(1);
            return;
        }
        let due = self.last_line.is_none_or(|last| now - last >= BETWEEN_LINES);
        if due || point.validation.is_some() || point.step == self.steps {
            self.last_line = Some(now);
            self.line(&text);
        }
    }

    fn text(&self, point: &Point) -> String {
        let (loss, seconds) = (self.loss.unwrap_or(f64::NAN), self.seconds.unwrap_or(f64::NAN));
        let validation = self.validation.map_or(String::new(), |loss| {
            format!(", held out {:.4} nats {:.4} bits/byte", loss, loss * self.per_nat[1])
        });
        let left = (self.steps - point.step) as f64 * seconds;
        format!(
            "step {}/{}: {loss:.4} nats/token {:.4} bits/byte{validation}, gradient {:.3}, {} \
             tokens/s, {} left",
            point.step,
            self.steps,
            loss * self.per_nat[0],
            point.gradient_norm,
            grouped((self.tokens_per_step as f64 / seconds) as u128),
            clock(left),
        )
    }

    /// A checkpoint is being written.
    pub fn saving(&self) {
        if let Some(bar) = &self.bar {
            bar.doing("writing a checkpoint");
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }

    /// Tokens trained on per second of this run, evaluations and checkpoints included.
    pub fn tokens_per_second(&self) -> f64 {
        (self.done * self.tokens_per_step) as f64 / self.began.elapsed().as_secs_f64()
    }

    /// The same by the median step, without evaluations and checkpoints.
    pub fn usual_tokens_per_second(&self) -> Option<f64> {
        let mut each = self.each.clone();
        each.sort_unstable_by(f64::total_cmp);
        Some(self.tokens_per_step as f64 / each.get(each.len() / 2)?)
    }

    fn line(&self, text: &str) {
        if self.bar.is_none() {
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }
}

/// 1:02:03
fn clock(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    let (hours, minutes, seconds) = (s / 3600, s / 60 % 60, s % 60);
    match hours {
        0 => format!("{minutes}:{seconds:02}"),
        _ => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}

/// Held-out text in sequences of one length.
#[derive(Debug, Serialize)]
pub struct AtLength {
    /// Tokens of a sequence.
    pub length: usize,
    /// Nats per token.
    pub loss: f64,
    pub bits_per_byte: f64,
}

/// What a training ended with.
#[derive(Debug, Serialize)]
pub struct Summary {
    model: PathBuf,
    /// In short words.
    attention: String,
    seed: u64,
    tokens_per_step: usize,
    parameters: usize,
    steps: usize,
    /// Of the last step, nats per token.
    loss: Option<f64>,
    /// Of the held-out text, nats per token.
    validation_loss: Option<f64>,
    validation_bits_per_byte: Option<f64>,
    seconds: f64,
    tokens_per_second: f64,
    /// By the median step.
    usual_tokens_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    profile: Vec<Share>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    at: Vec<AtLength>,
}

impl Summary {
    /// Of a training that is finished.
    pub fn new<M: Objective>(
        out: &Path,
        settings: &Settings,
        trainer: &Trainer<M>,
        (tokens_per_second, usual_tokens_per_second): (f64, Option<f64>),
        profile: Vec<Share>,
        at: Vec<AtLength>,
    ) -> Self {
        let last = trainer.curve().last();
        let validation = last.and_then(|point| point.validation);
        let per_nat = trainer.corpus().validation.bits_per_byte();
        Summary {
            model: out.into(),
            attention: settings.model.attention.to_string(),
            seed: settings.train.seed,
            tokens_per_step: settings.train.tokens_per_step(),
            parameters: trainer.parameters_count(),
            steps: trainer.curve().len(),
            loss: last.map(|point| point.loss),
            validation_loss: validation,
            validation_bits_per_byte: validation.map(|loss| loss * per_nat),
            seconds: trainer.seconds(),
            tokens_per_second,
            usual_tokens_per_second,
            profile,
            at,
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary { model, parameters, steps, seconds, tokens_per_second, .. } = self;
        write!(f, "{}: {} parameters, ", model.display(), grouped(*parameters as u128))?;
        write!(f, "{steps} steps in {}, ", clock(*seconds))?;
        if let (Some(nats), Some(bits)) = (self.validation_loss, self.validation_bits_per_byte) {
            write!(f, "held-out text {nats:.4} nats/token, {bits:.4} bits/byte, ")?;
        }
        write!(f, "{} tokens/s", grouped(*tokens_per_second as u128))?;
        for AtLength { length, loss, bits_per_byte } in &self.at {
            write!(
                f,
                "\nin sequences of {length}: {loss:.4} nats/token, {bits_per_byte:.4} bits/byte"
            )?;
        }
        for Share { name, calls, seconds, part } in &self.profile {
            write!(f, "\n{:>6.2} %  {seconds:>9.4} s  {calls:>8} calls  {name}", 100.0 * part)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks() {
        assert_eq!(
            ["0:09", "1:01", "2:00:00"],
            [9.4, 61.0, 7200.0].map(clock).each_ref().map(|s| &**s)
        );
    }
}
