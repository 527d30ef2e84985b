//! A sequence in any parts, apart and merged, forked, or through a file: always the answers of one
//! call.

mod common;

use std::ops::Range;

use common::calls::{bits, blank, feed, feed_in, plan_of, read_full, run};
use common::packed::run_packed;
use common::settings::{Setting, settings};
use common::truth::{Truth, assert_rows, truth};
use common::{Fade, Inputs, Sizes, rng, tolerance};
use rand::Rng;
use rand::rngs::StdRng;
use sata::{Decay, Error, Form, Near, Plan, Real, State};

/// One setting with inputs and the answers to them.
struct Case<T> {
    plan: Plan,
    inputs: Inputs<T>,
    fade: Fade,
    truth: Truth,
    allowed: f64,
    what: String,
}

impl<T: Real> Case<T> {
    fn new(rng: &mut StdRng, setting: &Setting, sizes: Sizes) -> Self {
        let inputs = Inputs::<T>::new(rng, sizes);
        let inputs = if rng.random_bool(0.5) { inputs.masked(rng) } else { inputs };
        let fade = Fade::new(rng, setting.decay, sizes);
        let spec = setting.spec(sizes);
        let truth = truth(&spec, &inputs, &fade, true);
        let slack = setting.slack()[usize::from(size_of::<T>() == 4)];
        let masked = inputs.mask.is_some();
        let what = format!("{} masked={masked} {setting:?}", T::NAME);
        Case {
            plan: plan_of(&spec, None),
            inputs,
            fade,
            truth,
            allowed: slack * tolerance::<T>(),
            what,
        }
    }

    fn tokens(&self) -> usize {
        self.inputs.sizes.keys
    }

    #[track_caller]
    fn check(&self, how: &str, y: &[T]) {
        assert_rows(&format!("{how}: {}", self.what), y, &self.truth, self.allowed);
    }

    fn new_state(&self) -> State<T> {
        State::new(&self.plan, self.inputs.sizes.batch, self.inputs.sizes.kv_heads).unwrap()
    }

    /// A state that has seen only `range`, as if nothing came before.
    fn apart(&self, range: Range<usize>) -> State<T> {
        let mut state = self.new_state();
        let mut y = blank(self.inputs.sizes);
        feed(&self.plan, &mut state, &self.inputs, &self.fade, range, &mut y);
        state
    }

    /// That a state of the first tokens answers the rest as it must.
    #[track_caller]
    fn check_rest(&self, how: &str, mut state: State<T>, from: usize) {
        let s = self.inputs.sizes;
        for sequence in 0..s.batch {
            assert_eq!(state.position(sequence), from as u64, "{how}: {}", self.what);
        }
        let mut y = blank::<T>(s);
        feed(&self.plan, &mut state, &self.inputs, &self.fade, from..s.keys, &mut y);
        self.check(how, &self.with_truth_before(from, y));
    }

    /// The answers' own first tokens, so that only those from `from` on are compared.
    fn with_truth_before(&self, from: usize, mut y: Vec<T>) -> Vec<T> {
        let each = self.tokens() * self.truth.d_value;
        for (y, want) in y.chunks_mut(each).zip(self.truth.y.chunks(each)) {
            for (y, &want) in y[..from * self.truth.d_value].iter_mut().zip(want) {
                *y = T::from_f64(want);
            }
        }
        y
    }
}

fn sizes(tokens: usize) -> Sizes {
    Sizes { kv_heads: 2, group: 2, ..Sizes::self_attention(tokens, 3, 4) }
}

#[test]
fn every_split_in_two() {
    fn one<T: Real>(rng: &mut StdRng, setting: &Setting) {
        let case = Case::<T>::new(rng, setting, sizes(41));
        for cut in 0..=41 {
            let (state, y) = feed_in(&case.plan, &case.inputs, &case.fade, &[cut, 41 - cut]);
            case.check(&format!("cut at {cut}"), &y);
            assert_eq!(state.position(0), 41);
        }
    }
    let mut rng = rng();
    for setting in settings() {
        one::<f64>(&mut rng, &setting);
        one::<f32>(&mut rng, &setting);
    }
}

