//! The kernels that are chosen per query.

mod common;

use common::{Data, assert_close, assert_close_above, fresh_rng, normals, random_decays};
use rand::Rng;
use sata_oracle::kernel::{FarKernel, Gauss, Hermite, Measure, exp_divided_differences};
use sata_oracle::{Near, Problem, Series, Shape, attention, softmax_attention};

/// `count` logits of deviation about 2 under uneven weights.
fn random_measure(rng: &mut rand::rngs::StdRng, count: usize) -> Measure {
    let points = normals(rng, count).iter().map(|x| 2.0 * x + 0.5).collect();
    Measure::new(points, &normals(rng, count))
}

/// κ(x), the scale included.
fn kappa(gauss: &Gauss, x: f64) -> f64 {
    gauss.value(x) * gauss.log_scale().exp()
}

#[test]
fn divided_differences_of_the_exponential() {
    // All points equal: f[z, …, z] = e^z/j!, here with the largest point taken off.
    assert_close("equal", &exp_divided_differences(&[3.0; 4]), &[1.0, 1.0, 0.5, 1.0 / 6.0], 1e-15);
    // By the quotients themselves, for points far enough apart.
    let z = [-1.0, -1.0, 0.5, 2.0];
    let f = |x: f64| (x - 2.0).exp();
    let first = [f(-1.0), (f(0.5) - f(-1.0)) / 1.5, (f(2.0) - f(0.5)) / 1.5];
    let second = [(first[1] - first[0]) / 1.5, (first[2] - first[1]) / 3.0];
    let third = (second[1] - second[0]) / 3.0;
    assert_close(
        "quotients",
        &exp_divided_differences(&z),
        &[f(-1.0), f(-1.0), second[0], third],
        1e-14,
    );
    // Far beyond what e^x can hold.
    let wide = exp_divided_differences(&[0.0, 2000.0]);
    assert_close("wide", &wide, &[0.0, 1.0 / 2000.0], 1e-11);
}

#[test]
fn quadrature_is_exact_to_its_degree() {
    let mut rng = fresh_rng();
    for count in 1..=5 {
        let measure = random_measure(&mut rng, 60);
        let gauss = Gauss::new(count, &measure);
        assert_eq!(gauss.nodes().len(), count);
        assert!(gauss.nodes().is_sorted());
        assert!(gauss.node_weights().iter().all(|w| *w > 0.0));
        for degree in 0..2 * count as i32 {
            let exact = measure.expect(|x| x.powi(degree));
            let magnitude = measure.expect(|x| x.abs().powi(degree));
            let nodes = gauss.nodes().iter().zip(gauss.node_weights());
            let quadrature: f64 = nodes.map(|(x, w)| w * x.powi(degree)).sum();
            assert!(
                (quadrature - exact).abs() <= 1e-11 * magnitude,
                "{count} nodes, degree {degree}"
            );
        }
    }
}

#[test]
fn one_and_two_nodes_by_their_formulas() {
    let mut rng = fresh_rng();
    let measure = random_measure(&mut rng, 40);
    let (mean, deviation) = (measure.mean(), measure.variance().sqrt());

    // P = 2: a line through μ.
    let line = Gauss::new(1, &measure);
    assert_close_above(1.0, "one node", line.nodes(), &[mean], 1e-14);
    for x in [-3.0, 0.0, 4.0] {
        let size = mean.exp() * (1.0 + (x - mean).abs());
        let error = kappa(&line, x) - mean.exp() * (1.0 + x - mean);
        assert!(error.abs() <= 1e-13 * size, "line at {x}: {error:e}");
    }

    // P = 4: μ + σ (γ ∓ √(γ² + 4))/2.
    let skewness = measure.expect(|x| ((x - mean) / deviation).powi(3));
    let root = (skewness * skewness + 4.0).sqrt();
    let nodes =
        [mean + deviation * (skewness - root) / 2.0, mean + deviation * (skewness + root) / 2.0];
    assert_close("two nodes", Gauss::new(2, &measure).nodes(), &nodes, 1e-12);
}

#[test]
fn gauss_interpolates_value_and_slope() {
    let mut rng = fresh_rng();
    for count in 1..=4 {
        let gauss = Gauss::new(count, &random_measure(&mut rng, 30));
        let h = 1e-5;
        for &node in gauss.nodes() {
            assert_close("value", &[kappa(&gauss, node)], &[node.exp()], 1e-11);
            assert_close(
                "slope",
                &[gauss.slope(node) * gauss.log_scale().exp()],
                &[node.exp()],
                1e-9,
            );
        }
        for x in [-4.0, -1.0, 0.3, 2.5] {
            let difference = (gauss.value(x + h) - gauss.value(x - h)) / (2.0 * h);
            let size = gauss.slope(x).abs().max(gauss.value(x).abs()).max(1.0);
            assert!((gauss.slope(x) - difference).abs() <= 1e-6 * size, "slope at {x}");
        }
    }
}

