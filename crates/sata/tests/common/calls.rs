//! Plans and calls of any spec: all at once, and in parts that a state joins.

use std::ops::Range;

use sata::{
    Call, Diagnostics, Element, Form, Plan, Real, Series, Spec, SpecBuilder, State, View, ViewMut,
};

use super::{Fade, Inputs, Sizes};

/// The start of a spec; `terms` counts where the series does not imply it.
pub fn spec(s: Sizes, series: &Series, terms: usize) -> SpecBuilder {
    let builder = Spec::new(s.d_key, s.d_value).series(series.clone());
    match series {
        Series::Fixed { .. } | Series::Power { .. } => builder,
        _ => builder.terms(terms),
    }
}

pub fn plan_of(spec: &Spec, form: Option<Form>) -> Plan {
    let plan = Plan::new(spec).unwrap();
    match form {
        Some(form) => plan.with_form(form),
        None => plan,
    }
}

/// Outputs of one call over everything, NaN where nothing was written.
pub fn run<E: Element>(
    plan: &Plan,
    inputs: &Inputs<E>,
    fade: &Fade,
    causal: bool,
) -> (Vec<E>, Diagnostics) {
    let s = inputs.sizes;
    let mut y = vec![E::from_compute(E::Compute::from_f64(f64::NAN)); s.y().iter().product()];
    let (q, k, v) = (inputs.q(), inputs.k(), inputs.v());
    let mut call = if causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
    if let Some(mask) = &inputs.mask {
        call = call.key_mask(mask);
    }
    let call = fade.give(call, s, 0, s.keys);
    let found = plan.run(call, ViewMut::new(&mut y, s.y()).unwrap()).unwrap();
    (y, found)
}

/// `n` tokens from token `from` on, where they lie among all.
pub fn part<E: Element>(x: &[E], shape: [usize; 4], from: usize, n: usize) -> View<'_, E> {
    let [batch, heads, tokens, d] = shape;
    let strides = [heads * tokens * d, tokens * d, d];
    View::strided(&x[(from * d).min(x.len())..], [batch, heads, n, d], strides).unwrap()
}

/// The same of what is written.
pub fn part_mut<E: Element>(
    x: &mut [E],
    shape: [usize; 4],
    from: usize,
    n: usize,
) -> ViewMut<'_, E> {
    let [batch, heads, tokens, d] = shape;
    let strides = [heads * tokens * d, tokens * d, d];
    let at = (from * d).min(x.len());
    ViewMut::strided(&mut x[at..], [batch, heads, n, d], strides).unwrap()
}

/// The masks of `range` of every sequence, side by side.
pub fn part_of_mask<E>(inputs: &Inputs<E>, range: &Range<usize>) -> Option<Vec<bool>> {
    let s = inputs.sizes;
    inputs.mask.as_ref().map(|mask| {
        let rows = mask.chunks(s.keys.max(1)).take(s.batch);
        rows.flat_map(|row| row[range.clone()].to_vec()).collect()
    })
}

/// Tokens `range` of every sequence go through the state; their outputs go to their places in `y`.
pub fn feed<T: Real>(
    plan: &Plan,
    state: &mut State<T>,
    inputs: &Inputs<T>,
    fade: &Fade,
    range: Range<usize>,
    y: &mut [T],
) -> Diagnostics {
    let (s, from, n) = (inputs.sizes, range.start, range.len());
    let mask = part_of_mask(inputs, &range);
    let mut call = Call::causal(
        part(&inputs.q, s.q(), from, n),
        part(&inputs.k, s.k(), from, n),
        part(&inputs.v, s.v(), from, n),
    );
    if let Some(mask) = &mask {
        call = call.key_mask(mask);
    }
    let call = fade.give(call, s, from, n).state(state);
    plan.run(call, part_mut(y, s.y(), from, n)).unwrap()
}

/// A new state, fed with all of `inputs` in calls of `lengths` tokens; all outputs.
pub fn feed_in<T: Real>(
    plan: &Plan,
    inputs: &Inputs<T>,
    fade: &Fade,
    lengths: &[usize],
) -> (State<T>, Vec<T>) {
    let s = inputs.sizes;
    let mut state = State::new(plan, s.batch, s.kv_heads).unwrap();
    let mut y = blank(s);
    let mut from = 0;
    for n in lengths {
        feed(plan, &mut state, inputs, fade, from..from + n, &mut y);
        from += n;
    }
    assert_eq!(from, s.keys, "lengths are all tokens");
    (state, y)
}

/// Outputs before anything is written.
pub fn blank<E: Element>(s: Sizes) -> Vec<E> {
    vec![E::from_compute(E::Compute::from_f64(f64::NAN)); s.y().iter().product()]
}

pub fn bits<T: Real>(x: &[T]) -> Vec<u64> {
    x.iter().map(|x| x.bits()).collect()
}

/// All queries read the state's past, the keys before `from`, and the keys from there on.
pub fn read_full<T: Real>(
    plan: &Plan,
    state: &mut State<T>,
    inputs: &Inputs<T>,
    fade: &Fade,
    from: usize,
) -> Vec<T> {
    let s = inputs.sizes;
    let n = s.keys - from;
    let mask = part_of_mask(inputs, &(from..s.keys));
    let (k, v) = (part(&inputs.k, s.k(), from, n), part(&inputs.v, s.v(), from, n));
    let mut call = Call::full(inputs.q(), k, v);
    if let Some(mask) = &mask {
        call = call.key_mask(mask);
    }
    let mut y = blank(s);
    let call = fade.give(call, s, from, n).state(state);
    plan.run(call, ViewMut::new(&mut y, s.y()).unwrap()).unwrap();
    y
}
