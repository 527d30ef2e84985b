//! States: saved, loaded, merged, forked, and refused.

mod common;
#[path = "common/forged.rs"]
mod forged;

use std::ops::Range;
use std::path::Path;

use common::{Inputs, Sizes, assert_close, rng, tolerance};
use forged::Forged;
use sata::{Call, Element, Error, Form, Plan, Real, Series, Spec, State, View, ViewMut};

fn plan(d_key: usize, d_value: usize, series: Series, block: usize) -> Plan {
    Plan::new(&Spec::new(d_key, d_value).series(series).block(block).build().unwrap()).unwrap()
}

fn taylor(d_key: usize, d_value: usize, terms: usize, block: usize) -> Plan {
    Plan::new(&Spec::new(d_key, d_value).terms(terms).block(block).build().unwrap()).unwrap()
}

/// Tokens `range` of `x`.
fn part<E: Element>(x: &[E], shape: [usize; 4], range: &Range<usize>) -> View<'static, E> {
    // The views of a test may live as long as it.
    let [batch, heads, tokens, d] = shape;
    let mut out = vec![];
    for row in 0..batch * heads {
        out.extend_from_slice(&x[(row * tokens + range.start) * d..(row * tokens + range.end) * d]);
    }
    View::new(Vec::leak(out), [batch, heads, range.len(), d]).unwrap()
}

/// Tokens `range` through `state`; outputs `[batch, query_heads, range, d_value]`.
fn extend<T: Real>(
    plan: &Plan,
    state: &mut State<T>,
    inputs: &Inputs<T>,
    range: Range<usize>,
) -> Vec<T> {
    let s = inputs.sizes;
    let shape = [s.batch, s.kv_heads * s.group, range.len(), s.d_value];
    let mut y = vec![T::from_f64(f64::NAN); shape.iter().product()];
    let q = part(&inputs.q, s.q(), &range);
    let k = part(&inputs.k, s.k(), &range);
    let v = part(&inputs.v, s.v(), &range);
    plan.extend(state, q, k, v, ViewMut::new(&mut y, shape).unwrap()).unwrap();
    y
}

fn bits<T: Real>(x: &[T]) -> Vec<u64> {
    x.iter().map(|x| x.bits()).collect()
}

fn load<T: Real>(plan: &Plan, bytes: &[u8]) -> Result<State<T>, Error> {
    State::from_bytes(plan, bytes, "there.safetensors")
}

/// That a state is the same after a detour through a file, now and when it goes on.
fn check_round_trip<T: Real>(plan: &Plan, sizes: Sizes, before: usize, after: usize) {
    let mut rng = rng();
    let sizes = Sizes { queries: before + after, keys: before + after, ..sizes };
    let inputs = Inputs::<T>::new(&mut rng, sizes);
    let mut state = State::new(plan, sizes.batch, sizes.kv_heads).unwrap();
    extend(plan, &mut state, &inputs, 0..before);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("past.safetensors");
    state.save(&path).unwrap();
    let file = std::fs::read(&path).unwrap();
    assert_eq!(file, state.to_bytes());
    let mut loaded = State::<T>::load(plan, &path).unwrap();
    assert_eq!(loaded.to_bytes(), file, "saved, loaded and saved again");
    assert_eq!(loaded.spec(), state.spec());
    assert_eq!(loaded.bytes(), state.bytes());
    for sequence in 0..sizes.batch {
        assert_eq!(loaded.position(sequence), before as u64);
    }
    // In two parts, a step among them, so that open tokens are read in every way.
    for range in [before..before + 1, before + 1..before + after] {
        let went_on = extend(plan, &mut state, &inputs, range.clone());
        let came_back = extend(plan, &mut loaded, &inputs, range);
        assert_eq!(bits(&came_back), bits(&went_on), "{before} tokens, {}", T::NAME);
    }
    assert!(loaded.to_bytes() == state.to_bytes());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left aside");
}

#[test]
fn a_file_keeps_every_bit() {
    let sizes =
        Sizes { batch: 2, kv_heads: 2, group: 2, queries: 0, keys: 0, d_key: 5, d_value: 3 };
    for before in [0, 1, 2, 7, 8, 9, 15, 16, 17, 23] {
        check_round_trip::<f32>(&taylor(5, 3, 4, 8), sizes, before, 12);
        check_round_trip::<f64>(&taylor(5, 3, 4, 8), sizes, before, 12);
    }
    for block in [1, 2, 64, 70] {
        check_round_trip::<f32>(&taylor(5, 3, 3, block), sizes, 69, 12);
    }
    for series in [
        Series::power(2),
        Series::power(4),
        Series::Power { exponent: 2, floor: 0.0 },
        Series::Fixed { coefficients: vec![0.1, 0.0, 1.0 / 3.0] },
    ] {
        check_round_trip::<f32>(&plan(5, 3, series.clone(), 16), sizes, 21, 12);
        check_round_trip::<f64>(&plan(5, 3, series, 16), sizes, 21, 12);
    }
    let sizes = Sizes { d_key: 33, d_value: 70, ..sizes };
    check_round_trip::<f32>(&taylor(33, 70, 3, 64), sizes, 100, 80);
}

