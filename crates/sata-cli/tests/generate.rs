//! `sata generate`: texts that go on exactly, figures that are right, and what is refused.

mod common;

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::{Ran, Room, Tensor, remark, safe};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use safetensors::{Dtype, SafeTensors};
use sata_lm::infer::{Sampling, Session, Weights};
use sata_lm::{Attention, Config, Kernel, Position, Tokenizer, weight_shapes};
use serde_json::Value;

/// A small model whose tokens are bytes.
fn config(kernel: Kernel) -> Config {
    let softmax = kernel == Kernel::Softmax;
    let attention = Attention {
        heads: 4,
        kv_heads: Some(2),
        head_dim: 8,
        near: if softmax { None } else { Some(1) },
        block: 4,
        sinks: if softmax { 0 } else { 2 },
        kernel,
        position: Position::Gates,
        qk_norm: true,
    };
    Config { vocab: 257, layers: 2, width: 24, mlp: 40, norm_eps: 1e-5, attention }
}

fn taylor() -> Config {
    config(Kernel::Taylor { terms: 3 })
}

/// Random weights, so large that what comes next depends on all that was before.
fn weights(config: &Config, seed: u64) -> Vec<(String, Tensor)> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut tensor = |(name, shape): (String, Vec<usize>)| {
        let is_norm = name.ends_with("norm.weight");
        let columns = shape.last().copied().unwrap_or(1) as f64;
        let number = || match rng.sample::<f64, _>(StandardNormal) {
            x if is_norm => 1.0 + 0.1 * x,
            x => x / columns.sqrt(),
        };
        let data = std::iter::repeat_with(number).take(shape.iter().product()).collect();
        (name, Tensor::new(Dtype::F32, &shape, data))
    };
    weight_shapes(config).into_iter().map(&mut tensor).collect()
}

/// A room for sessions, and one with models.
struct Place {
    room: Room,
    models: Room,
}

impl Place {
    /// With the model `m`.
    fn new(config: &Config) -> Self {
        let place = Place { room: Room::new(), models: Room::new() };
        place.put("m", config, &weights(config, 1));
        place
    }

    fn put(&self, name: &str, config: &Config, weights: &[(String, Tensor)]) {
        std::fs::create_dir(self.models.path(name)).unwrap();
        let write =
            |file: &str, bytes: Vec<u8>| self.models.write(&format!("{name}/{file}"), bytes);
        write("config.json", serde_json::to_vec(config).unwrap());
        write("tokenizer.json", Tokenizer::bytes().unwrap().json().into());
        let weights: Vec<(&str, &Tensor)> = weights.iter().map(|(n, x)| (n.as_str(), x)).collect();
        write("model.safetensors", safe(&weights));
    }

    /// The command line with the model `m`.
    fn args(&self, args: &str) -> String {
        format!("generate --model {} {args}", self.models.path("m").display())
    }

    fn command(&self, args: &str) -> Command {
        self.room.command(&self.args(args))
    }

    fn run(&self, args: &str) -> Ran {
        self.room.run(&self.args(args))
    }

    fn good(&self, args: &str) -> String {
        self.room.good(&self.args(args))
    }

    fn bad(&self, args: &str, words: &[&str]) {
        self.room.bad(&self.args(args), words);
    }

    fn json(&self, args: &str) -> Value {
        serde_json::from_str(&self.good(&format!("{args} --json"))).unwrap()
    }

    /// Bytes that a session withholds.
    fn unfinished(&self, session: &str) -> usize {
        let bytes = self.room.read(session);
        SafeTensors::deserialize(&bytes).unwrap().tensor("unfinished").unwrap().data().len()
    }

    /// Tokens that a session has seen.
    fn position(&self, session: &str) -> u64 {
        remark(&self.room.path(session), "position").parse().unwrap()
    }
}

/// Starts what writes much, and waits for the first bytes of it.
#[allow(clippy::zombie_processes, reason = "the caller waits for it")]
fn started(mut command: Command, bytes: usize) -> (Child, Vec<u8>) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = vec![0; bytes];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    (child, first)
}

