//! Forward and backward passes of operations, on storages and tensors of a GPU.

use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Tensor};
use half::bf16;

use super::gemm::{Matrix, Out};
use super::{Gpu, address_of, device_of, failed, gpu, place, place_of, room, tensor};
use crate::error;
use crate::kernels::{Embed, HeadNorm, Loss, Norm, Order, Rotate, Rows};

type On<'a> = (&'a CudaStorage, &'a Layout);

/// Logits that are held at once, about.
const LOGITS: usize = 1 << 27;

fn stored<T: candle_core::cuda_backend::CudaDType>(
    slice: candle_core::cuda_backend::cudarc::driver::CudaSlice<T>,
    device: &CudaDevice,
    shape: impl Into<Shape>,
) -> (CudaStorage, Shape) {
    (CudaStorage::wrap_cuda_slice(slice, device.clone()), shape.into())
}

/// Rows are copied and multiplied eight elements at a time.
fn check_eights(op: &'static str, argument: &'static str, n: usize) -> Result<()> {
    if n.is_multiple_of(8) {
        return Ok(());
    }
    Err(error::value(op, argument, n, "on a GPU it must be a multiple of 8"))
}

/// A bf16 copy of f32 numbers.
pub(crate) fn halves(gpu: &Gpu, from: u64, elements: usize, shape: &[usize]) -> Result<Tensor> {
    let y = room::<bf16>(&gpu.candle, elements)?;
    let rows = Rows { x: from, y: address_of(&y), rows: elements as i64, n: 1, ..Rows::default() };
    let _time = gpu.profile.time(&gpu.device, "casts")?;
    // SAFETY: both have so many elements.
    unsafe { gpu.kernels.rows("to_bf16", elements, &rows) }.map_err(failed)?;
    Ok(tensor(y, &gpu.candle, shape))
}

pub(crate) fn rms_norm(x: On, weight: On, eps: f64) -> Result<(CudaStorage, Shape)> {
    let op = "rms_norm";
    let device = x.0.device();
    let gpu = gpu(device)?;
    let (at, weight) =
        (place(op, x.0, x.1, DType::F32)?, place(op, weight.0, weight.1, DType::F32)?);
    let n = weight.elements;
    let y = room::<bf16>(device, at.elements)?;
    let norm = Norm {
        x: at.address,
        weight: weight.address,
        y: address_of(&y),
        rows: (at.elements / n) as i64,
        n: n as i32,
        eps: eps as f32,
        ..Norm::default()
    };
    let _time = gpu.profile.time(&gpu.device, "norms")?;
    // SAFETY: as large as they say.
    unsafe { gpu.kernels.rms_norm(&norm) }.map_err(failed)?;
    Ok(stored(y, device, x.1.shape().clone()))
}

pub(crate) fn rms_norm_back(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    dy: &Tensor,
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let op = "rms_norm";
    let device = device_of(op, x)?;
    let gpu = gpu(&device)?;
    let at = place_of(op, x, DType::F32)?;
    let (w, g) = (place_of(op, weight, DType::F32)?, place_of(op, dy, DType::BF16)?);
    let (n, rows) = (w.elements, at.elements / w.elements);
    let (dx, dw) = (room::<f32>(&device, at.elements)?, room::<f32>(&device, n)?);
    let parts = room::<f32>(&device, gpu.kernels.parts(rows) * n)?;
    let norm = Norm {
        x: at.address,
        weight: w.address,
        dy: g.address,
        dx: address_of(&dx),
        parts: address_of(&parts),
        rows: rows as i64,
        n: n as i32,
        eps: eps as f32,
        ..Norm::default()
    };
    let _time = gpu.profile.time(&gpu.device, "norms, backward")?;
    // SAFETY: as large as they say.
    unsafe { gpu.kernels.rms_norm_back(&norm, address_of(&dw)) }.map_err(failed)?;
    Ok((Some(tensor(dx, &device, x.shape())), Some(tensor(dw, &device, weight.shape()))))
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    pub width: usize,
    pub eps: f64,
}

