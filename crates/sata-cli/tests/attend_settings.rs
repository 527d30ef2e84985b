//! `sata attend` with near blocks, sinks, decays and every series, against the oracle.

mod common;

use common::{Room, Tensor, file, relative_rms, safe, seed};
use safetensors::Dtype;
use sata_oracle::{Decay, Near, Problem, Series, Shape, attention, softmax_attention};

const ATTEND: &str = "attend --input in.safetensors --output y.safetensors";
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const TOKENS: usize = 90;

/// q, k, v and logarithms of gates, all new.
fn inputs(dtype: Dtype) -> ([Tensor; 3], Tensor) {
    let seed = seed();
    let qkv = [HEADS, KV_HEADS, KV_HEADS].into_iter().zip(0..);
    let qkv: Vec<Tensor> = qkv
        .map(|(heads, i)| Tensor::normal(dtype, &[heads, TOKENS, 6 - i as usize / 2], seed + i))
        .collect();
    let gates = Tensor::normal(Dtype::F32, &[KV_HEADS, TOKENS], seed + 3);
    let gates = gates.data.iter().map(|x| -0.1 * x.abs()).collect();
    (qkv.try_into().unwrap(), Tensor::new(Dtype::F32, &[KV_HEADS, TOKENS], gates))
}

fn problem<'a>([q, k, v]: &'a [Tensor; 3]) -> Problem<'a> {
    let shape = Shape {
        query_heads: q.shape[0],
        kv_heads: k.shape[0],
        queries: q.shape[1],
        keys: k.shape[1],
        d_key: q.shape[2],
        d_value: v.shape[2],
    };
    Problem::new(shape, &q.data, &k.data, &v.data)
}

fn with_gates([q, k, v]: &[Tensor; 3], gates: &Tensor) -> Vec<u8> {
    safe(&[("q", q), ("k", k), ("v", v), ("log_f", gates)])
}

