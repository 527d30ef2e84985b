//! Attention of models that somebody else made, as a setting per layer and key/value head.
//!
//! A head's past is softmax's own (keys and values of all tokens), a state of `sata`, or a
//! [`Memory`](MemorySetting): exact near blocks and first tokens, a few exact far tokens, and either
//! groups of tokens with one mean key and value each, or sums of few orders. All but softmax's have a
//! size that does not change with the length of the text.

mod exponential;
mod far;
mod full;
mod groups;
mod memory;
mod past;
mod qkv;
mod setting;

pub(crate) use full::attend_whole;
pub use past::{HeadPast, LayerPast};
pub use qkv::Qkv;
pub use setting::{Calibration, Far, HeadSetting, Heads, MemorySetting, Setting};