pub(crate) fn head_norm(x: On, q: On, k: On, sizes: Heads) -> Result<(CudaStorage, Shape)> {
    let op = "head_norm";
    check_eights(op, "the width of qkv", sizes.width)?;
    let device = x.0.device();
    let gpu = gpu(device)?;
    let at = place(op, x.0, x.1, DType::BF16)?;
    let (q, k) = (place(op, q.0, q.1, DType::F32)?, place(op, k.0, k.1, DType::F32)?);
    check_eights(op, "a head's size", q.elements)?;
    let y = room::<bf16>(device, at.elements)?;
    let norm = HeadNorm {
        x: at.address,
        q_weight: q.address,
        k_weight: k.address,
        y: address_of(&y),
        rows: (at.elements / sizes.width) as i64,
        heads: sizes.heads as i32,
        kv_heads: sizes.kv_heads as i32,
        width: sizes.width as i32,
        eps: sizes.eps as f32,
        ..HeadNorm::default()
    };
    let _time = gpu.profile.time(&gpu.device, "norms of heads")?;
    // SAFETY: as large as they say.
    unsafe { gpu.kernels.head_norm(q.elements, &norm) }.map_err(failed)?;
    Ok(stored(y, device, x.1.shape().clone()))
}

pub(crate) fn head_norm_back(
    x: &Tensor,
    q_weight: &Tensor,
    k_weight: &Tensor,
    sizes: Heads,
    dy: &Tensor,
) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
    let op = "head_norm";
    let device = device_of(op, x)?;
    let gpu = gpu(&device)?;
    let (at, g) = (place_of(op, x, DType::BF16)?, place_of(op, dy, DType::BF16)?);
    let (q, k) = (place_of(op, q_weight, DType::F32)?, place_of(op, k_weight, DType::F32)?);
    let (d, rows) = (q.elements, at.elements / sizes.width);
    let dx = room::<bf16>(&device, at.elements)?;
    let (dq, dk) = (room::<f32>(&device, d)?, room::<f32>(&device, d)?);
    let parts = room::<f32>(&device, 2 * gpu.kernels.parts(rows) * d)?;
    let norm = HeadNorm {
        x: at.address,
        q_weight: q.address,
        k_weight: k.address,
        dy: g.address,
        dx: address_of(&dx),
        parts: address_of(&parts),
        rows: rows as i64,
        heads: sizes.heads as i32,
        kv_heads: sizes.kv_heads as i32,
        width: sizes.width as i32,
        eps: sizes.eps as f32,
        ..HeadNorm::default()
    };
    let _time = gpu.profile.time(&gpu.device, "norms of heads, backward")?;
    // SAFETY: as large as they say.
    unsafe { gpu.kernels.head_norm_back(d, &norm, [address_of(&dq), address_of(&dk)]) }
        .map_err(failed)?;
    Ok((
        Some(tensor(dx, &device, x.shape())),
        Some(tensor(dq, &device, q_weight.shape())),
        Some(tensor(dk, &device, k_weight.shape())),
    ))
}

/// Heads that are turned, and by what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn {
    pub head_dim: usize,
    pub heads: usize,
    pub tokens: usize,
    pub width: usize,
    pub first: usize,
    pub base: f64,
}

impl Turn {
    /// Cosines and sines, `[tokens, head_dim/2, 2]`.
    fn table(&self, gpu: &Gpu) -> Result<Tensor> {
        let Turn { head_dim: d, tokens, first, base, .. } = *self;
        gpu.table(format!("rotary {d} {tokens} {first} {base}"), || {
            let turns: Vec<f64> =
                (0..d / 2).map(|i| base.powf(-2.0 * i as f64 / d as f64)).collect();
            let table: Vec<f32> = (first..first + tokens)
                .flat_map(|t| turns.iter().map(move |turn| t as f64 * turn))
                .flat_map(|angle| [angle.cos() as f32, angle.sin() as f32])
                .collect();
            let device = candle_core::Device::Cuda(gpu.candle.clone());
            Tensor::from_vec(table, (tokens, d / 2, 2), &device)
        })
    }

