//! Every case of the reference numbers through the program: f64 within 1e-10, f32 within 1e-5.

mod common;

use std::path::{Path, PathBuf};

use common::{Room, find, read_tensors, relative_largest, relative_rms, remark};
use serde::Deserialize;

/// A case of the file, as its remarks describe it.
#[derive(Deserialize)]
struct Case {
    name: String,
    terms: usize,
    causal: bool,
}

fn check(path: &Path) {
    let room = Room::new();
    let tensors = read_tensors(path);
    let cases: Vec<Case> = serde_json::from_str(&remark(path, "cases")).unwrap();
    assert!(!cases.is_empty());
    for Case { name, terms, causal } in &cases {
        let want = find(&tensors, &format!("{name}.y"));
        let form = if *causal { "--causal" } else { "--full" };
        let input = path.display();
        let attend = |dtype: &str| {
            room.good(&format!(
                "attend --input {input} --prefix {name} --terms {terms} {form} --dtype {dtype} \
                 --output y.safetensors"
            ));
            room.tensor("y.safetensors", "y")
        };
        let double = attend("f64");
        assert_eq!(double.shape, want.shape, "{name}");
        let error = relative_largest(&double.data, &want.data);
        assert!(error <= 1e-10, "{name}: f64 is off by {error:e}");
        let error = relative_rms(&attend("f32").data, &want.data);
        assert!(error <= 1e-5, "{name}: f32 is off by {error:e}");
    }
    println!("{} cases of {}", cases.len(), path.display());
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn cases_that_come_with_the_program() {
    check(&here("tests/data/conformance.safetensors"));
}

#[test]
fn all_cases_where_they_are_at_hand() {
    let path = here("../../../shared/conformance/reference_f64.safetensors");
    if path.exists() {
        check(&path);
    } else {
        println!("SKIPPED: {} is not there; the cases in tests/data were run", path.display());
    }
}