#[test]
fn numbers_that_are_not_finite_are_kept() {
    // Keys this large overflow the sums of order 3; the state says so, and its file does.
    let plan = taylor(1, 1, 4, 2);
    let mut state = State::<f32>::new(&plan, 1, 1).unwrap();
    let (q, k) = (vec![0.0f32; 4], vec![1e20f32, -1e20, 1e20, 1.0]);
    let shape = [1, 1, 4, 1];
    let view = |x| View::new(x, shape).unwrap();
    let mut y = vec![0.0; 4];
    let out = ViewMut::new(&mut y, shape).unwrap();
    plan.extend(&mut state, view(&q), view(&k), view(&k), out).unwrap();
    let file = state.to_bytes();
    let sums = &Forged::read(&file).unwrap().tensors["z"].data;
    assert!(sums.chunks(4).any(|x| !f32::from_le_bytes(x.try_into().unwrap()).is_finite()));
    assert!(load::<f32>(&plan, &file).unwrap().to_bytes() == file);
}

#[test]
fn packed_sequences_have_their_own_lengths() {
    let mut rng = rng();
    let plan = taylor(4, 5, 3, 8);
    let lengths = [[0, 7, 24, 1, 8], [9, 1, 3, 0, 8]];
    let mut state = State::<f64>::new(&plan, 5, 2).unwrap();
    let mut loaded = state.clone();
    for (round, lengths) in lengths.iter().enumerate() {
        let mut cu = vec![0];
        lengths.iter().for_each(|n| cu.push(cu[cu.len() - 1] + n));
        let total = cu[5];
        let sizes = Sizes { group: 2, kv_heads: 2, ..Sizes::self_attention(total, 4, 5) };
        let inputs = Inputs::<f64>::new(&mut rng, sizes);
        let run = |state: &mut State<f64>| {
            let mut y = vec![f64::NAN; total * 4 * 5];
            let call = Call::causal(inputs.q(), inputs.k(), inputs.v()).packed(&cu, &cu);
            plan.run(call.state(state), ViewMut::new(&mut y, sizes.y()).unwrap()).unwrap();
            y
        };
        assert_eq!(bits(&run(&mut state)), bits(&run(&mut loaded)));
        let file = state.to_bytes();
        loaded = load(&plan, &file).unwrap();
        assert!(loaded.to_bytes() == file);
        for i in 0..5 {
            let seen: u64 =
                (0..=round).map(|round| [[0, 7, 24, 1, 8], [9, 1, 3, 0, 8]][round][i]).sum();
            assert_eq!(loaded.position(i), seen);
        }
    }
}

