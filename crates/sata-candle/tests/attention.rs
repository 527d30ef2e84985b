//! The attention operation and its gradients against the oracle's, and the layer's weights.

mod common;

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Module, VarBuilder, VarMap};
use common::{differences, f64s, gradients, near, normal, rng};
use rand::Rng;
use rand::rngs::StdRng;
use sata::{Decay, Near, Plan, Series, Spec};
use sata_candle::*;
use sata_oracle as oracle;

/// One random setting.
#[derive(Debug)]
struct Case {
    spec: Spec,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    tokens: usize,
}

/// A spec of every series that has gradients, with and without near blocks, sinks and decays.
fn case(rng: &mut StdRng, causal: bool) -> Case {
    let (d_key, d_value) = (rng.random_range(1..5), rng.random_range(1..5));
    let spec = Spec::new(d_key, d_value);
    let spec = match rng.random_range(0..4) {
        0 => spec.series(Series::power(2)),
        1 => spec.series(Series::Fixed { coefficients: vec![1.0, 0.5, 0.25] }),
        2 => spec.terms(1),
        _ => spec.terms(3),
    };
    let decays = [Decay::None, Decay::Slopes, Decay::Gates];
    let spec = spec.decay(decays[rng.random_range(0..3)]).block(rng.random_range(1..5));
    let spec = match rng.random_range(0..2) {
        0 if causal => spec.near(Near::Blocks(1)).sinks(rng.random_range(0..3)),
        _ => spec,
    };
    let kv_heads = rng.random_range(1..3);
    Case {
        spec: spec.build().unwrap(),
        batch: rng.random_range(1..3),
        heads: kv_heads * rng.random_range(1..3),
        kv_heads,
        tokens: rng.random_range(1..14),
    }
}

impl Case {
    /// Gates or slopes, exact in f32.
    fn decay(&self, rng: &mut StdRng) -> Option<Tensor> {
        let shape = match self.spec.decay() {
            Decay::None => return None,
            Decay::Slopes => vec![self.kv_heads],
            Decay::Gates => vec![self.batch, self.tokens, self.kv_heads],
        };
        let x = normal(rng, &shape).abs().unwrap();
        let x = if self.spec.decay() == Decay::Gates { x.neg().unwrap() } else { x };
        Some(x.to_dtype(DType::F32).unwrap().to_dtype(DType::F64).unwrap())
    }

    fn options(&self, causal: bool, decay: Option<&Tensor>) -> Options {
        let options = if causal { Options::causal() } else { Options::full() };
        match (decay, self.spec.decay()) {
            (None, _) => options,
            (Some(x), Decay::Gates) => options.log_gates(x),
            (Some(x), _) => options.slopes(x),
        }
    }

    /// The oracle's outputs and gradients of one sequence: y and dy `[heads, queries, d_value]`,
    /// q, k, v and theirs `[heads, tokens, dim]`, gates and theirs `[kv_heads, keys]`.
    fn oracle(
        &self,
        causal: bool,
        [q, k, v]: [&Tensor; 3],
        decay: Option<&Tensor>,
        mask: Option<&[bool]>,
        dy: &Tensor,
    ) -> (Vec<f64>, oracle::Gradients) {
        let shape = oracle::Shape {
            query_heads: self.heads,
            kv_heads: self.kv_heads,
            queries: q.dim(1).unwrap(),
            keys: k.dim(1).unwrap(),
            d_key: self.spec.d_key(),
            d_value: self.spec.d_value(),
        };
        let (q, k, v) = (f64s(q), f64s(k), f64s(v));
        let mut problem = oracle::Problem::new(shape, &q, &k, &v);
        problem.causal = causal;
        problem.terms = self.spec.terms();
        problem.key_mask = mask;
        problem.block = self.spec.block();
        problem.sinks = self.spec.sinks();
        problem.near = match self.spec.near() {
            Near::None => oracle::Near::None,
            Near::Blocks(n) => oracle::Near::Blocks(n),
        };
        problem.series = match self.spec.series() {
            Series::Taylor => oracle::Series::Taylor,
            Series::Fixed { coefficients } => oracle::Series::Fixed(coefficients.clone()),
            Series::Power { exponent, floor } => {
                oracle::Series::Power { exponent: *exponent, floor: *floor }
            }
            other => panic!("{other:?} is not compared here"),
        };
        problem.decay = match (decay, self.spec.decay()) {
            (None, _) => oracle::Decay::None,
            (Some(x), Decay::Gates) => oracle::Decay::LogGates(f64s(x)),
            (Some(x), _) => oracle::Decay::Slopes(f64s(x)),
        };
        let y = oracle::attention(&problem).y;
        (y, oracle::attention_gradients(&problem, &f64s(dy)))
    }
}

