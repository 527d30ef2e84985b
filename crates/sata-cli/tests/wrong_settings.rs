//! Near blocks, sinks, decays, centres and series that cannot be: a message with the argument and
//! the sizes, exit code 2, no file changed.

mod common;

use common::{Room, Tensor, qkv, safe};
use safetensors::Dtype;

const ATTEND: &str = "attend --input in.safetensors --output y.safetensors";

/// A room with a good input of two sequences, gates for it, and an output that must stay.
fn room() -> Room {
    let room = Room::new();
    let inputs = [1, 2, 3].map(|seed| Tensor::normal(Dtype::F32, &[2, 2, 10, 4], seed));
    let gates = |shape: &[usize], log: f64| {
        let count: usize = shape.iter().product();
        Tensor::new(Dtype::F64, shape, [vec![-0.5; count - 1], vec![log]].concat())
    };
    let whole = [2, 2, 10];
    let [q, k, v] = &inputs;
    room.write(
        "in.safetensors",
        safe(&[
            ("q", q),
            ("k", k),
            ("v", v),
            ("good", &gates(&whole, -1.0)),
            ("one", &gates(&[2, 10], -1.0)),
            ("long", &gates(&[2, 2, 11], -1.0)),
            ("many", &gates(&[2, 3, 10], -1.0)),
            ("wide", &gates(&[2, 2, 10, 1], -1.0)),
            ("above", &gates(&whole, 0.25)),
            ("nan", &gates(&whole, f64::NAN)),
            ("low", &gates(&whole, -1e300)),
            ("bits", &Tensor::new(Dtype::BOOL, &whole, vec![0.0; 40])),
        ]),
    );
    room.write("y.safetensors", "old");
    room
}

#[test]
fn windows() {
    let room = room();
    for (args, words) in [
        ("--near -1", &["--near", "'-1'", "none"][..]),
        ("--near some", &["--near", "'some'"]),
        ("--near 1 --full", &["--near 1", "--full", "order", "hint"]),
        ("--near 99999999999999", &["near", "99999999999999", "64", "at most"]),
        ("--block 0", &["--block", "at least 1"]),
        ("--block 99999999999999999", &["block is 99999999999999999"]),
        ("--block x", &["--block", "'x'"]),
        ("--sinks -1", &["--sinks", "-1"]),
        ("--sinks 99999999999999999", &["sinks is 99999999999999999"]),
    ] {
        room.bad(&format!("{ATTEND} {args}"), words);
    }
}

#[test]
fn decays() {
    let room = room();
    for (args, words) in [
        ("--slopes 0.5", &["--slopes has 1", "2 heads"][..]),
        ("--slopes 0.5,0.5,0.5", &["--slopes has 3", "2 heads", "alibi"]),
        ("--slopes -1", &["--slopes", "'-1'", "at least 0"]),
        ("--slopes 1,nan", &["--slopes", "'nan'", "finite"]),
        ("--slopes usual", &["--slopes", "'usual'", "alibi"]),
        ("--slopes alibi --gates good", &["--slopes", "--gates", "cannot be used with"]),
        ("--gates none", &["--gates", "no tensor none", "good"]),
        ("--gates one", &["--gates one", "[2, 10]", "[2, 2, 10]", "batch 2"]),
        ("--gates long", &["--gates long", "[2, 2, 11]", "10 tokens"]),
        ("--gates many", &["--gates many", "[2, 3, 10]", "2 heads"]),
        ("--gates wide", &["--gates wide", "[2, 2, 10, 1]", "[2, 2, 10]"]),
        ("--gates above", &["--gates above", "0.25", "[1, 1, 9]", "at most 0"]),
        ("--gates nan", &["--gates nan", "NaN", "[1, 1, 9, 0]"]),
        ("--gates low", &["--gates low", "-inf", "[1, 1, 9, 0]"]),
        ("--gates bits", &["--gates", "tensor bits", "BOOL", "F32"]),
        ("--prefix a --gates good", &["--input", "a.q"]),
    ] {
        room.bad(&format!("{ATTEND} {args}"), words);
    }
    let q = qkv(Dtype::F32, [2, 2, 10, 10, 4, 4]);
    for (name, tensor) in ["q.npy", "k.npy", "v.npy"].into_iter().zip(&q) {
        room.write(name, tensor.npy());
    }
    let npy = "attend --input q.npy,k.npy,v.npy --output y.safetensors";
    room.bad(&format!("{npy} --gates good"), &["--gates good", ".npy"]);
    room.bad(&format!("{npy} --gates no.npy"), &["--gates", "no.npy"]);
    room.bad(&format!("{npy} --gates q.npy"), &["--gates q.npy", "[2, 10, 4]", "[2, 10]"]);
}

