//! Random calls against the oracle: sizes, layouts, masks, packed lengths, splits, threads and
//! instruction sets, all at once.

mod common;

use std::sync::OnceLock;

use common::{Inputs, Sizes, assert_close};
use proptest::prelude::*;
use proptest::test_runner::Config;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sata::{Call, Form, Level, Plan, Series, Spec, State, View, ViewMut};

/// Relative RMS error allowed of f64.
const TOLERANCE: f64 = 1e-10;

/// `PROPTEST_CASES` asks for more.
fn config(cases: u32) -> Config {
    let default = Config::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { cases };
    Config { cases, failure_persistence: None, ..default }
}

/// What weighs: never negative, so that no denominator comes close to 0 by cancellation.
#[derive(Clone, Debug)]
struct Weighing {
    series: Series,
    terms: usize,
}

fn weighing() -> impl Strategy<Value = Weighing> {
    let fixed = vec![0.5, 0.0, 0.25, 0.0, 0.125];
    prop_oneof![
        (0usize..3).prop_map(|i| Weighing { series: Series::Taylor, terms: 2 * i + 1 }),
        (1usize..3).prop_map(|i| Weighing { series: Series::power(2 * i), terms: 2 * i + 1 }),
        Just(Weighing { series: Series::Fixed { coefficients: fixed }, terms: 5 }),
    ]
}

/// How a plan is made and where it runs.
#[derive(Clone, Copy, Debug)]
struct Machine {
    form: Option<Form>,
    level: Level,
    threads: usize,
}

fn machine() -> impl Strategy<Value = Machine> {
    let form = prop_oneof![Just(None), Just(Some(Form::Direct)), Just(Some(Form::State))];
    let level = prop::sample::select(Level::available());
    (form, level, 1usize..=3).prop_map(|(form, level, threads)| Machine { form, level, threads })
}

impl Machine {
    fn plan(&self, d_key: usize, d_value: usize, weighing: &Weighing, block: usize) -> Plan {
        let mut spec = Spec::new(d_key, d_value).series(weighing.series.clone()).block(block);
        if weighing.series == Series::Taylor {
            spec = spec.terms(weighing.terms);
        }
        let plan = Plan::with_level(&spec.build().unwrap(), self.level).unwrap();
        match self.form {
            Some(form) => plan.with_form(form),
            None => plan,
        }
    }

    fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        static POOLS: [OnceLock<rayon::ThreadPool>; 3] = [const { OnceLock::new() }; 3];
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        POOLS[self.threads - 1].get_or_init(|| pool(self.threads)).install(f)
    }
}

/// How a tensor lies in memory: which dimension is innermost, next, outermost, and gaps.
#[derive(Clone, Copy, Debug)]
struct Layout {
    order: [usize; 3],
    gaps: [usize; 3],
}

fn layout() -> impl Strategy<Value = Layout> {
    let orders = vec![[2, 1, 0], [2, 0, 1], [1, 2, 0], [1, 0, 2], [0, 1, 2], [0, 2, 1]];
    let gaps = prop_oneof![Just([0; 3]), [0usize..4, 0..4, 0..4]];
    (prop::sample::select(orders), gaps).prop_map(|(order, gaps)| Layout { order, gaps })
}

impl Layout {
    fn strides(&self, shape: [usize; 4]) -> [usize; 3] {
        let mut strides = [0; 3];
        let mut next = shape[3] + self.gaps[0];
        for (place, &dim) in self.order.iter().enumerate() {
            strides[dim] = next;
            next = next * shape[dim].max(1) + self.gaps[place];
        }
        strides
    }

    /// Memory that holds the tensor, `gap` between its rows.
    fn scatter(&self, dense: &[f64], shape: [usize; 4], gap: f64) -> Vec<f64> {
        let strides = self.strides(shape);
        let len = (0..3).map(|i| shape[i].saturating_sub(1) * strides[i]).sum::<usize>() + shape[3];
        let mut out = vec![gap; len];
        for (row, at) in rows(shape, strides).enumerate() {
            out[at..at + shape[3]].copy_from_slice(&dense[row * shape[3]..(row + 1) * shape[3]]);
        }
        out
    }

