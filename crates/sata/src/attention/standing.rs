//! Where queries stand among a window's tokens: what is far, what near, and how far all has faded.

use std::ops::Range;

use super::method::Method;
use super::window::{Sinks, Window, split};
use crate::arch::{Buffer, TOKENS};
use crate::state::{Mark, faded};
use crate::{Near, Real};

/// What some queries see, token counts padded to a multiple of TOKENS.
///
/// The far part of each query is relative to its *anchor*, the last far token that has a weight:
/// so it is at least about 1 however much everything has faded since. All parts together are
/// relative to the *reference*, the last token of all that has a weight, for the same reason.
pub(super) struct Standing<T> {
    /// Far tokens of the window: those before this.
    pub far: Vec<u32>,
    /// Near tokens of the window: from this …
    pub from: Vec<u32>,
    /// … to before this.
    pub to: Vec<u32>,
    /// Sinks before this.
    pub sinks: Vec<u32>,
    /// Whether there is a far past.
    pub has_far: Vec<bool>,
    /// What far sums have faded by at the anchor; empty where nothing fades.
    pub factor: Vec<T>,
    /// g at the reference less g at the anchor, likewise.
    pub gap: Vec<f64>,
    /// g at the anchor, at the reference, and at the reference since the sequence's start.
    pub anchor: [Buffer<T>; 2],
    pub own: [Buffer<T>; 2],
    pub since: [Buffer<T>; 2],
}

impl<T: Real> Standing<T> {
    fn empty(method: &Method<T>, count: usize) -> Self {
        let numbers = || Vec::with_capacity(count.next_multiple_of(TOKENS));
        let fading = if method.fades { count.next_multiple_of(TOKENS) } else { 0 };
        let both = || [Buffer::zeroed(fading), Buffer::zeroed(fading)];
        Standing {
            far: numbers(),
            from: numbers(),
            to: numbers(),
            sinks: numbers(),
            has_far: Vec::with_capacity(count),
            factor: Vec::with_capacity(fading),
            gap: Vec::with_capacity(fading),
            anchor: both(),
            own: both(),
            since: both(),
        }
    }

    /// Queries that belong to tokens `which` of the window, whose first follows `place` tokens
    /// counted from the beginning of a block and `folded` of the sequence.
    pub(super) fn causal(
        method: &Method<T>,
        window: &Window<T>,
        sinks: &Sinks<T>,
        mark: &Mark,
        which: Range<usize>,
        place: usize,
        folded: u64,
    ) -> Self {
        let mut standing = Self::empty(method, which.len());
        for i in which {
            let far = method.far(place + i).saturating_sub(place).min(i + 1);
            let position = folded + (place + i) as u64;
            standing.push(method, window, sinks, mark, [far, i + 1], position);
        }
        standing.finish()
    }

    /// `count` queries that see the whole window, and stand at its last token.
    pub(super) fn full(
        method: &Method<T>,
        window: &Window<T>,
        sinks: &Sinks<T>,
        mark: &Mark,
        count: usize,
    ) -> Self {
        let mut standing = Self::empty(method, count);
        let far = if method.near == Near::None { window.count } else { 0 };
        for _ in 0..count {
            standing.push(method, window, sinks, mark, [far, window.count], u64::MAX);
        }
        standing.finish()
    }

    /// `count` queries without decay that see `more + 1`, `more + 2`, … tokens by exp.
    pub(super) fn offset(
        method: &Method<T>,
        window: &Window<T>,
        first: usize,
        count: usize,
    ) -> Self {
        let mut standing = Self::empty(method, count);
        for t in 0..count {
            let to = (first + t + 1).min(window.count);
            standing.push(method, window, &Sinks::default(), &Mark::default(), [0, to], 0);
        }
        standing.finish()
    }

    #[allow(clippy::too_many_arguments)]
    fn push(
        &mut self,
        method: &Method<T>,
        window: &Window<T>,
        sinks: &Sinks<T>,
        mark: &Mark,
        [far, to]: [usize; 2],
        position: u64,
    ) {
        let live = window.live[far] as usize;
        self.far.push(far as u32);
        self.from.push(far as u32);
        self.to.push(to as u32);
        let old = position.saturating_add(1).min(sinks.count as u64);
        self.sinks.push(old as u32);
        self.has_far.push(mark.count > 0 || live > 0);
        if !method.fades {
            return;
        }
        // Far sums are relative to the last token summed, which g has left by `lag`.
        let anchor = if live > 0 { window.g_after(live) } else { -mark.lag };
        let own = match window.live[to] {
            0 if mark.count > 0 => -mark.lag,
            0 => sinks.last(old as usize).map_or(0.0, |g| g - mark.total),
            last => window.g_after(last as usize),
        };
        self.factor.push(faded(anchor + mark.lag));
        self.gap.push(own - anchor);
        let at = self.gap.len() - 1;
        for (to, g) in
            [(&mut self.anchor, anchor), (&mut self.own, own), (&mut self.since, mark.total + own)]
        {
            (to[0][at], to[1][at]) = split(g);
        }
    }

    /// Pads what kernels read.
    fn finish(mut self) -> Self {
        let padded = self.far.len().next_multiple_of(TOKENS);
        for bounds in [&mut self.far, &mut self.from, &mut self.to, &mut self.sinks] {
            let last = bounds.last().copied().unwrap_or(0);
            bounds.resize(padded, last);
        }
        self
    }

    /// How many queries.
    pub(super) fn len(&self) -> usize {
        self.has_far.len()
    }
}
