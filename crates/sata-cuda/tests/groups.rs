//! Groups of heads of one projection, each by a plan of its own: they read and write their part of
//! each token's row and nothing else.

#[path = "../../sata/tests/common/mod.rs"]
mod common;
mod gpu;

use common::{normal, rng};
use gpu::device;
use half::bf16;
use sata::{Decay, Near, Series, Spec};
use sata_cuda::{Buffer, Call, Device, Gradients, Plan, View, ViewMut};

const D: usize = 16;
const BATCH: usize = 2;
const TOKENS: usize = 100;
/// Heads of each group, as many of queries as of keys.
const HEADS: [usize; 2] = [3, 2];

/// Memory whose every number is a NaN of these bytes until it is written.
fn unwritten<T: sata_cuda::Element>(device: &Device, len: usize) -> Buffer<T> {
    let mut buffer = Buffer::uninit(device, len).unwrap();
    buffer.fill_bytes(0xff).unwrap();
    buffer
}

/// Some heads in the rows of a tensor, `[batch, tokens, row]`.
#[derive(Clone, Copy)]
struct Place {
    first: usize,
    row: usize,
    heads: usize,
    d: usize,
}

impl Place {
    fn shape(self) -> [usize; 4] {
        [BATCH, self.heads, TOKENS, self.d]
    }
    fn strides(self) -> [usize; 3] {
        [TOKENS * self.row, self.d, self.row]
    }
    fn view<'a, T: sata_cuda::Element>(self, device: &'a Device, x: &'a Buffer<T>) -> View<'a, T> {
        let address = x.address() + (self.first * size_of::<T>()) as u64;
        let (shape, strides) = (self.shape(), self.strides());
        // SAFETY: so many elements follow in the buffer.
        unsafe { View::from_raw(device, address, x.len() - self.first, shape, strides).unwrap() }
    }
    fn out<'a, T: sata_cuda::Element>(
        self,
        device: &'a Device,
        x: &'a Buffer<T>,
    ) -> ViewMut<'a, T> {
        let address = x.address() + (self.first * size_of::<T>()) as u64;
        let (shape, strides) = (self.shape(), self.strides());
        // SAFETY: as above, and views that are held at once share no element.
        unsafe { ViewMut::from_raw(device, address, x.len() - self.first, shape, strides).unwrap() }
    }
    /// Its elements, and where each is.
    fn elements(self) -> impl Iterator<Item = usize> {
        (0..BATCH * TOKENS).flat_map(move |t| {
            let first = t * self.row + self.first;
            first..first + self.heads * self.d
        })
    }
    /// Its own elements alone, row by row, and its place there.
    fn alone<T: sata_cuda::Element>(self, device: &Device, x: &[T]) -> (Buffer<T>, Self) {
        let own: Vec<T> = self.elements().map(|i| x[i]).collect();
        let place = Place { first: 0, row: self.heads * self.d, ..self };
        (Buffer::from_slice(device, &own).unwrap(), place)
    }
}

/// One group's places: queries, keys and values, gates, outputs.
struct Group {
    plan: Plan,
    qkv: [Place; 3],
    gates: Place,
    y: Place,
}

fn groups(device: &Device) -> [Group; 2] {
    let all: usize = HEADS.iter().sum();
    let specs = [
        Spec::new(D, D).terms(3).near(Near::Blocks(1)),
        Spec::new(D, D).series(Series::power(2)).near(Near::Blocks(0)).sinks(2),
    ];
    std::array::from_fn(|i| {
        let first: usize = HEADS[..i].iter().sum();
        let spec = specs[i].clone().block(16).decay(Decay::Gates).build().unwrap();
        let place = |first, row, d| Place { first, row, heads: HEADS[i], d };
        Group {
            plan: Plan::new(device, &spec).unwrap(),
            qkv: [0, 1, 2].map(|part| place((part * all + first) * D, 3 * all * D, D)),
            gates: place(first, all, 1),
            y: place(first * D, all * D, D),
        }
    })
}

struct Tensors {
    qkv: Buffer<bf16>,
    gates: Buffer<f32>,
    dy: Buffer<bf16>,
    y: Buffer<bf16>,
    dqkv: Buffer<bf16>,
    dgates: Buffer<f32>,
}

