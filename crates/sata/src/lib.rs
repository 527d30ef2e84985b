//! Self-attention at constant cost per token, on the CPU.
//!
//! exp(q·k/c) is cut to P terms of a series in x = q·k/c. Term p is an inner product of features:
//! the monomials of order p in the elements of q and of k, each weighed by its multiplicity. So
//! the past is a sum of features times values of fixed size, instead of a KV cache (Heinsen and
//! Kozachkov, "Self-Attention at Constant Cost per Token via Symmetry-Aware Taylor
//! Approximation", 2026; equation numbers in these pages are that paper's).
//!
//! A [`Spec`] says what is computed, a [`Plan`] holds what it needs on this machine, a [`Call`]
//! names queries, keys and values, a [`State`] is a past that goes on. [`Diagnostics`] says what
//! went wrong in the numbers; [`Error`] what was wrong with the call. [`cost`] counts,
//! [`basis`] lists the monomials, [`conventional`] is softmax attention to compare with.
//!
//! ```
//! use sata::{Call, Plan, Spec, View, ViewMut};
//!
//! let plan = Plan::new(&Spec::new(2, 1).terms(3).build()?)?;
//! let (q, k, v) = ([0.5f64, -1.0, 0.25, 2.0], [1.0, 0.5, -0.5, 1.0], [1.0, 3.0]);
//! let mut y = [0.0; 2];
//! let call = Call::causal(
//!     View::new(&q, [1, 1, 2, 2])?, // batch, heads, tokens, d_key
//!     View::new(&k, [1, 1, 2, 2])?,
//!     View::new(&v, [1, 1, 2, 1])?,
//! );
//! let diagnostics = plan.run(call, ViewMut::new(&mut y, [1, 1, 2, 1])?)?;
//! assert!(diagnostics.is_clean());
//! // The second query sees logits x = 1.25/√2 and 1.875/√2, weighed by 1 + x + x²/2.
//! let w = |x: f64| 1.0 + x + x * x / 2.0;
//! let (a, b) = (w(1.25 / 2f64.sqrt()), w(1.875 / 2f64.sqrt()));
//! assert!((y[0] - 1.0).abs() < 1e-12 && (y[1] - (a + 3.0 * b) / (a + b)).abs() < 1e-12);
//! # Ok::<(), sata::Error>(())
//! ```

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

/// The README's example, compiled with the tests.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