#[test]
fn any_split_in_many_and_single_steps() {
    fn one<T: Real>(rng: &mut StdRng, setting: &Setting) {
        let s = Sizes { batch: 2, ..sizes(90) };
        let case = Case::<T>::new(rng, setting, s);
        let mut splits = vec![vec![1; 90], vec![90], vec![33, 1, 1, 1, 0, 20, 1, 33]];
        for most in [3, 12, 40] {
            let (mut split, mut left) = (vec![], 90);
            while left > 0 {
                let n = rng.random_range(0..=most).min(left);
                split.push(n);
                left -= n;
            }
            splits.push(split);
        }
        for split in splits {
            let (state, y) = feed_in(&case.plan, &case.inputs, &case.fade, &split);
            case.check(&format!("{split:?}"), &y);
            assert_eq!(state.bytes(), case.new_state().bytes(), "its size never changes");
        }
        // One call without any state, in both forms.
        for form in [Form::Direct, Form::State] {
            let plan = plan_of(case.plan.spec(), Some(form));
            case.check(&format!("{form:?}"), &run(&plan, &case.inputs, &case.fade, true).0);
        }
    }
    let mut rng = rng();
    for setting in settings() {
        one::<f64>(&mut rng, &setting);
        one::<f32>(&mut rng, &setting);
    }
}

#[test]
fn steps_and_extensions_without_decay() {
    let mut rng = rng();
    for setting in settings().into_iter().filter(|setting| setting.decay == Decay::None) {
        let case = Case::<f64>::new(&mut rng, &setting, sizes(40));
        let (mut state, mut y) = (case.new_state(), blank::<f64>(case.inputs.sizes));
        let (s, mut from, mut inputs) = (case.inputs.sizes, 0, case.inputs.clone());
        inputs.mask = None;
        let truth = truth(case.plan.spec(), &inputs, &case.fade, true);
        use common::calls::{part, part_mut};
        for n in [1, 1, 9, 1, 1, 1, 20, 1, 1, 1, 1, 1, 1] {
            let (q, k, v) = (
                part(&inputs.q, s.q(), from, n),
                part(&inputs.k, s.k(), from, n),
                part(&inputs.v, s.v(), from, n),
            );
            let out = part_mut(&mut y, s.y(), from, n);
            match n {
                1 => case.plan.step(&mut state, q, k, v, out).unwrap(),
                _ => case.plan.extend(&mut state, q, k, v, out).unwrap(),
            };
            from += n;
        }
        assert_rows(&case.what, &y, &truth, case.allowed);
    }
}

/// Queries that see all of a past, and keys that come with them.
#[test]
fn full_calls_read_a_past() {
    let mut rng = rng();
    for setting in settings().into_iter().filter(|setting| setting.near == Near::None) {
        for (past, keys) in [(0, 20), (20, 20), (33, 40), (64, 65), (3, 5)] {
            let s = Sizes { batch: 2, queries: 9, keys, ..sizes(0) };
            let inputs = Inputs::<f64>::new(&mut rng, s).masked(&mut rng);
            let fade = Fade::new(&mut rng, setting.decay, s);
            let spec = setting.spec(s);
            let plan = plan_of(&spec, None);
            let mut state = State::new(&plan, 2, 2).unwrap();
            // The past comes with queries of its own, whose answers are of no interest here.
            let mut before = Inputs::new(&mut rng, Sizes { queries: keys, ..s });
            (before.k, before.v) = (inputs.k.clone(), inputs.v.clone());
            before.mask = inputs.mask.clone();
            let mut y = blank(before.sizes);
            for range in [0..past / 2, past / 2..past] {
                feed(&plan, &mut state, &before, &fade, range, &mut y);
            }
            let y = read_full(&plan, &mut state, &inputs, &fade, past);
            let allowed = setting.slack()[0] * 1e-12;
            let what = format!("{past} of {keys}, {setting:?}");
            assert_rows(&what, &y, &truth(&spec, &inputs, &fade, false), allowed);
            assert_eq!(state.position(1), keys as u64);
        }
    }
}

/// Where a past may be cut so that what follows can be made on its own.
fn legal(setting: &Setting, tokens: usize) -> Vec<usize> {
    let step = if setting.near == Near::None { 1 } else { setting.block };
    (0..=tokens).step_by(step).collect()
}

