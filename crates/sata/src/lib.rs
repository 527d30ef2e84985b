//! Self-attention at constant cost per token.

#![deny(missing_docs)]

mod arch;
mod attention;
pub mod basis;
pub mod conventional;
pub mod cost;
mod diagnostics;
mod element;
mod error;
mod memory;
mod parallel;
mod plan;
mod spec;
mod state;
mod view;

pub use arch::Level;
pub use attention::Call;
pub use diagnostics::Diagnostics;
pub use element::{Element, Real};
pub use error::Error;
pub use plan::{Form, Plan, Recipe};
pub use spec::{DEFAULT_BLOCK, DEFAULT_TERMS, Decay, Near, Series, Spec, SpecBuilder};
pub use state::State;
pub use view::{View, ViewMut};
