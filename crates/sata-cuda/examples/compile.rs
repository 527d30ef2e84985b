//! Compiles the kernels that representative calls use, for sm_80 and sm_90a, without a GPU, and
//! looks at what came out: hot kernels must not spill registers, those for the matrix units must use
//! them. Needs NVRTC, and `nvdisasm` for the latter (`SATA_NVDISASM`, or on the path);
//! `scripts/kernels` brings both.
//!
//!     cargo run -p sata-cuda --features emulator --example compile [--verbose]

use std::collections::BTreeSet;
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::time::Instant;

use half::{bf16, f16};
use sata::{Decay, Form, Near, Series, Spec, SpecBuilder};
use sata_cuda::offline::{Compilation, Target};
use sata_cuda::{
    Buffer, Call, Decoder, Device, Element, Error, Gradients, Plan, State, StateGradient, Step,
    Storage, SumsType, View, ViewMut,
};

/// Sources that no call reaches yet.
const PENDING: &[&str] = &[];

/// One setting, tried as prefill (direct and by sums, with and without a state), as decode, and
/// backward.
struct Case {
    spec: Spec,
    element: &'static str,
    kv_heads: usize,
    group: usize,
    tokens: usize,
}

fn case(spec: SpecBuilder, element: &'static str, kv_heads: usize, group: usize) -> Case {
    let spec = spec.build().expect("a representative spec is valid");
    Case { spec, element, kv_heads, group, tokens: 1 << 14 }
}

fn cases() -> Vec<Case> {
    let trained =
        |d, terms| Spec::new(d, d).terms(terms).near(Near::Blocks(1)).sinks(4).decay(Decay::Gates);
    let power = |d, exponent| Spec::new(d, d).series(Series::power(exponent));
    let near = |series| Spec::new(64, 64).series(series).near(Near::Blocks(1)).sinks(4);
    let mut cases: Vec<Case> = [(8, 128), (16, 64), (32, 32), (64, 16)]
        .into_iter()
        .map(|(d, heads)| case(Spec::new(d, d), "bf16", heads, 1))
        .collect();
    cases.extend([
        case(trained(16, 5), "bf16", 8, 1),
        case(trained(32, 3), "bf16", 8, 2),
        case(trained(64, 3), "f16", 8, 1),
        case(Spec::new(8, 8).terms(3).near(Near::Blocks(1)).decay(Decay::Gates), "bf16", 8, 2),
        case(Spec::new(16, 16).near(Near::Blocks(1)).decay(Decay::Slopes), "bf16", 8, 1),
        case(Spec::new(32, 32).terms(3).near(Near::Blocks(1)).decay(Decay::Gates), "bf16", 8, 2),
        case(Spec::new(32, 16).terms(3).decay(Decay::Slopes), "bf16", 8, 1),
        case(Spec::new(32, 32).terms(3).decay(Decay::Gates), "bf16", 8, 1),
        case(Spec::new(32, 32).terms(3).near(Near::Blocks(1)), "bf16", 8, 1),
        case(power(8, 2), "bf16", 8, 1),
        case(power(32, 2), "bf16", 8, 1),
        case(power(64, 2), "bf16", 8, 1),
        case(power(16, 4), "bf16", 8, 1),
        case(near(Series::Gauss), "bf16", 4, 3),
        case(near(Series::hermite()).terms(3), "f32", 4, 1),
        case(Spec::new(16, 16).decay(Decay::Slopes), "f32", 4, 1),
        case(Spec::new(8, 8).terms(6), "f32", 4, 1),
        case(Spec::new(16, 24).terms(2), "f16", 4, 1),
        case(Spec::new(5, 7).terms(4).sinks(3), "f32", 3, 1),
        case(Spec::new(1, 1).terms(1), "bf16", 1, 1),
        case(Spec::new(80, 96).terms(3), "f32", 2, 1),
        case(Spec::new(12, 128).series(Series::Gauss).decay(Decay::Slopes), "f16", 2, 1),
    ]);
    cases
}

/// Inputs of nothing in particular, of some sizes.
struct Inputs<E: Element> {
    sizes: [usize; 4],
    q: Buffer<E>,
    k: Buffer<E>,
    v: Buffer<E>,
    y: Buffer<E>,
    gates: Buffer<f32>,
    mask: Buffer<u8>,
    slopes: Vec<f64>,
}

