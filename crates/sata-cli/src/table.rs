//! Plain text tables, and numbers as people read them.

/// Rows under headings, columns right-aligned except the first.
pub fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let cells = |i: usize| rows.iter().filter_map(move |row| row.get(i)).map(|cell| len(cell));
    let widths: Vec<usize> = headings
        .iter()
        .enumerate()
        .map(|(i, heading)| cells(i).max().unwrap_or(0).max(len(heading)))
        .collect();
    let mut lines = vec![row(headings.iter().copied(), &widths)];
    lines.push("─".repeat(len(&lines[0])));
    lines.extend(rows.iter().map(|cells| row(cells.iter().map(String::as_str), &widths)));
    lines.join("\n")
}

fn row<'a>(cells: impl Iterator<Item = &'a str>, widths: &[usize]) -> String {
    let cells: Vec<String> = cells
        .zip(widths)
        .enumerate()
        .map(|(i, (cell, &width))| {
            let pad = " ".repeat(width - len(cell).min(width));
            if i == 0 { format!("{cell}{pad}") } else { format!("{pad}{cell}") }
        })
        .collect();
    cells.join("  ").trim_end().to_string()
}

fn len(text: &str) -> usize {
    text.chars().count()
}

/// 1,234,567; beyond 10¹⁵ as a power of ten.
pub fn grouped(n: u128) -> String {
    if n == u128::MAX {
        return "> 10^38".into();
    }
    if n >= 1_000_000_000_000_000 {
        return format!("{:.3e}", n as f64);
    }
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// 12.5 MB: decimal units.
pub fn bytes(n: u128) -> String {
    let x = n as f64;
    for (unit, name) in [(1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")] {
        if x >= unit * 0.9995 {
            return format!("{} {name}", three(x / unit));
        }
    }
    format!("{n} B")
}

/// Three significant digits: 0.00123, 12.3, 1.23e9.
pub fn three(x: f64) -> String {
    if x == 0.0 || !x.is_finite() {
        return format!("{x}");
    }
    let power = x.abs().log10().floor() as i32;
    match power {
        -4..=5 => format!("{x:.*}", (2 - power).clamp(0, 6) as usize),
        _ => format!("{x:.2e}"),
    }
}

/// 1.23 s, 45.6 ms: a time.
pub fn seconds(s: f64) -> String {
    for (unit, name) in [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs")] {
        if s >= unit {
            return format!("{} {name}", three(s / unit));
        }
    }
    format!("{} ns", three(s * 1e9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(999), "999");
        assert_eq!(bytes(12_455_300), "12.5 MB");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(three(0.001234), "0.00123");
        assert_eq!(three(1234.0), "1234");
        assert_eq!(seconds(0.0456), "45.6 ms");
    }

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".into(), "1".into()], vec!["long".into(), "1,000".into()]];
        let text = table(&["name", "n"], &rows);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "name      n");
        assert_eq!(lines[3], "long  1,000");
    }
}
