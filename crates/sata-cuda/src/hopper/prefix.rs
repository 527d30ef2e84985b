//! What precedes each chunk, for others than the forward pass: the backward pass streams its own
//! tokens past the same kernel.

use std::sync::Arc;

use sata::Spec;

use super::program::{Program, Sizes};
use super::units::{Shape, Summing};
use super::{MOST_KEY, MOST_ORDER, launch, params};
use crate::problem::Problem;
use crate::units::Units;
use crate::{Buffer, Device, Error, Plan, Unit};

/// Sums of features of one spec.
#[derive(Debug)]
pub(crate) struct Prefix {
    shape: Shape,
    coefficients: Buffer<f32>,
    /// Of each derivative of the sums of ones: where it comes from, times 4, and how many times it
    /// counts; or −1.
    pub slopes: Buffer<i32>,
}

/// Some chunks of each of some heads: the first tile of each, how many tiles, its place.
pub(crate) type Chunks = Vec<[usize; 3]>;

impl Prefix {
    /// Whether there are kernels.
    pub(crate) fn serves(problem: &Problem<'_>) -> bool {
        let spec = problem.spec;
        (problem.device.properties().capability == (9, 0) || problem.device.is_emulated())
            && spec.d_key().is_multiple_of(8)
            && (16..=MOST_KEY).contains(&spec.d_key())
            && spec.d_value().is_multiple_of(8)
            && spec.d_value() <= 64
            && spec.orders().iter().all(|&order| order <= MOST_ORDER)
    }

    /// Numbers of the sums of a chunk of a spec.
    pub(crate) fn numbers(spec: &Spec) -> usize {
        Sizes::new(spec.d_key(), spec.d_value(), &spec.orders()).elements()
    }

    /// Those of a plan.
    pub(crate) fn new(plan: &Plan, fades: bool) -> Result<Self, Error> {
        let spec = plan.spec();
        let orders = spec.orders();
        let sizes = Sizes::new(spec.d_key(), spec.d_value(), &orders);
        let shape = Shape { sizes, terms: spec.terms(), fades, near: false };
        let coefficients = spec.coefficients().unwrap_or_default();
        let factor = |(p, a): (usize, &f64)| a * spec.scale().powi(p as i32);
        let factors: Vec<f64> = coefficients.iter().enumerate().map(factor).collect();
        let program = Program::new(&sizes, &*plan.basis()?, &factors);
        let slopes = slopes(&sizes, &program, plan)?;
        Ok(Prefix {
            shape,
            coefficients: Buffer::from_slice(plan.device(), &program.coefficients)?,
            slopes: Buffer::from_slice(plan.device(), &slopes)?,
        })
    }

    /// Numbers of the sums of a chunk.
    pub(crate) fn elements(&self) -> usize {
        self.shape.sizes.elements()
    }

    /// Columns of sums.
    pub(crate) fn columns(&self) -> usize {
        self.shape.sizes.columns()
    }

    /// Bytes of a record of 64 tokens.
    pub(crate) fn tile_bytes(&self) -> usize {
        self.shape.sum_tile_bytes()
    }

    /// How so many heads are summed, if there are enough of them.
    pub(crate) fn summing(
        &self,
        heads: usize,
        device: &Device,
    ) -> Option<impl Fn(&Units, Run<'_>) -> Result<(), Error> + use<>> {
        let summing =
            self.shape.prefix_sums(heads, device.properties().multiprocessors as usize, false)?;
        let coefficients = self.coefficients.address();
        Some(move |units: &Units, run: Run<'_>| sum(units, &summing, coefficients, heads, run))
    }

    /// What the sources of others need to see the same features.
    pub(crate) fn define(&self, unit: Unit) -> Unit {
        unit.define("ORDERS", self.shape.sizes.orders)
            .define("HAS_G", 0)
            .define("TOKEN_TILE_BYTES", self.tile_bytes())
            .least(90)
    }
}

/// One run of the kernel.
#[derive(Debug)]
pub(crate) struct Run<'r> {
    pub device: &'r Device,
    pub chunks: &'r Chunks,
    /// Records, `[head][tile]`, and how many a head has.
    pub records: u64,
    pub tiles: usize,
    /// `[head][place]` f64: what the sums before each place are relative to.
    pub references: u64,
    /// `[head][place]` of sums: what precedes each.
    pub far: u64,
    pub places: usize,
}

