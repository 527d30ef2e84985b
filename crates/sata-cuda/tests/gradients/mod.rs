//! Gradients of calls on the emulated device.
#![allow(dead_code)]

use std::ops::Range;

use rand::Rng;
use rand::rngs::StdRng;
use sata::{Decay, Series};
use sata_cuda::{Buffer, Device, Element, Gradients, Plan, State, StateGradient, ViewMut};

use crate::common::{Fade, Inputs, Sizes, f64s};
use crate::gpu::{OnDevice, part, part_mut};

/// A series, its terms, what keys are multiplied by so that weights stay well above 0, and the sizes
/// of keys and values: what kernels are compiled for.
pub type Kind = (Series, usize, f64, [usize; 2]);

/// Some of many, so that not all are compiled every time.
pub fn kinds(rng: &mut StdRng, count: usize) -> Vec<Kind> {
    let power = |exponent| Series::Power { exponent, floor: 0.1 };
    let mut all = vec![
        (Series::Taylor, 1, 1.0, [3, 4]),
        (Series::Taylor, 2, 0.1, [17, 8]),
        (Series::Taylor, 3, 1.0, [5, 6]),
        (Series::Taylor, 3, 1.0, [16, 19]),
        (Series::Taylor, 4, 0.15, [8, 8]),
        (Series::Taylor, 5, 1.0, [8, 1]),
        (power(2), 3, 1.0, [17, 16]),
        (power(4), 3, 1.0, [1, 5]),
        (Series::Fixed { coefficients: vec![0.7, 0.0, 0.3] }, 3, 1.0, [8, 36]),
        (Series::Fixed { coefficients: vec![1.0, 0.1, 0.4, 0.0] }, 4, 0.2, [4, 70]),
    ];
    (0..count).map(|_| all.swap_remove(rng.random_range(0..all.len()))).collect()
}

/// All gradients of a whole, made at once or in parts.
pub struct Whole<E: Element> {
    s: Sizes,
    q: Buffer<E>,
    k: Buffer<E>,
    v: Buffer<E>,
    log_gates: Buffer<f32>,
    slopes: Buffer<f64>,
    sum_of_slopes: Vec<f64>,
    decay: Decay,
}

impl<E: Element> Whole<E> {
    /// Before anything is written: NaN.
    pub fn new(device: &Device, s: Sizes, decay: Decay) -> Self {
        fn nan<T: sata_cuda::Plain>(device: &Device, shape: [usize; 4]) -> Buffer<T> {
            let mut buffer = Buffer::uninit(device, shape.iter().product()).unwrap();
            buffer.fill_bytes(0xff).unwrap();
            buffer
        }
        Whole {
            s,
            q: nan(device, s.q()),
            k: nan(device, s.k()),
            v: nan(device, s.v()),
            log_gates: nan(device, [s.batch, s.kv_heads, s.keys, 1]),
            slopes: nan(device, [s.kv_heads, 1, 1, 1]),
            sum_of_slopes: vec![0.0; s.kv_heads],
            decay,
        }
    }

    /// Backward through a call over some queries and keys, which began with `initial`.
    #[allow(clippy::too_many_arguments)]
    pub fn part(
        &mut self,
        plan: &Plan,
        there: &OnDevice<E>,
        causal: bool,
        [queries, keys]: [Range<usize>; 2],
        dy: &Buffer<E>,
        initial: Option<&mut State>,
        by_state: Option<&mut StateGradient>,
    ) {
        let s = self.s;
        let mut out = Gradients::new(
            part_mut(&mut self.q, s.q(), queries.clone()),
            part_mut(&mut self.k, s.k(), keys.clone()),
            part_mut(&mut self.v, s.v(), keys.clone()),
        );
        match self.decay {
            Decay::None => {}
            Decay::Slopes => out = out.slopes(&mut self.slopes),
            Decay::Gates => {
                let shape = [s.batch, s.kv_heads, s.keys, 1];
                out = out.log_gates(part_mut(&mut self.log_gates, shape, keys.clone()));
            }
        }
        if let Some(by_state) = by_state {
            out = out.state(by_state);
        }
        let mut call = there.part(causal, queries.clone(), keys);
        if let Some(initial) = initial {
            call = call.state(initial);
        }
        plan.backward(call, part(dy, s.y(), queries), out).unwrap();
        if self.decay == Decay::Slopes {
            let slopes = self.slopes.to_vec().unwrap();
            self.sum_of_slopes.iter_mut().zip(slopes).for_each(|(sum, x)| *sum += x);
        }
    }

    /// `[q, k, v, log_gates, slopes]`; the last two are empty where the spec has none.
    pub fn done(&self) -> [Vec<f64>; 5] {
        let (gates, slopes) = (self.decay == Decay::Gates, self.decay == Decay::Slopes);
        [
            f64s(&self.q.to_vec().unwrap()),
            f64s(&self.k.to_vec().unwrap()),
            f64s(&self.v.to_vec().unwrap()),
            if gates { f64s(&self.log_gates.to_vec().unwrap()) } else { vec![] },
            if slopes { self.sum_of_slopes.clone() } else { vec![] },
        ]
    }
}

/// Gradients of one call over everything.
pub fn gradients<E: Element>(
    plan: &Plan,
    inputs: &Inputs<E>,
    fade: &Fade,
    causal: bool,
    dy: &[E],
) -> [Vec<f64>; 5] {
    let (s, device) = (inputs.sizes, plan.device());
    let there = OnDevice::new(device, inputs, fade);
    let dy = Buffer::from_slice(device, dy).unwrap();
    let mut whole = Whole::new(device, s, fade.decay());
    whole.part(plan, &there, causal, [0..s.queries, 0..s.keys], &dy, None, None);
    whole.done()
}

/// Gradients as plain numbers of another kind, to compare bit by bit.
pub fn bits(gradients: &[Vec<f64>; 5]) -> Vec<u64> {
    gradients.iter().flatten().map(|x| x.to_bits()).collect()
}

/// dL/dy on the device and its view's shape.
pub fn out_of<'a, E: Element>([q, k, v]: [&'a mut Buffer<E>; 3], s: Sizes) -> Gradients<'a, E> {
    Gradients::new(
        ViewMut::new(q, s.q()).unwrap(),
        ViewMut::new(k, s.k()).unwrap(),
        ViewMut::new(v, s.v()).unwrap(),
    )
}
