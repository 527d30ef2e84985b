//! What was found, as data.

use serde::Serialize;

use super::candidates::{Candidate, Window};
use super::exact::Logits;
use super::input::Layer;
use super::measure::{Figures, Measured, QueryErrors, Task, Tried};
use super::sample::Sample;
use super::verdict::{Budget, Choice, Judgement, Verdict, judge};

/// Everything.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Of the program.
    pub version: &'static str,
    /// Where the activations came from.
    pub input: String,
    /// Whether a query sees only the keys up to its own.
    pub causal: bool,
    /// Who said so.
    pub causal_by: &'static str,
    /// Type of inputs that the engine ran on.
    pub dtype: &'static str,
    /// How near windows are cut.
    #[serde(flatten)]
    pub window: Window,
    /// What was asked for.
    #[serde(flatten)]
    pub budget: Budget,
    /// Every candidate over all heads of all layers.
    pub candidates: Vec<Overall>,
    /// Those that could not be tried, and why.
    pub skipped: Vec<Skipped>,
    /// Layer by layer.
    pub layers: Vec<LayerReport>,
    /// How many heads got each verdict.
    pub verdicts: Vec<Count>,
    /// The cheapest setting that, given to all heads, is within the budgets over all queries.
    pub one_for_all: Option<Candidate>,
    /// Bytes of the recommended states of all key/value heads together; nothing if some head has
    /// no recommendation.
    pub recommended_bytes: Option<u128>,
    /// Tokens from which a KV cache of all these heads is larger.
    pub recommended_break_even_tokens: Option<u128>,
    /// Seconds of it all.
    pub seconds: f64,
}

/// One candidate over all heads that it could be tried on.
#[derive(Debug, Serialize)]
pub struct Overall {
    /// Its name.
    pub candidate: Candidate,
    /// Query heads that it was tried on.
    pub heads: usize,
    /// Those of them whose median relative error is within the budget.
    pub heads_within: usize,
    /// The errors of all their queries.
    #[serde(flatten)]
    pub figures: Figures,
    /// Bytes of the state of one key/value head, of the largest.
    pub state_bytes: u128,
    /// Tokens from which a KV cache of the same number type is larger, of the largest.
    pub break_even_tokens: u128,
}

/// A candidate that could not be tried.
#[derive(Debug, PartialEq, Serialize)]
pub struct Skipped {
    /// Its name.
    pub candidate: Candidate,
    /// Why not.
    pub reason: String,
}

/// One layer.
#[derive(Debug, Serialize)]
pub struct LayerReport {
    /// What its tensors are called.
    pub prefix: String,
    /// Sequences.
    pub batch: usize,
    /// Queries in each.
    pub tokens: usize,
    /// Keys in each.
    pub keys: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a key.
    pub d_key: usize,
    /// Elements of a value.
    pub d_value: usize,
    /// The first query that is looked at.
    pub from: usize,
    /// How many are, of each head and sequence.
    pub queries: usize,
    /// For each near window, how many of these see nothing beyond it, so that they have no error.
    pub all_near: Vec<AllNear>,
    /// Its query heads.
    pub heads: Vec<HeadReport>,
}

/// Queries to which all that they see is near.
#[derive(Debug, Serialize)]
pub struct AllNear {
    /// Blocks before a query's own that are exact.
    pub near: usize,
    /// How many queries.
    pub queries: usize,
}

/// One query head.
#[derive(Debug, Serialize)]
pub struct HeadReport {
    /// Its number.
    pub head: usize,
    /// The key/value head that it reads.
    pub kv_head: usize,
    /// What its logits are like.
    pub logits: Logits,
    /// In one word.
    pub verdict: Verdict,
    /// Why.
    pub reason: String,
    /// What to take.
    pub recommended: Option<Candidate>,
    /// What each candidate comes to.
    pub candidates: Vec<HeadCandidate>,
}

/// One candidate in one query head.
#[derive(Debug, Serialize)]
pub struct HeadCandidate {
    /// Its name.
    pub candidate: Candidate,
    /// Its errors.
    #[serde(flatten)]
    pub figures: Figures,
    /// Bytes of the state of one key/value head.
    pub state_bytes: u128,
    /// Tokens from which a KV cache of the same number type is larger.
    pub break_even_tokens: u128,
}

/// How often.
#[derive(Debug, Serialize)]
pub struct Count {
    /// What.
    pub verdict: Verdict,
    /// In how many query heads.
    pub heads: usize,
}

impl HeadReport {
    /// The candidate that is recommended, as it was measured.
    pub fn best(&self) -> Option<&HeadCandidate> {
        let recommended = self.recommended.as_ref()?;
        self.candidates.iter().find(|one| one.candidate == *recommended)
    }
}

