//! One small call of every kind that has kernels of its own, for tools that watch memory
//! (`scripts/sanitize`): forward, backward and decode, sizes that fill no tile.
//!
//! `small_calls [words]` runs the calls whose names have one of the words, or all;
//! `small_calls list` names them; `small_calls emulated` runs them without a GPU. Ends with 1 where an output
//! is not finite.

use std::process::ExitCode;

use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sata::{Decay, Form, Near, Series, Spec, SpecBuilder};
use sata_cuda::{
    Buffer, Call, Decoder, Device, Element, Gradients, Plan, State, Step, Storage, SumsType, View,
    ViewMut,
};

type Anything = Box<dyn std::error::Error>;

#[derive(Clone, Copy)]
enum What {
    Forward,
    /// Two sequences side by side.
    Packed,
    /// Every query sees every key.
    Full,
    /// Two calls, the second from the first one's state.
    Continued,
    Backward,
    Decode,
}

#[derive(Clone, Copy, PartialEq)]
enum Number {
    F32,
    F16,
    Bf16,
}

struct Case {
    name: String,
    what: What,
    number: Number,
    spec: SpecBuilder,
    tokens: usize,
    chunk: Option<usize>,
    form: Option<Form>,
    sums: SumsType,
}

fn cases() -> Vec<Case> {
    let mut cases = vec![];
    let mut add = |name: &str, what, number, spec: SpecBuilder, tokens, chunk, form| {
        let sums = if name.contains("bf16 sums") { SumsType::Bf16 } else { SumsType::F32 };
        let name = name.to_string();
        cases.push(Case { name, what, number, spec, tokens, chunk, form, sums });
    };
    use Number::{Bf16, F16, F32};
    use What::{Backward, Continued, Decode, Forward, Full, Packed};
    let (chunks, pairs) = (Some(Form::State), Some(Form::Direct));
    for d in [8, 16] {
        let spec = || Spec::new(d, d).block(16);
        let recipe = || spec().terms(3).near(Near::Blocks(1)).decay(Decay::Gates);
        add(&format!("stream forward d={d}"), Forward, Bf16, spec().terms(4), 700, None, None);
        add(&format!("stream forward d={d} near gates"), Forward, Bf16, recipe(), 700, None, None);
        add(&format!("stream packed d={d} near gates"), Packed, Bf16, recipe(), 700, None, None);
        add(&format!("stream backward d={d}"), Backward, Bf16, spec().terms(4), 300, None, None);
        add(
            &format!("stream backward d={d} near gates"),
            Backward,
            Bf16,
            recipe(),
            300,
            None,
            None,
        );
    }
    add("stream parts d=16 P=5", Forward, Bf16, Spec::new(16, 16).terms(5), 700, None, None);
    let fourth = Spec::new(16, 16).series(Series::power(4));
    add("stream parts d=16 x4", Forward, Bf16, fourth, 700, None, None);
    let wide = || Spec::new(32, 32).terms(3).decay(Decay::Gates);
    add("stream d=32", Forward, Bf16, Spec::new(32, 32).terms(3), 700, None, None);
    let near = wide().near(Near::Blocks(1)).block(64);
    add("stream d=32 near gates", Forward, Bf16, near.clone(), 700, None, None);
    add("stream packed d=32 near gates", Packed, Bf16, near, 700, None, None);
    let sixteen = || Spec::new(16, 16).terms(4);
    add("stream d=16", Forward, Bf16, sixteen(), 700, Some(256), None);
    let near = sixteen().decay(Decay::Gates).near(Near::Blocks(1)).block(64);
    add("stream d=16 near gates", Forward, Bf16, near.clone(), 700, Some(256), None);
    add("stream packed d=16 near gates", Packed, Bf16, near, 700, Some(256), None);
    for d in [32, 64] {
        let spec = || Spec::new(d, d).block(16);
        let recipe = || spec().terms(3).near(Near::Blocks(1)).sinks(3).decay(Decay::Gates);
        add(&format!("wide chunks d={d}"), Forward, Bf16, spec().terms(3), 700, Some(192), chunks);
        add(
            &format!("wide chunks d={d} near gates"),
            Forward,
            Bf16,
            recipe(),
            700,
            Some(192),
            chunks,
        );
        add(&format!("wide short d={d} near gates"), Forward, Bf16, recipe(), 300, None, None);
        add(&format!("wide full d={d}"), Full, Bf16, spec().terms(3), 300, None, chunks);
        add(
            &format!("wide continued d={d} near gates"),
            Continued,
            Bf16,
            recipe(),
            300,
            None,
            None,
        );
        add(&format!("wide pairs backward d={d}"), Backward, Bf16, recipe(), 200, None, pairs);
        add(&format!("wide sums backward d={d}"), Backward, Bf16, recipe(), 700, Some(192), chunks);
    }
    // Few orders, for which there is little or nothing to sum.
    for (d, terms) in [(8, 1), (8, 2), (16, 1), (16, 2), (32, 1), (32, 2), (64, 1)] {
        let spec = || Spec::new(d, d).terms(terms).block(16);
        let recipe = || spec().near(Near::Blocks(1)).decay(Decay::Gates);
        let name = |what: &str| format!("few orders {what} d={d} P={terms}");
        add(&name("forward"), Forward, Bf16, spec(), 700, None, None);
        add(&name("forward near gates"), Forward, Bf16, recipe(), 700, None, None);
        add(&name("backward"), Backward, Bf16, spec(), 300, None, None);
        add(&name("backward near gates"), Backward, Bf16, recipe(), 300, None, None);
    }
    // Gates that leave nothing of what came before, here and there.
    for d in [8, 16, 32, 64] {
        let spec = || Spec::new(d, d).block(16).decay(Decay::Gates);
        let name = |what: &str| format!("closed gates {what} d={d}");
        let all = || spec().near(Near::Blocks(1 << 20)).terms(1);
        let recipe = || spec().near(Near::Blocks(1)).terms(3);
        let far = || spec().series(Series::power(2));
        for (kind, spec) in [("softmax", all()), ("near", recipe()), ("far", far())] {
            add(&name(&format!("{kind} forward")), Forward, Bf16, spec.clone(), 700, None, None);
            add(&name(&format!("{kind} backward")), Backward, Bf16, spec, 300, None, None);
        }
        if d >= 32 {
            add(&name("chunks forward"), Forward, Bf16, recipe(), 700, Some(192), chunks);
            add(&name("sums backward"), Backward, Bf16, recipe(), 700, Some(192), chunks);
        }
    }
    let near = || Spec::new(6, 5).terms(4).block(16).near(Near::Blocks(1)).sinks(2);
    add("generic forward f32", Forward, F32, near(), 300, None, None);
    add("generic forward f16 slopes", Forward, F16, near().decay(Decay::Slopes), 300, None, None);
    add("generic full f32", Full, F32, Spec::new(6, 5).terms(5), 200, None, chunks);
    add("generic continued f32 gates", Continued, F32, near().decay(Decay::Gates), 300, None, None);
    add(
        "generic backward f32 gates",
        Backward,
        F32,
        near().decay(Decay::Gates),
        200,
        Some(64),
        None,
    );
    add(
        "generic backward f32 slopes",
        Backward,
        F32,
        near().decay(Decay::Slopes),
        200,
        None,
        pairs,
    );
    for (d, block) in [(8, 8), (16, 16), (32, 16), (64, 16)] {
        let spec = || Spec::new(d, d).terms(3).block(block);
        let recipe = spec().near(Near::Blocks(1)).sinks(2).decay(Decay::Gates);
        add(&format!("decode d={d}"), Decode, Bf16, spec(), 2 * block + 2, None, None);
        add(&format!("decode d={d} near gates"), Decode, F32, recipe, 3 * block + 2, None, None);
        add(&format!("decode d={d} bf16 sums"), Decode, Bf16, spec(), block + 2, None, None);
    }
    cases
}

