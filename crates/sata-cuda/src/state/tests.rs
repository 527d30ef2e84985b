//! Round trips between CPU and GPU, and what is refused.

use std::hash::{BuildHasher, Hasher, RandomState};

use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sata::{Centre, Error as CallError, Series, View, ViewMut};

use super::*;
use crate::{Device, Error};

fn rng() -> StdRng {
    let seed = RandomState::new().build_hasher().finish();
    println!("seed {seed}");
    StdRng::seed_from_u64(seed)
}

fn specs() -> Vec<Spec> {
    [
        Spec::new(3, 2).block(5),
        Spec::new(4, 5).block(4).near(Near::Blocks(2)).sinks(6).decay(Decay::Gates),
        Spec::new(3, 2).block(8).series(Series::power(2)).sinks(3),
        Spec::new(2, 3).block(70).series(Series::Gauss).decay(Decay::Gates),
    ]
    .map(|spec| spec.build().unwrap())
    .into()
}

/// Lets a state see some random tokens, a few of them masked.
fn extend(rng: &mut StdRng, plan: &sata::Plan, state: &mut sata::State<f32>, tokens: usize) {
    let (n, h) = (state.sequences(), state.kv_heads());
    let (dk, dv) = (plan.spec().d_key(), plan.spec().d_value());
    let mut draw = |count: usize, low: f32, high: f32| -> Vec<f32> {
        (0..count).map(|_| rng.random_range(low..high)).collect()
    };
    let q = draw(n * h * tokens * dk, -1.0, 1.0);
    let k = draw(n * h * tokens * dk, -1.0, 1.0);
    let v = draw(n * h * tokens * dv, -1.0, 2.0);
    let gates = draw(n * h * tokens, -0.3, 0.0);
    let mask: Vec<bool> = draw(n * tokens, 0.0, 1.0).iter().map(|x| *x < 0.9).collect();
    let shape = |dim| [n, h, tokens, dim];
    let mut call = sata::Call::causal(
        View::new(&q, shape(dk)).unwrap(),
        View::new(&k, shape(dk)).unwrap(),
        View::new(&v, shape(dv)).unwrap(),
    );
    if plan.spec().decay() == Decay::Gates {
        call = call.log_gates(View::new(&gates, shape(1)).unwrap());
    }
    let mut y = vec![0.0; n * h * tokens * dv];
    let out = ViewMut::new(&mut y, shape(dv)).unwrap();
    plan.run(call.key_mask(&mask).state(state), out).unwrap();
}

const STORAGES: [Storage; 4] = [
    Storage { sums: SumsType::F32, compensated: false },
    Storage { sums: SumsType::F32, compensated: true },
    Storage { sums: SumsType::Bf16, compensated: false },
    Storage { sums: SumsType::Bf16, compensated: true },
];

#[test]
fn a_state_goes_to_the_device_and_back() {
    let mut rng = rng();
    let device = Device::emulated().unwrap();
    for spec in specs() {
        let plan = Plan::new(&device, &spec).unwrap();
        for round in 0..12 {
            let mut host = sata::State::<f32>::new(plan.host(), 3, 2).unwrap();
            let tokens = [0, 1, 3, 4, 5, 8, 12, 13, 24, 70, 71, 100][round];
            extend(&mut rng, plan.host(), &mut host, tokens);
            for storage in STORAGES {
                let state = State::from_host_with(&plan, &host, storage).unwrap();
                assert_eq!(state.storage(), storage);
                assert_eq!(state.position(1).unwrap(), tokens as u64);
                let back = state.to_host(&plan).unwrap();
                let (parts, before) = (back.to_parts(), host.to_parts());
                // All but the sums is the same, whatever they are kept as.
                let rest = |parts: &sata::StateParts<f32>| {
                    let none = || vec![];
                    let mut parts = parts.clone();
                    (parts.sums, parts.sums_low, parts.z, parts.z_low) =
                        (none(), none(), none(), none());
                    parts
                };
                assert_eq!(rest(&parts), rest(&before));
                let added = |x: &[f32], low: &[f32]| super::raw::added(x, low);
                match storage {
                    Storage { sums: SumsType::F32, compensated: true } => {
                        assert!(back.to_bytes() == host.to_bytes());
                    }
                    Storage { sums: SumsType::Bf16, compensated: false } => {
                        let wants = added(&before.sums, &before.sums_low);
                        for (got, want) in parts.sums.iter().zip(wants) {
                            assert_eq!(*got, bf16::from_f32(want).to_f32());
                        }
                    }
                    _ => {
                        assert_eq!(parts.sums, added(&before.sums, &before.sums_low));
                        assert!(parts.sums_low.iter().all(|&x| x == 0.0));
                    }
                }
                if !storage.compensated {
                    assert_eq!(parts.z, added(&before.z, &before.z_low));
                }
                // What has been on the device comes back to it bit for bit.
                let again = State::from_host_with(&plan, &back, storage).unwrap();
                assert!(again.to_host(&plan).unwrap().to_bytes() == back.to_bytes());
            }
        }
    }
}

