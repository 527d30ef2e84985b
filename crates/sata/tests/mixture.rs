//! Everything at once, at random: specs, sizes, masks, splits, files and merges against the oracle.

mod common;

use std::sync::OnceLock;

use common::calls::{blank, feed, read_full, run};
use common::packed::run_packed;
use common::settings::{Setting, slack};
use common::truth::{Truth, assert_rows, truth};
use common::{Fade, Inputs, Sizes};
use proptest::prelude::*;
use proptest::test_runner::Config;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sata::{Centre, Decay, Form, Level, Near, Plan, Series, State};

/// `PROPTEST_CASES` asks for more.
fn config(cases: u32) -> Config {
    let default = Config::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { cases };
    Config { cases, failure_persistence: None, ..default }
}

fn series() -> impl Strategy<Value = (Series, usize)> {
    let fixed = prop_oneof![
        Just(vec![0.5, 0.0, 0.25, 0.0, 0.125]),
        Just(vec![0.3]),
        Just(vec![1.0, -0.2, 0.6]),
        Just(vec![0.0, 0.0, 1.0]),
    ];
    let tau = prop_oneof![Just(0.9), Just(0.0), 0.0..1.2f64];
    prop_oneof![
        (1usize..=5).prop_map(|terms| (Series::Taylor, terms)),
        (1usize..=4).prop_map(|half| (Series::Gauss, 2 * half)),
        (tau, 1usize..=6).prop_map(|(tau, terms)| (Series::Hermite { tau }, terms)),
        (1usize..=2).prop_map(|half| (Series::power(2 * half), 2 * half + 1)),
        fixed.prop_map(|coefficients| {
            let terms = coefficients.len();
            (Series::Fixed { coefficients }, terms)
        }),
    ]
}

fn setting() -> impl Strategy<Value = Setting> {
    let near = prop_oneof![2 => Just(Near::None), 3 => (0usize..4).prop_map(Near::Blocks)];
    let block = prop_oneof![1usize..5, 1usize..20, Just(16), Just(64)];
    let sinks = prop_oneof![3 => Just(0), 2 => 1usize..6, 1 => 1usize..80];
    let decay = prop::sample::select(vec![Decay::None, Decay::Slopes, Decay::Gates]);
    (series(), near, block, sinks, decay).prop_map(
        |((series, terms), near, block, sinks, decay)| Setting {
            series,
            terms,
            near,
            block,
            sinks,
            decay,
        },
    )
}

/// One sequence of calls.
#[derive(Clone, Debug)]
struct Mixture {
    setting: Setting,
    sizes: Sizes,
    scale: Option<f64>,
    masked: bool,
    form: Option<Form>,
    level: Level,
    threads: usize,
    /// Tokens per call; what is left comes in a last one.
    lengths: Vec<usize>,
    /// After which call the state goes through a file.
    saved: usize,
    /// Where the sequence is cut in two that are merged; moved to the block before it.
    cut: prop::sample::Index,
    centred: bool,
    seed: u64,
}

fn mixture() -> impl Strategy<Value = Mixture> {
    let sizes = (1usize..=2, 1usize..=2, 1usize..=3, 1usize..=4, 1usize..=9);
    let tokens = prop_oneof![1usize..8, 1usize..120, Just(64), Just(65)];
    let form = prop_oneof![Just(None), Just(Some(Form::Direct)), Just(Some(Form::State))];
    let lengths = prop_oneof![
        Just(vec![]),
        Just(vec![1; 100]),
        prop::collection::vec(prop_oneof![Just(1usize), 0usize..8, 0usize..70], 0..10),
    ];
    let scale = prop::option::of(-0.7..0.7f64);
    (
        (setting(), sizes, tokens, scale, any::<[bool; 2]>()),
        (form, prop::sample::select(Level::available()), lengths, 0usize..6, 1usize..=3),
        (any::<prop::sample::Index>(), any::<u64>()),
    )
        .prop_map(|(what, how, (cut, seed))| {
            let (setting, (batch, kv_heads, group, d_key, d_value), tokens, scale, flags) = what;
            let (form, level, lengths, saved, threads) = how;
            let sizes =
                Sizes { batch, kv_heads, group, queries: tokens, keys: tokens, d_key, d_value };
            let [masked, centred] = flags;
            Mixture {
                setting,
                sizes,
                scale,
                masked,
                form,
                level,
                threads,
                lengths,
                saved,
                cut,
                centred,
                seed,
            }
        })
}

