//! How weights fade, with the numbers.

use rand::Rng;
use rand::rngs::StdRng;
use rand_distr::StandardNormal;
use sata::{Call, Decay, Element, View};
use sata_oracle as oracle;

use super::Sizes;

/// Slopes or gates for some sizes.
#[derive(Clone, Debug)]
pub enum Fade {
    None,
    /// `[kv_heads]`.
    Slopes(Vec<f64>),
    /// Logarithms of the gates of sequences of `keys` keys, `[batch, kv_heads, keys]`.
    Gates {
        keys: usize,
        log_gates: Vec<f32>,
    },
}

impl Fade {
    /// Slopes from 1/256 to 1 and some 0; gates that mostly keep, some that keep all, and a few that
    /// forget all but one part in thousands.
    pub fn new(rng: &mut StdRng, decay: Decay, s: Sizes) -> Self {
        match decay {
            Decay::None => Fade::None,
            Decay::Slopes => {
                let slope = |_| match rng.random_range(0..6) {
                    0 => 0.0,
                    _ => rng.random_range(-8f64..0.0).exp2(),
                };
                Fade::Slopes((0..s.kv_heads).map(slope).collect())
            }
            Decay::Gates => {
                let log_gate = |_| match rng.random_range(0..40) {
                    0 => -8.0,
                    1..=4 => 0.0,
                    _ => -0.1 * rng.sample::<f32, _>(StandardNormal).powi(2),
                };
                let n = s.batch * s.kv_heads * s.keys;
                Fade::Gates { keys: s.keys, log_gates: (0..n).map(log_gate).collect() }
            }
        }
    }

    /// Gates of which one in ten leaves nothing of what came before.
    pub fn closing(rng: &mut StdRng, s: Sizes) -> Self {
        let log_gate = |_| match rng.random_range(0..10) {
            0 => rng.random_range(-200f32..-20.0),
            _ => rng.random_range(-0.05f32..0.0),
        };
        let n = s.batch * s.kv_heads * s.keys;
        Fade::Gates { keys: s.keys, log_gates: (0..n).map(log_gate).collect() }
    }

    /// The same gate for every token.
    pub fn gates(s: Sizes, log_gate: f32) -> Self {
        Fade::Gates { keys: s.keys, log_gates: vec![log_gate; s.batch * s.kv_heads * s.keys] }
    }

    /// What the spec must say.
    pub fn decay(&self) -> Decay {
        match self {
            Fade::None => Decay::None,
            Fade::Slopes(_) => Decay::Slopes,
            Fade::Gates { .. } => Decay::Gates,
        }
    }

    /// Gives a call that holds the tokens from `from` on, `n` of them, what it needs.
    pub fn give<'a, 's, E: Element>(
        &'a self,
        call: Call<'a, 's, E>,
        s: Sizes,
        from: usize,
        n: usize,
    ) -> Call<'a, 's, E> {
        match self {
            Fade::None => call,
            Fade::Slopes(slopes) => call.slopes(slopes),
            Fade::Gates { keys, log_gates } => {
                let (shape, strides) = ([s.batch, s.kv_heads, n, 1], [s.kv_heads * keys, *keys, 1]);
                let gates = &log_gates[from.min(log_gates.len())..];
                call.log_gates(View::strided(gates, shape, strides).unwrap())
            }
        }
    }

    /// As the oracle has it, for one sequence.
    pub fn oracle(&self, s: Sizes, batch: usize) -> oracle::Decay {
        match self {
            Fade::None => oracle::Decay::None,
            Fade::Slopes(slopes) => oracle::Decay::Slopes(slopes.clone()),
            Fade::Gates { keys, log_gates } => {
                let n = s.kv_heads * keys;
                let part = &log_gates[batch * n..(batch + 1) * n];
                oracle::Decay::LogGates(part.iter().map(|&x| f64::from(x)).collect())
            }
        }
    }
}
