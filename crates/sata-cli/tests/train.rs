//! `sata train`: settings, checkpoints, interruptions.

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use common::{Ran, Room};
use serde_json::Value;

const CONFIG: &str = "
[model]
layers = 2
width = 32
mlp = 64
[model.attention]
heads = 2
head_dim = 16
kernel = { kind = \"taylor\", terms = 3 }
near = 1
block = 16
position = \"gates\"
[tokenizer]
vocab = 300
[train]
steps = 30
batch = 4
micro_batch = 2
context = 32
lengths = [16, 32, 64]
learning_rate = 3e-3
min_learning_rate = 3e-4
warmup = 5
evaluate_every = 10
evaluate_tokens = 128
checkpoint_every = 5
validation = 0.1
";

const TRAIN: &str = "train --text text.txt --config a.toml --out model";

/// A room with a text and settings.
fn room() -> Room {
    let room = Room::new();
    let line =
        |i: usize| format!("{i} green bottles hanging on the wall, number {} falls.\n", i / 3);
    let text: String = (0..300).map(line).collect();
    room.write("text.txt", text);
    room.write("a.toml", CONFIG);
    room
}

fn good(room: &Room, args: &str) -> String {
    let ran = room.run(args);
    assert_eq!(ran.code, Some(0), "sata {args}\n{}", ran.stderr);
    ran.stdout
}

/// Runs what must be refused with all of `words` on stderr.
fn refused(room: &Room, args: &str, words: &[&str]) {
    let ran = room.run(args);
    assert_eq!(ran.code, Some(2), "sata {args}\n{}", ran.stderr);
    for word in words {
        assert!(ran.stderr.contains(word), "sata {args}: no '{word}' in\n{}", ran.stderr);
    }
}

fn curve(room: &Room, model: &str) -> Value {
    let record: Value =
        serde_json::from_slice(&room.read(&format!("{model}/training.json"))).unwrap();
    record["curve"].clone()
}

fn weights(room: &Room, model: &str) -> Vec<u8> {
    room.read(&format!("{model}/model.safetensors"))
}

/// Names in the model's folder.
fn names(room: &Room, model: &str) -> Vec<String> {
    let entries = std::fs::read_dir(room.path(model)).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Starts the program and waits until it has said that a step of at least so many is done.
#[allow(clippy::zombie_processes, reason = "the caller waits for it")]
fn until_step(mut command: Command, step: usize) -> (Child, BufReader<std::process::ChildStderr>) {
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    loop {
        line.clear();
        if lines.read_line(&mut line).unwrap() == 0 {
            let status = child.wait().unwrap();
            panic!("the program ended early: {status}");
        }
        let said = line.strip_prefix("step ").and_then(|rest| rest.split('/').next());
        if said.is_some_and(|said| said.parse::<usize>().unwrap() >= step) {
            return (child, lines);
        }
    }
}

#[test]
fn a_text_is_learnt_and_the_folder_is_a_model() {
    let room = room();
    let summary = good(&room, &format!("{TRAIN} --json --steps 60"));
    let summary: Value = serde_json::from_str(&summary).unwrap();
    assert_eq!(summary["steps"], 60);
    let bits = summary["validation_bits_per_byte"].as_f64().unwrap();
    // Eight bits a byte know nothing.
    assert!(bits < 3.5, "{bits}");
    assert!(summary["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!(
        names(&room, "model"),
        [
            ".training",
            "checkpoint.safetensors",
            "config.json",
            "loss.svg",
            "model.safetensors",
            "tokenizer.json",
            "training.json"
        ]
    );
    let config: Value = serde_json::from_slice(&room.read("model/config.json")).unwrap();
    assert_eq!(config["attention"]["kernel"]["terms"], 3);
    let embed = room.tensor("model/model.safetensors", "embed.weight");
    assert_eq!(config["vocab"].as_u64(), Some(embed.shape[0] as u64));
    assert!(String::from_utf8(room.read("model/loss.svg")).unwrap().contains("bits per byte"));
    assert_eq!(curve(&room, "model").as_array().unwrap().len(), 60);
}

#[test]
fn threads_change_nothing() {
    let room = room();
    for threads in [1, 3] {
        good(
            &room,
            &format!(
                "train --text text.txt --config a.toml --out m{threads} --threads {threads} --steps 8"
            ),
        );
    }
    assert_eq!(curve(&room, "m1"), curve(&room, "m3"));
    assert!(weights(&room, "m1") == weights(&room, "m3"));
}

#[test]
fn a_killed_training_goes_on_with_the_same_curve() {
    let room = room();
    let train = format!("{TRAIN} --steps 200");
    good(&room, &train.replace("model", "whole"));
    let (mut child, _lines) = until_step(room.command(&train), 50);
    child.kill().unwrap();
    child.wait().unwrap();
    refused(&room, &train, &["model", "holds", "--resume"]);
    good(&room, &format!("{train} --resume --threads 3"));
    assert_eq!(curve(&room, "model"), curve(&room, "whole"));
    assert!(weights(&room, "model") == weights(&room, "whole"));
    // Once more has nothing to do.
    good(&room, &format!("{train} --resume"));
    assert_eq!(curve(&room, "model"), curve(&room, "whole"));
}

#[test]
#[cfg(unix)]
fn ctrl_c_writes_a_checkpoint_and_stops() {
    let room = room();
    room.write("a.toml", CONFIG.replace("checkpoint_every = 5", "checkpoint_every = 100000"));
    let long = format!("{TRAIN} --steps 100000");
    let (child, _lines) = until_step(room.command(&long), 10);
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let ran = child.wait_with_output().unwrap();
    assert_eq!(ran.status.code(), Some(130));
    let points = curve(&room, "model").as_array().unwrap().len();
    assert!(points >= 10);
    let (mut child, _lines) = until_step(room.command(&format!("{long} --resume")), points + 1);
    // While it runs nobody else may write there.
    refused(&room, &format!("{long} --resume"), &["another training"]);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Runs the program in a shell that limits how large files may grow, in units of 512 or 1024 bytes
/// by shell.
#[cfg(target_os = "linux")]
fn limited(room: &Room, blocks: usize, trap: &str, args: &str) -> Ran {
    let mut command = Command::new("sh");
    let program = env!("CARGO_BIN_EXE_sata");
    command.args(["-c", &format!("{trap} ulimit -f {blocks}; exec {program} {args}")]);
    command.current_dir(room.path("."));
    Ran::from(command.output().unwrap())
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_an_error_that_keeps_the_last_checkpoint() {
    let room = room();
    // Longer steps, so that the checkpoint outgrows the limit by its curve alone.
    good(&room, &format!("{TRAIN} --steps 30"));
    let before: Vec<_> = names(&room, "model")
        .into_iter()
        .map(|name| (room.read(&format!("model/{name}")), name))
        .collect();
    room.write("b.toml", CONFIG);
    let fresh = "train --text text.txt --config b.toml --out fresh";
    // A write beyond the limit fails where the signal is ignored, as on a full disk …
    let ran = limited(&room, 64, "trap '' XFSZ;", fresh);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("checkpoint.safetensors"), "{}", ran.stderr);
    assert!(ran.stderr.contains("no checkpoint was written yet"), "{}", ran.stderr);
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
    assert!(!names(&room, "fresh").iter().any(|name| name.contains("checkpoint")));
    // … and otherwise kills the process in the middle of writing.
    let ran = limited(&room, 64, "", fresh);
    assert_eq!(ran.code, None, "{}", ran.stderr);
    let left = names(&room, "fresh");
    assert!(left.contains(&"checkpoint.safetensors.partial".to_string()), "{left:?}");
    // What is left is no obstacle.
    good(&room, fresh);
    assert!(!names(&room, "fresh").iter().any(|name| name.contains("partial")));
    assert!(weights(&room, "fresh") == weights(&room, "model"));
    for (bytes, name) in before {
        assert!(bytes == room.read(&format!("model/{name}")), "{name}");
    }
}

/// Heads of two kinds in a model: trained, interrupted, read and written with.
#[test]
fn a_mixture_goes_all_the_way() {
    let room = room();
    let train = format!("{TRAIN} --attention taylor:3,near:1+power:2,near:0 --json");
    let summary: Value =
        serde_json::from_str(&good(&room, &format!("{train} --steps 200"))).unwrap();
    let single = format!("{TRAIN} --json --steps 6").replace("model", "single");
    let single: Value = serde_json::from_str(&good(&room, &single)).unwrap();
    assert_eq!(summary["parameters"], single["parameters"]);
    assert!(
        summary["validation_bits_per_byte"].as_f64() < single["validation_bits_per_byte"].as_f64()
    );
    let config: Value = serde_json::from_slice(&room.read("model/config.json")).unwrap();
    let groups = &config["attention"]["kernel"]["groups"];
    assert_eq!((&groups[0]["heads"], &groups[1]["heads"]), (&1.into(), &1.into()));
    assert_eq!(groups[1]["kernel"]["exponent"], 2);
    let cut = train.replace("model", "cut");
    let (mut child, _lines) = until_step(room.command(&format!("{cut} --steps 200")), 50);
    child.kill().unwrap();
    child.wait().unwrap();
    good(&room, &format!("{cut} --steps 200 --resume"));
    assert_eq!(curve(&room, "cut"), curve(&room, "model"));
    assert!(weights(&room, "cut") == weights(&room, "model"));
    let other = format!("{TRAIN} --steps 200 --resume --attention taylor:3+power:4");
    refused(&room, &other, &["model.attention.kernel.groups"]);

    let generate = "generate --model model --temperature 0 --tokens";
    let whole = good(&room, &format!("{generate} 90 --prompt green"));
    let first = good(&room, &format!("{generate} 30 --prompt green --save-session past"));
    let rest = good(&room, &format!("{generate} 60 --resume past"));
    assert_eq!(first.trim_end_matches('\n').to_owned() + &rest, whole);
    let read: Value =
        serde_json::from_str(&good(&room, "eval --model model --text text.txt --json")).unwrap();
    assert!(read.to_string().contains("bits_per_byte"), "{read}");
    let compared = good(&room, "compare model single --text text.txt --passes 1 --lengths 2");
    assert!(compared.contains("taylor:3,near:1+power:2,near:0+block:16+gates"), "{compared}");
}

#[test]
fn a_training_begins_with_another_models_weights() {
    let room = room();
    good(&room, TRAIN);
    let last = curve(&room, "model")[29]["loss"].as_f64().unwrap();
    // Half of the heads with another kernel, and the tokenizer that is there.
    let other = "train --text text.txt --config a.toml --from model --attention taylor:3+power:2";
    let told = good(&room, &format!("{other} --steps 6 --out other --json"));
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["attention"], "taylor:3+power:2+near:1+block:16+gates");
    // A study takes what was told, without the folder too.
    std::fs::create_dir(room.path("study")).unwrap();
    room.write("study/told.json", told.to_string());
    let table = good(&room, "study study");
    assert!(table.contains("| `taylor:3+power:2+near:1+block:16+gates` |"), "{table}");
    room.write("study/told.json", told.to_string().replace("attention", "notice"));
    refused(&room, "study study", &["study/told.json: it says no attention"]);
    room.write("study/told.json", "{\"parameters\": 3}");
    refused(&room, "study study", &["study/told.json: missing field `attention`"]);
    let losses = curve(&room, "other");
    let first = losses[0]["loss"].as_f64().unwrap();
    let fresh = curve(&room, "model")[0]["loss"].as_f64().unwrap();
    assert!((first - last).abs() < 0.3 * (fresh - last), "{first} after {last}, fresh {fresh}");
    assert_eq!(room.read("other/tokenizer.json"), room.read("model/tokenizer.json"));
    room.write("wide.toml", CONFIG.replace("mlp = 64", "mlp = 96"));
    refused(
        &room,
        "train --text text.txt --config wide.toml --from model --out wide",
        &["--from model/model.safetensors: layers.0.mlp.", "has shape", "the settings ask for"],
    );
    refused(
        &room,
        "train --text text.txt --config a.toml --from nothing --out wide",
        &["nothing/tokenizer.json"],
    );
    refused(
        &room,
        "train --text text.txt --config a.toml --from model --out model --resume",
        &["--from"],
    );
    assert!(!room.path("wide").exists());
}

#[test]
fn recall_takes_a_mixture() {
    let room = room();
    room.write(
        "recall.toml",
        "
        [model]
        layers = 1
        width = 32
        mlp = 32
        [model.attention]
        heads = 8
        head_dim = 16
        kernel = { kind = \"power\", exponent = 2 }
        near = 0
        block = 16
        position = \"gates\"
        [recall]
        words = 16
        pairs = [4]
        [train]
        steps = 2
        batch = 2
        micro_batch = 2
        context = 16
        learning_rate = 1e-3
        ",
    );
    let recall = |words: &str| {
        let args = format!("recall --config recall.toml --heads 4x8 --json --attention {words}");
        serde_json::from_str::<Value>(&good(&room, &args)).unwrap()
    };
    let bytes = |words: &str| recall(words)["state_bytes_per_layer"].as_u64().unwrap();
    let mixed = recall("window+power:4*1");
    assert_eq!(mixed["attention"], "window*3+power:4*1+near:0+block:16+gates");
    let sum = (3 * bytes("window") + bytes("power:4")) / 4;
    assert_eq!(mixed["state_bytes_per_layer"].as_u64(), Some(sum));
    assert_eq!(mixed["parameters"], recall("taylor:3")["parameters"]);
    assert!(recall("window+softmax*1")["state_bytes_per_layer"].is_null());
    let ran = room.run("recall --config recall.toml --attention taylor:3*5+power:2*2");
    assert!(ran.stderr.contains("5 + 2 heads, 7 in all"), "{}", ran.stderr);
    std::fs::create_dir(room.path("study")).unwrap();
    room.write("study/mixed.json", mixed.to_string());
    let table = good(&room, "study study");
    assert!(table.contains("| `window*3+power:4*1+near:0+block:16+gates` | 4 × 8 |"), "{table}");
}

#[test]
fn wrong_input_is_refused_before_any_work() {
    let room = room();
    let bad = |change: (&str, &str), args: &str, words: &[&str]| {
        assert!(CONFIG.contains(change.0), "{}", change.0);
        room.write("b.toml", CONFIG.replacen(change.0, change.1, 1));
        room.bad(&format!("train --config b.toml --out model {args}"), words);
    };
    room.write("empty.txt", "");
    room.write("short.txt", "too short");
    room.write("latin.txt", b"caf\xe9\n".repeat(100));
    let text = "--text text.txt";
    let none = ("steps", "steps");
    bad(none, "--text nowhere.txt", &["nowhere.txt", "No such file"]);
    bad(none, "--text empty.txt", &["empty.txt", "empty"]);
    bad(none, "--text short.txt", &["9 bytes", "64 tokens"]);
    bad(none, "--text latin.txt", &["latin.txt", "byte 3 is 0xe9"]);
    bad(none, &format!("{text} --tokenizer a.toml"), &["a.toml", "tokenizer"]);
    bad(none, &format!("{text} --resume"), &["model", "nothing to resume"]);
    bad(none, &format!("{text} --threads 0"), &["--threads"]);
    bad(none, &format!("{text} --attention cosine"), &["--attention cosine", "taylor:TERMS"]);
    bad(none, &format!("{text} --attention softmax+near:1"), &["--attention", "near"]);
    bad(none, &format!("{text} --attention window+near:none"), &["--attention", "near"]);
    bad(none, &format!("{text} --steps 5"), &["b.toml", "train.warmup is 5"]);
    bad(("layers = 2", "layers = 0"), text, &["b.toml", "model.layers is 0"]);
    bad(("layers = 2", "layer = 2"), text, &["b.toml", "layer"]);
    bad(("batch = 4", "batch = -4"), text, &["b.toml", "-4"]);
    bad(("position = \"gates\"", "position = \"gate\""), text, &["b.toml", "gate"]);
    bad(("validation = 0.1", "validation = [\"nowhere\"]"), text, &["nowhere"]);
    bad(("vocab = 300", "vocab = 10"), text, &["b.toml", "tokenizer.vocab is 10"]);
    room.write("taken", "a file");
    let rest = "--text text.txt --out model";
    room.bad(&format!("train --config nowhere.toml {rest}"), &["nowhere.toml", "No such file"]);
    room.bad("train --config a.toml --text text.txt --out taken", &["taken", "not a folder"]);
}

#[test]
fn another_training_is_not_gone_on_with() {
    let room = room();
    good(&room, &format!("{TRAIN} --steps 6"));
    let files = |room: &Room| {
        let names = names(room, "model");
        names.into_iter().map(|name| room.read(&format!("model/{name}"))).collect::<Vec<_>>()
    };
    let before = files(&room);
    let resume = |args: &str, words: &[&str]| {
        refused(&room, &format!("{TRAIN} --resume {args}"), words);
        assert!(before == files(&room), "{args}");
    };
    resume("--steps 7", &["train.steps was 6", "7 now"]);
    resume("--steps 6 --seed 1", &["train.seed was 0", "1 now"]);
    resume("--steps 6 --attention softmax", &["model.attention.kernel"]);
    room.write("b.txt", "another text, as long as it needs to be. ".repeat(100));
    resume("--steps 6 --text b.txt", &["texts"]);
    room.write("text.txt", "another text, as long as it needs to be. ".repeat(100));
    resume("--steps 6", &["text.txt", "bytes"]);
}
