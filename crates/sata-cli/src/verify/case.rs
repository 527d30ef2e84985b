//! One case: what is computed, where its numbers come from, and how far they may be off.

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use sata::{Decay, Form, Near, Series, Spec, SpecBuilder};
use sata_cuda::{Element, Storage, SumsType};
use serde::Serialize;

use super::inputs::{Inputs, Sizes, normal};
use super::machine::{Engine, How, Machine};
use super::{gradients, naive, packed, truth};
use crate::failure::{Failure, Outcome};

/// Type of q, k, v and outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
}

impl Dtype {
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
        }
    }

    /// What rounding outputs (and, on matrix units, features) to it may make of them.
    fn rounding(self) -> f64 {
        match self {
            Dtype::F32 => 0.0,
            Dtype::Bf16 => 6e-3,
            Dtype::F16 => 1e-3,
        }
    }
}

/// What is done.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// One call; all outputs are compared.
    Whole,
    /// One long call; so many outputs are compared, the others must be numbers.
    Sampled(usize),
    /// One call over sequences of these lengths, side by side.
    Packed(Vec<usize>),
    /// Calls of random lengths that a state joins, which moves to another memory and back.
    Split,
    /// So many tokens in one call, then step by step, sequences at different positions.
    Steps(usize),
    /// So many keys in a state, which all queries read with the other keys.
    Past(usize),
    /// Gradients by all inputs, of one call or of two that a state joins after so many tokens.
    Backward(Option<usize>),
}

/// One case.
#[derive(Clone, Debug)]
pub struct Case {
    pub spec: Spec,
    pub sizes: Sizes,
    pub causal: bool,
    pub dtype: Dtype,
    pub masked: bool,
    /// What keys, and so logits, are multiplied by.
    pub gain: f32,
    pub how: How,
    pub kind: Kind,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// The case, in words.
    pub case: String,
    /// Relative RMS error; see [`truth::error`].
    pub error: Option<f64>,
    /// The most that it may be.
    pub limit: f64,
    /// The error of the naive formula in the same type, of which it may be twice.
    pub naive: Option<f64>,
    /// What is wrong besides.
    pub faults: Vec<String>,
    /// Whether all is well.
    pub pass: bool,
}

impl Case {
    /// A causal call in f32.
    ///
    /// # Errors
    /// What the library refuses.
    pub fn new(spec: SpecBuilder, sizes: Sizes) -> Outcome<Self> {
        Ok(Case {
            spec: spec.build()?,
            sizes,
            causal: true,
            dtype: Dtype::F32,
            masked: false,
            gain: 1.0,
            how: How::default(),
            kind: Kind::Whole,
        })
    }

    pub fn dtype(self, dtype: Dtype) -> Self {
        Case { dtype, ..self }
    }

    /// All queries, so many, see all keys.
    pub fn full(mut self, queries: usize) -> Self {
        self.sizes.queries = queries;
        Case { causal: false, ..self }
    }

    pub fn masked(self) -> Self {
        Case { masked: true, ..self }
    }

    pub fn gain(self, gain: f32) -> Self {
        Case { gain, ..self }
    }

    pub fn form(mut self, form: Form, chunk: usize) -> Self {
        (self.how.form, self.how.chunk) = (Some(form), Some(chunk));
        self
    }

    pub fn generic(mut self) -> Self {
        self.how.generic = true;
        self
    }

    pub fn sums(mut self, sums: SumsType, compensated: bool) -> Self {
        self.how.storage = Some(Storage { sums, compensated });
        self
    }

    pub fn kind(self, kind: Kind) -> Self {
        Case { kind, ..self }
    }

