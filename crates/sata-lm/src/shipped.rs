//! The model that comes with the program: `model/`, whose README is its card.

/// The files of a model, as bytes of the program.
#[derive(Clone, Copy, Debug)]
pub struct Shipped {
    /// Its name.
    pub name: &'static str,
    /// Tokens of the longest sequences in its training.
    pub context: usize,
    /// `config.json`.
    pub config: &'static [u8],
    /// `model.safetensors`.
    pub weights: &'static [u8],
    /// `tokenizer.json`.
    pub tokenizer: &'static [u8],
}

/// The embedded model.
pub const SHIPPED: Shipped = Shipped {
    name: "the model that comes with the program",
    context: 2048,
    config: include_bytes!("../model/config.json"),
    weights: include_bytes!("../model/model.safetensors"),
    tokenizer: include_bytes!("../model/tokenizer.json"),
};
