//! Figure 1 of the paper, for any sizes: fixed costs against growing ones.

use sata::cost;

use crate::plot::{Axis, COLORS, Figure, Key, Mark, Numerals, Panel, Style};

/// State and FLOPs per token against context length, a row of two panels for each number of terms.
pub fn figure(heads: &[(usize, usize)], terms: &[usize], tokens: &[u64]) -> Figure {
    let low = tokens.iter().copied().min().unwrap_or(1) as f64;
    let high = (tokens.iter().copied().max().unwrap_or(1) as f64).max(low * 10.0);
    let panels = terms
        .iter()
        .flat_map(|&terms| {
            [
                panel(&State { terms }, heads, [low, high]),
                panel(&Flops { terms }, heads, [low, high]),
            ]
        })
        .collect();
    let mut keys = vec![];
    for (i, (d_key, d_value)) in heads.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        let size = if d_key == d_value {
            format!("d = {d_key}")
        } else {
            format!("d_K = {d_key}, d_V = {d_value}")
        };
        keys.push(Key::line(format!("constant cost, {size}"), color, Style::Solid));
        keys.push(Key::line(format!("conventional, {size}"), color, Style::Dashed));
    }
    Figure {
        id: "figure1".into(),
        title: "Constant cost per token against the cost of conventional attention".into(),
        subtitle: vec!["per head; counts by the paper's formulas (1), (2) and its text".into()],
        columns: 2,
        panels,
        keys,
    }
}

/// Something that is fixed for one formulation and grows for the other.
trait Quantity {
    fn title(&self) -> String;
    fn label(&self) -> &'static str;
    fn fixed(&self, d_key: usize, d_value: usize) -> f64;
    fn growing(&self, d_key: usize, d_value: usize, tokens: u128) -> f64;
}

struct State {
    terms: usize,
}

impl Quantity for State {
    fn title(&self) -> String {
        format!("Hidden state, P = {} terms", self.terms)
    }
    fn label(&self) -> &'static str {
        "elements"
    }
    fn fixed(&self, d_key: usize, d_value: usize) -> f64 {
        cost::state_elements(d_key, d_value, &(0..self.terms).collect::<Vec<_>>()) as f64
    }
    fn growing(&self, d_key: usize, d_value: usize, tokens: u128) -> f64 {
        cost::cache_elements(d_key, d_value, tokens) as f64
    }
}

struct Flops {
    terms: usize,
}

impl Quantity for Flops {
    fn title(&self) -> String {
        format!("Forward pass, P = {} terms", self.terms)
    }
    fn label(&self) -> &'static str {
        "FLOPs per token"
    }
    fn fixed(&self, d_key: usize, d_value: usize) -> f64 {
        cost::paper_flops(d_key, d_value, self.terms) as f64
    }
    fn growing(&self, d_key: usize, d_value: usize, tokens: u128) -> f64 {
        cost::conventional_flops(d_key, d_value, tokens) as f64
    }
}

fn panel(quantity: &dyn Quantity, heads: &[(usize, usize)], [low, high]: [f64; 2]) -> Panel {
    let mut marks = vec![];
    let mut values = vec![];
    for (i, &(d_key, d_value)) in heads.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        let fixed = quantity.fixed(d_key, d_value);
        let growing = |tokens: f64| quantity.growing(d_key, d_value, tokens as u128);
        values.extend([fixed, growing(low), growing(high)]);
        marks.push(Mark::dashed(vec![(low, growing(low)), (high, growing(high))], color));
        marks.push(Mark::line(vec![(low, fixed), (high, fixed)], color));
    }
    Panel {
        title: quantity.title(),
        x: Axis::log("tokens in context", low, high, Numerals::Counts),
        y: Axis::decades(quantity.label(), values, Numerals::Powers),
        marks,
    }
}
