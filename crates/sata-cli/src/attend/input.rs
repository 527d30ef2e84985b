//! The queries, keys, values, mask and gates of `sata attend`.

use std::path::{Path, PathBuf};

use crate::failure::{Failure, Outcome};
use crate::tensors::{Dtype, Number, SafeFile, Tensor, read_npy};

/// What attention is asked about.
#[derive(Debug)]
pub struct Input {
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
    /// `[batch · keys]`: which keys exist.
    pub key_mask: Option<Vec<bool>>,
    /// Logarithms of forget gates, if they were asked for.
    pub gates: Option<Gates>,
    /// `[batch, heads, tokens, dim]` of q, k and v.
    pub shapes: [[usize; 4]; 3],
}

/// Logarithms of forget gates.
#[derive(Debug)]
pub struct Gates {
    /// What they are called in the file, or their own file.
    pub name: String,
    /// `[batch, kv_heads, tokens]`.
    pub logs: Vec<f32>,
}

/// Where `--input` leads: one safetensors file, or three `.npy` files.
#[derive(Debug)]
enum Source {
    Safe(PathBuf),
    Npy([PathBuf; 3]),
}

impl Input {
    /// Reads what `--input`, `--prefix` and `--gates` name.
    ///
    /// # Errors
    /// What is wrong with the files, their tensors or their shapes.
    pub fn read(input: &str, prefix: Option<&str>, gates: Option<&str>) -> Outcome<Self> {
        let (q, k, v, mask, gates) = match source(input)? {
            Source::Safe(path) => {
                let file = SafeFile::open(&path).map_err(|failure| failure.context("--input"))?;
                let name = |tensor: &str| match prefix {
                    Some(prefix) => format!("{prefix}.{tensor}"),
                    None => tensor.to_string(),
                };
                let tensor = |letter| {
                    file.tensor(&name(letter)).map_err(|failure| failure.context("--input"))
                };
                let gates = gates.map(|gates| find_gates(&file, prefix, gates)).transpose()?;
                (tensor("q")?, tensor("k")?, tensor("v")?, file.mask(&name("key_mask"))?, gates)
            }
            Source::Npy([q, k, v]) => {
                if let Some(prefix) = prefix {
                    return Err(Failure::new(format!(
                        "--prefix {prefix} names tensors of a safetensors file, but --input \
                         names .npy files"
                    )));
                }
                let tensor =
                    |path: &Path| read_npy(path).map_err(|failure| failure.context("--input"));
                let gates = gates.map(npy_gates).transpose()?;
                (tensor(&q)?, tensor(&k)?, tensor(&v)?, None, gates)
            }
        };
        let shapes = [q.shape4("q")?, k.shape4("k")?, v.shape4("v")?];
        for (argument, shape) in ["q", "k", "v"].into_iter().zip(shapes) {
            let names = ["batch", "heads", "tokens", "dim"];
            if let Some(at) = shape.iter().position(|&n| n == 0) {
                return Err(Failure::new(format!(
                    "{argument} has shape {shape:?}, with {} = 0: there is nothing to attend",
                    names[at]
                )));
            }
        }
        let key_mask = mask.map(|mask| check_mask(mask, shapes[1])).transpose()?;
        let gates = gates.map(|gates| check_gates(gates, shapes[1])).transpose()?;
        Ok(Input { q, k, v, key_mask, gates, shapes })
    }

    /// The type to compute in when nothing is said: what all inputs have, F64 if any has it,
    /// otherwise F32.
    pub fn dtype(&self) -> Dtype {
        let types = [&self.q, &self.k, &self.v].map(|tensor| tensor.data.dtype());
        if types.contains(&Dtype::F64) {
            Dtype::F64
        } else if types.iter().all(|&dtype| dtype == types[0]) {
            types[0]
        } else {
            Dtype::F32
        }
    }
}

fn source(input: &str) -> Outcome<Source> {
    let whole = Path::new(input);
    if !input.ends_with(".npy") {
        return Ok(Source::Safe(whole.into()));
    }
    let paths: Vec<PathBuf> = input.split(',').map(PathBuf::from).collect();
    match <[PathBuf; 3]>::try_from(paths) {
        Ok(paths) => Ok(Source::Npy(paths)),
        Err(paths) => Err(Failure::new(format!(
            "--input names {} .npy file{}, but q, k and v need three",
            paths.len(),
            if paths.len() == 1 { "" } else { "s" }
        ))
        .hint("--input q.npy,k.npy,v.npy")),
    }
}

fn check_mask(
    (shape, mask): (Vec<usize>, Vec<bool>),
    [batch, _, keys, _]: [usize; 4],
) -> Outcome<Vec<bool>> {
    let fits = match shape[..] {
        [n] => batch == 1 && n == keys,
        [b, n] => b == batch && n == keys,
        _ => false,
    };
    if fits {
        return Ok(mask);
    }
    Err(Failure::new(format!(
        "key_mask has shape {shape:?}, but k has batch {batch} and {keys} tokens: it must be \
         [{batch}, {keys}]{}",
        if batch == 1 { format!(" or [{keys}]") } else { String::new() }
    )))
}

/// The gates of a safetensors file: PREFIX.NAME if it is there, otherwise NAME.
fn find_gates(file: &SafeFile, prefix: Option<&str>, name: &str) -> Outcome<(String, Tensor)> {
    let full = prefix.map(|prefix| format!("{prefix}.{name}"));
    let there = file.names()?;
    let name = full.filter(|full| there.contains(full)).unwrap_or_else(|| name.to_string());
    let tensor = file.tensor(&name).map_err(|failure| failure.context("--gates"))?;
    Ok((name, tensor))
}

fn npy_gates(path: &str) -> Outcome<(String, Tensor)> {
    if !path.ends_with(".npy") {
        return Err(Failure::new(format!(
            "--gates {path}: --input names .npy files, so the gates must be in one too"
        )));
    }
    let tensor = read_npy(Path::new(path)).map_err(|failure| failure.context("--gates"))?;
    Ok((path.into(), tensor))
}

fn check_gates(
    (name, tensor): (String, Tensor),
    [batch, heads, tokens, _]: [usize; 4],
) -> Outcome<Gates> {
    let fits = match tensor.shape[..] {
        [h, n] => batch == 1 && [h, n] == [heads, tokens],
        [b, h, n] => [b, h, n] == [batch, heads, tokens],
        _ => false,
    };
    if fits {
        return Ok(Gates { name, logs: f32::take(&tensor.data) });
    }
    Err(Failure::new(format!(
        "--gates {name} has shape {:?}, but k has batch {batch}, {heads} heads and {tokens} \
         tokens: it must be [{batch}, {heads}, {tokens}]{}",
        tensor.shape,
        if batch == 1 { format!(" or [{heads}, {tokens}]") } else { String::new() }
    )))
}
