//! What the operations refuse, and that they say what is wrong.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use sata::{Decay, Plan, Spec};
use sata_candle::*;

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

fn u32s(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::U32, &Device::Cpu).unwrap()
}

#[track_caller]
fn refused(result: Result<Tensor>, says: &[&str]) {
    let error = result.expect_err("it must be refused").to_string();
    for word in says {
        assert!(error.contains(word), "'{error}' does not say '{word}'");
    }
}

#[test]
fn operations() {
    let half = Tensor::zeros((2, 4), DType::F16, &Device::Cpu).unwrap();
    let double = Tensor::zeros((4, 4), DType::F64, &Device::Cpu).unwrap();
    let (x, w) = (zeros(&[2, 4]), zeros(&[4]));
    refused(rms_norm(&x, &zeros(&[3]), 1e-5), &["rms_norm: weight", "[3]", "[4]"]);
    refused(rms_norm(&x, &w, -1.0), &["eps is -1"]);
    refused(rms_norm(&x, &w, f64::NAN), &["eps is NaN"]);
    refused(rms_norm(&zeros(&[2, 0]), &zeros(&[0]), 1e-5), &["x has shape [2, 0]"]);
    refused(rms_norm(&half, &w, 1e-5), &["x is F16", "F32 or F64"]);
    refused(softmax(&half), &["F16", "F32"]);
    refused(log_softmax(&half), &["F16", "F32"]);
    refused(swiglu(&half), &["swiglu", "F16"]);
    refused(softmax(&zeros(&[])), &["softmax: x", "[]"]);
    refused(swiglu(&zeros(&[2, 3])), &["swiglu: x", "[2, 3]", "even"]);
    refused(head_norm(&x, &zeros(&[2]), &zeros(&[2]), 2, 1, 1e-5), &["qkv", "[2, 4]"]);
    refused(head_norm(&x, &zeros(&[2]), &zeros(&[3]), 1, 1, 1e-5), &["k_weight", "[3]"]);
    refused(head_norm(&x, &zeros(&[2]), &zeros(&[2]), usize::MAX, 1, 1e-5), &["qkv"]);
    refused(linear(&x, &zeros(&[3, 5])), &["weight", "[3, 5]", "4 inputs"]);
    refused(linear(&x, &zeros(&[3])), &["weight", "[out, in]"]);
    refused(linear(&x, &double), &["weight is F64"]);
    refused(linear_add(&x, &zeros(&[3, 4]), &zeros(&[2, 4])), &["residual", "[2, 3]"]);
    refused(embedding(&x, &u32s(&[3]).affine(1.0, 2.0).unwrap()), &["tokens is 2 at 0", "below 2"]);
    refused(embedding(&x, &w), &["tokens is F32", "U32"]);
    refused(embedding(&w, &u32s(&[3])), &["weight has shape [4]"]);
    let high = Tensor::new(&[0u32, 4], &Device::Cpu).unwrap();
    refused(cross_entropy(&x, &high), &["targets is 4 at 1", "below 4"]);
    refused(cross_entropy(&x, &u32s(&[3])), &["targets", "[3]", "2 rows"]);
    refused(cross_entropy(&zeros(&[0, 4]), &u32s(&[0])), &["targets", "[0]"]);
    refused(projected_cross_entropy(&x, &zeros(&[5, 3]), &u32s(&[2])), &["weight", "[5, 3]"]);
    refused(projected_cross_entropy(&x, &zeros(&[3, 4]), &high), &["targets is 4 at 1"]);
    let three = zeros(&[1, 2, 8]);
    refused(rotary(&x, 4, 1, 0, 1e4), &["rotary: x", "[batch, tokens, n]"]);
    refused(rotary(&three, 3, 1, 0, 1e4), &["head_dim is 3", "even"]);
    refused(rotary(&three, 4, 3, 0, 1e4), &["3 heads of 4"]);
    refused(rotary(&three, 4, 2, 0, 0.0), &["base is 0"]);
}