#[test]
fn a_state_goes_on_where_it_was() {
    let mut rng = rng();
    let device = Device::emulated().unwrap();
    for spec in specs() {
        let plan = Plan::new(&device, &spec).unwrap();
        let mut host = sata::State::<f32>::new(plan.host(), 2, 2).unwrap();
        let storage = Storage { sums: SumsType::F32, compensated: true };
        for tokens in [1, 6, 2, 40, 9] {
            let state = State::from_host_with(&plan, &host, storage).unwrap();
            let mut other = state.to_host(&plan).unwrap();
            let mut twin = rng.clone();
            extend(&mut rng, plan.host(), &mut host, tokens);
            extend(&mut twin, plan.host(), &mut other, tokens);
            assert!(host.to_bytes() == other.to_bytes());
        }
    }
}

#[test]
fn open_tokens_lie_in_a_ring() {
    let device = Device::emulated().unwrap();
    let spec = Spec::new(1, 1).terms(2).block(4).near(Near::Blocks(1)).build().unwrap();
    let plan = Plan::new(&device, &spec).unwrap();
    let mut host = sata::State::<f32>::new(plan.host(), 1, 1).unwrap();
    let mut y = [0.0];
    for token in 0..14 {
        let x = [token as f32];
        let view = View::new(&x, [1, 1, 1, 1]).unwrap();
        let call = sata::Call::causal(view, view, view).state(&mut host);
        plan.host().run(call, ViewMut::new(&mut y, [1, 1, 1, 1]).unwrap()).unwrap();
    }
    // 8 have been folded, 6 are open, and token t lies at t mod 8.
    let state = State::from_host(&plan, &host).unwrap();
    let keys = state.open_keys.to_vec().unwrap();
    assert_eq!(keys, [8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 0.0, 0.0]);
    assert_eq!(state.lengths().unwrap(), [Length { position: 14, open: 6 }]);
    assert_eq!(state.lengths().unwrap()[0].folded(), 8);
}

#[test]
fn forks_are_apart_and_reset_forgets() {
    let mut rng = rng();
    let device = Device::emulated().unwrap();
    for spec in specs() {
        let plan = Plan::new(&device, &spec).unwrap();
        let mut host = sata::State::<f32>::new(plan.host(), 3, 1).unwrap();
        let empty = host.clone();
        extend(&mut rng, plan.host(), &mut host, 30);
        for storage in STORAGES {
            let mut state = State::from_host_with(&plan, &host, storage).unwrap();
            let fork = state.fork().unwrap();
            let before = fork.to_host(&plan).unwrap();
            assert!(state.to_host(&plan).unwrap().to_bytes() == before.to_bytes());
            assert_eq!(fork.bytes(), state.bytes());
            state.reset().unwrap();
            assert!(state.to_host(&plan).unwrap().to_bytes() == empty.to_bytes());
            assert!(fork.to_host(&plan).unwrap().to_bytes() == before.to_bytes());
        }
    }
}

#[test]
fn lengths_are_set_and_told() {
    let device = Device::emulated().unwrap();
    let plan = Plan::new(&device, &specs()[0]).unwrap();
    for n in [1, 2, 5] {
        let mut state = State::new(&plan, n, 2).unwrap();
        assert_eq!(state.lengths().unwrap(), vec![Length::default(); n]);
        let lengths: Vec<Length> =
            (0..n).map(|i| Length { position: 100 + i as u64, open: i as u32 }).collect();
        state.set_lengths(&lengths).unwrap();
        assert_eq!(state.lengths().unwrap(), lengths);
        assert_eq!(state.position(n - 1).unwrap(), 99 + n as u64);
        assert_eq!(state.position(n).unwrap(), 0);
        let Arrays { positions, open, .. } = state.arrays();
        assert_eq!(open - positions, 8 * n as u64);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let device = Device::emulated().unwrap();
    let spec = Spec::new(3, 2).terms(3).build().unwrap();
    let plan = Plan::new(&device, &spec).unwrap();
    for sizes in [[0, 1], [1, 0]] {
        let refused = State::new(&plan, sizes[0], sizes[1]);
        assert!(matches!(refused, Err(Error::Call(CallError::Shape { argument: "state", .. }))));
    }
    let refused = State::new(&plan, usize::MAX / 2, 4);
    assert!(matches!(refused, Err(Error::OutOfMemory { .. })), "{refused:?}");
    let centre = Centre::new(1, &[0.0; 3], &[0.0; 2]).unwrap();
    let centred = sata::State::<f32>::centred(plan.host(), 1, 1, centre).unwrap();
    let refused = State::from_host(&plan, &centred);
    assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
    let others = [
        ("d_key", Spec::new(4, 2).terms(3)),
        ("d_value", Spec::new(3, 3).terms(3)),
        ("block", Spec::new(3, 2).terms(3).block(32)),
        ("near", Spec::new(3, 2).terms(3).near(Near::Blocks(0))),
        ("sinks", Spec::new(3, 2).terms(3).sinks(1)),
        ("decay", Spec::new(3, 2).terms(3).decay(Decay::Slopes)),
        ("orders", Spec::new(3, 2).terms(2)),
        ("orders", Spec::new(3, 2).terms(4)),
    ];
    for (field, other) in others {
        let other = sata::Plan::new(&other.build().unwrap()).unwrap();
        let host = sata::State::<f32>::new(&other, 1, 1).unwrap();
        match State::from_host(&plan, &host) {
            Err(Error::Call(CallError::State { field: named, .. })) => assert_eq!(named, field),
            other => panic!("{field}: {other:?}"),
        }
    }
}
