//! `--center`: the means of keys and values.

use sata::{Centre, View};

use super::input::Input;
use crate::failure::Outcome;
use crate::tensors::{Number, check_numbers, check_shapes};

/// The means of an input, which is checked first: what is wrong is wrong with k or v, not with
/// their means.
///
/// # Errors
/// Shapes that do not fit each other, and numbers that are not finite.
pub fn centre<E: Number>(input: &Input, causal: bool) -> Outcome<Centre> {
    let names = ["q", "k", "v"];
    let [_, k_shape, v_shape] = input.shapes;
    check_shapes(names, input.shapes, causal)?;
    let tensors = [&input.q, &input.k, &input.v];
    for ((name, tensor), shape) in names.into_iter().zip(tensors).zip(input.shapes) {
        check_numbers(name, tensor, shape, E::wrap(vec![]).dtype())?;
    }
    let (k, v) = (E::take(&input.k.data), E::take(&input.v.data));
    Ok(Centre::mean(View::new(&k, k_shape)?, View::new(&v, v_shape)?)?)
}