/// Ctrl-C.
#[cfg(unix)]
fn interrupt(child: &Child) {
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

#[test]
fn the_same_seed_writes_the_same() {
    let place = Place::new(&taylor());
    let text = place.good("--prompt abc --tokens 60 --seed 1");
    assert!(text.starts_with("abc") && text.len() > 40, "{text:?}");
    assert_eq!(place.good("--prompt abc --tokens 60 --seed 1"), text);
    assert_ne!(place.good("--prompt abc --tokens 60 --seed 2"), text);
    assert_ne!(place.good("--prompt abd --tokens 60 --seed 1")[3..], text[3..]);
    // Without one it is another every time, and said.
    let one = place.json("--prompt abc --tokens 60");
    let other = place.json("--prompt abc --tokens 60");
    assert_ne!(one["text"], other["text"]);
    let seed = &one["sampling"]["seed"];
    let again = place.good(&format!("--prompt abc --tokens 60 --seed {seed}"));
    assert_eq!(one["text"], again.as_str());
}

#[test]
fn a_text_begins_with_the_prompt_or_with_one_that_the_program_has() {
    let place = Place::new(&taylor());
    let said = place.json("--seed 1");
    assert!(said["text"].as_str().unwrap().starts_with("CHAPTER I\n\n"));
    assert_eq!((&said["tokens"], &said["prompt_tokens"]), (&256.into(), &11.into()));
    let short = place.json("--seed 1 --tokens 9");
    assert_eq!((&short["tokens"], &short["position"]), (&9.into(), &20.into()));
    // Longer than what is read at a time; threads may round otherwise, one does not.
    let prompt = "a long prompt ".replace(' ', "_").repeat(50);
    let args = format!("--prompt {prompt} --tokens 20 --seed 1 --threads 1");
    let text = place.good(&args);
    assert!(text.starts_with(&prompt) && text.len() > prompt.len());
    assert_eq!(place.json(&args)["text"], text.as_str());
}

#[test]
fn a_text_in_parts_is_the_text_at_once() {
    for kernel in [Kernel::Softmax, Kernel::Taylor { terms: 3 }] {
        let place = Place::new(&config(kernel.clone()));
        // Every setting is other than the default: the session must keep them.
        let settings = "--seed 3 --temperature 1.3 --top-k 200 --top-p 0.99 \
                        --repetition-penalty 1.4 --repetition-window 9";
        let begin = format!("--prompt €uro {settings}");
        let mut cut_characters = 0;
        for cut in 1..=25 {
            let whole = place.good(&format!("{begin} --tokens {}", cut + 24));
            let mut text = place.good(&format!("{begin} --tokens {cut} --save-session a"));
            cut_characters += usize::from(place.unfinished("a") > 0);
            text += &place.good("--resume a --save-session a --tokens 5");
            text += &place.good("--resume a --tokens 19");
            assert_eq!(text, whole, "{kernel:?}, cut at {cut}");
            // As JSON likewise.
            let json = place.json("--resume a --tokens 19");
            assert!(whole.ends_with(json["text"].as_str().unwrap()));
        }
        assert!(cut_characters > 0, "no cut fell into a character");
        assert_eq!(place.room.files(), ["a"]);
    }
}

#[test]
fn what_the_command_line_says_replaces_what_was_saved() {
    let place = Place::new(&taylor());
    place.good("--prompt abc --tokens 20 --seed 5 --top-k 50 --save-session a");
    let before = place.room.read("a");
    let go_on = |args: &str| place.good(&format!("--resume a --tokens 40 {args}"));
    // A fork.
    let text = go_on("");
    assert_eq!(go_on(""), text);
    assert_eq!(go_on("--seed 5 --top-k 50"), text);
    assert_ne!(go_on("--seed 6"), text);
    assert_eq!(go_on("--seed 6"), go_on("--seed 6"));
    assert_ne!(go_on("--temperature 2"), text);
    assert_eq!(go_on("--temperature 0"), go_on("--temperature 0 --seed 7"));
    assert!(place.room.read("a") == before);
    go_on("--temperature 2 --save-session b");
    let saved: Value = serde_json::from_str(&remark(&place.room.path("b"), "sampling")).unwrap();
    assert_eq!((&saved["temperature"], &saved["top_k"]), (&2.0.into(), &50.into()));
    assert_eq!((&saved["seed"], place.position("b")), (&5.into(), 63));
}

#[test]
fn a_prompt_is_added_to_a_resumed_text() {
    let place = Place::new(&taylor());
    // Until a session ends within a character, which a prompt then breaks off.
    let seed = (1..200).find(|seed| {
        place.good(&format!("--prompt abc --tokens 1 --seed {seed} --save-session a"));
        place.unfinished("a") > 0
    });
    assert!(seed.is_some());
    let said = place.json("--resume a --prompt xyz --tokens 30");
    assert!(said["text"].as_str().unwrap().starts_with("\u{fffd}xyz"), "{said}");
    assert_eq!((&said["prompt_tokens"], &said["position"]), (&3.into(), &37.into()));
    let other = place.json("--resume a --prompt xyy --tokens 30");
    assert_ne!(&other["text"].as_str().unwrap()[6..], &said["text"].as_str().unwrap()[6..]);
    // Nothing is nothing.
    assert_eq!(place.good("--resume a --prompt= --tokens 9"), place.good("--resume a --tokens 9"));
}

#[test]
fn the_end_of_a_text_is_a_line_of_its_own() {
    let config = taylor();
    let mut weights = weights(&config, 1);
    // Nothing but the last token says what comes next, and after any comes the one with the longest
    // embedding: the end of a text.
    for (name, tensor) in &mut weights {
        if name.ends_with("attn.out.weight") || name.ends_with("mlp.down.weight") {
            tensor.data.fill(0.0);
        } else if name == "embed.weight" {
            for (i, x) in tensor.data.iter_mut().enumerate() {
                *x = if i < config.width { 2.0 } else { 1.0 };
            }
        }
    }
    let place = Place { room: Room::new(), models: Room::new() };
    place.put("m", &config, &weights);
    let end = "\n\n* * *\n\n";
    let args = "--prompt a --temperature 0 --repetition-penalty 1";
    assert_eq!(place.good(&format!("{args} --tokens 3")), format!("a{end}{end}{end}"));
}

#[test]
fn figures_are_right() {
    for kernel in [Kernel::Softmax, Kernel::Taylor { terms: 3 }] {
        let config = config(kernel.clone());
        let place = Place::new(&config);
        let said = |tokens: u64| {
            let said = place.json(&format!("--prompt abc --seed 1 --tokens {tokens}"));
            let number = |name: &str| said[name].as_u64().unwrap_or_else(|| panic!("no {name}"));
            assert_eq!(number("tokens"), tokens);
            assert_eq!(number("prompt_tokens"), 3);
            assert_eq!(number("position"), tokens + 3);
            assert_eq!(number("kv_cache_f32_bytes"), 2 * 2 * 2 * 8 * (tokens + 3) * 4);
            assert_eq!(number("troubles"), 0);
            assert!(number("resident_bytes") > 1 << 20);
            assert!(said["tokens_per_second"].as_f64().unwrap() > 1.0);
            let first = said["first_token_seconds"].as_f64().unwrap();
            assert!(first > 0.0 && first < 60.0, "{first}");
            (number("state_bytes"), said["constant"].as_bool().unwrap())
        };
        let ((few, constant), (many, _)) = (said(10), said(500));
        if kernel == Kernel::Softmax {
            // At least keys and values of all tokens.
            assert!(!constant && few >= 13 * 256 && many >= 503 * 256, "{few}, {many}");
        } else {
            assert!(constant && few == many && few > 0, "{few}, {many}");
        }
    }
}

#[test]
fn figures_are_told_apart_from_the_text() {
    let place = Place::new(&taylor());
    let args = "--prompt abc --seed 77 --tokens 500";
    let ran = place.run(&format!("{args} --stats"));
    assert_eq!(ran.code, Some(0));
    assert_eq!(ran.stdout, place.good(args));
    let line = |name: &str| {
        let line = ran.stderr.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in\n{}", ran.stderr)).trim()
    };
    assert_eq!(line("tokens"), "500 written, 3 of prompt, 503 in all");
    assert_eq!(line("seed"), "77");
    // 2 · 2 layers · 2 heads · 8 · 503 tokens · 4 bytes.
    assert!(line("KV cache").starts_with("129 KB in f32"), "{}", ran.stderr);
    assert!(line("state").ends_with("whatever the length"));
    assert!(line("speed").contains(" tokens/s, the first after "));
    assert!(!ran.stderr.contains("troubles"), "{}", ran.stderr);
    // Both at once.
    let both = place.run(&format!("{args} --stats --json"));
    assert_eq!(serde_json::from_str::<Value>(&both.stdout).unwrap()["text"], ran.stdout.as_str());
    assert!(both.stderr.contains("500 written"), "{}", both.stderr);
}

#[test]
fn troubles_are_told() {
    // 1 + x is negative for many of these logits.
    let mut config = config(Kernel::Taylor { terms: 2 });
    (config.attention.near, config.attention.sinks) = (None, 0);
    let mut weights = weights(&config, 1);
    for (name, tensor) in &mut weights {
        if name.ends_with("q_norm.weight") {
            tensor.data.iter_mut().for_each(|x| *x *= 8.0);
        }
    }
    let place = Place { room: Room::new(), models: Room::new() };
    place.put("m", &config, &weights);
    let args = "--prompt abc --seed 1 --tokens 100";
    let troubles = place.json(args)["troubles"].as_u64().unwrap();
    assert!(troubles > 0);
    let said = place.run(&format!("{args} --stats")).stderr;
    assert!(said.contains(&format!("{troubles} queries had no positive denominator")), "{said}");
}

#[test]
#[cfg(unix)]
fn ctrl_c_saves_what_was_written() {
    let place = Place::new(&taylor());
    let begin = "--prompt abc --seed 4";
    let args = format!("{begin} --forever --stats --save-session a");
    let (child, mut text) = started(place.command(&args), 300);
    interrupt(&child);
    let ran = child.wait_with_output().unwrap();
    let said = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(ran.status.code(), Some(0), "{said}");
    text.extend(ran.stdout);
    let tokens = place.position("a") - 3;
    assert!(said.contains(" written, 3 of prompt"), "{said}");
    let text = String::from_utf8(text).unwrap();
    assert_eq!(place.good(&format!("{begin} --tokens {tokens} --save-session b")), text);
    assert_eq!(
        text + &place.good("--resume a --tokens 20"),
        place.good(&format!("{begin} --tokens {}", tokens + 20))
    );
    // What had an end and did not come to it says so.
    let args = format!("{begin} --tokens 100G --save-session a");
    let (child, _) = started(place.command(&args), 300);
    interrupt(&child);
    let ran = child.wait_with_output().unwrap();
    let said = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(ran.status.code(), Some(130), "{said}");
    let tokens = place.position("a") - 3;
    assert!(said.contains(&format!("{tokens} of 100000000000 tokens")), "{said}");
    assert!(said.contains("--resume a"), "{said}");
}

#[test]
#[cfg(unix)]
fn a_second_ctrl_c_ends_it_at_once() {
    let place = Place::new(&taylor());
    // The prompt alone is more than a pipe holds: nobody reads it, so that it waits.
    let prompt = "x".repeat(120_000);
    let (mut child, _) = started(place.command(&format!("--prompt {prompt} --save-session a")), 1);
    interrupt(&child);
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "it waits for its reader");
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(place.room.files().is_empty());
}