impl Mixture {
    /// Orders that leave none out can be centred.
    fn new_state(&self, plan: &Plan, inputs: &Inputs<f64>) -> State<f64> {
        let (s, orders) = (self.sizes, plan.spec().orders());
        if self.centred && orders.iter().enumerate().all(|(i, &p)| i == p) {
            let centre = Centre::mean(inputs.k(), inputs.v()).unwrap();
            State::centred(plan, s.batch, s.kv_heads, centre).unwrap()
        } else {
            State::new(plan, s.batch, s.kv_heads).unwrap()
        }
    }

    fn check(&self) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let (setting, s) = (&self.setting, self.sizes);
        let mut builder = common::calls::spec(s, &setting.series, setting.terms)
            .near(setting.near)
            .block(setting.block)
            .sinks(setting.sinks)
            .decay(setting.decay);
        if let Some(scale) = self.scale {
            builder = builder.scale(scale);
        }
        let spec = builder.build().unwrap();
        let mut plan = Plan::with_level(&spec, self.level).unwrap();
        if let Some(form) = self.form {
            plan = plan.with_form(form);
        }
        let mut inputs = Inputs::<f64>::new(&mut rng, s);
        if self.masked {
            // Any key may be hidden, the first and all of them too.
            inputs.mask = Some((0..s.batch * s.keys).map(|_| rng.random_bool(0.7)).collect());
        }
        let fade = Fade::new(&mut rng, setting.decay, s);
        let causal = truth(&spec, &inputs, &fade, true);
        // A tenfold margin over the tests of one thing at a time.
        let allowed = 1e-11 * slack(&setting.series, setting.terms, setting.decay)[0];

        let (y, found) = run(&plan, &inputs, &fade, true);
        assert_rows("one call", &y, &causal, allowed);
        assert_eq!(found.queries, causal.denominators.len() as u64);

        // Call by call, once through a file.
        let mut state = self.new_state(&plan, &inputs);
        let (mut y, mut from) = (blank(s), 0);
        for (i, &n) in self.lengths.iter().chain([&s.keys]).enumerate() {
            let to = (from + n).min(s.keys);
            feed(&plan, &mut state, &inputs, &fade, from..to, &mut y);
            from = to;
            if i == self.saved {
                state = State::from_bytes(&plan, &state.to_bytes(), "a state").unwrap();
            }
        }
        assert_rows("call by call", &y, &causal, allowed);
        assert!((0..s.batch).all(|b| state.position(b) == s.keys as u64));

        // Apart and merged: the second half goes on where the merged state ends.
        let mut cut = self.cut.index(s.keys + 1);
        if setting.near != Near::None {
            cut -= cut % setting.block;
        }
        let end = rng.random_range(cut..=s.keys);
        let mut made = [0..cut, cut..end].map(|range| {
            let mut state = self.new_state(&plan, &inputs);
            feed(&plan, &mut state, &inputs, &fade, range, &mut blank(s));
            state
        });
        let [first, second] = &mut made;
        first.merge(second).unwrap();
        let mut rest = y.clone();
        feed(&plan, first, &inputs, &fade, end..s.keys, &mut rest);
        assert_rows(&format!("merged {cut} + {}", end - cut), &rest, &causal, allowed);

        if setting.near == Near::None {
            self.check_full(&mut rng, &plan, &inputs, &fade, end, allowed);
        }
    }

    /// Queries of their own that read a past, and the keys that come with them.
    fn check_full(
        &self,
        rng: &mut StdRng,
        plan: &Plan,
        inputs: &Inputs<f64>,
        fade: &Fade,
        past: usize,
        allowed: f64,
    ) {
        let queries = rng.random_range(1..20);
        let s = Sizes { queries, ..self.sizes };
        let mut asked = Inputs::new(rng, s);
        (asked.k, asked.v) = (inputs.k.clone(), inputs.v.clone());
        asked.mask = inputs.mask.clone();
        let want: Truth = truth(plan.spec(), &asked, fade, false);
        assert_rows("full", &run(plan, &asked, fade, false).0, &want, allowed);
        let mut state = self.new_state(plan, inputs);
        feed(plan, &mut state, inputs, fade, 0..past, &mut blank(inputs.sizes));
        let y = read_full(plan, &mut state, &asked, fade, past);
        assert_rows(&format!("full after {past}"), &y, &want, allowed);
    }
}

