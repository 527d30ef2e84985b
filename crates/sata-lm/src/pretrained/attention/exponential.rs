//! e^x of many numbers at once.

/// Below this e^x is 0 here; f32 itself ends at −103.
const LOWEST: f32 = -87.0;

/// Replaces each x ≤ 88 by e^x, to 2·10⁻⁷ of it; plain arithmetic, which compilers vectorise.
pub(super) fn exp_all(x: &mut [f32]) {
    // x = n ln 2 + r, |r| ≤ ln 2 / 2; ln 2 in two parts, so that n ln 2 has no rounding error.
    const HIGH: f32 = 0.693_359_4;
    const LOW: f32 = -2.121_944_4e-4;
    // Adding it rounds to an integer, which is then in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    for x in x {
        let y = x.max(LOWEST);
        let shifted = y * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = (y - n * HIGH) - n * LOW;
        let p = 1.987_569_1e-4;
        let p = p * r + 1.398_199_9e-3;
        let p = p * r + 8.333_452e-3;
        let p = p * r + 4.166_579_6e-2;
        let p = p * r + 0.166_666_65;
        let p = p * r + 0.5;
        let p = p * r * r + r + 1.0;
        let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
        // NaN stays NaN: max alone would hide it.
        let value = if *x <= LOWEST { 0.0 } else { p * scale };
        *x = if x.is_nan() { *x } else { value };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_e_to_the_x() {
        let mut x: Vec<f32> = (-860..=880).map(|i| i as f32 * 0.1).collect();
        let want: Vec<f64> = x.iter().map(|&x| f64::from(x).exp()).collect();
        exp_all(&mut x);
        for (got, want) in x.iter().zip(want) {
            assert!((f64::from(*got) / want - 1.0).abs() < 3e-7, "{got} {want}");
        }
        let mut special = [f32::NEG_INFINITY, -1e9, f32::NAN, 0.0];
        exp_all(&mut special);
        assert!(special[0] == 0.0 && special[1] == 0.0 && special[2].is_nan() && special[3] == 1.0);
    }
}
