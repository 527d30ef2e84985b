//! What the numbers come to, in sentences.

use super::figures::window;
use super::normal::{HEAD, KEYS, Normal, TARGET, TARGET_DEVIATION, TARGET_TERMS};
use super::trained::{Trained, USUAL_TERMS};
use super::{Coefficients, Series};
use crate::inspect::measure::Spread;
use crate::table::{grouped, three};

/// All sentences.
pub fn findings(all: &Coefficients) -> Vec<String> {
    let sentences = [normal(all), estimate(all)];
    sentences.into_iter().flatten().chain(all.trained.iter().filter_map(trained)).collect()
}

fn normal(all: &Coefficients) -> Option<String> {
    let at = |series, terms, s| Some(all.at(s, series, terms)?.errors.relative_median);
    let target = |series| at(series, TARGET_TERMS, TARGET_DEVIATION);
    let [taylor, gauss, hermite] = [Series::Taylor, Series::Gauss, Series::Hermite].map(target);
    let (taylor, gauss, hermite) = (taylor?, gauss?, hermite?);
    let met = if hermite <= TARGET { "met" } else { "missed" };
    Some(format!(
        "Past the paper, the same state with other coefficients (N(0, 1), d = {HEAD}, {} keys that \
         every query reads): at logits of deviation {TARGET_DEVIATION}, {TARGET_TERMS} terms are \
         off by {} with Taylor's coefficients, {} with Gauss's and {} with Hermite's, {}× less \
         than Taylor's (median |Y−Ŷ| over median |Y|; target for Hermite: at most {TARGET}, {met}). \
         With 4 terms: {}, {} and {}. None of them carries much larger logits: at deviation 2, \
         {TARGET_TERMS} terms are off by {}, {} and {}.",
        grouped(KEYS as u128),
        three(taylor),
        three(gauss),
        three(hermite),
        three(taylor / hermite),
        three(at(Series::Taylor, 4, TARGET_DEVIATION)?),
        three(at(Series::Gauss, 4, TARGET_DEVIATION)?),
        three(at(Series::Hermite, 4, TARGET_DEVIATION)?),
        three(at(Series::Taylor, TARGET_TERMS, 2.0)?),
        three(at(Series::Gauss, TARGET_TERMS, 2.0)?),
        three(at(Series::Hermite, TARGET_TERMS, 2.0)?),
    ))
}

fn estimate(all: &Coefficients) -> Option<String> {
    let ratios = |series, of: fn(&Normal) -> f64| {
        let of_series = all.normal.iter().filter(|one| one.series == series);
        let ratios: Vec<f64> = of_series.filter_map(|one| Some(one.estimate? / of(one))).collect();
        let low = ratios.iter().copied().reduce(f64::min)?;
        let high = ratios.iter().copied().reduce(f64::max)?;
        Some(format!("{} to {}", three(low), three(high)))
    };
    let one = all.at(TARGET_DEVIATION, Series::Hermite, TARGET_TERMS)?;
    let hermite = all.normal.iter().filter(|one| one.series == Series::Hermite);
    let worst = hermite.map(|one| one.by_query.largest / one.by_query.rms).fold(0.0, f64::max);
    Some(format!(
        "What diagnosing a call expects of it, √Pr[Poisson(σ²) ≥ P] from sums that the state holds \
         anyway, is for Hermite {} times the relative error of queries that was measured, root mean \
         square, over all these deviations and P (P = {TARGET_TERMS}, deviation \
         {TARGET_DEVIATION}: {} for {}), and {} times the median query's. It is a guide and no \
         bound: few queries make the mean square, and the worst of these {} is off by up to {} \
         times its root. For other series it tells less: {} times the measured with Gauss, {} with \
         Taylor.",
        ratios(Series::Hermite, |one| one.by_query.rms)?,
        three(one.estimate?),
        three(one.by_query.rms),
        ratios(Series::Hermite, |one| one.by_query.median)?,
        grouped(one.queries as u128),
        three(worst),
        ratios(Series::Gauss, |one| one.by_query.rms)?,
        ratios(Series::Taylor, |one| one.by_query.rms)?,
    ))
}

fn trained(layer: &Trained) -> Option<String> {
    let pair = |median: f64, p99: f64| format!("{} / {}", three(median), three(p99));
    let relative = |series, terms| Some(layer.tail(series, terms)?.errors.relative);
    let tail = |series, terms| {
        let Spread { median, p99 } = relative(series, terms)?;
        Some(pair(median, p99))
    };
    let alone = layer.alone.relative;
    let mut worse = vec![];
    for series in Series::ALL {
        let Spread { median, p99 } = relative(series, USUAL_TERMS)?;
        if median > alone.median {
            worse.push(format!("{}'s tail is worse than none", series.name()));
        } else if p99 > alone.p99 {
            worse.push(format!("{}'s is worse than none for one query in 100", series.name()));
        }
    }
    let worse = if worse.is_empty() { String::new() } else { format!(" {}.", worse.join("; ")) };
    Some(format!(
        "{}, the far past behind a near window ({}): a query's output is off by {} (median / 99 %) \
         with the window alone; with {USUAL_TERMS} terms for the far past by {} (Taylor), {} \
         (Gauss) and {} (Hermite); with 2 by {}, {} and {}.{worse}",
        layer.name,
        window(),
        pair(alone.median, alone.p99),
        tail(Series::Taylor, USUAL_TERMS)?,
        tail(Series::Gauss, USUAL_TERMS)?,
        tail(Series::Hermite, USUAL_TERMS)?,
        tail(Series::Taylor, 2)?,
        tail(Series::Gauss, 2)?,
        tail(Series::Hermite, 2)?,
    ))
}
