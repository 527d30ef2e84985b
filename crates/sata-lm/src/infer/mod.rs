//! Inference: a model's weights in memory, and sessions that write with them.
//!
//! [`Weights`] come from a folder (`config.json`, `model.safetensors`) or from bytes, stay in the
//! type they are stored in, and are shared. A [`Session`] is a text in the making; it is saved to
//! one file, resumed exactly where it stopped, and forked by cloning.

mod attention;
mod cache;
mod error;
mod file;
mod lanes;
mod layer;
mod matrix;
mod matvec;
mod rotary;
mod sample;
mod session;
mod weights;

pub use error::Error;
pub use sample::{MAX_WINDOW, Sampler, Sampling};
pub use session::Session;
pub use weights::{CONFIG_FILE, WEIGHTS_FILE, Weights};
