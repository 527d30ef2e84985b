//! `sata inspect` against the oracle, and against loops written out here.

mod common;

use common::{Room, Tensor, file, qkv, safe};
use safetensors::Dtype;
use sata_oracle::{Near, Problem, Series, Shape, attention, softmax_attention};
use serde_json::Value;

const INSPECT: &str = "inspect --input in.safetensors";

/// What the program says as JSON.
fn report(room: &Room, args: &str) -> Value {
    serde_json::from_str(&room.good(&format!("{INSPECT} --json {args}"))).unwrap()
}

/// The entry of a candidate in a list of them.
fn find<'a>(list: &'a Value, candidate: &str) -> Option<&'a Value> {
    list.as_array().unwrap().iter().find(|one| one["candidate"] == candidate)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn close(got: &Value, want: f64, what: &str) {
    let got = number(got);
    assert!((got - want).abs() <= 1e-6 * want.abs() + 1e-12, "{what}: {got} is not {want}");
}

/// Median and 99 %, linear between ranks.
fn spread(mut errors: Vec<f64>) -> [f64; 2] {
    errors.sort_by(f64::total_cmp);
    [0.5, 0.99].map(|fraction| {
        let at = fraction * (errors.len() - 1) as f64;
        let low = at as usize;
        let high = (low + 1).min(errors.len() - 1);
        errors[low] + (at - low as f64) * (errors[high] - errors[low])
    })
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}

/// |ŷ−y|/|y| and |ŷ−y|/√d of rows.
fn errors(got: &[f64], want: &[f64], d: usize) -> [Vec<f64>; 2] {
    let rows = || got.chunks(d).zip(want.chunks(d));
    let off = |(got, want): (&[f64], &[f64])| norm(got.iter().zip(want).map(|(g, w)| g - w));
    let relative = rows().map(|row| off(row) / norm(row.1.iter().copied())).collect();
    [relative, rows().map(|row| off(row) / (d as f64).sqrt()).collect()]
}

fn multiplied(mut tensors: [Tensor; 3], by: f64) -> [Tensor; 3] {
    let q = &tensors[0];
    let data = q.data.iter().map(|x| x * by).collect();
    tensors[0] = Tensor::new(q.dtype, &q.shape, data);
    tensors
}

fn layer<'a>(name: &str, tensors: &'a [Tensor; 3]) -> Vec<(String, &'a Tensor)> {
    ["q", "k", "v"].iter().zip(tensors).map(|(x, t)| (format!("{name}.{x}"), t)).collect()
}

fn layers(layers: &[Vec<(String, &Tensor)>]) -> Vec<u8> {
    let all: Vec<(&str, &Tensor)> =
        layers.iter().flatten().map(|(name, tensor)| (name.as_str(), *tensor)).collect();
    safe(&all)
}

