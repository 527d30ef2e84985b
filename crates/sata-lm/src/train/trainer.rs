//! A training: weights, moments, the curve so far.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error;
use std::time::Instant;

use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

use super::checkpoint::Checkpoint;
use super::data::Corpus;
use super::error::TrainError;
use super::optimizer::Moments;
use super::settings::TrainSettings;
use super::step::{Measured, Objective, Parameter, Parameters, evaluate, looked_at};
use super::workers::Workers;

/// What one step measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Steps done, this one included.
    pub step: usize,
    /// Mean loss of the step's tokens in nats per token, before its update.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// The learning rate.
    pub learning_rate: f64,
    /// Mean loss of the held-out tokens in nats per token, after the update, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<f64>,
}

/// A training under way.
#[derive(Debug)]
pub struct Trainer<M> {
    settings: TrainSettings,
    corpus: Corpus,
    workers: Workers,
    model: M,
    parameters: Parameters,
    /// Where weights and moments are, if not with the CPU.
    #[cfg(feature = "cuda")]
    gpu: Option<super::gpu::Gpu>,
    curve: Vec<Point>,
    /// Time spent in earlier runs, and since when this one runs.
    seconds: f64,
    since: Instant,
}

impl<M: Objective> Trainer<M> {
    /// Begins with these weights; `build` makes the model over their variables. Steps are done where
    /// the weights are: all on the CPU, or all on one GPU.
    ///
    /// # Errors
    /// What the model refuses, 0 threads, and weights on a device that this build cannot train on.
    pub fn new(
        settings: TrainSettings,
        corpus: Corpus,
        threads: usize,
        weights: &BTreeMap<String, Tensor>,
        build: impl FnOnce(&BTreeMap<String, Var>) -> Result<M, Box<dyn Error + Send + Sync>>,
    ) -> Result<Self, TrainError> {
        settings.check().map_err(|reason| TrainError::unfit(format!("train.{reason}")))?;
        if !cfg!(feature = "cuda") && weights.values().any(|weight| !weight.device().is_cpu()) {
            return Err(TrainError::unfit("this build trains on the CPU alone"));
        }
        let vars = Parameters::vars(weights)?;
        let model = build(&vars).map_err(TrainError::Model)?;
        let parameters = vars
            .into_iter()
            .map(|(name, var)| Parameter::new(&name, var, None))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Trainer {
            #[cfg(feature = "cuda")]
            gpu: super::gpu::Gpu::new(&parameters)?,
            settings,
            corpus,
            workers: Workers::new(threads)?,
            model,
            parameters: Parameters(parameters),
            curve: vec![],
            seconds: 0.0,
            since: Instant::now(),
        })
    }

    /// Goes on where a checkpoint was taken.
    ///
    /// # Errors
    /// As for [`Trainer::new`].
    pub fn resume(
        settings: TrainSettings,
        corpus: Corpus,
        threads: usize,
        checkpoint: Checkpoint,
        build: impl FnOnce(&BTreeMap<String, Var>) -> Result<M, Box<dyn Error + Send + Sync>>,
    ) -> Result<Self, TrainError> {
        let mut trainer = Self::new(settings, corpus, threads, &checkpoint.weights, build)?;
        let mut moments = checkpoint.moments;
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &mut trainer.gpu {
            gpu.resume(&trainer.parameters.0, &mut moments)?;
        }
        for parameter in &mut trainer.parameters.0 {
            if let Some(stored) = moments.remove(&parameter.name) {
                parameter.moments = stored;
            }
        }
        trainer.curve = checkpoint.header.curve;
        trainer.seconds = checkpoint.header.seconds;
        Ok(trainer)
    }

    /// Does one step, and evaluates where the settings ask.
    ///
    /// # Errors
    /// A loss or gradient that is not finite: the weights are then as they were.
    pub fn step(&mut self) -> Result<Point, TrainError> {
        let step = self.curve.len();
        let outcome = self.change(step);
        let measured = looked_at(&self.model, step, outcome)?;
        let Trainer { settings, corpus, .. } = &*self;
        let done = step + 1;
        let due = done.is_multiple_of(settings.evaluate_every) || done == settings.steps;
        let validation = match due {
            true => Some(self.evaluate(settings, corpus)?),
            false => None,
        };
        if let Some(value) = validation.filter(|loss| !loss.is_finite()) {
            let what = "the loss of the held-out text after it".into();
            return Err(TrainError::NonFinite { step, what, value });
        }
        let point = Point {
            step: done,
            loss: measured.loss,
            gradient_norm: measured.gradient_norm,
            learning_rate: settings.schedule().rate(step),
            validation,
        };
        self.curve.push(point);
        Ok(point)
    }

    /// Gradients and the update.
    fn change(&mut self, step: usize) -> Result<Measured, TrainError> {
        let Trainer { settings, corpus, workers, model, parameters, .. } = self;
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &mut self.gpu {
            return gpu.step(model, &parameters.0, settings, &corpus.train, step);
        }
        let measured = parameters.gradients(model, workers, settings, &corpus.train, step)?;
        parameters.update(workers, settings, step, measured)?;
        Ok(measured)
    }

    /// Mean loss, in nats per token, of all held-out text that fills sequences of `length` tokens,
    /// each read from its beginning; none where there is too little of it.
    ///
    /// # Errors
    /// What the model refuses.
    pub fn evaluate_at(&self, length: usize) -> Result<Option<f64>, TrainError> {
        let tokens = self.corpus.validation.ids.len();
        let sequences = tokens.saturating_sub(1) / length.max(1);
        if sequences == 0 || length == 0 {
            return Ok(None);
        }
        let settings = TrainSettings {
            context: length,
            evaluate_tokens: sequences * length,
            micro_batch: (self.settings.micro_batch * self.settings.context / length).max(1),
            ..self.settings.clone()
        };
        self.evaluate(&settings, &self.corpus).map(Some)
    }

    fn evaluate(&self, settings: &TrainSettings, corpus: &Corpus) -> Result<f64, TrainError> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            return gpu.evaluate(&self.model, settings, &corpus.validation);
        }
        evaluate(&self.model, &self.workers, settings, &corpus.validation)
    }

    /// Both moments of each parameter.
    pub(super) fn moments(&self) -> Result<Vec<[Cow<'_, [f32]>; 2]>, TrainError> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            return gpu.moments();
        }
        Ok(self.parameters.0.iter().map(|parameter| both(&parameter.moments)).collect())
    }

    /// Whether all steps are done.
    pub fn is_finished(&self) -> bool {
        self.curve.len() >= self.settings.steps
    }

    /// Whether the settings ask for a checkpoint after the steps done.
    pub fn is_checkpoint_due(&self) -> bool {
        self.is_finished() || self.curve.len().is_multiple_of(self.settings.checkpoint_every)
    }

    /// One point for every step done.
    pub fn curve(&self) -> &[Point] {
        &self.curve
    }

    /// The texts.
    pub fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    /// The settings.
    pub fn settings(&self) -> &TrainSettings {
        &self.settings
    }

    /// The model that is being trained; steps change its weights.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// Seconds spent, earlier runs included.
    pub fn seconds(&self) -> f64 {
        self.seconds + self.since.elapsed().as_secs_f64()
    }

    /// Weights.
    pub fn parameters_count(&self) -> usize {
        self.parameters.0.iter().map(|parameter| parameter.var.elem_count()).sum()
    }

    pub(super) fn parameters(&self) -> &[Parameter] {
        &self.parameters.0
    }
}

fn both(moments: &Moments) -> [Cow<'_, [f32]>; 2] {
    [Cow::Borrowed(&moments.first), Cow::Borrowed(&moments.second)]
}