/// Runs with `args` on f64 inputs, compares with the oracle, and gives the report.
fn check(args: &str, change: impl Fn(&mut Problem<'_>)) -> serde_json::Value {
    let (inputs, gates) = inputs(Dtype::F64);
    let room = Room::new();
    room.write("in.safetensors", with_gates(&inputs, &gates));
    let report = room.good(&format!("{ATTEND} {args} --json"));
    let mut problem = problem(&inputs);
    if args.contains("--gates") {
        problem.decay = Decay::LogGates(gates.data.clone());
    }
    change(&mut problem);
    let want = attention(&problem).y;
    let error = relative_rms(&room.tensor("y.safetensors", "y").data, &want);
    // Even terms without a fit bring denominators near 0.
    assert!(error <= 1e-10, "{args}: {error:e}");
    serde_json::from_str(&report).unwrap()
}

#[test]
fn near_blocks_and_sinks() {
    for (args, near, block, sinks) in [
        ("--near 0", Near::Blocks(0), 64, 0),
        ("--near 0 --block 16", Near::Blocks(0), 16, 0),
        ("--near 2 --block 7 --sinks 3", Near::Blocks(2), 7, 3),
        ("--near none --sinks 5", Near::None, 64, 5),
        ("--near 1000", Near::Blocks(1000), 64, 0),
    ] {
        let report = check(&format!("--terms 3 {args}"), |problem| {
            (problem.terms, problem.near, problem.block, problem.sinks) = (3, near, block, sinks);
        });
        let spec = &report["spec"];
        assert_eq!((&spec["block"], &spec["sinks"]), (&block.into(), &sinks.into()), "{args}");
        let wants = match near {
            Near::None => "none".into(),
            Near::Blocks(n) => serde_json::json!({ "blocks": n }),
        };
        assert_eq!(spec["near"], wants, "{args}");
    }
    check("--terms 3 --full --sinks 4", |problem| {
        (problem.terms, problem.causal, problem.sinks) = (3, false, 4);
    });
}

#[test]
fn series_of_every_query() {
    for (args, series, terms) in [
        ("--series gauss", Series::Gauss, 4),
        ("--series gauss --terms 2 --near 0", Series::Gauss, 2),
        ("--series hermite --near 1", Series::hermite(), 4),
        ("--series hermite:0.75 --terms 3 --near 0", Series::Hermite { tau: 0.75 }, 3),
        ("--series hermite --terms 2", Series::hermite(), 2),
    ] {
        let report = check(&format!("{args} --block 16"), |problem| {
            problem.series = series.clone();
            problem.terms = terms;
            problem.block = 16;
            if let Some((_, n)) = args.split_once("--near ") {
                problem.near = Near::Blocks(n.parse().unwrap());
            }
        });
        let kind = if args.contains("gauss") { "gauss" } else { "hermite" };
        assert_eq!(report["spec"]["series"]["kind"], kind);
    }
}

#[test]
fn slopes_and_gates() {
    let slopes = sata::alibi_slopes(KV_HEADS);
    let report = check("--terms 3 --slopes alibi", |problem| {
        problem.terms = 3;
        problem.decay = Decay::Slopes(slopes.clone());
    });
    assert_eq!(report["slopes"], serde_json::json!(slopes));
    assert_eq!(report["spec"]["decay"], "slopes");
    check("--terms 3 --slopes 0.5,0 --near 1 --block 8 --sinks 2", |problem| {
        (problem.terms, problem.near, problem.block, problem.sinks) = (3, Near::Blocks(1), 8, 2);
        problem.decay = Decay::Slopes(vec![0.5, 0.0]);
    });
    let report = check("--terms 3 --gates log_f", |problem| problem.terms = 3);
    assert_eq!(report["gates"], "log_f");
    assert_eq!(report["spec"]["decay"], "gates");
    check("--series gauss --gates log_f --near 0 --block 16 --sinks 1", |problem| {
        problem.series = Series::Gauss;
        (problem.near, problem.block, problem.sinks) = (Near::Blocks(0), 16, 1);
    });
    check("--terms 3 --gates log_f --full", |problem| {
        (problem.terms, problem.causal) = (3, false);
    });
}

#[test]
fn gates_by_prefix_by_batch_and_from_npy() {
    let (inputs, gates) = inputs(Dtype::F32);
    let room = Room::new();
    let mut problem = problem(&inputs);
    problem.terms = 3;
    problem.decay = Decay::LogGates(gates.data.clone());
    let want = attention(&problem).y;
    let close = |file: &str| {
        let error = relative_rms(&room.tensor(file, "y").data, &want);
        assert!(error <= 1e-5, "{error:e}");
    };
    let [q, k, v] = &inputs;
    let other = Tensor::new(Dtype::F32, &[1], vec![0.0]);
    let tensors = [("a.q", q), ("a.k", k), ("a.v", v), ("a.f", &gates), ("f", &other)];
    // The prefix's own comes first.
    room.write("in.safetensors", safe(&tensors));
    let said = room.good(&format!("{ATTEND} --terms 3 --prefix a --gates f"));
    assert!(said.contains("forget gates, logarithms from a.f"), "{said}");
    close("y.safetensors");
    // And where it has none, the file's; in f64, with a batch of 1.
    let whole = Tensor::new(Dtype::F64, &[1, KV_HEADS, TOKENS], gates.data.clone());
    room.write("in.safetensors", safe(&[("a.q", q), ("a.k", k), ("a.v", v), ("f", &whole)]));
    let said = room.good(&format!("{ATTEND} --terms 3 --prefix a --gates f"));
    assert!(said.contains("forget gates, logarithms from f\n"), "{said}");
    close("y.safetensors");
    for (name, tensor) in [("q", q), ("k", k), ("v", v), ("f", &gates)] {
        room.write(&format!("{name}.npy"), tensor.npy());
    }
    room.good("attend --input q.npy,k.npy,v.npy --gates f.npy --terms 3 --output z.safetensors");
    close("z.safetensors");
}

#[test]
fn softmax_has_the_same_decay() {
    for (args, gated) in [("--slopes 0.1,0.02", false), ("--gates log_f --near 1 --block 8", true)]
    {
        let (inputs, gates) = inputs(Dtype::F64);
        let room = Room::new();
        room.write("in.safetensors", with_gates(&inputs, &gates));
        let said = room.good(&format!("{ATTEND} --terms 5 {args} --compare softmax --json"));
        let report: serde_json::Value = serde_json::from_str(&said).unwrap();
        let mut problem = problem(&inputs);
        problem.decay = if gated {
            Decay::LogGates(gates.data.clone())
        } else {
            Decay::Slopes(vec![0.1, 0.02])
        };
        let want =
            relative_rms(&room.tensor("y.safetensors", "y").data, &softmax_attention(&problem).y);
        let got = report["against_softmax"]["relative_rms"].as_f64().unwrap();
        assert!((got / want - 1.0).abs() < 1e-6, "{args}: {got} is not {want}");
        let said = room.good(&format!("{ATTEND} {args} --compare softmax"));
        assert!(said.contains("softmax in f64 with the same decay"), "{said}");
    }
}

#[test]
fn a_state_goes_on_with_gates() {
    let (inputs, gates) = inputs(Dtype::F32);
    let room = Room::new();
    let settings = "--terms 3 --near 1 --block 8 --sinks 3 --gates log_f";
    let mut problem = problem(&inputs);
    (problem.terms, problem.near, problem.block, problem.sinks) = (3, Near::Blocks(1), 8, 3);
    problem.decay = Decay::LogGates(gates.data.clone());
    let want = attention(&problem).y;
    for center in ["", "--center"] {
        let mut parts = vec![vec![]; HEADS];
        for (i, (from, to)) in [(0, 37), (37, TOKENS)].into_iter().enumerate() {
            let part = |tensor: &Tensor| tensor.tokens(from..to);
            room.write("in.safetensors", with_gates(&inputs.each_ref().map(part), &part(&gates)));
            let state = if i == 0 { center } else { "--state-in past" };
            let said = room.good(&format!("{ATTEND} {settings} {state} --state-out past"));
            assert!(said.contains(&format!("{from} → {to} tokens")), "{said}");
            assert_eq!(said.contains("less a mean"), !center.is_empty(), "{said}");
            let y = room.tensor("y.safetensors", "y");
            let size = (to - from) * y.shape[2];
            for (part, y) in parts.iter_mut().zip(y.data.chunks_exact(size)) {
                part.extend_from_slice(y);
            }
        }
        let error = relative_rms(&parts.concat(), &want);
        assert!(error <= 1e-5, "{center}: {error:e}");
    }
}

#[test]
fn centres_keep_digits_of_keys_far_from_0() {
    let (mut inputs, _) = inputs(Dtype::F32);
    let [q, k, v] = &mut inputs;
    for x in &mut q.data {
        *x *= 0.1;
    }
    for x in k.data.iter_mut().chain(&mut v.data) {
        *x += 30.0;
    }
    let inputs = inputs.map(|x| Tensor::new(Dtype::F32, &x.shape, x.data));
    let mut problem = problem(&inputs);
    problem.series = Series::Gauss;
    let want = attention(&problem).y;
    let room = Room::new();
    room.write("in.safetensors", file(&inputs));
    let said = room.good(&format!("{ATTEND} --series gauss --center"));
    assert!(said.contains("less a mean, not saved"), "{said}");
    let error = relative_rms(&room.tensor("y.safetensors", "y").data, &want);
    assert!(error <= 1e-5, "{error:e}");
    // In full attention too.
    problem.causal = false;
    let want = attention(&problem).y;
    room.good(&format!("{ATTEND} --series gauss --center --full"));
    let error = relative_rms(&room.tensor("y.safetensors", "y").data, &want);
    assert!(error <= 1e-5, "full: {error:e}");
}

#[test]
fn heads_are_diagnosed() {
    let (mut inputs, gates) = inputs(Dtype::F64);
    inputs[0].data.iter_mut().for_each(|x| *x *= 0.05);
    let room = Room::new();
    room.write("in.safetensors", with_gates(&inputs, &gates));
    let mut problem = problem(&inputs);
    (problem.terms, problem.near, problem.block) = (3, Near::Blocks(0), 16);
    problem.decay = Decay::LogGates(gates.data.clone());
    let moments = attention(&problem).far;
    let args = "--terms 3 --near 0 --block 16 --gates log_f --diagnose";
    let said = room.good(&format!("{ATTEND} {args} --json"));
    let report: serde_json::Value = serde_json::from_str(&said).unwrap();
    let heads = report["diagnostics"]["heads"].as_array().unwrap();
    assert_eq!(heads.len(), HEADS);
    for (head, moments) in heads.iter().zip(moments.chunks_exact(TOKENS)) {
        let far: Vec<_> = moments.iter().flatten().collect();
        let mean = |x: &dyn Fn(&sata_oracle::FarMoments) -> f64| {
            far.iter().map(|far| x(far)).sum::<f64>() / far.len() as f64
        };
        let number = |name: &str| head[name].as_f64().unwrap();
        assert_eq!(head["queries"], TOKENS);
        assert_eq!(head["non_positive"], 0);
        assert_eq!(head["far"], far.len());
        assert!((number("mean") - mean(&|far| far.mean)).abs() < 1e-9);
        let deviation = mean(&|far| far.deviation * far.deviation).sqrt();
        assert!((number("deviation") - deviation).abs() < 1e-9);
        assert!(number("estimate") > 0.0 && number("estimate") < number("bound"));
    }
    let said = room.good(&format!("{ATTEND} {args}"));
    for word in ["estimate", "bound", "not positive", "logit mean", "σ"] {
        assert!(said.contains(word), "no '{word}' in\n{said}");
    }
    // Where nothing is far, there is nothing to say of it.
    let said = room.good(&format!("{ATTEND} --near 9 --diagnose"));
    assert!(said.contains('–'), "{said}");
}
