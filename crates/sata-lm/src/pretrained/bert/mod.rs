//! Encoders of the BERT type: every token sees all others, and a text becomes one vector.

mod config;
mod weights;

pub use config::{BertConfig, Pooling};
pub use weights::Bert;