    fn run(&self, gpu: &Gpu, x: u64, y: u64, elements: usize, sign: f32) -> Result<()> {
        let table = self.table(gpu)?;
        let rotate = Rotate {
            x,
            table: place_of("rotary", &table, DType::F32)?.address,
            y,
            rows: (elements / self.width) as i64,
            tokens: self.tokens as i64,
            heads: self.heads as i32,
            width: self.width as i32,
            sign,
            padding: 0,
        };
        let _time = gpu.profile.time(&gpu.device, "rotary")?;
        // SAFETY: as large as they say.
        unsafe { gpu.kernels.rotate(self.head_dim, &rotate) }.map_err(failed)
    }

    pub fn forward(&self, x: On) -> Result<(CudaStorage, Shape)> {
        let device = x.0.device();
        let at = place("rotary", x.0, x.1, DType::BF16)?;
        let y = room::<bf16>(device, at.elements)?;
        self.run(&*gpu(device)?, at.address, address_of(&y), at.elements, 1.0)?;
        Ok(stored(y, device, x.1.shape().clone()))
    }

    pub fn backward(&self, dy: &Tensor) -> Result<Tensor> {
        let device = device_of("rotary", dy)?;
        let at = place_of("rotary", dy, DType::BF16)?;
        let dx = room::<bf16>(&device, at.elements)?;
        self.run(&*gpu(&device)?, at.address, address_of(&dx), at.elements, -1.0)?;
        Ok(tensor(dx, &device, dy.shape()))
    }
}

pub(crate) fn swiglu(x: On, m: usize) -> Result<(CudaStorage, Shape)> {
    let op = "swiglu";
    check_eights(op, "half a row", m)?;
    let device = x.0.device();
    let gpu = gpu(device)?;
    let at = place(op, x.0, x.1, DType::BF16)?;
    let y = room::<bf16>(device, at.elements / 2)?;
    let rows = Rows {
        x: at.address,
        y: address_of(&y),
        rows: (at.elements / (2 * m)) as i64,
        n: m as i64,
        ..Rows::default()
    };
    let _time = gpu.profile.time(&gpu.device, "swiglu")?;
    // SAFETY: as large as they say.
    unsafe { gpu.kernels.rows("swiglu", at.elements / 8, &rows) }.map_err(failed)?;
    let mut shape = x.1.dims().to_vec();
    shape.pop();
    shape.push(m);
    Ok(stored(y, device, shape))
}

pub(crate) fn swiglu_back(x: &Tensor, m: usize, dy: &Tensor) -> Result<Tensor> {
    let op = "swiglu";
    let device = device_of(op, x)?;
    let gpu = gpu(&device)?;
    let (at, g) = (place_of(op, x, DType::BF16)?, place_of(op, dy, DType::BF16)?);
    let dx = room::<bf16>(&device, at.elements)?;
    let rows = Rows {
        x: at.address,
        dy: g.address,
        dx: address_of(&dx),
        rows: (at.elements / (2 * m)) as i64,
        n: m as i64,
        ..Rows::default()
    };
    let _time = gpu.profile.time(&gpu.device, "swiglu, backward")?;
    // SAFETY: as large as they say.
    unsafe { gpu.kernels.rows("swiglu_back", at.elements / 8, &rows) }.map_err(failed)?;
    Ok(tensor(dx, &device, x.shape()))
}

/// A linear map in bf16, whose weight was cast once for both passes.
#[derive(Debug, Default)]
pub(crate) struct Map {
    weight: OnceLock<Tensor>,
}

impl Map {
    /// `[out, in]`, bf16.
    fn weight(&self, gpu: &Gpu, from: u64, shape: [usize; 2]) -> Result<u64> {
        if self.weight.get().is_none() {
            let _ = self.weight.set(halves(gpu, from, shape[0] * shape[1], &shape)?);
        }
        match self.weight.get() {
            Some(weight) => Ok(place_of("linear", weight, DType::BF16)?.address),
            None => Err(candle_core::Error::Msg("linear: no weight".into())),
        }
    }

