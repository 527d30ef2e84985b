//! Training on associative recall alone: pairs of random words, a stretch of filler, and all keys
//! again in another order, each to be answered with its value. Nothing but the answers counts.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::error::TrainError;
use super::settings::{ModelSettings, TrainSettings};
use super::step::{Measured, Parameter, Parameters, looked_at};
use super::trainer::Point;
use super::workers::Workers;
use crate::{Config, Model};

/// A file of settings for recall, TOML: tables `[model]`, `[recall]` and `[train]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecallFile {
    /// What is trained.
    pub model: ModelSettings,
    /// On what.
    pub recall: RecallTask,
    /// How: a step has about `batch` times `context` tokens.
    pub train: TrainSettings,
}

/// What is to be recalled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecallTask {
    /// Words that may be keys, and as many others that may be values.
    pub words: usize,
    /// Numbers of pairs, taken in turn by the steps.
    pub pairs: Vec<usize>,
    /// A curriculum: the steps begin with the first of `pairs` and of `distances`, and the next of both
    /// join once the loss of the last pairs that have joined is below so many nats. Without it all are
    /// there from the first step.
    #[serde(default)]
    pub join_below: Option<f64>,
    /// Tokens of filler between pairs and questions, drawn from by the steps.
    #[serde(default = "no_distance")]
    pub distances: Vec<usize>,
    /// Words of the filler.
    #[serde(default = "few")]
    pub fillers: usize,
}

fn no_distance() -> Vec<usize> {
    vec![0]
}
fn few() -> usize {
    16
}

/// Sequences of one number of pairs.
struct Batch {
    /// u32 `[rows, tokens]`.
    tokens: Tensor,
    /// Where the first key is asked for; answers and further keys follow in turn.
    first: usize,
    answers: Vec<u32>,
}

impl RecallTask {
    /// Tokens in the vocabulary.
    pub fn vocab(&self) -> usize {
        2 * self.words + self.fillers
    }

    /// Refuses what cannot be asked: names the field and its value.
    ///
    /// # Errors
    /// One sentence.
    pub fn check(&self) -> Result<(), String> {
        if self.pairs.is_empty() || self.distances.is_empty() {
            return Err("recall.pairs and recall.distances must name at least one each".into());
        }
        if let Some(pairs) = self.pairs.iter().find(|&&n| n == 0 || n > self.words) {
            let words = self.words;
            return Err(format!(
                "recall.pairs has {pairs}, it must be from 1 to recall.words, {words}"
            ));
        }
        if let Some(loss) = self.join_below.filter(|&loss| loss.is_nan() || loss <= 0.0) {
            return Err(format!("recall.join_below is {loss}, it must be above 0"));
        }
        if self.fillers == 0 || self.words > 1 << 20 || self.fillers > 1 << 20 {
            return Err("recall.fillers and recall.words must be from 1 to 1048576".into());
        }
        Ok(())
    }

    fn batch(
        &self,
        pairs: usize,
        distance: usize,
        rows: usize,
        rng: &mut StdRng,
    ) -> Result<Batch, TrainError> {
        let length = 4 * pairs + distance;
        let (mut tokens, mut answers) = (Vec::with_capacity(rows * length), vec![]);
        for _ in 0..rows {
            let mut draw = || rand::seq::index::sample(rng, self.words, pairs).into_vec();
            let (keys, values) = (draw(), draw());
            let pair = |i: usize| [keys[i] as u32, (self.words + values[i]) as u32];
            tokens.extend((0..pairs).flat_map(pair));
            tokens.extend(
                (0..distance).map(|_| (2 * self.words + rng.random_range(0..self.fillers)) as u32),
            );
            let mut order: Vec<usize> = (0..pairs).collect();
            order.shuffle(rng);
            tokens.extend(order.iter().flat_map(|&i| pair(i)));
            answers.extend(order.iter().map(|&i| pair(i)[1]));
        }
        let tokens = Tensor::from_vec(tokens, (rows, length), &Device::Cpu)?;
        Ok(Batch { tokens, first: 2 * pairs + distance, answers })
    }
}

