//! How tokens are chosen: what the command line says over what holds otherwise.

use std::hash::{BuildHasher, Hasher, RandomState};

use clap::Args;
use sata_lm::infer::{Error, Sampling};

use crate::failure::{Failure, Outcome};

/// What the command line says about choosing tokens.
#[derive(Debug, Args)]
#[command(next_help_heading = "How tokens are chosen")]
pub struct SamplingArgs {
    /// Logits are divided by it: below 1 likely tokens become likelier, 0 takes the likeliest always
    /// [default: 0.8]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Choose among the K likeliest tokens alone, 0 for all [default: 0]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<usize>,
    /// Choose among the likeliest tokens that together have this probability, 1 for all
    /// [default: 0.95]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Make tokens that came lately less likely, 1 for not [default: 1.1]
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// How many of the last tokens came lately, 4096 at most [default: 64]
    #[arg(long, value_name = "W", allow_negative_numbers = true)]
    pub repetition_window: Option<usize>,
    /// Where random numbers begin: on the same machine the same seed gives the same text [default:
    /// another every time, which --stats says]
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    pub seed: Option<u64>,
}

/// What holds for a new text: a small model falls into repetition without a penalty.
const PENALTY: f32 = 1.1;

impl SamplingArgs {
    /// The settings of a new text.
    ///
    /// # Errors
    /// A value that a setting cannot have.
    pub fn fresh(&self) -> Outcome<Sampling> {
        // Few digits: it will be typed.
        let seed = u64::from(RandomState::new().build_hasher().finish() as u32);
        self.over(&Sampling { repetition_penalty: PENALTY, seed, ..Sampling::default() })
    }

    /// The settings of a text that goes on.
    ///
    /// # Errors
    /// As for [`SamplingArgs::fresh`].
    pub fn over(&self, saved: &Sampling) -> Outcome<Sampling> {
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(saved.temperature),
            top_k: self.top_k.unwrap_or(saved.top_k),
            top_p: self.top_p.unwrap_or(saved.top_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(saved.repetition_penalty),
            window: self.repetition_window.unwrap_or(saved.window),
            seed: self.seed.unwrap_or(saved.seed),
        };
        match sampling.check() {
            Ok(()) => Ok(sampling),
            Err(Error::Sampling { field, value, requires }) => {
                Err(Failure::new(format!("--{field} {value}: {requires}")))
            }
            Err(error) => Err(error.into()),
        }
    }
}
