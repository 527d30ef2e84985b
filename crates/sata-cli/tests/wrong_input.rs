//! What users get wrong: a message with the argument and the sizes, exit code 2, no file changed.

mod common;

use std::process::Stdio;

use common::{Room, Tensor, file, qkv, safe};
use safetensors::Dtype;

const ATTEND: &str = "attend --input in.safetensors --output y.safetensors";

/// A room with a good input and an output that must stay as it is.
fn room() -> Room {
    let room = Room::new();
    room.write("in.safetensors", file(&qkv(Dtype::F32, [2, 2, 10, 10, 4, 4])));
    room.write("y.safetensors", "old");
    room
}

/// The same with these tensors.
fn room_of(q: &Tensor, k: &Tensor, v: &Tensor) -> Room {
    let room = room();
    room.write("in.safetensors", safe(&[("q", q), ("k", k), ("v", v)]));
    room
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::new(Dtype::F32, shape, vec![0.0; shape.iter().product()])
}

#[test]
fn numbers_that_are_not_finite() {
    for (which, name) in ["q", "k", "v"].into_iter().enumerate() {
        for (wrong, word) in [(f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
            for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16] {
                let mut inputs = qkv(dtype, [2, 2, 10, 10, 4, 4]);
                inputs[which].data[(10 + 3) * 4 + 2] = wrong;
                let room = room();
                room.write("in.safetensors", file(&inputs));
                room.bad(ATTEND, &[name, word, "[0, 1, 3, 2]"]);
            }
        }
    }
}

#[test]
fn shapes_that_do_not_fit() {
    let (a, b) = (zeros(&[2, 10, 4]), zeros(&[2, 10, 5]));
    room_of(&a, &b, &a).bad(ATTEND, &["k has shape", "5", "d_key = 4"]);
    room_of(&a, &a, &zeros(&[2, 9, 4])).bad(ATTEND, &["v has shape", "9", "10"]);
    room_of(&zeros(&[3, 10, 4]), &a, &a).bad(ATTEND, &["q has shape", "3", "multiple", "2"]);
    room_of(&zeros(&[10, 4]), &a, &a).bad(ATTEND, &["q has shape [10, 4]", "[heads, tokens, dim]"]);
    room_of(&zeros(&[2, 2, 10, 4]), &a, &a).bad(ATTEND, &["k has shape", "batch 2"]);
    room_of(&zeros(&[2, 3, 4]), &a, &a).bad(ATTEND, &["k has shape", "3", "hint", "--full"]);
    let mask = Tensor::new(Dtype::BOOL, &[9], vec![1.0; 9]);
    let room = room();
    room.write("in.safetensors", safe(&[("q", &a), ("k", &a), ("v", &a), ("key_mask", &mask)]));
    room.bad(ATTEND, &["key_mask", "[9]", "[1, 10]"]);
    let mask = Tensor::new(Dtype::F32, &[10], vec![1.0; 10]);
    room.write("in.safetensors", safe(&[("q", &a), ("k", &a), ("v", &a), ("key_mask", &mask)]));
    room.bad(ATTEND, &["key_mask", "F32", "BOOL"]);
}

#[test]
fn nothing_to_attend() {
    let a = zeros(&[2, 10, 4]);
    let none = zeros(&[0, 10, 4]);
    room_of(&none, &none, &none).bad(ATTEND, &["q has shape", "heads = 0"]);
    room_of(&a, &none, &none).bad(ATTEND, &["k has shape", "heads = 0"]);
    let none = zeros(&[2, 0, 4]);
    room_of(&none, &none, &none).bad(ATTEND, &["q has shape", "tokens = 0"]);
    room_of(&a, &a, &zeros(&[2, 10, 0])).bad(ATTEND, &["v has shape", "dim = 0"]);
}

#[test]
fn specs_that_cannot_be() {
    let room = room();
    room.bad(&format!("{ATTEND} --terms 0"), &["terms is 0", "at least 1"]);
    room.bad(&format!("{ATTEND} --terms -1"), &["--terms"]);
    room.bad(&format!("{ATTEND} --scale nan"), &["scale is NaN", "finite"]);
    room.bad(&format!("{ATTEND} --series power:3"), &["power:3", "even"]);
    room.bad(&format!("{ATTEND} --series sum"), &["--series", "taylor, gauss"]);
    room.bad(&format!("{ATTEND} --series none.json"), &["--series", "none.json"]);
    room.write("a.json", "[1, 2");
    room.bad(&format!("{ATTEND} --series a.json"), &["a.json", "coefficients"]);
    room.write("a.json", "[0, 0]");
    room.bad(&format!("{ATTEND} --series a.json"), &["series", "not be 0"]);
    room.write("a.json", "[1, 1, 0.5]");
    room.bad(&format!("{ATTEND} --series a.json --terms 4"), &["terms is 4", "3 terms"]);
    room.bad(&format!("{ATTEND} --causal --full"), &["--full"]);
    room.bad(&format!("{ATTEND} --threads 0"), &["--threads"]);
    room.bad(&format!("{ATTEND} --dtype f8"), &["--dtype"]);
}

#[test]
fn more_features_than_memory() {
    let room = room();
    let wide = zeros(&[1, 3, 64]);
    room.write("in.safetensors", file(&[wide.clone(), wide.clone(), wide]));
    // C(103, 39) features.
    room.bad(&format!("{ATTEND} --terms 40"), &["d_key = 64", "features", "bytes", "fewer terms"]);
    room.bad(&format!("{ATTEND} --terms 40 --state-out s"), &["d_key = 64", "fewer terms"]);
    room.bad(&format!("{ATTEND} --terms 1000000"), &["terms is 1000000", "at most 65536"]);
}

