//! The engine on activations of trained models.

use std::path::Path;

use sata::{Call, Form, Plan, Spec, View, ViewMut};
use sata_oracle::{Problem, Shape};
use serde::Serialize;

use super::progress::Progress;
use crate::errors::Errors;
use crate::failure::{Failure, Outcome};
use crate::plot::{Axis, COLORS, Figure, Key, Mark, Numerals, Panel, Style};
use crate::softmax::{Setting, softmax};
use crate::tensors::{Number, SafeFile};

/// The excerpt that comes with the program; its README says where it is from.
const EXCERPT: &[u8] = include_bytes!("../../data/activations.safetensors");

/// Its layers: prefix, name, causal.
pub(super) const LAYERS: [(&str, &str, bool); 4] = [
    ("smollm2.layer00", "SmolLM2-135M, layer 0", true),
    ("smollm2.layer14", "SmolLM2-135M, layer 14", true),
    ("minilm.layer00", "MiniLM-L6, layer 0", false),
    ("minilm.layer03", "MiniLM-L6, layer 3", false),
];

/// Terms that are tried.
const MOST_TERMS: usize = 40;
/// Terms that the paper recommends.
pub const PAPER_TERMS: usize = 4;
/// Error at which an approximation is called good, relative.
pub const GOOD: f64 = 0.01;

/// What one layer's activations are like, and what series of some lengths make of them.
#[derive(Clone, Debug, Serialize)]
pub struct Layer {
    /// Model and layer.
    pub name: &'static str,
    /// Whether queries see only what is before them.
    pub causal: bool,
    /// Query heads.
    pub heads: usize,
    /// Tokens.
    pub tokens: usize,
    /// d_K = d_V.
    pub d: usize,
    /// Standard deviation of the logits.
    pub logits_deviation: f64,
    /// Largest |logit|.
    pub logits_largest: f64,
    /// Taylor series of P = 1, 2, … terms against softmax.
    pub taylor: Vec<Taylor>,
    /// Fewest terms whose median error is within 1 %, if any number that was tried suffices.
    pub terms_needed: Option<usize>,
    /// D at that number of terms.
    pub features_needed: Option<u128>,
    /// The f64 engine against the oracle of the same operation, four terms, relative RMS.
    pub engine_f64: f64,
    /// The f32 engine against the same, median over median.
    pub engine_f32: f64,
}

/// One number of terms, in f64.
#[derive(Clone, Debug, Serialize)]
pub struct Taylor {
    /// P.
    pub terms: usize,
    /// Errors against softmax.
    pub errors: Errors,
    /// Share of queries whose denominator is not positive.
    pub non_positive: f64,
}

impl Layer {
    /// The errors at a number of terms.
    pub fn at(&self, terms: usize) -> &Taylor {
        &self.taylor[terms - 1]
    }
}

/// Units of work, for the progress bar.
pub fn units() -> u64 {
    LAYERS.len() as u64 * 3
}

/// Looks at all layers of the excerpt.
///
/// # Errors
/// None, for the excerpt as it comes.
pub fn run(progress: &Progress) -> Outcome<Vec<Layer>> {
    let file = excerpt()?;
    let look = |(prefix, name, causal)| {
        progress.doing(format!("activations: {name}"));
        let layer = Activations::read(&file, prefix, causal)?.look(name);
        progress.done(units() / LAYERS.len() as u64);
        layer
    };
    LAYERS.into_iter().map(look).collect()
}

/// The excerpt that comes with the program.
///
/// # Errors
/// None, for the excerpt as it comes.
pub(super) fn excerpt() -> Outcome<SafeFile> {
    SafeFile::from_bytes(Path::new("activations.safetensors"), EXCERPT.to_vec())
}

struct Activations {
    causal: bool,
    /// `[batch, heads, tokens, dim]` of q, k and v.
    shapes: [[usize; 4]; 3],
    qkv: [Vec<f64>; 3],
}

impl Activations {
    fn read(file: &SafeFile, prefix: &str, causal: bool) -> Outcome<Self> {
        let read = |name| file.tensor(&format!("{prefix}.{name}"));
        let (q, k, v) = (read("q")?, read("k")?, read("v")?);
        Ok(Activations {
            causal,
            shapes: [q.shape4("q")?, k.shape4("k")?, v.shape4("v")?],
            qkv: [q.data.to_f64(), k.data.to_f64(), v.data.to_f64()],
        })
    }

    fn scale(&self) -> f64 {
        1.0 / (self.shapes[0][3] as f64).sqrt()
    }

    fn look(&self, name: &'static str) -> Outcome<Layer> {
        let [_, heads, tokens, d] = self.shapes[0];
        let (shapes, scale, causal) = (self.shapes, self.scale(), self.causal);
        let setting = Setting { shapes, scale, causal, key_mask: None, fading: None };
        let [q, k, v] = &self.qkv;
        let exact = softmax(&setting, [q, k, v])?;
        let mut taylor = vec![];
        for terms in 1..=MOST_TERMS {
            let (y, non_positive) = self.engine::<f64>(terms)?;
            let errors = errors(&y, &exact)?;
            taylor.push(Taylor { terms, errors, non_positive });
        }
        let good = taylor.iter().find(|taylor| taylor.errors.relative_median <= GOOD);
        let terms_needed = good.map(|taylor| taylor.terms);
        let oracle = self.oracle(PAPER_TERMS);
        let (logits_deviation, logits_largest) = self.logits();
        Ok(Layer {
            name,
            causal: self.causal,
            heads,
            tokens,
            d,
            logits_deviation,
            logits_largest,
            taylor,
            terms_needed,
            features_needed: terms_needed.map(|terms| super::formulas::features(d, terms)),
            engine_f64: errors(&self.engine::<f64>(PAPER_TERMS)?.0, &oracle)?.relative_rms,
            engine_f32: errors(&self.engine::<f32>(PAPER_TERMS)?.0, &oracle)?.relative_median,
        })
    }

