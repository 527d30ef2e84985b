//! `eval`, `generate`, `calibrate` and `inspect` over models that already exist, tiny ones.

mod common;
#[path = "../../sata-lm/tests/pretrained/tiny.rs"]
#[allow(dead_code, reason = "each test uses its own part")]
mod tiny;

use common::Room;
use serde_json::Value;

/// A room with the tiny Llama, text that it reads, and other text.
fn room() -> Room {
    let room = Room::new();
    room.write("tiny.gguf", tiny::llama_gguf().bytes());
    let text = |step: usize| -> String {
        let words = ["abc", " a", "b", "c", "12", " ", "ab", " abc", "a", "2"];
        (0..3_000).map(|i| words[(i * i / 7 + i * step) % words.len()]).collect()
    };
    room.write("text.txt", text(3));
    room.write("other.txt", text(4));
    room
}

fn json(room: &Room, args: &str) -> Value {
    serde_json::from_str(&room.good(args)).unwrap()
}

#[test]
fn eval_compares_attentions_with_softmax_by_position() {
    let room = room();
    // Past its context a model's memories are not softmax.
    let mut file = tiny::llama_gguf();
    let context = file.pairs.iter_mut().find(|pair| pair.0 == "llama.context_length").unwrap();
    context.2 = 4096u32.to_le_bytes().to_vec();
    room.write("long.gguf", file.bytes());
    let report = json(
        &room,
        "eval --model long.gguf --text text.txt --context 300 --passes 2 --ranges 10-100,200-300 --json \
         --attention window:4,sinks=2 gauss:2,near=0,block=8 groups:300 groups:8,block=8,kept=2",
    );
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["attention"].as_str().unwrap()).collect();
    assert_eq!(names[0], "softmax");
    assert_eq!(names[3], "groups:300");
    let nats =
        |row: usize, range: usize| rows[row]["ranges"][range]["nats_per_token"].as_f64().unwrap();
    // 300 tokens are within 4 blocks of 64 and the own one, or as many groups.
    assert!((nats(1, 1) - nats(0, 1)).abs() < 1e-4 && (nats(3, 1) - nats(0, 1)).abs() < 1e-3);
    assert_eq!(rows[0]["ranges"][0]["top1_agreement"], 1.0);
    assert_eq!(rows[0]["ranges"][0]["tokens"], 180);
    assert_eq!(rows[0]["bytes"], report["cache_bytes"]);
    let ratio = nats(0, 0)
        / std::f64::consts::LN_2
        / rows[0]["ranges"][0]["bits_per_byte"].as_f64().unwrap();
    let bytes = rows[0]["ranges"][0]["bytes"].as_f64().unwrap();
    assert!((ratio * 180.0 / bytes - 1.0).abs() < 1e-9);
    let table =
        room.good("eval --model tiny.gguf --text text.txt --context 64 --attention softmax");
    assert!(table.contains("softmax") && table.contains("100.0 %"), "{table}");
}

#[test]
fn generate_goes_on_past_the_context() {
    let room = room();
    let write = |attention: &str| {
        let args = "generate --model tiny.gguf --prompt abc --tokens 150 --seed 5 --forever --json";
        json(&room, &format!("{} --attention {attention}", args.replace(" --forever", "")))
    };
    // The model was made for 64 tokens; its last tokens are special and end nothing but token 0.
    let text = write("groups:300")["text"].as_str().unwrap().to_string();
    assert_eq!(text, write("groups:300")["text"].as_str().unwrap());
    let small = write("groups:8,block=8");
    assert!(small["tokens"].as_u64().unwrap() > 0);
    assert!(small["state_bytes"].as_u64().unwrap() < 40_000);
    room.bad("generate --model tiny.gguf", &["--attention", "hint"]);
    room.bad("generate --model tiny.gguf --attention softmax --resume x", &["--resume"]);
    room.bad("generate --attention softmax", &["--attention", "sata train"]);
}