#[test]
fn the_file_is_as_described() {
    let mut rng = rng();
    let (d_key, d_value, block, tokens) = (3, 2, 5, 13);
    let plan = plan(d_key, d_value, Series::Fixed { coefficients: vec![1.0, 0.0, 0.5] }, block);
    let sizes = Sizes { kv_heads: 2, ..Sizes::self_attention(tokens, d_key, d_value) };
    let inputs = Inputs::<f64>::new(&mut rng, sizes);
    let mut state = State::new(&plan, 1, 2).unwrap();
    extend(&plan, &mut state, &inputs, 0..tokens);
    let file = Forged::read(&state.to_bytes()).unwrap();
    assert_eq!(file.metadata["format"], "sata-state");
    assert_eq!(file.metadata["version"], "1");
    assert_eq!(file.metadata["orders"], "[0,2]");
    assert_eq!(file.metadata["basis"], "bare-lexicographic");
    assert_eq!(file.metadata["positions"], "[13]");
    assert_eq!(file.metadata["open"], "[3]");
    assert_eq!(file.metadata["digest"], file.digest());
    let spec: Spec = serde_json::from_str(&file.metadata["spec"]).unwrap();
    assert_eq!(&spec, plan.spec());
    assert_eq!(file.metadata.len(), 8);
    let names: Vec<&str> = file.tensors.keys().map(String::as_str).collect();
    assert_eq!(names, ["open_keys", "open_values", "open_weights", "sums", "z"]);
    // 1, then the products of two indices in lexicographic order.
    let monomials: Vec<Vec<usize>> =
        vec![vec![], vec![0, 0], vec![0, 1], vec![0, 2], vec![1, 1], vec![1, 2], vec![2, 2]];
    let numbers = |name: &str| -> Vec<f64> {
        let data = &file.tensors[name].data;
        data.chunks(8).map(|x| f64::from_le_bytes(x.try_into().unwrap())).collect()
    };
    assert_eq!(file.tensors["sums"].shape, [1, 2, 7, d_value]);
    assert_eq!(file.tensors["z"].shape, [1, 2, 7]);
    let (mut sums, mut z) = (vec![], vec![]);
    for head in 0..2 {
        let key = |t: usize| &inputs.k[(head * tokens + t) * d_key..][..d_key];
        for monomial in &monomials {
            let feature = |t: usize| monomial.iter().map(|&i| key(t)[i]).product::<f64>();
            z.push((0..10).map(feature).sum());
            for c in 0..d_value {
                let value = |t: usize| inputs.v[(head * tokens + t) * d_value + c];
                sums.push((0..10).map(|t| feature(t) * value(t)).sum());
            }
        }
    }
    assert_close("sums", &numbers("sums"), &sums, 1e-14);
    assert_close("z", &numbers("z"), &z, 1e-14);
    let open = |x: &[f64], d: usize| -> Vec<f64> {
        let rows = |head: usize| &x[(head * tokens + 10) * d..(head * tokens + 13) * d];
        (0..2).flat_map(|head| [rows(head), &vec![0.0; 2 * d]].concat()).collect()
    };
    assert_eq!(file.tensors["open_keys"].shape, [1, 2, block, d_key]);
    assert_eq!(numbers("open_keys"), open(&inputs.k, d_key));
    assert_eq!(file.tensors["open_values"].shape, [1, 2, block, d_value]);
    assert_eq!(numbers("open_values"), open(&inputs.v, d_value));
    assert_eq!(file.tensors["open_weights"].shape, [1, 2, block]);
    assert_eq!(numbers("open_weights"), [1.0, 1.0, 1.0, 0.0, 0.0].repeat(2));
    // What another program would write.
    assert!(file.bytes() != state.to_bytes());
    assert!(load::<f64>(&plan, &file.bytes()).unwrap().to_bytes() == state.to_bytes());
}

#[test]
fn masked_tokens_stay_masked() {
    let mut rng = rng();
    let plan = taylor(3, 2, 3, 64);
    let sizes = Sizes::self_attention(20, 3, 2);
    let inputs = Inputs::<f64>::new(&mut rng, sizes).masked(&mut rng);
    let mask = inputs.mask.as_ref().unwrap();
    let mut state = State::<f64>::new(&plan, 1, 1).unwrap();
    let mut y = vec![0.0; 40];
    let call = Call::causal(inputs.q(), inputs.k(), inputs.v()).key_mask(mask).state(&mut state);
    plan.run(call, ViewMut::new(&mut y, sizes.y()).unwrap()).unwrap();
    let weights = &Forged::read(&state.to_bytes()).unwrap().tensors["open_weights"].data;
    for (t, weight) in weights.chunks(8).enumerate() {
        let want = if t < 20 && mask[t] { 1.0 } else { 0.0 };
        assert_eq!(f64::from_le_bytes(weight.try_into().unwrap()), want);
    }
    assert!(load::<f64>(&plan, &state.to_bytes()).unwrap().to_bytes() == state.to_bytes());
}

#[test]
fn merging_is_one_run_over_all() {
    fn one<T: Real>(cuts: [usize; 2], block: usize) {
        let mut rng = rng();
        let plan = taylor(5, 6, 3, block);
        let tokens = 140;
        let sizes =
            Sizes { batch: 2, kv_heads: 2, group: 2, ..Sizes::self_attention(tokens, 5, 6) };
        let inputs = Inputs::<T>::new(&mut rng, sizes);
        let want = inputs.oracle(3, &Series::Taylor, true);
        let made = |range: Range<usize>| {
            let mut state = State::<T>::new(&plan, 2, 2).unwrap();
            extend(&plan, &mut state, &inputs, range);
            state
        };
        let merged = |mut a: State<T>, b: &State<T>| {
            let bytes = a.bytes();
            a.merge(b).unwrap();
            assert_eq!(a.bytes(), bytes);
            a
        };
        let [a, b, c] = [made(0..cuts[0]), made(cuts[0]..cuts[1]), made(cuts[1]..120)];
        let left = merged(merged(a.fork(), &b), &c);
        let right = merged(a.fork(), &merged(b.fork(), &c));
        let empty = State::<T>::new(&plan, 2, 2).unwrap();
        let around = merged(merged(empty.fork(), &left), &empty);
        // The last 20 tokens read the past from the merged state.
        for (what, state) in
            [("left", left), ("right", right), ("around", around), ("one", made(0..120))]
        {
            assert_eq!(state.position(0), 120, "{what}");
            assert_eq!(state.position(1), 120, "{what}");
            // A merged state can be saved wherever its open block begins.
            let mut state = load::<T>(&plan, &state.to_bytes()).unwrap();
            let y = extend(&plan, &mut state, &inputs, 120..tokens);
            let want: Vec<f64> =
                want.chunks(tokens * 6).flat_map(|head| head[120 * 6..].to_vec()).collect();
            assert_close(&format!("{what} {cuts:?} {}", T::NAME), &y, &want, tolerance::<T>());
        }
    }
    for cuts in [[50, 75], [64, 96], [0, 1], [17, 17], [119, 120], [120, 120]] {
        one::<f64>(cuts, 32);
        one::<f32>(cuts, 32);
    }
    one::<f64>([50, 75], 1);
}

