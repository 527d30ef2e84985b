//! Decode on a GPU: time of a step, averaged over whole blocks, beside the rate of a copy.
//!
//! `decode_bench [words]` runs the rows whose names have one of the words. Bytes are those of the
//! far sums read once, and of folding (written once each block); in the last column also those of
//! the open tokens, half of a block on average. `decode_bench offline` compiles only, for an H100.

use std::cell::RefCell;
use std::time::Instant;

use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sata::{Decay, Near, Series, Spec, SpecBuilder};
use sata_cuda::offline::Target;
use sata_cuda::{
    Buffer, Decoder, Device, Error, Graph, Plan, Recipe, State, Step, Storage, SumsType, View,
    ViewMut,
};

fn copy_rate(device: &Device) -> f64 {
    let n = 1usize << 30;
    let mut a = Buffer::<u8>::uninit(device, n).unwrap();
    let mut b = Buffer::<u8>::uninit(device, n).unwrap();
    a.fill_bytes(3).unwrap();
    b.fill_bytes(5).unwrap();
    let mut times = vec![];
    for _ in 0..12 {
        let start = device.record().unwrap();
        a.copy(0, &b, 0, n).unwrap();
        let end = device.record().unwrap();
        times.push(end.since(&start).unwrap());
    }
    times.sort_by(f64::total_cmp);
    2.0 * n as f64 / times[times.len() / 2]
}

struct Set {
    state: RefCell<State>,
    q: Buffer<bf16>,
    k: Buffer<bf16>,
    v: Buffer<bf16>,
    gates: Buffer<f32>,
    y: Buffer<bf16>,
}

fn noise(device: &Device, n: usize, scale: f32, seed: u64) -> Buffer<bf16> {
    let mut rng = StdRng::seed_from_u64(seed);
    let x: Vec<bf16> =
        (0..n).map(|_| bf16::from_f32(scale * rng.random_range(-1.0f32..1.0))).collect();
    Buffer::from_slice(device, &x).unwrap()
}

struct Job {
    name: String,
    spec: Spec,
    heads: usize,
    group: usize,
    sums: SumsType,
    sets: usize,
    recipe: Option<Recipe>,
}

fn storage(job: &Job) -> Storage {
    Storage { sums: job.sums, compensated: false }
}

fn make(device: &Device, job: &Job) -> (Plan, Decoder) {
    let plan = Plan::new(device, &job.spec).unwrap();
    let state = State::with_storage(&plan, job.heads, 1, storage(job)).unwrap();
    let decoder = match job.recipe {
        Some(recipe) => Decoder::with_recipe::<bf16>(&plan, &state, job.heads, job.group, recipe),
        None => Decoder::new::<bf16>(&plan, &state, job.heads, job.group),
    };
    (plan, decoder.unwrap())
}

