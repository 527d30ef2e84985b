//! `sata cost`.

mod common;

use common::Room;

#[test]
fn tables_hold_the_papers_sizes() {
    let said = Room::new().good("cost");
    for number in ["165", "969", "6,545", "47,905", "11,238,513", "24,327", "12.5 MB", "5.94 KB"] {
        assert!(said.contains(number), "no {number} in\n{said}");
    }
}

#[test]
fn json_holds_both_counts_of_conventional_attention() {
    let said = Room::new().good("cost --d-key 8,16 --d-value 8 --terms 4 --tokens 1K --json");
    let cost: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(cost["heads"][0]["state_elements"], 9 * 165);
    assert_eq!(cost["heads"][1]["d_value"], 8);
    let conventional = &cost["conventional"][0];
    assert_eq!(conventional["flops_paper_text"], 35_000);
    assert_eq!(conventional["flops_public_code"], 48_000);
    assert!(cost["conventional"][1]["flops_public_code"].is_null(), "defined for d_K = d_V only");
}

#[test]
fn plots_are_svg_or_png() {
    let room = Room::new();
    room.good("cost --terms 4 --plot a.svg");
    room.good("cost --terms 3,4 --tokens 1K,2K --plot a.png");
    let svg = String::from_utf8(room.read("a.svg")).unwrap();
    assert!(svg.starts_with("<svg ") && svg.contains("viewBox") && svg.contains("FLOPs per token"));
    // What a panel is clipped to is there.
    assert!(svg.contains("clip-path=\"url(#figure1-1)\"") && svg.contains("id=\"figure1-1\""));
    assert!(room.read("a.png").starts_with(b"\x89PNG"));
}