#[test]
fn states_of_other_kinds_do_not_merge() {
    let mut state = State::<f64>::new(&taylor(3, 2, 3, 8), 2, 2).unwrap();
    let before = state.to_bytes();
    for (field, plan, counts) in [
        ("sequences", taylor(3, 2, 3, 8), [1, 2]),
        ("kv_heads", taylor(3, 2, 3, 8), [2, 1]),
        ("d_key", taylor(4, 2, 3, 8), [2, 2]),
        ("d_value", taylor(3, 1, 3, 8), [2, 2]),
        ("block", taylor(3, 2, 3, 9), [2, 2]),
        ("orders", taylor(3, 2, 2, 8), [2, 2]),
        ("orders", taylor(3, 2, 4, 8), [2, 2]),
    ] {
        let other = State::new(&plan, counts[0], counts[1]).unwrap();
        assert_field(state.merge(&other).unwrap_err(), field);
        assert!(state.to_bytes() == before);
    }
}

#[track_caller]
fn assert_field(error: Error, want: &str) {
    match &error {
        Error::State { field, .. } if *field == want => {}
        _ => panic!("wanted Error::State about {want}, got {error:?}"),
    }
}

#[test]
fn forks_are_independent_and_reset_forgets() {
    let mut rng = rng();
    let plan = taylor(4, 3, 4, 8);
    let inputs = Inputs::<f32>::new(&mut rng, Sizes::self_attention(60, 4, 3));
    let mut state = State::<f32>::new(&plan, 1, 1).unwrap();
    let (new, size) = (state.to_bytes(), state.bytes());
    extend(&plan, &mut state, &inputs, 0..30);
    let half = state.to_bytes();
    let mut fork = state.fork();
    let a = extend(&plan, &mut state, &inputs, 30..60);
    assert!(fork.to_bytes() == half);
    let b = extend(&plan, &mut fork, &inputs, 30..60);
    assert_eq!(bits(&a), bits(&b));
    state.reset();
    assert!(state.to_bytes() == new);
    assert_eq!(state.position(0), 0);
    let c = extend(&plan, &mut state, &inputs, 0..60);
    let mut fresh = State::new(&plan, 1, 1).unwrap();
    assert_eq!(bits(&c), bits(&extend(&plan, &mut fresh, &inputs, 0..60)));
    assert_eq!(fork.position(0), 60);
    assert_eq!(state.bytes(), size);
}

#[test]
fn nothing_grows() {
    let mut rng = rng();
    let plan = taylor(4, 3, 4, 8);
    let inputs = Inputs::<f32>::new(&mut rng, Sizes::self_attention(300, 4, 3));
    let mut state = State::<f32>::new(&plan, 1, 1).unwrap();
    let (size, mut file) = (state.bytes(), 0);
    let mut first = 0;
    for n in [1, 1, 6, 7, 100, 1, 64, 0, 120].into_iter().chain(std::iter::repeat_n(0, 3)) {
        extend(&plan, &mut state, &inputs, first..first + n);
        first += n;
        assert_eq!(state.bytes(), size);
        let len = state.to_bytes().len();
        if file != 0 {
            assert!(len.abs_diff(file) <= 8, "digits of the position, to a multiple of 8");
        }
        file = len;
    }
    assert_eq!(state.position(0), 300);
}

