//! Numbers on the command line.

/// A count with a unit: 8, 1K, 100M (powers of a thousand), 64Ki (powers of 1,024).
///
/// # Errors
/// A sentence that says what is accepted.
pub fn count(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(at);
    let factor: u64 = match unit {
        "" => 1,
        "k" | "K" => 1_000,
        "m" | "M" => 1_000_000,
        "g" | "G" => 1_000_000_000,
        "t" | "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => {
            return Err(format!("'{text}' is not a count such as 8, 1K, 100M or 64Ki"));
        }
    };
    let n: u64 = digits.parse().map_err(|_| format!("'{text}' is not a count"))?;
    let n = n.checked_mul(factor).ok_or_else(|| format!("'{text}' is too large"))?;
    if n == 0 { Err("it must be at least 1".into()) } else { Ok(n) }
}

/// A count that is a size of something.
///
/// # Errors
/// As for [`count`].
pub fn size(text: &str) -> Result<usize, String> {
    usize::try_from(count(text)?).map_err(|_| format!("'{text}' is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(count("8"), Ok(8));
        assert_eq!(count("100M"), Ok(100_000_000));
        assert_eq!(count("64Ki"), Ok(65_536));
        for wrong in ["", "K", "0", "-1", "1.5K", "1X", "99999999999T"] {
            assert!(count(wrong).is_err(), "{wrong}");
        }
    }
}
