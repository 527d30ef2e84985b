//! Figures 1, 3, 4 and 5: what follows from the formulas alone.

use sata::{basis, cost};

use super::scope::HEADS;
use crate::cost::figure as cost_figure;
use crate::plot::{Axis, COLORS, Figure, Key, Mark, Numerals, Panel, Style};

/// Terms that the paper recommends.
const TERMS: usize = 4;

/// Figure 1: state and FLOPs per token, against conventional attention.
pub fn figure1() -> Figure {
    let heads = HEADS.map(|d| (d, d));
    Figure {
        title: "Figure 1 · Hidden state and FLOPs per token, four Taylor terms, against \
                conventional attention"
            .into(),
        ..cost_figure(&heads, &[TERMS], &[1_000, 100_000_000])
    }
}

/// Figure 3: what tight packing saves over a feature map of all d^p monomials.
pub fn figure3() -> Figure {
    const MOST: usize = 8;
    let naive = |d: usize, p: usize| cost::naive_features_of_order(d, p) as f64;
    let naive_state =
        |d: usize, terms: usize| (0..terms).map(|p| naive(d, p)).sum::<f64>() * (d as f64 + 1.0);
    let naive_flops =
        |d: usize, terms: usize| (0..terms).map(|p| naive(d, p) * (4 * d + 2 * p + 4) as f64).sum();
    let state =
        |d: usize, terms: usize| cost::state_elements(d, d, &(0..terms).collect::<Vec<_>>()) as f64;
    let flops = |d: usize, terms: usize| cost::paper_flops(d, d, terms) as f64;
    let panel = |title: &str,
                 label: &str,
                 packed: &dyn Fn(usize, usize) -> f64,
                 all: &dyn Fn(usize, usize) -> f64| {
        let mut marks = vec![];
        let mut values = vec![];
        for (i, d) in HEADS.into_iter().enumerate() {
            let curve = |f: &dyn Fn(usize, usize) -> f64| -> Vec<(f64, f64)> {
                (1..=MOST).map(|terms| (terms as f64, f(d, terms))).collect()
            };
            let (packed, all) = (curve(packed), curve(all));
            values.extend(packed.iter().chain(&all).map(|point| point.1));
            marks.push(Mark::dashed(all, COLORS[i]));
            marks.push(Mark::line(packed.clone(), COLORS[i]));
            marks.push(Mark::dots(packed, COLORS[i]));
        }
        Panel {
            title: title.into(),
            x: Axis::linear("Taylor terms P", 1.0, MOST as f64),
            y: Axis::decades(label, values, Numerals::Powers),
            marks,
        }
    };
    Figure {
        id: "figure3".into(),
        title: "Figure 3 · What tight packing of symmetric monomials saves".into(),
        subtitle: vec![
            "per head; all dᵖ monomials of each order p < P, or only the C(d+p−1, p) distinct \
             ones; the saving tends to p!"
                .into(),
        ],
        columns: 2,
        panels: vec![
            panel("Hidden state", "elements", &state, &naive_state),
            panel("Forward pass", "FLOPs per token", &flops, &naive_flops),
        ],
        keys: HEADS
            .iter()
            .enumerate()
            .flat_map(|(i, d)| {
                [
                    Key::line(format!("packed, d = {d}"), COLORS[i], Style::Solid),
                    Key::line(format!("all monomials, d = {d}"), COLORS[i], Style::Dashed),
                ]
            })
            .collect(),
    }
}

