//! `sata eval --model` of a decoder that somebody else trained: beside softmax, position by position.

use std::sync::Arc;
use std::time::Instant;

use sata_lm::pretrained::{Kind, Llama, LlamaSession, Setting};

use super::passages::{Passage, passages, text};
use super::report::{Range, Report, Row};
use super::spec::{Named, named};
use super::{calibrate, encoder, load, sizes};
use crate::eval::EvalArgs;
use crate::failure::{Failure, Outcome};
use crate::output::{say, say_json};
use crate::plot;
use crate::progress::Progress;

/// Tokens whose logits are made at once.
const LOGITS: usize = 128;
/// Tokens that choose the setting of `--attention auto`.
const AUTO: usize = 2048;
/// Its share of the KV cache of the model's own context.
const AUTO_SHARE: usize = 4;

/// Runs it.
///
/// # Errors
/// A model, text or setting that cannot be read, or that do not fit each other.
pub fn run(args: &EvalArgs) -> Outcome {
    if let Some(path) = &args.svg {
        plot::check(path, "--svg")?;
    }
    let Some(path) = &args.model else {
        return Err(Failure::new("--model is needed"));
    };
    let loaded = load(path)?;
    let d = sizes(&loaded.model)[2];
    let text = text(&args.text)?;
    let names: Vec<&str> = match &args.attention[..] {
        [] => {
            return Err(Failure::new("--attention is needed for a model of this kind")
                .hint(format!("it takes {}", super::spec::ATTENTION)));
        }
        some => some.iter().map(String::as_str).collect(),
    };
    let model = match &loaded.model {
        Kind::Bert(model) => {
            let settings = names.iter().map(|name| named(name, d)).collect::<Outcome<Vec<_>>>()?;
            return encoder::run(args, model, &loaded.tokenizer, &text, &settings);
        }
        Kind::Llama(model) => model,
    };
    let mut skip = 0;
    let mut settings = vec![];
    for name in names {
        if name == "auto" {
            skip = AUTO;
            let tokens = loaded.tokenizer.encode(&text)?.0;
            let tokens = tokens.get(..AUTO).ok_or_else(|| {
                Failure::new(format!("--attention auto needs {AUTO} tokens of text to choose by"))
            })?;
            let config = model.config();
            let budget = config.cache_bytes(config.context, 4) / AUTO_SHARE;
            let chosen = calibrate::choose_for(model, tokens, budget, &[])
                .map_err(|error| error.context("--attention auto"))?;
            settings.push(Named { name: "auto".into(), setting: chosen.setting });
        } else {
            settings.push(named(name, d)?);
        }
    }
    if let Some(path) = &args.calibration {
        let known = named(&path.to_string_lossy(), d)?.setting.calibration;
        for named in settings.iter_mut().filter(|named| named.setting.calibration.is_empty()) {
            named.setting.calibration = known.clone();
        }
    }
    let context = args.context.unwrap_or(model.config().context);
    let passages = passages(&loaded.tokenizer, &text, [skip, context, args.passes])?;
    let ranges = ranges(&args.ranges, context)?;
    // Softmax first: the others are compared with its choices.
    let mut all = vec![Named { name: "softmax".into(), setting: Setting::softmax() }];
    all.extend(settings.into_iter().filter(|named| named.name != "softmax"));
    for named in &all {
        LlamaSession::new(model, &named.setting)
            .map_err(|error| Failure::from(error).context(format!("--attention {}", named.name)))?;
    }
    let progress = Progress::new((all.len() * passages.len() * context) as u64);
    let mut rows: Vec<Row> = vec![];
    let mut truths: Vec<Vec<u32>> = vec![];
    for named in &all {
        progress.doing(named.name.clone());
        let began = Instant::now();
        let mut measured = vec![];
        let mut bytes = 0;
        for (i, passage) in passages.iter().enumerate() {
            let (found, held) = read(model, &named.setting, passage, &progress)?;
            bytes = held;
            if named.name == "softmax" {
                truths.push(found.iter().map(|token| token.top).collect());
            }
            measured.push((i, found));
        }
        let seconds = began.elapsed().as_secs_f64();
        let per_range = ranges.iter().map(|&range| summed(range, &measured, &passages, &truths));
        rows.push(Row {
            attention: named.name.clone(),
            bytes,
            seconds,
            ranges: per_range.collect(),
        });
    }
    progress.finish();
    let config = model.config();
    let report = Report {
        model: loaded.source.display().to_string(),
        config: config.clone(),
        context,
        passages: passages.len(),
        calibrated_on_first: skip,
        cache_bytes: config.cache_bytes(context, 4),
        full_cache_bytes: config.cache_bytes(config.context, 4),
        rows,
    };
    if let Some(path) = &args.svg {
        plot::write(&report.figure(), path)?;
    }
    if args.json { say_json(&report) } else { say(report.text()) }
}