/// Plans that read a state of theirs or of more orders, in every way of reading.
#[test]
fn a_state_serves_every_series_whose_orders_it_holds() {
    fn one<T: Real>() {
        let mut rng = rng();
        let (before, after) = (75, 40);
        let tokens = before + after;
        let writer = taylor(6, 5, 5, 16);
        let sizes = Sizes { kv_heads: 2, group: 2, ..Sizes::self_attention(tokens, 6, 5) };
        let inputs = Inputs::<T>::new(&mut rng, sizes);
        let mut state = State::<T>::new(&writer, 1, 2).unwrap();
        extend(&writer, &mut state, &inputs, 0..before);
        let file = state.to_bytes();
        for (series, terms) in [
            (Series::Taylor, 5),
            (Series::Taylor, 3),
            (Series::Taylor, 1),
            (Series::power(2), 3),
            (Series::power(4), 5),
            (Series::Power { exponent: 4, floor: 0.0 }, 5),
            (Series::Fixed { coefficients: vec![1.0, 0.0, 0.5, 0.0, 0.25] }, 5),
        ] {
            let what = format!("{series:?} P = {terms} {}", T::NAME);
            let mut spec = Spec::new(6, 5).series(series.clone()).block(16);
            if series == Series::Taylor {
                spec = spec.terms(terms);
            }
            let reader = Plan::new(&spec.build().unwrap()).unwrap();
            let want = inputs.oracle(terms, &series, true);
            let tail: Vec<f64> =
                want.chunks(tokens * 5).flat_map(|head| head[before * 5..].to_vec()).collect();
            let mut loaded = load::<T>(&reader, &file).unwrap();
            assert!(loaded.to_bytes() == file, "{what}");
            let steps = loaded.fork();
            let y = extend(&reader, &mut loaded, &inputs, before..tokens);
            assert_close(&what, &y, &tail, tolerance::<T>());
            let mut loaded = steps;
            let mut y = vec![T::ZERO; tail.len()];
            for t in 0..after {
                let one = extend(&reader, &mut loaded, &inputs, before + t..before + t + 1);
                for (head, row) in one.chunks(5).enumerate() {
                    y[(head * after + t) * 5..][..5].copy_from_slice(row);
                }
            }
            assert_close(&format!("{what}, steps"), &y, &tail, tolerance::<T>());
            // It still holds all orders, and serves the plan that made it.
            let mut last = load::<T>(&writer, &loaded.to_bytes()).unwrap();
            let full = Sizes { queries: 30, keys: 0, ..sizes };
            let more = Inputs::<T>::new(&mut rng, full);
            let mut y = vec![T::ZERO; 4 * 30 * 5];
            let call = Call::full(more.q(), more.k(), more.v()).state(&mut last);
            writer.run(call, ViewMut::new(&mut y, full.y()).unwrap()).unwrap();
            let whole = Inputs {
                sizes: Sizes { queries: 30, ..sizes },
                q: more.q.clone(),
                k: inputs.k.clone(),
                v: inputs.v.clone(),
                mask: None,
            };
            let want = whole.oracle(5, &Series::Taylor, false);
            assert_close(&format!("{what}, and back"), &y, &want, tolerance::<T>());
        }
    }
    one::<f64>();
    one::<f32>();
}

#[test]
fn a_state_of_another_spec_is_refused_by_field() {
    let state = State::<f64>::new(&taylor(3, 2, 3, 8), 1, 1).unwrap();
    let file = state.to_bytes();
    for (field, plan) in [
        ("d_key", taylor(4, 2, 3, 8)),
        ("d_value", taylor(3, 1, 3, 8)),
        ("block", taylor(3, 2, 3, 9)),
        ("orders", taylor(3, 2, 4, 8)),
        ("orders", plan(3, 2, Series::power(4), 8)),
    ] {
        assert_field(load::<f64>(&plan, &file).unwrap_err(), field);
        let mut state = state.fork();
        let shape = |d| [1, 1, 1, d];
        let x = [1.0; 8];
        let mut y = [7.0; 8];
        let (d_key, d_value) = (plan.spec().d_key(), plan.spec().d_value());
        let error = plan
            .step(
                &mut state,
                View::new(&x, shape(d_key)).unwrap(),
                View::new(&x, shape(d_key)).unwrap(),
                View::new(&x, shape(d_value)).unwrap(),
                ViewMut::new(&mut y, shape(d_value)).unwrap(),
            )
            .unwrap_err();
        assert_field(error, field);
        assert!(state.to_bytes() == file && y == [7.0; 8]);
    }
    let error = load::<f32>(&taylor(3, 2, 3, 8), &file).unwrap_err();
    assert_eq!(error.to_string(), "the state has dtype = F64, but the call has F32");
    let file = State::<f32>::new(&taylor(3, 2, 3, 8), 1, 1).unwrap().to_bytes();
    assert_field(load::<f64>(&taylor(3, 2, 3, 8), &file).unwrap_err(), "dtype");
    // Neither the scale nor the coefficients are part of it.
    let other = Spec::new(3, 2).terms(2).scale(3.0).block(8).build().unwrap();
    load::<f32>(&Plan::new(&other).unwrap(), &file).unwrap();
}