#[test]
fn merging_is_one_run_over_all() {
    fn one<T: Real>(rng: &mut StdRng, setting: &Setting) {
        let case = Case::<T>::new(rng, setting, Sizes { batch: 2, ..sizes(60) });
        for cut in legal(setting, 48) {
            // What follows a legal cut may end anywhere.
            let end = rng.random_range(cut..=48);
            let mut state = case.apart(0..cut);
            let size = state.bytes();
            state.merge(&case.apart(cut..end)).unwrap();
            assert_eq!(state.bytes(), size);
            case.check_rest(&format!("{cut} + {}", end - cut), state, end);
        }
    }
    let mut rng = rng();
    for setting in settings() {
        one::<f64>(&mut rng, &setting);
        one::<f32>(&mut rng, &setting);
    }
}

#[test]
fn merging_is_associative() {
    let mut rng = rng();
    for setting in settings() {
        let case = Case::<f64>::new(&mut rng, &setting, sizes(60));
        let cuts = legal(&setting, 48);
        for _ in 0..12 {
            let mut ends: [usize; 3] =
                std::array::from_fn(|_| cuts[rng.random_range(0..cuts.len())]);
            ends.sort_unstable();
            let [a, b, end] = ends;
            let parts = [0..a, a..b, b..end].map(|range| case.apart(range));
            let mut left = parts[0].fork();
            left.merge(&parts[1]).unwrap();
            left.merge(&parts[2]).unwrap();
            let mut tail = parts[1].fork();
            tail.merge(&parts[2]).unwrap();
            let mut right = parts[0].fork();
            right.merge(&tail).unwrap();
            let mut around = case.new_state();
            around.merge(&left).unwrap();
            for (how, state) in [("(a b) c", left), ("a (b c)", right), ("empty first", around)] {
                // Through a file: a merged state is one like any other.
                let state = State::from_bytes(&case.plan, &state.to_bytes(), "merged").unwrap();
                case.check_rest(&format!("{how} at {a}, {b}, {end}"), state, end);
            }
        }
    }
}

#[test]
fn a_cut_within_a_block_is_refused() {
    let mut rng = rng();
    for setting in settings().into_iter().filter(|setting| setting.near != Near::None) {
        if setting.block == 1 {
            continue;
        }
        let case = Case::<f64>::new(&mut rng, &setting, sizes(40));
        for cut in (1..30).filter(|cut| cut % setting.block != 0) {
            let mut state = case.apart(0..cut);
            let (before, next) = (state.to_bytes(), case.apart(cut..40));
            match state.merge(&next) {
                Err(error @ Error::State { field: "position", .. }) => {
                    assert!(error.to_string().contains(&cut.to_string()), "{error}");
                }
                other => panic!("cut at {cut}: {other:?}"),
            }
            assert!(state.to_bytes() == before, "it changed");
            // It goes on as before.
            case.check_rest("after a refusal", state, cut);
        }
    }
}

#[test]
fn forks_go_their_own_ways() {
    let mut rng = rng();
    for setting in settings() {
        let s = sizes(50);
        let ours = Case::<f64>::new(&mut rng, &setting, s);
        let mut theirs = Case::<f64>::new(&mut rng, &setting, s);
        let cut = rng.random_range(1..40);
        // Another sequence with the same beginning, and the same slopes.
        let same = |a: &[f64], b: &mut [f64], d: usize| {
            for (a, b) in a.chunks(50 * d).zip(b.chunks_mut(50 * d)) {
                b[..cut * d].copy_from_slice(&a[..cut * d]);
            }
        };
        same(&ours.inputs.q, &mut theirs.inputs.q, 3);
        same(&ours.inputs.k, &mut theirs.inputs.k, 3);
        same(&ours.inputs.v, &mut theirs.inputs.v, 4);
        theirs.inputs.mask = ours.inputs.mask.clone();
        match (&ours.fade, &mut theirs.fade) {
            (Fade::Gates { log_gates: a, .. }, Fade::Gates { log_gates: b, .. }) => {
                for (a, b) in a.chunks(50).zip(b.chunks_mut(50)) {
                    b[..cut].copy_from_slice(&a[..cut]);
                }
            }
            (a, b) => *b = a.clone(),
        }
        theirs.truth = truth(theirs.plan.spec(), &theirs.inputs, &theirs.fade, true);
        let state = ours.apart(0..cut);
        let before = state.to_bytes();
        let (one, other) = (state.fork(), state.fork());
        assert!(one.to_bytes() == before);
        ours.check_rest("ours", one, cut);
        theirs.check_rest("theirs", other, cut);
        assert!(state.to_bytes() == before, "a fork changed what it came from");
    }
}

