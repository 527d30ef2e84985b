//! Steps whose weights are on a GPU: nothing but tokens goes there, and nothing but two numbers
//! comes back.

use std::borrow::Cow;
use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use sata_candle::cuda::{Moving, Optimizer, settle};

use super::data::{Draw, Tokens, spread};
use super::error::TrainError;
use super::optimizer::{Moments, decays};
use super::settings::TrainSettings;
use super::step::{Measured, Objective, Parameter, batch, scalar, with_numbers};

/// Tokens that go through the model at once, at most, where micro-batches are smaller: a GPU has
/// room, and small ones would leave it idle.
const TOGETHER: usize = 1 << 16;

/// Share of a step's denominators that may be 0 or below by the rounding of bf16 without a training
/// being stopped: what such a query makes of its step, the clipping of gradients bounds.
const UNSOUND: f64 = 1e-3;

/// A GPU with the moments of all parameters.
#[derive(Debug)]
pub(super) struct Gpu {
    device: Device,
    optimizer: Optimizer,
    first: Vec<Tensor>,
    second: Vec<Tensor>,
}

/// Micro-batches of one length that go through the model together.
struct Group {
    first: usize,
    count: usize,
    length: usize,
}

fn groups(settings: &TrainSettings, step: usize) -> Vec<Group> {
    let (micro_batches, lengths) = (settings.micro_batches(), settings.lengths());
    let most = (TOGETHER / (settings.micro_batch * settings.context)).max(1);
    let mut groups: Vec<Group> = vec![];
    for i in 0..micro_batches {
        let length = lengths[(step * micro_batches + i) % lengths.len()];
        match groups.last_mut() {
            Some(group) if group.length == length && group.count < most => group.count += 1,
            _ => groups.push(Group { first: i, count: 1, length }),
        }
    }
    groups
}

impl Gpu {
    /// That of the parameters, if they are on one.
    pub fn new(parameters: &[Parameter]) -> Result<Option<Self>, TrainError> {
        let Some(device) = parameters.first().map(|parameter| parameter.var.device().clone())
        else {
            return Ok(None);
        };
        if device.is_cpu() {
            return Ok(None);
        }
        let zeros = || -> Result<Vec<Tensor>, TrainError> {
            parameters.iter().map(|parameter| Ok(parameter.var.zeros_like()?)).collect()
        };
        let (first, second) = (zeros()?, zeros()?);
        Ok(Some(Gpu { optimizer: Optimizer::new(&device)?, device, first, second }))
    }

    /// Takes the moments that a checkpoint has.
    pub fn resume(
        &mut self,
        parameters: &[Parameter],
        moments: &mut BTreeMap<String, Moments>,
    ) -> Result<(), TrainError> {
        for (i, parameter) in parameters.iter().enumerate() {
            if let Some(Moments { first, second }) = moments.remove(&parameter.name) {
                let tensor = |x| Tensor::from_vec(x, parameter.var.shape(), &self.device);
                (self.first[i], self.second[i]) = (tensor(first)?, tensor(second)?);
            }
        }
        Ok(())
    }

