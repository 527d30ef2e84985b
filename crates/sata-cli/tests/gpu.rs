//! `sata bench gpu` and `sata verify`: their arguments, and what needs no GPU. What needs one is tested
//! with its kernels on the CPU, beside the commands.

mod common;

use common::Room;
use serde_json::Value;

/// No machine has so many GPUs; and many have no driver at all.
const NONE: &str = "--device 4096";

#[test]
fn without_a_gpu_the_commands_say_so() {
    let room = Room::new();
    for args in [format!("bench gpu {NONE}"), "verify --ordinal 4096".into()] {
        room.bad(&args, &["error: ", "GPU"]);
    }
}

#[test]
fn wrong_words() {
    let room = Room::new();
    let parts = "prefill, backward, decode, short, figure6";
    room.bad("bench gpu --only speed", &["--only", "speed", parts]);
    room.bad("bench gpu --heads-scale 0", &["--heads-scale", "above 0"]);
    room.bad("bench gpu --heads-scale x", &["--heads-scale", "above 0"]);
    room.bad("bench gpu --beside no.json", &["--beside no.json", "bench-sdpa"]);
    room.write("wrong.json", "{\"device\": 1}");
    room.bad(
        "bench gpu --beside wrong.json",
        &["--beside wrong.json", "expected a string", "bench-sdpa"],
    );
    room.write("file", "");
    room.bad("bench gpu --out file", &["--out file"]);
    room.bad("verify --device tpu", &["--device", "tpu", "cuda, emulator, emulator-hopper, cpu"]);
    room.bad("verify --device cpu --seed x", &["--seed"]);
    room.bad("verify --device cpu --only nothing-has-this", &["--only nothing-has-this"]);
}

#[cfg(not(feature = "emulator"))]
#[test]
fn the_program_that_is_shipped_has_no_emulator() {
    for device in ["emulator", "emulator-hopper"] {
        let words = format!("verify --device {device}");
        Room::new().bad(&words, &[&format!("--device {device}"), "feature"]);
    }
}

fn verified(args: &str) -> Value {
    serde_json::from_str(&Room::new().good(&format!("verify --device cpu --json {args}"))).unwrap()
}

#[test]
fn a_report_in_json() {
    let first = verified("--only packed --quick --seed 77");
    assert_eq!(first["seed"], 77);
    assert_eq!(first["failed"], 0);
    let cases = first["cases"].as_array().unwrap();
    assert_eq!(first["passed"], cases.len());
    assert!(cases.len() > 5);
    for case in cases {
        assert!(case["case"].as_str().unwrap().starts_with("packed"));
        assert_eq!(case["pass"], true);
        assert!(case["error"].as_f64().unwrap() <= case["limit"].as_f64().unwrap());
        assert!(case["faults"].as_array().unwrap().is_empty());
    }
    // The same seed has the same inputs; no seed has others.
    assert_eq!(verified("--only packed --quick --seed 77")["cases"], first["cases"]);
    let other = verified("--only packed --quick");
    assert_ne!(other["seed"], first["seed"]);
    assert_ne!(other["cases"], first["cases"]);
}

#[test]
fn lines_name_each_case() {
    let said = Room::new().good("verify --device cpu --only 32769 --seed 5");
    assert!(said.contains("long contexts\nPASS"), "{said}");
    assert!(said.contains("2 of 2 passed") && said.contains("seed 5"), "{said}");
}
