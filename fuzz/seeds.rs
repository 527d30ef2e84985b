//! Writes a state file of every kind to `fuzz/corpus/state`, for the fuzzer to start from.

mod plans;

use std::path::Path;

use sata::{Call, Decay, Plan, Real, State, View, ViewMut};

fn write<T: Real>(plan: &Plan, folder: &Path, name: &str) {
    let spec = plan.spec();
    for (sequences, heads, tokens) in [(1, 1, 0), (1, 1, 5), (2, 3, 9)] {
        let mut state = State::<T>::new(plan, sequences, heads).unwrap();
        let numbers = |d: usize| -> Vec<T> {
            (0..sequences * heads * tokens * d).map(|i| T::from_f64((i as f64).sin())).collect()
        };
        let (x, v) = (numbers(spec.d_key()), numbers(spec.d_value()));
        let mut y = v.clone();
        let shape = |d| [sequences, heads, tokens, d];
        let key = View::new(&x, shape(spec.d_key())).unwrap();
        let value = View::new(&v, shape(spec.d_value())).unwrap();
        let out = ViewMut::new(&mut y, shape(spec.d_value())).unwrap();
        let gates = vec![-0.1; sequences * heads * tokens];
        let mut call = Call::causal(key, key, value).state(&mut state);
        if spec.decay() == Decay::Gates {
            call = call.log_gates(View::new(&gates, shape(1)).unwrap());
        }
        plan.run(call, out).unwrap();
        state.save(folder.join(format!("{name}-{}-{sequences}-{tokens}", T::NAME))).unwrap();
    }
}

fn main() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/state");
    std::fs::create_dir_all(&folder).unwrap();
    for (i, plan) in plans::plans().iter().enumerate() {
        write::<f32>(plan, &folder, &i.to_string());
        write::<f64>(plan, &folder, &i.to_string());
    }
    println!("{}", folder.display());
}
