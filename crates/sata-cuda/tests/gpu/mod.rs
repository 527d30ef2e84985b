//! Calls on a device, for inputs of the CPU engine's tests: the emulated one, or GPU 0 where
//! `SATA_TEST_DEVICE` is `cuda`.
#![allow(dead_code)]

pub mod one_pass;

use std::ops::Range;

use half::bf16;
use sata::Diagnostics;
use sata_cuda::{Buffer, Call, Device, Element, Error, Plan, State, View, ViewMut};

use crate::common::truth::Truth;
use crate::common::{Fade, Inputs, Sizes, f64s};

pub fn device() -> Device {
    match std::env::var("SATA_TEST_DEVICE") {
        Ok(name) if name == "cuda" => Device::new(0).unwrap(),
        _ => Device::emulated().unwrap(),
    }
}

/// A Hopper GPU, or one emulated.
pub fn hopper() -> Device {
    match Device::new(0) {
        Ok(device) if device.properties().capability == (9, 0) => device,
        Ok(_) | Err(Error::NoDriver { .. } | Error::NoDevice { .. }) => {
            eprintln!("no Hopper GPU here: part of it is emulated");
            Device::emulated_hopper().unwrap()
        }
        Err(other) => panic!("{other}"),
    }
}

/// Inputs on the device.
pub struct OnDevice<E: Element> {
    pub sizes: Sizes,
    pub q: Buffer<E>,
    pub k: Buffer<E>,
    pub v: Buffer<E>,
    pub mask: Option<Buffer<u8>>,
    pub slopes: Option<Vec<f64>>,
    pub gates: Option<Buffer<f32>>,
}

impl<E: Element> OnDevice<E> {
    pub fn new(device: &Device, inputs: &Inputs<E>, fade: &Fade) -> Self {
        let mask = inputs.mask.as_ref().map(|mask| mask.iter().map(|&m| m.into()).collect());
        let mask: Option<Vec<u8>> = mask;
        let (mut slopes, mut gates) = (None, None);
        match fade {
            Fade::None => (),
            Fade::Slopes(m) => slopes = Some(m.clone()),
            Fade::Gates { log_gates, .. } => {
                gates = Some(Buffer::from_slice(device, log_gates).unwrap());
            }
        }
        OnDevice {
            sizes: inputs.sizes,
            q: Buffer::from_slice(device, &inputs.q).unwrap(),
            k: Buffer::from_slice(device, &inputs.k).unwrap(),
            v: Buffer::from_slice(device, &inputs.v).unwrap(),
            mask: mask.map(|mask| Buffer::from_slice(device, &mask).unwrap()),
            slopes,
            gates,
        }
    }

    /// Tokens `keys` of every sequence, seen by queries `queries`.
    pub fn part(&self, causal: bool, queries: Range<usize>, keys: Range<usize>) -> Call<'_, '_, E> {
        let s = self.sizes;
        let q = part(&self.q, s.q(), queries);
        let (k, v) = (part(&self.k, s.k(), keys.clone()), part(&self.v, s.v(), keys.clone()));
        let mut call = if causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
        if let Some(mask) = &self.mask {
            call = call.key_mask(mask_part(mask, s.batch, s.keys, keys.clone()));
        }
        if let Some(slopes) = &self.slopes {
            call = call.slopes(slopes);
        }
        if let Some(gates) = &self.gates {
            call = call.log_gates(part(gates, [s.batch, s.kv_heads, s.keys, 1], keys));
        }
        call
    }

    pub fn all(&self, causal: bool) -> Call<'_, '_, E> {
        self.part(causal, 0..self.sizes.queries, 0..self.sizes.keys)
    }
}

/// Some tokens of a tensor that lies row-major in a buffer.
pub fn part<T: sata_cuda::Plain>(
    buffer: &Buffer<T>,
    shape: [usize; 4],
    tokens: Range<usize>,
) -> View<'_, T> {
    let [batch, heads, all, dim] = shape;
    let strides = [heads * all * dim, all * dim, dim];
    let address = buffer.address() + (tokens.start * dim * size_of::<T>()) as u64;
    let len = buffer.len() - (tokens.start * dim).min(buffer.len());
    let shape = [batch, heads, tokens.len(), dim];
    // SAFETY: within the buffer, which the view borrows.
    unsafe { View::from_raw(buffer.device(), address, len, shape, strides) }.unwrap()
}

fn mask_part(mask: &Buffer<u8>, batch: usize, all: usize, keys: Range<usize>) -> View<'_, u8> {
    let address = mask.address() + keys.start as u64;
    let len = mask.len() - keys.start.min(mask.len());
    let strides = [all, all, all];
    // SAFETY: as above.
    unsafe { View::from_raw(mask.device(), address, len, [batch, 1, 1, keys.len()], strides) }
        .unwrap()
}

pub fn part_mut<T: sata_cuda::Plain>(
    buffer: &mut Buffer<T>,
    shape: [usize; 4],
    tokens: Range<usize>,
) -> ViewMut<'_, T> {
    let [batch, heads, all, dim] = shape;
    let strides = [heads * all * dim, all * dim, dim];
    let address = buffer.address() + (tokens.start * dim * size_of::<T>()) as u64;
    let len = buffer.len() - (tokens.start * dim).min(buffer.len());
    let shape = [batch, heads, tokens.len(), dim];
    // SAFETY: within the buffer, which the view borrows.
    unsafe { ViewMut::from_raw(buffer.device(), address, len, shape, strides) }.unwrap()
}

/// Outputs before anything is written: NaN.
pub fn blank<E: Element>(device: &Device, s: Sizes) -> Buffer<E> {
    let mut y = Buffer::uninit(device, s.y().iter().product()).unwrap();
    y.fill_bytes(0xff).unwrap();
    y
}

/// Outputs of one call over everything.
pub fn run<E: Element>(
    plan: &Plan,
    inputs: &Inputs<E>,
    fade: &Fade,
    causal: bool,
) -> (Vec<E>, Diagnostics) {
    let device = plan.device();
    let there = OnDevice::new(device, inputs, fade);
    let mut y = blank::<E>(device, inputs.sizes);
    let out = ViewMut::new(&mut y, inputs.sizes.y()).unwrap();
    let found = plan.run(there.all(causal), out).unwrap();
    (y.to_vec().unwrap(), found)
}

/// Tokens `range` of every sequence go through the state; outputs go to their places in `y`.
pub fn feed<E: Element>(
    plan: &Plan,
    state: &mut State,
    there: &OnDevice<E>,
    range: Range<usize>,
    y: &mut Buffer<E>,
) -> Diagnostics {
    let call = there.part(true, range.clone(), range.clone()).state(state);
    plan.run(call, part_mut(y, there.sizes.y(), range)).unwrap()
}

/// ‖y − truth‖ / ‖truth‖ over all rows, each error over what its denominator magnifies it by.
pub fn error(y: &[bf16], truth: &Truth) -> f64 {
    let (mut error, mut norm) = (0.0, 0.0);
    for (row, (got, want)) in
        f64s(y).chunks(truth.d_value).zip(truth.y.chunks(truth.d_value)).enumerate()
    {
        for (got, want) in got.iter().zip(want) {
            if want.is_nan() {
                assert!(got.is_nan(), "row {row} sees no key, but got {got}");
                continue;
            }
            assert!(got.is_finite(), "row {row}: got {got}, want {want}");
            error += ((got - want) / truth.magnified[row].max(1.0)).powi(2);
            norm += want * want;
        }
    }
    (error / norm).sqrt()
}

/// What bf16 inputs, features and outputs leave.
pub const ALLOWED: f64 = 6e-3;