fn sum(
    units: &Units,
    summing: &Summing,
    coefficients: u64,
    heads: usize,
    run: Run<'_>,
) -> Result<(), Error> {
    let Run { device, chunks, .. } = run;
    let items: Vec<params::Chunk> = chunks
        .iter()
        .enumerate()
        .map(|(number, &[tile, tiles, place])| params::Chunk {
            tile: tile as i32,
            tiles: tiles as i32,
            place: place as i32,
            number: number as i32,
        })
        .collect();
    let table: Arc<Buffer<params::Chunk>> = units.table(&items)?;
    let most = device.properties().multiprocessors as usize;
    let (team, teams) = summing.teams(heads, most);
    let blocks = team * teams;
    let left = Buffer::<u8>::uninit(device, blocks * summing.kept)?;
    let ready = Buffer::<u32>::zeroed(device, blocks * summing.flags())?;
    let p = params::Sums {
        tiles: run.records,
        sums: 0,
        far: run.far,
        coefficients,
        references: run.references,
        left: left.address(),
        ready: ready.address(),
        items: table.address(),
        item_count: items.len() as i32,
        heads: heads as i32,
        tile_count: run.tiles as i32,
        chunk_count: run.places as i32,
        team: team as i32,
        unused: 0,
    };
    let kernel = units.kernel("hopper_sums", &summing.unit())?;
    let launch = launch([blocks, 1, 1], summing.threads(), summing.shared);
    // SAFETY: `SumChunks` of the source; records and far have places for each chunk and head, the
    // rest for each block of the launch.
    unsafe { kernel.launch_on(device, launch, &p) }
}

/// See `matrix_backward_far.cu`: blocks of features of order 2, 1 (an even number of them), 1 and the
/// sum of ones; of each feature its derivatives by every element.
fn slopes(sizes: &Sizes, program: &Program, plan: &Plan) -> Result<Vec<i32>, Error> {
    let (d, n) = (sizes.d_key, sizes.key_blocks());
    let basis = plan.basis()?;
    let mut index = std::collections::HashMap::with_capacity(basis.len());
    crate::plan::each_monomial(&basis, |indices| {
        let next = index.len();
        index.insert(indices.to_vec(), next);
    });
    let of = |indices: &[usize], by: usize| {
        let mut all: Vec<u32> = indices.iter().map(|&i| i as u32).collect();
        all.push(by as u32);
        all.sort_unstable();
        let times = all.iter().filter(|&&i| i as usize == by).count();
        index.get(&all).map_or(-1, |&feature| program.map[feature] * 4 + times as i32)
    };
    // In the layout of the matrix unit: [block][elements / 8][8 features][8 elements].
    let mut all = vec![];
    let mut block =
        |features: &[Option<Vec<usize>>]| {
            for elements in 0..d / 8 {
                for feature in features {
                    all.extend((0..8).map(|e| {
                        feature.as_ref().map_or(-1, |feature| of(feature, 8 * elements + e))
                    }));
                }
            }
        };
    if sizes.has(3) {
        for b in 0..n {
            for c in b..n {
                for i in 8 * b..8 * b + 8 {
                    let feature = |e: usize| (8 * c + e >= i).then(|| vec![i, 8 * c + e]);
                    block(&(0..8).map(feature).collect::<Vec<_>>());
                }
            }
        }
    }
    for c in 0..n.next_multiple_of(2) {
        let feature = |e: usize| (c < n).then(|| vec![8 * c + e]);
        block(&(0..8).map(feature).collect::<Vec<_>>());
    }
    let mut one = vec![None; 8];
    one[0] = Some(vec![]);
    block(&one);
    block(&[const { None }; 8]);
    let place = index.get(&vec![]).map_or(-1, |&feature| program.map[feature] * 4 + 1);
    let ones = all.len() - 8 * d;
    all[ones] = place;
    Ok(all)
}
