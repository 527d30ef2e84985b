//! Every operation against finite differences and against candle's own small operations.

mod common;

use candle_core::{D, DType, Device, Result, Tensor};
use common::{assert_close, check, f64s, gradients, normal, rng};
use rand::Rng;
use sata_candle::*;

fn composed_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let r = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&r)?.broadcast_mul(weight)
}

fn composed_log_softmax(x: &Tensor) -> Result<Tensor> {
    let total = x.exp()?.sum_keepdim(D::Minus1)?.log()?;
    x.broadcast_sub(&total)
}

#[test]
fn norms() {
    let mut rng = rng();
    for n in [1, 5, 16, 37] {
        let inputs = [normal(&mut rng, &[2, 3, n]), normal(&mut rng, &[n])];
        check(
            "rms_norm",
            &mut rng,
            &inputs,
            &|x| rms_norm(&x[0], &x[1], 0.1),
            Some(&|x| composed_norm(&x[0], &x[1], 0.1)),
        );
    }
    // Two heads, one key and one value of five elements; the value is left alone.
    let inputs = [normal(&mut rng, &[2, 3, 20]), normal(&mut rng, &[5]), normal(&mut rng, &[5])];
    check(
        "head_norm",
        &mut rng,
        &inputs,
        &|x| head_norm(&x[0], &x[1], &x[2], 2, 1, 0.1),
        Some(&|x| {
            let x0 = x[0].reshape((2, 3, 4, 5))?;
            let q = composed_norm(&x0.narrow(2, 0, 2)?, &x[1], 0.1)?;
            let k = composed_norm(&x0.narrow(2, 2, 1)?, &x[2], 0.1)?;
            Tensor::cat(&[&q, &k, &x0.narrow(2, 3, 1)?], 2)?.reshape((2, 3, 20))
        }),
    );
}

#[test]
fn softmaxes() {
    let mut rng = rng();
    for n in [1, 2, 16, 41] {
        let x = [normal(&mut rng, &[3, n])];
        check(
            "softmax",
            &mut rng,
            &x,
            &|x| softmax(&x[0]),
            Some(&|x| composed_log_softmax(&x[0])?.exp()),
        );
        let log: common::Function = &|x| composed_log_softmax(&x[0]);
        check("log_softmax", &mut rng, &x, &|x| log_softmax(&x[0]), Some(log));
    }
}

#[test]
fn softmax_of_extremes() {
    let x = Tensor::new(&[[1e4f32, -1e4, f32::NEG_INFINITY], [0.0, f32::NAN, 1.0]], &Device::Cpu);
    let x = x.unwrap();
    let y = f64s(&softmax(&x).unwrap());
    assert_eq!(y[..3], [1.0, 0.0, 0.0]);
    assert!(y[3..].iter().all(|y| y.is_nan()), "a NaN is not hidden: {y:?}");
    let log = f64s(&log_softmax(&x).unwrap());
    assert_eq!(log[..3], [0.0, -2e4, f64::NEG_INFINITY]);
    assert!(log[3..].iter().all(|y| y.is_nan()), "{log:?}");
    let nothing = Tensor::new(&[[f32::NEG_INFINITY; 3]], &Device::Cpu).unwrap();
    assert!(f64s(&softmax(&nothing).unwrap()).iter().all(|y| y.is_nan()));
}

