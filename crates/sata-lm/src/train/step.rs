//! One step: gradients of all micro-batches, their norm, the update.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Storage, Tensor, Var};
use sata_candle::NotFinite;

use super::data::{Draw, Tokens, spread};
use super::error::TrainError;
use super::optimizer::{Moments, Update, decays, squares};
use super::settings::TrainSettings;
use super::workers::Workers;

/// A model that can be trained.
pub trait Objective: Send + Sync {
    /// The mean loss in nats per predicted token, a scalar, of token numbers u32
    /// `[sequences, length + 1]`: each predicts the one after it.
    ///
    /// # Errors
    /// What the model refuses.
    fn loss(&self, tokens: &Tensor) -> Result<Tensor, Box<dyn Error + Send + Sync>>;

    /// The first number that is not finite among what losses and gradients were made of, where that
    /// is looked at.
    fn not_finite(&self) -> Option<NotFinite> {
        None
    }
}

impl Objective for crate::Model {
    fn loss(&self, tokens: &Tensor) -> Result<Tensor, Box<dyn Error + Send + Sync>> {
        Ok(crate::Model::loss(self, tokens)?)
    }

    fn not_finite(&self) -> Option<NotFinite> {
        self.watch()?.take()
    }
}

/// The outcome of a step, unless the model has seen before that what it is made of is not finite.
pub(super) fn looked_at<T>(
    model: &impl Objective,
    step: usize,
    outcome: Result<T, TrainError>,
) -> Result<T, TrainError> {
    match model.not_finite() {
        Some(NotFinite { what, value }) => Err(TrainError::NonFinite { step, what, value }),
        None => outcome,
    }
}

/// A named weight with its gradient and moments.
#[derive(Debug)]
pub(super) struct Parameter {
    pub name: String,
    pub var: Var,
    /// Empty where the weights are on a GPU, which then has them.
    pub moments: Moments,
    gradient: Vec<f32>,
}

impl Parameter {
    /// A parameter; one that has had no gradient yet without `moments`.
    pub fn new(name: &str, var: Var, moments: Option<Moments>) -> Result<Self, TrainError> {
        if var.dtype() != DType::F32 || !var.is_contiguous() {
            return Err(TrainError::unfit(format!(
                "parameter {name} is {:?} of {:?}: only contiguous f32 can be trained",
                var.dtype(),
                var.layout()
            )));
        }
        let elements = if var.device().is_cpu() { var.elem_count() } else { 0 };
        let moments = moments.unwrap_or_else(|| Moments::new(elements));
        Ok(Parameter { name: name.into(), var, moments, gradient: vec![0.0; elements] })
    }
}

/// All parameters, in the order of their names.
#[derive(Debug)]
pub(super) struct Parameters(pub Vec<Parameter>);

/// What a step measured before it changed anything.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    /// Mean nats per token.
    pub loss: f64,
    /// Of the mean gradient, before clipping.
    pub gradient_norm: f64,
}

