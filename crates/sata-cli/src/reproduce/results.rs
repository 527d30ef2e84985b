//! Everything that was found, as data.

use serde::Serialize;

use super::activations::{self, Layer};
use super::coefficients::{self, Coefficients};
use super::decode::{self, DecodePoint};
use super::floor::{self, Floor};
use super::recovery::Recovery;
use super::recovery_figures::{figure_a3, figure_a4};
use super::scope::Scope;
use super::{findings, formulas};
use crate::failure::Outcome;
use crate::machine;
use crate::plot::Figure;

/// What `results.json` holds.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    /// Version of the program.
    pub version: &'static str,
    /// What was run.
    pub scope: Scope,
    /// Where.
    pub machine: Machine,
    /// Seconds that all of it took.
    pub seconds: f64,
    /// What it comes to, in sentences.
    pub findings: Vec<String>,
    /// Figures A3 and A4.
    pub recovery: Vec<Recovery>,
    /// The precision floor.
    pub floor: Vec<Floor>,
    /// Figure 6.
    pub decode: Vec<DecodePoint>,
    /// Activations of trained models.
    pub activations: Vec<Layer>,
    /// The same state with other coefficients.
    pub coefficients: Coefficients,
}

/// The machine that measured.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Its processor's name, where the system says.
    pub processor: Option<String>,
    /// Instruction set of the kernels.
    pub level: String,
    /// Threads used.
    pub threads: usize,
    /// Bytes of memory, where the system says.
    pub memory: Option<u128>,
}

impl Machine {
    /// This machine.
    ///
    /// # Errors
    /// When `SATA_SIMD` names an instruction set that is not there.
    pub fn here() -> Outcome<Self> {
        Ok(Machine {
            processor: machine::processor(),
            level: sata::Level::detect()?.to_string(),
            threads: machine::threads(),
            memory: machine::total_memory(),
        })
    }
}

impl Results {
    /// Fills in the sentences.
    pub fn with_findings(mut self) -> Self {
        self.findings = findings::findings(&self);
        self
    }

    /// All figures, in the order of the paper and then our own.
    pub fn figures(&self) -> Vec<Figure> {
        vec![
            formulas::figure1(),
            formulas::figure3(),
            formulas::figure4(),
            formulas::figure5(),
            decode::figure(&self.decode),
            figure_a3(&self.recovery, &self.scope),
            figure_a4(&self.recovery, &self.scope),
            floor::figure(&self.floor, &self.scope),
            activations::figure(&self.activations),
            coefficients::figure_normal(&self.coefficients),
            coefficients::figure_trained(&self.coefficients),
        ]
    }
}