    /// The tensor, and what is left of the memory around it.
    fn gather(&self, memory: &[f64], shape: [usize; 4]) -> (Vec<f64>, Vec<f64>) {
        let mut memory: Vec<Option<f64>> = memory.iter().map(|&x| Some(x)).collect();
        let mut dense = vec![];
        for at in rows(shape, self.strides(shape)) {
            dense.extend(memory[at..at + shape[3]].iter_mut().map(|x| x.take().unwrap()));
        }
        (dense, memory.into_iter().flatten().collect())
    }
}

/// Where each row begins, in the order batch, head, token.
fn rows(shape: [usize; 4], strides: [usize; 3]) -> impl Iterator<Item = usize> {
    let [batch, heads, tokens, _] = shape;
    (0..batch * heads * tokens).map(move |row| {
        let place = [row / (heads * tokens), row / tokens % heads, row % tokens];
        (0..3).map(|i| place[i] * strides[i]).sum()
    })
}

/// Counts of tokens, few and none among them.
fn tokens(most: usize) -> impl Strategy<Value = usize> {
    prop_oneof![1 => Just(0), 1 => 1usize..4, 4 => 0..most]
}

/// One call without a state.
#[derive(Clone, Debug)]
struct Case {
    sizes: Sizes,
    /// Queries and keys of each sequence of a batch of one.
    packed: Option<Vec<[usize; 2]>>,
    causal: bool,
    masked: bool,
    weighing: Weighing,
    machine: Machine,
    block: usize,
    layouts: [Layout; 4],
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let heads = (1usize..=3, 1usize..=3, 1usize..=3);
    let counts = (tokens(150), tokens(150));
    let packed = prop::collection::vec([tokens(60), tokens(60)], 1..5);
    let packed = prop::option::of(packed);
    let layouts = [layout(), layout(), layout(), layout()];
    (
        (heads, counts, 1usize..=12, 1usize..=20, packed, any::<[bool; 2]>()),
        (weighing(), machine(), 1usize..80, layouts, any::<u64>()),
    )
        .prop_map(|(what, how)| {
            let ((batch, kv_heads, group), (queries, keys), d_key, d_value, packed, flags) = what;
            let (weighing, machine, block, layouts, seed) = how;
            let [causal, masked] = flags;
            let mut sizes = Sizes { batch, kv_heads, group, queries, keys, d_key, d_value };
            let mut packed = packed;
            for lengths in packed.iter_mut().flatten() {
                lengths[1] = if causal { lengths[0] } else { lengths[1] };
            }
            if let Some(packed) = &packed {
                sizes.batch = 1;
                sizes.queries = packed.iter().map(|lengths| lengths[0]).sum();
                sizes.keys = packed.iter().map(|lengths| lengths[1]).sum();
            } else if causal {
                sizes.keys = queries;
            }
            Case { sizes, packed, causal, masked, weighing, machine, block, layouts, seed }
        })
}

/// The oracle's outputs of some queries of one batch row over some of its keys, NaN where a query
/// sees no key.
fn oracle(
    inputs: &Inputs<f64>,
    batch: usize,
    queries: std::ops::Range<usize>,
    keys: std::ops::Range<usize>,
    weighing: &Weighing,
    causal: bool,
) -> Vec<f64> {
    let s = inputs.sizes;
    let cut = |x: &[f64], heads: usize, tokens: usize, d: usize, part: &std::ops::Range<usize>| {
        let row = |head| ((batch * heads + head) * tokens + part.start) * d;
        (0..heads).flat_map(|head| x[row(head)..][..part.len() * d].to_vec()).collect()
    };
    let sizes = Sizes { batch: 1, queries: queries.len(), keys: keys.len(), ..s };
    let part = Inputs {
        sizes,
        q: cut(&inputs.q, s.kv_heads * s.group, s.queries, s.d_key, &queries),
        k: cut(&inputs.k, s.kv_heads, s.keys, s.d_key, &keys),
        v: cut(&inputs.v, s.kv_heads, s.keys, s.d_value, &keys),
        mask: inputs
            .mask
            .as_ref()
            .map(|mask| mask[batch * s.keys + keys.start..batch * s.keys + keys.end].to_vec()),
    };
    if queries.is_empty() || keys.is_empty() {
        return vec![f64::NAN; sizes.y().iter().product()];
    }
    part.oracle(weighing.terms, &weighing.series, causal)
}