    /// x·weightᵀ as bf16, as f32, or added to a residual that is f32.
    pub fn forward(
        &self,
        x: On,
        weight: On,
        residual: Option<On>,
        single: bool,
    ) -> Result<(CudaStorage, Shape)> {
        let op = "linear";
        let device = x.0.device();
        let gpu = gpu(device)?;
        let at = place(op, x.0, x.1, DType::BF16)?;
        let w = place(op, weight.0, weight.1, DType::F32)?;
        let (out, inputs) = weight.1.shape().dims2()?;
        let rows = at.elements / inputs;
        let w = self.weight(&gpu, w.address, [out, inputs])?;
        let (x_matrix, w) =
            (Matrix::new(at.address, rows, inputs), Matrix::new(w, out, inputs).transposed());
        let mut shape = x.1.dims().to_vec();
        shape.pop();
        shape.push(out);
        if residual.is_none() && !single {
            let y = room::<bf16>(device, rows * out)?;
            // SAFETY: as large as they say.
            unsafe { gpu.product(x_matrix, w, Out::Bf16(address_of(&y)))? };
            return Ok(stored(y, device, shape));
        }
        let mut y = room::<f32>(device, rows * out)?;
        if let Some((storage, layout)) = residual {
            let from = place(op, storage, layout, DType::F32)?;
            let (start, _) = layout.contiguous_offsets().unwrap_or_default();
            let slice = storage.as_cuda_slice::<f32>()?.slice(start..start + from.elements);
            let _time = gpu.profile.time(&gpu.device, "copies of the residual")?;
            device.memcpy_dtod(&slice, &mut y)?;
        }
        let out = Out::F32 { address: address_of(&y), add: residual.is_some() };
        // SAFETY: as large as they say.
        unsafe { gpu.product(x_matrix, w, out)? };
        Ok(stored(y, device, shape))
    }

    /// The gradients of x, bf16, and weight, f32, each where it is wanted.
    pub fn backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let op = "linear";
        let device = device_of(op, x)?;
        let gpu = gpu(&device)?;
        let (out, inputs) = weight.dims2()?;
        let at = place_of(op, x, DType::BF16)?;
        let rows = at.elements / inputs;
        let cast;
        let dy = if dy.dtype() == DType::F32 {
            let from = place_of(op, dy, DType::F32)?;
            cast = halves(&gpu, from.address, from.elements, dy.dims())?;
            &cast
        } else {
            dy
        };
        let g = Matrix::new(place_of(op, dy, DType::BF16)?.address, rows, out);
        let dx = if x.track_op() {
            let w = place_of(op, weight, DType::F32)?;
            let w = Matrix::new(self.weight(&gpu, w.address, [out, inputs])?, out, inputs);
            let dx = room::<bf16>(&device, at.elements)?;
            // SAFETY: as large as they say.
            unsafe { gpu.product(g, w, Out::Bf16(address_of(&dx)))? };
            Some(tensor(dx, &device, x.shape()))
        } else {
            None
        };
        let dw = if weight.track_op() {
            let dw = room::<f32>(&device, out * inputs)?;
            let (x, to) = (
                Matrix::new(at.address, rows, inputs),
                Out::F32 { address: address_of(&dw), add: false },
            );
            // SAFETY: as large as they say.
            unsafe { gpu.product(g.transposed(), x, to)? };
            Some(tensor(dw, &device, weight.shape()))
        } else {
            None
        };
        Ok((dx, dw))
    }
}

/// Logarithms of forget gates, f32, in both passes.
#[derive(Debug, Default)]
pub(crate) struct Gates {
    map: Map,
    /// f32, without bias.
    logits: OnceLock<Tensor>,
}

impl Gates {
    pub fn forward(&self, x: On, weight: On, bias: On) -> Result<(CudaStorage, Shape)> {
        let op = "log_gates";
        let device = x.0.device();
        let gpu = gpu(device)?;
        let bias = place(op, bias.0, bias.1, DType::F32)?;
        let n = bias.elements;
        if n > 256 {
            return Err(error::value(op, "the number of gates", n, "on a GPU it is at most 256"));
        }
        let (logits, shape) = self.map.forward(x, weight, None, true)?;
        let at = place(op, &logits, &Layout::contiguous(&shape), DType::F32)?;
        let y = room::<f32>(device, at.elements)?;
        let rows = Rows {
            x: at.address,
            bias: bias.address,
            y: address_of(&y),
            rows: (at.elements / n) as i64,
            n: n as i64,
            ..Rows::default()
        };
        let _time = gpu.profile.time(&gpu.device, "gates")?;
        // SAFETY: as large as they say.
        unsafe { gpu.kernels.rows("log_gates", at.elements, &rows) }.map_err(failed)?;
        let logits = Tensor::from_storage(
            candle_core::Storage::Cuda(logits),
            shape.clone(),
            candle_core::op::BackpropOp::none(),
            false,
        );
        let _ = self.logits.set(logits);
        Ok(stored(y, device, shape))
    }

