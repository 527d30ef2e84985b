//! Where cases are computed.

use std::ops::Range;

use sata::{Diagnostics, Form, Spec};
use sata_cuda::{Device, Element, Storage};

use super::cpu::OnCpu;
use super::gpu::OnGpu;
use super::inputs::Inputs;
use crate::failure::Outcome;

/// A processor.
#[derive(Clone, Debug)]
pub enum Engine {
    /// The CPU engine.
    Cpu,
    /// A GPU, or the emulator in its place.
    Device(Device),
}

/// How a case is computed, where that is not left to the plan.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct How {
    /// One form instead of the one that would be chosen.
    pub form: Option<Form>,
    /// Tokens after which sums are taken.
    pub chunk: Option<usize>,
    /// Kernels that serve every GPU, instead of those for matrix units.
    pub generic: bool,
    /// How states keep their sums, if not as usual.
    pub storage: Option<Storage>,
}

/// Gradients by all inputs; the last two are empty where there are no such inputs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ByInputs {
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    pub log_gates: Vec<f64>,
    pub slopes: Vec<f64>,
}

/// One case's inputs in a processor's memory, with outputs that hold NaN until they are written.
pub trait Machine<E: Element> {
    /// Makes outputs NaN again.
    fn poison(&mut self) -> Outcome;

    /// One call over everything; sequences side by side where `cu` says where each begins.
    fn whole(&mut self, cu: Option<&[usize]>) -> Outcome<Diagnostics>;

    /// An empty past.
    fn begin(&mut self) -> Outcome;

    /// These tokens of all sequences follow the past.
    fn feed(&mut self, tokens: Range<usize>) -> Outcome<Diagnostics>;

    /// The first `cut` keys go into an empty state, and all queries read that and the other keys.
    fn read(&mut self, cut: usize) -> Outcome<Diagnostics>;

    /// Whether all sequences must step together.
    fn is_lockstep(&self) -> bool;

    /// One token of some sequences follows the past, each at its own place: sequence and token.
    fn step(&mut self, tokens: &[(usize, usize)]) -> Outcome;

    /// The state goes through another processor's memory, or through a file, and comes back.
    fn move_state(&mut self) -> Outcome;

    /// The outputs.
    fn y(&mut self) -> Outcome<Vec<E>>;

    /// Gradients of a call over everything, or of two that a state joins after `cut` tokens; none
    /// where this type has no backward.
    fn backward(&mut self, dy: &[E], cut: Option<usize>) -> Outcome<Option<ByInputs>>;
}

impl Engine {
    /// Its name.
    pub fn name(&self) -> String {
        match self {
            Engine::Cpu => crate::machine::processor().unwrap_or_else(|| "CPU".into()),
            Engine::Device(device) => device.properties().name.clone(),
        }
    }

    /// Takes inputs to where they are computed.
    ///
    /// # Errors
    /// What the library refuses, or the device has no room for.
    pub fn machine<'c, E: Element>(
        &self,
        spec: &Spec,
        inputs: &'c Inputs<E>,
        causal: bool,
        how: How,
    ) -> Outcome<Box<dyn Machine<E> + 'c>> {
        Ok(match self {
            Engine::Cpu => Box::new(OnCpu::new(spec, inputs, causal, how)?),
            Engine::Device(device) => Box::new(OnGpu::new(device, spec, inputs, causal, how)?),
        })
    }
}
