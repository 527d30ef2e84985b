//! Altered GGUF files: an error or numbers, never a panic, and no memory that the file does not pay for.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sata_lm::pretrained::gguf::Gguf;

use super::tiny::llama_gguf;

fn read(bytes: Vec<u8>) {
    if let Ok(file) = Gguf::parse("altered", bytes) {
        let names: Vec<String> = file.names().map(str::to_string).collect();
        for name in names {
            let _ = file.tensor(&name);
        }
    }
}

#[test]
fn cut_at_every_length() {
    let bytes = llama_gguf().bytes();
    let header = bytes.len().min(4_000);
    for length in (0..header).chain((header..bytes.len()).step_by(97)) {
        assert!(Gguf::parse("cut", bytes[..length].to_vec()).is_err(), "{length}");
    }
}

#[test]
fn bytes_altered_at_random() {
    let bytes = llama_gguf().bytes();
    let mut rng = StdRng::seed_from_u64(11);
    for _ in 0..4_000 {
        let mut altered = bytes.clone();
        for _ in 0..rng.random_range(1..8) {
            // Most of a file is numbers: its beginning is what decides.
            let at = rng.random_range(0..altered.len().min(4_000));
            altered[at] = match rng.random_range(0..3) {
                0 => rng.random(),
                1 => 0xff,
                _ => altered[at] ^ (1 << rng.random_range(0..8)),
            };
        }
        read(altered);
    }
}

#[test]
fn counts_that_the_file_does_not_pay_for() {
    let bytes = llama_gguf().bytes();
    for count in [u64::MAX, 1 << 62, 1 << 40, 1 << 31] {
        for at in [8, 16] {
            let mut altered = bytes.clone();
            altered[at..at + 8].copy_from_slice(&count.to_le_bytes());
            assert!(Gguf::parse("altered", altered).is_err(), "{count} at {at}");
        }
    }
    // A tensor of 2⁴⁰ elements in a file of some kilobytes.
    let mut file = llama_gguf();
    file.tensors[0].1 = vec![1 << 20, 1 << 20];
    let message = Gguf::parse("altered", file.bytes()).unwrap_err().to_string();
    assert!(message.contains("token_embd.weight") && message.contains("bytes"), "{message}");
}
