//! Differentiable operations, each one node of candle's graph with a gradient of its own.

mod cross_entropy;
mod embedding;
mod head_norm;
mod linear;
mod log_gates;
mod log_sigmoid;
mod projected;
mod rms_norm;
mod rotary;
mod softmax;
mod swiglu;
mod watch;

pub use cross_entropy::cross_entropy;
pub use embedding::embedding;
pub use head_norm::head_norm;
pub use linear::{linear, linear_add};
pub use log_gates::log_gates;
pub use log_sigmoid::log_sigmoid;
pub use projected::projected_cross_entropy;
pub use rms_norm::rms_norm;
pub use rotary::rotary;
pub use softmax::{log_softmax, softmax};
pub use swiglu::swiglu;
pub use watch::{NotFinite, Watch};