impl<E: Element> Inputs<E> {
    fn new(device: &Device, case: &Case, tokens: usize) -> Result<Self, Error> {
        let (heads, all) = (case.kv_heads, case.kv_heads * case.group);
        let (d_key, d_value) = (case.spec.d_key(), case.spec.d_value());
        Ok(Inputs {
            sizes: [heads, all, tokens, 0],
            q: Buffer::uninit(device, all * tokens * d_key)?,
            k: Buffer::uninit(device, heads * tokens * d_key)?,
            v: Buffer::uninit(device, heads * tokens * d_value)?,
            y: Buffer::uninit(device, all * tokens * d_value)?,
            gates: Buffer::uninit(device, heads * tokens)?,
            mask: Buffer::uninit(device, tokens)?,
            slopes: vec![0.5; heads],
        })
    }

    fn run(
        &mut self,
        plan: &Plan,
        causal: bool,
        masked: bool,
        state: Option<&mut State>,
    ) -> Result<(), Error> {
        let [heads, all, tokens, _] = self.sizes;
        let (d_key, d_value) = (plan.spec().d_key(), plan.spec().d_value());
        let q = View::new(&self.q, [1, all, tokens, d_key])?;
        let k = View::new(&self.k, [1, heads, tokens, d_key])?;
        let v = View::new(&self.v, [1, heads, tokens, d_value])?;
        let mut call = if causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
        match plan.spec().decay() {
            Decay::Gates => {
                call = call.log_gates(View::new(&self.gates, [1, heads, tokens, 1])?);
            }
            Decay::Slopes => call = call.slopes(&self.slopes),
            Decay::None => (),
        }
        if masked {
            call = call.key_mask(View::new(&self.mask, [1, 1, 1, tokens])?);
        }
        if let Some(state) = state {
            call = call.state(state);
        }
        plan.run(call, ViewMut::new(&mut self.y, [1, all, tokens, d_value])?)?;
        Ok(())
    }
}

/// A state that has seen some tokens, so that a call has open ones to begin with.
fn begun(plan: &Plan, case: &Case, storage: Storage) -> Result<State, Error> {
    let spec = &case.spec;
    let (heads, tokens) = (case.kv_heads, spec.block() / 2 + 1);
    let (d_key, d_value) = (spec.d_key(), spec.d_value());
    let mut host = sata::State::<f32>::new(plan.host(), 1, heads)?;
    let (k, v) = (vec![0.0f32; heads * tokens * d_key], vec![0.0; heads * tokens * d_value]);
    let (gates, slopes) = (vec![0.0; heads * tokens], vec![0.0; heads]);
    let mut y = vec![0.0; heads * tokens * d_value];
    let keys = sata::View::new(&k, [1, heads, tokens, d_key])?;
    let values = sata::View::new(&v, [1, heads, tokens, d_value])?;
    let mut call = sata::Call::causal(keys, keys, values).state(&mut host);
    match spec.decay() {
        Decay::Gates => {
            call = call.log_gates(sata::View::new(&gates, [1, heads, tokens, 1])?);
        }
        Decay::Slopes => call = call.slopes(&slopes),
        Decay::None => (),
    }
    plan.host().run(call, sata::ViewMut::new(&mut y, [1, heads, tokens, d_value])?)?;
    State::from_host_with(plan, &host, storage)
}

fn prefill<E: Element>(device: &Device, case: &Case) -> Result<(), Error> {
    for (form, tokens) in [(None, case.tokens), (Some(Form::Direct), 200), (Some(Form::State), 300)]
    {
        let plan = || -> Result<Plan, Error> {
            let plan = Plan::new(device, &case.spec)?;
            Ok(match form {
                Some(form) => plan.with_form(form),
                None => plan,
            })
        };
        let mut inputs = Inputs::<E>::new(device, case, tokens)?;
        let plan = plan()?;
        inputs.run(&plan, true, false, None)?;
        inputs.run(&plan, true, true, Some(&mut begun(&plan, case, Storage::of(&case.spec))?))?;
        if case.spec.near() == Near::None {
            inputs.run(&plan, false, false, None)?;
        }
    }
    Ok(())
}

