//! The minimal basis and the recurrences over it.

mod common;

use common::{Data, assert_close, fixed_series, fresh_rng, normals, random_decays};
use sata_oracle::features::{
    feature_count, features, inner_product, monomials, multiplicities, multiplicity,
};
use sata_oracle::{Problem, Shape, attention, linear_attention};

#[test]
fn the_papers_example_of_order_two() {
    assert_eq!(monomials(2, 2), [vec![0, 0], vec![0, 1], vec![1, 1]]);
    assert_eq!(multiplicities(&monomials(2, 2)), [1, 2, 1]);
    assert_eq!(features(&[3.0, 5.0], &monomials(2, 2)), [9.0, 15.0, 25.0]);
}

#[test]
fn order_zero_is_one() {
    assert_eq!(monomials(7, 0), [vec![]; 1]);
    assert_eq!(multiplicity(&[]), 1);
    assert_eq!(features(&[2.0; 7], &monomials(7, 0)), [1.0]);
}

#[test]
fn monomials_are_all_nondecreasing_rows_once() {
    for d in 1..=5 {
        for p in 0..=5 {
            let rows = monomials(d, p);
            assert_eq!(rows.len() as u128, feature_count(d, p), "d {d}, p {p}");
            assert!(rows.iter().all(|row| row.len() == p && row.is_sorted()));
            assert!(rows.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }
    let total: u128 = (0..4).map(|p| feature_count(64, p)).sum();
    assert_eq!(total, 47_905);
}

#[test]
fn multiplicities_count_the_full_tensor() {
    for d in 1..=4_usize {
        for p in 0..=5_usize {
            let rows = monomials(d, p);
            let mut counted = vec![0u128; rows.len()];
            for number in 0..d.pow(p as u32) {
                let mut row: Vec<usize> = (0..p).map(|i| number / d.pow(i as u32) % d).collect();
                row.sort();
                counted[rows.iter().position(|r| *r == row).unwrap()] += 1;
            }
            assert_eq!(multiplicities(&rows), counted, "d {d}, p {p}");
        }
    }
    assert_eq!(multiplicity(&[5; 40]), 1);
    assert_eq!(multiplicity(&(0..30).collect::<Vec<_>>()), (1..=30_u128).product());
}

#[test]
fn weighted_inner_product_is_the_power_of_the_dot_product() {
    let mut rng = fresh_rng();
    for d in 1..=6 {
        for p in 0..=6 {
            let q = normals(&mut rng, d);
            let k = normals(&mut rng, d);
            let rows = monomials(d, p);
            let got =
                inner_product(&features(&q, &rows), &features(&k, &rows), &multiplicities(&rows));
            let dot: f64 = q.iter().zip(&k).map(|(q, k)| q * k).sum();
            // Rounding is relative to the sum of magnitudes.
            let magnitude: f64 = q.iter().zip(&k).map(|(q, k)| (q * k).abs()).sum();
            let error = (got - dot.powi(p as i32)).abs();
            assert!(error <= 1e-14 * magnitude.powi(p as i32), "d {d}, p {p}: {error:e}");
        }
    }
}

#[test]
fn recurrences_equal_the_direct_form() {
    let mut rng = fresh_rng();
    let shape = Shape { query_heads: 4, kv_heads: 2, queries: 11, keys: 13, d_key: 3, d_value: 5 };
    let data = Data::new(&mut rng, shape);
    let mask: Vec<bool> = (0..shape.keys).map(|s| s != 1 && s != 7).collect();
    for decay in random_decays(&mut rng, shape) {
        for (series, terms) in fixed_series() {
            for key_mask in [None, Some(&mask[..])] {
                let problem = Problem {
                    series: series.clone(),
                    terms,
                    decay: decay.clone(),
                    key_mask,
                    offset: 2,
                    ..data.problem()
                };
                let linear = linear_attention(&problem);
                let direct = attention(&problem);
                let name = format!("{series:?} {decay:?}");
                // Both forms round in proportion to 1/(the least denominator); see the cases' choice.
                assert_close(&name, &linear.denominators, &direct.denominators, 1e-12);
                assert_close(&name, &linear.y, &direct.y, 1e-12);
            }
        }
    }
}

#[test]
#[should_panic(expected = "no near part")]
fn recurrences_refuse_sinks() {
    let data = Data::new(
        &mut fresh_rng(),
        Shape { query_heads: 1, kv_heads: 1, queries: 2, keys: 2, d_key: 1, d_value: 1 },
    );
    linear_attention(&Problem { sinks: 1, ..data.problem() });
}
