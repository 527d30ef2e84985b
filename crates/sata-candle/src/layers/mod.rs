//! Layers with weights.

mod attention;
mod linear;
mod norm;

pub use attention::{TaylorAttention, TaylorAttentionOptions};
pub use linear::Linear;
pub use norm::RmsNorm;
