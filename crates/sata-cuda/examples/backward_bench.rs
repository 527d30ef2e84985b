//! Backward on a GPU: nanoseconds per token and head of one causal call, all in bf16.
//!
//! `backward_bench [words]` runs the rows of these names ("d=32 P=4"), or all; a number among the words
//! is the length (65536 if none is said), `chunk=N` the tokens of a chunk instead of the plan's own
//! choice, `direct` weighs all pairs. Times are the device's, medians of 5 calls.
//! `backward_bench check` compares with the kernels that compute in f32 instead: relative root mean
//! square of the differences of dq, dk, dv and those by gates, all but the last rounded to bf16.
//! `backward_bench offline` compiles only, for an H100.

use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sata::{Decay, Form, Near, Series, Spec, SpecBuilder};
use sata_cuda::offline::Target;
use sata_cuda::{Buffer, Call, Device, Gradients, Plan, View, ViewMut};

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
        let trained = spec().terms(3).near(Near::Blocks(1)).sinks(4).decay(Decay::Gates);
        let trained5 = spec().terms(5).near(Near::Blocks(1)).decay(Decay::Gates);
        add(&format!("d={d} P=4"), spec().terms(4), heads);
        add(&format!("d={d} P=4 gates"), spec().terms(4).decay(Decay::Gates), heads);
        add(&format!("d={d} P=3"), spec().terms(3), heads);
        add(&format!("d={d} P=3 near gates"), trained, heads);
        add(&format!("d={d} Power(2)"), spec().series(Series::power(2)), heads);
        if d <= 16 {
            add(&format!("d={d} P=5"), spec().terms(5), heads);
            add(&format!("d={d} P=5 near gates"), trained5, heads);
            add(&format!("d={d} Power(4)"), spec().series(Series::power(4)), heads);
        }
    }
    rows
}

fn noise(device: &Device, n: usize, seed: u64) -> Buffer<bf16> {
    let mut rng = StdRng::seed_from_u64(seed);
    // A million numbers, over and over.
    let pool: Vec<bf16> =
        (0..1_000_003).map(|_| bf16::from_f32(rng.random_range(-1.7f32..1.7))).collect();
    let x: Vec<bf16> = (0..n).map(|i| pool[i % pool.len()]).collect();
    Buffer::from_slice(device, &x).unwrap()
}

#[derive(Clone, Copy)]
struct Options {
    tokens: usize,
    chunk: Option<usize>,
    direct: bool,
    check: bool,
}

/// What a call is given and fills.
struct Arrays {
    shape: [usize; 4],
    inputs: [Buffer<bf16>; 4],
    gates: Buffer<f32>,
    out: [Buffer<bf16>; 3],
    d_gates: Buffer<f32>,
}

impl Arrays {
    fn backward(&mut self, plan: &Plan) {
        let shape = self.shape;
        let of_gates = [shape[0], shape[1], shape[2], 1];
        let [q, k, v, dy] = self.inputs.each_ref().map(|x| View::new(x, shape).unwrap());
        let [dq, dk, dv] = self.out.each_mut().map(|x| ViewMut::new(x, shape).unwrap());
        let (mut call, mut out) = (Call::causal(q, k, v), Gradients::new(dq, dk, dv));
        if plan.spec().decay() == Decay::Gates {
            call = call.log_gates(View::new(&self.gates, of_gates).unwrap());
            out = out.log_gates(ViewMut::new(&mut self.d_gates, of_gates).unwrap());
        }
        plan.backward(call, dy, out).unwrap();
    }

    fn all(&mut self, plan: &Plan) -> [Vec<f64>; 4] {
        self.backward(plan);
        let [dq, dk, dv] =
            self.out.each_ref().map(|x| x.to_vec().unwrap().iter().map(|x| x.to_f64()).collect());
        [dq, dk, dv, self.d_gates.to_vec().unwrap().iter().map(|&x| x.into()).collect()]
    }
}

fn run(row: &Row, options: Options, device: &Device) {
    let Options { tokens, chunk, direct, check } = options;
    let plan = || {
        let plan = Plan::new(device, &row.spec).unwrap();
        match (chunk, direct) {
            (Some(chunk), _) => plan.with_chunk(chunk),
            (None, true) => plan.with_form(Form::Direct),
            _ => plan,
        }
    };
    let (d, heads) = (row.spec.d_key(), row.heads);
    let n = heads * tokens;
    let mut arrays = Arrays {
        shape: [1, heads, tokens, d],
        inputs: [1, 2, 3, 4].map(|seed| noise(device, n * d, seed)),
        gates: Buffer::from_slice(device, &vec![-0.01f32; n]).unwrap(),
        out: [(); 3].map(|()| Buffer::uninit(device, n * d).unwrap()),
        d_gates: Buffer::zeroed(device, n).unwrap(),
    };
    let (plan, exact) = (plan(), plan().without_matrix_units());
    if check {
        let [found, again, want] = [&plan, &plan, &exact].map(|plan| arrays.all(plan));
        let errors: Vec<String> = found
            .iter()
            .zip(&want)
            .map(|(found, want)| {
                let error: f64 = found.iter().zip(want).map(|(x, y)| (x - y).powi(2)).sum();
                let norm: f64 = want.iter().map(|y| y * y).sum();
                format!("{:.2e}", (error / norm.max(1e-300)).sqrt())
            })
            .collect();
        let same = found == again;
        println!("{:22} {heads:4} heads: errors {errors:?}, repeats alike: {same}", row.name);
        return;
    }
    arrays.backward(&plan);
    let mut times: Vec<f64> = (0..5)
        .map(|_| {
            let start = device.record().unwrap();
            arrays.backward(&plan);
            let end = device.record().unwrap();
            end.since(&start).unwrap()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!(
        "{:22} {heads:4} heads of {tokens} {:9.3} ms {:8.3} ns/token/head",
        row.name,
        times[2] * 1e3,
        times[2] * 1e9 / n as f64
    );
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| words.iter().any(|w| w == word);
    let number = |word: &String| word.parse::<usize>().ok();
    let options = Options {
        tokens: words.iter().find_map(number).unwrap_or(1 << 16),
        chunk: words.iter().find_map(|w| w.strip_prefix("chunk=")?.parse().ok()),
        direct: has("direct"),
        check: has("check"),
    };
    let known = ["direct", "check", "offline"];
    let named: Vec<&String> = words
        .iter()
        .filter(|w| number(w).is_none() && !w.starts_with("chunk=") && !known.contains(&w.as_str()))
        .collect();
    let target = has("offline").then(|| Target::h100().unwrap());
    let device = match &target {
        Some(target) => target.device(),
        None => Device::new(0).unwrap(),
    };
    for row in rows() {
        if named.is_empty() || named.iter().any(|word| row.name == **word) {
            run(&row, options, &device);
        }
    }
    for each in target.iter().flat_map(Target::compiled) {
        println!("{:?} {:.1} s {}", each.kernels, each.seconds, each.unit.title());
    }
}