impl Tensors {
    fn run(&self, device: &Device, plan: &Plan, group: ([Place; 3], Place, Place)) {
        let (qkv, gates, y) = group;
        let call = || {
            let [q, k, v] = qkv.map(|place| place.view(device, &self.qkv));
            Call::causal(q, k, v).log_gates(gates.view(device, &self.gates))
        };
        plan.run(call(), y.out(device, &self.y)).unwrap();
        let [q, k, v] = qkv.map(|place| place.out(device, &self.dqkv));
        let gradients = Gradients::new(q, k, v).log_gates(gates.out(device, &self.dgates));
        plan.backward(call(), y.view(device, &self.dy), gradients).unwrap();
    }

    /// What was written, as numbers.
    fn written(&self) -> [Vec<f64>; 3] {
        let halves = |x: &Buffer<bf16>| x.to_vec().unwrap().iter().map(|x| x.to_f64()).collect();
        let gates = self.dgates.to_vec().unwrap();
        [halves(&self.y), halves(&self.dqkv), gates.iter().map(|&x| f64::from(x)).collect()]
    }
}

#[test]
fn each_group_has_its_part_of_the_rows() {
    let (device, mut rng) = (device(), rng());
    let all: usize = HEADS.iter().sum();
    let rows = BATCH * TOKENS;
    let qkv: Vec<bf16> = normal(&mut rng, rows * 3 * all * D);
    let dy: Vec<bf16> = normal(&mut rng, rows * all * D);
    let gates: Vec<f32> = normal::<f32>(&mut rng, rows * all).iter().map(|x| -x.abs()).collect();
    let whole = Tensors {
        qkv: Buffer::from_slice(&device, &qkv).unwrap(),
        gates: Buffer::from_slice(&device, &gates).unwrap(),
        dy: Buffer::from_slice(&device, &dy).unwrap(),
        y: unwritten(&device, rows * all * D),
        dqkv: unwritten(&device, qkv.len()),
        dgates: unwritten(&device, gates.len()),
    };
    let groups = groups(&device);
    for (done, group) in groups.iter().enumerate() {
        whole.run(&device, &group.plan, (group.qkv, group.gates, group.y));
        let [y, dqkv, dgates] = whole.written();
        // Every group so far is there, and nothing of those to come.
        for (i, of) in groups.iter().enumerate() {
            let there = |x: &[f64], place: Place| {
                assert!(place.elements().all(|at| x[at].is_finite() == (i <= done)), "group {i}");
            };
            there(&y, of.y);
            of.qkv.iter().for_each(|&place| there(&dqkv, place));
            there(&dgates, of.gates);
        }
    }
    let [y, dqkv, dgates] = whole.written();
    for (i, group) in groups.iter().enumerate() {
        // The same numbers in tensors of their own.
        let own = group.qkv.map(|place| place.elements().map(|at| qkv[at]).collect::<Vec<_>>());
        let width = HEADS[i] * D;
        let packed: Vec<bf16> = (0..rows)
            .flat_map(|t| own.iter().flat_map(move |x| &x[t * width..(t + 1) * width]))
            .copied()
            .collect();
        let (gate_tensor, gate_place) = group.gates.alone(&device, &gates);
        let (dy_tensor, y_place) = group.y.alone(&device, &dy);
        let alone = Tensors {
            qkv: Buffer::from_slice(&device, &packed).unwrap(),
            gates: gate_tensor,
            dy: dy_tensor,
            y: unwritten(&device, rows * width),
            dqkv: unwritten(&device, packed.len()),
            dgates: unwritten(&device, rows * HEADS[i]),
        };
        let places = [0, 1, 2].map(|part| Place {
            first: part * width,
            row: 3 * width,
            heads: HEADS[i],
            d: D,
        });
        alone.run(&device, &group.plan, (places, gate_place, y_place));
        let [own_y, own_dqkv, own_dgates] = alone.written();
        let near = |what: &str, got: &[f64], at: Place, want: &[f64], own: Place| {
            let pairs = at.elements().zip(own.elements());
            let (off, norm) = pairs.fold((0.0, 0.0), |(off, norm), (at, own)| {
                (off + (got[at] - want[own]).powi(2), norm + want[own].powi(2))
            });
            let error = (off / norm).sqrt();
            println!("group {i}, {what}: {error:.1e}");
            // Another order of sums in f32 at most.
            assert!(error < 1e-3, "group {i}, {what}: {error:e}");
        };
        near("y", &y, group.y, &own_y, y_place);
        for (part, place) in places.into_iter().enumerate() {
            near("gradient", &dqkv, group.qkv[part], &own_dqkv, place);
        }
        near("gates", &dgates, group.gates, &own_dgates, gate_place);
    }
}
