//! The operation against softmax, against its own definition, and against itself under changes that change nothing.

mod common;

use common::{
    Data, all_series, assert_close, fixed_series, fresh_rng, log_gates, normals, random_decays,
};
use sata_oracle::{Decay, Near, Problem, Series, Shape, attention, softmax_attention};

const SHAPE: Shape =
    Shape { query_heads: 4, kv_heads: 2, queries: 17, keys: 17, d_key: 5, d_value: 3 };

#[test]
fn softmax_of_one_small_example() {
    // Two keys with logits ln 1 and ln 3: weights 1/4 and 3/4.
    let shape = Shape { query_heads: 1, kv_heads: 1, queries: 1, keys: 2, d_key: 1, d_value: 2 };
    let k = [0.0, 3.0_f64.ln()];
    let v = [4.0, 0.0, 8.0, -4.0];
    let problem = Problem { causal: false, ..Problem::new(shape, &[1.0], &k, &v) };
    let output = softmax_attention(&problem);
    assert_close("y", &output.y, &[7.0, -3.0], 1e-15);
    assert_close("denominator", &output.denominators, &[4.0], 1e-15);
}

#[test]
fn taylor_of_one_small_example() {
    // P = 3: 1 + x + x²/2 is 1 at 0 and 5 at 2.
    let shape = Shape { query_heads: 1, kv_heads: 1, queries: 1, keys: 2, d_key: 4, d_value: 1 };
    let q = [1.0; 4];
    let k = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0];
    let problem = Problem { causal: false, terms: 3, ..Problem::new(shape, &q, &k, &[6.0, 12.0]) };
    let output = attention(&problem);
    assert_close("y", &output.y, &[11.0], 1e-15);
    assert_close("denominator", &output.denominators, &[6.0], 1e-15);
    let moments = output.far[0].unwrap();
    assert_close("moments", &[moments.mean, moments.deviation], &[1.0, 1.0], 1e-15);
}

#[test]
fn definition_pair_by_pair() {
    // w = exp(g_t − g_s) κ without any shift, visibility and nearness by their own words.
    let mut rng = fresh_rng();
    let data = Data::new(&mut rng, SHAPE);
    let mask: Vec<bool> = (0..SHAPE.keys).map(|s| s % 5 != 3).collect();
    let (block, blocks, sinks) = (4, 1, 2);
    for decay in random_decays(&mut rng, SHAPE) {
        for (series, terms) in fixed_series() {
            let problem = Problem {
                series: series.clone(),
                terms,
                key_mask: Some(&mask),
                near: Near::Blocks(blocks),
                block,
                sinks,
                decay: decay.clone(),
                ..data.problem()
            };
            let coefficients = series.coefficients(terms).unwrap();
            let mut y = vec![];
            let mut denominators = vec![];
            for head in 0..SHAPE.query_heads {
                for t in 0..SHAPE.queries {
                    let (mut numerator, mut denominator) = (vec![0.0; SHAPE.d_value], 0.0);
                    for s in (0..=t).filter(|&s| mask[s]) {
                        let x = problem.logit(head, t, s);
                        let near = s < sinks || t / block - s / block <= blocks;
                        let kappa = if near {
                            x.exp()
                        } else {
                            (0..coefficients.len())
                                .map(|p| coefficients[p] * x.powi(p as i32))
                                .sum()
                        };
                        let g = match &decay {
                            Decay::None => 0.0,
                            Decay::Slopes(m) => -m[head / 2] * t as f64 + m[head / 2] * s as f64,
                            Decay::LogGates(f) => {
                                f[head / 2 * SHAPE.keys..][s + 1..t + 1].iter().sum()
                            }
                        };
                        denominator += g.exp() * kappa;
                        for (n, v) in numerator.iter_mut().zip(problem.value(head / 2, s)) {
                            *n += g.exp() * kappa * v;
                        }
                    }
                    y.extend(numerator.iter().map(|n| n / denominator));
                    denominators.push(denominator);
                }
            }
            let output = attention(&problem);
            assert_close(&format!("{series:?}, y"), &output.y, &y, 1e-12);
            assert_close(
                &format!("{series:?}, denominators"),
                &output.denominators,
                &denominators,
                1e-12,
            );
        }
    }
}