fn tensor(data: Vec<f64>, shape: &[usize]) -> Tensor {
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// Part `i` of a batch, gates transposed to `[kv_heads, keys]`.
fn decay_of(case: &Case, decay: &Option<Tensor>, i: usize) -> Option<Tensor> {
    let decay = decay.as_ref()?;
    Some(match case.spec.decay() {
        Decay::Gates => decay.get(i).unwrap().t().unwrap(),
        _ => decay.clone(),
    })
}

fn check_decay(case: &Case, got: &Tensor, want: &[oracle::Gradients]) {
    let want = match case.spec.decay() {
        Decay::Gates => {
            let parts: Vec<Tensor> = want
                .iter()
                .map(|w| tensor(w.log_gates.clone(), &[case.kv_heads, case.tokens]).t().unwrap())
                .collect();
            Tensor::stack(&parts, 0).unwrap()
        }
        _ => {
            let mut sum = vec![0.0; case.kv_heads];
            for part in want {
                sum.iter_mut().zip(&part.slopes).for_each(|(sum, x)| *sum += x);
            }
            tensor(sum, &[case.kv_heads])
        }
    };
    near(&format!("decay of {case:?}"), got, &want, 1e-9);
}

/// A denominator near 0 makes every number near it large: a Power of one token, say, is fine, but
/// 1 + x/2 + x²/4 is at least 3/4. All the series above are bounded below.
#[test]
fn packed_projections_agree_with_the_oracle() {
    let mut rng = rng();
    for _ in 0..60 {
        let case = case(&mut rng, true);
        let plan = Arc::new(Plan::new(&case.spec).unwrap());
        let (dk, dv, b, t) = (case.spec.d_key(), case.spec.d_value(), case.batch, case.tokens);
        let (h, kv) = (case.heads, case.kv_heads);
        let qkv = normal(&mut rng, &[b, t, (h + kv) * dk + kv * dv]);
        let decay = case.decay(&mut rng);
        let weights = normal(&mut rng, &[b, t, h * dv]);
        let op = |x: &[Tensor]| -> Result<Tensor> {
            attention_packed(&plan, &x[0], h, kv, &case.options(true, x.get(1)))
        };
        let inputs: Vec<Tensor> =
            [Some(qkv.clone()), decay.clone()].into_iter().flatten().collect();
        let y = op(&inputs).unwrap();
        let (_, got) = gradients(&inputs, Some(&weights), &op);

        let heads = |x: &Tensor, from: usize, n: usize, d: usize, i: usize| {
            let x = x.get(i).unwrap().narrow(1, from, n * d).unwrap();
            x.reshape((t, n, d)).unwrap().transpose(0, 1).unwrap()
        };
        let parts = [(0, h, dk), (h * dk, kv, dk), ((h + kv) * dk, kv, dv)];
        let mut all = vec![];
        for i in 0..b {
            let [q, k, v] = parts.map(|(from, n, d)| heads(&qkv, from, n, d, i));
            let dy = heads(&weights, 0, h, dv, i);
            let fade = decay_of(&case, &decay, i);
            let (want_y, want) = case.oracle(true, [&q, &k, &v], fade.as_ref(), None, &dy);
            let name = format!("{case:?}");
            near(&name, &heads(&y, 0, h, dv, i), &tensor(want_y, &[h, t, dv]), 1e-11);
            for ((from, n, d), want) in parts.into_iter().zip([&want.q, &want.k, &want.v]) {
                let want = tensor(want.clone(), &[n, t, d]);
                near(&name, &heads(&got[0], from, n, d, i), &want, 1e-9);
            }
            all.push(want);
        }
        if let Some(got) = got.get(1) {
            check_decay(&case, got, &all);
        }
    }
}

#[test]
fn separate_tensors_agree_with_the_oracle() {
    let mut rng = rng();
    for round in 0..60 {
        let causal = round % 2 == 0;
        let case = case(&mut rng, causal);
        let plan = Arc::new(Plan::new(&case.spec).unwrap());
        let (dk, dv, b, keys) = (case.spec.d_key(), case.spec.d_value(), case.batch, case.tokens);
        let (h, kv) = (case.heads, case.kv_heads);
        let queries = if causal { keys } else { rng.random_range(1..9) };
        let mask: Option<Vec<bool>> = (round % 3 == 0)
            .then(|| (0..b * keys).map(|i| i % keys == 0 || rng.random_bool(0.7)).collect());
        // k comes strided.
        let mut inputs = vec![
            normal(&mut rng, &[b, h, queries, dk]),
            normal(&mut rng, &[b, keys, kv, dk]),
            normal(&mut rng, &[b, kv, keys, dv]),
        ];
        let decay = case.decay(&mut rng);
        inputs.extend(decay.clone());
        let weights = normal(&mut rng, &[b, h, queries, dv]);
        let op = |x: &[Tensor]| -> Result<Tensor> {
            let options = case.options(causal, x.get(3));
            let options = match &mask {
                Some(mask) => options.key_mask(mask.clone()),
                None => options,
            };
            attention(&plan, &x[0], &x[1].transpose(1, 2)?, &x[2], &options)
        };
        let y = op(&inputs).unwrap();
        let (_, got) = gradients(&inputs, Some(&weights), &op);
        let k = inputs[1].transpose(1, 2).unwrap();
        let dk_got = got[1].transpose(1, 2).unwrap();
        let mut all = vec![];
        for i in 0..b {
            let at = |x: &Tensor| x.get(i).unwrap();
            let mask = mask.as_ref().map(|mask| &mask[i * keys..(i + 1) * keys]);
            let three = [&at(&inputs[0]), &at(&k), &at(&inputs[2])];
            let fade = decay_of(&case, &decay, i);
            let (want_y, want) = case.oracle(causal, three, fade.as_ref(), mask, &at(&weights));
            let name = format!("{case:?}, causal {causal}, mask {mask:?}");
            near(&name, &at(&y), &tensor(want_y, &[h, queries, dv]), 1e-11);
            near(&name, &at(&got[0]), &tensor(want.q.clone(), &[h, queries, dk]), 1e-9);
            near(&name, &at(&dk_got), &tensor(want.k.clone(), &[kv, keys, dk]), 1e-9);
            near(&name, &at(&got[2]), &tensor(want.v.clone(), &[kv, keys, dv]), 1e-9);
            all.push(want);
        }
        if let Some(got) = got.get(3) {
            check_decay(&case, got, &all);
        }
    }
}

#[test]
fn packed_sequences_are_sequences() {
    let mut rng = rng();
    for _ in 0..20 {
        let mut case = case(&mut rng, true);
        (case.batch, case.tokens) = (1, 12);
        let plan = Arc::new(Plan::new(&case.spec).unwrap());
        let width =
            (case.heads + case.kv_heads) * case.spec.d_key() + case.kv_heads * case.spec.d_value();
        let inputs: Vec<Tensor> = [Some(normal(&mut rng, &[1, 12, width])), case.decay(&mut rng)]
            .into_iter()
            .flatten()
            .collect();
        let weights = normal(&mut rng, &[1, 12, case.heads * case.spec.d_value()]);
        let cu = [0, 3, 3, 8, 12];
        let packed = |x: &[Tensor]| {
            let options = case.options(true, x.get(1)).packed(cu.to_vec(), cu.to_vec());
            attention_packed(&plan, &x[0], case.heads, case.kv_heads, &options)
        };
        let apart = |x: &[Tensor]| {
            let mut parts = vec![];
            for cu in cu.windows(2).filter(|cu| cu[0] < cu[1]) {
                let n = cu[1] - cu[0];
                let fade = match (x.get(1), case.spec.decay()) {
                    (Some(x), Decay::Gates) => Some(x.narrow(1, cu[0], n)?),
                    (x, _) => x.cloned(),
                };
                let options = case.options(true, fade.as_ref());
                let x = x[0].narrow(1, cu[0], n)?;
                parts.push(attention_packed(&plan, &x, case.heads, case.kv_heads, &options)?);
            }
            Tensor::cat(&parts, 1)
        };
        let name = format!("{case:?}");
        near(&name, &packed(&inputs).unwrap(), &apart(&inputs).unwrap(), 1e-12);
        let (_, got) = gradients(&inputs, Some(&weights), &packed);
        let (_, want) = gradients(&inputs, Some(&weights), &apart);
        for (got, want) in got.iter().zip(&want) {
            near(&name, got, want, 1e-10);
        }
    }
}

#[test]
fn single_precision_is_near_double() {
    let mut rng = rng();
    let spec = Spec::new(8, 8).terms(3).near(Near::Blocks(1)).block(8).decay(Decay::Gates);
    let plan = Arc::new(Plan::new(&spec.build().unwrap()).unwrap());
    let inputs = [
        normal(&mut rng, &[2, 60, 4 * 8]),
        normal(&mut rng, &[2, 60, 1]).abs().unwrap().neg().unwrap(),
    ];
    let op =
        |x: &[Tensor]| attention_packed(&plan, &x[0], 2, 1, &Options::causal().log_gates(&x[1]));
    let single = inputs.each_ref().map(|x| x.to_dtype(DType::F32).unwrap());
    let double = single.each_ref().map(|x| x.to_dtype(DType::F64).unwrap());
    near("y", &op(&single).unwrap(), &op(&double).unwrap(), 1e-5);
    let (_, got) = gradients(&single, None, &op);
    let (_, want) = gradients(&double, None, &op);
    for (got, want) in got.iter().zip(&want) {
        assert_eq!(got.dtype(), DType::F32);
        near("gradients", got, want, 1e-4);
    }
}

#[test]
fn every_weight_of_the_layer_has_its_gradient() {
    let mut rng = rng();
    for decay in [Decay::None, Decay::Slopes, Decay::Gates] {
        for (qk_norm, rotary) in [(None, None), (Some(1e-3), Some(100.0))] {
            let spec = Spec::new(4, 3).terms(3).near(Near::Blocks(1)).block(3).decay(decay);
            let plan = Arc::new(Plan::new(&spec.build().unwrap()).unwrap());
            let options =
                TaylorAttentionOptions { width: 6, heads: 4, kv_heads: 2, qk_norm, rotary };
            let vars = VarMap::new();
            let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
            TaylorAttention::new(&plan, options.clone(), vb).unwrap();
            let mut names: Vec<String> = vars.data().lock().unwrap().keys().cloned().collect();
            names.sort();
            let mut wants = vec!["out.weight", "qkv.weight"];
            if decay == Decay::Gates {
                wants.extend(["gate.weight", "gate.bias"]);
            }
            if qk_norm.is_some() {
                wants.extend(["q_norm.weight", "k_norm.weight"]);
            }
            wants.sort();
            assert_eq!(names, wants);
            let shapes = vars.data().lock().unwrap();
            // Small, so that differences over long steps are near to derivatives.
            let inputs: Vec<Tensor> = names
                .iter()
                .map(|name| normal(&mut rng, shapes[name].dims()).affine(0.4, 0.0).unwrap())
                .collect();
            let x = normal(&mut rng, &[2, 9, 6]);
            let weights = normal(&mut rng, &[2, 9, 6]);
            let layer = |values: &[Tensor]| {
                let tensors = names.iter().cloned().zip(values.iter().cloned()).collect();
                let vb = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
                TaylorAttention::new(&plan, options.clone(), vb)?.forward(&x)
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
}
