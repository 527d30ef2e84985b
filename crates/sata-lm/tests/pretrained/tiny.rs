//! Tiny models with the weights of `golden.py`.

use std::path::Path;

use half::f16;

/// The same numbers as `weights` in golden.py.
pub fn weights(seed: u64, len: usize, scale: f64) -> Vec<f32> {
    (0..len as u64)
        .map(|i| {
            let x = (i.wrapping_mul(2_654_435_761) + seed * 40_503 + 12_345) & 0xffff_ffff;
            let x = ((x ^ (x >> 15)).wrapping_mul(2_246_822_519)) & 0xffff_ffff;
            let x = (x ^ (x >> 13)) & 0xffff;
            ((x as f64 / 65_536.0 - 0.5) * scale) as f32
        })
        .collect()
}

/// A tensor with its name.
#[derive(Clone, Debug)]
pub struct Named {
    pub name: String,
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

struct Maker {
    seed: u64,
    tensors: Vec<Named>,
}

impl Maker {
    fn add(&mut self, name: impl Into<String>, shape: &[usize], scale: f64, plus: f32) {
        self.seed += 1;
        let mut data = weights(self.seed, shape.iter().product(), scale);
        data.iter_mut().for_each(|x| *x += plus);
        self.tensors.push(Named { name: name.into(), shape: shape.to_vec(), data });
    }
}

pub const VOCAB: usize = 40;
const WIDTH: usize = 24;
const MLP: usize = 40;
const HEADS: usize = 4;
const KV: usize = 2;
const D: usize = 6;

/// Tensors of the tiny Llama under Hugging Face's names.
pub fn llama() -> Vec<Named> {
    let mut make = Maker { seed: 0, tensors: vec![] };
    make.add("model.embed_tokens.weight", &[VOCAB, WIDTH], 2.0, 0.0);
    for i in 0..2 {
        let mut add = |name: &str, shape: &[usize], scale, plus| {
            make.add(format!("model.layers.{i}.{name}.weight"), shape, scale, plus);
        };
        add("input_layernorm", &[WIDTH], 0.5, 1.0);
        add("self_attn.q_proj", &[HEADS * D, WIDTH], 2.0, 0.0);
        add("self_attn.k_proj", &[KV * D, WIDTH], 2.0, 0.0);
        add("self_attn.v_proj", &[KV * D, WIDTH], 0.5, 0.0);
        add("self_attn.o_proj", &[WIDTH, HEADS * D], 0.5, 0.0);
        add("post_attention_layernorm", &[WIDTH], 0.5, 1.0);
        add("mlp.gate_proj", &[MLP, WIDTH], 0.5, 0.0);
        add("mlp.up_proj", &[MLP, WIDTH], 0.5, 0.0);
        add("mlp.down_proj", &[WIDTH, MLP], 0.5, 0.0);
    }
    make.add("model.norm.weight", &[WIDTH], 0.5, 1.0);
    make.tensors
}

/// Tensors of the tiny encoder.
pub fn bert() -> Vec<Named> {
    let mut make = Maker { seed: 100, tensors: vec![] };
    let e = |name: &str| format!("embeddings.{name}.weight");
    make.add(e("word_embeddings"), &[30, WIDTH], 0.5, 0.0);
    make.add(e("position_embeddings"), &[32, WIDTH], 0.5, 0.0);
    make.add(e("token_type_embeddings"), &[2, WIDTH], 0.5, 0.0);
    make.add("embeddings.LayerNorm.weight", &[WIDTH], 0.5, 1.0);
    make.add("embeddings.LayerNorm.bias", &[WIDTH], 0.5, 0.0);
    for i in 0..2 {
        let mut add = |name: &str, rows: usize, columns: usize, scale, plus| {
            let name = format!("encoder.layer.{i}.{name}");
            match columns {
                0 => make.add(format!("{name}.weight"), &[rows], scale, plus),
                _ => make.add(format!("{name}.weight"), &[rows, columns], scale, plus),
            }
            make.add(format!("{name}.bias"), &[rows], 0.5, 0.0);
        };
        add("attention.self.query", WIDTH, WIDTH, 2.0, 0.0);
        add("attention.self.key", WIDTH, WIDTH, 2.0, 0.0);
        add("attention.self.value", WIDTH, WIDTH, 0.5, 0.0);
        add("attention.output.dense", WIDTH, WIDTH, 0.5, 0.0);
        add("attention.output.LayerNorm", WIDTH, 0, 0.5, 1.0);
        add("intermediate.dense", MLP, WIDTH, 0.5, 0.0);
        add("output.dense", WIDTH, MLP, 0.5, 0.0);
        add("output.LayerNorm", WIDTH, 0, 0.5, 1.0);
    }
    make.tensors
}

/// Writes tensors as safetensors.
pub fn write_safetensors(path: &Path, tensors: &[Named], dtype: safetensors::Dtype) {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|tensor| match dtype {
            safetensors::Dtype::F16 => {
                tensor.data.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect()
            }
            _ => tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|(tensor, bytes)| {
        let view = safetensors::tensor::TensorView::new(dtype, tensor.shape.clone(), bytes);
        (tensor.name.clone(), view.unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

pub const LLAMA_CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 40, "hidden_size": 24,
  "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
  "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64, "hidden_act": "silu"}"#;

pub const BERT_CONFIG: &str = r#"{"model_type": "bert", "vocab_size": 30, "hidden_size": 24,
  "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
  "max_position_embeddings": 32, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}"#;

/// A `tokenizer.json` whose tokens are words w0 … w39.
pub fn word_tokenizer(vocab: usize) -> String {
    let words: Vec<String> = (0..vocab).map(|i| format!("\"w{i}\": {i}")).collect();
    format!(
        r#"{{"version": "1.0", "model": {{"type": "WordLevel", "vocab": {{{}}}, "unk_token": "w0"}},
           "pre_tokenizer": {{"type": "Whitespace"}}}}"#,
        words.join(", ")
    )
}

/// A folder with the tiny Llama.
pub fn llama_folder(dtype: safetensors::Dtype) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_safetensors(&folder.path().join("model.safetensors"), &llama(), dtype);
    std::fs::write(folder.path().join("config.json"), LLAMA_CONFIG).unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), word_tokenizer(VOCAB)).unwrap();
    folder
}

