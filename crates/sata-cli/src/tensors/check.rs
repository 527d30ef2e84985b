//! Whether queries, keys and values fit each other and hold numbers.

use super::{Dtype, Tensor};
use crate::failure::{Failure, Outcome};

/// Checks that the shapes of q, k and v, so called, fit each other.
///
/// # Errors
/// Which do not, and in what.
pub fn check_shapes([q, k, v]: [&str; 3], shapes: [[usize; 4]; 3], causal: bool) -> Outcome {
    let [q_shape, k_shape, v_shape] = shapes;
    for (name, shape) in [q, k, v].into_iter().zip(shapes) {
        let sizes = ["batch", "heads", "tokens", "dim"];
        if let Some(at) = shape.iter().position(|&n| n == 0) {
            return Err(Failure::new(format!(
                "{name} has shape {shape:?}, with {} = 0: there is nothing to attend",
                sizes[at]
            )));
        }
    }
    if v_shape[..3] != k_shape[..3] {
        return Err(Failure::new(format!(
            "{v} has shape {v_shape:?}, but {k} has {k_shape:?}: they must agree in batch, heads \
             and tokens"
        )));
    }
    if q_shape[0] != k_shape[0] || q_shape[3] != k_shape[3] {
        return Err(Failure::new(format!(
            "{k} has shape {k_shape:?}, but {q} has {q_shape:?}: they must agree in batch and dim"
        )));
    }
    if !q_shape[1].is_multiple_of(k_shape[1]) {
        return Err(Failure::new(format!(
            "{q} has shape {q_shape:?}, but its {} heads are no multiple of the {} heads of {k}",
            q_shape[1], k_shape[1]
        )));
    }
    if causal && q_shape[2] != k_shape[2] {
        return Err(Failure::new(format!(
            "{k} has {} tokens and {q} has {}, but causal attention needs as many keys as queries",
            k_shape[2], q_shape[2]
        ))
        .hint("--full lets every query see all keys, however many of each there are"));
    }
    Ok(())
}

/// Checks that all numbers of a tensor are finite in `dtype`.
///
/// # Errors
/// Where one is not.
pub fn check_numbers(name: &str, tensor: &Tensor, shape: [usize; 4], dtype: Dtype) -> Outcome {
    let fits = |x: f64| if dtype == Dtype::F64 { x.is_finite() } else { (x as f32).is_finite() };
    let numbers = tensor.data.to_f64();
    let Some(at) = numbers.iter().position(|&x| !fits(x)) else {
        return Ok(());
    };
    let [_, heads, tokens, dim] = shape;
    let place = [at / dim / tokens / heads, at / dim / tokens % heads, at / dim % tokens, at % dim];
    let message =
        format!("{name} holds {} at {place:?} [batch, head, token, channel]", numbers[at]);
    Err(if numbers[at].is_finite() {
        Failure::new(format!("{message}, which f32 cannot hold")).hint("--dtype f64 holds it")
    } else {
        Failure::new(message).hint("no attention is defined there: record the activations again")
    })
}