#[test]
fn gauss_stays_below_the_exponential_and_sums_to_its_nodes() {
    let mut rng = fresh_rng();
    for count in 1..=4 {
        let measure = random_measure(&mut rng, 50);
        let gauss = Gauss::new(count, &measure);
        let nodes = gauss.nodes().iter().zip(gauss.node_weights());
        let expected: f64 = nodes.map(|(x, w)| w * x.exp()).sum();
        assert_close("sum", &[measure.expect(|x| kappa(&gauss, x))], &[expected], 1e-11);
        for i in -100..=100 {
            let x = i as f64 / 10.0;
            let rounding = 1e-11 * (x.exp() + kappa(&gauss, x).abs() + gauss.log_scale().exp());
            assert!(kappa(&gauss, x) <= x.exp() + rounding, "{count} nodes at {x}");
        }
    }
}

#[test]
fn gauss_is_exact_on_few_distinct_logits() {
    let mut rng = fresh_rng();
    for count in 1..=5 {
        for distinct in 1..=count {
            let values: Vec<f64> =
                (0..distinct).map(|i| 3.0 * i as f64 + rng.random::<f64>() - 4.0).collect();
            let points: Vec<f64> = (0..40).map(|s| values[s % distinct]).collect();
            let gauss = Gauss::new(count, &Measure::new(points, &normals(&mut rng, 40)));
            assert_close("nodes", gauss.nodes(), &values, 1e-12);
            for x in &values {
                assert_close("κ", &[kappa(&gauss, *x)], &[x.exp()], 1e-11);
            }
        }
    }
}

#[test]
fn gauss_attention_is_softmax_on_few_distinct_logits() {
    // A query and keys of one dimension; the keys take two or three values.
    let mut rng = fresh_rng();
    let shape = Shape { query_heads: 2, kv_heads: 1, queries: 30, keys: 30, d_key: 1, d_value: 2 };
    let mut data = Data::new(&mut rng, shape);
    for distinct in 1..=3 {
        for s in 0..shape.keys {
            data.k[s] = [-1.5, 0.25, 2.0][rng.random_range(0..distinct)];
        }
        for decay in random_decays(&mut rng, shape) {
            let problem = Problem {
                series: Series::Gauss,
                terms: 2 * distinct,
                near: Near::Blocks(0),
                block: 8,
                decay,
                ..data.problem()
            };
            assert_close("causal", &attention(&problem).y, &softmax_attention(&problem).y, 1e-11);
            let full = Problem { causal: false, near: Near::None, ..problem };
            assert_close("full", &attention(&full).y, &softmax_attention(&full).y, 1e-11);
        }
    }
}

#[test]
fn gauss_denominators_are_positive() {
    let mut rng = fresh_rng();
    let shape = Shape { query_heads: 4, kv_heads: 2, queries: 40, keys: 40, d_key: 6, d_value: 1 };
    for scale in [0.1, 1.0, 4.0, 20.0] {
        let data = Data::new(&mut rng, shape);
        for decay in random_decays(&mut rng, shape) {
            for terms in [2, 4, 6, 8] {
                let problem = Problem {
                    series: Series::Gauss,
                    terms,
                    scale,
                    decay: decay.clone(),
                    ..data.problem()
                };
                let output = attention(&problem);
                assert!(
                    output.denominators.iter().all(|d| *d > 0.0),
                    "scale {scale}, terms {terms}"
                );
            }
        }
    }
}

#[test]
fn hermite_without_spread_is_the_exponential_of_the_mean() {
    let mut rng = fresh_rng();
    for terms in 1..=6 {
        let logit = 3.0 * (rng.random::<f64>() - 0.5);
        let hermite =
            Hermite::new(terms, 0.9, &Measure::new(vec![logit; 9], &normals(&mut rng, 9)));
        let kappa = hermite.value(logit) * hermite.log_scale().exp();
        assert_close("κ(μ)", &[kappa], &[logit.exp()], 1e-15);
        // Next to it, Taylor about μ.
        let taylor: f64 = Series::Taylor
            .coefficients(terms)
            .unwrap()
            .iter()
            .rev()
            .fold(0.0, |sum, a| sum * 0.1 + a);
        assert_close("κ(μ + 0.1)", &[hermite.value(logit + 0.1)], &[taylor], 1e-13);
    }
}