/// `NaN` in the same places, and close everywhere else; gives the number of rows that are NaN.
fn check(what: &str, got: &[f64], want: &[f64], d_value: usize) -> usize {
    assert_eq!(got.len(), want.len());
    let (mut g, mut w, mut nan) = (vec![], vec![], 0);
    for (got, want) in got.chunks(d_value).zip(want.chunks(d_value)) {
        if want.iter().any(|x| x.is_nan()) {
            assert!(got.iter().all(|x| x.is_nan()), "{what}: {got:?} of a query that sees no key");
            nan += 1;
        } else {
            g.extend_from_slice(got);
            w.extend_from_slice(want);
        }
    }
    if !w.is_empty() {
        assert_close(what, &g, &w, TOLERANCE);
    }
    nan
}

fn random(rng: &mut StdRng, sizes: Sizes, masked: bool) -> Inputs<f64> {
    let mut inputs = Inputs::<f64>::new(rng, sizes);
    if masked {
        inputs.mask = Some((0..sizes.batch * sizes.keys).map(|_| rng.random_bool(0.6)).collect());
    }
    inputs
}

fn one_call(case: &Case) {
    let s = case.sizes;
    let inputs = random(&mut StdRng::seed_from_u64(case.seed), s, case.masked);
    let plan = case.machine.plan(s.d_key, s.d_value, &case.weighing, case.block);
    let [lq, lk, lv, ly] = case.layouts;
    // What lies between rows must be neither read nor written.
    let q = lq.scatter(&inputs.q, s.q(), f64::NAN);
    let k = lk.scatter(&inputs.k, s.k(), f64::NAN);
    let v = lv.scatter(&inputs.v, s.v(), f64::NAN);
    let dense = vec![1e300; s.y().iter().product()];
    let mut y = ly.scatter(&dense, s.y(), -7.0);
    let (q, k, v) = (
        View::strided(&q, s.q(), lq.strides(s.q())).unwrap(),
        View::strided(&k, s.k(), lk.strides(s.k())).unwrap(),
        View::strided(&v, s.v(), lv.strides(s.v())).unwrap(),
    );
    let sums = |i: usize| -> Vec<usize> {
        let lengths = case.packed.iter().flatten().map(|lengths| lengths[i]);
        std::iter::once(0)
            .chain(lengths.scan(0, |sum, n| {
                *sum += n;
                Some(*sum)
            }))
            .collect()
    };
    let (cu_queries, cu_keys) = (sums(0), sums(1));
    let mut call = if case.causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
    if let Some(mask) = &inputs.mask {
        call = call.key_mask(mask);
    }
    if case.packed.is_some() {
        call = call.packed(&cu_queries, &cu_keys);
    }
    let out = ViewMut::strided(&mut y, s.y(), ly.strides(s.y())).unwrap();
    let found = case.machine.install(|| plan.run(call, out)).unwrap();
    let (y, around) = ly.gather(&y, s.y());
    assert!(around.iter().all(|&x| x == -7.0), "written between rows");
    let mut nan = 0;
    let heads = s.kv_heads * s.group;
    if case.packed.is_some() {
        for (q, k) in cu_queries.windows(2).zip(cu_keys.windows(2)) {
            let want = oracle(&inputs, 0, q[0]..q[1], k[0]..k[1], &case.weighing, case.causal);
            let part = |head: usize| {
                &y[(head * s.queries + q[0]) * s.d_value..(head * s.queries + q[1]) * s.d_value]
            };
            let got: Vec<f64> = (0..heads).flat_map(|head| part(head).to_vec()).collect();
            nan += check("packed", &got, &want, s.d_value);
        }
    } else {
        let each = heads * s.queries * s.d_value;
        for batch in 0..s.batch {
            let want = oracle(&inputs, batch, 0..s.queries, 0..s.keys, &case.weighing, case.causal);
            nan += check("batch", &y[batch * each..(batch + 1) * each], &want, s.d_value);
        }
    }
    assert_eq!(found.queries, (s.batch * heads * s.queries) as u64);
    assert_eq!((found.non_positive, found.non_finite), (nan as u64, 0));
}

