//! What a language model does besides products of matrices and attention, on a GPU: kernels of the
//! folder `kernels`, by addresses of device memory. Sums are in an order that does not change.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use sata_cuda::{Device, Error, Kernel, Launch, Unit};

/// Threads of a block.
const THREADS: usize = 256;
/// Elements that a block of `update.cu` takes.
const SHARE: usize = 4096;
/// Parameters that a launch of `update.cu` takes: all of it are arguments, of at most 4 KB.
const PARTS: usize = 48;
/// Rows that a segment of `tokens.cu` sums.
const SEGMENT: usize = 32;

macro_rules! unit {
    ($file:literal) => {
        Unit::new($file, include_str!(concat!("../kernels/", $file)))
    };
}

/// The kernels of a device.
#[derive(Debug)]
pub struct Kernels {
    device: Device,
    loaded: Mutex<HashMap<(&'static str, usize), Kernel>>,
}

/// Arguments of `norms.cu`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Norm {
    /// f32 `[rows, n]`.
    pub x: u64,
    /// f32 `[n]`.
    pub weight: u64,
    /// bf16 `[rows, n]`.
    pub dy: u64,
    /// bf16 `[rows, n]`.
    pub y: u64,
    /// f32 `[rows, n]`.
    pub dx: u64,
    /// f32 `[Kernels::parts(rows), n]`.
    pub parts: u64,
    /// Rows.
    pub rows: i64,
    /// Elements of a row.
    pub n: i32,
    /// Added to the mean square.
    pub eps: f32,
}

/// Arguments of norms in `heads.cu`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct HeadNorm {
    /// bf16 `[rows, width]`.
    pub x: u64,
    /// f32 `[d]`.
    pub q_weight: u64,
    /// f32 `[d]`.
    pub k_weight: u64,
    /// bf16 `[rows, width]`.
    pub dy: u64,
    /// bf16 `[rows, width]`.
    pub y: u64,
    /// bf16 `[rows, width]`.
    pub dx: u64,
    /// f32 `[2, Kernels::parts(rows), d]`: queries', keys'.
    pub parts: u64,
    /// Rows.
    pub rows: i64,
    /// Query heads.
    pub heads: i32,
    /// Key/value heads.
    pub kv_heads: i32,
    /// Elements of a row, a multiple of 8.
    pub width: i32,
    /// Added to the mean square.
    pub eps: f32,
}

/// Arguments of rotation in `heads.cu`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Rotate {
    /// bf16 `[rows, width]`.
    pub x: u64,
    /// f32 `[tokens, d/2, 2]`: cosine and sine.
    pub table: u64,
    /// bf16 `[rows, width]`.
    pub y: u64,
    /// Rows.
    pub rows: i64,
    /// Tokens of a sequence: row r is token r mod tokens.
    pub tokens: i64,
    /// Heads that are turned.
    pub heads: i32,
    /// Elements of a row.
    pub width: i32,
    /// 1 forwards, −1 back.
    pub sign: f32,
    /// Not read.
    pub padding: i32,
}

/// Arguments of `rows.cu`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Rows {
    /// What is read.
    pub x: u64,
    /// f32 `[n]`.
    pub bias: u64,
    /// The output's gradient.
    pub dy: u64,
    /// What is written.
    pub y: u64,
    /// The input's gradient.
    pub dx: u64,
    /// f32 `[Kernels::parts(rows), n]`.
    pub parts: u64,
    /// Rows.
    pub rows: i64,
    /// Elements of a row.
    pub n: i64,
}

/// Arguments of embeddings in `tokens.cu`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Embed {
    /// f32 `[vocab, n]`.
    pub table: u64,
    /// u32 `[rows]`.
    pub tokens: u64,
    /// u32 `[rows]`, see [`Order`].
    pub order: u64,
    /// u32.
    pub segments: u64,
    /// u32 `[vocab + 1]`.
    pub firsts: u64,
    /// f32 `[rows, n]`.
    pub dy: u64,
    /// f32 `[segments, n]`.
    pub parts: u64,
    /// f32 `[rows, n]`, or the table's gradient.
    pub y: u64,
    /// Rows.
    pub rows: i64,
    /// Rows of the table.
    pub vocab: i64,
    /// Elements of a row.
    pub n: i64,
}

