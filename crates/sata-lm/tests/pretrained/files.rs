//! What is wrong with a file is said with the tensor's name and sizes.

use sata_lm::pretrained::Pretrained;

use super::tiny::{
    Writer, bert, bert_folder, llama, llama_folder, llama_gguf, word_tokenizer, write_safetensors,
};

fn refused(file: &Writer) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    Pretrained::load(&path).unwrap_err().to_string()
}

fn says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{message}: no {word}");
    }
}

#[test]
fn gguf_files_that_do_not_hold_a_model() {
    let mut file = llama_gguf();
    file.tensors.retain(|tensor| tensor.0 != "blk.1.ffn_up.weight");
    says(&refused(&file), &["no tensor blk.1.ffn_up.weight"]);

    let mut file = llama_gguf();
    let at = file.tensors.iter().position(|tensor| tensor.0 == "blk.0.attn_k.weight").unwrap();
    file.tensors[at].1 = vec![24, 12];
    says(&refused(&file), &["blk.0.attn_k.weight", "[24, 12]", "[12, 24]"]);

    let mut file = llama_gguf();
    file.tensors[at].2 = 10;
    says(&refused(&file), &["blk.0.attn_k.weight", "Q2_K", "Q4_K"]);
    file.tensors[at].2 = 4_000_000_000;
    says(&refused(&file), &["blk.0.attn_k.weight", "type 4000000000"]);
    // Rows of 24 are no whole blocks of 32.
    file.tensors[at].2 = 8;
    says(&refused(&file), &["blk.0.attn_k.weight", "32"]);

    let mut file = llama_gguf();
    file.tensors[at].3[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
    says(&refused(&file), &["blk.0.attn_k.weight", "NaN", "element"]);

    let mut file = llama_gguf();
    file.pairs.retain(|pair| pair.0 != "llama.attention.head_count");
    says(&refused(&file), &["llama.attention.head_count"]);

    let mut file = llama_gguf();
    file.pairs[0].2 = super::tiny::text("mamba");
    says(&refused(&file), &["general.architecture", "mamba", "llama"]);

    let mut file = llama_gguf();
    for pair in &mut file.pairs {
        if pair.0 == "tokenizer.ggml.model" {
            pair.2 = super::tiny::text("llama");
        }
    }
    says(&refused(&file), &["tokenizer.ggml.model", "tokenizer.json"]);

    let mut file = llama_gguf();
    file.text("llama.rope.scaling.type", "yarn");
    says(&refused(&file), &["rope.scaling", "yarn"]);
}

#[test]
fn safetensors_folders_that_do_not_hold_a_model() {
    let folder = llama_folder(safetensors::Dtype::F32);
    let weights = folder.path().join("model.safetensors");
    let fails = || Pretrained::load(folder.path()).unwrap_err().to_string();

    let mut tensors = llama();
    tensors.remove(3);
    write_safetensors(&weights, &tensors, safetensors::Dtype::F32);
    says(&fails(), &["no tensor model.layers.0.self_attn.k_proj.weight"]);

    let mut tensors = llama();
    tensors[3].shape = vec![24, 12];
    write_safetensors(&weights, &tensors, safetensors::Dtype::F32);
    says(&fails(), &["self_attn.k_proj", "[24, 12]", "[12, 24]"]);

    let mut tensors = llama();
    tensors[3].data[5] = f32::INFINITY;
    write_safetensors(&weights, &tensors, safetensors::Dtype::F32);
    says(&fails(), &["self_attn.k_proj", "inf", "element 5"]);

    write_safetensors(&weights, &llama(), safetensors::Dtype::I32);
    says(&fails(), &["I32", "F16"]);

    write_safetensors(&weights, &llama(), safetensors::Dtype::F32);
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 5]).unwrap();
    says(&fails(), &["model.safetensors"]);
    std::fs::write(&weights, bytes).unwrap();

    let config = folder.path().join("config.json");
    for (from, to, words) in [
        ("\"llama\"", "\"t5\"", ["model_type", "t5"]),
        ("\"silu\"", "\"relu\"", ["hidden_act", "relu"]),
        ("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", ["4 query heads", "3"]),
        ("\"vocab_size\": 40,", "", ["vocab_size", "not given"]),
        ("\"vocab_size\": 40", "\"vocab_size\": 39", ["39", "40"]),
    ] {
        std::fs::write(&config, super::tiny::LLAMA_CONFIG.replace(from, to)).unwrap();
        says(&fails(), &words);
    }
    std::fs::remove_file(config).unwrap();
    says(&fails(), &["config.json"]);
}

#[test]
fn encoders_that_are_not_whole() {
    let folder = bert_folder();
    let mut tensors = bert();
    tensors.pop();
    let weights = folder.path().join("model.safetensors");
    write_safetensors(&weights, &tensors, safetensors::Dtype::F32);
    let fails = || Pretrained::load(folder.path()).unwrap_err().to_string();
    says(&fails(), &["no tensor encoder.layer.1.output.LayerNorm.bias"]);
    write_safetensors(&weights, &bert(), safetensors::Dtype::F32);
    std::fs::write(folder.path().join("tokenizer.json"), word_tokenizer(31)).unwrap();
    says(&fails(), &["30 tokens", "31"]);
}

#[test]
fn two_files_in_a_folder_must_be_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a.gguf", "b.gguf"] {
        std::fs::write(folder.path().join(name), llama_gguf().bytes()).unwrap();
    }
    let message = Pretrained::load(folder.path()).unwrap_err().to_string();
    says(&message, &["a.gguf", "b.gguf"]);
}
