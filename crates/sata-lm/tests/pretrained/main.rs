//! Models that already exist: files, tokenizers, numbers, attention settings, and what is refused.
//!
//! Numbers are compared with `tests/data/golden.json`, made by `golden.py` beside it.

mod attention;
mod files;
mod gguf_mutations;
mod numbers;
mod tiny;
mod tokenizers;