/// Arguments of losses in `tokens.cu`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Loss {
    /// f32 `[rows, vocab]`.
    pub logits: u64,
    /// u32 `[rows]`.
    pub targets: u64,
    /// f32 `[rows]`.
    pub losses: u64,
    /// bf16 `[rows, vocab]`, or 0.
    pub gradient: u64,
    /// Rows.
    pub rows: i64,
    /// Columns.
    pub vocab: i64,
    /// What the gradient is multiplied by.
    pub gain: f32,
    /// Not read.
    pub padding: i32,
}

/// A parameter of `update.cu`, f32 throughout.
#[derive(Clone, Copy, Debug, Default)]
pub struct Parameter {
    /// Where its weights are.
    pub weights: u64,
    /// Where its gradient is.
    pub gradient: u64,
    /// Where its mean gradient is.
    pub first: u64,
    /// Where its mean squared gradient is.
    pub second: u64,
    /// Elements.
    pub elements: usize,
    /// Whether it is drawn towards 0.
    pub decays: bool,
}

/// The numbers of an AdamW step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Step {
    /// 1 / how many gradients were summed.
    pub each: f32,
    /// The largest norm of the mean gradient.
    pub clip: f32,
    /// Decay of the mean gradient.
    pub beta1: f32,
    /// Decay of the mean squared gradient.
    pub beta2: f32,
    /// 1 − rate·decay, for parameters that decay.
    pub keep: f32,
    /// rate / (1 − β₁ᵗ).
    pub rate: f32,
    /// 1 / √(1 − β₂ᵗ).
    pub root: f32,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct RawPart {
    weights: u64,
    gradient: u64,
    first: u64,
    second: u64,
    n: i64,
    block: i32,
    decays: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RawUpdate {
    parts: [RawPart; PARTS],
    sums: u64,
    norm: u64,
    count: i32,
    block: i32,
    blocks: i32,
    each: f32,
    clip: f32,
    beta1: f32,
    beta2: f32,
    keep: f32,
    rate: f32,
    root: f32,
}

/// The rows of each token, in segments that are short.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Order {
    /// Rows, token by token, ascending within one.
    pub rows: Vec<u32>,
    /// Where segments begin in it, and its end.
    pub segments: Vec<u32>,
    /// The first segment of each token, and their number.
    pub firsts: Vec<u32>,
}

impl Order {
    /// That of tokens below `vocab`.
    pub fn new(tokens: &[u32], vocab: usize) -> Self {
        let mut ends = vec![0u32; vocab + 1];
        for &token in tokens {
            ends[token as usize + 1] += 1;
        }
        for token in 0..vocab {
            ends[token + 1] += ends[token];
        }
        let mut order = Order { rows: vec![0; tokens.len()], segments: vec![], firsts: vec![] };
        let mut next = ends.clone();
        for (row, &token) in tokens.iter().enumerate() {
            let at = &mut next[token as usize];
            order.rows[*at as usize] = row as u32;
            *at += 1;
        }
        for token in 0..vocab {
            order.firsts.push(order.segments.len() as u32);
            order.segments.extend((ends[token]..ends[token + 1]).step_by(SEGMENT));
        }
        order.firsts.push(order.segments.len() as u32);
        order.segments.push(tokens.len() as u32);
        order
    }
}

impl Kernels {
    /// Those of a device, each loaded when it is first needed.
    pub fn new(device: &Device) -> Self {
        Kernels { device: device.clone(), loaded: Mutex::default() }
    }

    /// The device, and its stream.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Blocks that sum rows, and so rows of what they leave.
    pub fn parts(&self, rows: usize) -> usize {
        let most = 2 * self.device.properties().multiprocessors as usize;
        rows.div_ceil(8).clamp(1, most)
    }

