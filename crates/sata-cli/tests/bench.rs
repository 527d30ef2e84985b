//! `sata bench cpu`: that it runs, on sizes too small to say anything.

mod common;

use common::Room;

const SMALL: &str = "bench cpu --quick --tokens 200 --heads 2 --decode-heads 2 --threads 1";

/// The rows of a report: what, and the ratio.
fn rows(args: &str) -> Vec<(String, f64)> {
    let said = Room::new().good(&format!("{SMALL} {args} --json"));
    let report: serde_json::Value = serde_json::from_str(&said).unwrap();
    let row = |row: &serde_json::Value| {
        assert!(row["target"].is_null(), "no target where it is quick");
        (row["what"].as_str().unwrap().to_string(), row["ratio"].as_f64().unwrap())
    };
    report["rows"].as_array().unwrap().iter().map(row).collect()
}

#[test]
fn settings_are_ratios() {
    let measured = rows("--only settings --dims 8,16 --terms 2");
    let names: Vec<&str> = measured.iter().map(|(what, _)| what.as_str()).collect();
    assert_eq!(
        names,
        [
            "prefill f32 d=16 P=2, taylor near 0 over taylor",
            "prefill f32 d=16 P=2, taylor near 1 over taylor",
            "prefill f32 d=16 P=2, gauss over taylor",
            "prefill f32 d=16 P=2, gauss near 1 over taylor near 1",
            "prefill f32 d=16 P=2, hermite over taylor",
            "prefill f32 d=16 P=2, hermite near 1 over taylor near 1",
            "prefill f32 d=16 P=2, taylor slopes over taylor",
            "decode f32 d=16 P=2, 2 heads, gauss near 1 over taylor near 1",
            "decode f32 d=16 P=2, 2 heads, hermite near 1 over taylor near 1",
            "decode f32 d=16 P=2, 2 heads, taylor near 1 over taylor",
        ]
    );
    assert!(measured.iter().all(|(_, ratio)| ratio.is_finite() && *ratio > 0.0));
}

#[test]
fn an_odd_number_of_terms_leaves_gauss_out() {
    let measured = rows("--only settings --dims 16 --terms 3");
    assert_eq!(measured.len(), 7);
    assert!(measured.iter().all(|(what, _)| !what.contains("gauss")));
    assert!(rows("--only settings --dims 8").is_empty(), "16 and 32 alone are measured");
}

#[test]
fn wrong_words() {
    let room = Room::new();
    room.bad(
        "bench cpu --only speed",
        &["--only speed", "prefill, decode, settings, backward, memory"],
    );
    room.bad("bench cpu --dtype f8", &["--dtype f8"]);
    room.bad("bench cpu --only settings --terms 0", &["terms is 0", "at least 1"]);
    room.bad("bench cpu --heads 0", &["--heads", "at least 1"]);
}
