//! The file of a state: every bit is kept, and what is altered or lies is refused.

mod common;
#[path = "common/forged.rs"]
mod forged;

use std::path::Path;

use common::calls::bits;
use common::states::{extend, load, plan, small, taylor};
use common::{Inputs, Sizes, assert_close, rng};
use forged::Forged;
use sata::{Error, Plan, Real, Series, Spec, State, View, ViewMut};

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
    assert_eq!(file.metadata["version"], "2");
    assert_eq!(file.metadata["orders"], "[0,2]");
    assert_eq!(file.metadata["basis"], "bare-lexicographic");
    assert_eq!(file.metadata["positions"], "[13]");
    assert_eq!(file.metadata["open"], "[3]");
    assert_eq!(file.metadata["digest"], file.digest());
    let spec: Spec = serde_json::from_str(&file.metadata["spec"]).unwrap();
    assert_eq!(&spec, plan.spec());
    assert_eq!(file.metadata.len(), 8);
    let names: Vec<&str> = file.tensors.keys().map(String::as_str).collect();
    let all = "counts lags open_keys open_values open_weights reaches sums totals z";
    assert_eq!(names.join(" "), all);
    // 1, then the products of two indices in lexicographic order.
    let monomials: Vec<Vec<usize>> =
        vec![vec![], vec![0, 0], vec![0, 1], vec![0, 2], vec![1, 1], vec![1, 2], vec![2, 2]];
    let numbers = |name: &str| -> Vec<f64> {
        let data = &file.tensors[name].data;
        data.chunks(8).map(|x| f64::from_le_bytes(x.try_into().unwrap())).collect()
    };
    for (name, want) in [("counts", 10.0), ("lags", 0.0), ("totals", 0.0)] {
        assert_eq!(file.tensors[name].shape, [1, 2]);
        assert_eq!(numbers(name), [want; 2], "{name}");
    }
    let square = |k: &[f64]| k.iter().map(|k| k * k).sum::<f64>();
    let reach = |keys: &[f64]| keys.chunks(d_key).map(square).fold(0.0, f64::max);
    let reaches: Vec<f64> = inputs.k.chunks(tokens * d_key).map(reach).collect();
    assert_close("reaches", &numbers("reaches"), &reaches, 1e-15);
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
    lie(&set("version", "3"), "version 3, made by a newer program; this one reads version 2");
    lie(&set("version", "1"), "version 1, made by an older program");
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
    lie(&set("open", "[0]"), "not 0 beyond its tokens");
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
        let same_size = if honest.tensors[name].dtype == "F64" { "I64" } else { "I32" };
        let other =
            |file: &mut Forged| file.tensors.get_mut(name).unwrap().dtype = same_size.into();
        lie(&other, same_size);
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
    lie(&tail, "not 0 beyond its tokens");
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