const HEADS: usize = 2;
const GROUP: usize = 2;

/// Draws of a call's arrays.
struct Inputs<E> {
    q: Buffer<E>,
    k: Buffer<E>,
    v: Buffer<E>,
    gates: Buffer<f32>,
    y: Buffer<E>,
    shapes: [[usize; 4]; 5],
}

impl<E: Element> Inputs<E> {
    fn new(
        device: &Device,
        spec: &Spec,
        (tokens, closed): (usize, bool),
        rng: &mut StdRng,
    ) -> Result<Self, Anything> {
        let (dk, dv) = (spec.d_key(), spec.d_value());
        let of = |heads, dim| [1, heads, tokens, dim];
        let shapes = [
            of(HEADS * GROUP, dk),
            of(HEADS, dk),
            of(HEADS, dv),
            of(HEADS, 1),
            of(HEADS * GROUP, dv),
        ];
        let mut draw = |n: usize| -> Vec<E> {
            (0..n).map(|_| E::from_compute(rng.random_range(-1.5f32..1.5))).collect()
        };
        let [q, k, v] = [0, 1, 2].map(|i| draw(shapes[i].iter().product()));
        let gates: Vec<f32> = (0..HEADS * tokens)
            .map(|_| match closed && rng.random_range(0..10) == 0 {
                true => rng.random_range(-200f32..0.0),
                false => rng.random_range(-0.05f32..0.0),
            })
            .collect();
        let nan = vec![E::from_compute(f32::NAN); shapes[4].iter().product()];
        Ok(Inputs {
            q: Buffer::from_slice(device, &q)?,
            k: Buffer::from_slice(device, &k)?,
            v: Buffer::from_slice(device, &v)?,
            gates: Buffer::from_slice(device, &gates)?,
            y: Buffer::from_slice(device, &nan)?,
            shapes,
        })
    }