/// A small state with something in every tensor.
fn small<T: Real>(plan: &Plan) -> State<T> {
    let mut rng = rng();
    let spec = plan.spec();
    let inputs = Inputs::<T>::new(&mut rng, Sizes::self_attention(5, spec.d_key(), spec.d_value()));
    let mut state = State::new(plan, 1, 1).unwrap();
    extend(plan, &mut state, &inputs, 0..5);
    state
}

#[track_caller]
fn assert_file<T: Real>(got: Result<State<T>, Error>, needle: &str) {
    match got.map(|_| ()) {
        Err(error @ Error::File { .. }) => {
            let text = error.to_string();
            assert!(text.contains(needle), "wanted '{needle}' in: {text}");
            assert!(text.starts_with("there.safetensors: "), "{text}");
        }
        other => panic!("wanted Error::File with '{needle}', got {other:?}"),
    }
}

#[test]
fn a_truncated_file_is_refused() {
    let plan = taylor(2, 1, 2, 4);
    let file = small::<f32>(&plan).to_bytes();
    for len in 0..file.len() {
        match load::<f32>(&plan, &file[..len]) {
            Err(Error::File { .. }) => {}
            other => panic!("{len} of {} bytes: {other:?}", file.len()),
        }
    }
    for more in [1, 8] {
        assert_file(
            load::<f32>(&plan, &[&file[..], &vec![0; more]].concat()),
            "truncated or altered",
        );
    }
}

#[test]
fn an_altered_file_is_refused() {
    fn one<T: Real>() {
        let plan = taylor(2, 1, 2, 4);
        let file = small::<T>(&plan).to_bytes();
        for at in 0..file.len() {
            for with in (0..8).map(|bit| 1 << bit).chain([0xff]) {
                let mut altered = file.clone();
                altered[at] ^= with;
                match load::<T>(&plan, &altered) {
                    Err(Error::File { .. }) => {}
                    other => panic!(
                        "byte {at} {:?} made {:?}: {other:?}",
                        file[at] as char, altered[at] as char
                    ),
                }
            }
        }
    }
    one::<f32>();
    one::<f64>();
    // The message of the usual case.
    let plan = taylor(2, 1, 2, 4);
    let mut file = small::<f32>(&plan).to_bytes();
    *file.last_mut().unwrap() ^= 1;
    assert_file(load::<f32>(&plan, &file), "altered or damaged: its digest is ");
    // A change that would make it another spec's is told from another spec's.
    let text = String::from_utf8_lossy(&file).into_owned();
    let at = text.find("d_value").unwrap() + 10;
    file[at] = b'2';
    assert_file(load::<f32>(&plan, &file), "altered or damaged");
}

#[test]
fn what_is_no_state_is_refused() {
    let plan = taylor(2, 1, 2, 4);
    assert_file(load::<f32>(&plan, b""), "0 bytes: not a safetensors file");
    assert_file(
        load::<f32>(&plan, b"some text that is not a tensor file"),
        "not a safetensors file",
    );
    assert_file(load::<f32>(&plan, &[255; 64]), "not a safetensors file");
    assert_file(load::<f32>(&plan, b"\x02\0\0\0\0\0\0\0{}"), "no state");
    assert_file(load::<f32>(&plan, b"\x08\0\0\0\0\0\0\0  {}    "), "no JSON object");
    let deep = [&100_000u64.to_le_bytes()[..], b"{\"a\":", &[b'['; 99_995]].concat();
    assert_file(load::<f32>(&plan, &deep), "altered");
    // A header cannot claim more than there is.
    let huge = [&(1u64 << 40).to_le_bytes()[..], &[b' '; 100]].concat();
    assert_file(load::<f32>(&plan, &huge), "claims 1099511627776 bytes");
    for path in ["/", "/dev/null", "/dev/zero"] {
        if Path::new(path).exists() {
            assert!(matches!(State::<f32>::load(&plan, path), Err(Error::File { .. })), "{path}");
        }
    }
    let nowhere = State::<f32>::load(&plan, "/no/such/folder/x").unwrap_err();
    assert!(matches!(nowhere, Error::Io { .. }));
    assert!(nowhere.to_string().contains("/no/such/folder/x"), "{nowhere}");
}

