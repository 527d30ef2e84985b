//! State files with random damage, half of them signed again: the loader refuses them or gives a
//! state that works, never panics, and allocates no more than a file's length accounts for.

mod common;
#[path = "common/forged.rs"]
mod forged;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::calls::{blank, feed};
use common::{Fade, Inputs, Sizes, rng};
use forged::Forged;
use rand::Rng;
use rand::rngs::StdRng;
use sata::{Centre, Decay, Error, Near, Plan, Real, Series, Spec, State};

/// The system's allocator, with the most bytes that were in use at once.
struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(USED.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: forwarded from the caller.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Relaxed);
        // SAFETY: forwarded from the caller.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Files in `T`, each with plans that read it.
fn files<T: Real>(rng: &mut StdRng) -> Vec<Vec<u8>> {
    plans()
        .iter()
        .flat_map(|plan| [[1, 1, 5], [2, 3, 9]].map(|sizes| (plan, sizes)))
        .map(|(plan, [batch, kv_heads, tokens])| {
            let spec = plan.spec();
            let sizes = Sizes {
                batch,
                kv_heads,
                ..Sizes::self_attention(tokens, spec.d_key(), spec.d_value())
            };
            let inputs = Inputs::<T>::new(rng, sizes);
            let fade = Fade::new(rng, spec.decay(), sizes);
            let orders = spec.orders();
            let mut state = if orders.len() == spec.terms() && batch == 2 {
                let centre = Centre::mean(inputs.k(), inputs.v()).unwrap();
                State::<T>::centred(plan, batch, kv_heads, centre).unwrap()
            } else {
                State::<T>::new(plan, batch, kv_heads).unwrap()
            };
            feed(plan, &mut state, &inputs, &fade, 0..tokens, &mut blank(sizes));
            state.to_bytes()
        })
        .collect()
}

fn plans() -> Vec<Plan> {
    [
        Spec::new(2, 1).terms(2).block(4),
        Spec::new(3, 2).terms(4).block(2),
        Spec::new(2, 3).series(Series::power(4)).block(8),
        Spec::new(1, 1).terms(1).block(1),
        Spec::new(2, 2).series(Series::Fixed { coefficients: vec![1.0, 0.0, 0.3] }).block(4),
        Spec::new(2, 1).terms(2).block(2).near(Near::Blocks(1)).sinks(3).decay(Decay::Gates),
        Spec::new(2, 1).series(Series::Gauss).terms(4).block(4).sinks(1).decay(Decay::Slopes),
        Spec::new(1, 2).series(Series::hermite()).terms(1).block(3).near(Near::Blocks(0)),
    ]
    .map(|spec| Plan::new(&spec.build().unwrap()).unwrap())
    .into()
}

fn pick<'a, X>(rng: &mut StdRng, from: &'a [X]) -> &'a X {
    &from[rng.random_range(0..from.len())]
}

/// One random change somewhere in `bytes`.
fn damage(rng: &mut StdRng, bytes: &mut Vec<u8>, other: &[u8]) {
    if bytes.is_empty() {
        bytes.push(rng.random());
    }
    let at = rng.random_range(0..bytes.len());
    let to = rng.random_range(at..=bytes.len().min(at + 32));
    match rng.random_range(0..9) {
        0 => bytes[at] ^= 1 << rng.random_range(0..8),
        1 => bytes[at] = rng.random(),
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..to)),
        4 => {
            let again = bytes[at..to].to_vec();
            bytes.splice(at..at, again);
        }
        5 => {
            let from = rng.random_range(0..other.len());
            let part = &other[from..other.len().min(from + (to - at))];
            bytes.splice(at..to, part.iter().copied());
        }
        6 => {
            let extreme = *pick(rng, &[0, 1, 1 << 31, 1 << 53, i64::MAX as u64, u64::MAX]);
            for (byte, with) in bytes[at..].iter_mut().zip(extreme.to_le_bytes()) {
                *byte = with;
            }
        }
        // A number in the header.
        _ => digits(rng, bytes),
    }
}

/// Another number in place of one written in digits.
fn digits(rng: &mut StdRng, bytes: &mut Vec<u8>) {
    let starts: Vec<usize> = (1..bytes.len())
        .filter(|&i| bytes[i].is_ascii_digit() && !bytes[i - 1].is_ascii_digit())
        .collect();
    if starts.is_empty() {
        return;
    }
    let at = *pick(rng, &starts);
    let len = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let with = *pick(
        rng,
        &[
            "0",
            "1",
            "2",
            "3",
            "4",
            "8",
            "64",
            "1000000000",
            "9223372036854775807",
            "18446744073709551615",
            "1e9",
            "-1",
            "0.5",
        ],
    );
    bytes.splice(at..at + len, with.bytes());
}