impl LayerReport {
    /// One layer, judged.
    pub fn new(
        layer: &Layer,
        sample: &Sample,
        task: &Task<'_>,
        measured: &Measured,
        budget: &Budget,
    ) -> Self {
        let [q, k, v] = layer.shapes;
        let Task { candidates, window, .. } = *task;
        let windows = candidates.iter().filter(|candidate| candidate.far.is_none());
        let all_near = windows.filter_map(|candidate| candidate.near).map(|near| {
            let is_near = |&&t: &&usize| window.begin(near, t) <= window.sinks;
            AllNear { near, queries: sample.positions.iter().filter(is_near).count() }
        });
        let heads = (0..q[1]).map(|head| {
            let of_head = |(candidate, tried): (&Candidate, &Result<Tried, String>)| {
                let tried = tried.as_ref().ok()?;
                Some(HeadCandidate {
                    candidate: candidate.clone(),
                    figures: tried.heads[head].figures(),
                    state_bytes: tried.state_bytes,
                    break_even_tokens: tried.break_even_tokens,
                })
            };
            let all: Vec<HeadCandidate> =
                candidates.iter().zip(&measured.tried).filter_map(of_head).collect();
            let choices: Vec<Choice> = all.iter().map(HeadCandidate::choice).collect();
            let Judgement { verdict, reason, recommended } = judge(&choices, budget);
            HeadReport {
                head,
                kv_head: head / (q[1] / k[1]),
                logits: measured.logits[head],
                verdict,
                reason,
                recommended: recommended.map(|i| all[i].candidate.clone()),
                candidates: all,
            }
        });
        LayerReport {
            prefix: layer.prefix.clone(),
            batch: q[0],
            tokens: q[2],
            keys: k[2],
            kv_heads: k[1],
            d_key: q[3],
            d_value: v[3],
            from: sample.from,
            queries: sample.positions.len(),
            all_near: all_near.collect(),
            heads: heads.collect(),
        }
    }
}

impl HeadCandidate {
    fn choice(&self) -> Choice {
        Choice {
            alone: self.candidate.far.is_none(),
            state_bytes: self.state_bytes,
            figures: self.figures,
        }
    }
}

/// Collects the errors of all queries of all heads of all layers.
#[derive(Debug)]
pub struct Tally {
    by_candidate: Vec<(Candidate, QueryErrors, Overall)>,
    skipped: Vec<Skipped>,
}

impl Tally {
    /// Nothing yet.
    pub fn new(candidates: &[Candidate]) -> Self {
        let empty = |candidate: &Candidate| {
            let errors = QueryErrors::default();
            let figures = errors.figures();
            let overall = Overall {
                candidate: candidate.clone(),
                heads: 0,
                heads_within: 0,
                figures,
                state_bytes: 0,
                break_even_tokens: 0,
            };
            (candidate.clone(), errors, overall)
        };
        Tally { by_candidate: candidates.iter().map(empty).collect(), skipped: vec![] }
    }

    /// Adds a layer.
    pub fn add(&mut self, measured: Measured, budget: &Budget) {
        for ((candidate, errors, overall), tried) in
            self.by_candidate.iter_mut().zip(measured.tried)
        {
            let tried = match tried {
                Ok(tried) => tried,
                Err(reason) => {
                    let skipped = Skipped { candidate: candidate.clone(), reason };
                    if !self.skipped.contains(&skipped) {
                        self.skipped.push(skipped);
                    }
                    continue;
                }
            };
            overall.state_bytes = overall.state_bytes.max(tried.state_bytes);
            overall.break_even_tokens = overall.break_even_tokens.max(tried.break_even_tokens);
            for head in &tried.heads {
                overall.heads += 1;
                let within = head.figures().relative.median <= budget.max_error;
                overall.heads_within += usize::from(within);
                errors.add(head);
            }
        }
    }

    /// The candidates that were tried, and those that were not.
    pub fn finish(self) -> (Vec<Overall>, Vec<Skipped>) {
        let tried = self.by_candidate.into_iter().filter(|(_, _, overall)| overall.heads > 0);
        let overall =
            tried.map(|(_, errors, overall)| Overall { figures: errors.figures(), ..overall });
        (overall.collect(), self.skipped)
    }
}

/// The cheapest candidate that is within the budgets over all queries of all `heads`.
pub fn one_for_all(candidates: &[Overall], heads: usize, budget: &Budget) -> Option<Candidate> {
    let everywhere: Vec<&Overall> = candidates.iter().filter(|one| one.heads == heads).collect();
    let choices: Vec<Choice> = everywhere
        .iter()
        .map(|one| Choice {
            alone: one.candidate.far.is_none(),
            state_bytes: one.state_bytes,
            figures: one.figures,
        })
        .collect();
    let judgement = judge(&choices, budget);
    let within = judgement.verdict != Verdict::Fails;
    judgement.recommended.filter(|_| within).map(|i| everywhere[i].candidate.clone())
}

/// Bytes of the recommended states of all key/value heads, one sequence each, and the tokens of
/// KV caches as large, with elements of `width` bytes. The query heads of a key/value head share
/// its state, so that the largest of theirs counts.
pub fn recommended_size(layers: &[LayerReport], width: usize) -> Option<(u128, u128)> {
    let (mut states, mut token) = (0u128, 0u128);
    for layer in layers {
        token += (layer.kv_heads * (layer.d_key + layer.d_value) * width) as u128;
        for group in layer.heads.chunk_by(|a, b| a.kv_head == b.kv_head) {
            let mut largest = 0;
            for head in group {
                largest = largest.max(head.best()?.state_bytes);
            }
            states = states.saturating_add(largest);
        }
    }
    Some((states, states.div_ceil(token.max(1))))
}

/// How many heads got each verdict.
pub fn count(layers: &[LayerReport]) -> Vec<Count> {
    let heads = || layers.iter().flat_map(|layer| &layer.heads);
    let of = |verdict| heads().filter(|head| head.verdict == verdict).count();
    Verdict::ALL.map(|verdict| Count { verdict, heads: of(verdict) }).into()
}