#[test]
fn every_figure_is_that_of_the_oracle() {
    let room = Room::new();
    let [heads, kv_heads, tokens, d] = [4, 2, 150, 6];
    let inputs = qkv(Dtype::F64, [heads, kv_heads, tokens, tokens, d, d]);
    room.write("in.safetensors", layers(&[layer("a", &inputs)]));
    let (from, block, sinks) = (50, 16, 3);
    let said = report(
        &room,
        &format!(
            "--dtype f64 --from {from} --queries 1000 --block {block} --sinks {sinks} --near none,0,1 \
             --terms 2,3,4 --series taylor,gauss,hermite,power:2"
        ),
    );
    let [q, k, v] = &inputs;
    let shape =
        Shape { query_heads: heads, kv_heads, queries: tokens, keys: tokens, d_key: d, d_value: d };
    let exact = softmax_attention(&Problem::new(shape, &q.data, &k.data, &v.data)).y;
    let mut measured = 0;
    for (name, series, terms) in [
        ("taylor P=2", Series::Taylor, 2),
        ("taylor P=3", Series::Taylor, 3),
        ("taylor P=4", Series::Taylor, 4),
        ("gauss P=2", Series::Gauss, 2),
        ("gauss P=4", Series::Gauss, 4),
        ("hermite P=2", Series::hermite(), 2),
        ("hermite P=3", Series::hermite(), 3),
        ("hermite P=4", Series::hermite(), 4),
        ("power:2", Series::power(2), 3),
    ] {
        for (after, near) in
            [("", Near::None), (", near 0", Near::Blocks(0)), (", near 1", Near::Blocks(1))]
        {
            let name = format!("{name}{after}");
            if let Some(skipped) = find(&said["skipped"], &name) {
                // The only reason to leave a candidate of this size out.
                assert!(skipped["reason"].as_str().unwrap().contains("not supported"), "{skipped}");
                continue;
            }
            let mut problem = Problem::new(shape, &q.data, &k.data, &v.data);
            problem.series = series.clone();
            problem.terms = terms;
            problem.near = near;
            problem.block = block;
            problem.sinks = if near == Near::None { 0 } else { sinks };
            let output = attention(&problem);
            let mut all = vec![];
            for head in 0..heads {
                let rows = (head * tokens + from) * d..(head + 1) * tokens * d;
                let [relative, absolute] = errors(&output.y[rows.clone()], &exact[rows], d);
                let head_said = &said["layers"][0]["heads"][head];
                let one = find(&head_said["candidates"], &name).unwrap();
                let what = format!("{name}, head {head}");
                let [median, p99] = spread(relative.clone());
                close(&one["relative"]["median"], median, &what);
                close(&one["relative"]["p99"], p99, &what);
                close(&one["absolute"]["median"], spread(absolute)[0], &what);
                let bad = output.denominators[head * tokens..][from..tokens].iter();
                let bad = bad.filter(|&&den| den <= 0.0).count();
                close(&one["non_positive"], bad as f64 / (tokens - from) as f64, &what);
                all.extend(relative);
            }
            let overall = find(&said["candidates"], &name).unwrap();
            close(&overall["relative"]["median"], spread(all)[0], &name);
            assert_eq!(overall["heads"], heads);
            measured += 1;
        }
    }
    assert!(measured >= 4, "Taylor and powers with nothing near, at least");
}

#[test]
fn logits_and_windows_are_those_of_plain_loops() {
    let room = Room::new();
    let [heads, tokens, d_key, d_value] = [2, 40, 4, 3];
    let inputs = multiplied(qkv(Dtype::F64, [heads, 1, tokens, tokens, d_key, d_value]), 1.5);
    room.write("in.safetensors", layers(&[layer("a", &inputs)]));
    let said = report(
        &room,
        "--scale 0.7 --from 12 --queries 7 --block 4 --sinks 1 --near 2 --series taylor --terms 3",
    );
    let positions: Vec<usize> = (0..7).map(|i| 12 + i * 28 / 7).collect();
    for head in 0..heads {
        let said = &said["layers"][0]["heads"][head];
        let (mut all, mut deviations, mut off) = (vec![], vec![], vec![]);
        for &t in &positions {
            let q = &inputs[0].data[(head * tokens + t) * d_key..][..d_key];
            let x: Vec<f64> = (0..=t)
                .map(|s| {
                    let k = &inputs[1].data[s * d_key..][..d_key];
                    0.7 * q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>()
                })
                .collect();
            let mean = x.iter().sum::<f64>() / x.len() as f64;
            deviations
                .push((x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64).sqrt());
            let average = |near: &dyn Fn(usize) -> bool| {
                let (mut y, mut den) = (vec![0.0; d_value], 0.0);
                for s in (0..=t).filter(|&s| near(s)) {
                    den += x[s].exp();
                    let v = &inputs[2].data[s * d_value..];
                    y.iter_mut().zip(v).for_each(|(y, v)| *y += x[s].exp() * v);
                }
                y.iter().map(|y| y / den).collect::<Vec<f64>>()
            };
            let exact = average(&|_| true);
            let window = average(&|s| s < 1 || s / 4 + 2 >= t / 4);
            off.extend(errors(&window, &exact, d_value)[0].clone());
            all.extend(x);
        }
        let mean = all.iter().sum::<f64>() / all.len() as f64;
        let deviation =
            (all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / all.len() as f64).sqrt();
        close(&said["logits"]["mean"], mean, "mean");
        close(&said["logits"]["deviation"], deviation, "deviation");
        let query_deviation = deviations.iter().sum::<f64>() / deviations.len() as f64;
        close(&said["logits"]["query_deviation"], query_deviation, "query_deviation");
        let largest = all.iter().fold(0.0f64, |a, x| a.max(x.abs()));
        close(&said["logits"]["largest"], largest, "largest");
        let window = find(&said["candidates"], "window, near 2").unwrap();
        let [median, p99] = spread(off);
        close(&window["relative"]["median"], median, "window, median");
        close(&window["relative"]["p99"], p99, "window, 99 %");
    }
}