#[test]
fn hermite_polynomials_by_hand() {
    // P = 4: e^{μ+τ²/2} (1 + u + (u² − τ²)/2 + (u³ − 3 τ² u)/6).
    let mut rng = fresh_rng();
    let measure = random_measure(&mut rng, 25);
    let (mean, tau2) = (measure.mean(), 0.81 * measure.variance());
    let hermite = Hermite::new(4, 0.9, &measure);
    assert_close("scale", &[hermite.log_scale()], &[mean + tau2 / 2.0], 1e-14);
    for x in [-2.0, 0.1, 1.0, 5.0] {
        let u = x - mean;
        let value = 1.0 + u + (u * u - tau2) / 2.0 + (u * u * u - 3.0 * tau2 * u) / 6.0;
        let slope = 1.0 + u + (u * u - tau2) / 2.0;
        assert!((hermite.value(x) - value).abs() <= 1e-13 * (1.0 + u.abs().powi(3)));
        assert!((hermite.slope(x) - slope).abs() <= 1e-13 * (1.0 + u.abs().powi(2)));
    }
}

#[test]
fn hermite_is_the_least_squares_fit() {
    // The residual e^x − κ(x) is orthogonal to every power below P under N(μ, τ²): the trapezoid rule on a wide grid.
    let mut rng = fresh_rng();
    let measure = random_measure(&mut rng, 25);
    let (mean, tau) = (measure.mean(), measure.variance().sqrt());
    let hermite = Hermite::new(4, 1.0, &measure);
    for degree in 0..4 {
        let (mut residual, mut size) = (0.0, 0.0);
        for i in -3000..=3000 {
            let z = i as f64 / 200.0;
            let x = mean + tau * z;
            let density = (-z * z / 2.0).exp();
            residual +=
                density * z.powi(degree) * ((x - hermite.log_scale()).exp() - hermite.value(x));
            size += density * z.abs().powi(degree) * (x - hermite.log_scale()).exp();
        }
        assert!(residual.abs() <= 1e-10 * size, "degree {degree}: {residual:e} of {size:e}");
    }
}

#[test]
fn derivatives_through_the_parameters() {
    // Σ_s c_s κ(x_s) with the x_s under κ held while the logits and decays that κ is fitted to move.
    let mut rng = fresh_rng();
    let count = 12;
    for (series, terms) in [
        (Series::Gauss, 2),
        (Series::Gauss, 4),
        (Series::Gauss, 8),
        (Series::hermite(), 1),
        (Series::hermite(), 2),
        (Series::hermite(), 5),
    ] {
        // Spread wide, so that many nodes still leave something to differentiate.
        let logits: Vec<f64> = normals(&mut rng, count).iter().map(|x| 3.0 * x).collect();
        let log_decays = normals(&mut rng, count);
        let c = normals(&mut rng, count);
        let measure = Measure::new(logits.clone(), &log_decays);
        let kernel = FarKernel::new(&series, terms, &measure);
        let sum = |logits_moved: &[f64], log_decays_moved: &[f64]| -> f64 {
            let moved = FarKernel::new(
                &series,
                terms,
                &Measure::new(logits_moved.to_vec(), log_decays_moved),
            );
            let scale = (moved.log_scale() - kernel.log_scale()).exp();
            (0..count).map(|s| c[s] * moved.value(logits[s]) * scale).sum()
        };
        let at = |x: &[f64], s: usize, delta: f64| {
            let mut moved = x.to_vec();
            moved[s] += delta;
            moved
        };
        let mut by_logits = vec![];
        let mut by_log_decays = vec![];
        for s in 0..count {
            by_logits.push(five_points(|delta| sum(&at(&logits, s, delta), &log_decays)));
            by_log_decays.push(five_points(|delta| sum(&logits, &at(&log_decays, s, delta))));
        }
        let through = kernel.through_parameters(&measure, &c);
        let name = format!("{series:?} {terms}");
        // What the kernel's parameters change can be small beside the kernel, whose rounding the differences carry.
        assert_close_above(1e-3, &name, &through.logits, &by_logits, 1e-5);
        assert_close_above(1e-3, &name, &through.log_decays, &by_log_decays, 1e-5);
    }
}

/// f'(0), by differences exact to degree 4.
fn five_points(f: impl Fn(f64) -> f64) -> f64 {
    let h = 1e-4;
    (8.0 * (f(h) - f(-h)) - (f(2.0 * h) - f(-2.0 * h))) / (12.0 * h)
}
