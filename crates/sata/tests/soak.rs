//! A hundred million tokens, one by one: no drift, no growth. Minutes long, so behind `--ignored`:
//! `cargo test --release -p sata --test soak -- --ignored --nocapture`.

mod common;

use std::time::Instant;

use rand::Rng;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand_distr::StandardNormal;
use sata::{Plan, Spec, State, View, ViewMut};

/// Resident bytes of this process, where the system says.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

#[test]
#[ignore = "takes minutes"]
fn a_hundred_million_tokens_without_drift_or_growth() {
    let tokens: u64 =
        std::env::var("SATA_SOAK_TOKENS").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000_000);
    let d = 4;
    let plan = Plan::new(&Spec::new(d, d).terms(4).build().unwrap()).unwrap();
    let mut single = State::<f32>::new(&plan, 1, 1).unwrap();
    let mut double = State::<f64>::new(&plan, 1, 1).unwrap();
    let mut seed = common::rng();
    let mut rng = SmallRng::seed_from_u64(seed.random());
    let shape = [1, 1, 1, d];
    let (mut worst, mut before) = (0f64, None);
    let start = Instant::now();
    // Queries are drawn once: the drift of the answers to the same questions is what counts.
    let queries: Vec<Vec<f32>> = (0..16)
        .map(|_| (0..d).map(|_| rng.sample::<f32, _>(StandardNormal) * 0.5).collect())
        .collect();
    for t in 1..=tokens {
        let q = &queries[(t % 16) as usize];
        let k: [f32; 4] = std::array::from_fn(|_| rng.sample(StandardNormal));
        // Values with a mean: the case in which plain f32 sums lose their digits.
        let v: [f32; 4] = std::array::from_fn(|_| 1.0 + rng.sample::<f32, _>(StandardNormal));
        let mut y = [0f32; 4];
        plan.step(
            &mut single,
            View::new(q, shape).unwrap(),
            View::new(&k, shape).unwrap(),
            View::new(&v, shape).unwrap(),
            ViewMut::new(&mut y, shape).unwrap(),
        )
        .unwrap();
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let mut want = [0f64; 4];
        plan.step(
            &mut double,
            View::new(&wide(q), shape).unwrap(),
            View::new(&wide(&k), shape).unwrap(),
            View::new(&wide(&v), shape).unwrap(),
            ViewMut::new(&mut want, shape).unwrap(),
        )
        .unwrap();
        // Over the last stretch, when drift has had all the time there is.
        if t + 4096 > tokens {
            let norm = want.iter().map(|x| x * x).sum::<f64>().sqrt();
            let error = y.iter().zip(&want).map(|(&y, w)| (f64::from(y) - w).powi(2)).sum::<f64>();
            worst = worst.max(error.sqrt() / norm);
        }
        if t == 100_000 {
            before = resident();
        }
        if t % 10_000_000 == 0 {
            println!("{t} tokens, {:.0} s", start.elapsed().as_secs_f64());
        }
    }
    let growth = resident().zip(before).map(|(now, before)| now as i64 - before as i64);
    println!(
        "{tokens} tokens: worst relative drift {worst:e} over the last 4096; resident grew by \
         {growth:?} bytes; {:.0} s",
        start.elapsed().as_secs_f64()
    );
    assert!(worst < 1e-6, "relative drift {worst:e}");
    assert!(growth.is_none_or(|bytes| bytes < 1 << 20), "resident memory grew by {growth:?}");
}
