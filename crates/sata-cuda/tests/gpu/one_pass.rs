//! Calls that are computed in one pass over a sequence, against the oracle.

use half::bf16;
use sata::{Near, Spec, SpecBuilder};
use sata_cuda::{Device, Plan, State};

use super::{ALLOWED, OnDevice, blank, error, feed, run};
use crate::common::truth::truth;
use crate::common::{Fade, Inputs, Sizes, rng};

/// Two key/value heads, as many queries as keys.
pub fn sizes(tokens: usize, d: usize) -> Sizes {
    Sizes { kv_heads: 2, ..Sizes::self_attention(tokens, d, d) }
}

/// Against the oracle, in segments of so many tokens; two runs are alike.
pub fn check(
    device: &Device,
    spec: SpecBuilder,
    inputs: &Inputs<bf16>,
    fade: &Fade,
    segment: usize,
) {
    computed(device, spec, inputs, fade, segment);
}

/// The same, and that other kernels would round otherwise.
pub fn check_own(
    device: &Device,
    spec: SpecBuilder,
    inputs: &Inputs<bf16>,
    fade: &Fade,
    segment: usize,
) {
    let (plan, y, what) = computed(device, spec, inputs, fade, segment);
    let near = match plan.spec().near() {
        Near::None => 0,
        Near::Blocks(n) => (n + 1) * plan.spec().block(),
    };
    // Other kernels serve calls that continue a state. There must be enough to round, and something far.
    let s = inputs.sizes;
    if s.queries > near.max(256) {
        let mut other = blank::<bf16>(device, s);
        let mut state = State::new(&plan, s.batch, s.kv_heads).unwrap();
        let there = OnDevice::new(device, inputs, fade);
        feed(&plan, &mut state, &there, 0..s.queries, &mut other);
        let other = other.to_vec().unwrap();
        assert!(bits(&y) != bits(&other), "not computed in one pass: {what}");
    }
}

/// Lengths around pieces of 64, chunks of 128 and segments, near blocks of each kind.
pub fn check_lengths(device: &Device, d: usize, terms: usize) {
    let mut rng = rng();
    for tokens in [1, 15, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 257, 385] {
        for near in [Near::None, Near::Blocks(0), Near::Blocks(1)] {
            let inputs = Inputs::<bf16>::new(&mut rng, Sizes { kv_heads: 1, ..sizes(tokens, d) });
            let spec = Spec::new(d, d).terms(terms).near(near).block(64);
            check_own(device, spec, &inputs, &Fade::None, 128);
        }
    }
}

fn bits(y: &[bf16]) -> Vec<u16> {
    y.iter().map(|y| y.to_bits()).collect()
}

fn computed(
    device: &Device,
    spec: SpecBuilder,
    inputs: &Inputs<bf16>,
    fade: &Fade,
    segment: usize,
) -> (Plan, Vec<bf16>, String) {
    let spec = spec.decay(fade.decay()).build().unwrap();
    let truth = truth(&spec, inputs, fade, true);
    let plan = Plan::new(device, &spec).unwrap().with_chunk(segment);
    let (y, _) = run(&plan, inputs, fade, true);
    let error = error(&y, &truth);
    let what = format!("{spec:?} {:?} segments of {segment}", inputs.sizes);
    eprintln!("{error:.2e} {what}");
    assert!(error < ALLOWED, "{error:e}: {what}");
    let (again, _) = run(&plan, inputs, fade, true);
    assert!(bits(&y) == bits(&again), "two runs differ: {what}");
    (plan, y, what)
}