#[test]
fn near_covering_everything_is_softmax() {
    let mut rng = fresh_rng();
    let data = Data::new(&mut rng, SHAPE);
    for decay in random_decays(&mut rng, SHAPE) {
        for (series, terms) in all_series() {
            let base = Problem { decay: decay.clone(), series, terms, ..data.problem() };
            let exact = softmax_attention(&base);
            for (near, block, sinks) in [
                (Near::Blocks(0), 17, 0),
                (Near::Blocks(8), 2, 0),
                (Near::Blocks(16), 1, 0),
                (Near::None, 64, 17),
            ] {
                let output = attention(&Problem { near, block, sinks, ..base.clone() });
                assert_close("y", &output.y, &exact.y, 1e-14);
                assert_close("denominators", &output.denominators, &exact.denominators, 1e-13);
                assert!(output.far.iter().all(|far| far.is_none()));
            }
            let full = Problem { causal: false, sinks: 17, ..base.clone() };
            assert_close("full", &attention(&full).y, &softmax_attention(&full).y, 1e-14);
        }
    }
}

#[test]
fn slopes_are_alibi() {
    // Explicitly: softmax over s ≤ t of x − m (t − s).
    let mut rng = fresh_rng();
    let data = Data::new(&mut rng, SHAPE);
    let slopes = vec![0.5, 0.0625];
    let problem = Problem {
        decay: Decay::Slopes(slopes.clone()),
        near: Near::Blocks(0),
        block: 32,
        ..data.problem()
    };
    let mut y = vec![];
    for head in 0..SHAPE.query_heads {
        for t in 0..SHAPE.queries {
            let weight =
                |s: usize| (problem.logit(head, t, s) - slopes[head / 2] * (t - s) as f64).exp();
            let total: f64 = (0..=t).map(weight).sum();
            for e in 0..SHAPE.d_value {
                let sum: f64 = (0..=t).map(|s| weight(s) * problem.value(head / 2, s)[e]).sum();
                y.push(sum / total);
            }
        }
    }
    assert_close("operation", &attention(&problem).y, &y, 1e-14);
    assert_close("softmax", &softmax_attention(&problem).y, &y, 1e-14);
}

#[test]
fn equal_gates_are_slopes() {
    let data = Data::new(&mut fresh_rng(), SHAPE);
    for (series, terms) in all_series() {
        let base = Problem { series, terms, near: Near::Blocks(1), block: 3, ..data.problem() };
        let slopes = Problem { decay: Decay::Slopes(vec![0.25, 0.5]), ..base.clone() };
        let gates = [vec![-0.25; SHAPE.keys], vec![-0.5; SHAPE.keys]].concat();
        let gates = Problem { decay: Decay::LogGates(gates), ..base };
        assert_close("y", &attention(&slopes).y, &attention(&gates).y, 1e-13);
    }
}

#[test]
fn many_taylor_terms_are_softmax() {
    let mut rng = fresh_rng();
    let data = Data::new(&mut rng, SHAPE);
    for decay in random_decays(&mut rng, SHAPE) {
        for causal in [true, false] {
            // At this scale |x| stays well under 10, where the 40-term remainder is below rounding.
            let problem =
                Problem { terms: 40, causal, scale: 0.3, decay: decay.clone(), ..data.problem() };
            assert_close("y", &attention(&problem).y, &softmax_attention(&problem).y, 1e-11);
        }
    }
}

#[test]
fn a_mask_removes_keys() {
    let mut rng = fresh_rng();
    let data = Data::new(&mut rng, SHAPE);
    let mask: Vec<bool> = (0..SHAPE.keys).map(|s| s % 3 != 1).collect();
    let kept: Vec<usize> = (0..SHAPE.keys).filter(|&s| mask[s]).collect();
    let select = |rows: &[f64], width: usize| -> Vec<f64> {
        let mut selected = vec![];
        for head in 0..SHAPE.kv_heads {
            for s in &kept {
                selected.extend_from_slice(&rows[(head * SHAPE.keys + s) * width..][..width]);
            }
        }
        selected
    };
    let (k, v) = (select(&data.k, SHAPE.d_key), select(&data.v, SHAPE.d_value));
    let fewer = Shape { keys: kept.len(), ..SHAPE };
    for (series, terms) in all_series() {
        let masked =
            Problem { series, terms, causal: false, key_mask: Some(&mask), ..data.problem() };
        let removed = Problem { shape: fewer, k: &k, v: &v, key_mask: None, ..masked.clone() };
        assert_close("y", &attention(&masked).y, &attention(&removed).y, 1e-12);
        assert_close(
            "softmax",
            &softmax_attention(&masked).y,
            &softmax_attention(&removed).y,
            1e-14,
        );
    }
}