    /// The engine's outputs, and the share of denominators that are not positive.
    fn engine<E: Number>(&self, terms: usize) -> Outcome<(Vec<f64>, f64)> {
        let [q_shape, k_shape, v_shape] = self.shapes;
        // The direct form: with many terms no state would fit in any memory.
        let plan = Plan::new(&Spec::new(q_shape[3], v_shape[3]).terms(terms).build()?)?;
        let plan = plan.with_form(Form::Direct);
        let data = self.qkv.each_ref().map(|x| E::take(&crate::tensors::Data::F64(x.clone())));
        let [q, k, v] = &data;
        let (q, k, v) = (View::new(q, q_shape)?, View::new(k, k_shape)?, View::new(v, v_shape)?);
        let call = if self.causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
        let y_shape = [q_shape[0], q_shape[1], q_shape[2], v_shape[3]];
        let zero = E::from_compute(<E::Compute as sata::Real>::ZERO);
        let mut y = vec![zero; y_shape.iter().product()];
        let diagnostics = plan.run(call, ViewMut::new(&mut y, y_shape)?)?;
        let share = diagnostics.non_positive as f64 / diagnostics.queries as f64;
        Ok((E::wrap(y).to_f64(), share))
    }

    fn oracle(&self, terms: usize) -> Vec<f64> {
        let [q, k, v] = &self.qkv;
        let [[_, query_heads, queries, d_key], [_, kv_heads, keys, _], [.., d_value]] = self.shapes;
        let shape = Shape { query_heads, kv_heads, queries, keys, d_key, d_value };
        let mut problem = Problem::new(shape, q, k, v);
        problem.causal = self.causal;
        problem.terms = terms;
        sata_oracle::attention(&problem).y
    }

    /// Deviation of all logits that count, and the largest by absolute value.
    fn logits(&self) -> (f64, f64) {
        let [[_, heads, queries, d], [_, kv_heads, keys, _], _] = self.shapes;
        let [q, k, _] = &self.qkv;
        let (mut n, mut sum, mut squares, mut largest) = (0.0, 0.0, 0.0, 0.0f64);
        for head in 0..heads {
            let kv_head = head * kv_heads / heads;
            for t in 0..queries {
                let q = &q[(head * queries + t) * d..][..d];
                for s in 0..if self.causal { t + 1 } else { keys } {
                    let k = &k[(kv_head * keys + s) * d..][..d];
                    let x = self.scale() * q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
                    n += 1.0;
                    sum += x;
                    squares += x * x;
                    largest = largest.max(x.abs());
                }
            }
        }
        let mean: f64 = sum / n;
        ((squares / n - mean * mean).sqrt(), largest)
    }
}

fn errors(got: &[f64], want: &[f64]) -> Outcome<Errors> {
    Errors::new(got.iter().copied(), want).ok_or_else(|| Failure::new("no finite output"))
}

/// Errors by number of terms.
pub fn figure(layers: &[Layer]) -> Figure {
    let x = || Axis::linear("Taylor terms P", 1.0, MOST_TERMS as f64);
    let mut errors =
        vec![Mark::Level { y: GOOD, below: false, label: "1 %".into(), color: "#777777".into() }];
    let mut shares = vec![];
    let mut keys = vec![];
    for (layer, color) in layers.iter().zip(COLORS) {
        let curve = |of: fn(&Taylor) -> f64| -> Vec<(f64, f64)> {
            layer.taylor.iter().map(|taylor| (taylor.terms as f64, of(taylor))).collect()
        };
        errors.push(Mark::line(curve(|taylor| taylor.errors.relative_median), color));
        // An odd number of terms ends in an even power and is positive everywhere.
        let even: Vec<_> = curve(|taylor| 100.0 * taylor.non_positive)
            .into_iter()
            .filter(|point| point.0 % 2.0 == 0.0)
            .collect();
        shares.push(Mark::line(even.clone(), color));
        shares.push(Mark::dots(even, color));
        keys.push(Key::line(layer.name, color, Style::Solid));
    }
    for (marks, label) in [(&mut errors, "P = 4"), (&mut shares, "")] {
        let (x, color) = (PAPER_TERMS as f64, "#777777".into());
        marks.push(Mark::Place { x, label: label.into(), color });
    }
    Figure {
        id: "activations".into(),
        title: "Trained models · Taylor series against softmax on recorded activations".into(),
        subtitle: vec!["f64 arithmetic, so that only the truncation of the series shows".into()],
        columns: 2,
        panels: vec![
            Panel {
                title: "Error of the output".into(),
                x: x(),
                y: Axis::log("median |Y−Ŷ| / median |Y|", 1e-6, 1e2, Numerals::Powers),
                marks: errors,
            },
            Panel {
                title: "Denominators that are not positive (even P)".into(),
                x: x(),
                y: Axis::linear("percent of queries", 0.0, 100.0),
                marks: shares,
            },
        ],
        keys,
    }
}