#[test]
fn series_centres_and_diagnoses() {
    let room = room();
    room.write("a.json", "[1, 0, 0.5]");
    for (args, words) in [
        ("--series gauss --terms 3", &["terms is 3", "gauss", "even"][..]),
        ("--series hermite:x", &["--series", "'x'", "τ"]),
        ("--series hermite:-1", &["--series", "'-1'", "at least 0"]),
        ("--series hermit", &["--series", "taylor, gauss, hermite"]),
        ("--center --state-in s", &["--center", "--state-in"]),
        ("--center --series power:2", &["--center", "--series power:2", "[0, 2]"]),
        ("--center --series a.json", &["--center", "--series a.json", "[0, 2]"]),
        ("--diagnose --terms 2", &["--diagnose", "orders 0, 1 and 2", "2 terms", "[0, 1]"]),
        ("--diagnose --series power:2", &["--diagnose", "--series power:2", "[0, 2]"]),
    ] {
        room.bad(&format!("{ATTEND} {args}"), words);
    }
    // What is wrong with an input is not blamed on its means.
    let mut inputs = qkv(Dtype::F32, [2, 2, 10, 10, 4, 4]);
    inputs[1].data[(10 + 3) * 4 + 2] = f64::NAN;
    let [q, k, v] = &inputs;
    room.write("in.safetensors", safe(&[("q", q), ("k", k), ("v", v)]));
    room.bad(&format!("{ATTEND} --center"), &["k holds NaN", "[0, 1, 3, 2]"]);
    let k = Tensor::normal(Dtype::F32, &[2, 10, 5], 1);
    room.write("in.safetensors", safe(&[("q", q), ("k", &k), ("v", v)]));
    room.bad(&format!("{ATTEND} --center"), &["k has shape", "5", "q"]);
}

#[test]
fn states_made_for_other_settings() {
    let room = room();
    let made = "--near 1 --block 4 --sinks 2 --slopes alibi --series gauss";
    let attend = "attend --input in.safetensors --output z.safetensors";
    room.good(&format!("{attend} {made} --state-out s"));
    room.good(&format!("{attend} {made} --state-in s"));
    for (from, to, words) in [
        ("--near 1", "--near 0", ["near", "Blocks(1)", "Blocks(0)"]),
        ("--near 1", "", ["near", "Blocks(1)", "None"]),
        ("--block 4", "--block 5", ["block", "4", "5"]),
        ("--sinks 2", "--sinks 3", ["sinks", "2", "3"]),
        ("--slopes alibi", "", ["decay", "Slopes", "None"]),
        ("--slopes alibi", "--gates good", ["decay", "Slopes", "Gates"]),
        ("--series gauss", "--series taylor", ["made for", "gauss", "taylor"]),
        ("--series gauss", "--series hermite:0.5", ["hermite", "gauss", "0.5"]),
    ] {
        let args = made.replace(from, to);
        let words = [&["--state-in", "hint"][..], &words].concat();
        let words = if to.contains("series") { &words[2..] } else { &words };
        room.bad(&format!("{ATTEND} {args} --state-in s"), words);
    }
}
