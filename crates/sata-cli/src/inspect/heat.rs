//! Heat maps over layers and heads, as SVG with every value as a tooltip.

use crate::html::escape;
use crate::table::three;

/// Pixels of a cell, of a letter at most, and of the room for numbers of heads.
const CELL: [usize; 2] = [44, 22];
const LETTER: usize = 7;
const TOP: usize = 22;

/// From light to dark (ColorBrewer's YlOrRd, which also prints).
const RAMP: [[f64; 3]; 5] = [
    [255.0, 255.0, 204.0],
    [254.0, 217.0, 118.0],
    [253.0, 141.0, 60.0],
    [227.0, 26.0, 28.0],
    [102.0, 0.0, 30.0],
];
/// What is not a number, or not there.
const NOTHING: &str = "#dddddd";

/// How values become colours.
#[derive(Clone, Copy, Debug)]
pub enum Scale {
    /// From 0 to the largest value.
    Linear,
    /// Logarithmic, from the first number to the second; beyond them as at them.
    Log(f64, f64),
}

/// A cell: what stands in it, its colour, what the pointer shows.
#[derive(Clone, Debug)]
pub struct Cell {
    /// Words in it.
    pub text: String,
    /// Its colour, and whether words on it must be light.
    pub color: (String, bool),
    /// What the pointer shows.
    pub tip: String,
}

/// A row of a map: a layer's heads.
#[derive(Clone, Debug)]
pub struct Row<T> {
    /// At its left.
    pub name: String,
    /// One for each head.
    pub cells: Vec<T>,
}

/// A number to be drawn as a cell.
#[derive(Clone, Debug)]
pub struct Value {
    /// The number, if there is one.
    pub number: Option<f64>,
    /// What the pointer shows.
    pub tip: String,
}

/// A map of cells.
pub fn map(rows: &[Row<Cell>]) -> String {
    let columns = rows.iter().map(|row| row.cells.len()).max().unwrap_or(0);
    let letters = rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
    let names = 16 + LETTER * letters;
    let (width, height) = (names + columns * CELL[0] + 2, TOP + rows.len() * CELL[1] + 2);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         style=\"max-width:{width}px\" font-family=\"system-ui,sans-serif\" font-size=\"11\">\n"
    );
    for column in 0..columns {
        let x = names + column * CELL[0] + CELL[0] / 2;
        svg += &text([x, 15], "middle", "#222222", &column.to_string());
    }
    for (i, Row { name, cells }) in rows.iter().enumerate() {
        let y = TOP + i * CELL[1];
        svg += &text([names - 8, y + 15], "end", "#222222", name);
        for (column, cell) in cells.iter().enumerate() {
            let x = names + column * CELL[0];
            let (color, dark) = &cell.color;
            svg += &format!(
                "<g><title>{}</title><rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" \
                 fill=\"{color}\" stroke=\"#ffffff\"/>{}</g>\n",
                escape(&cell.tip),
                CELL[0],
                CELL[1],
                text(
                    [x + CELL[0] / 2, y + 15],
                    "middle",
                    if *dark { "#ffffff" } else { "#222222" },
                    &cell.text
                ),
            );
        }
    }
    svg + "</svg>\n"
}

/// A map of numbers with its legend; a number that is not there is left grey.
pub fn numbers(rows: &[Row<Value>], scale: Scale) -> String {
    let all = rows.iter().flat_map(|row| &row.cells).filter_map(|value| value.number);
    let scale = Ends::of(scale, all.filter(|number| number.is_finite()).fold(0.0, f64::max));
    let cell = |value: &Value| Cell {
        text: value.number.map_or("–".into(), short),
        color: value.number.map_or((NOTHING.into(), false), |number| scale.color(number)),
        tip: value.tip.clone(),
    };
    let row = |row: &Row<Value>| Row {
        name: row.name.clone(),
        cells: row.cells.iter().map(cell).collect(),
    };
    let rows: Vec<Row<Cell>> = rows.iter().map(row).collect();
    map(&rows) + &scale.legend()
}