/// Files that lie, with a digest that is right.
#[test]
fn a_lie_is_refused_though_signed() {
    let plan = taylor(2, 1, 2, 4);
    let honest = Forged::read(&small::<f32>(&plan).to_bytes()).unwrap();
    load::<f32>(&plan, &honest.bytes()).unwrap();
    let lie = |change: &dyn Fn(&mut Forged), needle: &str| {
        let mut file = honest.clone();
        change(&mut file);
        file.sign();
        assert_file(load::<f32>(&plan, &file.bytes()), needle);
    };
    let set = |key: &'static str, value: &'static str| {
        move |file: &mut Forged| {
            file.metadata.insert(key.into(), value.into());
        }
    };
    lie(&set("format", "pt"), "no state");
    lie(&set("version", "2"), "version 2, made by a newer program; this one reads version 1");
    lie(&set("version", "18446744073709551615"), "newer");
    lie(&set("version", "0"), "version 0");
    for version in ["", "+1", "01", "1.0", "one", "99999999999999999999"] {
        lie(&set("version", version), "not a number");
    }
    lie(&set("basis", "scaled"), "'bare-lexicographic'");
    lie(&set("more", "x"), "unknown 'more'");
    lie(&set("a\u{1b}[31m", "x"), "\\u{1b}[31m");
    for key in ["format", "version", "spec", "orders", "basis", "positions", "open"] {
        lie(
            &|file| drop(file.metadata.remove(key)),
            if key == "format" { "no state" } else { key },
        );
    }
    for positions in ["", "[]", "5", "[5,5]", "[-5]", "[5.0]", "[9223372036854775808]", "[\"5\"]"] {
        lie(&set("positions", positions), "position");
    }
    lie(&set("positions", "[0]"), "position 0 and 1 open tokens");
    for open in ["[4]", "[18446744073709551615]", "[18446744073709551616]", "[1,0]", "[]"] {
        lie(&set("open", open), "open");
    }
    // Fewer open tokens than there are.
    lie(&set("open", "[0]"), "not 0 beyond the open tokens");
    for orders in ["[]", "[0]", "[1,0]", "[0,1,2]", "[0,18446744073709551615]"] {
        lie(&set("orders", orders), "orders");
    }
    let spec = |from: &'static str, to: &'static str| {
        move |file: &mut Forged| {
            let spec = file.metadata["spec"].replace(from, to);
            assert_ne!(spec, file.metadata["spec"]);
            file.metadata.insert("spec".into(), spec);
        }
    };
    lie(&spec("\"d_key\":2", "\"d_key\":0"), "d_key is 0");
    lie(&spec("\"d_key\":2", "\"d_key\":18446744073709551615"), "it must be 1 to");
    lie(&spec("\"d_value\":1", "\"d_value\":18446744073709551615"), "it must be 1 to");
    lie(&spec("\"block\":4", "\"block\":18446744073709551615"), "it must be 1 to");
    lie(&spec("\"terms\":2", "\"terms\":1000000000000000000"), "must be at most 65536");
    lie(&spec("{", "{\"x\":1,"), "spec");
    // Sizes out of all proportion to the file: x^1000000000 of one variable is one feature.
    let power = |exponent: &'static str| {
        move |file: &mut Forged| {
            let spec = plan_json(1, 1, exponent);
            file.metadata.insert("spec".into(), spec);
            file.metadata.insert("orders".into(), format!("[0,{exponent}]"));
            for (name, dims) in [
                ("open_keys", vec![4, 1]),
                ("sums", vec![2, 1]),
                ("sums_low", vec![2, 1]),
                ("z", vec![2]),
                ("z_low", vec![2]),
            ] {
                let tensor = file.tensors.get_mut(name).unwrap();
                tensor.shape = [vec![1, 1], dims].concat();
                tensor.data = vec![0; 4 * tensor.shape.iter().product::<usize>()];
            }
        }
    };
    let reader = plan_of(1, 1, 1, 4);
    for exponent in ["1000000000", "18446744073709551614"] {
        let mut file = honest.clone();
        power(exponent)(&mut file);
        file.sign();
        assert_file(load::<f32>(&reader, &file.bytes()), "from 2 to 65536");
    }
    let mut file = honest.clone();
    power("4")(&mut file);
    file.sign();
    load::<f32>(&reader, &file.bytes()).unwrap();
    // Tensors.
    for name in honest.tensors.keys() {
        lie(&|file| drop(file.tensors.remove(name)), &format!("lacks the tensor '{name}'"));
        lie(&|file| file.tensors.get_mut(name).unwrap().shape.push(1), name);
        let other = |file: &mut Forged| file.tensors.get_mut(name).unwrap().dtype = "I32".into();
        lie(&other, "I32");
        let empty = |file: &mut Forged| {
            let tensor = file.tensors.get_mut(name).unwrap();
            tensor.shape[1] = 0;
            tensor.data.clear();
        };
        lie(&empty, "must be");
    }
    let no_heads = |file: &mut Forged| {
        for tensor in file.tensors.values_mut() {
            tensor.shape[1] = 0;
            tensor.data.clear();
        }
    };
    lie(&no_heads, "must be");
    let more = |file: &mut Forged| {
        let tensor = file.tensors["z"].clone();
        file.tensors.insert("zz".into(), tensor);
    };
    lie(&more, "unknown tensor 'zz'");
    let tail = |file: &mut Forged| {
        *file.tensors.get_mut("open_keys").unwrap().data.last_mut().unwrap() = 0x80
    };
    lie(&tail, "not 0 beyond the open tokens");
}

