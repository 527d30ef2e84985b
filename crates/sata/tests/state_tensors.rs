//! The file of a state with near blocks, sinks, gates and a centre: every tensor is what its
//! description says.

mod common;
#[path = "common/forged.rs"]
mod forged;

use common::{Inputs, Sizes, assert_close, rng};
use forged::Forged;
use rand::Rng;
use sata::{Call, Centre, Decay, Near, Plan, Spec, State, View, ViewMut};

const D_KEY: usize = 3;
const D_VALUE: usize = 2;
const BLOCK: usize = 4;
const SINKS: usize = 2;
const TOKENS: usize = 15;
/// Blocks before the last that are not near to the token that comes next.
const FOLDED: usize = 8;
/// Tokens of the open blocks that there is room for.
const ROOM: usize = 2 * BLOCK;
/// The masked one of the folded tokens.
const MASKED: usize = 7;

#[test]
fn every_tensor_is_as_described() {
    let mut rng = rng();
    let spec = Spec::new(D_KEY, D_VALUE)
        .terms(3)
        .near(Near::Blocks(1))
        .block(BLOCK)
        .sinks(SINKS)
        .decay(Decay::Gates)
        .build()
        .unwrap();
    let plan = Plan::new(&spec).unwrap();
    let inputs = Inputs::<f64>::new(&mut rng, Sizes::self_attention(TOKENS, D_KEY, D_VALUE));
    let gates: Vec<f32> = (0..TOKENS).map(|_| -rng.random_range(0.0..1.0f32)).collect();
    let mask: Vec<bool> = (0..TOKENS).map(|t| t != MASKED).collect();
    let centre = [[0.5, -1.0, 0.25].as_slice(), &[2.0, -0.5]];
    let centred = Centre::new(1, centre[0], centre[1]).unwrap();
    let mut state = State::<f64>::centred(&plan, 1, 1, centred).unwrap();
    let mut y = vec![0.0; TOKENS * D_VALUE];
    let call = Call::causal(inputs.q(), inputs.k(), inputs.v())
        .key_mask(&mask)
        .log_gates(View::new(&gates, [1, 1, TOKENS, 1]).unwrap())
        .state(&mut state);
    plan.run(call, ViewMut::new(&mut y, [1, 1, TOKENS, D_VALUE]).unwrap()).unwrap();

    let file = Forged::read(&state.to_bytes()).unwrap();
    let names: Vec<&str> = file.tensors.keys().map(String::as_str).collect();
    let all = "centre_keys centre_values counts lags open_fading open_keys open_values \
               open_weights reaches sink_fading sink_keys sink_values sink_weights sums totals z";
    assert_eq!(names.join(" "), all);
    assert_eq!(file.metadata["open"], format!("[{}]", TOKENS - FOLDED));
    let is = |name: &str, shape: &[usize], want: &[f64]| {
        let tensor = &file.tensors[name];
        assert_eq!(tensor.shape, shape, "{name}");
        let got: Vec<f64> =
            tensor.data.chunks(8).map(|x| f64::from_le_bytes(x.try_into().unwrap())).collect();
        assert_close(name, &got, want, 1e-13);
    };
    let key = |t: usize| -> Vec<f64> {
        let live = if mask[t] { 1.0 } else { 0.0 };
        let row = inputs.k[t * D_KEY..][..D_KEY].iter().zip(centre[0]);
        row.map(|(k, c)| (k - c) * live).collect()
    };
    let value = |t: usize| -> Vec<f64> {
        inputs.v[t * D_VALUE..][..D_VALUE].iter().zip(centre[1]).map(|(v, c)| v - c).collect()
    };
    // g, counted from the start.
    let g = |t: usize| gates[..=t].iter().map(|&g| f64::from(g)).sum::<f64>();
    let summed: Vec<usize> = (SINKS..FOLDED).filter(|&t| mask[t]).collect();
    let last = summed[summed.len() - 1];
    is("centre_keys", &[1, D_KEY], centre[0]);
    is("centre_values", &[1, D_VALUE], centre[1]);
    is("counts", &[1, 1], &[summed.len() as f64]);
    is("totals", &[1, 1], &[g(FOLDED - 1)]);
    assert!(g(FOLDED - 1) < g(last), "a masked token came last, and lets the past fade");
    is("lags", &[1, 1], &[g(FOLDED - 1) - g(last)]);
    let square = |t: &usize| key(*t).iter().map(|k| k * k).sum::<f64>();
    let there: Vec<usize> = (0..TOKENS).filter(|&t| mask[t]).collect();
    is("reaches", &[1, 1], &[there.iter().map(square).fold(0.0, f64::max)]);

    let padded = |rows: Vec<Vec<f64>>, room: usize| -> Vec<f64> {
        let width = rows[0].len();
        let mut all = rows.concat();
        all.resize(room * width, 0.0);
        all
    };
    let open = FOLDED..TOKENS;
    is("open_keys", &[1, 1, ROOM, D_KEY], &padded(open.clone().map(key).collect(), ROOM));
    is("open_values", &[1, 1, ROOM, D_VALUE], &padded(open.clone().map(value).collect(), ROOM));
    is("open_weights", &[1, 1, ROOM], &padded(open.clone().map(|_| vec![1.0]).collect(), ROOM));
    let own = open.map(|t| vec![f64::from(gates[t])]).collect();
    is("open_fading", &[1, 1, ROOM], &padded(own, ROOM));
    let sinks = 0..SINKS;
    is("sink_keys", &[1, 1, SINKS, D_KEY], &sinks.clone().flat_map(key).collect::<Vec<_>>());
    is("sink_values", &[1, 1, SINKS, D_VALUE], &sinks.clone().flat_map(value).collect::<Vec<_>>());
    is("sink_weights", &[1, 1, SINKS], &[1.0; SINKS]);
    is("sink_fading", &[1, 1, SINKS], &sinks.map(g).collect::<Vec<_>>());

    let mut monomials: Vec<Vec<usize>> = vec![vec![]];
    monomials.extend((0..D_KEY).map(|i| vec![i]));
    monomials.extend((0..D_KEY).flat_map(|i| (i..D_KEY).map(move |j| vec![i, j])));
    let feature = |t: usize, monomial: &[usize]| {
        let key = key(t);
        (g(last) - g(t)).exp() * monomial.iter().map(|&i| key[i]).product::<f64>()
    };
    let z: Vec<f64> =
        monomials.iter().map(|m| summed.iter().map(|&t| feature(t, m)).sum()).collect();
    let sums: Vec<f64> = monomials
        .iter()
        .flat_map(|m| (0..D_VALUE).map(move |c| (m, c)))
        .map(|(m, c)| summed.iter().map(|&t| feature(t, m) * value(t)[c]).sum())
        .collect();
    is("z", &[1, 1, monomials.len()], &z);
    is("sums", &[1, 1, monomials.len(), D_VALUE], &sums);
}