/// Runs `f` on so many threads.
fn on_threads(threads: usize, f: impl FnOnce() + Send) {
    static POOLS: [OnceLock<rayon::ThreadPool>; 3] = [const { OnceLock::new() }; 3];
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    POOLS[threads - 1].get_or_init(|| pool(threads)).install(f);
}

/// Sequences of their own lengths, side by side, call after call.
#[derive(Clone, Debug)]
struct Ragged {
    setting: Setting,
    sizes: Sizes,
    /// Tokens of each sequence in each call.
    rounds: Vec<Vec<usize>>,
    threads: usize,
    seed: u64,
}

fn ragged() -> impl Strategy<Value = Ragged> {
    let rounds = (1usize..=4).prop_flat_map(|sequences| {
        let few = prop::collection::vec(0usize..2, sequences);
        let many = prop::collection::vec(0usize..40, sequences);
        prop::collection::vec(prop_oneof![few, many], 1..6)
    });
    let sizes = (1usize..=2, 1usize..=3, 1usize..=4, 1usize..=9);
    (setting(), sizes, rounds, 1usize..=3, any::<u64>()).prop_map(
        |(setting, (kv_heads, group, d_key, d_value), rounds, threads, seed)| {
            let sizes = Sizes { kv_heads, group, ..Sizes::self_attention(0, d_key, d_value) };
            Ragged { setting, sizes, rounds, threads, seed }
        },
    )
}

impl Ragged {
    fn check(&self) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let (setting, s, sequences) = (&self.setting, self.sizes, self.rounds[0].len());
        let plan = Plan::new(&setting.spec(s)).unwrap();
        let slopes = Fade::new(&mut rng, Decay::Slopes, s);
        let all: Vec<(Inputs<f64>, Fade)> = (0..sequences)
            .map(|i| {
                let n = self.rounds.iter().map(|round| round[i]).sum();
                let sizes = Sizes { queries: n, keys: n, ..s };
                let inputs = Inputs::new(&mut rng, sizes).masked(&mut rng);
                match setting.decay {
                    Decay::Slopes => (inputs, slopes.clone()),
                    decay => (inputs, Fade::new(&mut rng, decay, sizes)),
                }
            })
            .collect();
        let mut state = State::new(&plan, sequences, s.kv_heads).unwrap();
        let mut y: Vec<Vec<f64>> = all.iter().map(|(inputs, _)| blank(inputs.sizes)).collect();
        let mut seen = vec![0; sequences];
        for round in &self.rounds {
            run_packed(&plan, Some(&mut state), &all, &seen, round, &mut y);
            seen.iter_mut().zip(round).for_each(|(seen, n)| *seen += n);
        }
        // All at once, without a state.
        let mut once: Vec<Vec<f64>> = all.iter().map(|(inputs, _)| blank(inputs.sizes)).collect();
        run_packed(&plan, None, &all, &vec![0; sequences], &seen, &mut once);
        let allowed = 1e-11 * setting.slack()[0];
        for (i, (inputs, fade)) in all.iter().enumerate() {
            assert_eq!(state.position(i), seen[i] as u64);
            let want = truth(plan.spec(), inputs, fade, true);
            assert_rows(&format!("sequence {i}, call by call"), &y[i], &want, allowed);
            assert_rows(&format!("sequence {i}, at once"), &once[i], &want, allowed);
        }
    }
}

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn mixtures_are_as_the_oracle_has_them(mixture in mixture()) {
        on_threads(mixture.threads, || mixture.check());
    }

    #[test]
    fn packed_mixtures_are_as_the_oracle_has_them(ragged in ragged()) {
        on_threads(ragged.threads, || ragged.check());
    }
}