fn run(job: &Job, plan: &Plan, decoder: &Decoder, copy: f64) {
    let device = plan.device();
    let features = plan.features().unwrap();
    let (n, dk, dv, group) = (job.heads, job.spec.d_key(), job.spec.d_value(), job.group);
    let sets: Vec<Set> = (0..job.sets)
        .map(|_| Set {
            state: RefCell::new(State::with_storage(plan, n, 1, storage(job)).unwrap()),
            q: noise(device, n * group * dk, 1.0, 1),
            k: noise(device, n * dk, 1.0, 2),
            v: noise(device, n * dv, 1.0, 3),
            gates: Buffer::from_slice(device, &vec![-0.01; n]).unwrap(),
            y: Buffer::uninit(device, n * group * dv).unwrap(),
        })
        .collect();
    let step = |set: &Set| {
        let mut call = Step::new(
            View::new(&set.q, [n, group, 1, dk])?,
            View::new(&set.k, [n, 1, 1, dk])?,
            View::new(&set.v, [n, 1, 1, dv])?,
        );
        if job.spec.decay() == Decay::Gates {
            call = call.log_gates(View::new(&set.gates, [n, 1, 1, 1])?);
        }
        // SAFETY: of that size, and nobody else writes it.
        let y = unsafe {
            ViewMut::from_raw(
                device,
                set.y.address(),
                set.y.len(),
                [n, group, 1, dv],
                [group * dv, dv, dv],
            )
        }?;
        decoder.step(&mut set.state.borrow_mut(), &call, y)
    };
    // SAFETY: sets outlive the graphs.
    let graph: Graph =
        unsafe { device.capture::<Error>(|| sets.iter().try_for_each(step)) }.unwrap();
    let block = job.spec.block();
    let near = match job.spec.near() {
        Near::None => 1,
        Near::Blocks(n) => n + 1,
    };
    for _ in 0..near * block + 3 {
        graph.launch().unwrap();
    }
    device.synchronize().unwrap();
    // Whole periods of a block.
    let mut totals = vec![];
    for _ in 0..3 {
        let start = device.record().unwrap();
        for _ in 0..block {
            graph.launch().unwrap();
        }
        let end = device.record().unwrap();
        totals.push(end.since(&start).unwrap() / (block * sets.len()) as f64);
    }
    totals.sort_by(f64::total_cmp);
    let mean = totals[1];
    let mut each: Vec<f64> = (0..block)
        .map(|_| {
            let start = device.record().unwrap();
            graph.launch().unwrap();
            let end = device.record().unwrap();
            end.since(&start).unwrap() / sets.len() as f64
        })
        .collect();
    each.sort_by(f64::total_cmp);
    let (median, fold) = (each[block / 2], each[block - 1]);
    let width = job.sums.width() as f64;
    let state = features as f64 * (dv as f64 * width + 4.0);
    let folded = state * (1.0 + 1.0 / block as f64);
    let open = (near as f64 - 0.5) * block as f64 * (4 * (dk + dv + 1)) as f64;
    let bytes = n as f64 * folded;
    let all = bytes + n as f64 * open;
    let p = decoder.kernel().properties();
    println!(
        "{:26} {:5} heads {:>8.2} us ({:>8.2} median, {:>8.2} fold) {:>7.1} ns/head  {:>5.1} % of copy, {:>5.1} % with open tokens; regs {} local {} {:?}",
        job.name,
        n,
        mean * 1e6,
        median * 1e6,
        fold * 1e6,
        mean * 1e9 / n as f64,
        100.0 * bytes / mean / copy,
        100.0 * all / mean / copy,
        p.registers,
        p.local_bytes,
        decoder.recipe(),
    );
}

/// `[warps, team, split]`, `[lane_rows, in_flight, once, blocks]`.
fn recipe(
    [warps, team, split]: [u32; 3],
    [lane_rows, in_flight, once, blocks]: [u32; 4],
    fold_tokens: u32,
    pass: u32,
) -> Recipe {
    let once = once == 1;
    Recipe { warps, team, split, lane_rows, in_flight, once, fold_tokens, blocks, pass }
}

