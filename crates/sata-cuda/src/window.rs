//! What a call's tokens need before any sums: tables of its sequences, which tokens are there, how
//! all fade, open tokens and sinks side by side with new ones; and what is left in the state after.
//! Shared by the back ends.

use std::sync::Arc;

use crate::problem::{Fading, Past, Problem};
use crate::units::{Units, grid};
use crate::{Buffer, Error, Launch, Plain, RawView, Unit, unit};

/// `Sequence` of `generic.cuh`: one sequence of a call, whose *window* is its open tokens and then
/// the call's own.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(crate) struct Sequence {
    pub q_batch: i64,
    pub q_first: i64,
    pub queries: i64,
    pub k_batch: i64,
    pub k_first: i64,
    pub open: i64,
    pub tokens: i64,
    pub folded: i64,
    pub work: i64,
    pub row: i64,
    pub piece: i64,
    pub pieces: i64,
    pub committed: i64,
    pub sink: i64,
    pub sinks: i64,
    pub ring: i64,
    pub settled: i64,
}

// SAFETY: numbers of one size.
unsafe impl Plain for Sequence {}

/// `StateSums` of `generic.cuh`: addresses, or 0.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct StateSums {
    pub sums: u64,
    pub low: u64,
    pub z: u64,
    pub z_low: u64,
    pub is_bf16: i32,
    pub padding: i32,
}

impl StateSums {
    pub(crate) fn of(past: Option<&Past>) -> Self {
        past.map_or(StateSums::default(), |past| StateSums {
            sums: past.arrays.sums,
            low: past.arrays.sums_low,
            z: past.arrays.z,
            z_low: past.arrays.z_low,
            is_bf16: i32::from(past.is_bf16),
            padding: 0,
        })
    }
}