#[test]
#[cfg(unix)]
fn ctrl_c_within_the_prompt_saves_nothing() {
    let place = Place::new(&taylor());
    let prompt = "x".repeat(120_000);
    let (child, _) = started(place.command(&format!("--prompt {prompt} --save-session a")), 1);
    interrupt(&child);
    let ran = child.wait_with_output().unwrap();
    let said = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(ran.status.code(), Some(130), "{said}");
    assert!(said.contains("prompt"), "{said}");
    assert!(place.room.files().is_empty());
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let place = Place::new(&taylor());
    for args in ["--forever --save-session a", "--tokens 100G --save-session a"] {
        let (mut child, _) = started(place.command(args), 100);
        drop(child.stdout.take());
        let ran = child.wait_with_output().unwrap();
        let said = String::from_utf8(ran.stderr).unwrap();
        assert!(ran.status.success() && said.is_empty(), "sata {args}: {said}");
        // A hundred bytes are at least so many tokens.
        assert!(place.position("a") > 10);
        std::fs::remove_file(place.room.path("a")).unwrap();
    }
}

#[test]
fn wrong_arguments_are_refused() {
    let place = Place::new(&taylor());
    place.room.write("old", "old");
    place.bad("--tokens 0", &["--tokens", "at least 1"]);
    place.bad("--tokens -5", &["--tokens", "-5"]);
    place.bad("--tokens 5 --forever", &["--tokens", "--forever"]);
    place.bad("--prompt=", &["--prompt", "empty", "hint"]);
    place.bad("--temperature -1", &["--temperature", "-1", "at least 0"]);
    place.bad("--temperature nan", &["--temperature", "NaN", "finite"]);
    place.bad("--top-p 0", &["--top-p", "above 0"]);
    place.bad("--top-p 1.5", &["--top-p", "1.5", "at most 1"]);
    place.bad("--top-k -1", &["--top-k", "-1"]);
    place.bad("--repetition-penalty 0", &["--repetition-penalty", "above 0"]);
    place.bad("--repetition-window 5000", &["--repetition-window", "5000", "4096"]);
    place.bad("--seed x", &["--seed", "x"]);
    place.bad("--threads 0", &["--threads", "at least 1"]);
    place.bad("--save-session no/such/file", &["--save-session", "no/such/file", "folder"]);
    place.bad("--save-session old/file", &["--save-session", "old/file"]);
    let folder = place.models.path("m");
    let folder = format!("--save-session {}", folder.display());
    place.bad(&folder, &[&folder, "it is a folder"]);
    place.bad("--resume none", &["--resume", "none", "No such file"]);
    place.bad("--resume . --save-session old", &["--resume"]);
}