/// A folder with the tiny encoder.
pub fn bert_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_safetensors(&folder.path().join("model.safetensors"), &bert(), safetensors::Dtype::F32);
    std::fs::write(folder.path().join("config.json"), BERT_CONFIG).unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), word_tokenizer(30)).unwrap();
    folder
}

/// A GGUF file in the making.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    pub pairs: Vec<(String, u32, Vec<u8>)>,
    /// Name, sizes rows first, type, bytes.
    pub tensors: Vec<(String, Vec<usize>, u32, Vec<u8>)>,
}

pub fn text(value: &str) -> Vec<u8> {
    let mut bytes = (value.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(value.as_bytes());
    bytes
}

impl Writer {
    pub fn pair(&mut self, key: &str, kind: u32, bytes: Vec<u8>) {
        self.pairs.push((key.into(), kind, bytes));
    }

    pub fn size(&mut self, key: &str, value: usize) {
        self.pair(key, 4, (value as u32).to_le_bytes().to_vec());
    }

    pub fn text(&mut self, key: &str, value: &str) {
        self.pair(key, 8, text(value));
    }

    pub fn texts(&mut self, key: &str, values: &[String]) {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.iter().flat_map(|value| text(value)));
        self.pair(key, 9, bytes);
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.pairs.len() as u64).to_le_bytes());
        for (key, kind, bytes) in &self.pairs {
            out.extend(text(key));
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
        let mut offset = 0u64;
        for (name, shape, kind, bytes) in &self.tensors {
            out.extend(text(name));
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|&size| out.extend((size as u64).to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (bytes.len() as u64).next_multiple_of(32);
        }
        for (.., bytes) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(bytes);
        }
        out
    }
}

/// The tiny Llama as llama.cpp's converter would write it.
pub fn llama_gguf() -> Writer {
    let mut file = Writer::default();
    file.text("general.architecture", "llama");
    for (key, value) in [
        ("block_count", 2),
        ("embedding_length", WIDTH),
        ("feed_forward_length", MLP),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", KV),
        ("context_length", 64),
        ("vocab_size", VOCAB),
    ] {
        file.size(&format!("llama.{key}"), value);
    }
    file.pair("llama.attention.layer_norm_rms_epsilon", 6, 1e-5f32.to_le_bytes().to_vec());
    file.text("tokenizer.ggml.model", "gpt2");
    file.text("tokenizer.ggml.pre", "smollm");
    let mut tokens: Vec<String> = ["<end>", "a", "b", "c", "Ġ", "ab", "abc", "Ġa", "1", "2"]
        .iter()
        .map(|token| token.to_string())
        .collect();
    tokens.extend((tokens.len()..VOCAB).map(|i| format!("<{i}>")));
    file.texts("tokenizer.ggml.tokens", &tokens);
    let merges: Vec<String> =
        ["a b", "ab c", "Ġ a"].iter().map(|merge| merge.to_string()).collect();
    file.texts("tokenizer.ggml.merges", &merges);
    let mut types = 5u32.to_le_bytes().to_vec();
    types.extend((VOCAB as u64).to_le_bytes());
    types.extend((0..VOCAB).flat_map(|i| if i == 0 || i >= 10 { 3i32 } else { 1 }.to_le_bytes()));
    file.pair("tokenizer.ggml.token_type", 9, types);
    file.size("tokenizer.ggml.eos_token_id", 0);
    for Named { name, shape, data } in llama() {
        let data = match &name {
            name if name.contains("q_proj") || name.contains("k_proj") => permuted(&data),
            _ => data,
        };
        let bytes = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        file.tensors.push((gguf_name(&name), shape, 0, bytes));
    }
    file
}

/// Rows of heads so that elements 2i and 2i + 1 are a pair.
fn permuted(rows: &[f32]) -> Vec<f32> {
    let mut out = vec![];
    for head in rows.chunks(D * WIDTH) {
        for i in 0..D / 2 {
            for half in 0..2 {
                out.extend_from_slice(&head[(half * D / 2 + i) * WIDTH..][..WIDTH]);
            }
        }
    }
    out
}

fn gguf_name(name: &str) -> String {
    let mut name = name.to_string();
    for (from, to) in [
        ("model.embed_tokens", "token_embd"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("model.norm", "output_norm"),
    ] {
        name = name.replace(from, to);
    }
    name
}