fn main() {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let offline = words.iter().position(|word| word == "offline");
    let begin = Instant::now();
    let target = offline.map(|at| {
        words.remove(at);
        Target::h100().unwrap()
    });
    let device = match &target {
        Some(target) => target.device(),
        None => Device::new(0).unwrap_or_else(|error| {
            eprintln!("{error}");
            std::process::exit(1)
        }),
    };
    let copy = if target.is_some() { 0.0 } else { copy_rate(&device) };
    println!("{}: copy {:.0} GB/s", device.properties().name, copy / 1e9);
    let plain = |d: usize, block: usize| -> SpecBuilder { Spec::new(d, d).terms(4).block(block) };
    let mut jobs = vec![];
    let mut add = |name: &str, spec: SpecBuilder, heads, group, sums, sets, recipe| {
        let spec = spec.build().unwrap();
        jobs.push(Job { name: name.into(), spec, heads, group, sums, sets, recipe });
    };
    let f32s = SumsType::F32;
    for (i, (d, recipe)) in variants().into_iter().enumerate() {
        let (heads, sets) = match d {
            8 => (8192, 6),
            16 => (2048, 4),
            32 => (256, 3),
            _ => (32, 2),
        };
        add(
            &format!("d={d} v{i}"),
            plain(d, if d == 8 { 16 } else { 64 }),
            heads,
            1,
            f32s,
            sets,
            recipe,
        );
    }
    add("d=8 block 64", plain(8, 64), 8192, 1, f32s, 6, None);
    add("d=8 block 32", plain(8, 32), 8192, 1, f32s, 6, None);
    add("d=16 block 128", plain(16, 128), 2048, 1, f32s, 4, None);
    for d in [8, 16, 32, 64] {
        add(&format!("one, d={d}"), plain(d, 64), 1, 1, f32s, 1, None);
    }
    for group in [4, 8, 16] {
        add(&format!("d=32 group {group}"), plain(32, 64), 256, group, f32s, 2, None);
    }
    let r = recipe([4, 4, 4], [1, 8, 1, 3], 64, 8);
    add("d=32 group 8", plain(32, 64), 256, 8, f32s, 2, Some(r));
    add("d=32 bf16 sums", plain(32, 64), 256, 1, SumsType::Bf16, 4, None);
    add("d=64 bf16 sums", plain(64, 64), 32, 1, SumsType::Bf16, 4, None);
    let trained = |d| plain(d, 64).terms(3).near(Near::Blocks(1)).decay(Decay::Gates);
    add("d=32 P=3 near gates", trained(32), 2048, 1, f32s, 2, None);
    let r = recipe([2, 2, 1], [1, 16, 1, 8], 64, 1);
    add("d=32 P=3 near gates", trained(32), 2048, 1, f32s, 2, Some(r));
    let gauss = |d| plain(d, 64).series(Series::Gauss).near(Near::Blocks(1));
    add("d=32 gauss near", gauss(32), 256, 1, f32s, 2, None);
    add("d=8 gauss near", gauss(8), 8192, 1, f32s, 4, None);
    jobs.retain(|job| words.is_empty() || words.iter().any(|word| job.name.contains(word)));
    let decoders: Vec<_> = std::thread::scope(|scope| {
        let made: Vec<_> = jobs.iter().map(|job| scope.spawn(|| make(&device, job))).collect();
        made.into_iter().map(|made| made.join().unwrap()).collect()
    });
    println!("compiled after {:.1} s", begin.elapsed().as_secs_f64());
    if let Some(target) = target {
        for each in target.compiled() {
            println!("{:?} {:.1} s {}", each.kernels, each.seconds, each.unit.title());
        }
        return;
    }
    for (job, (plan, decoder)) in jobs.iter().zip(&decoders) {
        run(job, plan, decoder, copy);
    }
    println!("done after {:.1} s", begin.elapsed().as_secs_f64());
}

/// Recipes beside the usual one.
fn variants() -> Vec<(usize, Option<Recipe>)> {
    let mut all = vec![];
    let mut add = |d, heads, loads, fold| all.push((d, Some(recipe(heads, loads, fold, 1))));
    add(8, [4, 1, 1], [6, 12, 0, 5], 16);
    add(8, [1, 1, 1], [6, 12, 0, 16], 16);
    add(8, [4, 1, 1], [6, 12, 0, 6], 16);
    add(8, [4, 1, 1], [3, 6, 0, 7], 16);
    add(8, [4, 1, 1], [2, 4, 0, 8], 16);
    add(8, [4, 1, 1], [6, 16, 0, 4], 16);
    add(16, [1, 1, 1], [4, 16, 1, 16], 64);
    add(16, [1, 1, 1], [3, 12, 1, 16], 64);
    add(16, [2, 2, 1], [1, 16, 1, 12], 64);
    add(32, [4, 4, 2], [1, 16, 1, 5], 64);
    add(32, [4, 4, 4], [1, 16, 1, 4], 64);
    add(64, [4, 4, 16], [1, 16, 1, 4], 64);
    add(64, [4, 4, 32], [1, 16, 1, 3], 64);
    for d in [8, 16, 32, 64] {
        all.push((d, None));
    }
    all
}
