//! Models that already exist: read from GGUF or safetensors, run with any attention.
//!
//! [`Pretrained::load`] takes a GGUF file, or a folder with one or with `config.json` and
//! safetensors. A Llama-type model reads text in a [`LlamaSession`] under a [`Setting`]; a BERT-type
//! encoder makes a text one vector. Weights are f32 in memory, whatever they were.

mod attention;
mod bert;
pub mod calibrate;
mod error;
pub mod gguf;
mod linear;
mod llama;
mod load;
mod rotary;
mod safe;
mod tensors;
mod tokenizer;

pub use attention::{
    Calibration, Far, HeadPast, HeadSetting, Heads, LayerPast, MemorySetting, Qkv, Setting,
};
pub use bert::{Bert, BertConfig, Pooling};
pub use error::PretrainedError;
pub use llama::{Llama, LlamaConfig, LlamaSession, Observer};
pub use load::{Kind, Pretrained};
pub use safe::SafeTensorsFile;
pub use tensors::Tensor;
pub use tokenizer::{Encoded, TextTokenizer};