/// Two significant digits, which fit a cell.
fn short(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    if !value.is_finite() {
        return "∞".into();
    }
    let power = value.abs().log10().floor() as i32;
    match power {
        -3..=3 => format!("{value:.*}", (1 - power).clamp(0, 4) as usize),
        _ => format!("{value:.0e}"),
    }
}

/// A scale with both its ends.
#[derive(Clone, Copy, Debug)]
struct Ends {
    low: f64,
    high: f64,
    log: bool,
}

impl Ends {
    fn of(scale: Scale, largest: f64) -> Self {
        match scale {
            Scale::Linear => Ends { low: 0.0, high: largest, log: false },
            Scale::Log(low, high) => Ends { low, high, log: true },
        }
    }

    /// Where a value lies between the ends, from 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let place = if self.log {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else if self.high > self.low {
            (value - self.low) / (self.high - self.low)
        } else {
            0.0
        };
        if place.is_nan() { 1.0 } else { place.clamp(0.0, 1.0) }
    }

    /// The value at a place.
    fn value(&self, place: f64) -> f64 {
        if self.log {
            self.low * (self.high / self.low).powf(place)
        } else {
            self.low + place * (self.high - self.low)
        }
    }

    fn color(&self, value: f64) -> (String, bool) {
        ramp(self.place(value))
    }

    fn legend(&self) -> String {
        const STEPS: usize = 40;
        let width = 6 * STEPS;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} 34\" \
             style=\"max-width:{0}px\" font-family=\"system-ui,sans-serif\" font-size=\"11\">\n",
            width + 60
        );
        for step in 0..STEPS {
            let color = ramp((step as f64 + 0.5) / STEPS as f64).0;
            svg += &format!(
                "<rect x=\"{}\" y=\"2\" width=\"6.5\" height=\"12\" fill=\"{color}\"/>",
                30 + 6 * step
            );
        }
        for place in [0.0, 0.5, 1.0] {
            let x = 30 + (place * width as f64) as usize;
            let mark = match (self.log, place) {
                (true, 0.0) => "≤ ",
                (true, 1.0) => "≥ ",
                _ => "",
            };
            let label = format!("{mark}{}", three(self.value(place)));
            svg += &text([x, 28], "middle", "#222222", &label);
        }
        svg + "</svg>\n"
    }
}

fn ramp(place: f64) -> (String, bool) {
    let at = place * (RAMP.len() - 1) as f64;
    let i = (at as usize).min(RAMP.len() - 2);
    let part = at - i as f64;
    let [r, g, b] =
        std::array::from_fn(|c| (RAMP[i][c] + part * (RAMP[i + 1][c] - RAMP[i][c])).round() as u8);
    (format!("#{r:02x}{g:02x}{b:02x}"), place > 0.62)
}

fn text([x, y]: [usize; 2], anchor: &str, color: &str, words: &str) -> String {
    format!(
        "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\" fill=\"{color}\">{}</text>",
        escape(words)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_and_numbers() {
        let ends = Ends::of(Scale::Log(0.01, 1.0), 0.0);
        assert!((ends.place(0.1) - 0.5).abs() < 1e-12 && (ends.value(0.5) - 0.1).abs() < 1e-12);
        assert_eq!((ends.place(0.0), ends.place(f64::INFINITY)), (0.0, 1.0));
        assert_eq!(ends.color(0.01).0, "#ffffcc");
        assert_eq!(Ends::of(Scale::Linear, 0.0).place(0.0), 0.0);
        let all = [0.0, 0.051, 1.47, 39.7, 1234.0, 12345.0, 1e-5, f64::INFINITY].map(short);
        assert_eq!(all, ["0", "0.051", "1.5", "40", "1234", "1e4", "1e-5", "∞"]);
    }

    #[test]
    fn names_cannot_break_the_page() {
        let cells = vec![Value { number: Some(1.0), tip: "\"&".into() }];
        let svg = numbers(&[Row { name: "<a>".into(), cells }], Scale::Linear);
        assert!(svg.contains("&lt;a&gt;") && svg.contains("&quot;&amp;"), "{svg}");
    }
}
