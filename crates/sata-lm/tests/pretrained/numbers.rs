//! Softmax results and stored numbers against numpy and the package `gguf`.

use std::sync::Arc;

use sata_lm::pretrained::gguf::Gguf;
use sata_lm::pretrained::{Kind, Llama, LlamaSession, Pretrained, Setting};
use serde_json::Value;

use super::tiny::{Writer, bert_folder, llama_folder, llama_gguf};

fn golden() -> Value {
    serde_json::from_str(include_str!("../data/golden.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    numbers(value).iter().map(|&x| x as u32).collect()
}

/// Logits of rows 0, 7 and 19, read in parts of so many tokens.
fn logits(model: &Arc<Llama>, tokens: &[u32], parts: usize) -> Vec<f32> {
    let mut session = LlamaSession::new(model, &Setting::softmax()).unwrap();
    let mut hidden = vec![];
    for part in tokens.chunks(parts) {
        hidden.extend(session.read(part).unwrap());
    }
    assert_eq!(session.position(), tokens.len());
    let (mut all, mut out) = (vec![], vec![]);
    model.logits(&hidden, &mut all);
    for row in [0, 7, 19] {
        out.extend_from_slice(&all[row * 40..(row + 1) * 40]);
    }
    out
}

fn check_llama(loaded: &Pretrained, tolerance: f64) {
    let Kind::Llama(model) = &loaded.model else { panic!("it is a Llama") };
    let golden = golden();
    let tokens = ids(&golden["llama"]["ids"]);
    let want: Vec<f64> =
        golden["llama"]["logits"].as_array().unwrap().iter().flat_map(numbers).collect();
    for parts in [20, 1, 3] {
        for (got, want) in logits(model, &tokens, parts).iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() < tolerance, "{parts}: {got} {want}");
        }
    }
}

#[test]
fn a_llama_from_safetensors_has_the_logits_of_the_formulas() {
    let folder = llama_folder(safetensors::Dtype::F32);
    check_llama(&Pretrained::load(folder.path()).unwrap(), 1e-4);
    let folder = llama_folder(safetensors::Dtype::F16);
    check_llama(&Pretrained::load(folder.path()).unwrap(), 3e-2);
}

#[test]
fn a_llama_from_gguf_has_them_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    std::fs::write(&path, llama_gguf().bytes()).unwrap();
    check_llama(&Pretrained::load(&path).unwrap(), 1e-4);
    check_llama(&Pretrained::load(folder.path()).unwrap(), 1e-4);
}

#[test]
fn an_encoder_has_the_vector_of_the_formulas() {
    let folder = bert_folder();
    let loaded = Pretrained::load(folder.path()).unwrap();
    let Kind::Bert(model) = &loaded.model else { panic!("it is a BERT") };
    let golden = golden();
    let got = model.embed(&ids(&golden["bert"]["ids"]), &Setting::softmax()).unwrap();
    for (got, want) in got.iter().zip(numbers(&golden["bert"]["embedding"])) {
        assert!((f64::from(*got) - want).abs() < 1e-5, "{got} {want}");
    }
    assert!(model.embed(&[], &Setting::softmax()).is_err());
    assert!(model.embed(&[30], &Setting::softmax()).unwrap_err().to_string().contains("30"));
    let long = model.embed(&[1; 33], &Setting::softmax()).unwrap_err().to_string();
    assert!(long.contains("33") && long.contains("32"), "{long}");
}

#[test]
fn every_type_of_storage_is_read_as_its_own_package_reads_it() {
    let golden = golden();
    for (name, case) in golden["blocks"].as_object().unwrap() {
        let hex = case["bytes"].as_str().unwrap();
        let bytes: Vec<u8> = (0..hex.len() / 2)
            .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
            .collect();
        let want = numbers(&case["values"]);
        let number = [
            ("F16", 1),
            ("BF16", 30),
            ("Q4_0", 2),
            ("Q4_1", 3),
            ("Q5_0", 6),
            ("Q5_1", 7),
            ("Q8_0", 8),
            ("Q4_K", 12),
            ("Q5_K", 13),
            ("Q6_K", 14),
        ];
        let kind = number.iter().find(|(n, _)| n == name).unwrap().1;
        let mut file = Writer::default();
        file.tensors.push(("x".into(), vec![want.len()], kind, bytes));
        let file = Gguf::parse("test", file.bytes()).unwrap();
        let got = file.tensor("x").unwrap().unwrap();
        assert_eq!(got.data.len(), want.len(), "{name}");
        for (i, (got, want)) in got.data.iter().zip(&want).enumerate() {
            let error = (f64::from(*got) - want).abs();
            assert!(error <= 1e-6 * want.abs().max(1e-3), "{name} {i}: {got} {want}");
        }
    }
}
