//! The model that comes with the program.

/// The files of a model, as bytes of the program.
#[derive(Clone, Copy, Debug)]
pub struct Shipped {
    /// Its name.
    pub name: &'static str,
    /// `config.json`.
    pub config: &'static [u8],
    /// `model.safetensors`.
    pub weights: &'static [u8],
    /// `tokenizer.json`.
    pub tokenizer: &'static [u8],
}

/// The embedded model, where there is one.
///
/// To embed one, put its three files in a folder of this crate and give this constant
/// `Some(Shipped { name, config: include_bytes!(…), weights: …, tokenizer: … })`.
const SHIPPED: Option<Shipped> = None;

/// The model that comes with the program; none has been embedded in this build if it is `None`.
pub fn shipped() -> Option<Shipped> {
    SHIPPED
}
