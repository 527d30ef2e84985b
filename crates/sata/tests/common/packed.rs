//! Sequences of their own lengths side by side in a batch of one.

use sata::{Call, Diagnostics, Plan, Real, State, View, ViewMut};

use super::{Fade, Inputs, Sizes};

/// Where each of some lengths begins, and where the last ends.
pub fn cumulative(lengths: &[usize]) -> Vec<usize> {
    let mut cu = vec![0];
    lengths.iter().for_each(|n| cu.push(cu[cu.len() - 1] + n));
    cu
}

/// The tokens `seen[i] .. seen[i] + lengths[i]` of each sequence, head by head.
fn packed<X: Copy>(
    rows: &[(&[X], usize)],
    heads: usize,
    d: usize,
    seen: &[usize],
    lengths: &[usize],
) -> Vec<X> {
    let mut out = vec![];
    for head in 0..heads {
        for (i, &(x, tokens)) in rows.iter().enumerate() {
            let from = (head * tokens + seen[i]) * d;
            out.extend_from_slice(&x[from..from + lengths[i] * d]);
        }
    }
    out
}

/// One causal call over the next `lengths[i]` tokens after `seen[i]` of each sequence (each a batch
/// of one), with the state where there is one; outputs go to their places in `y[i]`.
pub fn run_packed<T: Real>(
    plan: &Plan,
    state: Option<&mut State<T>>,
    all: &[(Inputs<T>, Fade)],
    seen: &[usize],
    lengths: &[usize],
    y: &mut [Vec<T>],
) -> Diagnostics {
    let s = all[0].0.sizes;
    let (heads, total) = (s.kv_heads * s.group, lengths.iter().sum());
    let rows = |of: fn(&Inputs<T>) -> &[T]| -> Vec<(&[T], usize)> {
        all.iter().map(|(inputs, _)| (of(inputs), inputs.sizes.keys)).collect()
    };
    let q = packed(&rows(|x| &x.q), heads, s.d_key, seen, lengths);
    let k = packed(&rows(|x| &x.k), s.kv_heads, s.d_key, seen, lengths);
    let v = packed(&rows(|x| &x.v), s.kv_heads, s.d_value, seen, lengths);
    let masks: Vec<Vec<bool>> = all
        .iter()
        .map(|(x, _)| x.mask.clone().unwrap_or_else(|| vec![true; x.sizes.keys]))
        .collect();
    let masks: Vec<(&[bool], usize)> = masks.iter().map(|mask| (&mask[..], mask.len())).collect();
    let mask = packed(&masks, 1, 1, seen, lengths);
    let cu = cumulative(lengths);
    // Gates come along token by token, slopes are those of the heads.
    let sizes = Sizes { batch: 1, queries: total, keys: total, ..s };
    let fade = match &all[0].1 {
        Fade::Gates { .. } => {
            let gates: Vec<(&[f32], usize)> = all
                .iter()
                .map(|(_, fade)| match fade {
                    Fade::Gates { keys, log_gates } => (&log_gates[..], *keys),
                    other => panic!("{other:?} among gates"),
                })
                .collect();
            let log_gates = packed(&gates, s.kv_heads, 1, seen, lengths);
            Fade::Gates { keys: total, log_gates }
        }
        other => other.clone(),
    };
    let mut call = Call::causal(
        View::new(&q, sizes.q()).unwrap(),
        View::new(&k, sizes.k()).unwrap(),
        View::new(&v, sizes.v()).unwrap(),
    )
    .packed(&cu, &cu)
    .key_mask(&mask);
    if let Some(state) = state {
        call = call.state(state);
    }
    let mut out = super::calls::blank::<T>(sizes);
    let call = fade.give(call, sizes, 0, total);
    let found = plan.run(call, ViewMut::new(&mut out, sizes.y()).unwrap()).unwrap();
    for (i, &n) in lengths.iter().enumerate() {
        for head in 0..heads {
            let from = (head * total + cu[i]) * s.d_value;
            let to = (head * all[i].0.sizes.queries + seen[i]) * s.d_value;
            y[i][to..to + n * s.d_value].copy_from_slice(&out[from..from + n * s.d_value]);
        }
    }
    found
}
