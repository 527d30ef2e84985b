//! The direct form: every query weighs every key.

use super::Env;
use super::gradients::{Out, by_logs};
use super::panel::{Made, PanelWork, Raws};
use crate::arch::QUERIES;
use crate::attention::standing::Standing;
use crate::attention::window::{Sinks, Source, Window};
use crate::attention::{Piece, Seen};
use crate::state::{Mark, Raw};
use crate::{Element, parallel};

/// A share of one key/value head's queries: every so many panels.
struct Task<'p, 'a, E: Element> {
    piece: &'p Piece<'a, E>,
    kv_head: usize,
    share: usize,
    /// Gradients of keys and of sinks.
    made: [Made<E::Compute>; 2],
}

/// All pieces.
pub(super) fn backward<E: Element>(
    env: &Env<'_, E>,
    pieces: &[Piece<'_, E>],
    kv_heads: usize,
    seen: Seen,
    out: Out<'_, E>,
) {
    let units = pieces.len() * kv_heads;
    let longest = pieces.iter().map(|piece| piece.queries).max().unwrap_or(0);
    // Where heads would leave threads idle, several share the queries of each.
    let shares = parallel::threads().div_ceil(units.max(1)).min(longest.div_ceil(QUERIES)).max(1);
    let mut tasks = vec![];
    for piece in pieces {
        for kv_head in 0..kv_heads {
            for share in 0..shares {
                tasks.push(Task { piece, kv_head, share, made: Default::default() });
            }
        }
    }
    parallel::for_each(&mut tasks, |task| work(env, task, shares, seen));
    let mut by_slope = vec![0.0; kv_heads];
    for tasks in tasks.chunks_mut(shares) {
        let Some((first, others)) = tasks.split_first_mut() else {
            continue;
        };
        for other in others {
            for (made, other) in first.made.iter_mut().zip(&other.made) {
                made.add(other);
            }
        }
        by_slope[first.kv_head] += finish(env, first, &out);
    }
    if let Some(slopes) = out.slopes {
        slopes.copy_from_slice(&by_slope);
    }
}

fn work<E: Element>(env: &Env<'_, E>, task: &mut Task<'_, '_, E>, shares: usize, seen: Seen) {
    let (method, piece, kv_head) = (env.method, task.piece, task.kv_head);
    let source = Source { method, piece, kv_head, open: 0, raw: None, folded: 0 };
    let mut window = Window::new(method, piece.keys);
    window.load(source, 0..piece.keys);
    let mut sinks = Sinks::default();
    if method.sinks > 0 {
        let count = method.sinks.min(piece.keys);
        let mut raw = Raw::new([method.d_key, method.d_value], count, method.fades);
        source.keep_sinks(&mut raw, 0.0);
        sinks = Sinks::new(method, &raw, count);
    }
    let raws = Raws::new(env, &window, &sinks);
    task.made = [Made::new(env, piece.keys), Made::new(env, sinks.count)];
    let mut work = PanelWork::new(env);
    for first in (task.share * QUERIES..piece.queries).step_by(shares * QUERIES) {
        let queries = first..(first + QUERIES).min(piece.queries);
        let nothing = Mark::default();
        let standing = match seen {
            Seen::Causal => {
                Standing::causal(method, &window, &sinks, &nothing, queries.clone(), 0, 0)
            }
            _ => Standing::full(method, &window, &sinks, &nothing, queries.len()),
        };
        for g in 0..env.group {
            let head = kv_head * env.group + g;
            env.load(piece, head, queries.clone(), &mut work);
            let made = task.made.each_mut();
            // SAFETY: this task alone answers these queries.
            unsafe {
                env.panel(piece, head, queries.clone(), &raws, &standing, None, made, &mut work);
            }
        }
    }
}

/// Writes one head's gradients; gives that by its slope.
fn finish<E: Element>(env: &Env<'_, E>, task: &mut Task<'_, '_, E>, out: &Out<'_, E>) -> f64 {
    let (method, keys) = (env.method, task.piece.keys);
    let [of_keys, of_sinks] = &mut task.made;
    // Sinks are tokens of the call.
    for sink in 0..method.sinks.min(keys) {
        let (d, e) = (env.padded_key, method.padded);
        of_keys.dk[sink * d..][..d].copy_from_slice(&of_sinks.dk[sink * d..][..d]);
        of_keys.dv[sink * e..][..e].copy_from_slice(&of_sinks.dv[sink * e..][..e]);
        if let Some(dw) = of_keys.dw.get_mut(sink) {
            *dw = of_sinks.dw[sink];
        }
    }
    for token in 0..keys {
        let dk = &of_keys.dk[token * env.padded_key..][..method.d_key];
        let dv = &of_keys.dv[token * method.padded..][..method.d_value];
        // SAFETY: this thread alone writes.
        unsafe { out.write_key(task.piece, task.kv_head, token, [dk, dv]) };
    }
    if !env.fades {
        return 0.0;
    }
    let (by_log, _) = by_logs(&of_keys.dw[..keys], 0.0);
    // SAFETY: as above.
    unsafe { out.write_fading(task.piece, task.kv_head, &by_log) };
    -by_log.iter().sum::<f64>()
}
