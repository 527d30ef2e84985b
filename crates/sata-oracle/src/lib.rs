//! Slow, plain f64 attention that everything else is held to.
//!
//! Every formula is written out as loops over tokens, heads and dimensions, so that a reader can check it line
//! by line against "Self-Attention at Constant Cost per Token" (Heinsen and Kozachkov, 2026; "the paper" below).
//! Nothing here is fast, and nothing here depends on the rest of the project.
//!
//! For query t and key s of one head, with x = scale · (q_t·k_s),
//!
//! ```text
//! y_t = Σ_s w_ts v_s / Σ_s w_ts ,      w_ts = exp(g_t − g_s) · κ_ts
//! κ_ts = exp(x)                 when s is near t
//!      = Σ_{p<P} a_p x^p        otherwise
//! ```
//!
//! * [`Problem`] says what is computed: data, what sees what, [`Series`], [`Near`], sinks, [`Decay`].
//! * [`attention`] computes it directly, one pair (t, s) at a time.
//! * [`attention_gradients`] differentiates it, for every series, coefficients chosen per query included.
//! * [`linear_attention`] computes the all-far causal case by the recurrences of the paper's appendix A2, over
//!   the features of [`features`].
//! * [`softmax_attention`] is what all of it approximates.
//!
//! ```
//! use sata_oracle::{Problem, Series, Shape, attention, softmax_attention};
//!
//! let shape = Shape { query_heads: 1, kv_heads: 1, queries: 3, keys: 3, d_key: 1, d_value: 1 };
//! let (q, k, v) = ([0.5, -1.0, 0.7], [0.2, 1.0, -0.3], [1.0, 2.0, 3.0]);
//! let problem = Problem { series: Series::Gauss, terms: 4, ..Problem::new(shape, &q, &k, &v) };
//! let error = attention(&problem).y[2] - softmax_attention(&problem).y[2];
//! assert!(error.abs() < 1e-3);
//! ```
//!
//! Wrong arguments panic with a sentence that names them. Results are never repaired: a denominator that is not
//! positive is divided by as it is, and a query that sees no key gives nan.
//!
//! # Where the paper is not followed
//!
//! * A2 defines S_{p,T} = α_p Σ Φ_p(k_t) v_tᵀ and evaluates it as S_{p,T}ᵀ Φ_p(q_T), which leaves the
//!   multiplicities C_p out; its own (17), and its Z, have them. [`linear_attention`] applies C_p to both.
//! * (14) counts 2 FLOPs per feature too many: it should be 4 d_V + 2p + 2 for p ≥ 1 and 2 d_V + 2 for p = 0, so
//!   (15) is high by 5.3, 2.8, 1.5 and 0.8 % at d = 8, 16, 32 and 64 (P = 4). Nothing here depends on it.
//! * "Float16 resolution" at P = 4 is an *absolute* error on outputs that are themselves near zero. At unit
//!   logits the relative error is 15 to 20 %: compare [`attention`] with [`softmax_attention`].
#![forbid(unsafe_code)]
#![allow(clippy::needless_range_loop, reason = "the loops carry the indices of the formulas")]

mod attention;
pub mod features;
mod gradient;
pub mod kernel;
mod linear;
mod problem;
mod row;
mod series;
mod softmax;

pub use attention::{Output, attention};
pub use gradient::{Gradients, attention_gradients};
pub use linear::{LinearOutput, linear_attention};
pub use problem::{Decay, Near, Problem, Shape};
pub use row::FarMoments;
pub use series::Series;
pub use softmax::softmax_attention;
