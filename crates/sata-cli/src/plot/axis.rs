//! Axes: range, scale and where the ticks are.

/// How numbers on an axis are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numerals {
    /// 0.5, 20
    Plain,
    /// 10⁻³
    Powers,
    /// 1K, 10M
    Counts,
}

/// One axis of a panel.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What it measures, and in what.
    pub label: String,
    /// Whether it is logarithmic.
    pub log: bool,
    /// From.
    pub low: f64,
    /// To.
    pub high: f64,
    /// How its numbers are written.
    pub numerals: Numerals,
}

/// A tick, with its number where it has one.
#[derive(Clone, Debug, PartialEq)]
pub struct Tick {
    /// Where.
    pub at: f64,
    /// What is written there; nothing at minor ticks.
    pub label: Option<String>,
}

/// Labels an axis may have before some are left out.
const MANY: usize = 8;
/// Decades an axis may have before minor ticks are left out.
const FINE: usize = 4;

impl Axis {
    /// A linear axis.
    pub fn linear(label: impl Into<String>, low: f64, high: f64) -> Self {
        Axis { label: label.into(), log: false, low, high, numerals: Numerals::Plain }
    }

    /// A logarithmic axis.
    pub fn log(label: impl Into<String>, low: f64, high: f64, numerals: Numerals) -> Self {
        Axis { log: true, numerals, ..Axis::linear(label, low, high) }
    }

    /// A logarithmic axis over whole decades that hold all positive `values`.
    pub fn decades(
        label: impl Into<String>,
        values: impl IntoIterator<Item = f64>,
        numerals: Numerals,
    ) -> Self {
        let logs = values.into_iter().filter(|x| *x > 0.0 && x.is_finite()).map(f64::log10);
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for x in logs {
            // A value that is a power of ten but for rounding ends its decade.
            low = low.min((x + 1e-9).floor());
            high = high.max((x - 1e-9).ceil());
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        let high = high.max(low + 1.0);
        Axis::log(label, 10f64.powf(low), 10f64.powf(high), numerals)
    }

    /// Where a value lies, 0 at the low end and 1 at the high end.
    pub fn place(&self, value: f64) -> f64 {
        if self.log {
            (value.max(f64::MIN_POSITIVE).ln() - self.low.ln()) / (self.high.ln() - self.low.ln())
        } else {
            (value - self.low) / (self.high - self.low)
        }
    }

    /// Its ticks, in order of place.
    pub fn ticks(&self) -> Vec<Tick> {
        if self.log { self.log_ticks() } else { self.linear_ticks() }
    }

    fn inside(&self, at: f64) -> bool {
        (-1e-9..=1.0 + 1e-9).contains(&self.place(at))
    }

    fn log_ticks(&self) -> Vec<Tick> {
        let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
        let decades = (last - first).max(1) as usize;
        let every = decades.div_ceil(MANY) as i32;
        let mut ticks = vec![];
        for decade in first..=last {
            for digit in 1..10 {
                let at = f64::from(digit) * 10f64.powi(decade);
                let labelled = match digit {
                    1 => decade.rem_euclid(every) == 0,
                    2 | 5 => self.high / self.low <= 101.0,
                    _ => false,
                };
                if self.inside(at) && (digit == 1 || decades <= FINE) {
                    ticks.push(Tick { at, label: labelled.then(|| self.number(at)) });
                }
            }
        }
        ticks
    }

    fn linear_ticks(&self) -> Vec<Tick> {
        let rough = (self.high - self.low) / MANY as f64;
        let power = 10f64.powf(rough.log10().floor());
        let steps = [1.0, 2.0, 5.0, 10.0];
        let step = power * steps.into_iter().find(|s| s * power >= rough * 0.999).unwrap_or(10.0);
        let mut ticks = vec![];
        let mut i = (self.low / step).ceil();
        while i * step <= self.high + 1e-9 * step {
            ticks.push(Tick { at: i * step, label: Some(self.number(i * step)) });
            i += 1.0;
        }
        ticks
    }

    fn number(&self, x: f64) -> String {
        match self.numerals {
            Numerals::Counts => counts(x),
            Numerals::Powers => {
                let decade = x.log10().floor();
                let digit = (x / 10f64.powf(decade)).round();
                let power = format!("10{}", superscript(decade as i32));
                if digit == 1.0 { power } else { format!("{digit}·{power}") }
            }
            Numerals::Plain => {
                let text = format!("{:.4}", x);
                let text = text.trim_end_matches('0').trim_end_matches('.');
                let text = if text == "-0" || text.is_empty() { "0" } else { text };
                text.replace('-', "−")
            }
        }
    }
}

/// 1K, 20M: counts with at most one decimal.
pub fn counts(x: f64) -> String {
    for (unit, name) in [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")] {
        if x >= unit * 0.9995 {
            let text = format!("{:.1}", x / unit);
            return format!("{}{name}", text.trim_end_matches(".0"));
        }
    }
    format!("{x}")
}

fn superscript(n: i32) -> String {
    let digit = |c: char| match c {
        '-' => '⁻',
        '1' => '¹',
        '2' => '²',
        '3' => '³',
        c => char::from_u32('⁰' as u32 + c as u32 - '0' as u32).unwrap_or(c),
    };
    n.to_string().chars().map(digit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<String> {
        axis.ticks().into_iter().filter_map(|tick| tick.label).collect()
    }

    #[test]
    fn ticks_are_round_numbers_inside_the_range() {
        assert_eq!(labels(&Axis::linear("", -5.0, 0.0)), ["−5", "−4", "−3", "−2", "−1", "0"]);
        assert_eq!(
            labels(&Axis::linear("", 0.0, 0.3)),
            ["0", "0.05", "0.1", "0.15", "0.2", "0.25", "0.3"]
        );
        let tokens = Axis::log("", 1e3, 1e8, Numerals::Counts);
        assert_eq!(labels(&tokens), ["1K", "10K", "100K", "1M", "10M", "100M"]);
        assert_eq!(labels(&Axis::log("", 1e-12, 1e-2, Numerals::Powers))[0], "10⁻¹²");
    }

    #[test]
    fn decades_hold_their_values() {
        let axis = Axis::decades("", [0.02, 1000.0, f64::NAN, 0.0], Numerals::Powers);
        assert!((axis.low - 0.01).abs() < 1e-12 && (axis.high - 1000.0).abs() < 1e-9);
        let empty = Axis::decades("", [], Numerals::Powers);
        assert!(empty.low < empty.high);
    }

    #[test]
    fn counts_are_short() {
        assert_eq!(counts(24_327.0), "24.3K");
        assert_eq!(counts(1e8), "100M");
        assert_eq!(counts(64.0), "64");
    }
}
