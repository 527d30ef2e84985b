//! Cases on a GPU, or on the emulator.

use std::ops::Range;

use sata::{Decay, Diagnostics, Spec};
use sata_cuda::{
    Buffer, Call, Decoder, Device, Element, Gradients, Plain, Plan, State, StateGradient, Step,
    Storage, View, ViewMut,
};

use super::inputs::{Inputs, Sizes, len, wide};
use super::machine::{ByInputs, How, Machine};
use crate::failure::{Failure, Outcome};

/// Bytes of freed memory that hold NaN before a case is computed: what it allocates next is made of
/// them, and whoever reads what was not written finds them.
const POISONED: usize = 64 << 20;

/// A case's inputs on a device.
struct There<'c, E: Element> {
    inputs: &'c Inputs<E>,
    q: Buffer<E>,
    k: Buffer<E>,
    v: Buffer<E>,
    mask: Option<Buffer<u8>>,
    gates: Option<Buffer<f32>>,
}

impl<'c, E: Element> There<'c, E> {
    fn new(device: &Device, inputs: &'c Inputs<E>) -> Outcome<Self> {
        let mask: Option<Vec<u8>> =
            inputs.mask.as_ref().map(|mask| mask.iter().map(|&there| there.into()).collect());
        Ok(There {
            inputs,
            q: Buffer::from_slice(device, &inputs.q)?,
            k: Buffer::from_slice(device, &inputs.k)?,
            v: Buffer::from_slice(device, &inputs.v)?,
            mask: mask.map(|mask| Buffer::from_slice(device, &mask)).transpose()?,
            gates: inputs.gates.as_ref().map(|x| Buffer::from_slice(device, x)).transpose()?,
        })
    }

    /// Some queries of all sequences and some of their keys.
    fn call(
        &self,
        queries: Range<usize>,
        keys: Range<usize>,
        causal: bool,
    ) -> Outcome<Call<'_, '_, E>> {
        let s = self.inputs.sizes;
        let q = part(&self.q, s.q(), queries)?;
        let (k, v) = (part(&self.k, s.k(), keys.clone())?, part(&self.v, s.v(), keys.clone())?);
        let mut call = if causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
        if let Some(mask) = &self.mask {
            let from = keys.start.min(mask.len());
            // SAFETY: within the buffer, which the view borrows.
            let mask = unsafe {
                View::from_raw(
                    mask.device(),
                    mask.address_of(from),
                    mask.len() - from,
                    [s.batch, 1, 1, keys.len()],
                    [s.keys; 3],
                )
            }?;
            call = call.key_mask(mask);
        }
        if let Some(slopes) = &self.inputs.slopes {
            call = call.slopes(slopes);
        }
        if let Some(gates) = &self.gates {
            call = call.log_gates(part(gates, s.gates(), keys)?);
        }
        Ok(call)
    }
}

/// A case on a device.
pub struct OnGpu<'c, E: Element> {
    plan: Plan,
    there: There<'c, E>,
    causal: bool,
    storage: Storage,
    slopes: Option<Buffer<f64>>,
    y: Buffer<E>,
    state: Option<State>,
    decoder: Option<Decoder>,
    /// Outputs of steps: their row, and what is in it.
    stepped: Vec<(usize, Vec<E>)>,
}

impl<'c, E: Element> OnGpu<'c, E> {
    /// Makes the plan and brings the inputs.
    ///
    /// # Errors
    /// What the library refuses, or the device has no room for.
    pub fn new(
        device: &Device,
        spec: &Spec,
        inputs: &'c Inputs<E>,
        causal: bool,
        how: How,
    ) -> Outcome<Self> {
        let mut plan = Plan::new(device, spec)?;
        if let Some(form) = how.form {
            plan = plan.with_form(form);
        }
        if let Some(chunk) = how.chunk {
            plan = plan.with_chunk(chunk);
        }
        if how.generic {
            plan = plan.without_matrix_units();
        }
        let bytes = if device.is_emulated() { 0 } else { POISONED };
        Buffer::<u8>::uninit(device, bytes)?.fill_bytes(0xff)?;
        let mut machine = OnGpu {
            plan,
            there: There::new(device, inputs)?,
            causal,
            storage: how.storage.unwrap_or(Storage::of(spec)),
            slopes: inputs.slopes.as_ref().map(|x| Buffer::from_slice(device, x)).transpose()?,
            y: Buffer::uninit(device, len(inputs.sizes.y()))?,
            state: None,
            decoder: None,
            stepped: vec![],
        };
        machine.poison()?;
        Ok(machine)
    }

    fn sizes(&self) -> Sizes {
        self.there.inputs.sizes
    }
}

/// Where some tokens of a row-major tensor are: address, numbers from there on, shape and strides.
fn place<T: Plain>(
    buffer: &Buffer<T>,
    [batch, heads, all, dim]: [usize; 4],
    tokens: &Range<usize>,
) -> (u64, usize, [usize; 4], [usize; 3]) {
    let from = (tokens.start * dim).min(buffer.len());
    let strides = [heads * all * dim, all * dim, dim];
    let shape = [batch, heads, tokens.len(), dim];
    (buffer.address_of(from), buffer.len() - from, shape, strides)
}