fn plan(decay: Decay) -> Arc<Plan> {
    let spec = Spec::new(2, 3).terms(3).decay(decay).build().unwrap();
    Arc::new(Plan::new(&spec).unwrap())
}

#[test]
fn attentions() {
    let causal = Options::causal();
    let p = plan(Decay::None);
    // Two heads on one: 2·2 + 2 + 3 = 9.
    let qkv = zeros(&[1, 5, 9]);
    refused(attention_packed(&p, &qkv, 2, 2, &causal), &["qkv", "[1, 5, 9]", "14"]);
    refused(attention_packed(&p, &zeros(&[5, 9]), 2, 1, &causal), &["[batch, tokens, width]"]);
    refused(attention_packed(&p, &qkv, usize::MAX, 1, &causal), &["qkv"]);
    refused(attention_packed(&p, &zeros(&[1, 5, 0]), 0, 0, &causal), &["heads"]);
    let gates = zeros(&[1, 5, 1]);
    let with = causal.clone().log_gates(&gates);
    refused(attention_packed(&p, &qkv, 2, 1, &with), &["log_gates", "decay = None"]);
    let p = plan(Decay::Gates);
    refused(attention_packed(&p, &qkv, 2, 1, &causal), &["log_gates", "decay = gates"]);
    attention_packed(&p, &qkv, 2, 1, &with).unwrap();
    let positive = causal.clone().log_gates(&gates.affine(1.0, 0.5).unwrap());
    refused(attention_packed(&p, &qkv, 2, 1, &positive), &["log_gates", "0.5", "at most 0"]);
    let short = causal.clone().log_gates(&zeros(&[1, 4, 1]));
    refused(attention_packed(&p, &qkv, 2, 1, &short), &["log_gates", "[1, 4, 1]", "[1, 5, 1]"]);
    let p = plan(Decay::Slopes);
    let negative = causal.clone().slopes(&Tensor::new(&[-1f32], &Device::Cpu).unwrap());
    refused(attention_packed(&p, &qkv, 2, 1, &negative), &["slopes", "-1"]);
    let two = causal.clone().slopes(&zeros(&[2]));
    refused(attention_packed(&p, &qkv, 2, 1, &two), &["slopes", "[2]", "[1]"]);
    let p = plan(Decay::None);
    let not_finite = qkv.affine(1.0, f64::NAN).unwrap();
    refused(attention_packed(&p, &not_finite, 2, 1, &causal), &["q holds NaN"]);
    let (q, k, v) = (zeros(&[1, 2, 5, 2]), zeros(&[1, 1, 5, 2]), zeros(&[1, 1, 5, 3]));
    refused(attention(&p, &q, &k, &zeros(&[1, 1, 4, 3]), &causal), &["v", "[1, 1, 4, 3]"]);
    refused(attention(&p, &q, &zeros(&[2, 1, 5, 2]), &v, &causal), &["k", "[1, 1, 5, 2]"]);
    refused(attention(&p, &zeros(&[5, 2]), &k, &v, &causal), &["q has shape [5, 2]"]);
    let masked = causal.clone().key_mask(vec![true; 4]);
    refused(attention(&p, &q, &k, &v, &masked), &["key_mask", "[4]"]);
    let packed = causal.clone().packed(vec![0, 2, 4], vec![0, 2, 4]);
    refused(attention(&p, &q, &k, &v, &packed), &["cu_queries", "5 tokens"]);
}

#[test]
fn denominators_that_are_not_positive() {
    // 1 + x at x = −2 and no other key: the only weight is −1.
    let spec = Spec::new(1, 1).terms(2).scale(1.0).build().unwrap();
    let plan = Arc::new(Plan::new(&spec).unwrap());
    let qkv = Tensor::new(&[[[2f32, -1.0, 5.0]]], &Device::Cpu).unwrap();
    refused(attention_packed(&plan, &qkv, 1, 1, &Options::causal()), &["1 of 1 queries"]);
    let lax = Options::causal().strict(false);
    let y = attention_packed(&plan, &qkv, 1, 1, &lax).unwrap();
    assert_eq!(y.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [5.0]);
}
