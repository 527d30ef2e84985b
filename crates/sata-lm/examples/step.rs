//! How fast the training graph is, and where its time goes: one step's forward and backward pass,
//! beside its matrix products and its attention alone.
//!
//! `cargo run --release -p sata-lm --example step -- [width] [head_dim] [tokens] [batch] [threads]`

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, Var};
use sata::Plan;
use sata_candle::{Options, attention_packed, linear};
use sata_lm::{Attention, Config, Kernel, Model, Position, initial_weights};

/// The least time of one call, in seconds: at least three, for at least a second.
fn time(mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    f()?;
    let (start, mut least, mut calls) = (Instant::now(), f64::INFINITY, 0);
    while calls < 3 || start.elapsed().as_secs_f64() < 1.0 {
        let start = Instant::now();
        f()?;
        least = least.min(start.elapsed().as_secs_f64());
        calls += 1;
    }
    Ok(least)
}

fn variable(shape: &[usize]) -> Result<Var> {
    Var::from_tensor(&Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?)
}

fn run(width: usize, head_dim: usize, tokens: usize, batch: usize) -> Result<()> {
    let heads = width / head_dim;
    let attention = Attention {
        heads,
        kv_heads: None,
        head_dim,
        kernel: Kernel::Taylor { terms: 3 },
        near: Some(1),
        block: 64,
        sinks: 0,
        position: Position::Gates,
        qk_norm: true,
    };
    let mlp = width * 8 / 3 / 16 * 16;
    let config = Config { vocab: 2048, layers: 4, width, mlp, norm_eps: 1e-5, attention };
    let vars: BTreeMap<String, Var> = initial_weights(&config, 1)?
        .into_iter()
        .map(|(name, x)| Ok((name, Var::from_tensor(&x)?)))
        .collect::<Result<_>>()?;
    let model = Model::from_vars(&config, &vars)?;
    let text: Vec<u32> = (0..batch * (tokens + 1)).map(|i| (i * i % 2039) as u32).collect();
    let text = Tensor::from_vec(text, (batch, tokens + 1), &Device::Cpu)?;

    let forward = time(|| model.loss(&text).map(drop))?;
    let step = time(|| model.loss(&text)?.backward().map(drop))?;

    // Each product of a step: forward, and for the gradients of what goes in and of the weight.
    let layers = config.layers as f64;
    let mut products = 0.0;
    let mut flops = 0.0;
    for (times, inputs, outputs) in [
        (layers, width, 3 * width),
        (layers, width, heads),
        (layers, width, width),
        (layers, width, 2 * mlp),
        (layers, mlp, width),
        (1.0, width, config.vocab),
    ] {
        let rows = batch * tokens;
        let (x, w, dy) = (
            Tensor::zeros((rows, inputs), DType::F32, &Device::Cpu)?,
            Tensor::zeros((outputs, inputs), DType::F32, &Device::Cpu)?,
            Tensor::zeros((rows, outputs), DType::F32, &Device::Cpu)?,
        );
        let (wt, dyt, xt) = (w.t()?.contiguous()?, dy.t()?.contiguous()?, x.t()?.contiguous()?);
        products += times
            * (time(|| linear(&x, &w).map(drop))?
                + time(|| linear(&dy, &wt).map(drop))?
                + time(|| linear(&dyt, &xt).map(drop))?);
        flops += times * 6.0 * (rows * inputs * outputs) as f64;
    }

    let spec = config.attention.spec().map_err(candle_core::Error::wrap)?;
    let plan = Arc::new(Plan::new(&spec).map_err(candle_core::Error::wrap)?);
    let qkv = variable(&[batch, tokens, 3 * width])?;
    let gates = Var::from_tensor(&Tensor::full(-0.01f32, (batch, tokens, heads), &Device::Cpu)?)?;
    let options = Options::causal().log_gates(&gates);
    let attend = || attention_packed(&plan, &qkv, heads, heads, &options);
    let attention_forward = layers * time(|| attend().map(drop))?;
    let attention = layers * time(|| attend()?.sum_all()?.backward().map(drop))?;

    let count = (batch * tokens) as f64;
    println!(
        "width {width}, {heads} heads of {head_dim}, {batch} × {tokens} tokens, {} threads",
        rayon::current_num_threads()
    );
    println!("step     {:8.1} ms, {:8.0} tokens/s", step * 1e3, count / step);
    println!("forward  {:8.1} ms", forward * 1e3);
    println!("products {:8.1} ms, {:8.1} GFLOP/s", products * 1e3, flops / products / 1e9);
    println!("attention{:8.1} ms, forward {:.1} ms", attention * 1e3, attention_forward * 1e3);
    println!("the rest {:8.1} %", (1.0 - (products + attention) / step) * 100.0);
    Ok(())
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let argument = |at: usize, default: usize| match std::env::args().nth(at) {
        Some(text) => text.parse().map_err(|e| format!("argument {at}, {text:?}: {e}")),
        None => Ok(default),
    };
    let (width, head_dim) = (argument(1, 256)?, argument(2, 16)?);
    let (tokens, batch, threads) = (argument(3, 512)?, argument(4, 4)?, argument(5, 1)?);
    if head_dim == 0 || width == 0 || width % head_dim != 0 {
        return Err(format!("width {width} is not a multiple of head_dim {head_dim}").into());
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    Ok(pool.install(|| run(width, head_dim, tokens, batch))?)
}