/// A training on recall under way.
#[derive(Debug)]
pub struct RecallTrainer {
    task: RecallTask,
    settings: TrainSettings,
    model: Model,
    parameters: Parameters,
    workers: Workers,
    #[cfg(feature = "cuda")]
    gpu: Option<super::gpu::Gpu>,
    done: usize,
    /// Of the task's numbers of pairs, those that have joined.
    joined: usize,
}

impl RecallTrainer {
    /// Begins with these weights, where they are.
    ///
    /// # Errors
    /// Settings that cannot be, what the model refuses, and 0 threads.
    pub fn new(
        config: &Config,
        task: RecallTask,
        settings: TrainSettings,
        threads: usize,
        weights: &BTreeMap<String, Tensor>,
    ) -> Result<Self, TrainError> {
        task.check().map_err(TrainError::unfit)?;
        // All sequences of a step go through the model at once.
        let settings = TrainSettings { micro_batch: settings.batch, ..settings };
        settings.check().map_err(|reason| TrainError::unfit(format!("train.{reason}")))?;
        let vars = Parameters::vars(weights)?;
        let model = Model::from_vars(config, &vars)?;
        let parameters = vars
            .into_iter()
            .map(|(name, var)| Parameter::new(&name, var, None))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(RecallTrainer {
            #[cfg(feature = "cuda")]
            gpu: super::gpu::Gpu::new(&parameters)?,
            joined: if task.join_below.is_some() { 1 } else { task.pairs.len() },
            task,
            settings,
            model,
            parameters: Parameters(parameters),
            workers: Workers::new(threads)?,
            done: 0,
        })
    }

    /// The same with the model under a watch ([`Model::watched`]): a step that finds a number that is
    /// not finite says which tensor's is the first.
    pub fn watched(self) -> Self {
        RecallTrainer { model: self.model.watched(), ..self }
    }

    /// Does one step.
    ///
    /// # Errors
    /// A loss or gradient that is not finite.
    pub fn step(&mut self) -> Result<Point, TrainError> {
        let step = self.done;
        let mut rng = self.rng(step as u64, 0);
        let pairs = self.task.pairs[step % self.joined];
        let distances = &self.task.distances[..self.far()];
        let distance = distances[rng.random_range(0..distances.len())];
        let rows = self.rows(pairs, distance);
        let batch = self.task.batch(pairs, distance, rows, &mut rng)?;
        let outcome = self.descend(&batch, step);
        let Measured { loss, gradient_norm } = looked_at(&self.model, step, outcome)?;
        self.done += 1;
        let last = step % self.joined + 1 == self.joined && self.joined < self.task.pairs.len();
        if last && self.task.join_below.is_some_and(|most| loss < most) {
            self.joined += 1;
        }
        let learning_rate = self.settings.schedule().rate(step);
        Ok(Point { step: step + 1, loss, gradient_norm, learning_rate, validation: None })
    }

    fn descend(&mut self, batch: &Batch, step: usize) -> Result<Measured, TrainError> {
        let RecallTrainer { settings, model, parameters, workers, .. } = self;
        let pairs = batch.answers.len() / batch.tokens.dims()[0];
        let loss = || -> Result<Tensor, TrainError> {
            Ok(model.loss_of_answers(&batch.tokens, batch.first, pairs)?)
        };
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &mut self.gpu {
            return gpu.descend(&parameters.0, settings, step, std::iter::once_with(loss));
        }
        let loss = workers.together(loss)?;
        let measured = workers.together(|| parameters.of_one(&loss, step))?;
        parameters.update(workers, settings, step, measured)?;
        Ok(measured)
    }