#[test]
fn full_attention_with_its_own_keys_and_a_batch() {
    let room = Room::new();
    let [batch, heads, queries, keys, d] = [2, 2, 9, 30, 5];
    let tensor = |tokens, seed| Tensor::normal(Dtype::F64, &[batch, heads, tokens, d], seed);
    let inputs = [tensor(queries, 1), tensor(keys, 2), tensor(keys, 3)];
    room.write("in.safetensors", layers(&[layer("a", &inputs)]));
    let said = report(&room, "--full --dtype f64 --terms 3 --series taylor");
    assert_eq!(said["causal"], false);
    assert_eq!(said["candidates"].as_array().unwrap().len(), 1, "nothing is near");
    let shape = Shape { query_heads: heads, kv_heads: heads, queries, keys, d_key: d, d_value: d };
    for head in 0..heads {
        let mut relative = vec![];
        for b in 0..batch {
            let part = |tensor: &Tensor, tokens: usize| {
                tensor.data[b * heads * tokens * d..][..heads * tokens * d].to_vec()
            };
            let [q, k, v] =
                [part(&inputs[0], queries), part(&inputs[1], keys), part(&inputs[2], keys)];
            let mut problem = Problem::new(shape, &q, &k, &v);
            problem.causal = false;
            problem.terms = 3;
            let rows = head * queries * d..(head + 1) * queries * d;
            let (got, want) = (attention(&problem).y, softmax_attention(&problem).y);
            relative.extend(errors(&got[rows.clone()], &want[rows], d)[0].clone());
        }
        let one = &said["layers"][0]["heads"][head]["candidates"][0];
        close(&one["relative"]["median"], spread(relative)[0], "full");
    }
}