/// Figure 4: many small heads or few large ones, for a given width of the model.
pub fn figure4() -> Figure {
    const WIDTHS: [f64; 2] = [512.0, 16_384.0];
    const CONTEXTS: [(u128, &str); 3] = [(10_000, "10K"), (100_000, "100K"), (1_000_000, "1M")];
    const GREYS: [&str; 3] = ["#bbbbbb", "#888888", "#444444"];
    let panel =
        |title: &str, label: &str, fixed: fn(usize) -> f64, growing: fn(usize, u128) -> f64| {
            let mut marks = vec![];
            let mut values = vec![];
            let mut push = |dashed: bool, color: &str, per_width: f64| {
                let points: Vec<_> =
                    WIDTHS.iter().map(|&width| (width, width * per_width)).collect();
                values.extend(points.iter().map(|point| point.1));
                let mark = if dashed { Mark::dashed } else { Mark::line };
                marks.push(mark(points, color));
            };
            for ((tokens, _), grey) in CONTEXTS.into_iter().zip(GREYS) {
                // Conventional costs hardly depend on the size of heads; 64 stands for all.
                push(true, grey, growing(64, tokens) / 64.0);
            }
            for (i, d) in HEADS.into_iter().enumerate() {
                push(false, COLORS[i], fixed(d) / d as f64);
            }
            Panel {
                title: title.into(),
                x: Axis::log(
                    "width of the model: heads × head size",
                    WIDTHS[0],
                    WIDTHS[1],
                    Numerals::Counts,
                ),
                y: Axis::decades(label, values, Numerals::Powers),
                marks,
            }
        };
    let mut keys: Vec<Key> = HEADS
        .iter()
        .enumerate()
        .map(|(i, d)| Key::line(format!("heads of d = {d}"), COLORS[i], Style::Solid))
        .collect();
    for ((_, name), grey) in CONTEXTS.into_iter().zip(GREYS) {
        keys.push(Key::line(format!("conventional, {name} tokens"), grey, Style::Dashed));
    }
    Figure {
        id: "figure4".into(),
        title: "Figure 4 · Hidden state and FLOPs per token of all heads together".into(),
        subtitle: vec![
            "four Taylor terms; smaller heads and more of them cost less; conventional costs are \
             drawn for d = 64 and depend little on d"
                .into(),
        ],
        columns: 2,
        panels: vec![
            panel(
                "Hidden state, all heads",
                "elements",
                |d| cost::state_elements(d, d, &(0..TERMS).collect::<Vec<_>>()) as f64,
                |d, tokens| cost::cache_elements(d, d, tokens) as f64,
            ),
            panel(
                "Forward pass, all heads",
                "FLOPs per token",
                |d| cost::paper_flops(d, d, TERMS) as f64,
                |d, tokens| cost::conventional_flops(d, d, tokens) as f64,
            ),
        ],
        keys,
    }
}

/// Figure 5: the constants α_p, and beside them what they hide.
pub fn figure5() -> Figure {
    const MOST: i32 = 10;
    const FORMATS: [(&str, i32); 4] =
        [("bfloat16 2⁻⁷", -7), ("float16 2⁻¹⁰", -10), ("float32 2⁻²³", -23), ("float64 2⁻⁵²", -52)];
    let factorial = |p: i32| (1..=p).map(f64::from).product::<f64>();
    let orders = || Axis::linear("order p", 0.0, f64::from(MOST));
    let mut alphas = vec![];
    for (name, exponent) in FORMATS {
        alphas.push(Mark::Level {
            y: 2f64.powi(exponent),
            // Above these lines there is another, or a curve.
            below: [-10, -52].contains(&exponent),
            label: name.into(),
            color: "#777777".into(),
        });
    }
    let mut keys = vec![];
    for (i, d) in HEADS.into_iter().enumerate() {
        let alpha = |p: i32| (d as f64).powf(-0.5 * f64::from(p)) / factorial(p);
        let points: Vec<_> = (0..=MOST).map(|p| (f64::from(p), alpha(p))).collect();
        alphas.push(Mark::line(points.clone(), COLORS[i]));
        alphas.push(Mark::dots(points, COLORS[i]));
        keys.push(Key::line(format!("left: d = {d}"), COLORS[i], Style::Solid));
    }
    // √E[x^2p] = s^p √((2p−1)!!) for logits x of N(0, s²).
    let double_factorial = |p: i32| (1..=p).map(|i| f64::from(2 * i - 1)).product::<f64>();
    let mut terms = vec![];
    let mut values = vec![];
    for (i, s) in [0.5f64, 1.0, 2.0, 4.0].into_iter().enumerate() {
        let size = |p: i32| s.powi(p) * double_factorial(p).sqrt() / factorial(p);
        let points: Vec<_> = (0..=MOST).map(|p| (f64::from(p), size(p))).collect();
        values.extend(points.iter().map(|point| point.1));
        terms.push(Mark::dashed(points.clone(), COLORS[i]));
        terms.push(Mark::dots(points, COLORS[i]));
        keys.push(Key::line(format!("right: s = {s}"), COLORS[i], Style::Dashed));
    }
    Figure {
        id: "figure5".into(),
        title: "Figure 5 · Scaling constant of each Taylor term, and the term itself".into(),
        subtitle: vec![
            "the constant multiplies (q·k)ᵖ, which grows with d: at logits of deviation s the terms \
             shrink far more slowly, if at all"
                .into(),
        ],
        columns: 2,
        panels: vec![
            Panel {
                title: "αₚ = 1/(p! √dᵖ) and the resolution of formats".into(),
                x: orders(),
                y: Axis::log("αₚ", 1e-18, 10.0, Numerals::Powers),
                marks: alphas,
            },
            Panel {
                title: "Root mean square of xᵖ/p! for logits x of N(0, s²)".into(),
                x: orders(),
                y: Axis::decades("size of the term", values, Numerals::Powers),
                marks: terms,
            },
        ],
        keys,
    }
}

/// D by head size and number of terms, for the page's table.
pub fn features(d: usize, terms: usize) -> u128 {
    basis::features(d, &(0..terms).collect::<Vec<_>>())
}