/// The address of a state's marks, or 0.
pub(crate) fn marks(past: Option<&Past>) -> u64 {
    past.map_or(0, |past| past.arrays.marks)
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Decay {
    gates: RawView,
    slopes: u64,
    open: u64,
    sequences: u64,
    log: u64,
    g: u64,
    sums: u64,
    works: i64,
    capacity: i64,
    pieces: i64,
    sequence_count: i32,
    kv_heads: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Living {
    mask: u64,
    open: u64,
    sinks: u64,
    sequences: u64,
    live: u64,
    last: u64,
    sink_live: u64,
    sink_last: u64,
    ends: u64,
    sink_ends: u64,
    mask_batch: i64,
    capacity: i64,
    sink_capacity: i64,
    most_sinks: i64,
    pieces: i64,
    sink_pieces: i64,
    sequence_count: i32,
    kv_heads: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Tokens {
    x: RawView,
    state: u64,
    sequences: u64,
    live: u64,
    work: u64,
    works: i64,
    capacity: i64,
    dim: i64,
    kv_heads: i32,
    tiles: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct SinkPlaces {
    sequences: u64,
    g: u64,
    fading: u64,
    marks: u64,
    sink_g: u64,
    works: i64,
    sink_works: i64,
    sink_capacity: i64,
    kv_heads: i32,
    padding: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Settle {
    sequences: u64,
    live: u64,
    last: u64,
    log: u64,
    g: u64,
    sink_live: u64,
    sink_g: u64,
    call_reach: u64,
    marks: u64,
    open_weights: u64,
    open_fading: u64,
    sink_weights: u64,
    sink_fading: u64,
    reach: u64,
    positions: u64,
    open: u64,
    works: i64,
    sink_works: i64,
    capacity: i64,
    sink_capacity: i64,
    kv_heads: i32,
    padding: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Reach {
    k: RawView,
    mask: u64,
    sequences: u64,
    reach: u64,
    mask_batch: i64,
    dim: i64,
    kv_heads: i32,
    tiles: i32,
}

/// Elements, or tokens, of a block of `gather.cu` and of `reach`.
const ELEMENTS: usize = 1024;
const REACH_TOKENS: usize = 256;
/// Tokens of a block of `decay.cu`.
const PIECE: usize = 2048;
/// Tokens of a window at most, which kernels count in 31 bits.
const MOST_TOKENS: usize = i32::MAX as usize;

fn decay_unit() -> Unit {
    unit!("decay.cu")
        .define("PIECE_TOKENS", PIECE)
        .size_of::<Decay>("DECAY_BYTES")
        .size_of::<Living>("LIVING_BYTES")
}

fn gather_unit(element: &'static str, out: &'static str) -> Unit {
    unit!("gather.cu").define("E", element).define("OUT", out).size_of::<Tokens>("TOKENS_BYTES")
}

fn settle_unit(element: &'static str) -> Unit {
    unit!("settle.cu")
        .define("E", element)
        .size_of::<Settle>("SETTLE_BYTES")
        .size_of::<Reach>("REACH_BYTES")
        .size_of::<SinkPlaces>("SINK_PLACES_BYTES")
}

/// The sequences of a problem, without pieces: work arrays hold their windows side by side.
pub(crate) fn sequences(problem: &Problem<'_>) -> Vec<Sequence> {
    let capacity = problem.past.as_ref().map_or(1, |past| past.capacity.max(1)) as u64;
    let (mut work, mut row, mut sink) = (0, 0, 0);
    let mut all = Vec::with_capacity(problem.sequences.len());
    for stretch in &problem.sequences {
        let sequence = Sequence {
            q_batch: stretch.q_batch as i64,
            q_first: stretch.q_first as i64,
            queries: stretch.queries as i64,
            k_batch: stretch.k_batch as i64,
            k_first: stretch.k_first as i64,
            open: stretch.open as i64,
            tokens: stretch.tokens() as i64,
            folded: stretch.folded as i64,
            work,
            row,
            piece: 0,
            pieces: 0,
            committed: 0,
            sink,
            sinks: problem.sinks(stretch) as i64,
            ring: (stretch.folded % capacity) as i64,
            settled: problem.folded(stretch.tokens()) as i64,
        };
        work += sequence.tokens;
        row += sequence.queries;
        sink += sequence.sinks;
        all.push(sequence);
    }
    all
}

/// Keys and values of sinks, and what is known of them.
#[derive(Debug)]
pub(crate) struct Sinks {
    /// `[kv_heads][sinks][d_key]` and `[d_value]`, f32.
    pub keys: Buffer<f32>,
    pub values: Buffer<f32>,
    /// `[sinks]`: whether it is there, and how many there are up to the last before the next that is.
    pub live: Buffer<u8>,
    pub last: Buffer<i32>,
    /// `[kv_heads][sinks]`: g counted from the window's start, where weights fade.
    pub g: Option<Buffer<f64>>,
    /// Sinks of all sequences.
    pub works: usize,
}

/// A call's windows.
#[derive(Debug)]
pub(crate) struct Windows {
    pub host: Vec<Sequence>,
    pub sequences: Arc<Buffer<Sequence>>,
    /// Tokens of all windows.
    pub works: usize,
    /// `[works]`: whether a token is there (not masked, and no sink), and how many tokens of its
    /// window there are up to the last before the next that is. Empty where that was not asked for.
    pub live: Buffer<u8>,
    pub last: Buffer<i32>,
    /// `[kv_heads][works]`: the logarithm of each token's decay (where a state is kept) and their
    /// running sum from the window's start, where weights fade.
    pub log: Option<Buffer<f64>>,
    pub g: Option<Buffer<f64>>,
    pub sinks: Option<Sinks>,
    /// `[slots]`: the largest |k|² of the call's tokens, where it is asked for.
    pub reach: Option<Buffer<f32>>,
}

/// Open tokens and new ones in one array each, `[kv_heads][works][dim]`.
#[derive(Debug)]
pub(crate) struct Gathered<T> {
    pub keys: Buffer<T>,
    pub values: Buffer<T>,
}

impl<T: Plain> Gathered<T> {
    /// Keys and values as views whose only batch row holds all windows.
    pub(crate) fn views(&self, works: usize, [d_key, d_value]: [usize; 2]) -> [RawView; 2] {
        [(self.keys.address(), d_key), (self.values.address(), d_value)].map(|(address, dim)| {
            RawView { address, batch: 0, head: (works * dim) as i64, token: dim as i64 }
        })
    }
}

pub(crate) fn address<T: Plain>(buffer: Option<&Buffer<T>>) -> u64 {
    buffer.map_or(0, Buffer::address)
}

/// Pieces of so many tokens of `sequences` sequences: each has as many as it needs, or one more.
fn pieces(tokens: usize, sequences: usize) -> usize {
    tokens / PIECE + sequences
}

impl Windows {
    /// Of a problem whose sequences are `host`; with the largest keys, if `reach`.
    pub(crate) fn new(
        units: &Units,
        problem: &Problem<'_>,
        host: Vec<Sequence>,
        reach: bool,
    ) -> Result<Self, Error> {
        Self::make(units, problem, host, reach, true)
    }

    /// The same for kernels that know what to do without `live` and `last`, which are empty where
    /// every token is there.
    pub(crate) fn lean(
        units: &Units,
        problem: &Problem<'_>,
        host: Vec<Sequence>,
        reach: bool,
    ) -> Result<Self, Error> {
        let all = problem.mask.is_none() && problem.past.is_none() && problem.spec.sinks() == 0;
        Self::make(units, problem, host, reach, !all)
    }

    fn make(
        units: &Units,
        problem: &Problem<'_>,
        host: Vec<Sequence>,
        reach: bool,
        living: bool,
    ) -> Result<Self, Error> {
        let device = problem.device;
        if let Some(tokens) = host.iter().map(|s| s.tokens as usize).find(|&n| n > MOST_TOKENS) {
            let what = format!("a call over {tokens} tokens, open ones included,");
            return Err(Error::Unsupported { what });
        }
        let works = host.iter().map(|s| s.tokens as usize).sum();
        let heads = problem.kv_heads;
        let fades = problem.fades();
        let of_tokens = |wanted: bool| -> Result<Option<Buffer<f64>>, Error> {
            wanted.then(|| Buffer::uninit(device, heads * works)).transpose()
        };
        let mut windows = Windows {
            sequences: units.table(&host)?,
            works,
            live: Buffer::uninit(device, if living { works } else { 0 })?,
            last: Buffer::uninit(device, if living { works } else { 0 })?,
            log: of_tokens(fades && problem.past.is_some())?,
            g: of_tokens(fades)?,
            sinks: None,
            reach: None,
            host,
        };
        if problem.spec.sinks() > 0 {
            let sinks = windows.host.iter().map(|s| s.sinks as usize).sum();
            windows.sinks = Some(Sinks {
                keys: Buffer::uninit(device, heads * sinks * problem.spec.d_key())?,
                values: Buffer::uninit(device, heads * sinks * problem.spec.d_value())?,
                live: Buffer::uninit(device, sinks)?,
                last: Buffer::uninit(device, sinks)?,
                g: fades.then(|| Buffer::uninit(device, heads * sinks)).transpose()?,
                works: sinks,
            });
        }
        if living {
            windows.find_live(units, problem)?;
        }
        windows.find_g(units, problem)?;
        windows.gather_sinks(units, problem)?;
        if reach {
            windows.find_reach(units, problem)?;
        }
        Ok(windows)
    }

    /// Whether some tokens waited in the state: then back ends read gathered keys and values.
    pub(crate) fn has_open(&self) -> bool {
        self.host.iter().any(|s| s.open > 0)
    }

    /// Addresses of `live` and `last`, 0 where they are empty.
    pub(crate) fn living(&self) -> [u64; 2] {
        if self.live.is_empty() { [0; 2] } else { [self.live.address(), self.last.address()] }
    }

    fn find_live(&self, units: &Units, problem: &Problem<'_>) -> Result<(), Error> {
        if self.host.is_empty() {
            return Ok(());
        }
        let pieces_of = |tokens| pieces(tokens, self.host.len());
        let most = [pieces_of(self.works), self.sinks.as_ref().map_or(0, |s| pieces_of(s.works))];
        let ends = Buffer::<i32>::uninit(problem.device, most[0])?;
        let sink_ends = Buffer::<i32>::uninit(problem.device, most[1])?;
        let past = problem.past.as_ref();
        let sinks = self.sinks.as_ref();
        let (mask, mask_batch) = problem.mask.unwrap_or((0, 0));
        let p = Living {
            mask,
            open: past.map_or(0, |past| past.arrays.open_weights),
            sinks: past.map_or(0, |past| past.arrays.sink_weights),
            sequences: self.sequences.address(),
            live: self.live.address(),
            last: self.last.address(),
            sink_live: address(sinks.map(|sinks| &sinks.live)),
            sink_last: address(sinks.map(|sinks| &sinks.last)),
            ends: ends.address(),
            sink_ends: sink_ends.address(),
            mask_batch: mask_batch as i64,
            capacity: past.map_or(1, |past| past.capacity.max(1)) as i64,
            sink_capacity: past.map_or(1, |past| past.sinks) as i64,
            most_sinks: problem.spec.sinks() as i64,
            pieces: most[0] as i64,
            sink_pieces: most[1] as i64,
            sequence_count: self.host.len() as i32,
            kv_heads: problem.kv_heads as i32,
        };
        let blocks = [most[0].max(most[1]), 1 + usize::from(sinks.is_some()), 1];
        let launch = Launch { grid: grid(blocks)?, block: [256, 1, 1], shared: 0 };
        for name in ["living_ends", "living"] {
            let kernel = units.kernel(name, &decay_unit())?;
            // SAFETY: `Living` is the kernels' own (its size is checked); arrays have `works` elements,
            // or one a piece, the state's and the mask's sizes are those of the checked call.
            unsafe { kernel.launch_on(problem.device, launch, &p) }?;
        }
        Ok(())
    }

    fn find_g(&self, units: &Units, problem: &Problem<'_>) -> Result<(), Error> {
        let Some(g) = &self.g else {
            return Ok(());
        };
        if self.host.is_empty() {
            return Ok(());
        }
        let pieces = pieces(self.works, self.host.len());
        let sums = Buffer::<f64>::uninit(problem.device, problem.kv_heads * pieces)?;
        let past = problem.past.as_ref();
        let (slopes, gates) = match problem.fading {
            Fading::Slopes(slopes) => (slopes, RawView::NONE),
            Fading::Gates(gates) => (0, gates),
            Fading::None => (0, RawView::NONE),
        };
        let p = Decay {
            gates,
            slopes,
            open: past.map_or(0, |past| past.arrays.open_fading),
            sequences: self.sequences.address(),
            log: address(self.log.as_ref()),
            g: g.address(),
            sums: sums.address(),
            works: self.works as i64,
            capacity: past.map_or(1, |past| past.capacity.max(1)) as i64,
            pieces: pieces as i64,
            sequence_count: self.host.len() as i32,
            kv_heads: problem.kv_heads as i32,
        };
        let grid = grid([pieces, problem.kv_heads, 1])?;
        let launch = Launch { grid, block: [256, 1, 1], shared: 0 };
        for name in ["running_sums", "running"] {
            let kernel = units.kernel(name, &decay_unit())?;
            // SAFETY: `Decay` is the kernels' own; g and log have `works` elements per head, sums one
            // a piece, gates and slopes are the checked call's.
            unsafe { kernel.launch_on(problem.device, launch, &p) }?;
        }
        Ok(())
    }

    fn gather_sinks(&self, units: &Units, problem: &Problem<'_>) -> Result<(), Error> {
        let Some(sinks) = &self.sinks else {
            return Ok(());
        };
        let past = problem.past.as_ref();
        let element = problem.element;
        let spec = problem.spec;
        for (x, state, work, dim) in [
            (problem.k, past.map_or(0, |past| past.arrays.sink_keys), &sinks.keys, spec.d_key()),
            (
                problem.v,
                past.map_or(0, |past| past.arrays.sink_values),
                &sinks.values,
                spec.d_value(),
            ),
        ] {
            let p = Tokens {
                x,
                state,
                sequences: self.sequences.address(),
                live: sinks.live.address(),
                work: work.address(),
                works: sinks.works as i64,
                capacity: past.map_or(1, |past| past.sinks) as i64,
                dim: dim as i64,
                kv_heads: problem.kv_heads as i32,
                tiles: 0,
            };
            self.each_element(
                units,
                problem,
                "gather_sinks",
                &gather_unit(element, "f32"),
                p,
                true,
            )?;
        }
        let Some(sink_g) = &sinks.g else {
            return Ok(());
        };
        let p = SinkPlaces {
            sequences: self.sequences.address(),
            g: address(self.g.as_ref()),
            fading: past.map_or(0, |past| past.arrays.sink_fading),
            marks: marks(past),
            sink_g: sink_g.address(),
            works: self.works as i64,
            sink_works: sinks.works as i64,
            sink_capacity: past.map_or(1, |past| past.sinks) as i64,
            kv_heads: problem.kv_heads as i32,
            padding: 0,
        };
        let kernel = units.kernel("sink_places", &settle_unit(element))?;
        let grid = grid([self.host.len(), problem.kv_heads, 1])?;
        let launch = Launch { grid, block: [256, 1, 1], shared: 0 };
        // SAFETY: `SinkPlaces` is the kernel's own; arrays are those made for it.
        unsafe { kernel.launch_on(problem.device, launch, &p) }
    }

    fn find_reach(&mut self, units: &Units, problem: &Problem<'_>) -> Result<(), Error> {
        let reach = Buffer::zeroed(problem.device, self.host.len() * problem.kv_heads)?;
        let keys = problem.sequences.iter().map(|s| s.keys).max().unwrap_or(0);
        let tiles = keys.div_ceil(REACH_TOKENS);
        if tiles > 0 {
            let (mask, mask_batch) = problem.mask.unwrap_or((0, 0));
            let p = Reach {
                k: problem.k,
                mask,
                sequences: self.sequences.address(),
                reach: reach.address(),
                mask_batch: mask_batch as i64,
                dim: problem.spec.d_key() as i64,
                kv_heads: problem.kv_heads as i32,
                tiles: tiles as i32,
            };
            let element = problem.element;
            let kernel = units.kernel("reach", &settle_unit(element))?;
            let grid = grid([tiles * self.host.len(), problem.kv_heads, 1])?;
            let launch = Launch { grid, block: [256, 1, 1], shared: 0 };
            // SAFETY: `Reach` is the kernel's own; k and mask are the checked call's.
            unsafe { kernel.launch_on(problem.device, launch, &p) }?;
        }
        self.reach = Some(reach);
        Ok(())
    }

    /// One of the kernels of `gather.cu`, over all elements of windows or sinks.
    fn each_element(
        &self,
        units: &Units,
        problem: &Problem<'_>,
        name: &'static str,
        unit: &Unit,
        mut p: Tokens,
        sinks: bool,
    ) -> Result<(), Error> {
        let most = self.host.iter().map(|s| if sinks { s.sinks } else { s.tokens }).max();
        let tiles = (most.unwrap_or(0) as usize * p.dim as usize).div_ceil(ELEMENTS);
        if tiles == 0 {
            return Ok(());
        }
        p.tiles = tiles as i32;
        let kernel = units.kernel(name, unit)?;
        let grid = grid([tiles * self.host.len(), problem.kv_heads, 1])?;
        let launch = Launch { grid, block: [256, 1, 1], shared: 0 };
        // SAFETY: `Tokens` is the kernels' own; work arrays have `works · dim` elements per head, the
        // state's and the call's sizes have been checked.
        unsafe { kernel.launch_on(problem.device, launch, &p) }
    }

    /// Open tokens and new ones side by side, as `T`, which kernels call `out`.
    pub(crate) fn gather<T: Plain>(
        &self,
        units: &Units,
        problem: &Problem<'_>,
        out: &'static str,
    ) -> Result<Gathered<T>, Error> {
        let (d_key, d_value) = (problem.spec.d_key(), problem.spec.d_value());
        let past = problem.past.as_ref();
        let all = problem.kv_heads * self.works;
        let gathered = Gathered {
            keys: Buffer::uninit(problem.device, all * d_key)?,
            values: Buffer::uninit(problem.device, all * d_value)?,
        };
        for (x, state, work, dim) in [
            (
                problem.k,
                past.map_or(0, |past| past.arrays.open_keys),
                gathered.keys.address(),
                d_key,
            ),
            (
                problem.v,
                past.map_or(0, |past| past.arrays.open_values),
                gathered.values.address(),
                d_value,
            ),
        ] {
            let p = self.tokens(problem, x, state, work, dim);
            self.each_element(
                units,
                problem,
                "gather",
                &gather_unit(problem.element, out),
                p,
                false,
            )?;
        }
        Ok(gathered)
    }

    fn tokens(
        &self,
        problem: &Problem<'_>,
        x: RawView,
        state: u64,
        work: u64,
        dim: usize,
    ) -> Tokens {
        Tokens {
            x,
            state,
            sequences: self.sequences.address(),
            live: self.live.address(),
            work,
            works: self.works as i64,
            capacity: problem.past.as_ref().map_or(1, |past| past.capacity.max(1)) as i64,
            dim: dim as i64,
            kv_heads: problem.kv_heads as i32,
            tiles: 0,
        }
    }

    /// Leaves in the state what is not sums: the last tokens, new sinks, marks, places. Last of all
    /// that a call does; the windows have been made with `reach`.
    pub(crate) fn settle(&self, units: &Units, problem: &Problem<'_>) -> Result<(), Error> {
        let Some(past) = &problem.past else {
            return Ok(());
        };
        let (element, spec) = (problem.element, problem.spec);
        for (x, state, dim) in [
            (problem.k, past.arrays.open_keys, spec.d_key()),
            (problem.v, past.arrays.open_values, spec.d_value()),
        ] {
            let p = self.tokens(problem, x, state, 0, dim);
            self.each_element(units, problem, "keep", &gather_unit(element, "f32"), p, false)?;
        }
        if let Some(sinks) = &self.sinks {
            for (state, work, dim) in [
                (past.arrays.sink_keys, &sinks.keys, spec.d_key()),
                (past.arrays.sink_values, &sinks.values, spec.d_value()),
            ] {
                let p = Tokens {
                    live: sinks.live.address(),
                    works: sinks.works as i64,
                    capacity: past.sinks as i64,
                    ..self.tokens(problem, RawView::NONE, state, work.address(), dim)
                };
                let unit = gather_unit(element, "f32");
                self.each_element(units, problem, "keep_sinks", &unit, p, true)?;
            }
        }
        let sinks = self.sinks.as_ref();
        let p = Settle {
            sequences: self.sequences.address(),
            live: self.live.address(),
            last: self.last.address(),
            log: address(self.log.as_ref()),
            g: address(self.g.as_ref()),
            sink_live: address(sinks.map(|sinks| &sinks.live)),
            sink_g: address(sinks.and_then(|sinks| sinks.g.as_ref())),
            call_reach: address(self.reach.as_ref()),
            marks: past.arrays.marks,
            open_weights: past.arrays.open_weights,
            open_fading: past.arrays.open_fading,
            sink_weights: past.arrays.sink_weights,
            sink_fading: past.arrays.sink_fading,
            reach: past.arrays.reaches,
            positions: past.arrays.positions,
            open: past.arrays.open,
            works: self.works as i64,
            sink_works: sinks.map_or(0, |sinks| sinks.works) as i64,
            capacity: past.capacity.max(1) as i64,
            sink_capacity: past.sinks as i64,
            kv_heads: problem.kv_heads as i32,
            padding: 0,
        };
        let kernel = units.kernel("settle", &settle_unit(element))?;
        let grid = grid([self.host.len(), problem.kv_heads, 1])?;
        let launch = Launch { grid, block: [256, 1, 1], shared: 0 };
        // SAFETY: `Settle` is the kernel's own; the state's arrays have the sizes of the checked call.
        unsafe { kernel.launch_on(problem.device, launch, &p) }
    }
}
