//! Whether a head's attention can be replaced, and by what.

use serde::Serialize;

use super::measure::Figures;
use crate::table::{bytes, three};

/// What is asked of a candidate.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Budget {
    /// Largest relative error of the median query.
    pub max_error: f64,
    /// Most bytes of the state of one key/value head.
    pub max_state: Option<u64>,
}

/// The worst hundredth of queries must not be further off than this times the output itself for a
/// candidate to be called good without reserve.
const TAIL: f64 = 1.0;

/// One word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The recommended setting is within the budgets.
    Works,
    /// It is, for the median; but one query in a hundred is off by more than its whole output.
    Mostly,
    /// The near window alone is within the budgets, and nothing cheaper is.
    Near,
    /// Nothing that was tried is within the budgets.
    Fails,
}

impl Verdict {
    /// All of them, best first.
    pub const ALL: [Verdict; 4] = [Verdict::Works, Verdict::Mostly, Verdict::Near, Verdict::Fails];

    /// As it is written.
    pub fn word(self) -> &'static str {
        match self {
            Verdict::Works => "works",
            Verdict::Mostly => "mostly",
            Verdict::Near => "near",
            Verdict::Fails => "fails",
        }
    }
}

/// One candidate as a verdict sees it.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// Whether it drops the far past.
    pub alone: bool,
    /// Bytes of its state.
    pub state_bytes: u128,
    /// Its errors.
    pub figures: Figures,
}

/// What was found, why, and what to take.
#[derive(Clone, Debug)]
pub struct Judgement {
    /// One word.
    pub verdict: Verdict,
    /// Its reason, with the figures.
    pub reason: String,
    /// Index of a choice: the smallest state within both budgets; if there is none, the smallest
    /// error within the memory budget.
    pub recommended: Option<usize>,
}

/// Judges one head by what its candidates came to.
pub fn judge(choices: &[Choice], budget: &Budget) -> Judgement {
    let Budget { max_error, max_state } = *budget;
    let fits =
        |choice: &Choice| max_state.is_none_or(|most| choice.state_bytes <= u128::from(most));
    let error = |choice: &Choice| choice.figures.relative.median;
    let reaches = |choice: &Choice| error(choice) <= max_error;
    let cheapest = |among: &mut dyn Iterator<Item = usize>| {
        among.min_by(|&a, &b| {
            let (a, b) = (&choices[a], &choices[b]);
            a.state_bytes.cmp(&b.state_bytes).then(error(a).total_cmp(&error(b)))
        })
    };
    let fitting = || (0..choices.len()).filter(|&i| fits(&choices[i]));
    if let Some(best) = cheapest(&mut fitting().filter(|&i| reaches(&choices[i]))) {
        let choice = &choices[best];
        let verdict = match choice.figures.relative.p99 > TAIL {
            _ if choice.alone => Verdict::Near,
            true => Verdict::Mostly,
            false => Verdict::Works,
        };
        let reason = format!("error {}", said(&choice.figures));
        return Judgement { verdict, reason, recommended: Some(best) };
    }
    let fails =
        |reason: String, recommended| Judgement { verdict: Verdict::Fails, reason, recommended };
    let Some(best) = fitting().min_by(|&a, &b| error(&choices[a]).total_cmp(&error(&choices[b])))
    else {
        return match choices.iter().map(|choice| choice.state_bytes).min() {
            Some(least) => fails(format!("no state fits: the smallest has {}", bytes(least)), None),
            None => fails("nothing could be measured".into(), None),
        };
    };
    let mut reason = format!("best error {}", said(&choices[best].figures));
    let larger = cheapest(&mut (0..choices.len()).filter(|&i| reaches(&choices[i])));
    if let Some(larger) = larger {
        reason += &format!("; {} of state would do", bytes(choices[larger].state_bytes));
    }
    fails(reason, Some(best))
}

/// A candidate's errors in words.
fn said(figures: &Figures) -> String {
    let mut text =
        format!("{}, 99 %: {}", three(figures.relative.median), three(figures.relative.p99));
    let bad = figures.non_positive + figures.non_finite;
    if bad > 0.0 {
        text += &format!(", {} % of denominators bad", three(100.0 * bad));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::measure::Spread;
    use super::*;

    fn choice(alone: bool, state_bytes: u128, median: f64, p99: f64) -> Choice {
        let relative = Spread { median, p99 };
        let figures = Figures { relative, absolute: relative, non_positive: 0.0, non_finite: 0.0 };
        Choice { alone, state_bytes, figures }
    }

    fn judged(max_error: f64, max_state: Option<u64>) -> (Verdict, Option<usize>, String) {
        let choices = [
            choice(true, 100, 0.3, 2.0),
            choice(false, 1_000, 0.04, 1.5),
            choice(false, 10_000, 0.02, 0.4),
            choice(false, 20_000, 0.02, 0.4),
        ];
        let Judgement { verdict, reason, recommended } =
            judge(&choices, &Budget { max_error, max_state });
        (verdict, recommended, reason)
    }

    #[test]
    fn the_cheapest_within_the_budgets_is_taken() {
        assert!(matches!(judged(0.1, None), (Verdict::Mostly, Some(1), _)));
        assert!(matches!(judged(0.03, None), (Verdict::Works, Some(2), _)));
        assert!(matches!(judged(0.5, None), (Verdict::Near, Some(0), _)));
        assert!(matches!(judged(0.5, Some(100)), (Verdict::Near, Some(0), _)));
    }

    #[test]
    fn the_best_error_is_taken_where_none_reaches() {
        assert!(matches!(judged(0.01, None), (Verdict::Fails, Some(2 | 3), _)));
        let (verdict, recommended, reason) = judged(0.03, Some(5_000));
        assert_eq!((verdict, recommended), (Verdict::Fails, Some(1)));
        assert!(reason.contains("0.04") && reason.contains("10.0 KB of state"), "{reason}");
        let (verdict, recommended, reason) = judged(0.03, Some(99));
        assert_eq!((verdict, recommended), (Verdict::Fails, None));
        assert!(reason.contains("100 B"), "{reason}");
        let nothing = judge(&[], &Budget { max_error: 0.1, max_state: None });
        assert_eq!((nothing.verdict, nothing.recommended), (Verdict::Fails, None));
    }
}
