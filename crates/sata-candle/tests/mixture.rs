//! Mixtures of heads: each group is as it would be alone.

mod common;

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Module, VarBuilder, VarMap};
use common::{differences, f64s, gradients, near, normal, rng};
use rand::Rng;
use rand::rngs::StdRng;
use sata::{Decay, Near, Plan, Series, Spec};
use sata_candle::*;

fn plan(rng: &mut StdRng, (d_key, d_value): (usize, usize), decay: Decay) -> Arc<Plan> {
    let spec = Spec::new(d_key, d_value).decay(decay).block(rng.random_range(1..5));
    let spec = match rng.random_range(0..4) {
        0 => spec.series(Series::power(2)),
        1 => spec.series(Series::power(4)),
        2 => spec.series(Series::Fixed { coefficients: vec![1e-30] }),
        _ => spec.terms(3),
    };
    // A window needs something near.
    let spec = spec.near(Near::Blocks(rng.random_range(0..2))).sinks(rng.random_range(0..3));
    Arc::new(Plan::new(&spec.build().unwrap()).unwrap())
}

fn groups(rng: &mut StdRng, dims: (usize, usize), decay: Decay) -> Vec<HeadGroup> {
    let each = rng.random_range(1..3);
    let count = rng.random_range(1..4);
    (0..count)
        .map(|_| {
            let kv_heads = rng.random_range(1..3);
            HeadGroup { plan: plan(rng, dims, decay), heads: each * kv_heads, kv_heads }
        })
        .collect()
}

/// Each group on its own projection, cut out of the whole, and outputs side by side.
fn apart(groups: &[HeadGroup], dims: (usize, usize), x: &[Tensor], decay: Decay) -> Result<Tensor> {
    let (dk, dv) = dims;
    let heads: usize = groups.iter().map(|g| g.heads).sum();
    let kv_heads: usize = groups.iter().map(|g| g.kv_heads).sum();
    let (mut query, mut kv, mut all) = (0, 0, vec![]);
    for group in groups {
        let qkv = &x[0];
        let parts = [
            qkv.narrow(2, query * dk, group.heads * dk)?,
            qkv.narrow(2, (heads + kv) * dk, group.kv_heads * dk)?,
            qkv.narrow(2, (heads + kv_heads) * dk + kv * dv, group.kv_heads * dv)?,
        ];
        let qkv = Tensor::cat(&parts, 2)?;
        let options = match decay {
            Decay::None => Options::causal(),
            Decay::Gates => Options::causal().log_gates(&x[1].narrow(2, kv, group.kv_heads)?),
            _ => Options::causal().slopes(&x[1].narrow(0, kv, group.kv_heads)?),
        };
        all.push(attention_packed(&group.plan, &qkv, group.heads, group.kv_heads, &options)?);
        (query, kv) = (query + group.heads, kv + group.kv_heads);
    }
    Tensor::cat(&all, 2)
}

#[test]
fn a_mixture_is_its_groups_side_by_side() {
    let mut rng = rng();
    for round in 0..60 {
        let decay = [Decay::None, Decay::Slopes, Decay::Gates][round % 3];
        let dims = (rng.random_range(1..5), rng.random_range(1..5));
        let groups = groups(&mut rng, dims, decay);
        let (batch, tokens) = (rng.random_range(1..3), rng.random_range(1..14));
        let heads: usize = groups.iter().map(|g| g.heads).sum();
        let kv_heads: usize = groups.iter().map(|g| g.kv_heads).sum();
        let width = (heads + kv_heads) * dims.0 + kv_heads * dims.1;
        let mut inputs = vec![normal(&mut rng, &[batch, tokens, width])];
        let single = |x: Tensor| x.to_dtype(DType::F32).unwrap().to_dtype(DType::F64).unwrap();
        match decay {
            Decay::None => {}
            Decay::Gates => {
                let gates = normal(&mut rng, &[batch, tokens, kv_heads]).abs().unwrap();
                inputs.push(single(gates.neg().unwrap()));
            }
            _ => inputs.push(single(normal(&mut rng, &[kv_heads]).abs().unwrap())),
        }
        let weights = normal(&mut rng, &[batch, tokens, heads * dims.1]);
        let mixed = |x: &[Tensor]| {
            let options = match decay {
                Decay::None => Options::causal(),
                Decay::Gates => Options::causal().log_gates(&x[1]),
                _ => Options::causal().slopes(&x[1]),
            };
            attention_groups(&groups, &x[0], &options)
        };
        let apart = |x: &[Tensor]| apart(&groups, dims, x, decay);
        let name = format!("round {round}, {decay:?}, {} groups", groups.len());
        near(&name, &mixed(&inputs).unwrap(), &apart(&inputs).unwrap(), 1e-13);
        let (_, got) = gradients(&inputs, Some(&weights), &mixed);
        let (_, want) = gradients(&inputs, Some(&weights), &apart);
        for (got, want) in got.iter().zip(&want) {
            near(&name, got, want, 1e-12);
        }
    }
}

