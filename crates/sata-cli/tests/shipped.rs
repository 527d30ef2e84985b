//! The model that comes with the program: it reads English as a model of English does, and writes.

mod common;

use common::Room;
use serde_json::Value;

/// The beginning of a novel that its training left out.
const NOVEL: &str = include_str!("../data/persuasion.txt");

#[test]
fn it_has_learnt_english() {
    let room = Room::new();
    room.write("novel.txt", NOVEL);
    let ran = room.run("eval --text novel.txt --context 512 --positions 2048 --passes 1 --json");
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let found: Value = serde_json::from_str(&ran.stdout).unwrap();
    let bits = found.pointer("/by_position/bits_per_byte").and_then(Value::as_f64).unwrap();
    // Untrained it needs about 3.4.
    assert!((0.8..2.0).contains(&bits), "{bits} bits per byte");
    // Far beyond the training length too.
    let last = found.pointer("/by_position/buckets").unwrap().as_array().unwrap();
    let last = last.last().unwrap()["bits_per_byte"].as_f64().unwrap();
    assert!((0.8..2.0).contains(&last), "{last} bits per byte at the end");
}

#[test]
fn it_writes_without_a_word_said() {
    let room = Room::new();
    let ran = room.run("generate --tokens 120 --seed 7 --stats");
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.starts_with("CHAPTER I\n\n"), "{}", ran.stdout);
    let letters = |c: &char| c.is_ascii_lowercase() || *c == ' ';
    let (all, plain) = (ran.stdout.chars().count(), ran.stdout.chars().filter(letters).count());
    assert!(all > 250 && plain * 10 > all * 8, "{}", ran.stdout);
    assert_eq!(ran.stdout, room.run("generate --tokens 120 --seed 7").stdout);
    assert_ne!(ran.stdout, room.run("generate --tokens 120 --seed 8").stdout);
}