/// One past, made in several ways.
#[derive(Clone, Debug)]
struct Past {
    sizes: Sizes,
    masked: bool,
    weighing: Weighing,
    machine: Machine,
    block: usize,
    /// Tokens per call; what is left comes in a last one.
    parts: Vec<usize>,
    /// Where states made apart are merged; and after the first, one goes through a file.
    cuts: [usize; 2],
    /// Keys that come with the queries that read the past in the end.
    more: usize,
    seed: u64,
}

fn past() -> impl Strategy<Value = Past> {
    let part = prop_oneof![Just(1usize), 0usize..8, 0usize..100];
    (
        (1usize..=2, 1usize..=2, 1usize..=3, tokens(150), 1usize..=40),
        (1usize..=12, 1usize..=20, any::<bool>(), weighing(), machine(), 1usize..80),
        (
            prop::collection::vec(part, 0..12),
            any::<[prop::sample::Index; 2]>(),
            0usize..20,
            any::<u64>(),
        ),
    )
        .prop_map(|(counts, how, rest)| {
            let (batch, kv_heads, group, tokens, queries) = counts;
            let (d_key, d_value, masked, weighing, machine, block) = how;
            let (parts, cuts, more, seed) = rest;
            let sizes = Sizes { batch, kv_heads, group, queries, keys: tokens, d_key, d_value };
            let cuts = cuts.map(|cut| cut.index(tokens + 1));
            Past { sizes, masked, weighing, machine, block, parts, cuts, more, seed }
        })
}

/// `n` tokens from token `from` on, where they lie among `tokens`.
fn part<'a>(x: &'a [f64], shape: [usize; 4], from: usize, n: usize) -> View<'a, f64> {
    let [batch, heads, tokens, d] = shape;
    let strides = [heads * tokens * d, tokens * d, d];
    View::strided(&x[(from * d).min(x.len())..], [batch, heads, n, d], strides).unwrap()
}

impl Past {
    fn plan(&self) -> Plan {
        self.machine.plan(self.sizes.d_key, self.sizes.d_value, &self.weighing, self.block)
    }

    /// Tokens `from .. to` of every sequence go through the state.
    fn extend(
        &self,
        inputs: &Inputs<f64>,
        state: &mut State<f64>,
        [from, to]: [usize; 2],
        y: &mut [f64],
    ) {
        let s = inputs.sizes;
        let n = to - from;
        let mask: Option<Vec<bool>> = inputs.mask.as_ref().map(|mask| {
            (0..s.batch).flat_map(|b| mask[b * s.keys + from..b * s.keys + to].to_vec()).collect()
        });
        let mut call = Call::causal(
            part(&inputs.q, s.q(), from, n),
            part(&inputs.k, s.k(), from, n),
            part(&inputs.v, s.v(), from, n),
        );
        if let Some(mask) = &mask {
            call = call.key_mask(mask);
        }
        let [batch, heads, tokens, d] = s.y();
        let at = (from * d).min(y.len());
        let strides = [heads * tokens * d, tokens * d, d];
        let out = ViewMut::strided(&mut y[at..], [batch, heads, n, d], strides).unwrap();
        let plan = self.plan();
        self.machine.install(|| plan.run(call.state(state), out)).unwrap();
    }

