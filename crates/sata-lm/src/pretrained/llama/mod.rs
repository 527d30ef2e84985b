//! Decoder-only transformers of the Llama type: RMS norms, rotary embedding, grouped queries, SwiGLU.

mod config;
mod session;
mod weights;

pub use config::LlamaConfig;
pub use session::{LlamaSession, Observer};
pub use weights::Llama;