    fn kernel(&self, name: &'static str, d: usize) -> Result<Kernel, Error> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = loaded.get(&(name, d)) {
            return Ok(kernel.clone());
        }
        let unit = match name {
            "rms_norm" | "rms_norm_back" => unit!("norms.cu").size_of::<Norm>("NORM_BYTES"),
            "head_norm" | "head_norm_back" | "rotate" => unit!("heads.cu")
                .size_of::<HeadNorm>("HEAD_NORM_BYTES")
                .size_of::<Rotate>("ROTATE_BYTES")
                .define("D", d),
            "embed" | "embed_segments" | "embed_tokens" | "losses" | "mean" => {
                unit!("tokens.cu").size_of::<Embed>("EMBED_BYTES").size_of::<Loss>("LOSS_BYTES")
            }
            "squares" | "gradient_norm" | "adamw" | "add_gradients" => unit!("update.cu")
                .size_of::<RawUpdate>("UPDATE_BYTES")
                .define("PARTS", PARTS)
                .define("SHARE", SHARE),
            _ => unit!("rows.cu").size_of::<Rows>("ROWS_BYTES"),
        };
        let kernel = self.device.kernel(&unit, name)?;
        loaded.insert((name, d), kernel.clone());
        Ok(kernel)
    }

    /// Blocks of threads for so many items, some of which each takes.
    fn blocks(&self, items: usize) -> u32 {
        let most = 16 * self.device.properties().multiprocessors as usize;
        items.div_ceil(THREADS).clamp(1, most) as u32
    }

    /// # Safety
    /// The kernel takes `P`, and every address in it is one of the device with as many elements as
    /// the sizes say.
    unsafe fn run<P: Copy>(
        &self,
        name: &'static str,
        d: usize,
        launch: Launch,
        params: &P,
    ) -> Result<(), Error> {
        // SAFETY: promised by the caller.
        unsafe { self.kernel(name, d)?.launch(launch, params) }
    }

    /// y of x.
    ///
    /// # Safety
    /// As for all here: each address that is needed is one of the device, aligned to 16 bytes, and
    /// has as many elements as the sizes say.
    ///
    /// # Errors
    /// What the device or its compiler reports.
    pub unsafe fn rms_norm(&self, p: &Norm) -> Result<(), Error> {
        let blocks = (p.rows as usize).div_ceil(8).clamp(1, 1 << 16) as u32;
        // SAFETY: promised by the caller.
        unsafe { self.run("rms_norm", 0, Launch::linear(blocks, 256), p) }
    }

    /// dx, and the weight's gradient to `dw`.
    ///
    /// # Safety
    /// As for [`Kernels::rms_norm`].
    ///
    /// # Errors
    /// As for [`Kernels::rms_norm`].
    pub unsafe fn rms_norm_back(&self, p: &Norm, dw: u64) -> Result<(), Error> {
        let parts = self.parts(p.rows as usize);
        let launch = Launch::linear(parts as u32, 256).shared(32 * p.n.unsigned_abs());
        // SAFETY: promised by the caller.
        unsafe {
            self.run("rms_norm_back", 0, launch, p)?;
            self.columns(p.parts, parts, p.n as usize, dw)
        }
    }

    /// y of x, with heads of `d` elements.
    ///
    /// # Safety
    /// As for [`Kernels::rms_norm`].
    ///
    /// # Errors
    /// As for [`Kernels::rms_norm`].
    pub unsafe fn head_norm(&self, d: usize, p: &HeadNorm) -> Result<(), Error> {
        let mut launch = Launch::linear(self.blocks((p.rows as usize) * p.heads as usize), 256);
        launch.grid[1] = 3;
        // SAFETY: promised by the caller.
        unsafe { self.run("head_norm", d, launch, p) }
    }

    /// dx, and the weights' gradients to `dq` and `dk`.
    ///
    /// # Safety
    /// As for [`Kernels::rms_norm`].
    ///
    /// # Errors
    /// As for [`Kernels::rms_norm`].
    pub unsafe fn head_norm_back(
        &self,
        d: usize,
        p: &HeadNorm,
        [dq, dk]: [u64; 2],
    ) -> Result<(), Error> {
        let parts = self.parts(p.rows as usize);
        let mut launch = Launch::linear(parts as u32, 256);
        launch.grid[1] = 3;
        // SAFETY: promised by the caller.
        unsafe {
            self.run("head_norm_back", d, launch, p)?;
            self.columns(p.parts, parts, d, dq)?;
            self.columns(p.parts + (4 * parts * d) as u64, parts, d, dk)
        }
    }

    /// y of x, with heads of `d` elements.
    ///
    /// # Safety
    /// As for [`Kernels::rms_norm`].
    ///
    /// # Errors
    /// As for [`Kernels::rms_norm`].
    pub unsafe fn rotate(&self, d: usize, p: &Rotate) -> Result<(), Error> {
        let blocks = self.blocks(p.rows as usize * p.width as usize);
        // SAFETY: promised by the caller.
        unsafe { self.run("rotate", d, Launch::linear(blocks, 256), p) }
    }

    /// One of the kernels of `rows.cu` that go element by element: `swiglu`, `swiglu_back`,
    /// `log_gates`, `to_bf16`.
    ///
    /// # Safety
    /// As for [`Kernels::rms_norm`].
    ///
    /// # Errors
    /// As for [`Kernels::rms_norm`].
    pub unsafe fn rows(&self, name: &'static str, items: usize, p: &Rows) -> Result<(), Error> {
        // SAFETY: promised by the caller.
        unsafe { self.run(name, 0, Launch::linear(self.blocks(items), 256), p) }
    }

    /// dx, and the bias' gradient to `db`.
    ///
    /// # Safety
    /// As for [`Kernels::rms_norm`]; n is at most 256.
    ///
    /// # Errors
    /// As for [`Kernels::rms_norm`].
    pub unsafe fn log_gates_back(&self, p: &Rows, db: u64) -> Result<(), Error> {
        let parts = self.parts(p.rows as usize);
        // SAFETY: promised by the caller.
        unsafe {
            self.run("log_gates_back", 0, Launch::linear(parts as u32, 256), p)?;
            self.columns(p.parts, parts, p.n as usize, db)
        }
    }

    /// Sums of the columns of x f32 `[rows, n]`.
    ///
    /// # Safety
    /// As for [`Kernels::rms_norm`].
    ///
    /// # Errors
    /// As for [`Kernels::rms_norm`].
    pub unsafe fn columns(&self, x: u64, rows: usize, n: usize, y: u64) -> Result<(), Error> {
        let p = Rows { x, y, rows: rows as i64, n: n as i64, ..Rows::default() };
        // SAFETY: promised by the caller.
        unsafe { self.run("columns", 0, Launch::linear(n.div_ceil(32) as u32, 256), &p) }
    }

    /// Rows of the table.
    ///
    /// # Safety
    /// As for [`Kernels::rms_norm`].
    ///
    /// # Errors
    /// As for [`Kernels::rms_norm`].
    pub unsafe fn embed(&self, p: &Embed) -> Result<(), Error> {
        let blocks = self.blocks((p.rows * p.n) as usize);
        // SAFETY: promised by the caller.
        unsafe { self.run("embed", 0, Launch::linear(blocks, 256), p) }
    }

    /// The table's gradient, to y, by an [`Order`] of so many segments.
    ///
    /// # Safety
    /// As for [`Kernels::rms_norm`], and the order is that of the tokens.
    ///
    /// # Errors
    /// As for [`Kernels::rms_norm`].
    pub unsafe fn embed_back(&self, p: &Embed, segments: usize) -> Result<(), Error> {
        // SAFETY: promised by the caller.
        unsafe {
            if segments > 0 {
                self.run("embed_segments", 0, Launch::linear(segments as u32, 128), p)?;
            }
            self.run("embed_tokens", 0, Launch::linear(p.vocab as u32, 128), p)
        }
    }

    /// Losses of rows, and their gradient.
    ///
    /// # Safety
    /// As for [`Kernels::rms_norm`].
    ///
    /// # Errors
    /// As for [`Kernels::rms_norm`].
    pub unsafe fn losses(&self, p: &Loss) -> Result<(), Error> {
        let blocks = (p.rows as usize).clamp(1, 1 << 16) as u32;
        // SAFETY: promised by the caller.
        unsafe { self.run("losses", 0, Launch::linear(blocks, 256), p) }
    }

    /// The mean of f32 `[rows]`, to y.
    ///
    /// # Safety
    /// As for [`Kernels::rms_norm`].
    ///
    /// # Errors
    /// As for [`Kernels::rms_norm`].
    pub unsafe fn mean(&self, x: u64, rows: usize, y: u64) -> Result<(), Error> {
        let p = Loss { logits: x, losses: y, rows: rows as i64, ..Loss::default() };
        // SAFETY: promised by the caller.
        unsafe { self.run("mean", 0, Launch::linear(1, 256), &p) }
    }

    /// Blocks that an update takes: f64 of its sums.
    pub fn update_blocks(parameters: &[Parameter]) -> usize {
        parameters.iter().map(|parameter| parameter.elements.div_ceil(SHARE)).sum()
    }

    /// An AdamW step of all parameters. The norm of the mean gradient goes to `norm`, f64; `sums` is
    /// f64 `[update_blocks]`. Where the norm is not finite nothing changes.
    ///
    /// # Safety
    /// As for [`Kernels::rms_norm`].
    ///
    /// # Errors
    /// As for [`Kernels::rms_norm`].
    pub unsafe fn update(
        &self,
        parameters: &[Parameter],
        step: &Step,
        sums: u64,
        norm: u64,
    ) -> Result<(), Error> {
        // SAFETY: promised by the caller.
        unsafe {
            self.each_group("squares", parameters, step, sums, norm)?;
            let all = group(&[], step, sums, norm, Self::update_blocks(parameters));
            self.run("gradient_norm", 0, Launch::linear(1, 256), &all)?;
            self.each_group("adamw", parameters, step, sums, norm)
        }
    }

    /// Adds each gradient to what `first` names.
    ///
    /// # Safety
    /// As for [`Kernels::rms_norm`].
    ///
    /// # Errors
    /// As for [`Kernels::rms_norm`].
    pub unsafe fn add(&self, parameters: &[Parameter]) -> Result<(), Error> {
        // SAFETY: promised by the caller.
        unsafe { self.each_group("add_gradients", parameters, &Step::default(), 0, 0) }
    }

    /// # Safety
    /// As for [`Kernels::rms_norm`].
    unsafe fn each_group(
        &self,
        name: &'static str,
        parameters: &[Parameter],
        step: &Step,
        sums: u64,
        norm: u64,
    ) -> Result<(), Error> {
        let blocks = Self::update_blocks(parameters);
        let mut done = 0;
        for some in parameters.chunks(PARTS) {
            let p = RawUpdate { block: done as i32, ..group(some, step, sums, norm, blocks) };
            let here = Self::update_blocks(some);
            // SAFETY: promised by the caller.
            unsafe { self.run(name, 0, Launch::linear(here as u32, 256), &p)? };
            done += here;
        }
        Ok(())
    }
}

fn group(some: &[Parameter], step: &Step, sums: u64, norm: u64, blocks: usize) -> RawUpdate {
    let mut parts = [RawPart::default(); PARTS];
    let mut block = 0;
    for (part, parameter) in parts.iter_mut().zip(some) {
        *part = RawPart {
            weights: parameter.weights,
            gradient: parameter.gradient,
            first: parameter.first,
            second: parameter.second,
            n: parameter.elements as i64,
            block: block as i32,
            decays: parameter.decays.into(),
        };
        block += parameter.elements.div_ceil(SHARE);
    }
    let Step { each, clip, beta1, beta2, keep, rate, root } = *step;
    RawUpdate {
        parts,
        sums,
        norm,
        count: some.len() as i32,
        block: 0,
        blocks: blocks as i32,
        each,
        clip,
        beta1,
        beta2,
        keep,
        rate,
        root,
    }
}

#[cfg(test)]
#[path = "kernels_tests.rs"]
mod tests;