    pub fn backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let op = "log_gates";
        let Some(logits) = self.logits.get() else {
            return Ok((None, None, None));
        };
        let device = device_of(op, x)?;
        let gpu = gpu(&device)?;
        let (at, b) = (place_of(op, logits, DType::F32)?, place_of(op, bias, DType::F32)?);
        let (n, rows) = (b.elements, at.elements / b.elements);
        let dx = room::<bf16>(&device, at.elements)?;
        let db = room::<f32>(&device, n)?;
        let parts = room::<f32>(&device, gpu.kernels.parts(rows) * n)?;
        let p = Rows {
            x: at.address,
            bias: b.address,
            dy: place_of(op, dy, DType::F32)?.address,
            y: 0,
            dx: address_of(&dx),
            parts: address_of(&parts),
            rows: rows as i64,
            n: n as i64,
        };
        {
            let _time = gpu.profile.time(&gpu.device, "gates, backward")?;
            // SAFETY: as large as they say.
            unsafe { gpu.kernels.log_gates_back(&p, address_of(&db)) }.map_err(failed)?;
        }
        let d_logits = tensor(dx, &device, logits.shape());
        let (dx, dw) = self.map.backward(x, weight, &d_logits)?;
        Ok((dx, dw, Some(tensor(db, &device, bias.shape()))))
    }
}

/// Rows of a table on the device, by tokens that the host has.
#[derive(Debug, Default)]
pub(crate) struct Lookup {
    /// Tokens, and their order: rows, segments, firsts.
    lists: OnceLock<(Tensor, [usize; 3])>,
}

impl Lookup {
    pub fn forward(
        &self,
        table: On,
        tokens: &[u32],
        shape: &[usize],
    ) -> Result<(CudaStorage, Shape)> {
        let op = "embedding";
        let device = table.0.device();
        let gpu = gpu(device)?;
        let (vocab, n) = table.1.shape().dims2()?;
        let table = place(op, table.0, table.1, DType::F32)?;
        let order = Order::new(tokens, vocab);
        let mut all = tokens.to_vec();
        let mut at = [0; 3];
        for (at, list) in at.iter_mut().zip([&order.rows, &order.segments, &order.firsts]) {
            *at = all.len();
            all.extend_from_slice(list);
        }
        let rows = tokens.len();
        let count = all.len();
        let lists = Tensor::from_vec(all, count, &candle_core::Device::Cuda(device.clone()))?;
        let y = room::<f32>(device, rows * n)?;
        let embed = Embed {
            table: table.address,
            tokens: place_of(op, &lists, DType::U32)?.address,
            y: address_of(&y),
            rows: rows as i64,
            vocab: vocab as i64,
            n: n as i64,
            ..Embed::default()
        };
        let _ = self.lists.set((lists, at));
        let _time = gpu.profile.time(&gpu.device, "embedding")?;
        // SAFETY: as large as they say.
        unsafe { gpu.kernels.embed(&embed) }.map_err(failed)?;
        Ok(stored(y, device, shape.to_vec()))
    }

    pub fn backward(&self, table: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let op = "embedding";
        let Some((lists, [order, segments, firsts])) = self.lists.get() else {
            return Ok(None);
        };
        let device = device_of(op, table)?;
        let gpu = gpu(&device)?;
        let (vocab, n) = table.dims2()?;
        let list = place_of(op, lists, DType::U32)?.address;
        let count = firsts - segments - 1;
        let parts = room::<f32>(&device, count * n)?;
        let dw = room::<f32>(&device, vocab * n)?;
        let embed = Embed {
            order: list + 4 * *order as u64,
            segments: list + 4 * *segments as u64,
            firsts: list + 4 * *firsts as u64,
            dy: place_of(op, dy, DType::F32)?.address,
            parts: address_of(&parts),
            y: address_of(&dw),
            vocab: vocab as i64,
            n: n as i64,
            ..Embed::default()
        };
        let _time = gpu.profile.time(&gpu.device, "embedding, backward")?;
        // SAFETY: as large as they say; the lists are those of the tokens.
        unsafe { gpu.kernels.embed_back(&embed, count) }.map_err(failed)?;
        Ok(Some(tensor(dw, &device, table.shape())))
    }
}