    /// Fraction of answers that were the likeliest of all tokens, over so many sequences.
    ///
    /// # Errors
    /// More pairs than words, and what the model refuses.
    pub fn accuracy(
        &self,
        pairs: usize,
        distance: usize,
        sequences: usize,
    ) -> Result<f64, TrainError> {
        let task = RecallTask { pairs: vec![pairs], ..self.task.clone() };
        task.check().map_err(TrainError::unfit)?;
        let (mut right, mut asked) = (0, 0);
        let most = (1 << 16) / (4 * pairs + distance);
        let mut rng = self.rng(1 << 40, (pairs * 1_000_003 + distance) as u64);
        while asked < sequences * pairs {
            let rows = (sequences - asked / pairs).min(most.max(1));
            let batch = task.batch(pairs, distance, rows, &mut rng)?;
            let said = self.model.answers(&batch.tokens, batch.first, pairs)?;
            right += said.iter().zip(&batch.answers).filter(|(a, b)| a == b).count();
            asked += batch.answers.len();
        }
        Ok(right as f64 / asked as f64)
    }

    /// The settings.
    pub fn settings(&self) -> &TrainSettings {
        &self.settings
    }

    /// Of the task's distances, those that have joined.
    fn far(&self) -> usize {
        let all = self.task.distances.len();
        if self.joined == self.task.pairs.len() { all } else { self.joined.min(all) }
    }

    /// The numbers of pairs that have joined the training.
    pub fn joined(&self) -> &[usize] {
        &self.task.pairs[..self.joined]
    }

    /// Steps done.
    pub fn done(&self) -> usize {
        self.done
    }

    /// Weights.
    pub fn parameters_count(&self) -> usize {
        self.parameters.0.iter().map(|parameter| parameter.var.elem_count()).sum()
    }

    fn rows(&self, pairs: usize, distance: usize) -> usize {
        (self.settings.tokens_per_step() / (4 * pairs + distance)).max(1)
    }

