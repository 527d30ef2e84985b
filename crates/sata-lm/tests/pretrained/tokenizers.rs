//! Tokenizers in GGUF files, and WordPiece.

use sata_lm::pretrained::TextTokenizer;
use sata_lm::pretrained::gguf::Gguf;

use super::tiny::llama_gguf;

#[test]
fn byte_level_bpe_of_a_gguf_file() {
    let file = Gguf::parse("tiny", llama_gguf().bytes()).unwrap();
    let tokenizer = TextTokenizer::from_gguf("tiny", file.metadata()).unwrap();
    let (ids, places) = tokenizer.encode("abc a 12").unwrap();
    assert_eq!(ids, [6, 7, 4, 8, 9], "digits stand alone");
    assert_eq!(places, [(0, 3), (3, 5), (5, 6), (6, 7), (7, 8)]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "abc a 12");
    assert_eq!(tokenizer.encode("a<end>b").unwrap().0, [1, 0, 2]);
    assert_eq!(tokenizer.end_of_text(), Some(0));
    assert_eq!(tokenizer.vocab(), 40);
}

#[test]
fn word_piece() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vocab.txt");
    std::fs::write(&path, "[PAD]\n[UNK]\n[CLS]\n[SEP]\nun\n##aff\n##able\n,\ncafe\n").unwrap();
    let tokenizer = TextTokenizer::word_piece(&path, true).unwrap();
    assert_eq!(tokenizer.encode("Unaffable, CAFÉ xyz").unwrap().0, [2, 4, 5, 6, 7, 8, 1, 3]);
    std::fs::write(&path, "[PAD]\n[UNK]\n[CLS]\n").unwrap();
    let message = TextTokenizer::word_piece(&path, true).unwrap_err().to_string();
    assert!(message.contains("[SEP]"), "{message}");
}