/// One token's prediction.
struct Predicted {
    /// −ln of the next token's probability.
    nats: f64,
    /// The likeliest next token.
    top: u32,
}

fn read(
    model: &Arc<Llama>,
    setting: &Setting,
    passage: &Passage,
    progress: &Progress,
) -> Outcome<(Vec<Predicted>, usize)> {
    let mut session = LlamaSession::new(model, setting)?;
    let (width, vocab) = (model.config().width, model.config().vocab);
    let (mut found, mut logits) = (vec![], vec![]);
    let mut done = 0;
    for part in passage.tokens.chunks(LlamaSession::pass_tokens()) {
        let hidden = session.read(part)?;
        for (i, hidden) in hidden.chunks(LOGITS * width).enumerate() {
            model.logits(hidden, &mut logits);
            for (t, row) in logits.chunks_exact(vocab).enumerate() {
                let Some(&next) = passage.tokens.get(done + i * LOGITS + t + 1) else {
                    continue;
                };
                found.push(predicted(row, next));
            }
        }
        done += part.len();
        progress.done(part.len() as u64);
    }
    if let Some(at) = found.iter().position(|token| !token.nats.is_finite()) {
        return Err(Failure::new(format!("logits after token {at} are not finite"))
            .hint("weights of this attention overflow or cancel: take gauss or groups"));
    }
    Ok((found, session.bytes()))
}

fn predicted(logits: &[f32], next: u32) -> Predicted {
    let (mut top, mut at) = (f32::NEG_INFINITY, 0);
    for (i, &x) in logits.iter().enumerate() {
        if x > top {
            (top, at) = (x, i);
        }
    }
    let sum: f64 = logits.iter().map(|&x| f64::from((x - top).exp())).sum();
    let nats = f64::from(top - logits[next as usize]) + sum.ln();
    Predicted { nats, top: at as u32 }
}

fn summed(
    (from, to): (usize, usize),
    measured: &[(usize, Vec<Predicted>)],
    passages: &[Passage],
    truths: &[Vec<u32>],
) -> Range {
    let (mut nats, mut bytes, mut tokens, mut agreed) = (0.0, 0, 0, 0);
    for (i, found) in measured {
        for t in from..to.min(found.len()) {
            nats += found[t].nats;
            bytes += passages[*i].bytes[t + 1];
            agreed += usize::from(found[t].top == truths[*i][t]);
            tokens += 1;
        }
    }
    Range {
        from,
        to,
        tokens,
        bytes,
        nats_per_token: nats / tokens.max(1) as f64,
        bits_per_byte: nats / std::f64::consts::LN_2 / bytes.max(1) as f64,
        top1_agreement: agreed as f64 / tokens.max(1) as f64,
    }
}

/// What `--ranges` says, or powers of two.
fn ranges(asked: &[String], context: usize) -> Outcome<Vec<(usize, usize)>> {
    if asked.is_empty() {
        let mut edges = vec![0];
        edges.extend((6..40).map(|i| 1usize << i).take_while(|&edge| edge < context));
        edges.push(context);
        return Ok(edges.windows(2).map(|pair| (pair[0], pair[1])).collect());
    }
    asked
        .iter()
        .map(|text| {
            let wrong = || {
                Failure::new(format!("--ranges {text}: it is not FROM-TO within {context} tokens"))
                    .hint("--ranges 384-768,1500-2048, for example")
            };
            let (from, to) = text.split_once('-').ok_or_else(wrong)?;
            match (from.parse(), to.parse()) {
                (Ok(from), Ok(to)) if from < to && to <= context => Ok((from, to)),
                _ => Err(wrong()),
            }
        })
        .collect()
}