#[test]
fn calibrate_writes_a_setting_within_its_budget_that_eval_reads() {
    let room = room();
    let report = json(
        &room,
        "calibrate --model tiny.gguf --text other.txt --context 600 --budget 30000 --json -o spec.json \
         --candidates window:0,block=8 groups:16,block=8 groups:64,block=8,sinks=2 mixed:3,block=8",
    );
    assert!(report["bytes"].as_u64().unwrap() <= 30_000);
    let heads: u64 =
        report["candidates"].as_array().unwrap().iter().map(|c| c[1].as_u64().unwrap()).sum();
    assert_eq!(heads, 4);
    let report = json(
        &room,
        "eval --model tiny.gguf --text text.txt --context 400 --passes 1 --ranges 200-400 --json \
         --attention spec.json window:0,block=8 mixed:3,block=8 --calibration spec.json",
    );
    let agreement =
        |row: usize| report["rows"][row]["ranges"][0]["top1_agreement"].as_f64().unwrap();
    assert!(agreement(1) > agreement(2), "{report}");
    let base = "calibrate --model tiny.gguf --text other.txt --context 600 -o new.json";
    room.bad(&format!("{base} --budget 100"), &["the budget is 100", "need"]);
    room.bad(&format!("{base} --candidates softmax"), &["softmax", "fixed size"]);
    room.bad(&base.replace("600", "60000"), &["--context is 60000"]);
}

#[test]
fn auto_chooses_by_the_first_tokens() {
    let room = room();
    // A quarter of the cache of 64 tokens is less than the usual candidates need.
    room.bad(
        "eval --model tiny.gguf --text text.txt --context 300 --attention auto",
        &["--attention auto", "smallest candidates"],
    );
    room.write("short.txt", "abc a b");
    room.bad(
        "eval --model tiny.gguf --text short.txt --context 3 --attention auto",
        &["--attention auto", "2048 tokens"],
    );
}

#[test]
fn inspect_reads_a_text_with_the_model() {
    let room = room();
    let report = json(
        &room,
        "inspect --model tiny.gguf --text text.txt --context 200 --queries 16 --series gauss --terms 2 \
         --json",
    );
    let layers = report["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    assert_eq!(layers[1]["heads"].as_array().unwrap().len(), 4);
    assert_eq!(report["causal"], true);
    room.bad("inspect --model tiny.gguf", &["--text"]);
    room.bad(
        "inspect --model tiny.gguf --text text.txt --prefixes layer07",
        &["layer07", "layer00, layer01"],
    );
}

#[test]
fn encoders_are_compared_by_the_cosine() {
    let room = Room::new();
    let folder = tiny::bert_folder();
    let words: Vec<String> = (0..2_500).map(|i| format!("w{}", i * i % 29)).collect();
    room.write("text.txt", words.join(" "));
    let model = folder.path().display();
    let report = json(
        &room,
        &format!(
            "eval --model {model} --text text.txt --attention groups:32 groups:4 gauss:2 --json --context 30"
        ),
    );
    let median = |row: usize| report["rows"][row]["median"].as_f64().unwrap();
    assert!(median(0) > 0.999_99 && median(1) < median(0), "{report}");
    room.good(&format!(
        "calibrate --model {model} --text text.txt --candidates groups:8 -o spec.json"
    ));
    room.good(&format!("eval --model {model} --text text.txt --context 30 --attention spec.json"));
    room.write("short.txt", words[..900].join(" "));
    room.bad(
        &format!("eval --model {model} --text short.txt --attention groups:4"),
        &["50 passages", "hint"],
    );
}

#[test]
fn wrong_settings_and_files_are_refused_by_name() {
    let room = room();
    let base = "eval --model tiny.gguf --text text.txt --context 100";
    room.bad(base, &["--attention is needed"]);
    room.bad(&format!("{base} --attention gauss:3"), &["gauss:3", "even number"]);
    room.bad(&format!("{base} --attention no:3"), &["there is no kind no"]);
    room.bad(&format!("{base} --attention mixed:3"), &["mixed:3", "calibration"]);
    room.bad(&format!("{base} --attention missing.json"), &["missing.json"]);
    room.bad(&format!("{base} --attention softmax --ranges 5"), &["--ranges 5"]);
    room.bad(&format!("{base} --attention softmax --ranges 5-200"), &["5-200", "100"]);
    room.write("bad.json", "{\"heads\": {\"each\": []}}");
    room.bad(&format!("{base} --attention bad.json"), &["bad.json", "the model has 2"]);
    let mut cut = tiny::llama_gguf().bytes();
    cut.truncate(cut.len() - 50);
    room.write("cut.gguf", cut);
    room.bad(
        "eval --model cut.gguf --text text.txt --attention softmax",
        &["output_norm.weight", "bytes"],
    );
    room.bad("eval --text text.txt --attention softmax", &["--attention", "sata train"]);
}
