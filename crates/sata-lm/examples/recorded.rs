//! How near this program's queries, keys and values are to those another program recorded.
//!
//!     cargo run --release -p sata-lm --example recorded -- MODEL RECORD.safetensors TEXT START
//!     cargo run --release -p sata-lm --example recorded -- MODEL RECORD.safetensors TOKENS.json
//!
//! RECORD holds `layerNN.q`, `.k`, `.v`, `[heads, tokens, head_dim]`, with rotary embeddings applied,
//! of the tokens of TEXT from the first place on where it reads START, or of a list of token numbers.
//! Prints the relative root mean square of the difference, tensor by tensor; halves of rotary
//! embeddings may be apart or side by side.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use sata_lm::pretrained::calibrate::{Recorded, record};
use sata_lm::pretrained::{Kind, Pretrained, SafeTensorsFile, Setting};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, file, source @ ..] = arguments.as_slice() else {
        return Err("arguments are MODEL RECORD.safetensors, then TEXT START or TOKENS.json".into());
    };
    let loaded = Pretrained::load(Path::new(model))?;
    let mut tokens = match source {
        [tokens] => serde_json::from_str(&std::fs::read_to_string(tokens)?)?,
        [text, start] => {
            let text = std::fs::read_to_string(text)?;
            let from = text.find(start.as_str()).ok_or("START is not in TEXT")?;
            loaded.tokenizer.encode(&text[from..])?.0
        }
        _ => return Err("after RECORD come TEXT START or TOKENS.json".into()),
    };
    let file = SafeTensorsFile::parse(file, vec![(file.clone(), std::fs::read(file)?)])?;
    let name = file.names().into_iter().find(|name| name.ends_with(".q"));
    let first =
        name.and_then(|name| file.tensor(name)).ok_or("RECORD has no tensor layerNN.q")??;
    let tokens_in_record = first.shape[1];
    tokens.truncate(tokens_in_record);
    let layers = match &loaded.model {
        Kind::Llama(model) => record(model, &tokens, |_| {})?,
        Kind::Bert(model) => {
            let mut layers = vec![Recorded::default(); model.config().layers];
            model.hidden(&tokens, &Setting::softmax(), &mut |i, qkv| layers[i].push(qkv))?;
            layers
        }
    };
    let mut worst = BTreeMap::new();
    for (i, layer) in layers.iter().enumerate() {
        for (part, heads) in [("q", &layer.queries), ("k", &layer.keys), ("v", &layer.values)] {
            let name = format!("layer{i:02}.{part}");
            let Some(want) = file.tensor(&name) else { continue };
            let (got, want) = (heads.concat(), want?.data);
            if got.len() != want.len() {
                return Err(
                    format!("{name}: {} numbers, recorded {}", got.len(), want.len()).into()
                );
            }
            let mut error = relative(&got, &want);
            if part != "v" && matches!(loaded.model, Kind::Llama(_)) {
                error = error.min(relative(&side_by_side(&got, first.shape[2]), &want));
            }
            println!("{name} {error:.2e}");
            let most = worst.entry(part).or_insert(0.0f64);
            *most = most.max(error);
        }
    }
    println!("largest: {worst:?}");
    Ok(())
}

/// Relative root mean square of the difference.
fn relative(got: &[f32], want: &[f32]) -> f64 {
    let pairs = || got.iter().zip(want).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    let difference: f64 = pairs().map(|(a, b)| (a - b).powi(2)).sum();
    (difference / pairs().map(|(_, b)| b * b).sum::<f64>()).sqrt()
}

/// The two numbers that a rotary embedding turns, half a head apart here, side by side: some programs
/// keep them so, which changes no q·k.
fn side_by_side(rows: &[f32], d: usize) -> Vec<f32> {
    let row = |row: &[f32]| -> Vec<f32> {
        let (low, high) = row.split_at(d / 2);
        low.iter().zip(high).flat_map(|(a, b)| [*a, *b]).collect()
    };
    rows.chunks_exact(d).flat_map(row).collect()
}
