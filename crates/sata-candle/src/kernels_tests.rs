//! Kernels in the emulator, against the operations of the CPU. Emulated memory is the process's own.

use candle_core::{CpuStorage, Storage, Tensor, Var};
use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use sata_cuda::{Buffer, Plain};

use super::*;
use crate::{cross_entropy, embedding, head_norm, log_gates, rms_norm, rotary, swiglu};

/// Of what is rounded to bf16 once.
const HALF: f64 = 4e-3;
/// Of f32 sums.
const SINGLE: f64 = 2e-6;

struct Fixture {
    kernels: Kernels,
    rng: StdRng,
}

impl Fixture {
    fn new() -> Self {
        let device = Device::emulated().expect("the emulator needs a C++ compiler");
        Fixture { kernels: Kernels::new(&device), rng: StdRng::seed_from_u64(7) }
    }

    /// Numbers that bf16 has.
    fn numbers(&mut self, n: usize) -> Vec<f32> {
        let mut draw = || bf16::from_f32(self.rng.sample(StandardNormal)).to_f32();
        (0..n).map(|_| draw()).collect()
    }

    fn up<T: Plain>(&self, values: &[T]) -> Buffer<T> {
        Buffer::from_slice(self.kernels.device(), values).unwrap()
    }

    fn halves(&self, values: &[f32]) -> Buffer<bf16> {
        self.up(&values.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>())
    }

    fn room<T: Plain>(&self, n: usize) -> Buffer<T> {
        Buffer::uninit(self.kernels.device(), n).unwrap()
    }
}

fn single(x: &Buffer<bf16>) -> Vec<f32> {
    x.to_vec().unwrap().into_iter().map(bf16::to_f32).collect()
}

fn var(values: &[f32], shape: &[usize]) -> Var {
    let device = candle_core::Device::Cpu;
    Var::from_tensor(&Tensor::from_slice(values, shape, &device).unwrap()).unwrap()
}

fn values(x: &Tensor) -> Vec<f32> {
    let (storage, _) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(x)) => x.clone(),
        _ => panic!("not on the CPU"),
    }
}

/// Root mean square of the difference over that of what is wanted.
fn near(what: &str, got: &[f32], want: &[f32], bound: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let (mut off, mut all) = (0.0, 0.0);
    for (&a, &b) in got.iter().zip(want) {
        off += f64::from(a - b).powi(2);
        all += f64::from(b).powi(2);
    }
    let error = (off / all.max(1e-30)).sqrt();
    assert!(error <= bound, "{what}: {error:e} above {bound:e}");
}

