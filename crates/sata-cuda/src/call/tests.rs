//! Whatever is wrong with a call is an error that names it.

use sata::SpecBuilder;

use super::*;
use crate::{Buffer, Device};

/// A call of two sequences, two key/value heads read by two query heads each, and what to change.
#[derive(Clone)]
struct Case {
    spec: SpecBuilder,
    causal: bool,
    q: [usize; 4],
    k: [usize; 4],
    v: [usize; 4],
    out: [usize; 4],
    mask: Option<[usize; 4]>,
    gates: Option<[usize; 4]>,
    slopes: Option<Vec<f64>>,
    packed: Option<(Vec<usize>, Vec<usize>)>,
    state: Option<[usize; 2]>,
}

impl Case {
    fn new() -> Self {
        Case {
            spec: Spec::new(3, 2).terms(3),
            causal: true,
            q: [2, 4, 5, 3],
            k: [2, 2, 5, 3],
            v: [2, 2, 5, 2],
            out: [2, 4, 5, 2],
            mask: None,
            gates: None,
            slopes: None,
            packed: None,
            state: None,
        }
    }

    fn packed(cu_queries: &[usize], cu_keys: &[usize]) -> Self {
        let one = |shape: [usize; 4]| [1, shape[1], 10, shape[3]];
        let case = Self::new();
        let packed = Some((cu_queries.to_vec(), cu_keys.to_vec()));
        Case { q: one(case.q), k: one(case.k), v: one(case.v), out: one(case.out), packed, ..case }
    }

    fn check(&self) -> Result<(Shape, Vec<Piece>), Error> {
        let device = Device::emulated()?;
        let plan = Plan::new(&device, &self.spec.clone().build()?)?;
        let room = Buffer::<f32>::uninit(&device, 1000)?;
        let bytes = Buffer::<u8>::uninit(&device, 1000)?;
        let [q, k, v] = [self.q, self.k, self.v].map(|shape| View::new(&room, shape).unwrap());
        let mut state = match self.state {
            Some([sequences, kv_heads]) => Some(State::new(&plan, sequences, kv_heads)?),
            None => None,
        };
        let mut call = if self.causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
        if let Some(mask) = self.mask {
            call = call.key_mask(View::new(&bytes, mask)?);
        }
        if let Some(gates) = self.gates {
            call = call.log_gates(View::new(&room, gates)?);
        }
        if let Some(slopes) = &self.slopes {
            call = call.slopes(slopes);
        }
        if let Some((cu_queries, cu_keys)) = &self.packed {
            call = call.packed(cu_queries, cu_keys);
        }
        if let Some(state) = &mut state {
            call = call.state(state);
        }
        Ok((call.check(&plan, "out", self.out)?, call.pieces()))
    }

    fn refused(&self) -> String {
        self.check().expect_err("it is wrong").to_string()
    }
}

#[test]
fn the_case_itself_is_right() {
    for causal in [true, false] {
        let (shape, pieces) = Case { causal, ..Case::new() }.check().unwrap();
        assert_eq!(shape, Shape { kv_heads: 2, group: 2, sequences: 2 });
        let one = |batch| Piece {
            q_batch: batch,
            q_first: 0,
            queries: 5,
            k_batch: batch,
            k_first: 0,
            keys: 5,
        };
        assert_eq!(pieces, [one(0), one(1)]);
        let case = Case { mask: Some([2, 1, 1, 5]), state: Some([2, 2]), causal, ..Case::new() };
        case.check().unwrap();
    }
    let case = Case { causal: false, ..Case::packed(&[0, 4, 4, 10], &[0, 0, 7, 10]) };
    let (shape, pieces) = case.check().unwrap();
    assert_eq!(shape.sequences, 3);
    let pieces: Vec<[usize; 6]> = pieces
        .iter()
        .map(|p| [p.q_batch, p.q_first, p.queries, p.k_batch, p.k_first, p.keys])
        .collect();
    assert_eq!(pieces, [[0, 0, 4, 0, 0, 0], [0, 4, 0, 0, 0, 7], [0, 4, 6, 0, 7, 3]]);
    let spec = Spec::new(3, 2).decay(Decay::Gates);
    Case { spec, gates: Some([2, 2, 5, 1]), ..Case::new() }.check().unwrap();
    let spec = Spec::new(3, 2).decay(Decay::Slopes);
    Case { spec, slopes: Some(vec![0.0, 2.0]), ..Case::new() }.check().unwrap();
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let case = Case::new;
    for (case, text) in [
        (
            Case { q: [0, 4, 5, 3], ..case() },
            "q has shape [0, 4, 5, 3], but batch and heads must be at least 1",
        ),
        (
            Case { v: [2, 0, 5, 2], ..case() },
            "v has shape [2, 0, 5, 2], but batch and heads must be at least 1",
        ),
        (
            Case { q: [2, 4, 5, 4], ..case() },
            "q has shape [2, 4, 5, 4], but the spec has d_key = 3",
        ),
        (
            Case { k: [2, 2, 5, 2], ..case() },
            "k has shape [2, 2, 5, 2], but the spec has d_key = 3",
        ),
        (
            Case { v: [2, 2, 5, 3], ..case() },
            "v has shape [2, 2, 5, 3], but the spec has d_value = 2",
        ),
        (
            Case { v: [2, 2, 4, 2], ..case() },
            "v has shape [2, 2, 4, 2], but k has shape [2, 2, 5, 3]",
        ),
        (Case { q: [1, 4, 5, 3], ..case() }, "k has shape [2, 2, 5, 3], but q has batch 1"),
        (
            Case { q: [2, 3, 5, 3], ..case() },
            "q has shape [2, 3, 5, 3], but its heads must be a multiple of the 2 key/value heads",
        ),
        (
            Case { q: [2, 4, 6, 3], ..case() },
            "k has shape [2, 2, 5, 3], but causal attention needs as many keys as queries, 6",
        ),
        (
            Case { out: [2, 4, 5, 3], ..case() },
            "out has shape [2, 4, 5, 3], but it must be [2, 4, 5, 2]",
        ),
        (
            Case { mask: Some([2, 1, 1, 6]), ..case() },
            "key_mask has shape [2, 1, 1, 6], but it must be [2, 1, 1, 5]",
        ),
        (Case { state: Some([3, 2]), ..case() }, "the state has sequences = 3, but the call has 2"),
        (Case { state: Some([2, 1]), ..case() }, "the state has kv_heads = 1, but the call has 2"),
    ] {
        assert_eq!(case.refused(), text);
    }
}