    /// Queries that read all of the state's past and some new keys; a state of `made` must answer
    /// as the oracle does.
    fn read(&self, inputs: &Inputs<f64>, new: &Inputs<f64>, mut state: State<f64>, what: &str) {
        let (old, s) = (inputs.sizes, new.sizes);
        let mut y = vec![1e300; s.y().iter().product()];
        let mut call = Call::full(new.q(), new.k(), new.v());
        if let Some(mask) = &new.mask {
            call = call.key_mask(mask);
        }
        let plan = self.plan();
        let out = ViewMut::new(&mut y, s.y()).unwrap();
        self.machine.install(|| plan.run(call.state(&mut state), out)).unwrap();
        assert!((0..s.batch).all(|b| state.position(b) == (old.keys + s.keys) as u64));
        let joined = |a: &[f64], b: &[f64], d: usize| -> Vec<f64> {
            (0..s.batch * s.kv_heads)
                .flat_map(|row| {
                    let (na, nb) = (old.keys * d, s.keys * d);
                    [&a[row * na..(row + 1) * na], &b[row * nb..(row + 1) * nb]].concat()
                })
                .collect()
        };
        let all = Inputs {
            sizes: Sizes { keys: old.keys + s.keys, ..s },
            q: new.q.clone(),
            k: joined(&inputs.k, &new.k, s.d_key),
            v: joined(&inputs.v, &new.v, s.d_value),
            mask: inputs.mask.as_ref().zip(new.mask.as_ref()).map(|(a, b)| {
                let row = |x: &[bool], n: usize, i: usize| x[i * n..(i + 1) * n].to_vec();
                (0..s.batch)
                    .flat_map(|i| [row(a, old.keys, i), row(b, s.keys, i)].concat())
                    .collect()
            }),
        };
        let each = y.len() / s.batch;
        for batch in 0..s.batch {
            let want = oracle(&all, batch, 0..s.queries, 0..all.sizes.keys, &self.weighing, false);
            check(what, &y[batch * each..(batch + 1) * each], &want, s.d_value);
        }
    }

    fn check(&self) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let tokens = self.sizes.keys;
        let s = Sizes { queries: tokens, ..self.sizes };
        let inputs = random(&mut rng, s, self.masked);
        let new = random(&mut rng, Sizes { keys: self.more, ..self.sizes }, self.masked);
        let mut cuts = self.cuts;
        cuts.sort_unstable();

        // In parts, once through a file.
        let plan = self.plan();
        let mut state = State::new(&plan, s.batch, s.kv_heads).unwrap();
        let bytes = state.bytes();
        let mut y = vec![1e300; s.y().iter().product()];
        let (mut from, mut saved) = (0, false);
        for n in self.parts.iter().copied().chain([tokens]) {
            let to = (from + n).min(tokens);
            self.extend(&inputs, &mut state, [from, to], &mut y);
            from = to;
            if from >= cuts[0] && !saved {
                state = State::from_bytes(&plan, &state.to_bytes(), "a state").unwrap();
                saved = true;
            }
        }
        assert_eq!(state.bytes(), bytes);
        let each = y.len() / s.batch;
        for batch in 0..s.batch {
            let want = oracle(&inputs, batch, 0..tokens, 0..tokens, &self.weighing, true);
            check("in parts", &y[batch * each..(batch + 1) * each], &want, s.d_value);
        }

        // Apart, and merged.
        let apart = |range: [usize; 2]| {
            let mut state = State::new(&plan, s.batch, s.kv_heads).unwrap();
            self.extend(&inputs, &mut state, range, &mut vec![0.0; y.len()]);
            state
        };
        let (a, b, c) = (apart([0, cuts[0]]), apart(cuts), apart([cuts[1], tokens]));
        let mut left = a.fork();
        left.merge(&b).unwrap();
        left.merge(&c).unwrap();
        let mut right = b;
        right.merge(&c).unwrap();
        let mut whole = a;
        whole.merge(&right).unwrap();
        for (what, state) in [("read", state), ("merged left", left), ("merged right", whole)] {
            self.read(&inputs, &new, state, what);
        }
    }
}

/// Sequences of their own lengths, packed, call after call.
#[derive(Clone, Debug)]
struct Ragged {
    sizes: Sizes,
    weighing: Weighing,
    machine: Machine,
    block: usize,
    /// Tokens of each sequence in each call.
    rounds: Vec<Vec<usize>>,
    masked: bool,
    seed: u64,
}

fn ragged() -> impl Strategy<Value = Ragged> {
    let rounds = (1usize..=4).prop_flat_map(|sequences| {
        let few = prop::collection::vec(0usize..2, sequences);
        let many = prop::collection::vec(tokens(40), sequences);
        prop::collection::vec(prop_oneof![few, many], 1..6)
    });
    let sizes = (1usize..=2, 1usize..=3, 1usize..=8, 1usize..=12);
    (sizes, weighing(), machine(), 1usize..40, rounds, any::<bool>(), any::<u64>()).prop_map(
        |((kv_heads, group, d_key, d_value), weighing, machine, block, rounds, masked, seed)| {
            let sizes = Sizes { batch: 1, kv_heads, group, queries: 0, keys: 0, d_key, d_value };
            Ragged { sizes, weighing, machine, block, rounds, masked, seed }
        },
    )
}