    /// Both moments of each parameter.
    pub fn moments(&self) -> Result<Vec<[Cow<'_, [f32]>; 2]>, TrainError> {
        let host = |x: &Tensor| -> Result<Cow<'_, [f32]>, TrainError> {
            Ok(Cow::Owned(with_numbers(x, <[f32]>::to_vec)?))
        };
        let pairs = self.first.iter().zip(&self.second);
        pairs.map(|(first, second)| Ok([host(first)?, host(second)?])).collect()
    }

    /// Gradients of a step's micro-batches, and the update by them.
    pub fn step(
        &mut self,
        model: &impl Objective,
        parameters: &[Parameter],
        settings: &TrainSettings,
        tokens: &Tokens,
        step: usize,
    ) -> Result<Measured, TrainError> {
        let micro_batches = settings.micro_batches();
        let draw = Draw { seed: settings.seed };
        let parts = groups(settings, step).into_iter().map(|Group { first, count, length }| {
            let rows = settings.micro_batch * settings.context / length;
            let starts = (first..first + count).flat_map(|i| {
                (0..rows).map(move |row| {
                    let place = [step as u64, i as u64, row as u64];
                    draw.window(tokens.ids.len(), length, place).start
                })
            });
            let loss =
                model.loss(&batch(&tokens.ids, starts, length)?).map_err(TrainError::Model)?;
            if count == micro_batches {
                return Ok(loss);
            }
            Ok((loss * (count as f64 / micro_batches as f64))?)
        });
        self.descend(parameters, settings, step, parts)
    }

    /// The update by the sum of losses, which are made one by one.
    pub fn descend(
        &mut self,
        parameters: &[Parameter],
        settings: &TrainSettings,
        step: usize,
        parts: impl Iterator<Item = Result<Tensor, TrainError>>,
    ) -> Result<Measured, TrainError> {
        let (mut losses, mut sums) = (vec![], Vec::<Tensor>::new());
        for loss in parts {
            let loss = loss?;
            let mut gradients = loss.backward()?;
            let gradients = parameters
                .iter()
                .map(|parameter| match gradients.remove(&parameter.var) {
                    Some(gradient) => Ok(gradient.contiguous()?),
                    None => Err(TrainError::unfit(format!(
                        "parameter {} gets no gradient: the loss does not depend on it",
                        parameter.name
                    ))),
                })
                .collect::<Result<Vec<Tensor>, TrainError>>()?;
            losses.push(loss.detach());
            if sums.is_empty() {
                sums = gradients;
            } else {
                self.optimizer.add(&sums, &gradients)?;
            }
        }
        let rate = settings.schedule().rate(step);
        // The device takes the decay of those that have one, and the scale that it finds.
        let update = settings.optimizer().update(step, rate, 1.0, true);
        let moving: Vec<Moving<'_>> = parameters
            .iter()
            .enumerate()
            .map(|(i, parameter)| Moving {
                weights: &parameter.var,
                gradient: &sums[i],
                first: &self.first[i],
                second: &self.second[i],
                decays: decays(&parameter.name),
            })
            .collect();
        self.optimizer.update(&moving, &update.on_gpu(1.0, settings.clip))?;
        let loss = losses.iter().map(scalar).sum::<Result<f64, TrainError>>()?;
        let gradient_norm = self.optimizer.norm()?;
        settle(&self.device, UNSOUND)?;
        if !loss.is_finite() {
            return Err(TrainError::NonFinite { step, what: "the loss".into(), value: loss });
        }
        if !gradient_norm.is_finite() {
            return Err(not_finite(step, parameters, &sums)?);
        }
        Ok(Measured { loss, gradient_norm })
    }

    /// Mean nats per token of held-out text.
    pub fn evaluate(
        &self,
        model: &impl Objective,
        settings: &TrainSettings,
        tokens: &Tokens,
    ) -> Result<f64, TrainError> {
        let length = settings.context;
        let starts = spread(tokens.ids.len(), length, settings.evaluate_tokens.div_ceil(length));
        let mut sum = 0.0;
        for some in starts.chunks((TOGETHER / length).max(1)) {
            let batch = batch(&tokens.ids, some.iter().copied(), length)?;
            let loss = model.loss(&batch).map_err(TrainError::Model)?;
            sum += scalar(&loss)? * some.len() as f64;
        }
        settle(&self.device, UNSOUND)?;
        Ok(sum / starts.len() as f64)
    }
}

/// Which gradient it was.
fn not_finite(
    step: usize,
    parameters: &[Parameter],
    gradients: &[Tensor],
) -> Result<TrainError, TrainError> {
    for (parameter, gradient) in parameters.iter().zip(gradients) {
        let gradient = gradient.to_dtype(DType::F32)?;
        let bad = with_numbers(&gradient, |x| x.iter().copied().find(|x| !x.is_finite()))?;
        if let Some(value) = bad {
            let what = format!("an element of the gradient of {}", parameter.name);
            return Ok(TrainError::NonFinite { step, what, value: value.into() });
        }
    }
    let what = "the norm of the gradient".into();
    Ok(TrainError::NonFinite { step, what, value: f64::INFINITY })
}
