//! Language models whose attention is a setting: softmax with a KV cache, or any spec of `sata`.

#![deny(missing_docs)]

mod config;
pub mod eval;
pub mod infer;
mod model;
pub mod pretrained;
mod shipped;
mod tokenizer;
pub mod train;

pub use config::{Attention, Config, HeadGroup, Kernel, Position};
pub use model::{Model, ROTARY_BASE, initial_weights, weight_shapes};
pub use shipped::{SHIPPED, Shipped};
pub use tokenizer::{END_OF_TEXT, END_OF_TEXT_NAME, Stream, Tokenizer, TokenizerError};