#[test]
fn inputs_that_are_not_what_they_should_be() {
    let room = room();
    room.bad("attend --input none.safetensors --output y.safetensors", &["none.safetensors"]);
    room.bad("attend --input . --output y.safetensors", &["--input"]);
    room.bad(&format!("{ATTEND} --prefix layer"), &["layer.q", "it has k, q, v"]);
    let good = room.read("in.safetensors");
    for len in [0, 4, 8, 50, good.len() - 1] {
        room.write("in.safetensors", &good[..len]);
        room.bad(ATTEND, &["in.safetensors", "safetensors", &format!("{len} bytes")]);
    }
    room.write("in.safetensors", "q,k,v\n1,2,3\n");
    room.bad(ATTEND, &["in.safetensors", "not a safetensors file"]);
    let whole = Tensor::new(Dtype::I64, &[2, 10, 4], vec![1.0; 80]);
    room.write("in.safetensors", safe(&[("q", &whole), ("k", &whole), ("v", &whole)]));
    room.bad(ATTEND, &["tensor q", "I64", "F32"]);
    room.write("q.npy", "\u{93}NUMPY");
    room.bad("attend --input q.npy --output y.safetensors", &["1 .npy file", "three"]);
    room.bad("attend --input q.npy,q.npy,q.npy --output y.safetensors", &["q.npy", "not a .npy"]);
    room.bad("attend --input q.npy,k.npy,v.npy --prefix x --output y.npy", &["--prefix x"]);
    room.bad("attend --output y.safetensors", &["--input"]);
}

#[test]
fn states_that_cannot_be_trusted() {
    let room = room();
    room.good("attend --input in.safetensors --output z.safetensors --state-out s");
    let with_state = format!("{ATTEND} --state-in s");
    let good = room.read("s");
    for len in [0, 7, 100, good.len() / 2, good.len() - 1] {
        room.write("s", &good[..len]);
        room.bad(&with_state, &["--state-in", "s:"]);
    }
    for at in [0, 9, good.len() / 2, good.len() - 1] {
        let mut altered = good.clone();
        altered[at] ^= 1;
        room.write("s", &altered);
        room.bad(&with_state, &["--state-in", "s:"]);
    }
    room.write("s", &good);
    room.bad(&format!("{with_state} --terms 3"), &["state", "4", "3"]);
    room.bad(&format!("{with_state} --scale 0.3"), &["state", "scale", "0.3"]);
    room.bad(&format!("{with_state} --dtype f64"), &["state", "F64", "F32"]);
    room.bad(&format!("{with_state} --compare softmax"), &["--compare softmax", "--state-in"]);
    room.bad(&format!("{ATTEND} --state-in none"), &["--state-in", "none"]);
    room.write("in.safetensors", file(&qkv(Dtype::F32, [3, 3, 10, 10, 4, 4])));
    room.bad(&with_state, &["state", "heads", "2", "3"]);
    room.write("in.safetensors", file(&qkv(Dtype::F32, [2, 2, 10, 10, 5, 4])));
    room.bad(&with_state, &["state", "4", "5"]);
    // A refused continuation leaves the state it would have replaced.
    room.bad(&format!("{with_state} --state-out s"), &["state"]);
    assert_eq!(room.read("s"), good);
}

#[test]
fn outputs_that_cannot_be_written() {
    let room = room();
    let attend = |output: &str| format!("attend --input in.safetensors --output {output}");
    room.bad(&attend("no/such/y.safetensors"), &["--output", "no/such", "hint"]);
    room.bad(&attend("in.safetensors/y"), &["--output", "in.safetensors"]);
    room.bad(&attend(".."), &["--output"]);
    room.bad(&format!("{ATTEND} --state-out no/s"), &["--state-out", "no/s"]);
    room.bad(&format!("{ATTEND} --state-out y.safetensors"), &["--state-out", "--output"]);
    room.bad("reproduce --out in.safetensors/r", &["--out", "in.safetensors/r"]);
    room.bad("reproduce --out y.safetensors", &["--out", "y.safetensors"]);
    room.bad("cost --plot no/a.svg", &["no/a.svg"]);
    room.bad("cost --plot a.pdf", &["a.pdf", ".svg or .png"]);
    if cfg!(target_os = "linux") {
        room.bad(&attend("/proc/y"), &["--output", "/proc"]);
        room.bad(&attend("/dev/null"), &["--output", "/dev/null", "not a regular file"]);
        room.bad("reproduce --out /proc/r", &["--out", "/proc/r"]);
    }
}

#[test]
fn counts_and_commands_that_are_not() {
    let room = room();
    room.bad("cost --d-key 0", &["--d-key", "at least 1"]);
    room.bad("cost --terms 0", &["--terms", "at least 1"]);
    room.bad("cost --tokens 1X", &["--tokens", "1K"]);
    room.bad("cost --d-key 8 --d-value 8,16", &["--d-value has 2", "--d-key has 1"]);
    room.bad("attends", &["attend"]);
    room.bad("reproduce --quick --full", &["--full"]);
    assert_eq!(room.run("").code, Some(2));
}

#[test]
fn instruction_sets_that_are_not_there() {
    let room = room();
    let run = room.command(ATTEND).env("SATA_SIMD", "mmx").output().unwrap();
    assert_eq!(run.status.code(), Some(2));
    let said = String::from_utf8(run.stderr).unwrap();
    assert!(said.contains("mmx") && said.contains("portable"), "{said}");
    assert_eq!(room.read("y.safetensors"), b"old");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let room = room();
    for args in ["cost", "cost --json", ATTEND] {
        let mut child =
            room.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && said.is_empty(), "sata {args}: {said}");
    }
}