/// Cross entropy of a projection, whose gradients are made with it.
#[derive(Debug, Default)]
pub(crate) struct Head {
    gradients: OnceLock<(Tensor, Tensor)>,
}

impl Head {
    pub fn forward(
        &self,
        hidden: On,
        weight: On,
        targets: &Tensor,
        differentiable: bool,
    ) -> Result<(CudaStorage, Shape)> {
        let op = "projected_cross_entropy";
        let device = hidden.0.device();
        let gpu = gpu(device)?;
        let (vocab, width) = weight.1.shape().dims2()?;
        let h = place(op, hidden.0, hidden.1, DType::BF16)?;
        let w = place(op, weight.0, weight.1, DType::F32)?;
        let t = place_of(op, targets, DType::U32)?;
        let rows = t.elements;
        let cast = halves(&gpu, w.address, vocab * width, &[vocab, width])?;
        let weights = Matrix::new(place_of(op, &cast, DType::BF16)?.address, vocab, width);
        let at_once = (LOGITS / vocab).clamp(1, rows);
        let logits = room::<f32>(device, at_once * vocab)?;
        let losses = room::<f32>(device, rows)?;
        let mean = room::<f32>(device, 1)?;
        let d_logits = room::<bf16>(device, if differentiable { at_once * vocab } else { 1 })?;
        let d_hidden = room::<bf16>(device, if differentiable { rows * width } else { 1 })?;
        let d_weight = room::<f32>(device, if differentiable { vocab * width } else { 1 })?;
        for first in (0..rows).step_by(at_once) {
            let n = at_once.min(rows - first);
            let hidden = Matrix::new(h.address + (2 * first * width) as u64, n, width);
            let loss = Loss {
                logits: address_of(&logits),
                targets: t.address + (4 * first) as u64,
                losses: address_of(&losses) + (4 * first) as u64,
                gradient: if differentiable { address_of(&d_logits) } else { 0 },
                rows: n as i64,
                vocab: vocab as i64,
                gain: 1.0 / rows as f32,
                padding: 0,
            };
            let to = Out::F32 { address: loss.logits, add: false };
            // SAFETY: as large as they say.
            unsafe { gpu.product(hidden, weights.transposed(), to)? };
            {
                let _time = gpu.profile.time(&gpu.device, "cross entropy")?;
                // SAFETY: as large as they say.
                unsafe { gpu.kernels.losses(&loss) }.map_err(failed)?;
            }
            if differentiable {
                let g = Matrix::new(loss.gradient, n, vocab);
                let to = Out::Bf16(address_of(&d_hidden) + (2 * first * width) as u64);
                let sum = Out::F32 { address: address_of(&d_weight), add: first > 0 };
                // SAFETY: as large as they say.
                unsafe {
                    gpu.product(g, weights, to)?;
                    gpu.product(g.transposed(), hidden, sum)?;
                }
            }
        }
        // SAFETY: as large as they say.
        unsafe { gpu.kernels.mean(address_of(&losses), rows, address_of(&mean)) }
            .map_err(failed)?;
        if differentiable {
            let d_hidden = tensor(d_hidden, device, hidden.1.shape());
            let _ = self.gradients.set((d_hidden, tensor(d_weight, device, (vocab, width))));
        }
        Ok(stored(mean, device, ()))
    }

    pub fn backward(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some((d_hidden, d_weight)) = self.gradients.get() else {
            return Ok((None, None));
        };
        let d_hidden = match hidden.track_op() {
            true => Some(d_hidden.broadcast_mul(&dy.to_dtype(DType::BF16)?)?),
            false => None,
        };
        let d_weight = match weight.track_op() {
            true => Some(d_weight.broadcast_mul(dy)?),
            false => None,
        };
        Ok((d_hidden, d_weight))
    }
}
