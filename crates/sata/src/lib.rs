//! Self-attention at constant cost per token, on the CPU.
//!
//! exp(q·k/c) is cut to P terms of a series in x = q·k/c. Term p is an inner product of features:
//! the monomials of order p in the elements of q and of k, each weighed by its multiplicity. So
//! the past is a sum of features times values of fixed size, instead of a KV cache (Heinsen and
//! Kozachkov, "Self-Attention at Constant Cost per Token via Symmetry-Aware Taylor
//! Approximation", 2026; equation numbers in these pages are that paper's).
//!
//! A short series alone is not softmax, so a spec may ask for more, out of the same sums: the last
//! blocks of tokens and the first few weighed exactly ([`Near`], sinks), exact [`Decay`] (ALiBi
//! slopes, forget gates), and coefficients fitted to each query's own far logits
//! ([`Series::Gauss`], [`Series::Hermite`]), whose moments the sums hold. All are under one
//! denominator.
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
//!
//! With near blocks, sinks and forget gates, token by token:
//!
//! ```
//! use sata::{Call, Decay, Near, Plan, Series, Spec, State, View, ViewMut};
//!
//! let spec = Spec::new(2, 1)
//!     .series(Series::Gauss)
//!     .near(Near::Blocks(1)) // a query's own block and the one before
//!     .sinks(4)
//!     .decay(Decay::Gates)
//!     .build()?;
//! let plan = Plan::new(&spec)?;
//! let mut state = State::<f32>::new(&plan, 1, 1)?;
//! for token in 0..1000 {
//!     let (q, k, v) = ([0.1, 1.0], [(token as f32).sin(), 0.5], [1.0]);
//!     let gate = [-0.01]; // the past fades by 1 %
//!     let mut y = [0.0];
//!     let call = Call::causal(
//!         View::new(&q, [1, 1, 1, 2])?,
//!         View::new(&k, [1, 1, 1, 2])?,
//!         View::new(&v, [1, 1, 1, 1])?,
//!     );
//!     let call = call.log_gates(View::new(&gate, [1, 1, 1, 1])?).state(&mut state);
//!     plan.run(call, ViewMut::new(&mut y, [1, 1, 1, 1])?)?;
//!     assert!((y[0] - 1.0).abs() < 1e-5, "an average of ones");
//! }
//! assert_eq!(state.position(0), 1000);
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
mod series;
mod spec;
mod state;
mod view;

pub use arch::Level;
pub use attention::{Call, Gradients, StateGradient};
pub use diagnostics::{Diagnostics, HeadDiagnostics};
pub use element::{Element, Real};
pub use error::Error;
pub use plan::{Form, Plan, Recipe};
pub use spec::{
    DEFAULT_BLOCK, DEFAULT_TERMS, Decay, Near, Series, Spec, SpecBuilder, alibi_slopes,
};
pub use state::{Centre, State, StateParts};
pub use view::{View, ViewMut};

/// The README's example, compiled with the tests.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
