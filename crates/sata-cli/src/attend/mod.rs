//! `sata attend`: attention over tensors in files.

mod centre;
mod compute;
mod decay;
mod input;
mod past;
mod report;
mod setting;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use half::{bf16, f16};
use sata::Spec;

use crate::errors::Errors;
use crate::failure::{Failure, Outcome};
use crate::machine;
use crate::near::{self, NearArg};
use crate::numbers::size;
use crate::output::{Staged, say, say_json};
use crate::series::{self, SeriesArg};
use crate::softmax::{Setting, softmax};
use crate::tensors::{Dtype, encode, write_npy};
use compute::{Done, Task, compute};
use decay::{Fading, SlopesArg};
use input::Input;
use report::Report;

/// Arguments of `sata attend`.
#[derive(Debug, Args)]
pub struct AttendArgs {
    /// A safetensors file with tensors q, k, v (and key_mask), or q.npy,k.npy,v.npy; each
    /// [heads, tokens, dim] or [batch, heads, tokens, dim]
    #[arg(long, value_name = "FILE")]
    input: String,
    /// Where to write the output y; .npy or safetensors
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Read tensors NAME.q, NAME.k, NAME.v
    #[arg(long, value_name = "NAME")]
    prefix: Option<String>,
    /// Number of terms of taylor, gauss (an even one) and hermite [default: 4]
    #[arg(long, allow_negative_numbers = true, value_name = "P")]
    terms: Option<usize>,
    /// taylor, gauss, hermite (or hermite:τ), power:P (x^P + 0.001), or a .json file of
    /// coefficients
    #[arg(long, default_value = "taylor", value_parser = series::parse)]
    series: SeriesArg,
    /// What is exact: none, or a query's own block and so many before it
    #[arg(long, allow_negative_numbers = true, default_value = "none", value_name = "N", value_parser = near::parse)]
    near: NearArg,
    /// Tokens in a block
    #[arg(long, allow_negative_numbers = true, default_value = "64", value_name = "B", value_parser = size)]
    block: usize,
    /// First tokens that stay exact for ever
    #[arg(long, allow_negative_numbers = true, default_value_t = 0, value_name = "M")]
    sinks: usize,
    /// Weights fade by exp(-m·distance): `alibi` for the usual slopes m, or one per key/value head
    #[arg(long, allow_negative_numbers = true, value_name = "M,…", value_parser = decay::parse, conflicts_with = "gates")]
    slopes: Option<SlopesArg>,
    /// Weights fade by forget gates, whose logarithms are in this tensor (a .npy file if --input
    /// names such), [kv_heads, tokens] or [batch, kv_heads, tokens]; with --prefix NAME,
    /// NAME.TENSOR if there is one
    #[arg(long, value_name = "TENSOR")]
    gates: Option<String>,
    /// Sum keys and values less their mean over this input: fewer digits lost, same answer
    #[arg(long, conflicts_with = "state_in")]
    center: bool,
    /// Each query sees the keys up to its own (default)
    #[arg(long, conflicts_with = "full")]
    causal: bool,
    /// Every query sees all keys
    #[arg(long)]
    full: bool,
    /// Convert inputs to this type first [default: F64 if an input is F64; F16 or BF16 if all
    /// are; otherwise F32]
    #[arg(long)]
    dtype: Option<DtypeArg>,
    /// Factor of q·k [default: 1/√d_key]
    #[arg(long, allow_negative_numbers = true)]
    scale: Option<f64>,
    /// Threads [default: all processors]
    #[arg(long, allow_negative_numbers = true, value_parser = size)]
    threads: Option<usize>,
    /// Continue from the state in this file
    #[arg(long, value_name = "FILE")]
    state_in: Option<PathBuf>,
    /// Leave the state in this file
    #[arg(long, value_name = "FILE")]
    state_out: Option<PathBuf>,
    /// Write nothing if a denominator is not positive and finite
    #[arg(long)]
    strict: bool,
    /// Print per head what its logits are like and what to expect of the series
    #[arg(long)]
    diagnose: bool,
    /// Report errors against another attention
    #[arg(long)]
    compare: Option<Compare>,
    /// Print JSON instead of words
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DtypeArg {
    F32,
    F64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Compare {
    /// Exact softmax attention in f64, with the same decay
    Softmax,
}

/// Runs `sata attend`.
///
/// # Errors
/// Anything wrong with the arguments or the files; nothing has been overwritten then.
pub fn run(args: &AttendArgs) -> Outcome {
    machine::set_threads(args.threads)?;
    if args.compare.is_some() && args.state_in.is_some() {
        return Err(Failure::new(
            "--compare softmax needs every key, but --state-in brings a past that is only sums",
        ));
    }
    let mut output = Staged::new(&args.output, "--output")?;
    let state_out = match &args.state_out {
        Some(path) if *path == args.output => {
            return Err(Failure::new(format!(
                "--state-out and --output both name {}",
                path.display()
            )));
        }
        Some(path) => Some(Staged::new(path, "--state-out")?),
        None => None,
    };
    let input = Input::read(&args.input, args.prefix.as_deref(), args.gates.as_deref())?;
    let fading = Fading::new(args.slopes.as_ref(), &input)?;
    let spec = setting::spec(args, &input, &fading)?;
    let task = Task {
        spec: &spec,
        fading: &fading,
        causal: !args.full,
        strict: args.strict,
        diagnose: args.diagnose,
        center: args.center,
        state_in: args.state_in.as_deref(),
        state_out: state_out.as_ref(),
    };
    let dtype = match args.dtype {
        Some(DtypeArg::F32) => Dtype::F32,
        Some(DtypeArg::F64) => Dtype::F64,
        None => input.dtype(),
    };
    let done = match dtype {
        Dtype::F16 => compute::<f16>(&task, &input)?,
        Dtype::Bf16 => compute::<bf16>(&task, &input)?,
        Dtype::F32 => compute::<f32>(&task, &input)?,
        Dtype::F64 => compute::<f64>(&task, &input)?,
    };
    let against_softmax = match args.compare {
        Some(Compare::Softmax) => compare(&task, &input, &done)?,
        None => None,
    };
    output.write(&encode_output(args, &done, &spec)?)?;
    if let Some(state) = state_out {
        state.commit()?;
    }
    output.commit()?;
    let [q, k, v] = input.shapes;
    let report = Report {
        input: args.input.clone(),
        output: args.output.display().to_string(),
        q,
        k,
        v,
        y: done.y.shape.clone(),
        dtype: dtype.name(),
        masked_keys: input.key_mask.iter().flatten().filter(|&&there| !there).count(),
        causal: !args.full,
        slopes: fading.slopes().map(<[f64]>::to_vec),
        gates: fading.gates().map(|gates| gates.name.clone()),
        features: done.features,
        form: done.form,
        kernels: done.kernels,
        level: done.level,
        threads: machine::threads(),
        seconds: done.seconds,
        diagnostics: done.diagnostics,
        state: done.state,
        state_out: args.state_out.as_ref().map(|path| path.display().to_string()),
        against_softmax,
        spec,
    };
    if args.json { say_json(&report) } else { say(report.text()) }
}

fn compare(task: &Task<'_>, input: &Input, done: &Done) -> Outcome<Option<Errors>> {
    let fading = task.fading.per_key(input.shapes[1]);
    let setting = Setting {
        shapes: input.shapes,
        scale: task.spec.scale(),
        causal: task.causal,
        key_mask: input.key_mask.as_deref(),
        fading: fading.as_deref(),
    };
    let (q, k, v) = (input.q.data.to_f64(), input.k.data.to_f64(), input.v.data.to_f64());
    let exact = softmax(&setting, [&q, &k, &v])?;
    Ok(Errors::new(done.y.data.to_f64(), &exact))
}

fn encode_output(args: &AttendArgs, done: &Done, spec: &Spec) -> Outcome<Vec<u8>> {
    if args.output.extension().is_some_and(|extension| extension == "npy") {
        return write_npy(&done.y);
    }
    let spec = serde_json::to_string(spec).map_err(|error| Failure::new(error.to_string()))?;
    encode(&[("y", &done.y)], &[("spec", spec), ("causal", (!args.full).to_string())])
}