fn decode<E: Element>(device: &Device, case: &Case) -> Result<(), Error> {
    let plan = Plan::new(device, &case.spec)?;
    let (heads, all) = (case.kv_heads, case.kv_heads * case.group);
    let (d_key, d_value) = (case.spec.d_key(), case.spec.d_value());
    let many = 4096 / heads;
    for (sums, entries) in [(SumsType::F32, 1), (SumsType::F32, many), (SumsType::Bf16, many)] {
        let storage = Storage { sums, compensated: case.spec.decay() == Decay::None };
        let mut state = State::with_storage(&plan, 1, heads, storage)?;
        let decoder = Decoder::new::<E>(&plan, &state, entries, all)?;
        let q = Buffer::<E>::uninit(device, entries * all * d_key)?;
        let k = Buffer::<E>::uninit(device, entries * heads * d_key)?;
        let v = Buffer::<E>::uninit(device, entries * heads * d_value)?;
        let mut y = Buffer::<E>::uninit(device, entries * all * d_value)?;
        let gates = Buffer::<f32>::uninit(device, entries * heads)?;
        let slopes = Buffer::<f64>::uninit(device, heads)?;
        let slots = Buffer::<u32>::zeroed(device, entries)?;
        let mut step = Step::new(
            View::new(&q, [entries, all, 1, d_key])?,
            View::new(&k, [entries, heads, 1, d_key])?,
            View::new(&v, [entries, heads, 1, d_value])?,
        )
        .slots(&slots);
        match case.spec.decay() {
            Decay::Gates => step = step.log_gates(View::new(&gates, [entries, heads, 1, 1])?),
            Decay::Slopes => step = step.slopes(&slopes),
            Decay::None => (),
        }
        decoder.step(&mut state, &step, ViewMut::new(&mut y, [entries, all, 1, d_value])?)?;
    }
    Ok(())
}

/// Backward through calls; nothing for series that have none.
fn backward<E: Element>(device: &Device, case: &Case) -> Result<(), Error> {
    if case.spec.coefficients().is_none() {
        return Ok(());
    }
    let plan = Plan::new(device, &case.spec)?;
    let tokens = case.tokens;
    let inputs = Inputs::<E>::new(device, case, tokens)?;
    let mut gradients = Inputs::<E>::new(device, case, tokens)?;
    let [heads, all, ..] = inputs.sizes;
    let (d_key, d_value) = (case.spec.d_key(), case.spec.d_value());
    for (causal, kept) in [(true, false), (true, true), (false, false)] {
        if !causal && case.spec.near() != Near::None {
            continue;
        }
        let q = View::new(&inputs.q, [1, all, tokens, d_key])?;
        let k = View::new(&inputs.k, [1, heads, tokens, d_key])?;
        let v = View::new(&inputs.v, [1, heads, tokens, d_value])?;
        let mut call = if causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
        let mut out = Gradients::new(
            ViewMut::new(&mut gradients.q, [1, all, tokens, d_key])?,
            ViewMut::new(&mut gradients.k, [1, heads, tokens, d_key])?,
            ViewMut::new(&mut gradients.v, [1, heads, tokens, d_value])?,
        );
        let mut slopes = Buffer::uninit(device, heads)?;
        match case.spec.decay() {
            Decay::Gates => {
                call = call.log_gates(View::new(&inputs.gates, [1, heads, tokens, 1])?);
                out = out.log_gates(ViewMut::new(&mut gradients.gates, [1, heads, tokens, 1])?);
            }
            Decay::Slopes => {
                call = call.slopes(&inputs.slopes);
                out = out.slopes(&mut slopes);
            }
            Decay::None => (),
        }
        let mut state = begun(&plan, case, Storage::of(&case.spec))?;
        let mut by_state = StateGradient::new(&plan, 1, heads)?;
        if kept {
            (call, out) = (call.state(&mut state), out.state(&mut by_state));
        }
        plan.backward(call, View::new(&inputs.y, [1, all, tokens, d_value])?, out)?;
    }
    Ok(())
}

fn with_element(case: &Case, device: &Device, what: usize) -> Result<(), Error> {
    fn run<E: Element>(case: &Case, device: &Device, what: usize) -> Result<(), Error> {
        match what {
            0 => prefill::<E>(device, case),
            1 => decode::<E>(device, case),
            _ => backward::<E>(device, case),
        }
    }
    match case.element {
        "bf16" => run::<bf16>(case, device, what),
        "f16" => run::<f16>(case, device, what),
        _ => run::<f32>(case, device, what),
    }
}

