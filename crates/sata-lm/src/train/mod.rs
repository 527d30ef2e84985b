//! Training: settings, texts, steps, checkpoints.
//!
//! [`Settings`] come from a file, a [`Corpus`] from texts; a [`Trainer`] does steps, and a
//! [`Folder`] keeps what is needed to go on and what is needed to generate. The curve of losses
//! depends on settings, texts and tokenizer alone: not on the number of threads, and not on where
//! it was interrupted and resumed.

mod checkpoint;
mod data;
mod error;
mod folder;
#[cfg(feature = "cuda")]
mod gpu;
mod optimizer;
mod recall;
mod schedule;
mod settings;
mod step;
#[cfg(test)]
mod tests;
mod trainer;
mod words;
mod workers;

pub use checkpoint::{Checkpoint, Header, Identity};
pub use data::{Corpus, HeldOut, Mark, Text, Tokens, hex, read_texts};
pub use error::TrainError;
pub use folder::{Amount, Folder, Record};
pub use optimizer::{AdamW, Moments, Update};
pub use recall::{RecallFile, RecallTask, RecallTrainer};
pub use schedule::Schedule;
pub use settings::{
    ModelSettings, SMALLEST_VOCAB, Settings, TokenizerSettings, TrainSettings, Validation,
};
pub use step::Objective;
pub use trainer::{Point, Trainer};
