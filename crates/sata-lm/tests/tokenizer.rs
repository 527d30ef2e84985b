//! Tokenizers: text to tokens and back, files, streams, wrong input.

use std::hash::{BuildHasher, Hasher, RandomState};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use sata_lm::{END_OF_TEXT, END_OF_TEXT_NAME, Stream, Tokenizer, TokenizerError};

const ROUNDS: usize = 200;

/// A generator whose seed is printed, or taken from `SATA_TEST_SEED`.
fn rng() -> StdRng {
    let seed = match std::env::var("SATA_TEST_SEED") {
        Ok(seed) => seed.parse().expect("SATA_TEST_SEED is a number"),
        Err(_) => RandomState::new().build_hasher().finish(),
    };
    println!("SATA_TEST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

const WORDS: [&str; 12] = [
    "it's",
    "the ",
    " the",
    "\n\n",
    "café",
    "λόγος ",
    "12,345",
    "🦀",
    "\u{a0}",
    "\t",
    "end",
    END_OF_TEXT_NAME,
];

/// Text of words, spaces, any characters at all, and whatever else.
fn text(rng: &mut StdRng, parts: usize) -> String {
    let mut text = String::new();
    for _ in 0..rng.random_range(0..=parts) {
        match rng.random_range(0..4) {
            0 => text.extend((0..rng.random_range(1..9)).map(|_| rng.random::<char>())),
            1 => text.extend((0..rng.random_range(1..9)).map(|_| rng.random_range(' '..='~'))),
            _ => text.push_str(WORDS.choose(rng).unwrap()),
        }
    }
    text
}

fn trained(rng: &mut StdRng) -> Tokenizer {
    let texts: Vec<String> = (0..20).map(|_| text(rng, 200) + "it is").collect();
    let vocab = rng.random_range(257..600);
    Tokenizer::train(texts.iter().map(String::as_str), vocab, 2).unwrap()
}

#[test]
fn every_text_comes_back() {
    let mut rng = rng();
    for tokenizer in [Tokenizer::bytes().unwrap(), trained(&mut rng), trained(&mut rng)] {
        for _ in 0..ROUNDS {
            let text = text(&mut rng, 60);
            let ids = tokenizer.encode(&text).unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
            assert!(ids.iter().all(|&id| id != END_OF_TEXT && (id as usize) < tokenizer.vocab()));
        }
    }
}

#[test]
fn every_byte_sequence_has_tokens() {
    let mut rng = rng();
    for tokenizer in [Tokenizer::bytes().unwrap(), trained(&mut rng)] {
        for _ in 0..ROUNDS {
            let bytes: Vec<u8> = (0..rng.random_range(0..50)).map(|_| rng.random()).collect();
            let ids: Vec<u32> = bytes.iter().map(|&byte| tokenizer.byte_token(byte)).collect();
            assert_eq!(tokenizer.decode_bytes(&ids).unwrap(), bytes);
            assert_eq!(tokenizer.decode(&ids).unwrap(), String::from_utf8_lossy(&bytes));
        }
        let all: Vec<u8> = (0..=255).collect();
        let ids: Vec<u32> = all.iter().map(|&byte| tokenizer.byte_token(byte)).collect();
        assert_eq!(tokenizer.decode_bytes(&ids).unwrap(), all);
    }
}

/// Texts far longer than what is encoded at a time give the tokens of their parts.
#[test]
fn long_texts() {
    let mut rng = rng();
    let tokenizer = trained(&mut rng);
    let paragraph = "It is a truth, universally acknowledged (1813), that\n  a man's\n\n";
    let long = paragraph.repeat(6000);
    let ids = tokenizer.encode(&long).unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), long);
    // A cut between paragraphs may be anywhere but between their line feeds.
    let one = tokenizer.encode(&paragraph[..paragraph.len() - 2]).unwrap();
    let next = tokenizer.encode(&format!("\n\n{}", paragraph.trim_end())).unwrap();
    let last = tokenizer.encode("\n\n").unwrap();
    let want: Vec<u32> = one.into_iter().chain(next.repeat(5999)).chain(last).collect();
    assert_eq!(ids, want);

    for run in [" ", "\n", "a", "7", "-", "é", "\u{3000}"] {
        let long = run.repeat(300_000);
        let ids = tokenizer.encode(&long).unwrap();
        assert!(tokenizer.decode(&ids).unwrap() == long, "{run:?} 300,000 times");
    }
}

#[test]
fn a_stream_gives_the_same_text() {
    let mut rng = rng();
    let tokenizer = trained(&mut rng);
    for _ in 0..ROUNDS {
        // Tokens at random are rarely UTF-8; single bytes of a text always are.
        let ids: Vec<u32> = if rng.random() {
            (0..100).map(|_| rng.random_range(0..tokenizer.vocab() as u32)).collect()
        } else {
            text(&mut rng, 30).bytes().map(|byte| tokenizer.byte_token(byte)).collect()
        };
        let mut stream = Stream::new();
        let mut all = String::new();
        for &id in &ids {
            if rng.random_ratio(1, 3) {
                stream = Stream::resume(stream.pending()).unwrap();
            }
            all += &stream.push(&tokenizer, id).unwrap();
            assert!(stream.pending().len() < 4);
        }
        all += &stream.finish();
        assert_eq!(all, tokenizer.decode(&ids).unwrap());
    }
}