/// Runs all cases; gives what failed.
fn compile(target: &Target) -> Vec<String> {
    let cases = cases();
    let jobs = Mutex::new((0..3 * cases.len()).collect::<Vec<_>>());
    let failures = Mutex::new(vec![]);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let job = jobs.lock().map_or(None, |mut jobs| jobs.pop());
                    let Some(job) = job else { return };
                    let case = &cases[job / 3];
                    if let Err(error) = with_element(case, &target.device(), job % 3) {
                        let what = ["prefill", "decode", "backward"][job % 3];
                        let failure =
                            format!("{what} of {:?} {}: {error}", case.spec, case.element);
                        failures.lock().into_iter().for_each(|mut all| all.push(failure.clone()));
                    }
                }
            });
        }
    });
    failures.into_inner().unwrap_or_default()
}

/// How many instructions of the matrix units there are.
fn matrix_instructions(compilation: &Compilation) -> Result<usize, String> {
    let program = std::env::var("SATA_NVDISASM").unwrap_or_else(|_| "nvdisasm".into());
    let name = format!("sata-{}-{:x}.cubin", std::process::id(), compilation.cubin.as_ptr().addr());
    let file = std::env::temp_dir().join(name);
    std::fs::write(&file, &compilation.cubin).map_err(|e| format!("{}: {e}", file.display()))?;
    let output = Command::new(&program).arg("-c").arg(&file).output();
    let _ = std::fs::remove_file(&file);
    let output = output.map_err(|e| format!("{program}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).matches("HGMMA").count())
}

/// What is wrong with a compiled unit.
fn faults(compilation: &Compilation) -> Vec<String> {
    let unit = &compilation.unit;
    let mut faults = vec![];
    for kernel in compilation.kernels.iter().filter(|_| unit.is_hot() || unit.is_matrix()) {
        if kernel.spill_stores + kernel.spill_loads > 0 {
            faults.push(format!(
                "{} spills: {} bytes stored, {} loaded",
                kernel.name, kernel.spill_stores, kernel.spill_loads
            ));
        }
    }
    let uses = unit.full_text().contains("wgmma.mma_async");
    if uses && !unit.is_matrix() {
        faults.push("it uses the matrix units without being marked so".into());
    }
    if unit.is_matrix() {
        match matrix_instructions(compilation) {
            Ok(0) => faults.push("its machine code has no HGMMA".into()),
            Ok(_) => (),
            Err(error) => faults.push(error),
        }
    }
    faults
}

/// Kernel sources of which nothing was compiled.
fn missing(compiled: &BTreeSet<&str>) -> Result<Vec<String>, std::io::Error> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels");
    let mut missing = vec![];
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let pending = PENDING.iter().any(|prefix| name.starts_with(prefix));
        // The smallest kernels are for tests.
        if name.ends_with(".cu") && name != "fill.cu" && !pending && !compiled.contains(&*name) {
            missing.push(name);
        }
    }
    Ok(missing)
}

fn main() -> ExitCode {
    let verbose = std::env::args().any(|argument| argument == "--verbose");
    let mut wrong = 0;
    let mut all: BTreeSet<&str> = BTreeSet::new();
    for target in [Target::a100(), Target::h100()] {
        let target = match target {
            Ok(target) => target,
            Err(error) => {
                eprintln!("error: {error}");
                return ExitCode::FAILURE;
            }
        };
        let start = Instant::now();
        for failure in compile(&target) {
            eprintln!("error: {failure}");
            wrong += 1;
        }
        let compiled = target.compiled();
        let (mut hot, mut matrix) = (0, 0);
        for compilation in &compiled {
            all.insert(compilation.unit.file());
            hot += usize::from(compilation.unit.is_hot());
            matrix += usize::from(compilation.unit.is_matrix());
            if verbose {
                println!("{} {:.1} s", compilation.unit.title(), compilation.seconds);
                for k in &compilation.kernels {
                    println!(
                        "    {}: {} registers, {} bytes of stack, {} and {} spilled, {} static",
                        k.name,
                        k.registers,
                        k.stack,
                        k.spill_stores,
                        k.spill_loads,
                        k.static_shared
                    );
                }
            }
            for fault in faults(compilation) {
                eprintln!("error: {}, {}: {fault}", compilation.arch, compilation.unit.title());
                wrong += 1;
            }
        }
        println!(
            "{}: {} units compiled, of which {hot} hot and {matrix} for the matrix units, {:.0} s",
            target.device().properties().arch(),
            compiled.len(),
            start.elapsed().as_secs_f64()
        );
    }
    match missing(&all) {
        Ok(missing) => {
            for file in missing {
                eprintln!("error: no call here uses {file}");
                wrong += 1;
            }
        }
        Err(error) => {
            eprintln!("error: {error}");
            wrong += 1;
        }
    }
    if wrong > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