    fn rng(&self, place: u64, of: u64) -> StdRng {
        let mut seed = [0; 32];
        for (bytes, part) in seed.chunks_exact_mut(8).zip([self.settings.seed, place, of, 0]) {
            bytes.copy_from_slice(&part.to_le_bytes());
        }
        StdRng::from_seed(seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::tests::seed;
    use crate::{Attention, Kernel, Position, initial_weights};

    fn settings() -> RecallFile {
        toml::from_str(
            "
            [model]
            layers = 2
            width = 32
            mlp = 64
            attention = { heads = 2, head_dim = 16, kernel = { kind = \"softmax\" }, position = \"none\" }
            [recall]
            words = 8
            pairs = [2, 3]
            distances = [0, 5]
            [train]
            steps = 60
            batch = 16
            micro_batch = 4
            context = 16
            learning_rate = 1e-2
            ",
        )
        .unwrap()
    }

    #[test]
    fn questions_have_their_answers() {
        let RecallFile { recall: task, .. } = settings();
        let mut rng = StdRng::seed_from_u64(seed());
        let batch = task.batch(3, 5, 4, &mut rng).unwrap();
        assert_eq!(batch.tokens.dims(), [4, 17]);
        let rows = batch.tokens.to_vec2::<u32>().unwrap();
        for (row, answers) in rows.iter().zip(batch.answers.chunks(3)) {
            let value = |key: u32| row[..6].chunks(2).find(|pair| pair[0] == key).unwrap()[1];
            assert!(row[6..11].iter().all(|&x| (16..task.vocab() as u32).contains(&x)));
            for (asked, &answer) in row[batch.first..].chunks(2).zip(answers) {
                assert_eq!((value(asked[0]), asked[1]), (answer, answer));
                assert!(asked[0] < 8 && (8..16).contains(&answer));
            }
        }
        assert!(RecallTask { pairs: vec![9], ..task }.check().unwrap_err().contains("has 9"));
    }

    #[test]
    fn the_loss_falls_and_repeats() {
        let RecallFile { model, recall, train } = settings();
        let attention =
            Attention { kernel: Kernel::Power { exponent: 2 }, ..model.attention.clone() };
        let attention =
            Attention { position: Position::Gates, near: Some(0), block: 16, ..attention };
        let config = ModelSettings { attention, ..model }.config(recall.vocab());
        let weights = initial_weights(&config, 1).unwrap();
        let run = |steps: usize| {
            let mut trainer =
                RecallTrainer::new(&config, recall.clone(), train.clone(), 1, &weights).unwrap();
            let losses: Vec<f64> = (0..steps).map(|_| trainer.step().unwrap().loss).collect();
            (losses, trainer.accuracy(2, 5, 8).unwrap())
        };
        let (losses, accuracy) = run(60);
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        assert!(mean(&losses[50..]) < 0.8 * mean(&losses[..4]), "{losses:?}");
        assert!((0.0..=1.0).contains(&accuracy));
        assert_eq!(run(4).0, losses[..4]);
    }

    #[test]
    fn a_curriculum_goes_on_where_the_loss_is_low() {
        let RecallFile { model, recall, train } = settings();
        let config = model.config(recall.vocab());
        let weights = initial_weights(&config, 1).unwrap();
        let joined = |join_below: f64| {
            let task = RecallTask { join_below: Some(join_below), ..recall.clone() };
            let mut trainer =
                RecallTrainer::new(&config, task, train.clone(), 1, &weights).unwrap();
            assert_eq!((trainer.joined(), trainer.far()), (&[2][..], 1));
            for _ in 0..2 {
                trainer.step().unwrap();
            }
            (trainer.joined().to_vec(), trainer.far())
        };
        assert_eq!(joined(1e9), (vec![2, 3], 2));
        assert_eq!(joined(1e-9), (vec![2], 1));
        let task = RecallTask { join_below: Some(0.0), ..recall.clone() };
        assert!(task.check().unwrap_err().contains("join_below is 0"));
    }

    #[test]
    fn a_watched_model_learns_alike_and_names_what_is_not_finite() {
        let RecallFile { model, recall, train } = settings();
        let attention = Attention { position: Position::Gates, ..model.attention.clone() };
        let config = ModelSettings { attention, ..model }.config(recall.vocab());
        let weights = initial_weights(&config, 1).unwrap();
        let trainer = |weights: &BTreeMap<String, Tensor>| {
            RecallTrainer::new(&config, recall.clone(), train.clone(), 1, weights).unwrap()
        };
        let (mut plain, mut watched) = (trainer(&weights), trainer(&weights).watched());
        for _ in 0..2 {
            assert_eq!(plain.step().unwrap(), watched.step().unwrap());
        }
        // Row 40 of the projection makes element 40 - 32 of the keys, of heads of 16; what is finite
        // in a weight may not be in what comes of it.
        for (name, row, value, what) in [
            ("layers.1.attn.qkv.weight", 40, f32::NAN, "layers.1.attn.k[0, 0, 8]"),
            ("layers.0.attn.qkv.weight", 64 + 31, f32::INFINITY, "layers.0.attn.v[0, 0, 31]"),
            ("layers.1.attn.gate.weight", 1, f32::NAN, "layers.1.attn.gates[0, 0, 1]"),
            ("layers.0.mlp.up.weight", 5, 3e38, "layers.0.mlp.up[0, 0, 5]"),
            ("layers.1.mlp.down.weight", 3, f32::NAN, "layers.1.mlp[0, 0, 3]"),
        ] {
            let mut weights = weights.clone();
            let weight = &weights[name];
            let (shape, columns) = (weight.dims().to_vec(), weight.dims()[1]);
            let mut numbers = weight.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            numbers[row * columns..(row + 1) * columns].fill(value);
            let weight = Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap();
            weights.insert(name.into(), weight);
            let error = trainer(&weights).watched().step().unwrap_err().to_string();
            assert!(error.starts_with(&format!("step 0: {what}")), "{name}: {error}");
        }
    }
}
