//! What a text says about a model's heads, and a setting chosen for each head by it.

mod choose;
mod gather;
mod linalg;
mod statistics;

pub use choose::{Choice, Errors, choose, measure};
pub use gather::{Recorded, record};
pub use statistics::statistics;