    fn views(&self) -> Result<[View<'_, E>; 3], Anything> {
        let [q, k, v, ..] = self.shapes;
        Ok([View::new(&self.q, q)?, View::new(&self.k, k)?, View::new(&self.v, v)?])
    }
}

const SLOPES: [f64; HEADS] = [0.01, 0.05];

fn fading<'a, 's, E: Element>(
    call: Call<'a, 's, E>,
    spec: &Spec,
    inputs: &'a Inputs<E>,
) -> Result<Call<'a, 's, E>, Anything> {
    Ok(match spec.decay() {
        Decay::Gates => call.log_gates(View::new(&inputs.gates, inputs.shapes[3])?),
        Decay::Slopes => call.slopes(&SLOPES),
        _ => call,
    })
}

fn finite<E: Element>(x: &Buffer<E>) -> Result<bool, Anything> {
    Ok(x.to_vec()?.iter().all(|x| x.to_compute().is_finite()))
}

fn run<E: Element>(case: &Case, device: &Device) -> Result<bool, Anything> {
    let spec = case.spec.clone().build()?;
    let mut plan = Plan::new(device, &spec)?;
    if let Some(chunk) = case.chunk {
        plan = plan.with_chunk(chunk);
    }
    if let Some(form) = case.form {
        plan = plan.with_form(form);
    }
    let mut rng = StdRng::seed_from_u64(7);
    let n = case.tokens;
    let closed = case.name.starts_with("closed");
    match case.what {
        What::Forward | What::Packed | What::Full | What::Continued => {
            let mut inputs = Inputs::<E>::new(device, &spec, (n, closed), &mut rng)?;
            let mut y = Buffer::<E>::from_slice(device, &inputs.y.to_vec()?)?;
            let [q, k, v] = inputs.views()?;
            let full = matches!(case.what, What::Full);
            let mut state = State::new(&plan, 1, HEADS)?;
            let ends = [0, n / 3, n];
            let mut call = if full { Call::full(q, k, v) } else { Call::causal(q, k, v) };
            call = fading(call, &spec, &inputs)?;
            call = match case.what {
                What::Packed => call.packed(&ends, &ends),
                What::Continued => call.state(&mut state),
                _ => call,
            };
            let _ = plan.run(call, ViewMut::new(&mut y, inputs.shapes[4])?)?;
            if matches!(case.what, What::Continued) {
                let again = fading(Call::causal(q, k, v), &spec, &inputs)?.state(&mut state);
                let _ = plan.run(again, ViewMut::new(&mut y, inputs.shapes[4])?)?;
            }
            inputs.y = y;
            finite(&inputs.y)
        }
        What::Backward => {
            let inputs = Inputs::<E>::new(device, &spec, (n, closed), &mut rng)?;
            let dy = Inputs::<E>::new(device, &spec, (n, closed), &mut rng)?;
            let (of_q, of_v) = (inputs.shapes[0], inputs.shapes[4]);
            // Upstream gradients are drawn as queries are.
            let dy: Vec<E> =
                dy.q.to_vec()?.into_iter().cycle().take(of_v.iter().product()).collect();
            let dy = Buffer::from_slice(device, &dy)?;
            let [mut dq, mut dk, mut dv] =
                [&inputs.q, &inputs.k, &inputs.v].map(|x| Buffer::<E>::uninit(device, x.len()));
            let (dq, dk, dv) = (dq.as_mut(), dk.as_mut(), dv.as_mut());
            let (Ok(dq), Ok(dk), Ok(dv)) = (dq, dk, dv) else { return Err("no memory".into()) };
            let mut gates = Buffer::<f32>::zeroed(device, HEADS * n)?;
            let mut slopes = Buffer::<f64>::zeroed(device, HEADS)?;
            let [q, k, v] = inputs.views()?;
            let call = fading(Call::causal(q, k, v), &spec, &inputs)?;
            let mut out = Gradients::new(
                ViewMut::new(dq, of_q)?,
                ViewMut::new(dk, inputs.shapes[1])?,
                ViewMut::new(dv, inputs.shapes[2])?,
            );
            match spec.decay() {
                Decay::Gates => out = out.log_gates(ViewMut::new(&mut gates, inputs.shapes[3])?),
                Decay::Slopes => out = out.slopes(&mut slopes),
                _ => {}
            }
            plan.backward(call, View::new(&dy, of_v)?, out)?;
            let fades = gates.to_vec()?.iter().all(|x| x.is_finite())
                && slopes.to_vec()?.iter().all(|x| x.is_finite());
            Ok(finite(dq)? && finite(dk)? && finite(dv)? && fades)
        }
        What::Decode => {
            let storage = Storage { sums: case.sums, compensated: false };
            let mut state = State::with_storage(&plan, 3, HEADS, storage)?;
            let decoder = Decoder::new::<E>(&plan, &state, 1, HEADS * GROUP)?;
            let slots = Buffer::from_slice(device, &[2u32])?;
            let mut all = true;
            for _ in 0..n {
                let mut inputs = Inputs::<E>::new(device, &spec, (1, closed), &mut rng)?;
                let [q, k, v] = inputs.views()?;
                let mut step = Step::new(q, k, v).slots(&slots);
                if spec.decay() == Decay::Gates {
                    step = step.log_gates(View::new(&inputs.gates, inputs.shapes[3])?);
                }
                let mut y = Buffer::<E>::from_slice(device, &inputs.y.to_vec()?)?;
                decoder.step(&mut state, &step, ViewMut::new(&mut y, inputs.shapes[4])?)?;
                inputs.y = y;
                all &= finite(&inputs.y)?;
            }
            Ok(all)
        }
    }
}

