//! The learning rate of every step: a linear warm-up, then half a cosine.

use std::f64::consts::PI;

/// The learning rate of every step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The largest rate, reached at the end of the warm-up.
    pub peak: f64,
    /// The rate of the last step.
    pub floor: f64,
    /// Steps of the warm-up.
    pub warmup: usize,
    /// All steps.
    pub steps: usize,
}

impl Schedule {
    /// The rate of a step, counted from 0.
    pub fn rate(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        // The first step after the warm-up has the peak, the last the floor.
        let length = self.steps.saturating_sub(self.warmup + 1).max(1);
        let done = ((step - self.warmup) as f64 / length as f64).min(1.0);
        self.floor + (self.peak - self.floor) * 0.5 * (1.0 + (PI * done).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_and_falls_to_the_floor() {
        let schedule = Schedule { peak: 1.0, floor: 0.1, warmup: 4, steps: 15 };
        let rates: Vec<f64> = (0..15).map(|step| schedule.rate(step)).collect();
        assert_eq!(rates[..5], [0.25, 0.5, 0.75, 1.0, 1.0]);
        assert!(rates[4..].windows(2).all(|pair| pair[1] < pair[0]), "{rates:?}");
        // Half-way between the peak, at step 4, and the floor, at step 14.
        assert!((rates[9] - 0.55).abs() < 1e-12 && (rates[14] - 0.1).abs() < 1e-12, "{rates:?}");
        assert!((schedule.rate(99) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn needs_no_warm_up_and_survives_one_that_is_too_long() {
        let schedule = Schedule { peak: 1.0, floor: 0.0, warmup: 0, steps: 1 };
        assert_eq!(schedule.rate(0), 1.0);
        let schedule = Schedule { peak: 1.0, floor: 0.0, warmup: 10, steps: 2 };
        assert_eq!([schedule.rate(0), schedule.rate(1)], [0.1, 0.2]);
    }
}