#[test]
fn a_query_that_sees_nothing_gives_nan() {
    let data = Data::new(&mut fresh_rng(), SHAPE);
    let mask = [false; SHAPE.keys];
    let output = attention(&Problem { key_mask: Some(&mask), ..data.problem() });
    assert!(output.y.iter().all(|y| y.is_nan()));
    assert!(output.denominators.iter().all(|d| *d == 0.0));
}

#[test]
fn grouped_queries_equal_repeated_heads() {
    let mut rng = fresh_rng();
    let data = Data::new(&mut rng, SHAPE);
    let repeat = |heads: &[f64]| -> Vec<f64> {
        heads.chunks(heads.len() / 2).flat_map(|head| [head, head].concat()).collect()
    };
    let (k, v) = (repeat(&data.k), repeat(&data.v));
    let repeated = Shape { kv_heads: 4, ..SHAPE };
    for decay in random_decays(&mut rng, SHAPE) {
        for (series, terms) in all_series() {
            let grouped = Problem {
                series,
                terms,
                near: Near::Blocks(0),
                block: 4,
                decay: decay.clone(),
                ..data.problem()
            };
            let decay = match &decay {
                Decay::None => Decay::None,
                Decay::Slopes(m) => Decay::Slopes(repeat(m)),
                Decay::LogGates(f) => Decay::LogGates(repeat(f)),
            };
            let separate = Problem { shape: repeated, k: &k, v: &v, decay, ..grouped.clone() };
            assert_eq!(attention(&grouped), attention(&separate));
            assert_eq!(softmax_attention(&grouped), softmax_attention(&separate));
        }
    }
}

#[test]
fn an_offset_gives_the_later_queries() {
    let mut rng = fresh_rng();
    let shape = Shape { query_heads: 1, kv_heads: 1, ..SHAPE };
    let data = Data::new(&mut rng, shape);
    for decay in random_decays(&mut rng, shape) {
        for (series, terms) in all_series() {
            let all = Problem {
                series,
                terms,
                near: Near::Blocks(1),
                block: 4,
                sinks: 1,
                decay: decay.clone(),
                ..data.problem()
            };
            let later = Problem {
                shape: Shape { queries: 4, ..shape },
                q: &data.q[9 * shape.d_key..13 * shape.d_key],
                offset: 9,
                ..all.clone()
            };
            assert_eq!(
                attention(&later).y,
                attention(&all).y[9 * shape.d_value..13 * shape.d_value]
            );
        }
    }
}

#[test]
fn the_last_causal_query_sees_what_a_full_one_sees() {
    let mut rng = fresh_rng();
    let shape = Shape { query_heads: 1, kv_heads: 1, ..SHAPE };
    let data = Data::new(&mut rng, shape);
    for decay in random_decays(&mut rng, shape) {
        for (series, terms) in all_series() {
            let causal =
                Problem { series, terms, sinks: 2, decay: decay.clone(), ..data.problem() };
            let (causal, full) =
                (attention(&causal), attention(&Problem { causal: false, ..causal.clone() }));
            assert_eq!(causal.denominators[16], full.denominators[16]);
            assert_eq!(causal.y[16 * shape.d_value..], full.y[16 * shape.d_value..]);
        }
    }
}

#[test]
fn a_permutation_of_a_full_context_changes_nothing() {
    let data = Data::new(&mut fresh_rng(), Shape { query_heads: 1, kv_heads: 1, ..SHAPE });
    let reversed = |rows: &[f64], width: usize| -> Vec<f64> {
        rows.chunks(width).rev().flatten().copied().collect()
    };
    let (k, v) = (reversed(&data.k, SHAPE.d_key), reversed(&data.v, SHAPE.d_value));
    for (series, terms) in all_series() {
        let forward = Problem { series, terms, causal: false, ..data.problem() };
        let backward = Problem { k: &k, v: &v, ..forward.clone() };
        assert_close("y", &attention(&forward).y, &attention(&backward).y, 1e-11);
    }
}