#[test]
fn small_logits_work_and_large_ones_fail() {
    let room = Room::new();
    let inputs = qkv(Dtype::F32, [2, 2, 200, 200, 8, 8]);
    let (small, large) = (multiplied(inputs.clone(), 0.1), multiplied(inputs, 20.0));
    room.write("in.safetensors", layers(&[layer("l10", &large), layer("l9", &small)]));
    let args = "--near none --terms 2,3,4";
    let said = report(&room, args);
    assert_eq!(said["layers"][0]["prefix"], "l9", "layers in the order of their numbers");
    for head in 0..2 {
        let small = &said["layers"][0]["heads"][head];
        assert_eq!(small["verdict"], "works", "{}", small["reason"]);
        assert_eq!(small["recommended"], "gauss P=2", "the best of the cheapest");
        let large = &said["layers"][1]["heads"][head];
        assert_eq!(large["verdict"], "fails", "{}", large["reason"]);
        assert!(large["reason"].as_str().unwrap().contains("best error"));
    }
    let counts: Vec<(&str, u64)> = said["verdicts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|count| (count["verdict"].as_str().unwrap(), count["heads"].as_u64().unwrap()))
        .collect();
    assert_eq!(counts, [("works", 2), ("mostly", 0), ("near", 0), ("fails", 2)]);
    assert_eq!(said["one_for_all"], Value::Null);
    let text = room.good(&format!("{INSPECT} {args}"));
    for words in ["works", "fails", "gauss P=2", "works 2, fails 2", "l9", "heads within"] {
        assert!(text.contains(words), "no '{words}' in\n{text}");
    }
    let only = report(&room, &format!("{args} --prefixes l9"));
    assert_eq!(only["layers"].as_array().unwrap().len(), 1);
    assert_eq!(only["one_for_all"], "gauss P=2");
}

#[test]
fn a_window_that_sees_everything_is_near() {
    let room = Room::new();
    room.write("in.safetensors", file(&qkv(Dtype::F32, [1, 1, 64, 64, 8, 8])));
    let said = report(&room, "--near 0 --series taylor --terms 4");
    let head = &said["layers"][0]["heads"][0];
    assert_eq!(head["verdict"], "near");
    assert_eq!(head["recommended"], "window, near 0");
    assert_eq!(
        number(&find(&head["candidates"], "window, near 0").unwrap()["relative"]["p99"]),
        0.0
    );
    let text = room.good(&format!("{INSPECT} --near 0 --series taylor --terms 4"));
    assert!(text.contains("near 0 leaves nothing far to 48 of 48 queries"), "{text}");
}

#[test]
fn budgets_change_what_is_recommended() {
    let room = Room::new();
    let inputs = multiplied(qkv(Dtype::F32, [1, 1, 300, 300, 8, 8]), 0.5);
    room.write("in.safetensors", layers(&[layer("a", &inputs)]));
    let head = |args: &str| {
        let said = report(&room, &format!("--near none --series taylor --terms 2,3,4,5,6 {args}"));
        said["layers"][0]["heads"][0].clone()
    };
    let all = head("");
    let error = |terms: usize| {
        number(
            &find(&all["candidates"], &format!("taylor P={terms}")).unwrap()["relative"]["median"],
        )
    };
    let bytes = |terms: usize| {
        number(&find(&all["candidates"], &format!("taylor P={terms}")).unwrap()["state_bytes"])
    };
    assert!((2..6).all(|terms| error(terms) > error(terms + 1) && bytes(terms) < bytes(terms + 1)));
    for terms in 2..=6 {
        let asked = head(&format!("--max-error {}", error(terms)));
        assert_eq!(asked["recommended"], format!("taylor P={terms}"));
        let asked = head(&format!("--max-error {} --max-state {}", error(6) / 2.0, bytes(terms)));
        assert_eq!(asked["verdict"], "fails");
        assert_eq!(asked["recommended"], format!("taylor P={terms}"));
    }
    let none = head("--max-state 10");
    assert_eq!((&none["verdict"], &none["recommended"]), (&"fails".into(), &Value::Null));
    assert!(none["reason"].as_str().unwrap().contains("no state fits"), "{none}");
    let larger = head(&format!("--max-error {} --max-state {}", error(5), bytes(3)));
    assert!(larger["reason"].as_str().unwrap().contains("of state would do"), "{larger}");
}

#[test]
fn sizes_are_the_cost_models() {
    let room = Room::new();
    room.write("in.safetensors", file(&qkv(Dtype::F32, [1, 1, 20, 20, 8, 8])));
    for (dtype, width) in [("f32", 4), ("f64", 8)] {
        let args = format!("--dtype {dtype} --series taylor --terms 4 --near none,1 --sinks 4");
        let said = report(&room, &args);
        // Sums in f32 carry their rounding errors, which makes them as large as in f64.
        let (sums, token) = (165 * 9 * 8, 16 * width);
        let size = |name: &str| {
            let head = &said["layers"][0]["heads"][0]["candidates"];
            find(head, name)
                .map(|one| [one["state_bytes"].as_u64(), one["break_even_tokens"].as_u64()])
        };
        let all: u64 = sums + 64 * token;
        assert_eq!(size("taylor P=4"), Some([Some(all), Some(all.div_ceil(token))]));
        assert_eq!(size("window, near 1"), Some([Some(132 * token), Some(132)]));
        if let Some(near) = size("taylor P=4, near 1") {
            assert_eq!(near[0], Some(sums + 132 * token));
        }
    }
}

/// Checks that every tag is closed where it should be.
fn check_tags(html: &str) {
    let mut open: Vec<&str> = vec![];
    for piece in html.split('<').skip(1) {
        let (tag, _) = piece.split_once('>').unwrap_or_else(|| panic!("<{piece} is not closed"));
        let name = tag.split([' ', '/']).find(|name| !name.is_empty()).unwrap();
        if tag.starts_with('!') || tag.ends_with('/') || name == "meta" {
            continue;
        }
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "</{name}>");
        } else {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

#[test]
fn a_page_that_needs_no_other_file() {
    let room = Room::new();
    let inputs = qkv(Dtype::F32, [3, 1, 130, 130, 8, 8]);
    let large = multiplied(inputs.clone(), 1e4);
    room.write("in.safetensors", layers(&[layer("a<b>&\"c", &inputs), layer("d", &large)]));
    room.write("p.html", "old");
    let text = room.good(&format!("{INSPECT} --html p.html"));
    assert!(text.contains("wrote p.html"));
    assert_eq!(room.files(), ["in.safetensors", "p.html"]);
    let page = String::from_utf8(room.read("p.html")).unwrap();
    check_tags(&page);
    for words in [
        "<svg",
        "Deviation of the logits",
        "taylor P=4",
        "<title>d, head 2",
        "a&lt;b&gt;&amp;&quot;c",
    ] {
        assert!(page.contains(words), "no '{words}'");
    }
    for words in ["NaN", "http://", "https://", "<script", "<link"] {
        let rest = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!rest.contains(words), "{words}");
    }
}

#[test]
fn the_excerpt_of_activations() {
    let room = Room::new();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/data/activations.safetensors");
    let run = |args: &str| -> Value {
        serde_json::from_str(&room.good(&format!("inspect --input {path} --json {args}"))).unwrap()
    };
    let causal = run("--prefixes smollm2.layer14,smollm2.layer00");
    assert_eq!(causal["causal"], true);
    assert_eq!(causal["layers"][0]["prefix"], "smollm2.layer14", "in the order asked for");
    let taylor = find(&causal["candidates"], "taylor P=4").unwrap();
    assert!(number(&taylor["non_positive"]) > 0.1, "four terms do not suffice");
    let full = run("--prefixes minilm.layer00 --full");
    assert!(find(&full["candidates"], "window, near 1").is_none());
}

#[test]
fn metadata_says_whether_it_is_causal() {
    let room = Room::new();
    let inputs = qkv(Dtype::F32, [1, 1, 20, 20, 4, 4]);
    let with = |causal: &str| {
        let bytes = inputs.each_ref().map(Tensor::bytes);
        let views = ["q", "k", "v"].iter().zip(inputs.iter().zip(&bytes)).map(|(name, (t, b))| {
            let view = safetensors::tensor::TensorView::new(t.dtype, t.shape.clone(), b).unwrap();
            (name.to_string(), view)
        });
        let remarks = [("causal".to_string(), causal.to_string())].into();
        room.write("in.safetensors", safetensors::serialize(views, Some(remarks)).unwrap());
    };
    for (says, causal) in [("true", true), ("false", false)] {
        with(says);
        assert_eq!(report(&room, "")["causal"], causal);
        assert_eq!(report(&room, "--causal")["causal"], true);
        assert_eq!(report(&room, "--full")["causal"], false);
    }
    room.bad(&format!("{INSPECT} --near 1"), &["--near 1", "causal", "hint"]);
    with("perhaps");
    room.bad(INSPECT, &["causal = \"perhaps\"", "--full"]);
}

#[test]
fn wrong_input() {
    let room = Room::new();
    room.write("p.html", "old");
    let good = qkv(Dtype::F32, [2, 2, 20, 20, 4, 4]);
    room.write("in.safetensors", layers(&[layer("a", &good)]));
    for (args, words) in [
        ("--prefixes b", &["--prefixes", "b", "a"][..]),
        ("--prefixes a,", &["--prefixes", "empty"]),
        ("--terms 0", &["--terms", "at least 1"]),
        ("--terms 2,,3", &["--terms"]),
        ("--terms 70000", &["terms is 70000", "--terms", "at most"]),
        ("--series", &["--series"]),
        ("--series none", &["--series", "taylor, gauss"]),
        ("--series power:3", &["power:3", "even"]),
        ("--series gauss --terms 3", &["gauss", "even", "[3]"]),
        ("--near many", &["--near", "none"]),
        ("--near ,", &["--near"]),
        ("--block 0", &["--block", "at least 1"]),
        ("--sinks -1", &["-1"]),
        ("--queries 0", &["--queries", "at least 1"]),
        ("--from 20", &["--from 20", "20 tokens"]),
        ("--scale nan", &["--scale", "finite"]),
        ("--max-error 0", &["--max-error", "above 0"]),
        ("--max-error nan", &["--max-error"]),
        ("--max-state 1X", &["--max-state", "1K"]),
        ("--dtype f16", &["--dtype"]),
        ("--causal --full", &["--full"]),
        ("--full --near 0", &["--near 0", "causal"]),
        ("--threads 0", &["--threads"]),
        ("--html no/p.html", &["--html", "no/p.html", "folder"]),
    ] {
        room.bad(
            &format!("{INSPECT} --html p.html {args}").replace("--html p.html --html", "--html"),
            words,
        );
    }
    room.bad("inspect", &["--input"]);
    room.bad("inspect --input none.safetensors", &["--input", "none.safetensors"]);
    room.write("in.safetensors", "q,k,v\n");
    room.bad(INSPECT, &["in.safetensors", "not a safetensors file"]);
    let [q, k, v] = &good;
    room.write("in.safetensors", safe(&[("x", q)]));
    room.bad(INSPECT, &["--input", "PREFIX.q", "it has x"]);
    room.write("in.safetensors", safe(&[("a.q", q), ("a.v", v)]));
    room.bad(INSPECT, &["no tensor a.k", "--prefixes"]);
    let zeros = |shape: &[usize]| Tensor::new(Dtype::F32, shape, vec![0.0; shape.iter().product()]);
    for (q, k, v, words) in [
        (q.clone(), zeros(&[2, 20, 5]), v.clone(), &["a.k", "5", "a.q", "dim"][..]),
        (q.clone(), k.clone(), zeros(&[2, 19, 4]), &["a.v", "19", "a.k", "tokens"]),
        (zeros(&[3, 20, 4]), k.clone(), v.clone(), &["a.q", "3 heads", "multiple", "2"]),
        (zeros(&[2, 19, 4]), k.clone(), v.clone(), &["a.k has 20", "a.q has 19", "--full"]),
        (zeros(&[20, 4]), k.clone(), v.clone(), &["a.q", "[20, 4]", "[heads, tokens, dim]"]),
        (zeros(&[2, 2, 20, 4]), k.clone(), v.clone(), &["a.k", "batch"]),
        (zeros(&[2, 0, 4]), k.clone(), v.clone(), &["a.q", "tokens = 0"]),
        (q.clone(), k.clone(), zeros(&[2, 20, 0]), &["a.v", "dim = 0"]),
    ] {
        room.write("in.safetensors", safe(&[("a.q", &q), ("a.k", &k), ("a.v", &v)]));
        room.bad(INSPECT, words);
    }
    for (wrong, dtype, words) in [
        (f64::NAN, Dtype::F32, &["a.k holds NaN", "[0, 1, 3, 2]"][..]),
        (f64::INFINITY, Dtype::F16, &["a.k holds inf", "[0, 1, 3, 2]"]),
        (1e300, Dtype::F64, &["a.k holds 1", "f32 cannot hold", "--dtype f64"]),
    ] {
        let mut k = k.clone();
        k.data[(20 + 3) * 4 + 2] = wrong;
        let k = Tensor::new(dtype, &k.shape, k.data);
        room.write("in.safetensors", safe(&[("a.q", q), ("a.k", &k), ("a.v", v)]));
        room.bad(INSPECT, words);
    }
}