impl Ragged {
    fn check(&self) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let s = self.sizes;
        let plan = self.machine.plan(s.d_key, s.d_value, &self.weighing, self.block);
        let sequences = self.rounds[0].len();
        let lengths: Vec<usize> =
            (0..sequences).map(|i| self.rounds.iter().map(|round| round[i]).sum()).collect();
        let all: Vec<Inputs<f64>> = lengths
            .iter()
            .map(|&n| random(&mut rng, Sizes { queries: n, keys: n, ..s }, self.masked))
            .collect();
        let want: Vec<Vec<f64>> = all
            .iter()
            .zip(&lengths)
            .map(|(inputs, &n)| oracle(inputs, 0, 0..n, 0..n, &self.weighing, true))
            .collect();
        let mut got: Vec<Vec<f64>> = want.iter().map(|want| vec![1e300; want.len()]).collect();
        let mut seen = vec![0; sequences];
        let mut state = State::new(&plan, sequences, s.kv_heads).unwrap();
        for round in &self.rounds {
            let total: usize = round.iter().sum();
            // Each head's tokens of this round, sequence after sequence.
            let packed = |of: fn(&Inputs<f64>) -> &[f64], heads: usize, d: usize| -> Vec<f64> {
                (0..heads)
                    .flat_map(|head| (0..sequences).map(move |i| (head, i)))
                    .flat_map(|(head, i)| {
                        let from = (head * lengths[i] + seen[i]) * d;
                        of(&all[i])[from..from + round[i] * d].to_vec()
                    })
                    .collect()
            };
            let heads = s.kv_heads * s.group;
            let q = packed(|x| &x.q, heads, s.d_key);
            let k = packed(|x| &x.k, s.kv_heads, s.d_key);
            let v = packed(|x| &x.v, s.kv_heads, s.d_value);
            let mask: Vec<bool> = (0..sequences)
                .flat_map(|i| {
                    let of = |mask: &Vec<bool>| mask[seen[i]..seen[i] + round[i]].to_vec();
                    all[i].mask.as_ref().map_or(vec![true; round[i]], of)
                })
                .collect();
            let mut cu = vec![0];
            round.iter().for_each(|n| cu.push(cu[cu.len() - 1] + n));
            let mut call = Call::causal(
                View::new(&q, [1, heads, total, s.d_key]).unwrap(),
                View::new(&k, [1, s.kv_heads, total, s.d_key]).unwrap(),
                View::new(&v, [1, s.kv_heads, total, s.d_value]).unwrap(),
            )
            .packed(&cu, &cu)
            .state(&mut state);
            if self.masked {
                call = call.key_mask(&mask);
            }
            let mut y = vec![1e300; heads * total * s.d_value];
            let out = ViewMut::new(&mut y, [1, heads, total, s.d_value]).unwrap();
            self.machine.install(|| plan.run(call, out)).unwrap();
            for (i, &n) in round.iter().enumerate() {
                for head in 0..heads {
                    let from = (head * total + cu[i]) * s.d_value;
                    let to = (head * lengths[i] + seen[i]) * s.d_value;
                    got[i][to..to + n * s.d_value].copy_from_slice(&y[from..from + n * s.d_value]);
                }
                seen[i] += n;
            }
        }
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(state.position(i), lengths[i] as u64);
            check("ragged", got, want, s.d_value);
        }
    }
}

proptest! {
    #![proptest_config(config(800))]

    #[test]
    fn calls_are_as_the_oracle_has_them(case in case()) {
        one_call(&case);
    }

    #[test]
    fn pasts_are_as_the_oracle_has_them(past in past()) {
        past.check();
    }

    #[test]
    fn packed_pasts_are_as_the_oracle_has_them(ragged in ragged()) {
        ragged.check();
    }
}
