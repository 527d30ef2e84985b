//! Any bytes as a state file: never a panic, never a wild allocation.
#![no_main]

#[path = "../../crates/sata/tests/common/forged.rs"]
mod forged;
#[path = "../plans.rs"]
mod plans;

use std::sync::LazyLock;

use forged::Forged;
use libfuzzer_sys::fuzz_target;
use sata::{Call, Decay, Error, Plan, Real, State, View, ViewMut};

static PLANS: LazyLock<Vec<Plan>> = LazyLock::new(plans::plans);

fn load<T: Real>(plan: &Plan, bytes: &[u8]) {
    let mut state = match State::<T>::from_bytes(plan, bytes, "a file") {
        Ok(state) => state,
        Err(Error::File { .. } | Error::State { .. } | Error::TooLarge { .. }) => return,
        Err(other) => panic!("{other:?}"),
    };
    let saved = state.to_bytes();
    let again = State::<T>::from_bytes(plan, &saved, "a file").unwrap();
    assert!(again.to_bytes() == saved);
    let (sequences, heads) = (state.sequences(), state.kv_heads());
    let (d_key, d_value) = (plan.spec().d_key(), plan.spec().d_value());
    let x = vec![T::ONE; sequences * heads * d_key.max(d_value)];
    let mut y = x.clone();
    let gates = vec![-0.5; sequences * heads];
    for _ in 0..=plan.spec().block() {
        if (0..sequences).any(|i| state.position(i) == i64::MAX as u64) {
            // It can count no further, which a call is refused for.
            break;
        }
        let key = View::new(&x, [sequences, heads, 1, d_key]).unwrap();
        let shape = [sequences, heads, 1, d_value];
        let out = ViewMut::new(&mut y, shape).unwrap();
        let value = View::new(&x, shape).unwrap();
        let mut call = Call::causal(key, key, value).state(&mut state);
        if plan.spec().decay() == Decay::Gates {
            call = call.log_gates(View::new(&gates, [sequences, heads, 1, 1]).unwrap());
        }
        plan.run(call, out).unwrap();
    }
    let _ = state.merge(&again);
}

fuzz_target!(|bytes: &[u8]| {
    for plan in PLANS.iter() {
        load::<f32>(plan, bytes);
        load::<f64>(plan, bytes);
    }
    // What the digest would stop otherwise.
    if let Some(mut file) = Forged::read(bytes) {
        file.sign();
        let signed = file.bytes();
        for plan in PLANS.iter() {
            load::<f32>(plan, &signed);
            load::<f64>(plan, &signed);
        }
    }
});