    /// In words.
    pub fn name(&self) -> String {
        let (s, spec) = (self.sizes, &self.spec);
        let mut name = match &self.kind {
            Kind::Whole => "forward".to_string(),
            Kind::Sampled(_) => "forward, sampled".into(),
            Kind::Packed(lengths) => format!("packed {lengths:?}"),
            Kind::Split => "split".into(),
            Kind::Steps(prefilled) => format!("steps after {prefilled}"),
            Kind::Past(cut) => format!("past of {cut}"),
            Kind::Backward(None) => "backward".into(),
            Kind::Backward(Some(cut)) => format!("backward, a state after {cut}"),
        };
        name += &format!(
            " {} {} d={}",
            self.dtype.name(),
            if self.causal { "causal" } else { "full" },
            s.d_key
        );
        if s.d_value != s.d_key {
            name += &format!("/{}", s.d_value);
        }
        name += &match spec.series() {
            Series::Taylor => format!(" taylor P={}", spec.terms()),
            Series::Gauss => format!(" gauss P={}", spec.terms()),
            Series::Hermite { tau } => format!(" hermite:{tau} P={}", spec.terms()),
            Series::Power { exponent, floor } => format!(" power {exponent} + {floor}"),
            Series::Fixed { coefficients } => format!(" fixed {coefficients:?}"),
            other => format!(" {other:?}"),
        };
        if let Near::Blocks(n) = spec.near() {
            name += &format!(" near {n} of {}", spec.block());
        }
        if spec.sinks() > 0 {
            name += &format!(" {} sinks", spec.sinks());
        }
        match spec.decay() {
            Decay::None => (),
            Decay::Slopes => name += " slopes",
            Decay::Gates => name += " gates",
        }
        name += &format!(", {}x{}x{} heads", s.batch, s.kv_heads, s.group);
        if self.causal {
            name += &format!(", {} tokens", s.keys);
        } else {
            name += &format!(", {} queries of {} keys", s.queries, s.keys);
        }
        if self.masked {
            name += ", masked";
        }
        if self.gain != 1.0 {
            name += &format!(", keys × {}", self.gain);
        }
        if let Some(form) = self.how.form {
            name += &format!(", {form:?}");
        }
        if let Some(chunk) = self.how.chunk {
            name += &format!(", chunks of {chunk}");
        }
        if self.how.generic {
            name += ", without matrix units";
        }
        if let Some(storage) = self.how.storage {
            name += &format!(", {:?} sums", storage.sums);
            if storage.compensated {
                name += " compensated";
            }
        }
        name
    }

    /// Logits that are large: exponentials of them lose as many digits.
    fn is_large(&self) -> bool {
        self.gain > 4.0
    }

    /// The most that the error may be.
    fn limit(&self) -> f64 {
        let fitted = match self.spec.series() {
            // A series that is fitted per query is fitted to moments that rounding has touched. Where
            // a query's far logits are few, or all but a few have decayed, the fit has nodes of next
            // to no weight, which rounding can take away.
            Series::Gauss if self.spec.terms() <= 2 => 10.0,
            Series::Gauss if self.spec.terms() <= 4 => match self.spec.decay() {
                Decay::None => 10.0,
                _ => 100.0,
            },
            Series::Gauss if self.spec.decay() == Decay::None => 300.0,
            Series::Gauss => 3000.0,
            Series::Hermite { .. } => 10.0,
            _ => 1.0,
        };
        let large = if self.is_large() { 100.0 } else { 1.0 };
        let sums = match self.how.storage {
            Some(Storage { sums: SumsType::Bf16, .. }) => 2e-2,
            _ => 0.0,
        };
        let usual = match self.kind {
            Kind::Backward(_) => 1e-4,
            Kind::Split | Kind::Steps(_) | Kind::Past(_) => 2e-5,
            _ => 1e-5,
        };
        self.dtype.rounding() + sums + usual * fitted * large
    }