fn main() -> Result<ExitCode, Anything> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| words.iter().any(|w| w == word);
    let named: Vec<&String> = words.iter().filter(|w| *w != "emulated").collect();
    let cases = cases();
    // A whole name means that call alone.
    let whole: Vec<bool> =
        named.iter().map(|word| cases.iter().any(|c| c.name == **word)).collect();
    if has("list") {
        cases.iter().for_each(|case| println!("{}", case.name));
        return Ok(ExitCode::SUCCESS);
    }
    let device = if has("emulated") { Device::emulated()? } else { Device::new(0)? };
    let mut code = ExitCode::SUCCESS;
    let mut ran = 0;
    for case in cases {
        let is_meant = |(word, &whole): (&&String, &bool)| {
            if whole { case.name == **word } else { case.name.contains(word.as_str()) }
        };
        if !named.is_empty() && !named.iter().zip(&whole).any(is_meant) {
            continue;
        }
        ran += 1;
        let finite = match case.number {
            Number::F32 => run::<f32>(&case, &device),
            Number::F16 => run::<f16>(&case, &device),
            Number::Bf16 => run::<bf16>(&case, &device),
        }
        .map_err(|error| format!("{}: {error}", case.name))?;
        println!("{}: {}", case.name, if finite { "all finite" } else { "NOT FINITE" });
        if !finite {
            code = ExitCode::FAILURE;
        }
    }
    if ran == 0 {
        println!("no call has such a name");
        code = ExitCode::FAILURE;
    }
    Ok(code)
}