#[test]
#[cfg(unix)]
fn a_prompt_that_is_no_text_is_refused() {
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new(&taylor());
    let mut command = place.command("--prompt");
    command.arg(std::ffi::OsStr::from_bytes(b"caf\xe9"));
    let ran = Ran::from(command.output().unwrap());
    assert_eq!((ran.code, &*ran.stdout), (Some(2), ""));
    assert!(ran.stderr.contains("--prompt caf\u{fffd}: it is not UTF-8"), "{}", ran.stderr);
}

#[test]
fn models_that_are_not_whole_are_refused() {
    let place = Place::new(&taylor());
    place.room.write("old", "old");
    let none = place.models.path("none");
    let none = format!("generate --save-session old --model {}", none.display());
    place.room.bad(&none, &["--model", "none", "No such file"]);
    let args = "--tokens 5 --save-session old";
    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        let path = format!("m/{name}");
        let whole = place.models.read(&path);
        place.models.write(&path, &whole[..whole.len() / 2]);
        place.bad(args, &["--model", name]);
        std::fs::remove_file(place.models.path(&path)).unwrap();
        place.bad(args, &["--model", name, "No such file"]);
        place.models.write(&path, whole);
    }
    let mut config = taylor();
    config.vocab = 258;
    place.put("n", &config, &weights(&config, 1));
    let other = format!("generate --model {} {args}", place.models.path("n").display());
    place.room.bad(&other, &["--model", "258 tokens", "its tokenizer 257"]);
    place.good(args);
}

