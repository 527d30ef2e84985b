//! A training: weights, moments, the curve so far.

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Instant;

use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

use super::checkpoint::Checkpoint;
use super::data::Corpus;
use super::error::TrainError;
use super::settings::TrainSettings;
use super::step::{Objective, Parameter, Parameters, evaluate};
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
    curve: Vec<Point>,
    /// Time spent in earlier runs, and since when this one runs.
    seconds: f64,
    since: Instant,
}

impl<M: Objective> Trainer<M> {
    /// Begins with these weights; `build` makes the model over their variables.
    ///
    /// # Errors
    /// What the model refuses, and 0 threads.
    pub fn new(
        settings: TrainSettings,
        corpus: Corpus,
        threads: usize,
        weights: &BTreeMap<String, Tensor>,
        build: impl FnOnce(&BTreeMap<String, Var>) -> Result<M, Box<dyn Error + Send + Sync>>,
    ) -> Result<Self, TrainError> {
        settings.check().map_err(|reason| TrainError::unfit(format!("train.{reason}")))?;
        let vars = Parameters::vars(weights)?;
        let model = build(&vars).map_err(TrainError::Model)?;
        let parameters = vars
            .into_iter()
            .map(|(name, var)| Parameter::new(&name, var, None))
            .collect::<Result<_, _>>()?;
        Ok(Trainer {
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
        let Trainer { settings, corpus, workers, model, parameters, .. } = self;
        let measured = parameters.gradients(model, workers, settings, &corpus.train, step)?;
        parameters.update(workers, settings, step, measured)?;
        let done = step + 1;
        let due = done.is_multiple_of(settings.evaluate_every) || done == settings.steps;
        let validation = match due {
            true => Some(evaluate(model, workers, settings, &corpus.validation)?),
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