    /// Computes it in its type.
    ///
    /// # Errors
    /// None: what goes wrong is what was found. None is found where the engine does not have it.
    pub fn run(&self, engine: &Engine, seed: u64) -> Option<Found> {
        let found = match self.dtype {
            Dtype::F32 => self.compute::<f32>(engine, seed),
            Dtype::Bf16 => self.compute::<half::bf16>(engine, seed),
            Dtype::F16 => self.compute::<half::f16>(engine, seed),
        };
        let limit = self.limit();
        let measured = match found {
            Ok(None) => return None,
            Ok(Some(measured)) => measured,
            Err(failure) => Measured { faults: vec![failure.to_string()], ..Measured::default() },
        };
        let Measured { error, naive, faults } = measured;
        let close = error
            .is_some_and(|error| error <= limit && naive.is_none_or(|naive| error <= 2.0 * naive));
        let pass = close && faults.is_empty();
        Some(Found { case: self.name(), error, limit, naive, faults, pass })
    }

    fn compute<E: Element>(&self, engine: &Engine, seed: u64) -> Outcome<Option<Measured>> {
        let mut rng = StdRng::seed_from_u64(seed);
        let inputs = Inputs::<E>::new(&mut rng, &self.spec, self.sizes, self.gain, self.masked);
        let mut machine = engine.machine(&self.spec, &inputs, self.causal, self.how)?;
        let machine = machine.as_mut();
        match &self.kind {
            Kind::Backward(cut) => self.backward(machine, &inputs, *cut, &mut rng),
            Kind::Packed(lengths) => {
                let cu = packed::cumulative(lengths);
                let rows = packed::rows(&self.spec, &inputs, &cu, self.causal)?;
                self.compare(machine, &inputs, &rows, |machine| {
                    machine.whole(Some(&cu)).map(|found| Some(found.queries))
                })
            }
            Kind::Sampled(count) => {
                let indices = self.sample(*count, &mut rng);
                let rows = truth::rows(&self.spec, &inputs, self.causal, Some(&indices))?;
                self.compare(machine, &inputs, &rows, |machine| {
                    machine.whole(None).map(|found| Some(found.queries))
                })
            }
            kind => {
                let rows = truth::rows(&self.spec, &inputs, self.causal, None)?;
                let plan: u64 = rng.random();
                self.compare(machine, &inputs, &rows, |machine| {
                    // The same way at every run.
                    let mut rng = StdRng::seed_from_u64(plan);
                    match kind {
                        Kind::Split => self.split(machine, &mut rng).map(|()| None),
                        Kind::Steps(first) => self.steps(machine, *first, &mut rng).map(|()| None),
                        Kind::Past(cut) => machine.read(*cut).map(|found| Some(found.queries)),
                        _ => machine.whole(None).map(|found| Some(found.queries)),
                    }
                })
            }
        }
    }