fn part<T: Plain>(
    buffer: &Buffer<T>,
    shape: [usize; 4],
    tokens: Range<usize>,
) -> Outcome<View<'_, T>> {
    let (address, len, shape, strides) = place(buffer, shape, &tokens);
    // SAFETY: within the buffer, which the view borrows.
    Ok(unsafe { View::from_raw(buffer.device(), address, len, shape, strides) }?)
}

fn part_mut<T: Plain>(
    buffer: &mut Buffer<T>,
    shape: [usize; 4],
    tokens: Range<usize>,
) -> Outcome<ViewMut<'_, T>> {
    let (address, len, shape, strides) = place(buffer, shape, &tokens);
    // SAFETY: within the buffer, which the view borrows.
    Ok(unsafe { ViewMut::from_raw(buffer.device(), address, len, shape, strides) }?)
}

/// Numbers that are not.
fn blank<T: Plain>(device: &Device, shape: [usize; 4]) -> Outcome<Buffer<T>> {
    let mut buffer = Buffer::uninit(device, len(shape))?;
    buffer.fill_bytes(0xff)?;
    Ok(buffer)
}

impl<E: Element> Machine<E> for OnGpu<'_, E> {
    fn poison(&mut self) -> Outcome {
        self.stepped.clear();
        Ok(self.y.fill_bytes(0xff)?)
    }

    fn whole(&mut self, cu: Option<&[usize]>) -> Outcome<Diagnostics> {
        let s = self.sizes();
        let mut call = self.there.call(0..s.queries, 0..s.keys, self.causal)?;
        if let Some(cu) = cu {
            call = call.packed(cu, cu);
        }
        Ok(self.plan.run(call, ViewMut::new(&mut self.y, s.y())?)?)
    }

    fn begin(&mut self) -> Outcome {
        let s = self.sizes();
        self.decoder = None;
        self.state = Some(State::with_storage(&self.plan, s.batch, s.kv_heads, self.storage)?);
        Ok(())
    }

    fn feed(&mut self, tokens: Range<usize>) -> Outcome<Diagnostics> {
        let s = self.sizes();
        let mut call = self.there.call(tokens.clone(), tokens.clone(), true)?;
        if let Some(state) = &mut self.state {
            call = call.state(state);
        }
        Ok(self.plan.run(call, part_mut(&mut self.y, s.y(), tokens)?)?)
    }

    fn read(&mut self, cut: usize) -> Outcome<Diagnostics> {
        let s = self.sizes();
        let mut state = State::with_storage(&self.plan, s.batch, s.kv_heads, self.storage)?;
        let nobody = Sizes { queries: 0, ..s };
        let mut nothing = Buffer::uninit(self.plan.device(), 0)?;
        let call = self.there.call(0..0, 0..cut, false)?.state(&mut state);
        self.plan.run(call, ViewMut::new(&mut nothing, nobody.y())?)?;
        let call = self.there.call(0..s.queries, cut..s.keys, false)?.state(&mut state);
        Ok(self.plan.run(call, ViewMut::new(&mut self.y, s.y())?)?)
    }

    fn is_lockstep(&self) -> bool {
        false
    }

    fn step(&mut self, tokens: &[(usize, usize)]) -> Outcome {
        let (s, device) = (self.sizes(), self.plan.device().clone());
        let inputs = self.there.inputs;
        let Some(state) = &mut self.state else {
            return Err(Failure::new("a step needs a state"));
        };
        let query_heads = s.query_heads();
        let decoder = match &mut self.decoder {
            Some(decoder) => decoder,
            none => none.insert(Decoder::new::<E>(&self.plan, state, s.batch, query_heads)?),
        };
        // Entries that are left over are passed over.
        let entry = |i: usize| tokens.get(i).copied();
        let slots: Vec<u32> =
            (0..s.batch).map(|i| entry(i).map_or(u32::MAX, |entry| entry.0 as u32)).collect();
        let gather = |x: &[E], heads: usize, all: usize, dim: usize| -> Vec<E> {
            let mut out = vec![];
            for i in 0..s.batch {
                let (sequence, token) = entry(i).unwrap_or((0, 0));
                for head in 0..heads {
                    let at = ((sequence * heads + head) * all + token) * dim;
                    out.extend_from_slice(&x[at..at + dim]);
                }
            }
            out
        };
        let q = gather(&inputs.q, query_heads, s.queries, s.d_key);
        let k = gather(&inputs.k, s.kv_heads, s.keys, s.d_key);
        let v = gather(&inputs.v, s.kv_heads, s.keys, s.d_value);
        let up = |x: &[E]| Buffer::from_slice(&device, x);
        let (q, k, v, slots) = (up(&q)?, up(&k)?, up(&v)?, Buffer::from_slice(&device, &slots)?);
        let mut gates = vec![];
        if let Some(all) = &inputs.gates {
            for i in 0..s.batch {
                let (sequence, token) = entry(i).unwrap_or((0, 0));
                gates.extend(
                    (0..s.kv_heads).map(|h| all[(sequence * s.kv_heads + h) * s.keys + token]),
                );
            }
        }
        let gates = Buffer::from_slice(&device, &gates)?;
        let shape = |heads: usize, dim: usize| [s.batch, heads, 1, dim];
        let mut step = Step::new(
            View::new(&q, shape(query_heads, s.d_key))?,
            View::new(&k, shape(s.kv_heads, s.d_key))?,
            View::new(&v, shape(s.kv_heads, s.d_value))?,
        )
        .slots(&slots);
        if inputs.gates.is_some() {
            step = step.log_gates(View::new(&gates, shape(s.kv_heads, 1))?);
        }
        if let Some(slopes) = &self.slopes {
            step = step.slopes(slopes);
        }
        let out = shape(query_heads, s.d_value);
        let mut y = blank::<E>(&device, out)?;
        decoder.step(state, &step, ViewMut::new(&mut y, out)?)?;
        let y = y.to_vec()?;
        for (i, rows) in y.chunks_exact(query_heads * s.d_value).enumerate() {
            let Some((sequence, token)) = entry(i) else {
                if rows.iter().any(|y| !y.to_compute().is_nan()) {
                    return Err(Failure::new(
                        "a step wrote the output of an entry without a sequence",
                    ));
                }
                continue;
            };
            for (head, row) in rows.chunks_exact(s.d_value).enumerate() {
                let at = (sequence * query_heads + head) * s.queries + token;
                self.stepped.push((at, row.to_vec()));
            }
        }
        Ok(())
    }

    fn move_state(&mut self) -> Outcome {
        if let Some(state) = &mut self.state {
            let host = state.to_host(&self.plan)?;
            let host = sata::State::from_bytes(self.plan.host(), &host.to_bytes(), "the state")?;
            *state = State::from_host_with(&self.plan, &host, self.storage)?;
            self.decoder = None;
        }
        Ok(())
    }

    fn y(&mut self) -> Outcome<Vec<E>> {
        let mut y = self.y.to_vec()?;
        let d = self.sizes().d_value;
        for (at, row) in &self.stepped {
            y[at * d..][..d].copy_from_slice(row);
        }
        Ok(y)
    }

    fn backward(&mut self, dy: &[E], cut: Option<usize>) -> Outcome<Option<ByInputs>> {
        let (s, device) = (self.sizes(), self.plan.device().clone());
        let decay = self.plan.spec().decay();
        let dy = Buffer::from_slice(&device, dy)?;
        let (mut q, mut k, mut v) =
            (blank::<E>(&device, s.q())?, blank::<E>(&device, s.k())?, blank::<E>(&device, s.v())?);
        let mut by_gates = blank::<f32>(&device, s.gates())?;
        let mut by_slopes = vec![0.0; s.kv_heads];
        let mut by_state = StateGradient::new(&self.plan, s.batch, s.kv_heads)?;
        // The state that the second call began with.
        let mut middle = State::with_storage(&self.plan, s.batch, s.kv_heads, self.storage)?;
        let mut parts = vec![(0..s.queries, 0..s.keys, false)];
        if let Some(cut) = cut {
            let call = self.there.call(0..cut, 0..cut, true)?.state(&mut middle);
            self.plan.run(call, part_mut(&mut self.y, s.y(), 0..cut)?)?;
            parts = vec![(cut..s.queries, cut..s.keys, true), (0..cut, 0..cut, false)];
        }
        for (queries, keys, goes_on) in parts {
            let mut out = Gradients::new(
                part_mut(&mut q, s.q(), queries.clone())?,
                part_mut(&mut k, s.k(), keys.clone())?,
                part_mut(&mut v, s.v(), keys.clone())?,
            );
            let mut slopes = blank::<f64>(&device, [s.kv_heads, 1, 1, 1])?;
            match decay {
                Decay::None => (),
                Decay::Slopes => out = out.slopes(&mut slopes),
                Decay::Gates => {
                    out = out.log_gates(part_mut(&mut by_gates, s.gates(), keys.clone())?);
                }
            }
            let mut call = self.there.call(queries.clone(), keys, self.causal)?;
            if goes_on {
                call = call.state(&mut middle);
            }
            if cut.is_some() {
                out = out.state(&mut by_state);
            }
            self.plan.backward(call, part(&dy, s.y(), queries)?, out)?;
            if decay == Decay::Slopes {
                by_slopes.iter_mut().zip(slopes.to_vec()?).for_each(|(sum, x)| *sum += x);
            }
        }
        Ok(Some(ByInputs {
            q: wide(&q.to_vec()?),
            k: wide(&k.to_vec()?),
            v: wide(&v.to_vec()?),
            log_gates: if decay == Decay::Gates { wide(&by_gates.to_vec()?) } else { vec![] },
            slopes: if decay == Decay::Slopes { by_slopes } else { vec![] },
        }))
    }
}
