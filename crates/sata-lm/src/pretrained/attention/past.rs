//! What a layer remembers, and attention to it.

use std::sync::Arc;

use rayon::prelude::*;
use sata::{Call, Plan, State, View, ViewMut, conventional};

use super::memory::Memory;
use super::qkv::{Qkv, interleaved};
use super::setting::{Calibration, HeadSetting, Setting, of_exp};
use crate::pretrained::error::PretrainedError;
use crate::pretrained::rotary::Reach;

/// One key/value head's past.
#[derive(Clone, Debug)]
pub struct HeadPast {
    kind: Kind,
    d: usize,
}

#[derive(Clone, Debug)]
enum Kind {
    /// Keys and values of all tokens.
    Softmax { keys: Vec<f32>, values: Vec<f32> },
    /// A state of `sata`, and what is taken off keys.
    State { plan: Arc<Plan>, state: Box<State<f32>>, centre: Option<Arc<Calibration>> },
    /// Exact tokens, groups, sums.
    Memory(Box<Memory>),
}

impl HeadPast {
    /// Nothing yet.
    ///
    /// # Errors
    /// A spec that this machine cannot hold.
    pub fn new(
        setting: &Setting,
        [layer, kv_head]: [usize; 2],
        d: usize,
    ) -> Result<Self, PretrainedError> {
        let known = setting.calibration(layer, kv_head);
        let kind = match setting.head(layer, kv_head) {
            HeadSetting::Softmax => Kind::Softmax { keys: vec![], values: vec![] },
            HeadSetting::Spec { spec } => {
                let plan = Arc::new(Plan::new(spec)?);
                let state = Box::new(State::new(&plan, 1, 1)?);
                let centre = known.filter(|_| of_exp(spec)).cloned();
                Kind::State { plan, state, centre }
            }
            HeadSetting::Memory(memory) => Kind::Memory(Box::new(Memory::new(memory, known, d))),
        };
        Ok(HeadPast { kind, d })
    }

    /// The same for keys with rotary embeddings: what is exact, kept or in groups but not near seems to
    /// lie no further back than `reach`. Softmax, specs and sums are not changed.
    pub(crate) fn within(mut self, reach: &Arc<Reach>) -> Self {
        if let Kind::Memory(memory) = self.kind {
            self.kind = Kind::Memory(Box::new(memory.within(reach)));
        }
        self
    }

    /// Bytes in f32: of all it will ever hold, or of what softmax's cache holds now.
    pub fn bytes(&self) -> usize {
        match &self.kind {
            Kind::Softmax { keys, values } => 4 * (keys.len() + values.len()),
            Kind::State { state, .. } => state.bytes(),
            Kind::Memory(memory) => memory.bytes(),
        }
    }

    /// Takes tokens in, keys and values `[tokens][d]`, and answers queries of the heads that read
    /// them, `[heads][tokens][d]`.
    ///
    /// # Errors
    /// What `sata` refuses.
    pub fn attend(
        &mut self,
        queries: &[Vec<f32>],
        keys: &[f32],
        values: &[f32],
    ) -> Result<Vec<Vec<f32>>, PretrainedError> {
        self.attend_some(queries, keys, values, |_| true)
    }

    /// The same, where queries of some blocks are not answered (0), if a memory can leave them out.
    ///
    /// # Errors
    /// What `sata` refuses.
    pub fn attend_some(
        &mut self,
        queries: &[Vec<f32>],
        keys: &[f32],
        values: &[f32],
        answers: impl Fn(usize) -> bool,
    ) -> Result<Vec<Vec<f32>>, PretrainedError> {
        let d = self.d;
        let (tokens, group) = (keys.len() / d, queries.len());
        let joined = || queries.concat();
        match &mut self.kind {
            Kind::Memory(memory) => Ok(memory.attend(queries, keys, values, answers)),
            Kind::Softmax { keys: all_keys, values: all_values } => {
                let before = all_keys.len() / d;
                all_keys.extend_from_slice(keys);
                all_values.extend_from_slice(values);
                let mut out = vec![0.0; group * tokens * d];
                let q = joined();
                conventional::attention(
                    View::new(&q, [1, group, tokens, d])?,
                    View::new(all_keys, [1, 1, before + tokens, d])?,
                    View::new(all_values, [1, 1, before + tokens, d])?,
                    (d as f64).powf(-0.5),
                    true,
                    before,
                    ViewMut::new(&mut out, [1, group, tokens, d])?,
                )?;
                Ok(out.chunks_exact(tokens * d).map(<[f32]>::to_vec).collect())
            }
            Kind::State { plan, state, centre } => {
                let mut out = vec![0.0; group * tokens * d];
                let q = joined();
                let centred = centre.as_ref().map(|known| known.centred(keys));
                let keys = centred.as_deref().unwrap_or(keys);
                let call = Call::causal(
                    View::new(&q, [1, group, tokens, d])?,
                    View::new(keys, [1, 1, tokens, d])?,
                    View::new(values, [1, 1, tokens, d])?,
                );
                let shape = [1, group, tokens, d];
                plan.run(call.state(state), ViewMut::new(&mut out, shape)?)?;
                Ok(out.chunks_exact(tokens * d).map(<[f32]>::to_vec).collect())
            }
        }
    }
}

/// A layer's past: one of each key/value head.
#[derive(Clone, Debug)]
pub struct LayerPast {
    heads: Vec<HeadPast>,
}

impl LayerPast {
    /// Nothing yet, for `[heads, kv_heads, head_dim]`.
    ///
    /// # Errors
    /// A spec that this machine cannot hold.
    pub(crate) fn new(
        setting: &Setting,
        layer: usize,
        [_, kv_heads, d]: [usize; 3],
        reach: &Arc<Reach>,
    ) -> Result<Self, PretrainedError> {
        let head = |head| Ok(HeadPast::new(setting, [layer, head], d)?.within(reach));
        let heads = (0..kv_heads).map(head);
        Ok(LayerPast { heads: heads.collect::<Result<_, PretrainedError>>()? })
    }

    /// Bytes of all heads.
    pub fn bytes(&self) -> usize {
        self.heads.iter().map(HeadPast::bytes).sum()
    }

    /// Takes tokens in and answers their queries, each seeing no later token: `[tokens][heads · d]`.
    ///
    /// # Errors
    /// What `sata` refuses.
    pub(crate) fn attend(&mut self, qkv: &Qkv<'_>) -> Result<Vec<f32>, PretrainedError> {
        let group = qkv.heads() / qkv.kv_heads();
        let answers: Result<Vec<Vec<Vec<f32>>>, PretrainedError> = self
            .heads
            .par_iter_mut()
            .enumerate()
            .map(|(i, head)| {
                let queries: Vec<Vec<f32>> =
                    (i * group..(i + 1) * group).map(|head| qkv.queries(head)).collect();
                head.attend(&queries, &qkv.keys(i), &qkv.values(i))
            })
            .collect();
        Ok(interleaved(&answers?, qkv))
    }
}