#[test]
fn a_stream_withholds_what_is_not_complete() {
    let tokenizer = Tokenizer::bytes().unwrap();
    let mut stream = Stream::new();
    let given: Vec<String> = "a🦀"
        .bytes()
        .map(|byte| stream.push(&tokenizer, tokenizer.byte_token(byte)).unwrap())
        .collect();
    assert_eq!(given, ["a", "", "", "", "🦀"]);
    assert!(stream.pending().is_empty());
    let before = stream.clone();
    assert!(matches!(
        stream.push(&tokenizer, 257),
        Err(TokenizerError::UnknownToken { id: 257, vocab: 257 })
    ));
    assert_eq!(stream, before);
    for wrong in [&b"a"[..], &[0xFF], &[0xF0, 0x9F, b'a'], "🦀".as_bytes()] {
        assert!(matches!(Stream::resume(wrong), Err(TokenizerError::Pending { .. })), "{wrong:?}");
    }
}

#[test]
fn training_is_deterministic_and_learns() {
    let mut rng = rng();
    let texts: Vec<String> = (0..50).map(|_| text(&mut rng, 300)).collect();
    let train = || Tokenizer::train(texts.iter().map(String::as_str), 800, 2).unwrap();
    let first = train();
    for _ in 0..5 {
        assert_eq!(train().json(), first.json());
        assert_eq!(train().digest(), first.digest());
    }
    let tokenizer = Tokenizer::train(["low low low lower lowest"; 3], 300, 2).unwrap();
    assert_eq!(tokenizer.encode("low").unwrap().len(), 1);
    assert!(tokenizer.vocab() < 300, "a short text holds no more tokens");
    assert_ne!(tokenizer.digest(), first.digest());
}

#[test]
fn files_come_back() {
    let mut rng = rng();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let tokenizer = trained(&mut rng);
    Tokenizer::bytes().unwrap().save(&path).unwrap();
    tokenizer.save(&path).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    let loaded = Tokenizer::load(&path).unwrap();
    assert_eq!(loaded.digest(), tokenizer.digest());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), tokenizer.json());
    for _ in 0..ROUNDS {
        let text = text(&mut rng, 60);
        assert_eq!(loaded.encode(&text).unwrap(), tokenizer.encode(&text).unwrap());
    }

    let missing = Tokenizer::load(folder.path().join("none.json")).unwrap_err();
    assert!(matches!(missing, TokenizerError::Io { .. }), "{missing}");
    assert!(missing.to_string().contains("none.json"), "{missing}");
    let nowhere = tokenizer.save(folder.path().join("none/t.json")).unwrap_err();
    assert!(matches!(nowhere, TokenizerError::Io { .. }), "{nowhere}");
    let json = tokenizer.json();
    let at = rng.random_range(0..json.len());
    let at = (0..=at).rev().find(|&at| json.is_char_boundary(at)).unwrap();
    std::fs::write(&path, &json[..at]).unwrap();
    let truncated = Tokenizer::load(&path).unwrap_err();
    assert!(matches!(truncated, TokenizerError::File { .. }), "{at}: {truncated}");
    assert!(truncated.to_string().contains("tokenizer.json"), "{truncated}");
}

#[test]
fn other_tokenizers_are_refused() {
    let bytes = Tokenizer::bytes().unwrap();
    let json = bytes.json();
    for (from, to, what) in [
        ("\"add_prefix_space\":false", "\"add_prefix_space\":true", "pre-tokenizer"),
        ("\"normalizer\":null", "\"normalizer\":{\"type\":\"Lowercase\"}", "normalizer"),
        ("\"!\":1,", "\"!!\":1,", "byte 33"),
        (END_OF_TEXT_NAME, "<s>", "<s>"),
    ] {
        assert!(json.contains(from), "{from}");
        let error = Tokenizer::from_bytes(json.replace(from, to).as_bytes()).unwrap_err();
        assert!(matches!(error, TokenizerError::Format { .. }), "{error}");
        assert!(error.to_string().contains(what), "{what}: {error}");
    }
}

#[test]
fn wrong_training_input() {
    for vocab in [0, 256, (1 << 24) + 1] {
        let error = Tokenizer::train(["text"], vocab, 2).unwrap_err();
        assert!(matches!(error, TokenizerError::Vocab { .. }), "{error}");
        assert!(error.to_string().contains(&vocab.to_string()), "{error}");
    }
    for texts in [&[][..], &["", ""]] {
        let error = Tokenizer::train(texts.iter().copied(), 300, 2).unwrap_err();
        assert!(matches!(error, TokenizerError::NoText), "{error}");
    }
    let bytes = Tokenizer::bytes().unwrap();
    assert_eq!(bytes.vocab(), 257);
    let error = bytes.decode(&[1, 999]).unwrap_err();
    assert!(error.to_string().contains("token 999"), "{error}");
    assert_eq!(bytes.decode(&[END_OF_TEXT]).unwrap(), END_OF_TEXT_NAME);
    assert_eq!(bytes.encode("").unwrap(), Vec::<u32>::new());
}