/// Damage within what is signed: metadata and tensors.
fn lie(rng: &mut StdRng, file: &mut Forged) {
    match rng.random_range(0..4) {
        0 | 1 => {
            let keys: Vec<String> = file.metadata.keys().cloned().collect();
            let key = pick(rng, &keys);
            let mut value = file.metadata[key].clone().into_bytes();
            if rng.random_bool(0.7) {
                digits(rng, &mut value);
            } else {
                damage(rng, &mut value, b"[0,1]{\"taylor\":4}");
            }
            let value = String::from_utf8_lossy(&value).into_owned();
            file.metadata.insert(key.clone(), value);
        }
        kind => {
            let names: Vec<String> = file.tensors.keys().cloned().collect();
            let Some(name) = (!names.is_empty()).then(|| pick(rng, &names).clone()) else { return };
            let Some(tensor) = file.tensors.get_mut(&name) else { return };
            if kind == 2 && !tensor.data.is_empty() {
                let at = rng.random_range(0..tensor.data.len());
                tensor.data[at] = rng.random();
            } else if !tensor.shape.is_empty() {
                let at = rng.random_range(0..tensor.shape.len());
                tensor.shape[at] = rng.random_range(0..5);
                let width = if tensor.dtype == "F64" { 8 } else { 4 };
                tensor.data.resize(tensor.shape.iter().product::<usize>() * width, 0);
            }
        }
    }
}

/// Loads, and uses what was loaded.
fn try_one<T: Real>(plan: &Plan, bytes: &[u8]) -> bool {
    let before = USED.load(Relaxed);
    PEAK.store(before, Relaxed);
    let loaded = State::<T>::from_bytes(plan, bytes, "a file");
    let taken = PEAK.load(Relaxed) - before;
    assert!(taken <= (1 << 18) + 300 * bytes.len(), "{taken} bytes for {} bytes", bytes.len());
    let mut state = match loaded {
        Ok(state) => state,
        Err(Error::File { .. } | Error::State { .. } | Error::TooLarge { .. }) => return false,
        Err(other) => panic!("{other:?}"),
    };
    let again = State::<T>::from_bytes(plan, &state.to_bytes(), "a file").unwrap();
    assert!(again.to_bytes() == state.to_bytes());
    let (sequences, heads) = (state.sequences(), state.kv_heads());
    let spec = plan.spec();
    // Steps to the end of the block and beyond.
    let s = Sizes {
        batch: sequences,
        kv_heads: heads,
        ..Sizes::self_attention(spec.block() + 1, spec.d_key(), spec.d_value())
    };
    let ones = |shape: [usize; 4]| vec![T::ONE; shape.iter().product()];
    let inputs = Inputs { sizes: s, q: ones(s.q()), k: ones(s.k()), v: ones(s.v()), mask: None };
    let fade = match spec.decay() {
        Decay::None => Fade::None,
        Decay::Slopes => Fade::Slopes(vec![0.5; heads]),
        Decay::Gates => Fade::gates(s, -0.5),
    };
    let mut y = blank(s);
    for t in 0..s.keys {
        if (0..sequences).any(|i| state.position(i) == i64::MAX as u64) {
            // It can count no further, which a call is refused for.
            break;
        }
        feed(plan, &mut state, &inputs, &fade, t..t + 1, &mut y);
    }
    state.merge(&again).map_or(true, |()| state.sequences() == sequences)
}

#[test]
fn damaged_files_are_refused_or_work() {
    let mut rng = rng();
    let plans = plans();
    let files = [files::<f32>(&mut rng), files::<f64>(&mut rng)].concat();
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let mut bytes = pick(&mut rng, &files).clone();
        let other = pick(&mut rng, &files);
        let signed = rng.random_bool(0.5);
        if signed {
            let mut file = Forged::read(&bytes).unwrap();
            for _ in 0..rng.random_range(1..3) {
                lie(&mut rng, &mut file);
            }
            file.sign();
            bytes = file.bytes();
        } else {
            for _ in 0..rng.random_range(1..5) {
                damage(&mut rng, &mut bytes, other);
            }
        }
        for plan in &plans {
            for works in [try_one::<f32>(plan, &bytes), try_one::<f64>(plan, &bytes)] {
                *(if works { &mut accepted } else { &mut refused }) += 1;
                assert!(!works || signed || files.contains(&bytes), "damaged, and accepted");
            }
        }
    }
    println!("{accepted} accepted, {refused} refused");
    assert!(accepted > 1000, "lies that were signed must get past the digest: {accepted}");
}