#[test]
fn packed_sequences_that_do_not_fit_are_named() {
    let rise = |cu: &str| {
        format!(
            "but it must rise from 0 to the 10 tokens, one element more than sequences; it is {cu}"
        )
    };
    for (queries, keys, text) in [
        (&[0usize, 4, 9][..], &[0usize, 4, 10][..], rise("[0, 4, 9]")),
        (&[1, 10], &[0, 10], rise("[1, 10]")),
        (&[0], &[0], rise("[0]")),
        (&[0, 6, 4, 10], &[0, 6, 4, 10], rise("[0, 6, 4, 10]")),
        (&[0, 4, 10], &[0, 10], "but cu_queries has 3 elements".into()),
        (
            &[0, 4, 10],
            &[0, 5, 10],
            "but causal attention needs the same lengths as cu_queries".into(),
        ),
    ] {
        let refused = Case::packed(queries, keys).refused();
        assert!(refused.ends_with(&text), "{refused}");
    }
    let case = Case { packed: Some((vec![0, 5], vec![0, 5])), ..Case::new() };
    assert!(case.refused().contains("packed sequences need a batch of 1"), "{}", case.refused());
}

#[test]
fn what_the_spec_needs_is_asked_for() {
    let gates = Spec::new(3, 2).decay(Decay::Gates);
    let slopes = Spec::new(3, 2).decay(Decay::Slopes);
    let near = Spec::new(3, 2).near(Near::Blocks(1));
    let case = Case::new;
    let with = |slopes: &[f64]| Some(slopes.to_vec());
    for (case, text) in [
        (
            Case { spec: gates.clone(), ..case() },
            "log_gates has shape [], but the spec has decay = gates",
        ),
        (
            Case { spec: gates, gates: Some([2, 4, 5, 1]), ..case() },
            "log_gates has shape [2, 4, 5, 1], but it must be [2, 2, 5, 1]",
        ),
        (
            Case { gates: Some([2, 2, 5, 1]), ..case() },
            "log_gates has shape [2, 2, 5, 1], but the spec has decay = None",
        ),
        (
            Case { spec: slopes.clone(), ..case() },
            "slopes has shape [], but the spec has decay = slopes",
        ),
        (
            Case { spec: slopes.clone(), slopes: with(&[1.0]), ..case() },
            "slopes has shape [1], but there must be one for each of the 2 key/value heads",
        ),
        (
            Case { spec: slopes.clone(), slopes: with(&[1.0, -0.5]), ..case() },
            "slopes is -0.5 for head 1, but a slope must be finite and at least 0",
        ),
        (
            Case { spec: slopes, slopes: with(&[f64::NAN, 0.0]), ..case() },
            "slopes is NaN for head 0, but a slope must be finite and at least 0",
        ),
        (
            Case { slopes: with(&[1.0, 1.0]), ..case() },
            "slopes has shape [2], but the spec has decay = None",
        ),
        (
            Case { spec: near, causal: false, ..case() },
            "near = Blocks(1) with full attention, which has no order, is not supported on the GPU",
        ),
    ] {
        assert_eq!(case.refused(), text);
    }
}

#[test]
fn all_must_be_on_one_device() {
    let (here, there) = (Device::emulated().unwrap(), Device::emulated().unwrap());
    let plan = Plan::new(&here, &Spec::new(1, 1).build().unwrap()).unwrap();
    let mine = Buffer::<f32>::zeroed(&here, 1).unwrap();
    let other = Buffer::<f32>::zeroed(&there, 1).unwrap();
    let one = [1; 4];
    let [a, b] = [&mine, &other].map(|buffer| View::new(buffer, one).unwrap());
    Call::causal(a, a, a).check(&plan, "out", one).unwrap();
    for (call, name) in
        [(Call::causal(b, a, a), "q"), (Call::causal(a, b, a), "k"), (Call::causal(a, a, b), "v")]
    {
        match call.check(&plan, "out", one) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, name),
            other => panic!("{other:?}"),
        }
    }
    let elsewhere = Plan::new(&there, plan.spec()).unwrap();
    let mut state = State::new(&elsewhere, 1, 1).unwrap();
    let refused = Call::causal(a, a, a).state(&mut state).check(&plan, "out", one);
    assert!(matches!(refused, Err(Error::Argument { argument: "state", .. })));
}
