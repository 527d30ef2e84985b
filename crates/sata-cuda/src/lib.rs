//! Self-attention at constant cost per token on NVIDIA GPUs: the operation of the crate `sata`,
//! with the same words.
//!
//! Kernels are CUDA C++ in the folder `kernels`, specialised by sizes and types, compiled at first
//! use by NVIDIA's run-time compiler and kept on disk. Building this crate needs no CUDA; opening a
//! [`Device`] needs a driver, and says so where there is none ([`Error::NoDriver`]).
//!
//! With the feature `emulator`, `Device::emulated` runs the same kernels on the CPU, and the module
//! `offline` compiles them for a GPU that is not there: for tests.
//!
//! | variable                | names                                                             |
//! |-------------------------|-------------------------------------------------------------------|
//! | `SATA_NVRTC`            | the run-time compiler: libnvrtc, or the folder that it is in      |
//! | `SATA_CACHE_DIR`        | where compiled kernels are kept; else the user's cache folder     |
//! | `SATA_CXX`              | the emulator's C++ compiler; else `CXX`, `c++`, `g++`, `clang++`  |
//! | `SATA_EMULATOR_THREADS` | threads that the emulator runs blocks on; else as many as there are |

#![deny(missing_docs)]

mod backend;
mod backward;
mod buffer;
mod cache;
mod call;
mod decode;
mod device;
mod error;
mod forward;
mod generic;
mod hopper;
pub mod nvrtc;
#[cfg(all(feature = "emulator", unix))]
pub mod offline;
mod plan;
mod problem;
mod source;
mod state;
mod stream;
mod units;
mod view;
mod window;

pub use backend::{KernelProperties, Launch, Properties};
pub use backward::{Gradients, StateGradient};
pub use buffer::{Buffer, Plain};
pub use call::Call;
pub use decode::{Decoder, Recipe, Sizes, Step};
pub use device::{Device, Graph, Kernel, Moment};
pub use error::Error;
pub use forward::Pending;
pub use plan::Plan;
pub use source::Unit;
pub use state::{State, Storage, SumsType};
pub use view::{Element, RawView, View, ViewMut};