impl Parameters {
    /// The variables of some weights, and parameters over them.
    pub fn vars(weights: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Var>, TrainError> {
        let var = |(name, weight): (&String, &Tensor)| {
            // A copy: the caller's tensors stay what they are.
            Ok((name.clone(), Var::from_tensor(&weight.force_contiguous()?)?))
        };
        weights.iter().map(var).collect()
    }

    /// Sums the gradients of a step's micro-batches, in their order.
    pub fn gradients(
        &mut self,
        model: &impl Objective,
        workers: &Workers,
        settings: &TrainSettings,
        tokens: &Tokens,
        step: usize,
    ) -> Result<Measured, TrainError> {
        let (micro_batches, lengths) = (settings.micro_batches(), settings.lengths());
        let draw = Draw { seed: settings.seed };
        let vars: Vec<(String, Var)> =
            self.0.iter().map(|p| (p.name.clone(), p.var.clone())).collect();
        let work = |i: usize| {
            let length = lengths[(step * micro_batches + i) % lengths.len()];
            let rows = settings.micro_batch * settings.context / length;
            let starts = (0..rows).map(|row| {
                let place = [step as u64, i as u64, row as u64];
                draw.window(tokens.ids.len(), length, place).start
            });
            let batch = batch(&tokens.ids, starts, length)?;
            let loss = model.loss(&batch).map_err(TrainError::Model)?;
            let value = scalar(&loss)?;
            if !value.is_finite() {
                return Ok((value, vec![]));
            }
            let mut gradients = loss.backward()?;
            let gradients = vars
                .iter()
                .map(|(name, var)| match gradients.remove(var) {
                    Some(gradient) => Ok(gradient.contiguous()?),
                    None => Err(TrainError::unfit(format!(
                        "parameter {name} gets no gradient: the loss does not depend on it"
                    ))),
                })
                .collect::<Result<Vec<Tensor>, TrainError>>()?;
            Ok((value, gradients))
        };
        let mut loss = 0.0;
        let parameters = &mut self.0;
        let mut odd = None;
        workers.in_order(micro_batches, work, |i, (value, gradients)| {
            loss += value / micro_batches as f64;
            for (parameter, gradient) in parameters.iter_mut().zip(&gradients) {
                if let Err(error) = add(&mut parameter.gradient, gradient, i == 0) {
                    odd.get_or_insert(error);
                }
            }
        })?;
        if let Some(error) = odd {
            return Err(error.into());
        }
        if !loss.is_finite() {
            return Err(TrainError::NonFinite { step, what: "the loss".into(), value: loss });
        }
        let sum = workers
            .together(|| self.0.iter().map(|parameter| squares(&parameter.gradient)).sum::<f64>());
        // f64 holds every square of f32 and their sum.
        if !sum.is_finite() {
            return Err(self.not_finite(step));
        }
        Ok(Measured { loss, gradient_norm: sum.sqrt() / micro_batches as f64 })
    }

    /// Takes the gradients of one loss, on the current pool.
    pub fn of_one(&mut self, loss: &Tensor, step: usize) -> Result<Measured, TrainError> {
        let value = scalar(loss)?;
        if !value.is_finite() {
            return Err(TrainError::NonFinite { step, what: "the loss".into(), value });
        }
        let mut gradients = loss.backward()?;
        for parameter in &mut self.0 {
            let Some(gradient) = gradients.remove(&parameter.var) else {
                let name = &parameter.name;
                return Err(TrainError::unfit(format!("parameter {name} gets no gradient")));
            };
            add(&mut parameter.gradient, &gradient.contiguous()?, true)?;
        }
        let sum: f64 = self.0.iter().map(|parameter| squares(&parameter.gradient)).sum();
        if !sum.is_finite() {
            return Err(self.not_finite(step));
        }
        Ok(Measured { loss: value, gradient_norm: sum.sqrt() })
    }

    fn not_finite(&self, step: usize) -> TrainError {
        let found = self.0.iter().find_map(|parameter| {
            let bad = parameter.gradient.iter().find(|x| !x.is_finite())?;
            Some((parameter.name.as_str(), f64::from(*bad)))
        });
        let (name, value) = found.unwrap_or(("all parameters", f64::INFINITY));
        TrainError::NonFinite { step, what: format!("an element of the gradient of {name}"), value }
    }

    /// Changes the weights by the summed gradients.
    pub fn update(
        &mut self,
        workers: &Workers,
        settings: &TrainSettings,
        step: usize,
        measured: Measured,
    ) -> Result<(), TrainError> {
        let clip = (settings.clip / measured.gradient_norm).min(1.0);
        let scale = clip / settings.micro_batches() as f64;
        let rate = settings.schedule().rate(step);
        let adam = settings.optimizer();
        workers.together(|| {
            for Parameter { name, var, moments, gradient } in &mut self.0 {
                let update = adam.update(step, rate, scale, decays(name));
                let work = Mutex::new((&gradient[..], moments));
                var.inplace_op1(&InPlace { update, work })?;
            }
            Ok(())
        })
    }
}

/// The update as an operation on a variable's own numbers.
struct InPlace<'a> {
    update: Update,
    work: Mutex<(&'a [f32], &'a mut Moments)>,
}

impl InplaceOp1 for InPlace<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(numbers), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            candle_core::bail!("adamw changes contiguous f32 alone");
        };
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let (gradient, moments) = &mut *work;
        self.update.apply(&mut numbers[start..end], gradient, moments);
        Ok(())
    }
}

/// Calls `f` with a contiguous f32 tensor's numbers, brought from where they are.
pub(super) fn with_numbers<T>(
    tensor: &Tensor,
    f: impl FnOnce(&[f32]) -> T,
) -> candle_core::Result<T> {
    if !tensor.device().is_cpu() {
        return with_numbers(&tensor.to_device(&Device::Cpu)?, f);
    }
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(numbers)), Some((start, end))) => Ok(f(&numbers[start..end])),
        _ => candle_core::bail!("not contiguous f32 on the CPU: {:?} {layout:?}", tensor.dtype()),
    }
}

fn add(sum: &mut [f32], gradient: &Tensor, first: bool) -> candle_core::Result<()> {
    if sum.len() != gradient.elem_count() {
        candle_core::bail!("a gradient of {:?} for {} weights", gradient.shape(), sum.len());
    }
    with_numbers(gradient, |gradient| {
        if first {
            sum.copy_from_slice(gradient);
        } else {
            for (sum, x) in sum.iter_mut().zip(gradient) {
                *sum += x;
            }
        }
    })
}

pub(super) fn scalar(loss: &Tensor) -> Result<f64, TrainError> {
    Ok(loss.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

/// Sequences of `length` tokens and one, from `starts`, as u32 `[sequences, length + 1]`.
pub(super) fn batch(
    ids: &[u32],
    starts: impl Iterator<Item = usize>,
    length: usize,
) -> Result<Tensor, TrainError> {
    let mut rows = 0;
    let mut numbers = vec![];
    for start in starts {
        rows += 1;
        numbers.extend_from_slice(&ids[start..start + length + 1]);
    }
    Ok(Tensor::from_vec(numbers, (rows, length + 1), &Device::Cpu)?)
}

/// Mean nats per token of held-out text.
pub(super) fn evaluate(
    model: &impl Objective,
    workers: &Workers,
    settings: &TrainSettings,
    tokens: &Tokens,
) -> Result<f64, TrainError> {
    let length = settings.context;
    let starts = spread(tokens.ids.len(), length, settings.evaluate_tokens.div_ceil(length));
    let batches: Vec<&[usize]> = starts.chunks(settings.micro_batch).collect();
    let work = |i: usize| {
        let batch = batch(&tokens.ids, batches[i].iter().copied(), length)?;
        scalar(&model.loss(&batch).map_err(TrainError::Model)?)
    };
    let mut sum = 0.0;
    workers.in_order(batches.len(), work, |i, loss| sum += loss * batches[i].len() as f64)?;
    Ok(sum / starts.len() as f64)
}
