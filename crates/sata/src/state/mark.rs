//! Where far sums stand in time: to what their decays are relative.

use crate::Real;

/// What a head's far sums are sums of.
///
/// A token's share is its features times exp(g_r − g_s), r the last token summed: then all factors
/// are at most 1, one is 1, and nothing overflows or vanishes whatever the decay since. Of g only
/// differences are kept, as logarithms in f64.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Mark {
    /// Tokens summed: neither masked ones nor sinks.
    pub count: u64,
    /// g at the last token folded less g_r: at most 0.
    pub lag: f64,
    /// g at the last token folded less g at the sequence's start.
    pub total: f64,
}

/// e^log of what is summed, or 0 where that is nothing beside 1: products of it and powers of small
/// numbers could be subnormal, which take processors a hundred times as long.
pub(crate) fn faded<T: Real>(log: f64) -> T {
    let least = if size_of::<T>() == 8 { -600.0 } else { -60.0 };
    if log < least { T::ZERO } else { T::from_f64(log.exp()) }
}

impl Mark {
    /// The tokens that follow the last one folded are folded too. `g` holds g at each of them less
    /// g at the last folded, or nothing where there is no decay; `live` which of them are summed.
    /// Gives the factor that is left of the sums, and sets `weight` of each token that is summed.
    pub(crate) fn fold<T: Real>(
        &mut self,
        count: usize,
        g: &[f64],
        live: impl Fn(usize) -> bool,
        mut weight: impl FnMut(usize, T),
    ) -> T {
        let before = self.count;
        self.count += (0..count).filter(|&i| live(i)).count() as u64;
        let Some(&end) = count.checked_sub(1).and_then(|last| g.get(last)) else {
            return T::ONE;
        };
        self.total += end;
        let Some(last) = (0..count).rfind(|&i| live(i)) else {
            self.lag += end;
            return T::ONE;
        };
        for i in (0..=last).filter(|&i| live(i)) {
            weight(i, faded(g[last] - g[i]));
        }
        let factor = if before == 0 { T::ONE } else { faded(g[last] + self.lag) };
        self.lag = end - g[last];
        factor
    }
}

/// Running sums of logarithms of decays.
pub(crate) fn running(logs: &[f64]) -> Vec<f64> {
    let mut sums = vec![];
    running_into(logs, &mut sums);
    sums
}

/// The same in memory that is there.
pub(crate) fn running_into(logs: &[f64], sums: &mut Vec<f64>) {
    sums.clear();
    sums.reserve(logs.len());
    let (fours, rest) = logs.as_chunks::<4>();
    let mut sum = 0.0;
    // Four at a time: only one addition in four waits for the one before.
    for &[a, b, c, d] in fours {
        let two = a + b;
        let four = two + (c + d);
        sums.extend([sum + a, sum + two, sum + (two + c), sum + four]);
        sum += four;
    }
    for log in rest {
        sum += log;
        sums.push(sum);
    }
}
