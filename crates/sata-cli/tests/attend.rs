//! `sata attend` against the oracle.

mod common;

use common::{Room, Tensor, file, qkv, relative_rms, safe};
use safetensors::Dtype;
use sata_oracle::{Problem, Series, Shape, attention, softmax_attention};

/// The oracle's problem over one sequence.
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

const ATTEND: &str = "attend --input in.safetensors --output y.safetensors";

#[test]
fn number_types_and_grouped_heads() {
    for (dtype, args, out, limit) in [
        (Dtype::F64, "", Dtype::F64, 1e-12),
        (Dtype::F64, "--dtype f32", Dtype::F32, 1e-5),
        (Dtype::F32, "", Dtype::F32, 1e-5),
        (Dtype::F32, "--dtype f64", Dtype::F64, 1e-12),
        (Dtype::F16, "", Dtype::F16, 1e-3),
        (Dtype::F16, "--dtype f32", Dtype::F32, 1e-5),
        (Dtype::BF16, "", Dtype::BF16, 8e-3),
    ] {
        let room = Room::new();
        let inputs = qkv(dtype, [6, 2, 90, 90, 8, 5]);
        room.write("in.safetensors", file(&inputs));
        room.good(&format!("{ATTEND} --terms 5 {args}"));
        let y = room.tensor("y.safetensors", "y");
        assert_eq!((y.dtype, y.shape.as_slice()), (out, [6, 90, 5].as_slice()));
        let mut problem = problem(&inputs);
        problem.terms = 5;
        let error = relative_rms(&y.data, &attention(&problem).y);
        assert!(error <= limit, "{dtype:?} {args}: {error:e}");
    }
}

#[test]
fn series_scale_and_full() {
    let room = Room::new();
    let inputs = qkv(Dtype::F64, [2, 2, 7, 40, 6, 6]);
    room.write("in.safetensors", file(&inputs));
    room.write("a.json", "{\"coefficients\": [1, 0.9, 0, 0.2, 0.1]}");
    room.write("b.json", "[1, 0.9, 0, 0.2, 0.1]");
    let y = |args: &str| {
        room.good(&format!("{ATTEND} --full {args}"));
        room.tensor("y.safetensors", "y").data
    };
    let mut problem = problem(&inputs);
    problem.causal = false;
    assert!(relative_rms(&y(""), &attention(&problem).y) <= 1e-12);
    problem.scale = 0.1;
    assert!(relative_rms(&y("--scale 0.1"), &attention(&problem).y) <= 1e-12);
    problem.scale = -0.1;
    assert!(relative_rms(&y("--scale -0.1"), &attention(&problem).y) <= 1e-12);
    problem.scale = 0.3;
    problem.series = Series::power(4);
    assert!(relative_rms(&y("--scale 0.3 --series power:4"), &attention(&problem).y) <= 1e-12);
    problem.series = Series::Fixed(vec![1.0, 0.9, 0.0, 0.2, 0.1]);
    problem.terms = 5;
    assert!(relative_rms(&y("--scale 0.3 --series a.json"), &attention(&problem).y) <= 1e-12);
    assert!(relative_rms(&y("--scale 0.3 --series b.json"), &attention(&problem).y) <= 1e-12);
}

#[test]
fn a_state_continues_where_it_was_left() {
    let room = Room::new();
    let inputs = qkv(Dtype::F32, [2, 1, 150, 150, 8, 8]);
    room.write("in.safetensors", file(&inputs));
    room.good(&format!("{ATTEND} --threads 1"));
    let whole = room.tensor("y.safetensors", "y");
    let mut parts = vec![vec![]; 2];
    for (i, (from, to)) in [(0, 70), (70, 71), (71, 150)].into_iter().enumerate() {
        room.write(
            "part.safetensors",
            file(&inputs.each_ref().map(|tensor| tensor.tokens(from..to))),
        );
        let state_in = if i == 0 { "" } else { "--state-in past.state" };
        let said = room.good(&format!(
            "attend --input part.safetensors --output part-y.safetensors {state_in} --state-out \
             past.state"
        ));
        assert!(said.contains(&format!("{from} → {to} tokens")), "{said}");
        let y = room.tensor("part-y.safetensors", "y");
        for (head, part) in parts.iter_mut().enumerate() {
            part.extend_from_slice(&y.data[head * (to - from) * 8..(head + 1) * (to - from) * 8]);
        }
    }
    assert!(relative_rms(&parts.concat(), &whole.data) <= 1e-6);
}

