//! Against the oracle's kernels, made from the logits themselves.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use sata_oracle::kernel::{self, Measure};

use super::{Fit, Noise, Rule, exponential, poisson_tail, shift, taylor_bound};

/// Rounding of f64 and of f32 sums, as callers tell it.
const DOUBLE: f64 = 64.0 * f64::EPSILON / 2.0;
const SINGLE: f64 = 64.0 * f32::EPSILON as f64 / 2.0;

/// Rounding relative to the sums alone.
fn only(relative: f64) -> Noise {
    Noise { relative, absolute: 0.0, reach: 0.0 }
}

fn rng() -> StdRng {
    let seed = match std::env::var("SATA_TEST_SEED") {
        Ok(seed) => seed.parse().expect("SATA_TEST_SEED is a number"),
        Err(_) => RandomState::new().build_hasher().finish(),
    };
    println!("SATA_TEST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Logits with log decays.
#[derive(Clone, Debug)]
struct Logits {
    x: Vec<f64>,
    log_decays: Vec<f64>,
}

impl Rule {
    fn hermite() -> Self {
        Rule::Hermite { tau: 0.9 }
    }
}

impl Logits {
    /// `count` of them from `distinct` values (0: as many as there are) of a mean and deviation.
    fn new(rng: &mut StdRng, count: usize, distinct: usize, mean: f64, deviation: f64) -> Self {
        let mut draw = || mean + deviation * rng.sample::<f64, _>(StandardNormal);
        let x: Vec<f64> = if distinct == 0 {
            (0..count).map(|_| draw()).collect()
        } else {
            let values: Vec<f64> = (0..distinct).map(|_| draw()).collect();
            (0..count).map(|s| values[s % distinct]).collect()
        };
        let log_decays = (0..count).map(|_| -3.0 * rng.random::<f64>()).collect();
        Logits { x, log_decays }
    }

    fn measure(&self) -> Measure {
        Measure::new(self.x.clone(), &self.log_decays)
    }

    /// Σ ω x^p, each altered by up to `error` of Σ ω |x|^p.
    fn sums(&self, terms: usize, error: f64, rng: &mut StdRng) -> Vec<f64> {
        (0..terms)
            .map(|p| {
                let (mut sum, mut magnitude) = (0.0, 0.0);
                for (x, g) in self.x.iter().zip(&self.log_decays) {
                    sum += g.exp() * x.powi(p as i32);
                    magnitude += g.exp() * x.powi(p as i32).abs();
                }
                sum + error * magnitude * rng.random_range(-1.0..1.0)
            })
            .collect()
    }

    fn weighed(&self, f: impl Fn(f64) -> f64) -> f64 {
        self.x.iter().zip(&self.log_decays).map(|(x, g)| g.exp() * f(*x)).sum()
    }
}

fn polynomial(c: &[f64], x: f64) -> f64 {
    c.iter().rev().fold(0.0, |sum, c| sum * x + c)
}

fn fit(rule: &Rule, sums: &[f64], noise: f64, terms: usize) -> (Fit, Vec<f64>) {
    let mut c = vec![7.0; terms];
    let fit = rule.fit(sums, only(noise), 0.0, &mut c);
    (fit, c)
}

/// Means, deviations and counts from the harmless to the absurd.
fn any_logits(rng: &mut StdRng) -> Logits {
    let mean = [0.0, 0.3, -1.0, 5.0, -20.0, 80.0, -80.0][rng.random_range(0..7)];
    let deviation = [1e-9, 1e-5, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 30.0][rng.random_range(0..9)];
    let count = [1, 2, 3, 5, 20, 200][rng.random_range(0..6)];
    let distinct = rng.random_range(0..6);
    Logits::new(rng, count, distinct, mean, deviation)
}

/// What two kernels differ by over all far tokens, what the first differs from e^x by, and what
/// rounding of `noise` in the sums may do to any numerator: all relative to the second's sum.
struct Compared {
    difference: f64,
    error: f64,
    wanted_error: f64,
    warranted: f64,
    denominator: f64,
}

fn compare(
    logits: &Logits,
    (fit, c): &(Fit, Vec<f64>),
    noise: f64,
    want: impl Fn(f64) -> f64,
    want_log_scale: f64,
) -> Compared {
    let scale = (want_log_scale - fit.log_scale).exp();
    let total = logits.weighed(&want) * scale;
    let relative = |x: f64| x / total.abs();
    let exact = |x: f64| (x - fit.log_scale).exp();
    let magnitude = |x: f64| polynomial(&c.iter().map(|c| c.abs()).collect::<Vec<_>>(), x.abs());
    Compared {
        difference: relative(logits.weighed(|x| (polynomial(c, x) - scale * want(x)).abs())),
        error: relative(logits.weighed(|x| (polynomial(c, x) - exact(x)).abs())),
        wanted_error: relative(logits.weighed(|x| (scale * want(x) - exact(x)).abs())),
        warranted: noise * relative(logits.weighed(magnitude)),
        denominator: relative((fit.denominator - total).abs()),
    }
}

fn nodes(c: &[f64]) -> usize {
    c.iter().rposition(|c| *c != 0.0).map_or(0, |p| p.div_ceil(2))
}

/// Gauss against the oracle's kernel of as many nodes as were found; and where those are fewer
/// than could be, the sums must have been too inexact for the full number to do any better.
fn gauss_against_oracle(rng: &mut StdRng, noise: f64, error: f64) {
    for _ in 0..4000 {
        let logits = any_logits(rng);
        let terms = 2 * rng.random_range(1..=4);
        let sums = logits.sums(terms, error, rng);
        let found = fit(&Rule::Gauss, &sums, noise, terms);
        let (f, c) = &found;
        let say = || format!("P = {terms}, {f:?}, c = {c:?}, {logits:?}");
        assert!(f.denominator > 0.0 && f.denominator.is_finite(), "{}", say());
        assert!(f.log_scale.is_finite() && c.iter().all(|c| c.is_finite()), "{}", say());

        let measure = logits.measure();
        let same = kernel::Gauss::new(nodes(c), &measure);
        let full = kernel::Gauss::new(terms / 2, &measure);
        let compared = compare(&logits, &found, noise, |x| same.value(x), same.log_scale());
        // Nodes move with the moments, in proportion to the deviation, and e^x with them.
        let deviation = measure.variance().sqrt();
        let warranted = compared.warranted * (1.0 + 3.0 * deviation);
        let width = 2.0 * measure.expect(|x| x * x).sqrt() / deviation;
        let loose = deviation > 1.0 && noise * width.powi(terms as i32 - 1) * deviation > 0.03;
        if warranted > 0.03 || loose {
            continue;
        }
        for off in [compared.difference, compared.denominator] {
            assert!(off <= 16.0 * warranted, "{off:e} > 16·{warranted:e} {}", say());
        }

        // With one node more, terms as large as these would have been rounded; and a variance
        // below its rounding error counts as none.
        let next: f64 = (0..2 * nodes(c) + 2)
            .map(|p| measure.expect(|x| (2.0 * x.abs()).powi(p as i32)) / factorial(p))
            .sum();
        let allowed = 8.0 * warranted
            + if nodes(c) < full.nodes().len() {
                noise * next + noise * measure.expect(|x| x * x)
            } else {
                0.0
            };
        let compared = compare(&logits, &found, noise, |x| full.value(x), full.log_scale());
        assert!(
            compared.error <= 1.01 * compared.wanted_error + allowed,
            "{:e} > {:e} + {allowed:e} {}",
            compared.error,
            compared.wanted_error,
            say()
        );
    }
}

fn factorial(p: usize) -> f64 {
    (1..=p).map(|i| i as f64).product()
}

#[test]
fn gauss_is_the_oracles_with_exact_sums() {
    gauss_against_oracle(&mut rng(), DOUBLE, 0.0);
}

#[test]
fn gauss_is_the_oracles_with_f32_sums() {
    gauss_against_oracle(&mut rng(), SINGLE, 10.0 / 64.0 * SINGLE);
}

/// At most as many distinct logits as nodes, apart from each other: nothing is approximated.
#[test]
fn gauss_is_exact_on_few_logits() {
    let mut rng = rng();
    for _ in 0..2000 {
        let values = rng.random_range(1..=4);
        let terms = 2 * rng.random_range(values..=4);
        let x = (0..values).map(|i| 1.3 * i as f64 - 1.5 + 0.3 * rng.random::<f64>()).collect();
        let log_decays = (0..values).map(|_| -rng.random::<f64>()).collect();
        let logits = Logits { x, log_decays };
        let (f, c) = fit(&Rule::Gauss, &logits.sums(terms, 0.0, &mut rng), DOUBLE, terms);
        assert_eq!(nodes(&c), values, "P = {terms}, {c:?}, {logits:?}");
        for &x in &logits.x {
            let (got, want) = (polynomial(&c, x), (x - f.log_scale).exp());
            assert!((got - want).abs() <= 1e-9, "P = {terms}: {got} {want} {logits:?}");
        }
        let want = logits.weighed(|x| (x - f.log_scale).exp());
        assert!((f.denominator / want - 1.0).abs() <= 1e-10, "{} {want} {logits:?}", f.denominator);
    }
}

/// Two logits however close: every coefficient keeps its digits, where cosh − sinh/r would not.
#[test]
fn gauss_keeps_its_highest_coefficients() {
    for r in [1e-8, 1e-5, 1e-3, 0.1, 0.5, 0.99, 1.01, 3.0, 20.0] {
        let logits = Logits { x: vec![-r, r], log_decays: vec![0.0; 2] };
        let sums = [2.0, 0.0, 2.0 * r * r, 0.0];
        let (f, c) = fit(&Rule::Gauss, &sums, DOUBLE, 4);
        let z = [-r, -r, r, r];
        let mut want = kernel::exp_divided_differences(&z);
        shift::newton(&mut want, &z);
        for p in 0..4 {
            let tolerance = 1e-12 * want[p].abs() + if p < 2 { 1e-13 } else { 0.0 };
            assert!((c[p] - want[p]).abs() <= tolerance, "{r}, {p}: {} {}", c[p], want[p]);
        }
        let total = logits.weighed(|x| (x - f.log_scale).exp());
        assert!((f.denominator / total - 1.0).abs() < 1e-13, "{r}");
    }
}

/// A skewness that rounding alone has made would put a node far out, where e^x is large.
#[test]
fn gauss_does_not_believe_rounding_errors() {
    let mut rng = rng();
    for terms in [4, 6, 8] {
        for sign in [-1.0, 1.0] {
            let logits = Logits::new(&mut rng, 200, 0, 30.0, 0.1);
            let mut sums = logits.sums(terms, 0.0, &mut rng);
            for sum in &mut sums[3..] {
                *sum *= 1.0 + sign * SINGLE;
            }
            let (f, _) = fit(&Rule::Gauss, &sums, SINGLE, terms);
            let want = logits.weighed(|x| (x - f.log_scale).exp());
            assert!((f.denominator / want - 1.0).abs() < 0.02, "{terms}: {f:?} {want}");
        }
    }
}

#[test]
fn hermite_is_the_oracles() {
    let mut rng = rng();
    for _ in 0..4000 {
        let logits = any_logits(&mut rng);
        let terms = rng.random_range(1..=8);
        let tau = [0.0, 0.9, 1.2][rng.random_range(0..3)];
        let (noise, error) =
            [(DOUBLE, 0.0), (SINGLE, 10.0 / 64.0 * SINGLE)][rng.random_range(0..2)];
        let sums = logits.sums(terms.max(3), error, &mut rng);
        let found = fit(&Rule::Hermite { tau }, &sums, noise, terms);
        let (f, c) = &found;
        let say = || format!("P = {terms}, {f:?}, c = {c:?}, {logits:?}");
        assert!(f.denominator.is_finite() && c.iter().all(|c| c.is_finite()), "{}", say());

        let oracle = kernel::Hermite::new(terms, tau, &logits.measure());
        let compared = compare(&logits, &found, noise, |x| oracle.value(x), oracle.log_scale());
        // The variance has an error of its own, and half of it is in the exponent.
        let second = sums[2] / sums[0];
        let warranted = compared.warranted * (1.0 + second.sqrt()) + 4.0 * noise * second;
        if compared.warranted > 0.03 {
            continue;
        }
        assert!(
            compared.difference <= 4.0 * warranted,
            "{:e} {warranted:e} {}",
            compared.difference,
            say()
        );
        assert!(
            compared.denominator <= 4.0 * warranted,
            "{:e} {warranted:e} {}",
            compared.denominator,
            say()
        );
    }
}

/// In the plain case, no allowances: logits about N(0, 1).
#[test]
fn both_keep_all_digits_of_centred_logits() {
    let mut rng = rng();
    for round in 0..400 {
        let logits = Logits::new(&mut rng, 100, 0, 0.2, 1.0);
        let terms = 1 + round % 8;
        let measure = logits.measure();
        let sums = logits.sums(terms.max(3), 0.0, &mut rng);
        let found = fit(&Rule::hermite(), &sums, DOUBLE, terms);
        let oracle = kernel::Hermite::new(terms, 0.9, &measure);
        let compared = compare(&logits, &found, DOUBLE, |x| oracle.value(x), oracle.log_scale());
        assert!(compared.difference < 1e-12 && compared.denominator < 1e-12, "{found:?}");
        if terms % 2 == 0 {
            let found = fit(&Rule::Gauss, &sums, DOUBLE, terms);
            let oracle = kernel::Gauss::new(terms / 2, &measure);
            let compared =
                compare(&logits, &found, DOUBLE, |x| oracle.value(x), oracle.log_scale());
            assert!(compared.difference < 1e-12 && compared.denominator < 1e-12, "{found:?}");
        }
    }
}

#[test]
fn equal_logits_are_weighed_exactly() {
    let mut rng = rng();
    for _ in 0..1000 {
        let x = rng.random_range(-80.0..80.0);
        let count = rng.random_range(1..50);
        let logits = Logits { x: vec![x; count], log_decays: vec![-0.25; count] };
        for rule in [Rule::Gauss, Rule::hermite()] {
            for error in [0.0, 10.0 / 64.0 * SINGLE] {
                let sums = logits.sums(8, error, &mut rng);
                let noise = if error == 0.0 { DOUBLE } else { SINGLE };
                let (f, c) = fit(&rule, &sums, noise, 4);
                assert_eq!(f.variance, 0.0);
                let want = logits.weighed(|x| (x - f.log_scale).exp());
                assert!(
                    (f.denominator / want - 1.0).abs() < noise * (4.0 + 2.0 * x.abs()),
                    "{f:?}"
                );
                if rule == Rule::Gauss {
                    assert_eq!(nodes(&c), 1);
                }
            }
        }
    }
}

#[test]
fn fixed_is_expanded_about_the_shift() {
    let mut rng = rng();
    for _ in 0..1000 {
        let terms = rng.random_range(1..=8);
        let a: Vec<f64> = (0..terms).map(|_| rng.sample(StandardNormal)).collect();
        let shift = [0.0, 0.5, -3.0][rng.random_range(0..3)];
        let logits = Logits::new(&mut rng, 20, 0, 0.0, 1.0);
        let sums = logits.sums(terms.max(3), 0.0, &mut rng);
        let mut c = vec![7.0; terms];
        let f = Rule::Fixed(a.clone()).fit(&sums, only(DOUBLE), shift, &mut c);
        assert_eq!(f.log_scale, -shift);
        if shift == 0.0 {
            assert_eq!(c, a);
        }
        for &x in &logits.x {
            let want = polynomial(&a, x + shift);
            let magnitude: f64 =
                (0..terms).map(|p| a[p].abs() * (x.abs() + shift.abs()).powi(p as i32)).sum();
            assert!((polynomial(&c, x) - want).abs() <= 1e-13 * magnitude, "{a:?} {shift}");
        }
        let want = logits.weighed(|x| polynomial(&c, x));
        let magnitude = logits.weighed(|x| polynomial(&c, x).abs());
        assert!((f.denominator - want).abs() <= 1e-11 * magnitude.max(1.0), "{a:?} {shift}");
        let measure = logits.measure();
        assert!((f.mean - measure.mean() - shift).abs() < 1e-12);
        assert!((f.variance - measure.variance()).abs() < 1e-12);
    }
    // x⁴ + 10⁻³ holds nothing that tells a mean.
    let rule = Rule::Fixed(vec![1e-3, 0.0, 0.0, 0.0, 1.0]);
    let (f, _) = fit(&rule, &[2.0, 0.0, 0.0, 0.0, 6.0], DOUBLE, 5);
    assert!((f.denominator - 6.002).abs() < 1e-12 && f.mean.is_nan() && f.variance.is_nan());
}

#[test]
fn shifting_moves_only_the_scale_of_the_exponential_rules() {
    let sums = [2.0, 1.0, 3.0, 2.0];
    for rule in [Rule::Gauss, Rule::hermite()] {
        let (mut c, mut moved) = ([0.0; 4], [0.0; 4]);
        let f = rule.fit(&sums, only(DOUBLE), 0.0, &mut c);
        let g = rule.fit(&sums, only(DOUBLE), 7.0, &mut moved);
        assert_eq!(c, moved);
        assert_eq!((f.log_scale, f.denominator), (g.log_scale, g.denominator));
        assert_eq!(f.mean + 7.0, g.mean);
    }
}

#[test]
fn nothing_far_weighs_nothing() {
    for rule in [Rule::Gauss, Rule::hermite(), Rule::Fixed(vec![1.0, 1.0, 0.5, 0.25])] {
        let mut c = [7.0; 4];
        let f = rule.fit(&[0.0; 4], only(DOUBLE), 1.0, &mut c);
        assert_eq!((f.log_scale, f.denominator), (f64::NEG_INFINITY, 0.0), "{rule:?}");
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    for rule in [Rule::Gauss, Rule::hermite(), Rule::Fixed(vec![1.0, 1.0, 0.5, 0.25])] {
        for bad in [f64::NAN, f64::INFINITY] {
            for place in 0..4 {
                let mut sums = [2.0, 1.0, 3.0, 2.0];
                sums[place] = bad;
                let (f, _) = fit(&rule, &sums, DOUBLE, 4);
                assert!(!f.denominator.is_finite(), "{rule:?}, {bad} at {place}: {f:?}");
            }
        }
    }
    assert!(fit(&Rule::Gauss, &[-1.0, 0.0], DOUBLE, 2).0.denominator.is_nan());
}

/// More terms than the arrays on the stack are for.
#[test]
fn many_terms() {
    let mut rng = rng();
    let logits = Logits::new(&mut rng, 100, 0, 0.0, 1.5);
    let sums = logits.sums(40, 0.0, &mut rng);
    for rule in [Rule::Gauss, Rule::hermite()] {
        let (f, c) = fit(&rule, &sums, DOUBLE, 40);
        let want = logits.weighed(|x| (x - f.log_scale).exp());
        let got = logits.weighed(|x| polynomial(&c, x));
        assert!((got / want - 1.0).abs() < 1e-6, "{rule:?}: {got} {want}");
        assert!((f.denominator / want - 1.0).abs() < 1e-6, "{rule:?}: {f:?} {want}");
    }
}

#[test]
fn divided_differences_are_the_oracles() {
    let mut rng = rng();
    for _ in 0..500 {
        let span = [0.0, 1e-9, 0.1, 3.0, 40.0, 300.0][rng.random_range(0..6)];
        let mut z: Vec<f64> = (0..rng.random_range(1..=10))
            .flat_map(|_| [span * (rng.random::<f64>() - 0.3); 2])
            .collect();
        z.sort_by(f64::total_cmp);
        let mut got = vec![0.0; z.len()];
        exponential::divided_differences(&z, &mut got);
        for (i, want) in kernel::exp_divided_differences(&z).iter().enumerate() {
            assert!((got[i] - want).abs() <= 1e-12 * want, "{i}: {} {want} {z:?}", got[i]);
        }
    }
}

#[test]
fn moments_shift_as_the_logits_do() {
    let mut moments = [1.0, 0.5, 2.5, 2.0, 8.5];
    // Of −1 and 2, half each.
    for (p, m) in moments.iter_mut().enumerate() {
        *m = ((-1f64).powi(p as i32) + 2f64.powi(p as i32)) / 2.0;
    }
    shift::moments(&mut moments, 3.0);
    for (p, m) in moments.iter().enumerate() {
        assert_eq!(*m, (2f64.powi(p as i32) + 5f64.powi(p as i32)) / 2.0);
    }
    // 1 + 2(y − 1) + 3(y − 1)(y + 2)
    let mut c = [1.0, 2.0, 3.0];
    shift::newton(&mut c, &[1.0, -2.0, 9.0]);
    assert_eq!(c, [-7.0, 5.0, 3.0]);
}

#[test]
fn poisson_tails() {
    for lambda in [1e-3f64, 0.25, 1.0, 4.0, 9.0, 30.0] {
        // All of the tail, term by term.
        let mut pmf = vec![f64::exp(-lambda)];
        for p in 1..400 {
            pmf.push(pmf[p - 1] * lambda / p as f64);
        }
        for terms in 0..60 {
            let want: f64 = pmf[terms..].iter().rev().sum();
            let got = poisson_tail(lambda, terms);
            assert!((got / want - 1.0).abs() < 1e-12, "{lambda} {terms}: {got} {want}");
        }
    }
    assert_eq!((poisson_tail(0.0, 0), poisson_tail(0.0, 3)), (1.0, 0.0));
    assert_eq!(poisson_tail(1e6, 4), 1.0);
    assert_eq!(poisson_tail(f64::INFINITY, 4), 1.0);
    assert!(poisson_tail(f64::NAN, 4).is_nan());
    // About the median.
    assert!((poisson_tail(60000.0, 60000) - 0.5).abs() < 1e-2);
}

#[test]
fn taylor_bounds() {
    let epsilon = 0.5f64.exp() * 0.125 / 6.0;
    let bound = taylor_bound(0.5, 3).unwrap();
    assert!((bound - epsilon / (1.0 - epsilon)).abs() < 1e-15);
    assert_eq!(taylor_bound(0.0, 3), Some(0.0));
    for (reach, terms) in
        [(0.5, 4), (3.0, 3), (1.2, 3), (f64::NAN, 3), (f64::INFINITY, 3), (900.0, 5)]
    {
        assert_eq!(taylor_bound(reach, terms), None, "{reach} {terms}");
    }
}

#[test]
#[ignore = "a measurement"]
fn time() {
    let mut rng = rng();
    for (rule, terms) in [
        (Rule::Gauss, 2),
        (Rule::Gauss, 4),
        (Rule::Gauss, 6),
        (Rule::Gauss, 8),
        (Rule::Hermite { tau: 0.9 }, 4),
        (Rule::Hermite { tau: 0.9 }, 8),
        (Rule::Fixed(vec![1.0, 1.0, 0.5, 1.0 / 6.0]), 4),
    ] {
        let sums: Vec<Vec<f64>> = (0..1000)
            .map(|_| {
                Logits::new(&mut rng, 100, 0, 0.3, 1.0).sums(
                    terms,
                    0.0,
                    &mut StdRng::seed_from_u64(0),
                )
            })
            .collect();
        let mut c = vec![0.0; terms];
        let mut best = f64::INFINITY;
        let mut sink = 0.0;
        for _ in 0..20 {
            let start = Instant::now();
            for s in &sums {
                sink +=
                    rule.fit(std::hint::black_box(s), only(DOUBLE), 0.0, &mut c).denominator + c[0];
            }
            best = best.min(start.elapsed().as_secs_f64() / sums.len() as f64);
        }
        println!("{rule:?}, P = {terms}: {:.0} ns ({sink:.1})", best * 1e9);
    }
}
