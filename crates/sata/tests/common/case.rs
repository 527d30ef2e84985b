//! A call to make one thing wrong with.

use sata::{Call, Diagnostics, Element, Error, Form, Plan, Real, Spec, State, View, ViewMut};

pub const D_KEY: usize = 3;
pub const D_VALUE: usize = 2;

pub fn plan() -> Plan {
    Plan::new(&Spec::new(D_KEY, D_VALUE).terms(3).block(4).build().unwrap()).unwrap()
}

/// A call to make one thing wrong with: two sequences of five tokens, two heads read by two each.
#[derive(Clone)]
pub struct Case<E> {
    pub q: [usize; 4],
    pub k: [usize; 4],
    pub v: [usize; 4],
    pub out: [usize; 4],
    pub data: [Vec<E>; 3],
    pub mask: Option<Vec<bool>>,
    pub packed: Option<(Vec<usize>, Vec<usize>)>,
    pub causal: bool,
    /// Sequences and heads of the state.
    pub state: [usize; 2],
}

pub fn count(shape: [usize; 4]) -> usize {
    shape.iter().product()
}

impl<E: Element> Case<E> {
    pub fn new() -> Self {
        let [q, k, v, out] =
            [[2, 4, 5, D_KEY], [2, 2, 5, D_KEY], [2, 2, 5, D_VALUE], [2, 4, 5, D_VALUE]];
        let numbers = |shape, step: f64| {
            let number = |i| E::from_compute(E::Compute::from_f64((i as f64 * step).sin()));
            (0..count(shape)).map(number).collect()
        };
        Case {
            q,
            k,
            v,
            out,
            data: [numbers(q, 0.7), numbers(k, 1.1), numbers(v, 1.3)],
            mask: None,
            packed: None,
            causal: true,
            state: [2, 2],
        }
    }

    /// Ten tokens in a batch of one.
    pub fn packed(queries: &[usize], keys: &[usize]) -> Self {
        Case {
            q: [1, 4, 10, D_KEY],
            k: [1, 2, 10, D_KEY],
            v: [1, 2, 10, D_VALUE],
            out: [1, 4, 10, D_VALUE],
            packed: Some((queries.to_vec(), keys.to_vec())),
            ..Case::new()
        }
    }

    /// The shapes changed, with as much data as they need.
    pub fn shapes(change: impl FnOnce(&mut Self)) -> Self {
        let mut case = Self::new();
        change(&mut case);
        for (data, shape) in case.data.iter_mut().zip([case.q, case.k, case.v]) {
            data.resize(count(shape), E::from_compute(E::Compute::ONE));
        }
        case
    }

    pub fn run(
        &self,
        plan: &Plan,
        state: Option<&mut State<E::Compute>>,
        strict: bool,
    ) -> (Result<Diagnostics, Error>, Vec<E>) {
        let [q, k, v] = &self.data;
        let (q, k, v) = (
            View::new(q, self.q).unwrap(),
            View::new(k, self.k).unwrap(),
            View::new(v, self.v).unwrap(),
        );
        let mut call = if self.causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
        if let Some(mask) = &self.mask {
            call = call.key_mask(mask);
        }
        if let Some((queries, keys)) = &self.packed {
            call = call.packed(queries, keys);
        }
        if let Some(state) = state {
            call = call.state(state);
        }
        let mut y = vec![E::from_compute(E::Compute::from_f64(-7.0)); count(self.out)];
        let out = ViewMut::new(&mut y, self.out).unwrap();
        (plan.run(call.strict(strict), out), y)
    }

    /// The error of the call in every form, which is the same and changes nothing.
    #[track_caller]
    pub fn refused(&self) -> Error {
        let mut errors = vec![];
        for form in [None, Some(Form::Direct), Some(Form::State)] {
            for with_state in [false, true] {
                let plan = form.map_or_else(plan, |form| plan().with_form(form));
                let mut state = State::new(&plan, self.state[0], self.state[1]).unwrap();
                let past = Case::<E>::new();
                if self.state == [2, 2] {
                    past.run(&plan, Some(&mut state), true).0.unwrap();
                }
                let before = state.to_bytes();
                let (result, y) = self.run(&plan, with_state.then_some(&mut state), false);
                errors.push(result.unwrap_err());
                assert!(y.iter().all(|y| y.to_compute().to_f64() == -7.0), "outputs changed");
                assert!(state.to_bytes() == before, "the state changed");
            }
        }
        let text = errors[0].to_string();
        assert!(errors.iter().all(|error| error.to_string() == text), "{errors:?}");
        errors.remove(0)
    }

    /// That it is refused for the shape of one argument, with a text that has some numbers.
    #[track_caller]
    pub fn misfits(&self, name: &str, shape: &[usize], text: &str) {
        let error = self.refused();
        match &error {
            Error::Shape { argument, got, expected }
                if *argument == name && got == shape && expected.contains(text) => {}
            _ => panic!("wanted {name} {shape:?} and '{text}', got {error:?}"),
        }
    }
}

#[track_caller]
pub fn assert_state(error: Error, name: &str, holds: &str, wants: &str) {
    match &error {
        Error::State { field, state, call }
            if (*field, &**state, &**call) == (name, holds, wants) => {}
        _ => panic!("wanted {name}: {holds} and {wants}, got {error:?}"),
    }
}