/// Outputs and gradients of Σ dy·y.
fn graph(y: &Tensor, dy: &[f32], vars: &[&Var]) -> Vec<Vec<f32>> {
    let dy = Tensor::from_slice(dy, y.shape(), y.device()).unwrap();
    let gradients = (y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    let mut all = vec![values(&y.contiguous().unwrap())];
    all.extend(vars.iter().map(|var| values(gradients.get(var).unwrap())));
    all
}

#[test]
fn rms_norms() {
    let mut f = Fixture::new();
    let (rows, n, eps) = (37, 40, 1e-5);
    let (x, w, dy) = (f.numbers(rows * n), f.numbers(n), f.numbers(rows * n));
    let (vx, vw) = (var(&x, &[rows, n]), var(&w, &[n]));
    let want = graph(&rms_norm(&vx, &vw, eps).unwrap(), &dy, &[&vx, &vw]);
    let (bx, bw, bdy) = (f.up(&x), f.up(&w), f.halves(&dy));
    let (y, dx, dw) = (f.room::<bf16>(rows * n), f.room::<f32>(rows * n), f.room::<f32>(n));
    let parts = f.room::<f32>(f.kernels.parts(rows) * n);
    let p = Norm {
        x: bx.address(),
        weight: bw.address(),
        dy: bdy.address(),
        y: y.address(),
        dx: dx.address(),
        parts: parts.address(),
        rows: rows as i64,
        n: n as i32,
        eps: eps as f32,
    };
    // SAFETY: buffers of these sizes.
    unsafe {
        f.kernels.rms_norm(&p).unwrap();
        f.kernels.rms_norm_back(&p, dw.address()).unwrap();
    }
    near("y", &single(&y), &want[0], HALF);
    near("dx", &dx.to_vec().unwrap(), &want[1], SINGLE);
    near("dw", &dw.to_vec().unwrap(), &want[2], SINGLE);
}

#[test]
fn norms_and_rotation_of_heads() {
    let mut f = Fixture::new();
    for (d, heads, kv_heads) in [(8, 4, 2), (16, 2, 2), (32, 3, 1)] {
        let (batch, tokens, eps) = (2, 19, 1e-5);
        let (rows, width) = (batch * tokens, (heads + 2 * kv_heads) * d);
        let (x, dy) = (f.numbers(rows * width), f.numbers(rows * width));
        let (qw, kw) = (f.numbers(d), f.numbers(d));
        let shape = [batch, tokens, width];
        let (vx, vq, vk) = (var(&x, &shape), var(&qw, &[d]), var(&kw, &[d]));
        let y = head_norm(&vx, &vq, &vk, heads, kv_heads, eps).unwrap();
        let want = graph(&y, &dy, &[&vx, &vq, &vk]);
        let (bx, bq, bk, bdy) = (f.halves(&x), f.up(&qw), f.up(&kw), f.halves(&dy));
        let (y, dx) = (f.room::<bf16>(rows * width), f.room::<bf16>(rows * width));
        let (dq, dk) = (f.room::<f32>(d), f.room::<f32>(d));
        let parts = f.room::<f32>(2 * f.kernels.parts(rows) * d);
        let p = HeadNorm {
            x: bx.address(),
            q_weight: bq.address(),
            k_weight: bk.address(),
            dy: bdy.address(),
            y: y.address(),
            dx: dx.address(),
            parts: parts.address(),
            rows: rows as i64,
            heads: heads as i32,
            kv_heads: kv_heads as i32,
            width: width as i32,
            eps: eps as f32,
        };
        // SAFETY: buffers of these sizes.
        unsafe {
            f.kernels.head_norm(d, &p).unwrap();
            f.kernels.head_norm_back(d, &p, [dq.address(), dk.address()]).unwrap();
        }
        near("y", &single(&y), &want[0], HALF);
        near("dx", &single(&dx), &want[1], HALF);
        near("dq", &dq.to_vec().unwrap(), &want[2], SINGLE);
        near("dk", &dk.to_vec().unwrap(), &want[3], SINGLE);

        let turned = rotary(&vx, d, heads + kv_heads, 0, 1e4).unwrap();
        let want = graph(&turned, &dy, &[&vx]);
        let table: Vec<f32> = (0..tokens)
            .flat_map(|t| {
                (0..d / 2).map(move |i| t as f64 * 1e4f64.powf(-2.0 * i as f64 / d as f64))
            })
            .flat_map(|angle| [angle.cos() as f32, angle.sin() as f32])
            .collect();
        let table = f.up(&table);
        let forwards = Rotate {
            x: bx.address(),
            table: table.address(),
            y: y.address(),
            rows: rows as i64,
            tokens: tokens as i64,
            heads: (heads + kv_heads) as i32,
            width: width as i32,
            sign: 1.0,
            padding: 0,
        };
        let back = Rotate { x: bdy.address(), y: dx.address(), sign: -1.0, ..forwards };
        // SAFETY: buffers of these sizes.
        unsafe {
            f.kernels.rotate(d, &forwards).unwrap();
            f.kernels.rotate(d, &back).unwrap();
        }
        near("turned", &single(&y), &want[0], HALF);
        near("turned back", &single(&dx), &want[1], HALF);
    }
}

#[test]
fn rows_of_activations_and_gates() {
    let mut f = Fixture::new();
    let (rows, n) = (29, 24);
    let (x, dy) = (f.numbers(rows * 2 * n), f.numbers(rows * n));
    let vx = var(&x, &[rows, 2 * n]);
    let want = graph(&swiglu(&vx).unwrap(), &dy, &[&vx]);
    let (bx, bdy) = (f.halves(&x), f.halves(&dy));
    let (y, dx) = (f.room::<bf16>(rows * n), f.room::<bf16>(rows * 2 * n));
    let p = Rows {
        x: bx.address(),
        dy: bdy.address(),
        y: y.address(),
        dx: dx.address(),
        rows: rows as i64,
        n: n as i64,
        ..Rows::default()
    };
    // SAFETY: buffers of these sizes.
    unsafe {
        f.kernels.rows("swiglu", rows * n / 4, &p).unwrap();
        f.kernels.rows("swiglu_back", rows * n / 4, &p).unwrap();
    }
    near("swiglu", &single(&y), &want[0], HALF);
    near("swiglu back", &single(&dx), &want[1], HALF);

    // Gates whose map is the identity, so that the gradient by x is that by the logits.
    let (x, bias, dy) = (f.numbers(rows * n), f.numbers(n), f.numbers(rows * n));
    let identity: Vec<f32> = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let (vx, vw, vb) = (var(&x, &[rows, n]), var(&identity, &[n, n]), var(&bias, &[n]));
    let want = graph(&log_gates(&vx, &vw, &vb).unwrap(), &dy, &[&vx, &vb]);
    let (bx, bb, bdy) = (f.up(&x), f.up(&bias), f.up(&dy));
    let (y, dx, db) = (f.room::<f32>(rows * n), f.room::<bf16>(rows * n), f.room::<f32>(n));
    let parts = f.room::<f32>(f.kernels.parts(rows) * n);
    let p = Rows {
        x: bx.address(),
        bias: bb.address(),
        dy: bdy.address(),
        y: y.address(),
        dx: dx.address(),
        parts: parts.address(),
        rows: rows as i64,
        n: n as i64,
    };
    // SAFETY: buffers of these sizes.
    unsafe {
        f.kernels.rows("log_gates", rows * n, &p).unwrap();
        f.kernels.log_gates_back(&p, db.address()).unwrap();
    }
    near("gates", &y.to_vec().unwrap(), &want[0], SINGLE);
    near("gates back", &single(&dx), &want[1], HALF);
    near("bias", &db.to_vec().unwrap(), &want[2], SINGLE);
    let half = f.room::<bf16>(rows * n);
    let p = Rows { x: bx.address(), y: half.address(), rows: (rows * n) as i64, ..p };
    // SAFETY: buffers of these sizes.
    unsafe { f.kernels.rows("to_bf16", rows * n, &p).unwrap() };
    assert_eq!(single(&half), x);
}

#[test]
fn tables_and_losses() {
    let mut f = Fixture::new();
    let (rows, vocab, n) = (300, 11, 24);
    // One token is most of them, one is never there.
    let tokens: Vec<u32> = (0..rows as u32).map(|i| if i % 3 == 0 { i % 10 } else { 4 }).collect();
    let (table, dy) = (f.numbers(vocab * n), f.numbers(rows * n));
    let vt = var(&table, &[vocab, n]);
    let ids = Tensor::from_slice(&tokens, rows, &candle_core::Device::Cpu).unwrap();
    let want = graph(&embedding(&vt, &ids).unwrap(), &dy, &[&vt]);
    let order = Order::new(&tokens, vocab);
    let segments = order.segments.len() - 1;
    assert_eq!(order.firsts.len(), vocab + 1);
    assert!(order.segments.windows(2).all(|two| two[0] < two[1] && two[1] - two[0] <= 32));
    let (bt, bdy, bids) = (f.up(&table), f.up(&dy), f.up(&tokens));
    let lists = [&order.rows, &order.segments, &order.firsts].map(|list| f.up(list));
    let (y, dw) = (f.room::<f32>(rows * n), f.room::<f32>(vocab * n));
    let parts = f.room::<f32>(segments * n);
    let p = Embed {
        table: bt.address(),
        tokens: bids.address(),
        order: lists[0].address(),
        segments: lists[1].address(),
        firsts: lists[2].address(),
        dy: bdy.address(),
        parts: parts.address(),
        y: y.address(),
        rows: rows as i64,
        vocab: vocab as i64,
        n: n as i64,
    };
    // SAFETY: buffers of these sizes.
    unsafe {
        f.kernels.embed(&p).unwrap();
        f.kernels.embed_back(&Embed { y: dw.address(), ..p }, segments).unwrap();
    }
    near("rows", &y.to_vec().unwrap(), &want[0], 0.0);
    near("table", &dw.to_vec().unwrap(), &want[1], SINGLE);

    let (rows, vocab) = (21, 300);
    let logits: Vec<f32> = f.numbers(rows * vocab).iter().map(|x| 3.0 * x).collect();
    let targets: Vec<u32> = (0..rows as u32).map(|i| i * 13 % vocab as u32).collect();
    let vl = var(&logits, &[rows, vocab]);
    let ids = Tensor::from_slice(&targets, rows, &candle_core::Device::Cpu).unwrap();
    let loss = cross_entropy(&vl, &ids).unwrap();
    let want = values(loss.backward().unwrap().get(&vl).unwrap());
    let (bl, bids) = (f.up(&logits), f.up(&targets));
    let (losses, mean) = (f.room::<f32>(rows), f.room::<f32>(1));
    let gradient = f.room::<bf16>(rows * vocab);
    let p = Loss {
        logits: bl.address(),
        targets: bids.address(),
        losses: losses.address(),
        gradient: gradient.address(),
        rows: rows as i64,
        vocab: vocab as i64,
        gain: 1.0 / rows as f32,
        padding: 0,
    };
    // SAFETY: buffers of these sizes.
    unsafe {
        f.kernels.losses(&p).unwrap();
        f.kernels.mean(losses.address(), rows, mean.address()).unwrap();
    }
    near("loss", &mean.to_vec().unwrap(), &[loss.to_scalar::<f32>().unwrap()], SINGLE);
    near("loss back", &single(&gradient), &want, HALF);
    // A target that is none shows.
    let bad = f.up(&vec![vocab as u32; rows]);
    // SAFETY: buffers of these sizes.
    unsafe { f.kernels.losses(&Loss { targets: bad.address(), ..p }).unwrap() };
    assert!(losses.to_vec().unwrap().iter().all(|x| x.is_nan()));
}

#[test]
fn updates_of_many_parameters() {
    let mut f = Fixture::new();
    let sizes: Vec<usize> =
        (0..PARTS + 3).map(|i| if i == 1 { 2 * SHARE + 5 } else { 3 + i }).collect();
    let weights: Vec<Vec<f32>> = sizes.iter().map(|&n| f.numbers(n)).collect();
    let gradients: Vec<Vec<f32>> = sizes.iter().map(|&n| f.numbers(n)).collect();
    let step =
        Step { each: 0.5, clip: 1.0, beta1: 0.9, beta2: 0.95, keep: 0.999, rate: 0.1, root: 4.0 };
    let (bw, bg): (Vec<_>, Vec<_>) =
        weights.iter().zip(&gradients).map(|(w, g)| (f.up(w), f.up(g))).unzip();
    let zeros = |f: &Fixture| -> Vec<Buffer<f32>> {
        sizes.iter().map(|&n| f.up(&vec![0.0f32; n])).collect()
    };
    let (first, second) = (zeros(&f), zeros(&f));
    let parameters: Vec<Parameter> = (0..sizes.len())
        .map(|i| Parameter {
            weights: bw[i].address(),
            gradient: bg[i].address(),
            first: first[i].address(),
            second: second[i].address(),
            elements: sizes[i],
            decays: i % 2 == 0,
        })
        .collect();
    let (sums, norm) = (f.room::<f64>(Kernels::update_blocks(&parameters)), f.room::<f64>(1));
    // SAFETY: buffers of these sizes.
    unsafe { f.kernels.update(&parameters, &step, sums.address(), norm.address()).unwrap() };
    let squares: f64 = gradients.iter().flatten().map(|&g| f64::from(g).powi(2)).sum();
    let want = 0.5 * squares.sqrt();
    let got = norm.to_vec().unwrap()[0];
    assert!((got - want).abs() < 1e-9 * want, "{got} {want}");
    let scale = (0.5 / want) as f32;
    for i in 0..sizes.len() {
        let after: Vec<f32> = weights[i]
            .iter()
            .zip(&gradients[i])
            .map(|(w, g)| {
                let g = scale * g;
                let (m, v) = (0.1 * g, 0.05 * g * g);
                let keep = if i % 2 == 0 { 0.999 } else { 1.0 };
                keep * w - 0.1 * m / (v.sqrt() * 4.0 + 1e-8)
            })
            .collect();
        near("weights", &bw[i].to_vec().unwrap(), &after, SINGLE);
    }
    // Nothing changes by a gradient that is not finite.
    let before = bw[2].to_vec().unwrap();
    let bad = f.up(&vec![f32::NAN; sizes[2]]);
    let mut odd = parameters.clone();
    odd[2].gradient = bad.address();
    // SAFETY: buffers of these sizes.
    unsafe { f.kernels.update(&odd, &step, sums.address(), norm.address()).unwrap() };
    assert!(norm.to_vec().unwrap()[0].is_nan());
    assert_eq!(bw[2].to_vec().unwrap(), before);
    // Sums.
    // SAFETY: buffers of these sizes.
    unsafe {
        let sums: Vec<Parameter> =
            parameters.iter().map(|p| Parameter { first: p.weights, ..*p }).collect();
        f.kernels.add(&sums).unwrap();
    }
    let sum: Vec<f32> = before.iter().zip(&gradients[2]).map(|(a, b)| a + b).collect();
    assert_eq!(bw[2].to_vec().unwrap(), sum);
}
