//! Two pasts become one.

use super::head::HeadState;
use super::mark::faded;
use super::sums::FoldWork;
use super::{MAX_POSITION, Sequence, State};
use crate::basis::Basis;
use crate::{Error, Near, Real, Spec};

impl<T: Real> State<T> {
    /// Appends the past of `next`, a state of the stretch of tokens that follows this one's, made
    /// on its own. Merging is associative: (a b) c = a (b c), to rounding.
    ///
    /// With near blocks this state must have seen whole blocks: what is near is counted in blocks
    /// from the start. Sinks are those of the whole: the first tokens of `next` become tokens like
    /// others.
    ///
    /// # Errors
    /// [`Error::State`] when the two differ in spec, centre, sequences or heads, when near blocks
    /// would not line up, or when they are too long together to be counted; nothing changes then.
    pub fn merge(&mut self, next: &Self) -> Result<(), Error> {
        self.check_kin(next)?;
        for (mine, other) in self.sequences.iter().zip(&next.sequences) {
            let differs =
                |state: String, call: String| Err(Error::State { field: "position", state, call });
            let sum = mine.position.checked_add(other.position);
            if sum.is_none_or(|sum| sum > MAX_POSITION) {
                return differs(mine.position.to_string(), other.position.to_string());
            }
            let block = self.spec.block() as u64;
            if self.spec.near() != Near::None && mine.position % block != 0 {
                let call = format!("near blocks, which begin at multiples of {block}");
                return differs(mine.position.to_string(), call);
            }
        }
        let kernels = T::kernels(crate::Level::detect()?, self.spec.d_value(), false);
        let mut work = FoldWork::new(&self.basis, self.spec.d_value(), kernels);
        for (mine, other) in self.sequences.iter_mut().zip(&next.sequences) {
            append(mine, other, &self.spec, &self.basis, &mut work);
        }
        Ok(())
    }
}

fn append<T: Real>(
    mine: &mut Sequence<T>,
    other: &Sequence<T>,
    spec: &Spec,
    basis: &Basis,
    work: &mut FoldWork<T>,
) {
    let block = spec.block();
    let folded = other.position - other.open as u64;
    // Blocks of this past that stay near to what comes: those that the other does not push out.
    let keeps = match spec.near() {
        Near::Blocks(n) if folded == 0 => (n - (other.open / block).min(n)) * block,
        _ => 0,
    };
    let fold = mine.open.saturating_sub(keeps);
    let kept = mine.open - fold;
    for (head, next) in mine.heads.iter_mut().zip(&other.heads) {
        // g at the end of this past, counted from its start.
        let end = head.mark.total + head.open.fading.iter().take(mine.open).sum::<f64>();
        head.fold_open(basis, fold, mine.open, work);
        join(head, next, mine.position, end, [kept, other.open], folded, spec, basis, work);
    }
    mine.open = kept + other.open;
    mine.position += other.position;
}

/// Appends one head's past, of which `open` tokens are not folded, to another's, which has
/// `position` tokens and `kept` open ones.
#[allow(clippy::too_many_arguments)]
fn join<T: Real>(
    head: &mut HeadState<T>,
    next: &HeadState<T>,
    position: u64,
    end: f64,
    [kept, open]: [usize; 2],
    folded: u64,
    spec: &Spec,
    basis: &Basis,
    work: &mut FoldWork<T>,
) {
    let (d_key, d_value) = (spec.d_key(), spec.d_value());
    let sinks = spec.sinks();
    let theirs = (sinks as u64).min(folded + open as u64) as usize;
    // The first of their sinks that stay sinks.
    let stay = (sinks as u64).saturating_sub(position) as usize;
    if folded > 0 {
        // Their sinks that are folded come between the two far pasts.
        let early = theirs.min(folded as usize);
        let g = &next.sinks.fading[..early.min(next.sinks.fading.len())];
        head.fold_raw(basis, &next.sinks, 0..early, g, |i| i >= stay, work);
        let passed = g.last().copied().unwrap_or(0.0);
        let (mine, mark) = (head.mark, next.mark);
        // Sums in another order: rounding could leave more than nothing of no decay.
        let rest = (mark.total - passed).min(0.0);
        if mark.count > 0 {
            let since = (mark.total - mark.lag - passed).min(0.0);
            if mine.count > 0 {
                head.sums.fade(faded(since + mine.lag));
            }
            head.sums.add(&next.sums);
            head.mark.lag = mark.lag;
        } else {
            head.mark.lag += rest;
        }
        head.mark.count = mine.count + mark.count;
        head.mark.total += rest;
    }
    for i in 0..open {
        head.open.copy(&next.open, d_key, d_value, i, kept + i);
    }
    for i in 0..theirs {
        if i < stay {
            let at = position as usize + i;
            head.sinks.copy(&next.sinks, d_key, d_value, i, at);
            if let Some(g) = head.sinks.fading.get_mut(at) {
                *g += end;
            }
        } else if i as u64 >= folded {
            // It waits among the open tokens, without its weight.
            let at = kept + (i as u64 - folded) as usize;
            let own = head.open.fading.get(at).copied();
            head.open.copy(&next.sinks, d_key, d_value, i, at);
            if let (Some(g), Some(own)) = (head.open.fading.get_mut(at), own) {
                *g = own;
            }
        }
    }
    head.reach = head.reach.max(next.reach);
}
