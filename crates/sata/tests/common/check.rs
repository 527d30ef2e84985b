//! Whole calls against the oracle, in both forms and both types.

use sata::{Element, Form, Spec};

use super::calls::{plan_of, run};
use super::truth::{Truth, assert_most_rows, assert_rows, truth};
use super::{Fade, Inputs, tolerance};

/// Beyond this slack single rows may be lost to rounding.
const UNSURE: f64 = 1000.0;

/// One call in f64 and f32, direct and by sums; each tolerance is that of the type times `slack`.
#[track_caller]
pub fn check_forms(spec: &Spec, inputs: &Inputs<f32>, fade: &Fade, causal: bool, slack: [f64; 2]) {
    let truth = truth(spec, inputs, fade, causal);
    for form in [Form::Direct, Form::State] {
        check_form::<f64>(spec, &inputs.to(), fade, causal, form, &truth, slack[0]);
        check_form::<f32>(spec, inputs, fade, causal, form, &truth, slack[1]);
    }
}

/// One call in one form.
#[track_caller]
pub fn check_form<E: Element>(
    spec: &Spec,
    inputs: &Inputs<E>,
    fade: &Fade,
    causal: bool,
    form: Form,
    truth: &Truth,
    slack: f64,
) {
    let (y, found) = run(&plan_of(spec, Some(form)), inputs, fade, causal);
    let what = describe(spec, inputs, fade, causal, &format!("{form:?} {}", E::NAME));
    if slack > UNSURE {
        assert_most_rows(&what, &y, truth, slack * tolerance::<E>());
    } else {
        assert_rows(&what, &y, truth, slack * tolerance::<E>());
    }
    assert_eq!(found.queries, truth.denominators.len() as u64, "{what}");
    assert_eq!(found.non_finite, 0, "{what}");
}

/// A case in words, short enough to read.
pub fn describe<E>(
    spec: &Spec,
    inputs: &Inputs<E>,
    fade: &Fade,
    causal: bool,
    how: &str,
) -> String {
    let s = inputs.sizes;
    let sees = if causal { "causal" } else { "full" };
    let masked = if inputs.mask.is_some() { ", masked" } else { "" };
    format!(
        "{:?} P = {}, near {:?} of {}, {} sinks, decay {:?}, {}x{}x{} heads, {} queries, {} keys, \
         d = {}, {}, {sees}{masked}, {how}",
        spec.series(),
        spec.terms(),
        spec.near(),
        spec.block(),
        spec.sinks(),
        fade.decay(),
        s.batch,
        s.kv_heads,
        s.group,
        s.queries,
        s.keys,
        s.d_key,
        s.d_value,
    )
}