#[test]
fn a_constant_added_to_all_logits_changes_nothing_where_the_kernel_follows_them() {
    // Every key has 1 as its last element, so the last element of q moves all its logits together.
    let mut rng = fresh_rng();
    let shape = Shape { query_heads: 1, kv_heads: 1, ..SHAPE };
    let mut data = Data::new(&mut rng, shape);
    for s in 0..shape.keys {
        data.k[s * shape.d_key + shape.d_key - 1] = 1.0;
    }
    let mut moved = data.q.clone();
    for t in 0..shape.queries {
        moved[t * shape.d_key + shape.d_key - 1] += 5000.0;
    }
    for (series, terms) in
        [(Series::Gauss, 4), (Series::Gauss, 6), (Series::hermite(), 3), (Series::hermite(), 5)]
    {
        let still = Problem {
            series,
            terms,
            near: Near::Blocks(0),
            block: 4,
            // The logits spread little, so that no denominator of the Hermite series comes near zero.
            scale: 0.2,
            ..data.problem()
        };
        let output = attention(&Problem { q: &moved, ..still.clone() });
        assert_close("y", &output.y, &attention(&still).y, 1e-9);
        assert!(output.denominators.iter().all(|d| *d == f64::INFINITY), "e^900 and more");
        assert!(output.scaled_denominators.iter().all(|d| d.is_finite()));
    }
}

#[test]
fn large_logits_and_long_decays_stay_in_range() {
    let mut rng = fresh_rng();
    let data = Data::new(&mut rng, SHAPE);
    let mut gates = log_gates(&mut rng, SHAPE.kv_heads * SHAPE.keys);
    gates[8] = -5000.0;
    for decay in [Decay::Slopes(vec![300.0, 900.0]), Decay::LogGates(gates)] {
        for (series, terms) in all_series() {
            let problem = Problem {
                scale: 50.0,
                series: series.clone(),
                terms,
                near: Near::Blocks(0),
                block: 4,
                sinks: 1,
                decay: decay.clone(),
                ..data.problem()
            };
            let output = attention(&problem);
            assert!(output.y.iter().all(|y| y.is_finite()), "{series:?}");
            assert!(softmax_attention(&problem).y.iter().all(|y| y.is_finite()));
        }
    }
}

#[test]
fn the_defaults_are_the_papers() {
    let q = normals(&mut fresh_rng(), 16);
    let shape = Shape { query_heads: 1, kv_heads: 1, queries: 1, keys: 1, d_key: 16, d_value: 16 };
    let problem = Problem::new(shape, &q, &q, &q);
    assert_eq!((problem.scale, problem.terms, problem.series), (0.25, 4, Series::Taylor));
}

fn tiny_data() -> Data {
    Data::new(
        &mut fresh_rng(),
        Shape { query_heads: 2, kv_heads: 1, queries: 3, keys: 3, d_key: 2, d_value: 2 },
    )
}

#[test]
#[should_panic(expected = "only causal queries have a block")]
fn full_attention_refuses_near_blocks() {
    attention(&Problem { causal: false, near: Near::Blocks(1), ..tiny_data().problem() });
}

#[test]
#[should_panic(expected = "k has 6 elements, its sizes say 8")]
fn wrong_lengths_are_named() {
    let data = tiny_data();
    attention(&Problem { shape: Shape { keys: 4, ..data.shape }, ..data.problem() });
}

#[test]
#[should_panic(expected = "q is NaN at element 1")]
fn nan_is_refused() {
    let mut data = tiny_data();
    data.q[1] = f64::NAN;
    attention(&data.problem());
}

#[test]
#[should_panic(expected = "Gauss needs an even number")]
fn gauss_refuses_odd_terms() {
    attention(&Problem { series: Series::Gauss, terms: 3, ..tiny_data().problem() });
}

#[test]
#[should_panic(expected = "offset 1 + queries 3 exceeds keys 3")]
fn queries_past_the_keys_are_refused() {
    attention(&Problem { offset: 1, ..tiny_data().problem() });
}