#[test]
fn every_weight_of_a_mixed_layer_has_its_gradient() {
    let mut rng = rng();
    for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
        let spec = |series: Series, blocks| {
            let spec = Spec::new(4, 3).series(series).near(Near::Blocks(blocks)).block(3);
            Arc::new(Plan::new(&spec.decay(decay).build().unwrap()).unwrap())
        };
        let groups = [
            HeadGroup { plan: spec(Series::power(2), 0), heads: 4, kv_heads: 2 },
            HeadGroup { plan: spec(Series::power(4), 1), heads: 2, kv_heads: 1 },
        ];
        let options = TaylorAttentionOptions {
            width: 6,
            heads: 6,
            kv_heads: 3,
            qk_norm: Some(1e-3),
            rotary: None,
        };
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let layer = TaylorAttention::mixture(&groups, options.clone(), vb).unwrap();
        assert_eq!(layer.groups().len(), 2);
        let shapes = vars.data().lock().unwrap();
        let names: Vec<String> = shapes.keys().cloned().collect();
        assert_eq!(shapes["qkv.weight"].dims(), [(6 + 3) * 4 + 3 * 3, 6]);
        let inputs: Vec<Tensor> =
            names.iter().map(|name| normal(&mut rng, shapes[name].dims())).collect();
        let (x, weights) = (normal(&mut rng, &[2, 9, 6]), normal(&mut rng, &[2, 9, 6]));
        let layer = |values: &[Tensor]| {
            let tensors = names.iter().cloned().zip(values.iter().cloned()).collect();
            let vb = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
            TaylorAttention::mixture(&groups, options.clone(), vb)?.forward(&x)
        };
        let (_, got) = gradients(&inputs, Some(&weights), &layer);
        // Gates are rounded to f32, which long steps drown.
        let want = differences(&inputs, Some(&weights), &layer, 0.004);
        for ((got, want), name) in got.iter().zip(&want).zip(&names) {
            let most = f64s(want).iter().fold(0.0f64, |most, x| most.max(x.abs()));
            assert!(most > 1e-3, "{decay:?}: {name} does nothing, {most:e}");
            near(&format!("{decay:?}, {name}"), got, want, 1e-3);
        }
    }
}

#[test]
fn groups_that_do_not_fit_are_named() {
    let plan = |d: usize, decay: Decay| {
        Arc::new(Plan::new(&Spec::new(d, 2).terms(3).decay(decay).build().unwrap()).unwrap())
    };
    let group = |plan: Arc<Plan>, heads, kv_heads| HeadGroup { plan, heads, kv_heads };
    let says = |error: candle_core::Error, words: &[&str]| {
        let error = error.to_string();
        for word in words {
            assert!(error.contains(word), "'{error}' does not say '{word}'");
        }
    };
    let causal = Options::causal();
    let qkv = Tensor::zeros((1, 5, 16), DType::F32, &Device::Cpu).unwrap();
    let none = Decay::None;
    says(attention_groups(&[], &qkv, &causal).unwrap_err(), &["groups is empty"]);
    let two = [group(plan(2, none), 2, 1), group(plan(2, none), 1, 1)];
    says(attention_groups(&two, &qkv, &causal).unwrap_err(), &["16", "[(2, 1), (1, 1)]", "14"]);
    let wide = [group(plan(2, none), 1, 1), group(plan(3, none), 1, 1)];
    says(attention_groups(&wide, &qkv, &causal).unwrap_err(), &["(3, 2) in group 1", "(2, 2)"]);
    let many = [group(plan(2, none), usize::MAX, 1), group(plan(2, none), 1, 1)];
    says(attention_groups(&many, &qkv, &causal).unwrap_err(), &["qkv", "None"]);
    let short = Options::causal().constant_slopes([1.0]);
    let slopes = [group(plan(2, Decay::Slopes), 1, 1), group(plan(2, Decay::Slopes), 1, 1)];
    let qkv = Tensor::zeros((1, 5, 12), DType::F32, &Device::Cpu).unwrap();
    says(attention_groups(&slopes, &qkv, &short).unwrap_err(), &["slopes", "[1]", "[2]"]);

    let layer = |groups: &[HeadGroup]| {
        let options =
            TaylorAttentionOptions { width: 6, heads: 3, kv_heads: 2, qk_norm: None, rotary: None };
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        TaylorAttention::mixture(groups, options, vb).unwrap_err()
    };
    says(layer(&[]), &["groups is empty"]);
    says(layer(&two[..1]), &["[2, 1]", "[3, 2]"]);
    let fading = [group(plan(2, none), 2, 1), group(plan(2, Decay::Gates), 1, 1)];
    says(layer(&fading), &["Gates", "in group 1", "None"]);
    layer_is_made(&two);
}

fn layer_is_made(groups: &[HeadGroup]) {
    let options =
        TaylorAttentionOptions { width: 6, heads: 3, kv_heads: 2, qk_norm: None, rotary: None };
    let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    TaylorAttention::mixture(groups, options, vb).unwrap();
}
