//! Layers of a model that reads a text.

use std::path::{Path, PathBuf};

use sata_lm::pretrained::calibrate::{Recorded, record};
use sata_lm::pretrained::{Kind, Setting};

use super::input::Layer;
use crate::failure::{Failure, Outcome};
use crate::pretrained::{load, passages};
use crate::progress::Progress;
use crate::tensors::{Data, Tensor};

/// Tokens that a decoder reads if nobody says; an encoder reads as many as it can.
const TOKENS: usize = 1024;

/// What a model's heads get to see of a text.
pub struct Live {
    /// Layers, first to last.
    pub layers: Vec<Layer>,
    /// Whether each query sees the keys up to its own.
    pub causal: bool,
}

/// Reads a text with softmax.
///
/// # Errors
/// A model or text that cannot be read, or that is too short.
pub fn live(model: &Path, text: &[PathBuf], context: Option<usize>) -> Outcome<Live> {
    let loaded = load(model)?;
    let text = passages::text(text)?;
    let tokens = loaded.tokenizer.encode(&text)?.0;
    let most = match &loaded.model {
        Kind::Llama(_) => tokens.len().min(TOKENS),
        Kind::Bert(model) => tokens.len().min(model.config().positions),
    };
    let wants = context.unwrap_or(most).max(1);
    let Some(tokens) = tokens.get(..wants) else {
        let has = tokens.len();
        return Err(Failure::new(format!("--context is {wants} tokens, --text has {has}")));
    };
    let (recorded, causal, d) = match &loaded.model {
        Kind::Llama(model) => {
            let progress = Progress::new(wants as u64);
            progress.doing("reading the text with softmax");
            let layers = record(model, tokens, |read| progress.done(read as u64))?;
            progress.finish();
            (layers, true, model.config().head_dim)
        }
        Kind::Bert(model) => {
            let mut layers = vec![Recorded::default(); model.config().layers];
            let softmax = Setting::softmax();
            model.hidden(tokens, &softmax, &mut |layer, qkv| layers[layer].push(qkv))?;
            (layers, false, model.config().head_dim())
        }
    };
    let layers = recorded.into_iter().enumerate().map(|(i, layer)| {
        let tensors = [layer.queries, layer.keys, layer.values].map(|heads| Tensor {
            shape: vec![1, heads.len(), wants, d],
            data: Data::F32(heads.concat()),
        });
        let shapes = tensors.each_ref().map(|tensor| [1, tensor.shape[1], wants, d]);
        Layer { prefix: format!("layer{i:02}"), shapes, tensors }
    });
    Ok(Live { layers: layers.collect(), causal })
}