/// Saved anywhere in a block and loaded again, a state goes on to the last bit as if it had not been.
#[test]
fn a_file_keeps_every_bit() {
    fn one<T: Real>(rng: &mut StdRng, setting: &Setting) {
        let case = Case::<T>::new(rng, setting, Sizes { batch: 2, ..sizes(45) });
        for cut in [0, 1, 2, 3, 5, 7, 8, 9, 11, 16, 17, 20, 23, 24, 31, 33] {
            let mut state = case.apart(0..cut);
            let file = state.to_bytes();
            let mut loaded = State::<T>::from_bytes(&case.plan, &file, "a state").unwrap();
            assert!(loaded.to_bytes() == file, "saved, loaded and saved again: {}", case.what);
            assert_eq!(loaded.position(1), cut as u64);
            let (mut y, mut z) = (blank::<T>(case.inputs.sizes), blank::<T>(case.inputs.sizes));
            // Steps and a longer call, so that everything is read in every way.
            for range in [cut..cut + 1, cut + 1..cut + 2, cut + 2..45] {
                feed(&case.plan, &mut state, &case.inputs, &case.fade, range.clone(), &mut y);
                feed(&case.plan, &mut loaded, &case.inputs, &case.fade, range, &mut z);
            }
            assert_eq!(bits(&y), bits(&z), "{cut} tokens: {}", case.what);
            assert!(loaded.to_bytes() == state.to_bytes());
            case.check("saved or not", &case.with_truth_before(cut, y));
        }
    }
    let mut rng = rng();
    for setting in settings() {
        one::<f64>(&mut rng, &setting);
        one::<f32>(&mut rng, &setting);
    }
}

/// Sequences that stand at different positions go on in one call.
#[test]
fn sequences_at_different_positions() {
    fn one<T: Real>(rng: &mut StdRng, setting: &Setting) {
        let rounds: Vec<Vec<usize>> = vec![
            vec![3, 0, 17, 8],
            vec![1, 1, 1, 1],
            vec![0, 9, 1, 8],
            vec![1, 1, 1, 1],
            vec![20, 0, 0, 1],
            vec![5, 6, 7, 30],
        ];
        let lengths: Vec<usize> =
            (0..4).map(|i| rounds.iter().map(|round| round[i]).sum()).collect();
        let cases: Vec<Case<T>> =
            lengths.iter().map(|&n| Case::new(rng, setting, sizes(n))).collect();
        let slopes = cases[0].fade.clone();
        let all: Vec<(Inputs<T>, Fade)> = cases
            .iter()
            .map(|case| match setting.decay {
                Decay::Gates => (case.inputs.clone(), case.fade.clone()),
                _ => (case.inputs.clone(), slopes.clone()),
            })
            .collect();
        let plan = &cases[0].plan;
        let mut state = State::<T>::new(plan, 4, 2).unwrap();
        let mut y: Vec<Vec<T>> = all.iter().map(|(inputs, _)| blank(inputs.sizes)).collect();
        let mut seen = vec![0; 4];
        for round in &rounds {
            run_packed(plan, Some(&mut state), &all, &seen, round, &mut y);
            seen.iter_mut().zip(round).for_each(|(seen, n)| *seen += n);
        }
        for (i, (inputs, fade)) in all.iter().enumerate() {
            assert_eq!(state.position(i), lengths[i] as u64);
            let truth = truth(plan.spec(), inputs, fade, true);
            let what = format!("sequence {i}: {}", cases[i].what);
            assert_rows(&what, &y[i], &truth, cases[0].allowed);
        }
    }
    let mut rng = rng();
    for setting in settings() {
        one::<f64>(&mut rng, &setting);
        one::<f32>(&mut rng, &setting);
    }
}
