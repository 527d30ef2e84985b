//! Two things timed in turn, so that a machine that drifts drifts for both.

use std::time::Instant;

use crate::failure::Outcome;

/// Times of two things, one after the other in every round.
#[derive(Debug)]
pub struct Paired {
    /// Median seconds of the first.
    pub first: f64,
    /// Median seconds of the second.
    pub second: f64,
    /// Median over rounds of first over second.
    pub ratio: f64,
}

/// Times `first` and `second` in turn, `rounds` times each after one that is not counted.
pub fn paired(
    rounds: usize,
    mut first: impl FnMut() -> Outcome,
    mut second: impl FnMut() -> Outcome,
) -> Outcome<Paired> {
    first()?;
    second()?;
    let mut times = vec![];
    for _ in 0..rounds.max(1) {
        times.push([seconds(&mut first)?, seconds(&mut second)?]);
    }
    Ok(Paired {
        first: middle(times.iter().map(|pair| pair[0])),
        second: middle(times.iter().map(|pair| pair[1])),
        ratio: middle(times.iter().map(|pair| pair[0] / pair[1])),
    })
}

fn seconds(f: &mut impl FnMut() -> Outcome) -> Outcome<f64> {
    let start = Instant::now();
    f()?;
    Ok(start.elapsed().as_secs_f64())
}

fn middle(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn they_take_turns() {
        let said = RefCell::new(String::new());
        let say = |letter| {
            said.borrow_mut().push(letter);
            Ok(())
        };
        paired(3, || say('a'), || say('b')).unwrap();
        assert_eq!(*said.borrow(), "abababab");
        assert_eq!(middle([3.0, 1.0, 2.0].into_iter()), 2.0);
    }
}