    /// Computes twice, and compares with the oracle and with the naive formula.
    fn compare<E: Element>(
        &self,
        machine: &mut (dyn Machine<E> + '_),
        inputs: &Inputs<E>,
        rows: &[truth::Row],
        mut work: impl FnMut(&mut (dyn Machine<E> + '_)) -> Outcome<Option<u64>>,
    ) -> Outcome<Option<Measured>> {
        let mut faults = vec![];
        let queries = work(machine)?;
        let y = machine.y()?;
        let all = inputs.sizes.rows() as u64;
        if let Some(queries) = queries.filter(|&queries| queries != all) {
            faults.push(format!("{queries} queries were counted of {all}"));
        }
        if rows.len() < inputs.sizes.rows() {
            // Rows that are not compared: at least they were written.
            let blank = y.iter().filter(|y| !y.to_compute().is_finite()).count();
            if blank > 0 {
                faults.push(format!("{blank} outputs are not finite"));
            }
        }
        machine.poison()?;
        work(machine)?;
        let bits = |y: &[E]| y.iter().map(|y| y.to_compute().to_bits()).collect::<Vec<_>>();
        // NaN is what a query without keys gets: equal bits too.
        if bits(&y) != bits(&machine.y()?) {
            faults.push("another run gave other bits".into());
        }
        let naive = match self.kind {
            Kind::Whole if self.dtype != Dtype::F32 && !self.is_large() => {
                naive::outputs(&self.spec, inputs, self.causal).map(|y| truth::error(&y, rows))
            }
            _ => None,
        };
        Ok(Some(Measured { error: Some(truth::error(&y, rows)), naive, faults }))
    }

    /// Rows at random, and at borders of tiles, blocks and chunks.
    fn sample(&self, count: usize, rng: &mut StdRng) -> Vec<usize> {
        let s = self.sizes;
        let heads = s.batch * s.query_heads();
        let mut all = vec![0, s.queries - 1];
        for i in 0..count {
            let step = [64, 384, 1024, 4096][i % 4].min(s.queries);
            let border = rng.random_range(1..=s.queries / step) * step;
            let query = match i % 3 {
                0 => border - 1,
                1 => border.min(s.queries - 1),
                _ => rng.random_range(0..s.queries),
            };
            all.push(rng.random_range(0..heads) * s.queries + query);
        }
        all.sort_unstable();
        all.dedup();
        all
    }

    fn split<E: Element>(&self, machine: &mut (dyn Machine<E> + '_), rng: &mut StdRng) -> Outcome {
        machine.begin()?;
        let (mut at, tokens) = (0, self.sizes.keys);
        while at < tokens {
            let n = match rng.random_range(0..4) {
                0 => rng.random_range(0..=2),
                1 => rng.random_range(1..20),
                _ => rng.random_range(1..=tokens / 2 + 1),
            };
            let n = n.min(tokens - at);
            machine.feed(at..at + n)?;
            at += n;
            if rng.random_range(0..3) == 0 {
                machine.move_state()?;
            }
        }
        Ok(())
    }

    fn steps<E: Element>(
        &self,
        machine: &mut (dyn Machine<E> + '_),
        first: usize,
        rng: &mut StdRng,
    ) -> Outcome {
        machine.begin()?;
        let (batch, tokens) = (self.sizes.batch, self.sizes.keys);
        if first > 0 {
            machine.feed(0..first)?;
        }
        let mut at = vec![first; batch];
        loop {
            let mut left: Vec<usize> = (0..batch).filter(|&i| at[i] < tokens).collect();
            if left.is_empty() {
                return Ok(());
            }
            if !machine.is_lockstep() {
                left.shuffle(rng);
                left.truncate(rng.random_range(1..=left.len()));
            }
            let entries: Vec<(usize, usize)> = left.iter().map(|&i| (i, at[i])).collect();
            machine.step(&entries)?;
            left.iter().for_each(|&i| at[i] += 1);
        }
    }

    fn backward<E: Element>(
        &self,
        machine: &mut (dyn Machine<E> + '_),
        inputs: &Inputs<E>,
        cut: Option<usize>,
        rng: &mut StdRng,
    ) -> Outcome<Option<Measured>> {
        let dy: Vec<E> = normal(rng, super::inputs::len(inputs.sizes.y()), 1.0);
        let Some(got) = machine.backward(&dy, cut)? else { return Ok(None) };
        let Some(again) = machine.backward(&dy, cut)? else {
            return Err(Failure::new("there was a backward pass, and then there was none"));
        };
        let want = gradients::truth(&self.spec, inputs, self.causal, &dy)?;
        let (error, worst) = gradients::error(&got, &want, self.sizes.keys);
        let mut faults = vec![];
        if gradients::bits(&got) != gradients::bits(&again) {
            faults.push("another run gave other bits".into());
        }
        if error > self.limit() {
            faults.push(format!("{worst} is the worst"));
        }
        Ok(Some(Measured { error: Some(error), naive: None, faults }))
    }
}

/// Errors of a case.
#[derive(Debug, Default)]
struct Measured {
    error: Option<f64>,
    naive: Option<f64>,
    faults: Vec<String>,
}