#[test]
fn masks_batches_and_the_comparison_with_softmax() {
    let room = Room::new();
    // Two sequences, the second with padding at its end.
    let (heads, tokens, d) = (2, 30, 4);
    let inputs = [1, 2, 3].map(|seed| Tensor::normal(Dtype::F64, &[2, heads, tokens, d], seed));
    let mask: Vec<f64> = (0..2 * tokens).map(|i| f64::from(i < 2 * tokens - 9)).collect();
    let mask = Tensor::new(Dtype::BOOL, &[2, tokens], mask);
    let [q, k, v] = &inputs;
    room.write(
        "in.safetensors",
        safe(&[("x.q", q), ("x.k", k), ("x.v", v), ("x.key_mask", &mask)]),
    );
    let said = room.good(&format!("{ATTEND} --prefix x --full --compare softmax --json --terms 7"));
    let report: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(report["masked_keys"], 9);
    let y = room.tensor("y.safetensors", "y");
    assert_eq!(y.shape, [2, heads, tokens, d]);
    let mut exact = vec![];
    for batch in 0..2 {
        let size = heads * tokens * d;
        let part = |tensor: &Tensor| {
            let data = tensor.data[batch * size..(batch + 1) * size].to_vec();
            Tensor::new(Dtype::F64, &[heads, tokens, d], data)
        };
        let inputs = inputs.each_ref().map(part);
        let there: Vec<bool> = (0..tokens).map(|i| batch == 0 || i < tokens - 9).collect();
        let mut problem = problem(&inputs);
        problem.causal = false;
        problem.terms = 7;
        problem.key_mask = Some(&there);
        let want = attention(&problem).y;
        assert!(relative_rms(&y.data[batch * size..(batch + 1) * size], &want) <= 1e-12);
        exact.extend(softmax_attention(&problem).y);
    }
    let error = report["against_softmax"]["relative_rms"].as_f64().unwrap();
    let want = relative_rms(&y.data, &exact);
    assert!((error / want - 1.0).abs() < 1e-6, "{error} is not {want}");
}

#[test]
fn npy_in_and_out() {
    let room = Room::new();
    let inputs = qkv(Dtype::F32, [2, 2, 20, 20, 4, 4]);
    room.write("in.safetensors", file(&inputs));
    for (name, tensor) in ["q.npy", "k.npy", "v.npy"].into_iter().zip(&inputs) {
        room.write(name, tensor.npy());
    }
    room.good(ATTEND);
    room.good("attend --input q.npy,k.npy,v.npy --output y.npy");
    let y = room.tensor("y.safetensors", "y");
    let bytes = room.read("y.npy");
    assert!(bytes.starts_with(b"\x93NUMPY"));
    assert!(bytes.ends_with(&y.bytes()), "the same numbers");
    assert!(String::from_utf8_lossy(&bytes[..128]).contains("'shape': (2, 20, 4,)"));
    // And back: its own output as an input.
    room.good("attend --input y.npy,k.npy,v.npy --output z.npy");
}

#[test]
fn the_same_numbers_at_every_thread_count_and_level() {
    let room = Room::new();
    let inputs = qkv(Dtype::F32, [4, 4, 300, 300, 8, 8]);
    room.write("in.safetensors", file(&inputs));
    // An odd number of terms: with an even one, denominators near 0 magnify every rounding.
    let mut problem = problem(&inputs);
    problem.terms = 5;
    let want = attention(&problem).y;
    for threads in [1, 2, 5] {
        room.good(&format!("{ATTEND} --terms 5 --threads {threads}"));
        let error = relative_rms(&room.tensor("y.safetensors", "y").data, &want);
        assert!(error <= 1e-5, "{threads} threads: {error:e}");
    }
    for level in sata::Level::available() {
        let run = room
            .command(&format!("{ATTEND} --terms 5"))
            .env("SATA_SIMD", level.to_string())
            .output()
            .unwrap();
        assert!(run.status.success(), "{level}: {}", String::from_utf8_lossy(&run.stderr));
        let error = relative_rms(&room.tensor("y.safetensors", "y").data, &want);
        assert!(error <= 1e-5, "{level}: {error:e}");
    }
}

#[test]
fn denominators_that_are_not_positive_are_told() {
    let room = Room::new();
    // q·k = −4 at scale 1 gives 1 − 4 + 8 − 32/3 < 0.
    let row = |x: f64| Tensor::new(Dtype::F32, &[1, 1, 1], vec![x]);
    let inputs = [row(2.0), row(-2.0), row(1.0)];
    room.write("in.safetensors", file(&inputs));
    let said = room.good(&format!("{ATTEND} --scale 1"));
    assert!(said.contains("1 of 1 queries") && said.contains("warning"), "{said}");
    room.write("y.safetensors", "old");
    room.bad(&format!("{ATTEND} --scale 1 --strict"), &["strict", "1 of 1 queries", "hint"]);
}

#[test]
fn the_excerpt_of_activations_runs_as_its_readme_says() {
    let room = Room::new();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/data/activations.safetensors");
    let said = room.good(&format!(
        "attend --input {path} --prefix smollm2.layer14 --output y.safetensors --compare softmax"
    ));
    assert!(
        said.contains("3 heads on 1 key/value head") && said.contains("not positive"),
        "{said}"
    );
}