#[test]
fn sessions_that_cannot_be_trusted_are_refused() {
    let place = Place::new(&taylor());
    place.good("--prompt abc --tokens 20 --seed 5 --save-session a");
    let whole = place.room.read("a");
    let resume = "--resume a --save-session a --tokens 5";
    for cut in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        place.room.write("a", &whole[..cut]);
        place.bad(resume, &["--resume", "a: cut short"]);
    }
    for at in [0, 9, whole.len() / 2, whole.len() - 1] {
        let mut altered = whole.clone();
        altered[at] ^= 1;
        place.room.write("a", &altered);
        place.bad(resume, &["--resume", "a: "]);
    }
    place.room.write("a", "once upon a time");
    place.bad(resume, &["--resume", "a: "]);
    place.room.write("a", &whole);
    let model = Weights::load(place.models.path("m")).unwrap();
    let empty = Session::new(&Arc::new(model), Sampling::default()).unwrap();
    empty.save(place.room.path("b")).unwrap();
    place.bad("--resume b", &["--resume", "no text yet", "--prompt"]);
    place.good("--resume b --prompt abc");
    // Nothing is overwritten when something else is wrong.
    place.bad(&format!("{resume} --top-p 2"), &["--top-p"]);
    place.put("n", &taylor(), &weights(&taylor(), 2));
    let other = format!("generate --model {} {resume}", place.models.path("n").display());
    place.room.bad(&other, &["--resume", "a: it is a session of another model"]);
    assert!(place.room.read("a") == whole);
    place.good(resume);
    assert_eq!(place.position("a"), 28);
}
