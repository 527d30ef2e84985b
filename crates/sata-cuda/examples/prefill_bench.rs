//! Prefill on a GPU: nanoseconds per token and head of one causal call, inputs and outputs bf16.
//!
//! `prefill_bench [words]` runs the rows whose names have one of the words; a number among the words
//! is the length (65536 if none is said), `chunk=N` the tokens of a chunk instead of the plan's own
//! choice. Times are the device's, medians of calls one by one, each from its first work to its
//! last, and of calls that follow one another without waiting, which hide what the host does.
//! `prefill_bench check` compares with the kernels that compute in f32 instead: relative root mean
//! square of the differences, outputs of both rounded to bf16. `prefill_bench offline` compiles only,
//! for an H100.

use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sata::{Decay, Near, Series, Spec, SpecBuilder};
use sata_cuda::offline::Target;
use sata_cuda::{Buffer, Call, Device, Plan, View, ViewMut};

struct Row {
    name: String,
    spec: Spec,
    heads: usize,
}

fn rows() -> Vec<Row> {
    let mut rows = vec![];
    let mut add = |name: &str, spec: SpecBuilder, heads| {
        rows.push(Row { name: name.into(), spec: spec.build().unwrap(), heads });
    };
    for (d, heads) in [(8, 128), (16, 64), (32, 32), (64, 16)] {
        let spec = || Spec::new(d, d);
        let near = |spec: SpecBuilder| spec.near(Near::Blocks(1));
        add(&format!("d={d} P=4"), spec().terms(4), heads);
        add(&format!("d={d} P=4 gates"), spec().terms(4).decay(Decay::Gates), heads);
        add(&format!("d={d} P=3"), spec().terms(3), heads);
        let trained = near(spec().terms(3)).decay(Decay::Gates);
        add(&format!("d={d} P=3 near gates"), trained, heads);
        add(&format!("d={d} Power(2)"), spec().series(Series::power(2)), heads);
    }
    rows
}

fn noise(device: &Device, n: usize, seed: u64) -> Buffer<bf16> {
    let mut rng = StdRng::seed_from_u64(seed);
    // A million numbers, over and over.
    let pool: Vec<bf16> =
        (0..n.min(1_000_003)).map(|_| bf16::from_f32(rng.random_range(-1.7f32..1.7))).collect();
    let pool = Buffer::from_slice(device, &pool).unwrap();
    let mut x = Buffer::uninit(device, n).unwrap();
    for first in (0..n).step_by(pool.len()) {
        x.copy(first, &pool, 0, pool.len().min(n - first)).unwrap();
    }
    x
}

#[derive(Clone, Copy)]
struct Options {
    tokens: usize,
    chunk: Option<usize>,
    check: bool,
}

fn run(row: &Row, options: Options, device: &Device) {
    let Options { tokens, chunk, check } = options;
    let plan = || {
        let plan = Plan::new(device, &row.spec).unwrap();
        match chunk {
            Some(chunk) => plan.with_chunk(chunk),
            None => plan,
        }
    };
    let (plan, exact) = (plan(), plan().without_matrix_units());
    let (d, heads) = (row.spec.d_key(), row.heads);
    let n = heads * tokens;
    let [q, k, v] = [1, 2, 3].map(|seed| noise(device, n * d, seed));
    let gates = Buffer::from_slice(device, &vec![-0.01f32; n]).unwrap();
    let y = Buffer::<bf16>::uninit(device, n * d).unwrap();
    let shape = [1, heads, tokens, d];
    let enqueue = |plan: &Plan| {
        let mut call = Call::causal(
            View::new(&q, shape).unwrap(),
            View::new(&k, shape).unwrap(),
            View::new(&v, shape).unwrap(),
        );
        if row.spec.decay() == Decay::Gates {
            call = call.log_gates(View::new(&gates, [1, heads, tokens, 1]).unwrap());
        }
        // SAFETY: of that size, and nobody else writes it.
        let y = unsafe {
            ViewMut::from_raw(device, y.address(), y.len(), shape, [n * d, tokens * d, d])
        };
        plan.enqueue(call, y.unwrap()).unwrap()
    };
    enqueue(&plan).wait().unwrap();
    if check {
        let found = y.to_vec().unwrap();
        enqueue(&plan).wait().unwrap();
        let again = y.to_vec().unwrap();
        let same = found.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits());
        enqueue(&exact).wait().unwrap();
        let (mut error, mut norm) = (0.0, 0.0);
        for (got, want) in found.iter().zip(y.to_vec().unwrap()) {
            error += (got.to_f64() - want.to_f64()).powi(2);
            norm += want.to_f64().powi(2);
        }
        let error = (error / norm).sqrt();
        println!("{:22} {heads:4} heads: error {error:.2e}, repeats alike: {same}", row.name);
        return;
    }
    let median = |calls: usize| {
        let mut times: Vec<f64> = (0..7)
            .map(|_| {
                let start = device.record().unwrap();
                let pending: Vec<_> = (0..calls).map(|_| enqueue(&plan)).collect();
                let end = device.record().unwrap();
                drop(pending);
                end.since(&start).unwrap() / calls as f64
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[3]
    };
    let (one, many) = (median(1), median(4));
    let each = |seconds: f64| seconds * 1e9 / n as f64;
    let flops = 4.0 * plan.features().unwrap() as f64 * (d + 1) as f64;
    println!(
        "{:22} {heads:4} heads {:8.3} ms {:8.4} ns/token/head; one after another {:8.4}; {:5.0} useful TFLOP/s",
        row.name,
        one * 1e3,
        each(one),
        each(many),
        flops / each(many) * 1e-3
    );
}

fn main() {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let mut take = |is: &dyn Fn(&str) -> Option<usize>| {
        let found = words.iter().find_map(|word| is(word));
        words.retain(|word| is(word).is_none());
        found
    };
    let length = take(&|word| word.parse().ok());
    let chunk = take(&|word| word.strip_prefix("chunk=")?.parse().ok());
    let offline = words.iter().any(|word| word == "offline");
    let check = words.iter().any(|word| word == "check");
    words.retain(|word| !["offline", "check"].contains(&word.as_str()));
    let target = offline.then(|| Target::h100().unwrap());
    let device = match &target {
        Some(target) => target.device(),
        None => Device::new(0).unwrap(),
    };
    let tokens = length.unwrap_or(if offline { 4096 } else { 65_536 });
    // Short calls that have nothing to sum would not compile all kernels.
    let chunk = chunk.or(offline.then_some(1024));
    println!("{}, {tokens} tokens", device.properties().name);
    for row in rows() {
        if words.is_empty() || words.iter().any(|word| row.name.contains(word.as_str())) {
            run(&row, Options { tokens, chunk, check }, &device);
        }
    }
    for each in target.iter().flat_map(Target::compiled) {
        println!("{:?} {:.1} s {}", each.kernels, each.seconds, each.unit.title());
    }
}