#[test]
fn activations() {
    let mut rng = rng();
    for m in [1, 16, 21] {
        let x = [normal(&mut rng, &[2, 3, 2 * m])];
        let composed: common::Function = &move |x| {
            let (a, b) = (x[0].narrow(2, 0, m)?, x[0].narrow(2, m, m)?);
            let sigmoid = (a.neg()?.exp()? + 1.0)?.recip()?;
            a.mul(&sigmoid)?.mul(&b)
        };
        check("swiglu", &mut rng, &x, &|x| swiglu(&x[0]), Some(composed));
    }
    let x = [normal(&mut rng, &[4, 9])];
    let composed: common::Function = &|x| (x[0].neg()?.exp()? + 1.0)?.log()?.neg();
    check("log_sigmoid", &mut rng, &x, &|x| log_sigmoid(&x[0]), Some(composed));
    for dtype in [DType::F32, DType::F64] {
        let ends = [-1e30f64, -200.0, 0.0, 200.0, f64::NAN];
        let ends = Tensor::new(&ends, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let (y, dy) = gradients(&[ends], None, &|x| log_sigmoid(&x[0]));
        assert!(y.is_nan());
        let dy = f64s(&dy[0]);
        assert_eq!((dy[0], dy[2]), (1.0, 0.5));
        assert!(dy[1] == 1.0 && dy[3] < 1e-30 && dy[4].is_nan(), "{dy:?}");
    }
}

#[test]
fn cross_entropies() {
    let mut rng = rng();
    for vocab in [2, 19, 64] {
        let targets: Vec<u32> = (0..6).map(|_| rng.random_range(0..vocab as u32)).collect();
        let targets = Tensor::new(targets, &Device::Cpu).unwrap();
        let composed = |logits: &Tensor| {
            let log = composed_log_softmax(logits)?.reshape((6, vocab))?;
            log.gather(&targets.reshape((6, 1))?, 1)?.mean_all()?.neg()
        };
        let logits = [normal(&mut rng, &[2, 3, vocab])];
        check(
            "cross_entropy",
            &mut rng,
            &logits,
            &|x| cross_entropy(&x[0], &targets),
            Some(&|x| composed(&x[0])),
        );
        let inputs = [normal(&mut rng, &[2, 3, 5]), normal(&mut rng, &[vocab, 5])];
        check(
            "projected_cross_entropy",
            &mut rng,
            &inputs,
            &|x| projected_cross_entropy(&x[0], &x[1], &targets),
            Some(&|x| composed(&x[0].reshape((6, 5))?.matmul(&x[1].t()?)?)),
        );
    }
}

#[test]
fn projected_cross_entropy_takes_rows_in_parts() {
    let mut rng = rng();
    let (rows, vocab) = (301, 5000);
    let targets: Vec<u32> = (0..rows).map(|_| rng.random_range(0..vocab as u32)).collect();
    let targets = Tensor::new(targets, &Device::Cpu).unwrap();
    let inputs = [normal(&mut rng, &[rows, 8]), normal(&mut rng, &[vocab, 8])];
    let (got, got_gradients) =
        gradients(&inputs, None, &|x| projected_cross_entropy(&x[0], &x[1], &targets));
    let (want, want_gradients) =
        gradients(&inputs, None, &|x| cross_entropy(&linear(&x[0], &x[1])?, &targets));
    assert!((got - want).abs() < 1e-12 * want);
    for (got, want) in got_gradients.iter().zip(&want_gradients) {
        assert_close("in parts", got, want, 1e-12);
    }
    let alone = projected_cross_entropy(&inputs[0], &inputs[1], &targets).unwrap();
    assert_eq!(f64s(&alone)[0], got, "without gradients");
}

#[test]
fn rotations() {
    let mut rng = rng();
    let x = [normal(&mut rng, &[2, 5, 14])];
    let composed: common::Function = &|x| {
        // Complex numbers a + ib of halves, times e^(i·angle).
        let heads = x[0].narrow(2, 0, 12)?.reshape((2, 5, 3, 4))?;
        let (a, b) = (heads.narrow(3, 0, 2)?, heads.narrow(3, 2, 2)?);
        let angles: Vec<f64> =
            (0..5).flat_map(|t| [(7 + t) as f64, (7 + t) as f64 / 10.0]).collect();
        let angles = Tensor::from_vec(angles, (1, 5, 1, 2), &Device::Cpu)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let real = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let imaginary = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        let turned = Tensor::cat(&[real, imaginary], 3)?.reshape((2, 5, 12))?;
        Tensor::cat(&[turned, x[0].narrow(2, 12, 2)?], 2)
    };
    check("rotary", &mut rng, &x, &|x| rotary(&x[0], 4, 3, 7, 100.0), Some(composed));
}

#[test]
fn products() {
    let mut rng = rng();
    for [rows, inputs, outputs] in [[1, 1, 1], [6, 5, 7], [33, 17, 20]] {
        let all = [
            normal(&mut rng, &[1, rows, inputs]),
            normal(&mut rng, &[outputs, inputs]),
            normal(&mut rng, &[1, rows, outputs]),
        ];
        let composed: common::Function = &|x| x[0].broadcast_matmul(&x[1].t()?);
        let with: common::Function = &|x| x[0].broadcast_matmul(&x[1].t()?)? + &x[2];
        check("linear", &mut rng, &all[..2], &|x| linear(&x[0], &x[1]), Some(composed));
        check("linear_add", &mut rng, &all, &|x| linear_add(&x[0], &x[1], &x[2]), Some(with));
    }
}

#[test]
fn embeddings() {
    let mut rng = rng();
    let tokens = Tensor::new(&[[3u32, 0, 3], [1, 3, 2]], &Device::Cpu).unwrap();
    let weight = [normal(&mut rng, &[5, 4])];
    let composed: common::Function =
        &|x| x[0].index_select(&tokens.flatten_all()?, 0)?.reshape((2, 3, 4));
    check("embedding", &mut rng, &weight, &|x| embedding(&x[0], &tokens), Some(composed));
}

#[test]
fn strided_inputs_and_frozen_weights() {
    let mut rng = rng();
    let x = [normal(&mut rng, &[6, 4]), normal(&mut rng, &[6])];
    check(
        "rms_norm of a transposed tensor",
        &mut rng,
        &x,
        &|x| rms_norm(&x[0].t()?, &x[1], 1e-5)?.t(),
        Some(&|x| composed_norm(&x[0].t()?, &x[1], 1e-5)?.t()),
    );
    let weight = normal(&mut rng, &[3, 4]);
    check(
        "a frozen weight",
        &mut rng,
        &x[..1],
        &|x| linear(&x[0], &weight.to_dtype(x[0].dtype())?),
        None,
    );
    let frozen = normal(&mut rng, &[2, 4]);
    check(
        "a frozen input",
        &mut rng,
        &[weight],
        &|x| linear(&frozen.to_dtype(x[0].dtype())?, &x[0]),
        None,
    );
}

#[test]
fn threads_change_nothing() {
    let mut rng = rng();
    let (n, vocab) = (300, 700);
    let x = normal(&mut rng, &[400, n]);
    let weight = normal(&mut rng, &[n]);
    let table = normal(&mut rng, &[vocab, n]);
    let targets: Vec<u32> = (0..400).map(|_| rng.random_range(0..vocab as u32)).collect();
    let targets = Tensor::new(targets, &Device::Cpu).unwrap();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            gradients(&[x.clone(), weight.clone(), table.clone()], None, &|x| {
                let y = rms_norm(&x[0], &x[1], 1e-5)?;
                let y = rotary(&softmax(&swiglu(&y)?)?.unsqueeze(0)?, 10, 3, 0, 100.0)?;
                let table = x[2].narrow(1, 0, n / 2)?.contiguous()?;
                let loss = projected_cross_entropy(&y, &table, &targets)?;
                loss + cross_entropy(&linear(&y, &table)?, &targets)?
            })
        })
    };
    let (one, three) = (run(1), run(3));
    assert!((one.0 - three.0).abs() <= 1e-13 * one.0);
    for (one, three) in one.1.iter().zip(&three.1) {
        assert_close("three threads", three, one, 1e-12);
    }
}
