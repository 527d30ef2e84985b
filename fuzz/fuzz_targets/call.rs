//! Any shapes, strides, lengths, masks and packed sequences: a call is refused with nothing
//! changed, or answers every query.
#![no_main]

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use sata::{
    Call, Centre, Decay, Element, Error, Form, Near, Plan, Real, Series, Spec, State, View, ViewMut,
};

/// Mostly small, sometimes beyond all bounds.
fn number(u: &mut Unstructured<'_>, most: usize) -> Result<usize> {
    Ok(match u.int_in_range(0..=19u8)? {
        0 => u.arbitrary()?,
        1 => usize::MAX - u.int_in_range(0..=3usize)?,
        2 => 1 << u.int_in_range(0..=63u8)?,
        _ => u.int_in_range(0..=most)?,
    })
}

/// A number that fits what it stands for, mostly.
fn near(u: &mut Unstructured<'_>, right: usize) -> Result<usize> {
    if u.ratio(29, 30)? { Ok(right) } else { number(u, right.saturating_mul(2).max(2)) }
}

fn shape(u: &mut Unstructured<'_>, right: [usize; 4]) -> Result<[usize; 4]> {
    let mut shape = right;
    for n in &mut shape {
        *n = near(u, *n)?;
    }
    Ok(shape)
}

/// Dense strides, another order of the dimensions, a broadcast or anything.
fn strides(u: &mut Unstructured<'_>, [batch, heads, tokens, d]: [usize; 4]) -> Result<[usize; 3]> {
    let times = |a: usize, b: usize| a.saturating_mul(b);
    let _ = batch;
    Ok(match u.int_in_range(0..=7u8)? {
        0 => [number(u, 64)?, number(u, 64)?, number(u, 64)?],
        1 => [times(times(tokens, heads), d), d, times(heads, d)],
        2 => [d, times(times(tokens, heads), d), times(heads, d)],
        3 => [0, times(tokens, d), d],
        4 => [times(tokens, d), 0, d],
        _ => [times(times(heads, tokens), d), times(tokens, d), d],
    })
}

fn data<E: Element>(u: &mut Unstructured<'_>) -> Result<Vec<E>> {
    let len = u.int_in_range(0..=4095usize)?;
    let mut x: Vec<E> =
        (0..len).map(|i| E::from_compute(E::Compute::from_f64((i as f64 * 0.7).sin()))).collect();
    // A few numbers of any size.
    for _ in 0..u.int_in_range(0..=3u8)? {
        let at = u.int_in_range(0..=8191usize)?;
        let with = E::from_compute(E::Compute::from_f64(u.arbitrary()?));
        if let Some(x) = x.get_mut(at) {
            *x = with;
        }
    }
    Ok(x)
}

fn cu(u: &mut Unstructured<'_>, tokens: usize, sequences: usize) -> Result<Vec<usize>> {
    let mut cu = vec![0];
    for i in 1..=sequences {
        let last = cu[i - 1];
        let right = if i == sequences { tokens } else { u.int_in_range(last..=tokens.max(last))? };
        cu.push(near(u, right)?);
    }
    if u.ratio(1, 30)? {
        cu = (0..u.int_in_range(0..=3usize)?).map(|_| number(u, 8)).collect::<Result<_>>()?;
    }
    Ok(cu)
}

/// What would take for ever, or all memory, although nothing is wrong with it.
fn long(shape: [usize; 4]) -> bool {
    shape.iter().fold(1usize, |all, &n| all.saturating_mul(n.max(1))) > 1 << 16
}