fn plan_of(d_key: usize, d_value: usize, terms: usize, block: usize) -> Plan {
    taylor(d_key, d_value, terms, block)
}

/// A spec's JSON with a power that is larger than one would make.
fn plan_json(d_key: usize, d_value: usize, exponent: &str) -> String {
    let spec = Spec::new(d_key, d_value).series(Series::power(2)).block(4).build().unwrap();
    let json = serde_json::to_string(&spec).unwrap();
    json.replace("\"exponent\":2", &format!("\"exponent\":{exponent}"))
}

/// What a folder holds, to see that nothing has changed.
fn contents(folder: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(path).unwrap_or_default()))
        .collect();
    files.sort();
    files
}

#[test]
fn what_cannot_be_written_leaves_the_old_file() {
    let plan = taylor(2, 1, 2, 4);
    let state = small::<f32>(&plan);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("past.safetensors");
    state.save(&path).unwrap();
    let before = contents(folder.path());

    // A folder that is none, and a file that is a folder.
    for bad in [path.join("below"), folder.path().join("no/such")] {
        match state.save(&bad) {
            Err(Error::Io { path, doing: "making a file beside it", .. }) => assert_eq!(path, bad),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(state.save(folder.path()), Err(Error::File { .. })));
    assert_eq!(contents(folder.path()), before);
    #[cfg(unix)]
    {
        use std::fs::Permissions;
        use std::os::unix::fs::PermissionsExt;
        // A device is not replaced by a file.
        assert!(matches!(state.save("/dev/null"), Err(Error::File { .. })));
        // A folder that may not be written to, unless the user may do everything.
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o555)).unwrap();
        let probe = folder.path().join("probe");
        if std::fs::write(&probe, b"").is_err() {
            assert!(matches!(state.save(&path), Err(Error::Io { .. })));
        } else {
            std::fs::remove_file(&probe).unwrap();
        }
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        assert_eq!(contents(folder.path()), before);
    }
}

#[test]
fn saving_replaces_a_file_and_keeps_what_is_its_own() {
    let plan = taylor(2, 1, 2, 4);
    let (old, new) = (small::<f32>(&plan), small::<f32>(&plan));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("past.safetensors");
    old.save(&path).unwrap();
    #[cfg(unix)]
    {
        use std::fs::{Permissions, metadata, set_permissions};
        use std::os::unix::fs::{PermissionsExt, symlink};
        let mode = |path: &Path| metadata(path).unwrap().permissions().mode() & 0o777;
        std::fs::write(folder.path().join("plain"), b"").unwrap();
        assert_eq!(mode(&path), mode(&folder.path().join("plain")), "as any new file");
        set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let link = folder.path().join("link");
        symlink(&path, &link).unwrap();
        new.save(&link).unwrap();
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(mode(&path), 0o640);
        std::fs::remove_file(&link).unwrap();
        std::fs::remove_file(folder.path().join("plain")).unwrap();
    }
    new.save(&path).unwrap();
    assert!(std::fs::read(&path).unwrap() == new.to_bytes());
    assert_eq!(contents(folder.path()).len(), 1);
}

#[test]
fn states_cannot_count_beyond_their_numbers() {
    let plan = taylor(2, 1, 2, 4);
    let mut file = Forged::read(&small::<f32>(&plan).to_bytes()).unwrap();
    file.metadata.insert("positions".into(), "[9223372036854775807]".into());
    file.sign();
    let mut state = load::<f32>(&plan, &file.bytes()).unwrap();
    assert_eq!(state.position(0), i64::MAX as u64);
    let before = state.to_bytes();
    let other = state.fork();
    assert_field(state.merge(&other).unwrap_err(), "position");
    assert!(state.to_bytes() == before);
}

#[test]
fn a_plan_held_to_the_direct_form_still_serves_states() {
    let mut rng = rng();
    let plan = taylor(4, 3, 3, 8).with_form(Form::Direct);
    let inputs = Inputs::<f64>::new(&mut rng, Sizes::self_attention(50, 4, 3));
    let want = inputs.oracle(3, &Series::Taylor, true);
    let mut state = State::<f64>::new(&plan, 1, 1).unwrap();
    extend(&plan, &mut state, &inputs, 0..30);
    let mut state = load(&plan, &state.to_bytes()).unwrap();
    let y = extend(&plan, &mut state, &inputs, 30..50);
    assert_close("direct", &y, &want[30 * 3..], 1e-12);
}