fn call<E: Element>(u: &mut Unstructured<'_>) -> Result<()> {
    let (d_key, d_value) = (u.int_in_range(1..=5)?, u.int_in_range(1..=20)?);
    let mut spec = Spec::new(d_key, d_value).block(u.int_in_range(1..=20)?);
    spec = match u.int_in_range(0..=5u8)? {
        0 => spec.series(Series::power(2)),
        1 => spec.series(Series::Fixed { coefficients: vec![0.0, 0.5, 0.0, 0.1] }),
        2 => spec.series(Series::Gauss).terms(2 * u.int_in_range(1..=3)?),
        3 => spec.series(Series::hermite()).terms(u.int_in_range(1..=5)?),
        _ => spec.terms(u.int_in_range(1..=5)?),
    };
    if u.arbitrary()? {
        spec = spec.near(Near::Blocks(u.int_in_range(0..=3)?));
    }
    spec = spec.sinks(u.int_in_range(0..=9usize)?.saturating_sub(4));
    spec = spec.decay(*u.choose(&[Decay::None, Decay::None, Decay::Slopes, Decay::Gates])?);
    let mut plan = Plan::new(&spec.build().unwrap()).unwrap();
    match u.int_in_range(0..=2u8)? {
        0 => plan = plan.with_form(Form::Direct),
        1 => plan = plan.with_form(Form::State),
        _ => {}
    }
    let packed = u.arbitrary()?;
    let batch = if packed { 1 } else { u.int_in_range(1..=3)? };
    let (heads, group) = (u.int_in_range(1..=3)?, u.int_in_range(1..=3)?);
    let causal = u.arbitrary()?;
    let queries = u.int_in_range(0..=150)?;
    let keys = if causal { queries } else { u.int_in_range(0..=150)? };
    let sequences = if packed { u.int_in_range(1..=3)? } else { batch };
    let q_shape = shape(u, [batch, heads * group, queries, d_key])?;
    let k_shape = shape(u, [batch, heads, keys, d_key])?;
    let v_shape = shape(u, [batch, heads, keys, d_value])?;
    let out_shape = shape(u, [batch, heads * group, queries, d_value])?;
    let (q, k, v) = (data::<E>(u)?, data::<E>(u)?, data::<E>(u)?);
    let (cu_q, cu_k) = {
        let cu_q = cu(u, queries, sequences)?;
        let cu_k = if causal { cu_q.clone() } else { cu(u, keys, sequences)? };
        (cu_q, cu_k)
    };
    let view = |x, shape, strides| View::<E>::strided(x, shape, strides);
    let (Ok(q), Ok(k), Ok(v)) = (
        view(&q, q_shape, strides(u, q_shape)?),
        view(&k, k_shape, strides(u, k_shape)?),
        view(&v, v_shape, strides(u, v_shape)?),
    ) else {
        return Ok(());
    };
    if [q_shape, k_shape, v_shape].map(long).contains(&true) {
        return Ok(());
    }
    let mut y = vec![E::from_compute(E::Compute::from_f64(-7.0)); u.int_in_range(0..=8191usize)?];
    let before: Vec<u64> = y.iter().map(|y| y.to_compute().bits()).collect();
    let Ok(out) = ViewMut::strided(&mut y, out_shape, strides(u, out_shape)?) else {
        return Ok(());
    };
    let mut call = if causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
    let mask_len = near(u, k_shape[0].saturating_mul(k_shape[2]))?.min(1 << 16);
    let mask: Vec<bool> = (0..mask_len).map(|i| i % 3 != 1).collect();
    if u.arbitrary()? {
        call = call.key_mask(&mask);
    }
    if packed {
        call = call.packed(&cu_q, &cu_k);
    }
    let slopes = data::<f64>(u)?;
    let slopes: Vec<f64> = slopes.iter().map(|x| x.abs()).take(near(u, heads)?).collect();
    if (plan.spec().decay() == Decay::Slopes) != u.ratio(1, 20)? {
        call = call.slopes(&slopes);
    }
    let gates = data::<f32>(u)?;
    let gates: Vec<f32> = gates.iter().map(|x| -x.abs()).collect();
    let gates_shape = shape(u, [k_shape[0], k_shape[1], k_shape[2], 1])?;
    let gates_strides = strides(u, gates_shape)?;
    if let (true, Ok(gates)) = (
        (plan.spec().decay() == Decay::Gates) != u.ratio(1, 20)?,
        View::strided(&gates, gates_shape, gates_strides),
    ) {
        call = call.log_gates(gates);
    }
    call = call.diagnose(u.ratio(1, 4)?);
    let kept = u.arbitrary()?;
    let state_sequences = near(u, sequences)?.clamp(1, 4);
    let mut state = State::<E::Compute>::new(&plan, state_sequences, heads).unwrap();
    if u.ratio(1, 4)? {
        let centre =
            Centre::new(heads, &vec![0.3; heads * d_key], &vec![-0.7; heads * d_value]).unwrap();
        if let Ok(centred) = State::centred(&plan, state_sequences, heads, centre) {
            state = centred;
        }
    }
    let empty = state.to_bytes();
    if kept {
        call = call.state(&mut state);
    }
    match plan.run(call.strict(u.arbitrary()?), out) {
        Ok(found) => {
            assert_eq!(found.queries as usize, q_shape[..3].iter().product::<usize>());
            if kept {
                let seen: u64 = (0..state.sequences()).map(|i| state.position(i)).sum();
                assert_eq!(seen as usize, k_shape[0] * k_shape[2]);
            }
        }
        Err(Error::Denominators(found)) => assert!(!found.is_clean()),
        Err(_) => {
            let after: Vec<u64> = y.iter().map(|y| y.to_compute().bits()).collect();
            assert!(after == before, "a call that was refused has written");
            assert!(state.to_bytes() == empty, "a call that was refused has changed the state");
        }
    }
    Ok(())
}

fuzz_target!(|bytes: &[u8]| {
    let mut u = Unstructured::new(bytes);
    let _ = match u.arbitrary() {
        Ok(true) => call::<f32>(&mut u),
        _ => call::<f64>(&mut u),
    };
});
